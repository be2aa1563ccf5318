"""Which models are served, and that they are computed as transformers computes them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from engine.config import EngineConfig
from engine.errors import ConfigurationError, UnsupportedModel
from engine.model.attention import PagedStep
from engine.model.loader import load
from tests.model_lab import (
    FolderSource,
    following,
    num_ties,
    open_lab,
    save_random_model,
    tiny_llama_config,
)

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
# Beside those of tests/parity/test_families.py; contexts below are longer than the windows.
SERVED: dict[str, PretrainedConfig] = {
    "olmo2": transformers.Olmo2Config(**SIZES),
    "olmo3": transformers.Olmo3Config(**SIZES, sliding_window=8),
    "granite": transformers.GraniteConfig(**SIZES),
    "starcoder2": transformers.Starcoder2Config(**SIZES, sliding_window=8),
    "cohere": transformers.CohereConfig(**SIZES),
    "cohere2": transformers.Cohere2Config(**SIZES, sliding_window=8),
    "glm4": transformers.Glm4Config(**SIZES, head_dim=8),
    "smollm3": transformers.SmolLM3Config(**SIZES),
    "phi": transformers.PhiConfig(**SIZES),
    "opt": transformers.OPTConfig(
        vocab_size=257, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=128,
    ),
    # Pictures are not read; its text is.
    "gemma3": transformers.Gemma3Config(
        text_config=SIZES | {"head_dim": 8, "sliding_window": 8},
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4,
    ),
}  # fmt: skip
WINDOWED: dict[str, PretrainedConfig] = {
    "mistral": transformers.MistralConfig(**SIZES),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=None),
    "gemma3_text": transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=32),
    "modernbert-decoder": transformers.ModernBertDecoderConfig(**SIZES),
}
REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    # By name.
    "falcon": (transformers.FalconConfig(), "'falcon'.*computes attention itself"),
    "gptj": (transformers.GPTJConfig(), "'gptj'.*computes attention itself"),
    "bloom": (transformers.BloomConfig(), "'bloom'.*ALiBi"),
    "mpt": (transformers.MptConfig(), "'mpt'.*ALiBi"),
    "gpt_oss": (transformers.GptOssConfig(), "'gpt_oss'.*sinks"),
    "mamba": (transformers.MambaConfig(), "'mamba'.*a state from token to token"),
    "jamba": (transformers.JambaConfig(), "'jamba'.*a state from token to token"),
    "qwen3_next": (transformers.Qwen3NextConfig(), "'qwen3_next'.*a state from token to token"),
    "llama4": (transformers.Llama4TextConfig(), "'llama4_text'.*within chunks"),
    "bert": (transformers.BertConfig(), "'bert'.*see those behind them"),
    # By what the configuration says.
    "t5": (transformers.T5Config(), "has an encoder"),
    "bart": (transformers.BartConfig(), "has an encoder"),
    "lfm3": (transformers.Lfm3Config(), "layers of the type.*conv"),
}
# Each by another part of the check.
FOUND_BY_RUNNING: dict[str, tuple[PretrainedConfig, str]] = {
    "stablelm": (transformers.StableLmConfig(**SIZES), "does not hand keyword arguments on"),
    "diffllama": (transformers.DiffLlamaConfig(**SIZES), "moves its logits"),
    "doge": (transformers.DogeConfig(**SIZES), "mask of its own"),
    "phimoe": (
        transformers.PhimoeConfig(**SIZES, num_local_experts=4, sliding_window=8),
        "does not reach the attention function",
    ),
    "hunyuan_v1_moe": (
        transformers.HunYuanMoEV1Config(**SIZES, head_dim=8, num_experts=4, moe_topk=2),
        "Its code fails in the check at load: AttributeError",
    ),
}
PROMPTS = [[(37 * i + k) % 257 for i in range(length)] for k, length in enumerate((5, 40, 23))]


def longrope_config() -> PretrainedConfig:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 32,
    }
    return transformers.Phi3Config(
        **SIZES, original_max_position_embeddings=32, rope_parameters=rope
    )


@pytest.mark.parametrize("family", SERVED)
def test_a_family_answers_as_transformers_does(family: str, tmp_path: Path) -> None:
    name = save_random_model(SERVED[family], tmp_path / "model")
    with open_lab(name, FolderSource(tmp_path), max_num_batched_tokens=64) as lab:
        keys = [lab.submit(prompt, max_tokens=12) for prompt in PROMPTS]
        lab.run()
        found = [lab.answers[key].token_ids for key in keys]
    reference = AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager")
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        assert num_ties(following(reference, prompt, tokens), tokens) == 0


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_is_not_served_is_refused_before_its_weights_are_read(
    family: str, tmp_path: Path
) -> None:
    config, reason = REFUSED[family]
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=reason):
        load(EngineConfig(model=str(tmp_path), served_name="base"))


@pytest.mark.parametrize("family", FOUND_BY_RUNNING)
def test_a_model_that_would_be_computed_wrongly_is_refused_with_the_reason(
    family: str, tmp_path: Path
) -> None:
    config, reason = FOUND_BY_RUNNING[family]
    name = save_random_model(config, tmp_path / "model")
    with pytest.raises(UnsupportedModel, match=reason):
        load(EngineConfig(model=name, served_name="base"))


@pytest.mark.parametrize("family", WINDOWED)
def test_the_check_crosses_windows_that_its_prompts_would_never_fill(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = save_random_model(WINDOWED[family], tmp_path / "model")
    loaded = load(EngineConfig(model=name, served_name="base"))
    assert {layer.sliding_window for layer in loaded.layers} - {None}
    monkeypatch.setattr(PagedStep, "attend", attend_without_windows(PagedStep.attend))
    with pytest.raises(UnsupportedModel, match="of their spread"):
        load(EngineConfig(model=name, served_name="base"))


def attend_without_windows(attend: Any) -> Any:
    return lambda step, *states, call: attend(
        step, *states, call=replace(call, sliding_window=None)
    )


def test_dynamic_rope_reads_more_than_it_was_trained_on_where_that_is_wanted(
    tmp_path: Path,
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    name = save_random_model(transformers.LlamaConfig(**SIZES, rope_parameters=rope), tmp_path)
    lengths = (None, 200, 256)
    found = [
        load(EngineConfig(model=name, served_name="base", max_model_len=length)).max_model_len
        for length in lengths
    ]
    assert found == [128, 200, 256]
    with pytest.raises(ConfigurationError, match="limit is 256"):
        load(EngineConfig(model=name, served_name="base", max_model_len=257))


@pytest.mark.parametrize("max_model_len", [32, 128])
def test_longrope_is_frozen_by_the_longest_context(max_model_len: int, tmp_path: Path) -> None:
    """Within the original context the short factors, beyond it the long ones, for all."""
    name = save_random_model(longrope_config(), tmp_path / "model")
    is_long = max_model_len > 32
    prompt, short = (PROMPTS[1], PROMPTS[0]) if is_long else (PROMPTS[2][:20], PROMPTS[0])
    with open_lab(name, FolderSource(tmp_path), max_model_len=max_model_len) as lab:
        alone = lab.generate(short, max_tokens=8)
        keys = [lab.submit(p, max_tokens=8) for p in (prompt, short)]
        lab.run()
        found, beside = (lab.answers[key].token_ids for key in keys)
    reference = AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager")
    assert num_ties(following(reference, prompt, found), found) == 0
    assert beside == alone


def test_adapters_may_change_every_module_in_which_tokens_do_not_meet(model: str) -> None:
    shape = load(EngineConfig(model=model, served_name="base")).base_shape
    assert shape.base_model == "base"
    assert len(shape.modules) == 2 * 7 + 1
    assert shape.modules["model.layers.1.mlp.down_proj"] == (48, 32)
    assert shape.modules["lm_head"] == (32, 257)
    assert shape.embeddings == {"model.embed_tokens": (257, 32)}
    assert len(shape.parameters) == 2 * (7 + 2) + 3
    assert shape.parameters["model.layers.0.input_layernorm.weight"] == (32,)
    assert (shape.output_layer, shape.is_tied) == ("lm_head", False)


def test_a_gpt2_has_its_own_kind_of_linear_layers_and_ties_its_head(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4)
    name = save_random_model(config, tmp_path / "model")
    shape = load(EngineConfig(model=name, served_name="base")).base_shape
    assert shape.modules["transformer.h.0.attn.c_attn"] == (32, 96)
    assert shape.parameters["transformer.h.0.attn.c_attn.weight"] == (32, 96)
    assert shape.embeddings.keys() == {"transformer.wte", "transformer.wpe"}
    assert (shape.output_layer, shape.is_tied) == ("lm_head", True)


def test_experts_take_no_adapters_and_are_told_by_name(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    name = save_random_model(config, tmp_path / "model")
    shape = load(EngineConfig(model=name, served_name="base")).base_shape
    assert not any("experts" in path for path in (*shape.modules, *shape.parameters))
    assert shape.experts["model.layers.1.mlp.experts.gate_up_proj"] == (4, 96, 32)
    assert len(shape.experts) == 2 * 2


def test_the_digest_tells_models_apart_and_not_their_places(tmp_path: Path, model: str) -> None:
    def digest(name: str) -> str:
        return load(EngineConfig(model=name, served_name="base")).base_digest

    twin = save_random_model(tiny_llama_config(), tmp_path / "twin")
    wider = save_random_model(tiny_llama_config(intermediate_size=64), tmp_path / "wider")
    assert digest(model) == digest(twin) != digest(wider)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes_the_check(model: str, dtype: Any) -> None:
    loaded = load(EngineConfig(model=model, served_name="base", dtype=dtype))
    assert loaded.dtype is getattr(torch, dtype)
    assert {layer.dtype for layer in loaded.layers} == {loaded.dtype}


def test_a_paged_result_that_differs_from_eager_is_refused(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.model.loader.LOGIT_BOUNDS", {torch.float32: -1.0})
    with pytest.raises(UnsupportedModel, match="of their spread"):
        load(EngineConfig(model=model, served_name="base"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "/nowhere/at-all"}, "cannot be loaded"),
        ({"device": "teapot"}, "no device"),
        ({"device": "meta"}, "must be 'cpu' or 'cuda'"),
        ({"max_model_len": 257}, "limit is 256"),
    ],
)
def test_what_cannot_be_loaded_is_named(model: str, changes: dict[str, Any], reason: str) -> None:
    settings: dict[str, Any] = {"model": model, "served_name": "base"} | changes
    with pytest.raises(ConfigurationError, match=reason):
        load(EngineConfig(**settings))
