"""A manifest says of an adapter what PEFT makes of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters import manifest, validate, weights
from adapters.errors import InvalidAdapter
from adapters.manifest import is_canonical
from adapters.validate import BaseShape
from tests.adapters.tiny_adapters import BASE, LIMITS, Saved

KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 8},
    "float alpha": {"lora_alpha": 0.5},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "all linear layers": {"target_modules": "all-linear"},
    "a pattern over paths": {"target_modules": r".*layers\.[02]\.(self_attn|mlp)\.(q|up)_proj"},
    "ranks by module": {"rank_pattern": {"q_proj": 8, "layers.1.self_attn.v_proj": 2}},
    "the first pattern decides": {
        "rank_pattern": {r"layers\.\d\.self_attn\.q_proj": 3, "q_proj": 5, ".*v_proj": 6},
        "alpha_pattern": {"v_proj": 64, r"^model\.layers\.2.*": 1, "q_proj": 2},
    },
    "rslora with patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 9},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 27},
    },
    "some layers": {"layers_to_transform": [0, 2]},
    "one layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded by name": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "excluded by pattern": {"exclude_modules": r"model\.layers\.0\..*"},
}


@pytest.fixture(params=KINDS)
def adapter(request: pytest.FixtureRequest, save_adapter: Callable[..., Saved]) -> Saved:
    return save_adapter(**KINDS[request.param])


def test_modules_ranks_scalings_and_weights_are_those_that_peft_loads(adapter: Saved) -> None:
    loaded = weights.load(adapter.folder, base_model=BASE, dtype=torch.float32).lora
    by_peft = adapter.as_peft_loads_it()
    modules = adapter.read().modules

    assert loaded.keys() == modules.keys() == by_peft.keys()
    for name, layer in by_peft.items():
        assert loaded[name].scaling == modules[name].scaling == layer.scaling["default"]
        assert modules[name].rank == layer.r["default"]
        assert torch.equal(loaded[name].lora_A, layer.lora_A["default"].weight.float())
        assert torch.equal(loaded[name].lora_B, layer.lora_B["default"].weight.float())


def test_what_peft_saves_has_no_findings(adapter: Saved, base_shape: BaseShape) -> None:
    found = adapter.read()
    assert found.leftovers == {}
    assert validate.check(found, base_shape, limits=LIMITS) == []
    assert validate.check_values(adapter.weights_path, found) == []


def test_the_canonical_configuration_is_the_same_adapter_to_peft_and_to_us(adapter: Saved) -> None:
    before, scalings = adapter.read(), _scalings(adapter)
    adapter.config_path.write_bytes(before.canonical_config())

    assert is_canonical(before.canonical_config())
    assert adapter.read().weights_digest == before.weights_digest
    assert adapter.read().canonical_config() == before.canonical_config()
    assert _scalings(adapter) == scalings


def _scalings(adapter: Saved) -> dict[str, float]:
    return {name: layer.scaling["default"] for name, layer in adapter.as_peft_loads_it().items()}


def test_what_peft_writes_itself_is_not_canonical(save_adapter: Callable[..., Saved]) -> None:
    assert not is_canonical(save_adapter().config_path.read_bytes())


def test_the_spelling_of_names_does_not_change_the_digest(
    save_adapter: Callable[..., Saved],
) -> None:
    adapter = save_adapter()
    digest = adapter.read().weights_digest

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            short = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
            tensors[short] = tensors.pop(name)

    adapter.edit_tensors(rename)
    assert adapter.read().weights_digest == digest


def test_what_does_not_change_the_function_does_not_change_the_digest(
    save_adapter: Callable[..., Saved],
) -> None:
    adapter = save_adapter()
    digest = adapter.read().weights_digest
    adapter.edit_config(
        peft_version="0.1",
        lora_dropout=0.5,
        base_model_name_or_path="/somewhere/else",
        target_modules=["v_proj", "q_proj"],
        alpha_pattern={"nowhere": 3},
    )
    assert adapter.read().weights_digest == digest


@pytest.mark.parametrize(
    ("demo", "digest"),
    [
        ("sql", "86d2137f0fb6b82b0ac70ab323f1a4598da1a55b5b7a3df17cef08d2c7ba0d02"),
        ("pirate", "277f7dea66b0b4c7714f0ef46500e545cae08be8bc0b769df92bfd76e1cb59b0"),
    ],
)
def test_the_digest_of_plain_lora_is_what_stores_have_it_under(demo: str, digest: str) -> None:
    folder = Path(manifest.__file__).parent / "demo" / demo
    config = (folder / manifest.CONFIG_FILE).read_bytes()
    path = folder / manifest.WEIGHTS_FILE
    found = manifest.read(config, path, base_model="SmolLM2-135M-Instruct")
    assert found.weights_digest == digest


@pytest.mark.parametrize(
    ("options", "spoiled"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["norm"]}, "norm.weight"),
        ({"trainable_token_indices": [1]}, "trainable_tokens_delta"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_B"),
    ],
)
def test_every_tensor_that_has_an_effect_is_in_the_digest(
    save_adapter: Callable[..., Saved], options: dict[str, object], spoiled: str
) -> None:
    adapter = save_adapter(**options)
    before = adapter.read().weights_digest

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        next(tensor for name, tensor in tensors.items() if name.endswith(spoiled)).add_(1)

    adapter.edit_tensors(spoil)
    assert adapter.read().weights_digest != before


def test_which_tokens_are_trained_is_in_the_digest(save_adapter: Callable[..., Saved]) -> None:
    adapter = save_adapter(trainable_token_indices=[1, 2])
    before = adapter.read().weights_digest
    adapter.edit_config(trainable_token_indices=[1, 3])
    assert adapter.read().weights_digest != before


def test_a_manifest_counts_ranks_and_parameters(save_adapter: Callable[..., Saved]) -> None:
    found = save_adapter(target_modules=["q_proj"], rank_pattern={"layers.0.*": 6}).read()
    assert found.max_rank == 6
    assert found.num_parameters == (6 + 4 + 4) * (32 + 32)
    assert (found.features, found.num_added_tokens) == (("rank_pattern",), 0)


def test_a_weight_a_scaling_or_the_base_model_changes_the_digest(
    save_adapter: Callable[..., Saved],
) -> None:
    adapter = save_adapter()
    digests = {adapter.read().weights_digest}
    adapter.edit_config(lora_alpha=17)
    digests.add(adapter.read().weights_digest)
    adapter.edit_tensors(lambda tensors: next(iter(tensors.values())).add_(1))
    digests.add(adapter.read().weights_digest)
    config = adapter.config_path.read_bytes()
    digests.add(manifest.read(config, adapter.weights_path, base_model="other").weights_digest)
    assert len(digests) == 4


def test_loading_refuses_a_folder_of_which_a_part_would_go_unused(
    save_adapter: Callable[..., Saved],
) -> None:
    adapter = save_adapter()
    adapter.edit_tensors(lambda tensors: tensors.update(stray=torch.ones(1)))
    with pytest.raises(InvalidAdapter, match="stray"):
        weights.load(adapter.folder, base_model=BASE, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_loaded_in_the_dtype_that_is_asked_for(
    save_adapter: Callable[..., Saved], dtype: torch.dtype
) -> None:
    adapter = save_adapter(dtype=torch.bfloat16)
    for module in weights.load(adapter.folder, base_model=BASE, dtype=dtype).lora.values():
        assert module.lora_A.dtype == module.lora_B.dtype == dtype
        assert module.lora_A.shape[0] == module.lora_B.shape[1] == 4
