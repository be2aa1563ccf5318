"""Weights in few bits: what they stand for, what is multiplied, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import ConfigurationError, UnsupportedModel
from engine.kernels import choice, products, quantised, quantised_cpu
from engine.kernels.quantised import BF16, FP8, INT4, INT8, INT8_DYNAMIC, Format
from engine.model.loader import LoadedModel, load
from engine.model.quantised import QuantisedLinear
from tests.model_lab import FolderSource, open_lab, save_random_model, tiny_llama_config

FORMATS = {each.name: each for each in (BF16, INT8, INT4, INT8_DYNAMIC, FP8)}
ON_CPU = ["bf16", "int8", "int4", "int8-dynamic"]
COMPILED = quantised_cpu.FORMATS
WIDE = tiny_llama_config(hidden_size=64, intermediate_size=96)


def random_weight(out_features: int, in_features: int) -> Tensor:
    """Rows of very different sizes."""
    torch.manual_seed(out_features + in_features)
    return torch.randn(out_features, in_features) * torch.logspace(-3, 1, out_features)[:, None]


def load_tiny(path: str, quantization: Any, **settings: Any) -> LoadedModel:
    return load(EngineConfig(model=path, served_name="base", quantization=quantization, **settings))


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_codes_stand_for_the_weight_to_half_a_step(form: Format) -> None:
    weight = random_weight(1100, 64)
    found = form.decode(*form.codes_of(weight))
    groups = weight.unflatten(1, (-1, quantised.GROUP_SIZE))
    if form in (INT8, INT8_DYNAMIC):
        steps = (groups.abs().amax(dim=-1) / 127).repeat_interleave(32, dim=1)
    elif form is INT4:
        spans = groups.amax(dim=-1) - groups.amin(dim=-1)
        # What the floor loses in float16 comes on top.
        steps = (spans / 15 + 2e-3 * groups.abs().amax(dim=-1)).repeat_interleave(32, dim=1)
    elif form is BF16:
        # 7 bits behind the leading one.
        steps = weight.abs() / 128
    else:
        # 3 bits behind the leading one.
        steps = weight.abs() / 8 + weight.abs().amax(dim=1, keepdim=True) / 448 / 256
    assert bool(((found - weight).abs() <= 0.51 * steps).all())


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_rows_without_a_size_stay_what_they_are(form: Format) -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 0.5
    torch.testing.assert_close(form.decode(*form.codes_of(weight)), weight, rtol=1e-3, atol=0)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7, 8, 16, 33])
@pytest.mark.parametrize("shape", [(48, 64), (7, 96), (1, 32), (1030, 32)])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_products_are_those_of_the_definition(
    name: str, shape: tuple[int, int], num_rows: int
) -> None:
    form, weight = FORMATS[name], random_weight(*shape)
    codes, scales = form.codes_of(weight)
    x = torch.randn(num_rows, shape[1])
    found = COMPILED[name].product(x, *COMPILED[name].codes_of(weight))
    own = x if form.rounded is None else form.rounded(x)
    expected = own.double() @ form.decode(codes, scales).double().T
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(form.product(x, codes, scales), found, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", [BF16, INT8], ids=["bf16", "int8"])
def test_weights_may_have_any_width(form: Format) -> None:
    codes, scales = form.codes_of(random_weight(5, 39))
    x = torch.randn(3, 39)
    found = COMPILED[form.name].product(x, codes, scales)
    torch.testing.assert_close(found, x @ form.decode(codes, scales).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 33])
@pytest.mark.parametrize("shape", [(48, 64), (7, 96), (130, 1056)])
def test_weights_that_bf16_holds_give_the_bits_of_whole_ones(
    shape: tuple[int, int], num_rows: int
) -> None:
    weight = random_weight(*shape).bfloat16().float()
    x = torch.randn(num_rows, shape[1])
    found = COMPILED["bf16"].product(x, *COMPILED["bf16"].codes_of(weight))
    assert torch.equal(found, products.linear(x, weight, None))


@pytest.mark.parametrize("num_rows", [2, 6, 40])
@pytest.mark.parametrize("name", ON_CPU)
def test_a_row_that_is_broken_or_huge_changes_no_other(name: str, num_rows: int) -> None:
    form = COMPILED[name]
    codes, scales = form.codes_of(random_weight(48, 64))
    x = torch.randn(num_rows, 64)
    expected = form.product(x, codes, scales)
    for value in (1e6, torch.nan, torch.inf):
        x[1, 5] = value
        found = form.product(x, codes, scales)
        others = [row for row in range(num_rows) if row != 1]
        torch.testing.assert_close(found[others], expected[others], rtol=1e-5, atol=1e-4)
        assert value == 1e6 or not bool(torch.isfinite(found[1]).any())


# Panels that are multiplied together, one by itself, and rows that fill none; one panel alone
@pytest.mark.parametrize("shape", [(130, 96), (1, 32), (2070, 64), (48, 40), (16, 64), (16, 512)])
def test_codes_lie_in_the_order_of_their_product_and_stand_for_the_same(
    shape: tuple[int, int],
) -> None:
    form, weight = COMPILED["int8-dynamic"], random_weight(*shape)
    expected = INT8_DYNAMIC.decode(*INT8_DYNAMIC.codes_of(weight))
    codes, scales = form.codes_of(weight)
    assert codes.shape == weight.shape
    assert codes.dtype is torch.int8
    assert torch.equal(form.decode(codes, scales), expected)
    first, end = shape[0] // 3, shape[0] - shape[0] // 4
    assert torch.equal(form.rows_of(codes, scales, first=first, end=end), expected[first:end])


@pytest.mark.parametrize("shape", [(130, 96), (7, 64), (48, 40)])
def test_products_of_integers_are_the_same_to_the_last_bit_in_every_batch(
    shape: tuple[int, int],
) -> None:
    form, weight = COMPILED["int8-dynamic"], random_weight(*shape)
    x = torch.randn(19, shape[1])
    x[2] = 0
    expected = INT8_DYNAMIC.product(x, *INT8_DYNAMIC.codes_of(weight))
    codes, scales = form.codes_of(weight)
    assert torch.equal(form.product(x, codes, scales), expected)
    alone = [form.product(row[None], codes, scales) for row in x]
    assert torch.equal(torch.cat(alone), expected)


def test_a_large_number_costs_its_own_group_alone() -> None:
    weight, x = random_weight(48, 96), torch.randn(3, 96)
    weight[:, :32] = 0
    for form in (INT8_DYNAMIC, COMPILED["int8-dynamic"]):
        codes, scales = form.codes_of(weight)
        expected = form.product(x, codes, scales)
        assert torch.equal(form.product(x + 1e6 * (torch.arange(96) == 5), codes, scales), expected)


def test_sums_of_the_largest_integers_do_not_saturate() -> None:
    x = quantised.INT8_MAX * torch.cat([torch.ones(9, 4096), -torch.ones(9, 4096)])
    for form in (INT8_DYNAMIC, COMPILED["int8-dynamic"]):
        torch.testing.assert_close(form.product(x, *form.codes_of(x)), x @ x.T)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp8 is multiplied on GPUs alone")
def test_fp8_products_are_those_of_what_they_round_to() -> None:
    assert FP8.rounded is not None
    codes, scales = (part.cuda() for part in FP8.codes_of(random_weight(48, 64)))
    x = torch.randn(9, 64).cuda().bfloat16()
    expected = FP8.rounded(x) @ FP8.decode(codes, scales).T
    found = FP8.product(x, codes, scales).float()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


# Models


@pytest.mark.parametrize("quantization", ON_CPU)
def test_all_linear_layers_are_quantised_and_nothing_else(
    quantization: str, tmp_path: Path
) -> None:
    path = save_random_model(WIDE, tmp_path / "model")
    loaded = load_tiny(path, quantization, max_loras=0)
    own = {name: m for name, m in loaded.model.named_modules() if isinstance(m, QuantisedLinear)}
    assert own.keys() == loaded.base_shape.modules.keys()
    expected = {"bf16": torch.bfloat16, "int4": torch.uint8}.get(quantization, torch.int8)
    assert {m.codes.dtype for name, m in own.items() if name != "lm_head"} == {expected}
    output_layer = torch.int8 if quantization == "int4" else expected
    assert own["lm_head"].codes.dtype is output_layer
    others = set(dict(loaded.model.named_parameters()).values()) - {
        parameter for module in own.values() for parameter in module.parameters()
    }
    assert {parameter.dtype for parameter in others} == {torch.float32}
    # What adapters see of the model is the same.
    whole = load_tiny(path, "none", max_loras=0)
    assert loaded.base_shape == whole.base_shape
    assert loaded.layers == whole.layers


def test_what_answers_otherwise_is_another_base_model(tmp_path: Path) -> None:
    path = save_random_model(WIDE, tmp_path / "model")
    digests = {name: load_tiny(path, name).base_digest for name in ("none", *ON_CPU)}
    assert len(set(digests.values())) == len(digests)
    assert load_tiny(path, "int8").base_digest == digests["int8"]


FAMILIES: dict[str, transformers.PretrainedConfig] = {
    "llama, tied": tiny_llama_config(
        hidden_size=64, intermediate_size=96, tie_word_embeddings=True
    ),
    "qwen2": transformers.Qwen2Config(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    ),
    "phi3": transformers.Phi3Config(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128,
    ),
    "gpt2, tied": transformers.GPT2Config(
        vocab_size=257, n_positions=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("quantization", ON_CPU)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_family_answers_in_a_batch_as_it_does_alone(
    family: str, quantization: str, tmp_path: Path
) -> None:
    path = save_random_model(FAMILIES[family], tmp_path / "model")
    prompts = [[(37 * i + k) % 257 for i in range(length)] for k, length in enumerate((3, 30, 17))]
    settings = {"quantization": quantization, "max_num_batched_tokens": 64}
    with open_lab(path, FolderSource(tmp_path), **settings) as lab:
        alone = [lab.generate(prompt, max_tokens=12) for prompt in prompts]
    with open_lab(path, FolderSource(tmp_path), **settings) as lab:
        keys = [lab.submit(prompt, max_tokens=12) for prompt in prompts]
        lab.run()
        assert [lab.answers[key].token_ids for key in keys] == alone
        lab.assert_nothing_is_left()


def test_a_checkpoint_in_bf16_loses_nothing_in_bf16(tmp_path: Path) -> None:
    path = save_random_model(WIDE, tmp_path / "model", dtype=torch.bfloat16)
    prompts = [[(37 * i + k) % 257 for i in range(length)] for k, length in enumerate((3, 30, 17))]
    answers = {}
    for quantization in ("none", "bf16"):
        with open_lab(path, FolderSource(tmp_path), quantization=quantization) as lab:
            keys = [lab.submit(prompt, max_tokens=12, logprobs=3) for prompt in prompts]
            lab.run()
            found = [lab.answers[key] for key in keys]
            answers[quantization] = [(each.token_ids, each.logprobs) for each in found]
    assert answers["none"] == answers["bf16"]


# What is refused


@pytest.mark.parametrize(
    ("config", "quantization", "reason"),
    [
        (tiny_llama_config(), "int4", "'int4'.*down_proj.*in_features, 48.*multiple of 32"),
        (tiny_llama_config(), "fp8", "'fp8', which needs a CUDA device"),
        (
            transformers.MixtralConfig(
                vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
            ),
            "int8",
            "not served for models of experts",
        ),
    ],
    ids=["odd groups", "fp8 without a GPU", "experts"],
)  # fmt: skip
def test_what_a_format_cannot_have_is_refused_by_name(
    config: transformers.PretrainedConfig, quantization: str, reason: str, tmp_path: Path
) -> None:
    path = save_random_model(config, tmp_path / "model")
    with pytest.raises(ConfigurationError, match=reason) as refused:
        load_tiny(path, quantization)
    assert isinstance(refused.value, UnsupportedModel) is ("experts" in reason)


def test_the_device_must_have_the_arithmetic() -> None:
    with pytest.raises(ConfigurationError, match="'int8-dynamic', which only a CPU serves"):
        choice.choose_formats("int8-dynamic", torch.device("cuda"), None)


def test_an_unknown_quantisation_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"quantization must be one of .*'awq'"):
        EngineConfig(model="model", served_name="base", quantization="awq")  # type: ignore[arg-type]  # on purpose
