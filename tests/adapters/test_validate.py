"""Everything that is wrong with an adapter is told at once, with its place and its cure."""

from collections.abc import Callable

import msgspec
import pytest
import torch
from torch import Tensor

from adapters import validate
from adapters.errors import Finding
from adapters.validate import BaseShape, Limits
from tests.adapters.tiny_adapters import LIMITS, Saved, shape_of, tiny_llama

PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"
Q0_A, Q0_B = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"


@pytest.fixture
def adapter(save_adapter: Callable[..., Saved]) -> Saved:
    return save_adapter()


def findings_of(adapter: Saved, base: BaseShape, *, limits: Limits = LIMITS) -> list[Finding]:
    return validate.check(adapter.read(base), base, limits=limits)


def told(findings: list[Finding]) -> set[tuple[str, str]]:
    assert all(f.message and f.fix for f in findings)
    return {(f.code, f.where) for f in findings}


def test_a_lonely_half_of_a_pair_is_told(adapter: Saved, base_shape: BaseShape) -> None:
    adapter.edit_tensors(lambda tensors: tensors.pop(Q0_B))
    assert told(findings_of(adapter, base_shape)) == {
        ("missing_pair", Q0_A),
        ("missing_tensors", Q0),
    }


def test_a_tensor_that_nothing_would_use_is_told(adapter: Saved, base_shape: BaseShape) -> None:
    adapter.edit_tensors(lambda tensors: tensors.update(stray=torch.ones(1)))
    assert told(findings_of(adapter, base_shape)) == {("unused_tensor", "stray")}


@pytest.mark.parametrize(
    "name",
    [
        f"{PREFIX}{Q0}.lora_magnitude_vector",
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta",
    ],
)
def test_a_tensor_that_the_configuration_does_not_mention_is_told(
    adapter: Saved, base_shape: BaseShape, name: str
) -> None:
    adapter.edit_tensors(lambda tensors: tensors.update({name: torch.ones(1)}))
    assert told(findings_of(adapter, base_shape)) == {("not_configured", name)}


def test_a_parameter_that_the_base_model_does_not_have_is_told(
    adapter: Saved, base_shape: BaseShape
) -> None:
    name = f"{PREFIX}{Q0}.base_layer.bias"
    adapter.edit_tensors(lambda tensors: tensors.update({name: torch.ones(32)}))
    assert told(findings_of(adapter, base_shape)) == {("unused_tensor", name)}


def test_a_module_to_save_that_mixes_tokens_is_told_by_its_name(
    adapter: Saved, base_shape: BaseShape
) -> None:
    adapter.edit_config(modules_to_save=["router"])
    name = f"{PREFIX}model.layers.0.router.weight"
    adapter.edit_tensors(lambda tensors: tensors.update({name: torch.ones(4, 32)}))
    assert told(findings_of(adapter, base_shape)) == {
        ("module_not_served", "model.layers.0.router")
    }


@pytest.mark.parametrize(
    ("spelling", "num_tensors"),
    [
        # PEFT's of a group's first and second parameter, then an older one of each expert's layer.
        ("mlp.experts.base_layer.lora_{side}.weight", 2),
        ("mlp.experts.lora_{side}.weight", 2),
        ("mlp.experts.{expert}.gate_proj.lora_{side}.weight", 8),
        ("block_sparse_moe.experts.{expert}.w1.lora_{side}.weight", 8),
    ],
)
def test_experts_are_told_by_their_name_once_for_each_layer(
    adapter: Saved, base_shape: BaseShape, spelling: str, num_tensors: int
) -> None:
    group = f"model.layers.1.{spelling.partition('.experts')[0]}.experts"
    stacked = {"model.layers.1.mlp.experts.down_proj": (4, 32, 64)}
    base_shape = msgspec.structs.replace(base_shape, experts=stacked)
    names = {
        f"{PREFIX}model.layers.1.{spelling.format(side=side, expert=expert)}"
        for side in "AB"
        for expert in range(4)
    }
    assert len(names) == num_tensors
    adapter.edit_tensors(lambda tensors: tensors.update({n: torch.ones(4, 32) for n in names}))
    found = findings_of(adapter, base_shape)
    assert told(found) == {("experts_not_served", group)}
    if "mlp" in group:
        assert "down_proj [4, 32, 64]" in found[0].message


def test_retrained_experts_and_lora_on_their_parameters_are_told_by_their_name(
    adapter: Saved, base_shape: BaseShape
) -> None:
    group = "model.layers.1.mlp.experts"
    stacked = {f"{group}.down_proj": (4, 32, 64)}
    base_shape = msgspec.structs.replace(base_shape, experts=stacked)
    adapter.edit_config(modules_to_save=["experts"], target_parameters=["mlp.experts.down_proj"])
    name = f"{PREFIX}{group}.down_proj"
    adapter.edit_tensors(lambda tensors: tensors.update({name: torch.ones(4, 32, 64)}))
    assert told(findings_of(adapter, base_shape)) == {
        ("field_not_served", "target_parameters"),
        ("experts_not_served", group),
    }


@pytest.mark.parametrize(
    ("options", "name", "where"),
    [
        ({"use_dora": True}, f"{PREFIX}{Q0}.lora_magnitude_vector", Q0),
        ({"modules_to_save": ["norm"]}, f"{PREFIX}model.norm.weight", "model.norm.weight"),
        (
            {"trainable_token_indices": [4]},
            f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta",
            "trainable_token_indices",
        ),
    ],
)
def test_a_part_that_the_configuration_promises_and_the_file_lacks_is_told(
    save_adapter: Callable[..., Saved],
    base_shape: BaseShape,
    options: dict[str, object],
    name: str,
    where: str,
) -> None:
    adapter = save_adapter(**options)
    adapter.edit_tensors(lambda tensors: tensors.pop(name))
    assert told(findings_of(adapter, base_shape)) == {("missing_tensors", where)}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"use_dora": True}, f"{PREFIX}{Q0}.lora_magnitude_vector"),
        ({"modules_to_save": ["norm"]}, f"{PREFIX}model.norm.weight"),
        (
            {"trainable_token_indices": [4]},
            f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta",
        ),
    ],
)
def test_a_part_of_another_shape_or_dtype_is_told(
    save_adapter: Callable[..., Saved],
    base_shape: BaseShape,
    options: dict[str, object],
    name: str,
) -> None:
    adapter = save_adapter(**options)
    adapter.edit_tensors(lambda tensors: tensors.update({name: torch.ones(7).double()}))
    assert told(findings_of(adapter, base_shape)) == {
        ("shape_mismatch", name),
        ("dtype_not_served", name),
    }


def test_an_embedding_smaller_than_the_base_model_s_is_told(
    save_adapter: Callable[..., Saved], base_shape: BaseShape
) -> None:
    adapter = save_adapter(modules_to_save=["lm_head"])
    name = f"{PREFIX}lm_head.weight"
    adapter.edit_tensors(lambda tensors: tensors.update({name: tensors[name][:40].clone()}))
    assert told(findings_of(adapter, base_shape)) == {("shape_mismatch", name)}


def test_tokens_added_over_the_limit_or_to_one_layer_alone_are_told(
    save_adapter: Callable[..., Saved], base_shape: BaseShape
) -> None:
    model = tiny_llama()
    model.resize_token_embeddings(60, mean_resizing=False)
    adapter = save_adapter(model=model, save_embedding_layers=True)
    assert adapter.read(base_shape).num_added_tokens == 12
    assert told(findings_of(adapter, base_shape)) == {
        ("too_many_added_tokens", "adapter_model.safetensors")
    }
    adapter.edit_tensors(lambda tensors: tensors.pop(f"{PREFIX}lm_head.weight"))
    roomy = Limits(max_rank=8, max_size_bytes=1 << 20)
    assert told(findings_of(adapter, base_shape, limits=roomy)) == {
        ("added_tokens_incomplete", "adapter_model.safetensors")
    }


def test_a_trained_token_that_the_embedding_does_not_have_is_told(
    save_adapter: Callable[..., Saved], base_shape: BaseShape
) -> None:
    adapter = save_adapter(trainable_token_indices=[4])
    adapter.edit_config(trainable_token_indices=[48])
    assert told(findings_of(adapter, base_shape)) == {("unknown_token", "trainable_token_indices")}


def test_trained_tokens_below_lora_are_told(save_adapter: Callable[..., Saved]) -> None:
    adapter = save_adapter(
        model=tiny_llama(tie_word_embeddings=True),
        target_modules=["lm_head"],
        trainable_token_indices=[4],
        save_embedding_layers=False,
    )
    base = shape_of(tiny_llama(tie_word_embeddings=True))
    assert told(findings_of(adapter, base)) == {("combination_not_served", "lm_head")}


def test_a_retrained_weight_below_lora_inside_the_model_is_told(
    adapter: Saved, base_shape: BaseShape
) -> None:
    weight = torch.ones(32, 32)
    adapter.edit_tensors(lambda tensors: tensors.update({f"{Q0}.base_layer.weight": weight}))
    assert told(findings_of(adapter, base_shape)) == {("combination_not_served", Q0)}


def test_lora_that_tied_layers_share_is_refused_by_the_name_of_its_field(
    save_adapter: Callable[..., Saved],
) -> None:
    tied = tiny_llama(tie_word_embeddings=True)
    base = shape_of(tied)
    adapter = save_adapter(model=tied, target_modules=["embed_tokens"], ensure_weight_tying=True)
    findings = told(findings_of(adapter, base))
    assert ("field_not_served", "ensure_weight_tying") in findings


@pytest.mark.parametrize("field", ["bias", "use_dora", "ensure_weight_tying"])
def test_an_option_without_an_effect_on_this_base_model_is_no_finding(
    save_adapter: Callable[..., Saved], base_shape: BaseShape, field: str
) -> None:
    adapter = save_adapter(**{field: "all" if field == "bias" else True})
    assert findings_of(adapter, base_shape) == []


def test_two_spellings_of_one_tensor_are_told(adapter: Saved, base_shape: BaseShape) -> None:
    twin = f"{Q0}.lora_A.weight"
    adapter.edit_tensors(lambda tensors: tensors.update({twin: tensors[Q0_A].clone()}))
    assert told(findings_of(adapter, base_shape)) == {("duplicate_tensor", twin)}


def test_another_base_model_is_told_by_the_shapes(adapter: Saved) -> None:
    shape = BaseShape(base_model="tiny-llama", modules={Q0: (64, 64)})
    findings = findings_of(adapter, shape)
    codes = {f.code for f in findings}
    assert codes == {"shape_mismatch", "unknown_module"}
    assert any(f.where == Q0_A and "[4, 64] is needed" in f.message for f in findings)


def test_another_served_name_is_told(adapter: Saved, base_shape: BaseShape) -> None:
    other = BaseShape(base_model="other", modules=base_shape.modules)
    assert told(findings_of(adapter, other)) == {("base_model_mismatch", "base_model")}


def test_a_rank_that_the_configuration_does_not_say_is_told(
    adapter: Saved, base_shape: BaseShape
) -> None:
    adapter.edit_config(rank_pattern={r"layers.0.self_attn.q_proj": 8})
    assert told(findings_of(adapter, base_shape)) == {
        ("rank_mismatch", Q0_A),
        ("rank_mismatch", Q0_B),
    }


def test_a_tensor_of_three_dimensions_is_told(adapter: Saved, base_shape: BaseShape) -> None:
    adapter.edit_tensors(lambda tensors: tensors.update({Q0_A: tensors[Q0_A][None].clone()}))
    assert told(findings_of(adapter, base_shape)) == {("shape_mismatch", Q0_A)}


def test_a_rank_over_the_limit_is_told_for_each_module(
    adapter: Saved, base_shape: BaseShape
) -> None:
    findings = findings_of(adapter, base_shape, limits=Limits(max_rank=3, max_size_bytes=1 << 20))
    assert {f.code for f in findings} == {"rank_too_large"}
    assert len(findings) == 6


def test_a_file_over_the_limit_is_told(adapter: Saved, base_shape: BaseShape) -> None:
    findings = findings_of(adapter, base_shape, limits=Limits(max_rank=8, max_size_bytes=100))
    assert [f.code for f in findings] == ["too_large"]


def test_a_dtype_that_is_not_served_is_told(adapter: Saved, base_shape: BaseShape) -> None:
    adapter.edit_tensors(lambda tensors: tensors.update({Q0_A: tensors[Q0_A].double()}))
    assert told(findings_of(adapter, base_shape)) == {("dtype_not_served", Q0_A)}


def test_weights_outside_of_the_target_modules_are_told(
    adapter: Saved, base_shape: BaseShape
) -> None:
    adapter.edit_config(target_modules=["v_proj"])
    findings = findings_of(adapter, base_shape)
    assert {f.code for f in findings} == {"not_targeted"}
    assert len(findings) == 3


def test_target_modules_without_weights_are_told(adapter: Saved, base_shape: BaseShape) -> None:
    adapter.edit_config(target_modules=["q_proj", "v_proj", "o_proj"])
    findings = findings_of(adapter, base_shape)
    assert {f.code for f in findings} == {"missing_tensors"}
    assert len(findings) == 3


def test_a_file_without_lora_is_told(adapter: Saved, base_shape: BaseShape) -> None:
    adapter.edit_tensors(lambda tensors: tensors.clear())
    assert "no_lora" in {f.code for f in findings_of(adapter, base_shape)}


def test_findings_of_configuration_and_weights_come_together(
    adapter: Saved, base_shape: BaseShape
) -> None:
    adapter.edit_config(use_qalora=True, alora_invocation_tokens=[1], invented=1)
    adapter.edit_tensors(lambda tensors: tensors.update(stray=torch.ones(1)))
    assert told(findings_of(adapter, base_shape)) == {
        ("field_not_served", "use_qalora"),
        ("field_not_served", "alora_invocation_tokens"),
        ("field_not_served", "invented"),
        ("unused_tensor", "stray"),
    }


def test_findings_without_end_are_cut_off_with_their_number(
    adapter: Saved, base_shape: BaseShape
) -> None:
    strays = {f"stray.{number}": torch.ones(1) for number in range(validate.MAX_FINDINGS + 7)}
    adapter.edit_tensors(lambda tensors: tensors.update(strays))
    findings = findings_of(adapter, base_shape)
    assert len(findings) == validate.MAX_FINDINGS + 1
    assert findings[-1].message == "has 7 findings more"


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def values_told(adapter: Saved) -> set[tuple[str, str]]:
    return told(validate.check_values(adapter.weights_path, adapter.read()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_told(
    save_adapter: Callable[..., Saved], dtype: torch.dtype, value: float
) -> None:
    adapter = save_adapter(dtype=dtype)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[Q0_A][-1, -1] = value

    adapter.edit_tensors(spoil)
    assert values_told(adapter) == {("not_finite", Q0_A)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [Q0_A, Q0_B])
def test_a_module_that_changes_nothing_is_told(
    save_adapter: Callable[..., Saved], dtype: torch.dtype, name: str
) -> None:
    adapter = save_adapter(dtype=dtype)
    # Minus zero is zero too.
    adapter.edit_tensors(lambda tensors: tensors[name].zero_().neg_())
    assert values_told(adapter) == {("zero_delta", Q0)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_and_largest_numbers_are_neither_zero_nor_infinite(
    save_adapter: Callable[..., Saved], dtype: torch.dtype
) -> None:
    adapter = save_adapter(dtype=dtype)

    def stretch(tensors: dict[str, Tensor]) -> None:
        tensors[Q0_A].zero_()[0, 0] = torch.finfo(dtype).smallest_normal
        tensors[Q0_B].fill_(torch.finfo(dtype).max)

    adapter.edit_tensors(stretch)
    assert values_told(adapter) == set()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"use_dora": True}, f"{PREFIX}{Q0}.lora_magnitude_vector"),
        ({"modules_to_save": ["norm"]}, f"{PREFIX}model.norm.weight"),
        (
            {"trainable_token_indices": [4]},
            f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta",
        ),
    ],
)
@pytest.mark.parametrize(
    ("value", "code"), [(float("nan"), "not_finite"), (1e6, "absurd_norm")], ids=str
)
def test_the_numbers_of_every_part_are_read(
    save_adapter: Callable[..., Saved],
    options: dict[str, object],
    name: str,
    value: float,
    code: str,
) -> None:
    adapter = save_adapter(**options)
    adapter.edit_tensors(lambda tensors: tensors[name].fill_(value))
    assert values_told(adapter) == {(code, name)}


def test_lora_that_is_far_stronger_than_any_trained_is_told_with_the_bound(
    adapter: Saved,
) -> None:
    adapter.edit_tensors(lambda tensors: tensors[Q0_B].mul_(1e5))
    [finding] = validate.check_values(adapter.weights_path, adapter.read())
    assert (finding.code, finding.where) == ("absurd_norm", Q0)
    assert f"{validate.MAX_GAIN:g}" in finding.message


def test_strong_lora_is_no_finding(adapter: Saved) -> None:
    """An alpha of 256 at rank 4, with both matrices as large as random ones are at the start."""
    adapter.edit_config(lora_alpha=256)
    assert values_told(adapter) == set()


def test_matrices_of_zeros_are_no_finding_where_a_magnitude_acts(
    save_adapter: Callable[..., Saved],
) -> None:
    adapter = save_adapter(use_dora=True)
    adapter.edit_tensors(lambda tensors: tensors[Q0_B].zero_())
    assert values_told(adapter) == set()


def test_an_adapter_that_nobody_trained_is_told_as_a_whole(adapter: Saved) -> None:
    def reset(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.mul_("lora_A" in name)

    adapter.edit_tensors(reset)
    assert ("zero_delta", "adapter_model.safetensors") in values_told(adapter)


def test_copies_that_differ_are_told(save_adapter: Callable[..., Saved]) -> None:
    tied = tiny_llama(tie_word_embeddings=True)
    base = shape_of(tied)
    adapter = save_adapter(model=tied, save_embedding_layers=True)
    assert validate.check_values(adapter.weights_path, adapter.read(base)) == []
    name = f"{PREFIX}lm_head.weight"
    adapter.edit_tensors(lambda tensors: tensors[name].add_(1))
    found = validate.check_values(adapter.weights_path, adapter.read(base))
    assert told(found) == {("duplicate_tensor", name)}


def test_an_alpha_of_zero_is_told(adapter: Saved, base_shape: BaseShape) -> None:
    adapter.edit_config(alpha_pattern={"layers.0.self_attn.q_proj": 0})
    assert told(findings_of(adapter, base_shape)) == {("zero_delta", Q0)}


def test_a_bad_value_past_the_first_chunk_is_found(
    save_adapter: Callable[..., Saved], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.tensor_file.CHUNK_BYTES", 64)
    adapter = save_adapter()

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[Q0_A].zero_()[-1, -1] = float("nan")

    adapter.edit_tensors(spoil)
    assert values_told(adapter) == {("not_finite", Q0_A)}
