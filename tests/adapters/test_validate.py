"""Everything that is wrong with an adapter is told at once, with its place and its cure."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adapters import validate
from adapters.errors import Finding
from adapters.validate import BaseShape, Limits
from tests.adapters.tiny_adapters import LIMITS, Saved

PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"
Q0_A, Q0_B = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"


@pytest.fixture
def adapter(save_adapter: Callable[..., Saved]) -> Saved:
    return save_adapter()


def findings_of(adapter: Saved, base: BaseShape, *, limits: Limits = LIMITS) -> list[Finding]:
    return validate.check(adapter.read(), base, limits=limits)


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
        f"{PREFIX}model.embed_tokens.lora_embedding_A",
        f"{PREFIX}{Q0}.lora_magnitude_vector.weight",
        f"{PREFIX}{Q0}.lora_B.bias",
        f"{PREFIX}lm_head.modules_to_save.weight",
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta",
    ],
)
def test_a_kind_of_tensor_that_is_not_served_is_told(
    adapter: Saved, base_shape: BaseShape, name: str
) -> None:
    adapter.edit_tensors(lambda tensors: tensors.update({name: torch.ones(1)}))
    assert told(findings_of(adapter, base_shape)) == {("tensor_not_served", name)}


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
    adapter.edit_config(use_dora=True, bias="all", invented=1)
    adapter.edit_tensors(lambda tensors: tensors.update(stray=torch.ones(1)))
    assert told(findings_of(adapter, base_shape)) == {
        ("field_not_served", "use_dora"),
        ("field_not_served", "bias"),
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
