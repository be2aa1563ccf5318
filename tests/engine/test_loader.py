"""Which models are served, and that they are computed as transformers computes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from engine.config import EngineConfig
from engine.errors import ConfigurationError, UnsupportedModel
from engine.model.loader import load
from tests.model_lab import (
    FolderSource,
    greedy_reference,
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
NO_GROUPS = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
# Their contexts below are longer than the windows.
SERVED: dict[str, PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama dynamic": transformers.LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=8),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=8),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8),
    "phi3": transformers.Phi3Config(**SIZES),
    "gpt_neox": transformers.GPTNeoXConfig(**NO_GROUPS),
    "gpt2": transformers.GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "olmo2": transformers.Olmo2Config(**SIZES),
    "granite": transformers.GraniteConfig(**SIZES),
    "starcoder2": transformers.Starcoder2Config(**SIZES, sliding_window=8),
    "cohere": transformers.CohereConfig(**SIZES),
    "glm4": transformers.Glm4Config(**SIZES, head_dim=8),
    "smollm3": transformers.SmolLM3Config(**SIZES),
    "opt": transformers.OPTConfig(
        vocab_size=257, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=128,
    ),
}  # fmt: skip
REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "falcon": (
        transformers.FalconConfig(
            vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
        ),
        "do not call the attention function",
    ),
    "gpt_oss": (
        transformers.GptOssConfig(**SIZES, head_dim=8, num_local_experts=4),
        "s_aux",
    ),
    "llama4": (
        transformers.Llama4TextConfig(
            **SIZES, head_dim=8, num_local_experts=2, intermediate_size_mlp=48
        ),
        "chunked_attention",
    ),
    "bloom": (transformers.BloomConfig(vocab_size=257, hidden_size=32, n_layer=2), "max_model_len"),
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
        expected = greedy_reference(reference, prompt, 12)
        assert num_ties(reference, prompt, found=tokens, expected=expected) == 0


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_would_be_computed_wrongly_is_refused_with_the_reason(
    family: str, tmp_path: Path
) -> None:
    config, reason = REFUSED[family]
    name = save_random_model(config, tmp_path / "model")
    with pytest.raises(ConfigurationError, match=reason):
        load(EngineConfig(model=name, served_name="base"))


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
    expected = greedy_reference(reference, prompt, 8)
    assert num_ties(reference, prompt, found=found, expected=expected) == 0
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
    name = save_random_model(SERVED["gpt2"], tmp_path / "model")
    shape = load(EngineConfig(model=name, served_name="base")).base_shape
    assert shape.modules["transformer.h.0.attn.c_attn"] == (32, 96)
    assert shape.parameters["transformer.h.0.attn.c_attn.weight"] == (32, 96)
    assert shape.embeddings.keys() == {"transformer.wte", "transformer.wpe"}
    assert (shape.output_layer, shape.is_tied) == ("lm_head", True)


def test_experts_take_no_adapters(tmp_path: Path) -> None:
    name = save_random_model(SERVED["mixtral"], tmp_path / "model")
    shape = load(EngineConfig(model=name, served_name="base")).base_shape
    assert not any("experts" in path for path in (*shape.modules, *shape.parameters))


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
