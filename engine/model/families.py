"""Which models are refused before their weights are read, and why.

By name where a family is known not to fit, by what its configuration says of its layers otherwise.
Knows configurations. Knows nothing of what runs: what no configuration tells, the loader finds.
"""

from typing import Any

from engine.errors import UnsupportedModel

SERVED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})

_STATE = "Its layers carry a state from token to token, which no block of keys and values holds."
_OWN_ATTENTION = "Its code computes attention itself, and asks no attention function."
_ALIBI = "Its attention adds a bias for the distance of two tokens (ALiBi), which is not served."
_SINKS = "Its attention has sinks, learned logits that no position has, which are not served."
_CHUNKS = "Its layers attend within chunks of the context, which are not served."
_INDEX = "Its layers choose the positions that they attend to by an index, which is not served."
_SHARED = "Its layers use the keys and values of other layers, which is not served."
_BOTH_WAYS = "Its tokens see those behind them: it is no model that continues a text."

_FAMILIES = {
    _STATE: (
        *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2"),
        *("lfm2_moe", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5"),
        *("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma"),
        *("rwkv", "xlstm", "zamba", "zamba2", "zaya"),
    ),
    _OWN_ATTENTION: ("codegen", "falcon", "gpt_neo", "gptj", "openai-gpt", "reformer", "xglm"),
    _ALIBI: ("bloom", "mpt"),
    _SINKS: ("deepseek_v4", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"),
    _CHUNKS: ("llama4", "llama4_text"),
    _INDEX: ("deepseek_v32", "glm_moe_dsa"),
    _SHARED: ("gemma3n", "gemma3n_text"),
    _BOTH_WAYS: ("albert", "bert", "big_bird", "electra", "rembert", "roberta", "xlm-roberta"),
}
# By the configuration's `model_type`.
_REASONS = {family: reason for reason, families in _FAMILIES.items() for family in families}


def check(config: Any) -> None:
    """`config`: a checkpoint's, as transformers has it. Raises UnsupportedModel with the reason."""
    text_config = config.get_text_config()
    for model_type in (config.model_type, text_config.model_type):
        if model_type in _REASONS:
            raise UnsupportedModel(f"Models of the family {model_type!r}: {_REASONS[model_type]}")
    if config.is_encoder_decoder:
        raise UnsupportedModel("It has an encoder beside its decoder: it does not continue a text.")
    unknown = set(getattr(text_config, "layer_types", None) or ()) - SERVED_LAYER_TYPES
    if unknown:
        raise UnsupportedModel(f"It has layers of the type {sorted(unknown)}.")
