"""A name is understood in every spelling that means one tensor of the base model."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adapters import validate, weights
from adapters.base_shape import BaseShape
from adapters.errors import Finding
from adapters.names import ModuleNames, Part, TensorName, parse
from tests.adapters.tiny_adapters import BASE, LIMITS, Saved, shape_of, tiny_llama

Q0 = "model.layers.0.self_attn.q_proj"

SPELLINGS = {
    "PEFT": f"base_model.model.{Q0}.lora_A.weight",
    "PEFT before 0.3, and full training states": f"base_model.model.{Q0}.lora_A.default.weight",
    "unwrapped": f"{Q0}.lora_A.weight",
    "unwrapped, with the adapter's name": f"{Q0}.lora_A.default.weight",
    "Axolotl with DeepSpeed": f"module.base_model.model.{Q0}.lora_A.weight",
    "TRL with DDP inside PEFT": f"base_model.model.module.{Q0}.lora_A.weight",
    "Unsloth compiled": f"base_model.model._orig_mod.{Q0}.lora_A.weight",
    "compiled outside": f"_orig_mod.base_model.model.{Q0}.lora_A.weight",
    "Axolotl with FSDP": "base_model.model._fsdp_wrapped_module.model.layers.0."
    "_fsdp_wrapped_module.self_attn.q_proj.lora_A.weight",
    "with activation checkpointing": "base_model.model.model.layers.0."
    "_checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight",
    "the inner model alone": "base_model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "Unsloth with vision": "base_model.model.model.language_model.layers.0.self_attn.q_proj."
    "lora_A.weight",
    "TRL with vision, older": "base_model.model.language_model.model.layers.0.self_attn.q_proj."
    "lora_A.weight",
    "a text model inside": "base_model.model.model.text_model.layers.0.self_attn.q_proj."
    "lora_A.weight",
}


@pytest.mark.parametrize("name", SPELLINGS.values(), ids=SPELLINGS)
def test_every_trainer_s_spelling_is_the_same_tensor(name: str) -> None:
    meaning = parse(name)
    assert meaning is not None
    assert meaning.part is Part.LORA_A
    assert ModuleNames([Q0, "model.norm", "lm_head"]).resolve(meaning.module) == Q0


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        (f"{Q0}.lora_magnitude_vector", TensorName(Q0, Part.MAGNITUDE)),
        (f"{Q0}.lora_magnitude_vector.default.weight", TensorName(Q0, Part.MAGNITUDE)),
        (f"{Q0}.lora_magnitude_vector.weight", TensorName(Q0, Part.MAGNITUDE)),
        (f"{Q0}.lora_magnitude_vector.default", TensorName(Q0, Part.MAGNITUDE)),
        (f"{Q0}.base_layer.bias", TensorName(Q0, Part.PARAMETER, "bias")),
        (f"{Q0}.bias", TensorName(Q0, Part.PARAMETER, "bias")),
        ("wte.lora_embedding_A.default", TensorName("wte", Part.EMBEDDING_A)),
        ("wte.lora_embedding_B", TensorName("wte", Part.EMBEDDING_B)),
        ("lm_head.modules_to_save.default.weight", TensorName("lm_head", Part.SAVED, "weight")),
        ("lm_head.modules_to_save.weight", TensorName("lm_head", Part.SAVED, "weight")),
        ("lm_head.original_module.weight", TensorName("lm_head", Part.ORIGINAL, "weight")),
        ("wte.token_adapter.trainable_tokens_delta.default", TensorName("wte", Part.TOKENS)),
        ("wte.token_adapter.trainable_tokens_delta", TensorName("wte", Part.TOKENS)),
        ("wte.token_adapter.base_layer.weight", TensorName("wte", Part.PARAMETER, "weight")),
    ],
)
def test_every_kind_of_tensor_is_known_in_each_spelling(name: str, meaning: TensorName) -> None:
    assert parse(f"base_model.model.{name}") == parse(name) == meaning


@pytest.mark.parametrize(
    "name",
    [
        "",
        "weight",
        f"{Q0}.lora_C.weight",
        f"{Q0}.lora_B.bias",
        f"{Q0}.lora_A.other.weight",
        "a.lora_A.b.lora_B.weight",
    ],
)
def test_what_is_no_tensor_of_an_adapter_has_no_meaning(name: str) -> None:
    assert parse(name) is None


def test_a_name_that_could_mean_two_modules_means_neither() -> None:
    names = ModuleNames(["model.layers.0.q_proj", "language_model.layers.0.q_proj"])
    assert names.resolve("layers.0.q_proj") == "layers.0.q_proj"
    assert names.resolve("model.layers.0.q_proj") == "model.layers.0.q_proj"


def test_a_module_of_another_tower_is_not_taken_for_the_language_model_s() -> None:
    vision = "model.vision_tower.layers.0.self_attn.q_proj"
    assert ModuleNames([Q0]).resolve(vision) == vision


def with_vision(name: str) -> str:
    return name.replace("base_model.model.model.", "base_model.model.model.language_model.")


def older(name: str) -> str:
    return with_vision(name).replace(".weight", ".default.weight") if "lora_" in name else name


# The same patterns over the base model's own names.
PLAIN = {"rank_pattern": {r"layers\.0\..*q_proj": 2}}


@pytest.mark.parametrize("spell", [with_vision, older])
@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all", "rank_pattern": {r"language_model\.layers\.0\..*q_proj": 2}},
        {"modules_to_save": ["norm"], "use_dora": True},
        {"trainable_token_indices": [3, 1]},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_the_spelling_of_names_changes_nothing(
    save_adapter: Callable[..., Saved], spell: Callable[[str], str], options: dict[str, object]
) -> None:
    """What its trainer calls `language_model` is in the base model without."""
    model = tiny_llama(attention_bias=True, tie_word_embeddings=True)
    base_shape = shape_of(model)
    without_holder = {name: value for name, value in PLAIN.items() if name in options}
    adapter = save_adapter(model=model, **{**options, **without_holder})
    before = adapter.read(base_shape)
    adapter_config = adapter.config_path.read_bytes()
    adapter.config_path.write_bytes(before.canonical_config())
    expected = loaded_names(adapter)
    adapter.config_path.write_bytes(adapter_config)

    adapter.edit_config(**options)
    adapter.edit_tensors(lambda tensors: rename(tensors, spell))
    again = adapter.read(base_shape)
    assert again.weights_digest == before.weights_digest
    assert validate.check(again, base_shape, limits=LIMITS) == []

    adapter.config_path.write_bytes(again.canonical_config())
    assert adapter.read().weights_digest == before.weights_digest
    assert loaded_names(adapter) == expected


def test_a_pattern_means_the_names_that_its_trainer_saw(save_adapter: Callable[..., Saved]) -> None:
    adapter = save_adapter(target_modules=r".*\.q_proj")
    base_shape = shape_of(tiny_llama())
    adapter.edit_config(target_modules=r".*language.*q_proj")
    assert {f.code for f in found(adapter, base_shape)} == {"not_targeted"}
    adapter.edit_tensors(lambda tensors: rename(tensors, with_vision))
    assert found(adapter, base_shape) == []


def found(adapter: Saved, base_shape: BaseShape) -> list[Finding]:
    return validate.check(adapter.read(base_shape), base_shape, limits=LIMITS)


def rename(tensors: dict[str, Tensor], spell: Callable[[str], str]) -> None:
    for name in list(tensors):
        tensors[spell(name)] = tensors.pop(name)


def loaded_names(adapter: Saved) -> set[str]:
    loaded = weights.load(adapter.folder, base_model=BASE, dtype=torch.float32)
    return {*loaded.lora, *loaded.replaced, *loaded.tokens}
