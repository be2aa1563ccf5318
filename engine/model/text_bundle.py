"""Export what turns text into a model's tokens, so that others can do it without transformers.

Reads a checkpoint's tokenizer and configuration; knows nothing of its weights.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils.hub import cached_file

from adapters.text_bundle import PoolingKind, TextBundle
from engine.errors import ConfigurationError

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k")
# Where sentence-transformers writes how a checkpoint's states are pooled, and in which words.
POOLING_FILE = "1_Pooling/config.json"
POOLING_FLAGS: dict[str, PoolingKind] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


def export(model: str) -> TextBundle:
    """The text bundle of a checkpoint folder or hub id. Raises ConfigurationError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        config = AutoConfig.from_pretrained(model)
        generation = _generation_config(model, config)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"The tokenizer of {model!r} cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise ConfigurationError(
            f"{model!r} has no tokenizer.json: convert its tokenizer to the tokenizers format first"
        )
    text_config = config.get_text_config()
    return TextBundle(
        tokenizer_json=tokenizer.backend_tokenizer.to_str().encode(),
        chat_template=_chat_template(tokenizer.chat_template),
        special_tokens=dict(tokenizer.special_tokens_map),
        eos_token_ids=_merge(
            generation.eos_token_id,
            # Not every family's configuration has the field.
            getattr(text_config, "eos_token_id", None),
            tokenizer.eos_token_id,
            vocab_size=text_config.vocab_size,
        ),
        generation_defaults=_sampling_defaults(generation),
        context_length=text_config.max_position_embeddings,
        vocab_size=text_config.vocab_size,
        pooling=_pooling(model),
    )


def _pooling(model: str) -> PoolingKind | None:
    """None where the checkpoint says nothing, or something else than one of the two."""
    path = cached_file(
        model,
        POOLING_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    said = json.loads(Path(path).read_text())
    found = [kind for flag, kind in POOLING_FLAGS.items() if said.get(flag)]
    return found[0] if len(found) == 1 else None


def _generation_config(model: str, config: Any) -> Any:
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        # Many checkpoints have none; then the model's own configuration tells.
        return GenerationConfig.from_model_config(config)


def _chat_template(template: str | dict[str, str] | None) -> str | None:
    """Checkpoints with several name the plain one "default"."""
    return template.get("default") if isinstance(template, dict) else template


def _merge(*sources: int | Iterable[int] | None, vocab_size: int) -> tuple[int, ...]:
    """All ids that end an answer, each once: generation configurations often name them all, and
    the tokenizer only the one of a turn. A family's default may be none of this vocabulary."""
    ids: dict[int, None] = {}
    for source in sources:
        if source is not None:
            ids.update(dict.fromkeys([source] if isinstance(source, int) else source))
    return tuple(token_id for token_id in ids if token_id < vocab_size)


def _sampling_defaults(generation: Any) -> dict[str, float | int]:
    named = {name: getattr(generation, name) for name in SAMPLING_DEFAULTS}
    return {name: value for name, value in named.items() if value is not None}
