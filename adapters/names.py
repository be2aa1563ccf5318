"""Read a tensor's name as PEFT, its older versions and the trainers around it spell it.

Knows wrappers and endings. Which modules a base model has, `ModuleNames` is told.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Part(Enum):
    """What a tensor is to its module. The value is PEFT's own ending."""

    LORA_A = "lora_A.weight"
    LORA_B = "lora_B.weight"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    TOKENS = "trainable_tokens_delta"
    # A parameter of the base model, of which the adapter brings its own.
    PARAMETER = "parameter"
    # The same, in the place where PEFT trains it; older versions saved it from there.
    SAVED = "modules_to_save"
    # What a module to save was before training, which nothing uses.
    ORIGINAL = "original_module"


@dataclass(frozen=True, slots=True)
class TensorName:
    """The meaning of a tensor's name."""

    # Full path without the wrappers, e.g. "model.layers.0.self_attn.q_proj".
    module: str
    part: Part
    # The parameter's own name, e.g. "bias"; empty for what LoRA adds to a module.
    parameter: str = ""


# `torch.compile`, FSDP, activation checkpointing and PEFT put these between the names of modules.
_WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
)
# PEFT wraps the model twice, DDP and DeepSpeed once more; some trainers unwrap it.
_PREFIX = re.compile(r"^(?:module\.)*(?:base_model\.model\.)?(?:module\.)*")
# Some trainers keep the adapter's local name, which PEFT removes when it saves.
_ENDINGS = tuple(
    (re.compile(rf"(.+?)\.{ending}"), part)
    for ending, part in (
        (r"lora_A(?:\.default)?\.weight", Part.LORA_A),
        (r"lora_B(?:\.default)?\.weight", Part.LORA_B),
        (r"lora_embedding_A(?:\.default)?", Part.EMBEDDING_A),
        (r"lora_embedding_B(?:\.default)?", Part.EMBEDDING_B),
        (r"lora_magnitude_vector(?:\.default)?(?:\.weight)?", Part.MAGNITUDE),
        (r"(?:token_adapter\.)?trainable_tokens_delta(?:\.default)?", Part.TOKENS),
        (r"modules_to_save(?:\.default)?\.(\w+)", Part.SAVED),
        (r"original_module\.(\w+)", Part.ORIGINAL),
        (r"(?:token_adapter\.)?(\w+)", Part.PARAMETER),
    )
)
# Names of modules that only hold the language model, which trainers of models with a second
# modality have in between and text-only models have not, or in another order.
_HOLDERS = frozenset({"model", "language_model", "text_model"})


def parse(name: str) -> TensorName | None:
    """Return what a name means, None where it can be no part of a LoRA adapter."""
    unwrapped = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    bare = _PREFIX.sub("", unwrapped, count=1)
    for pattern, part in _ENDINGS:
        match = pattern.fullmatch(bare)
        if match is None:
            continue
        is_ours = any(piece.startswith("lora_") for piece in match[1].split("."))
        return None if is_ours else TensorName(match[1], part, *match.groups()[1:])
    return None


class ModuleNames:
    """The modules of a base model, found by any spelling that means exactly one of them."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = frozenset(paths)
        self._by_core: dict[str, str | None] = {}
        for path in self._paths:
            core = _core(path)
            # None where two modules differ in nothing but their holders.
            self._by_core[core] = None if core in self._by_core else path

    def resolve(self, path: str) -> str:
        """Return the module's own path; the given one where none or several could be meant."""
        if path in self._paths:
            return path
        return self._by_core.get(_core(path)) or path


def _core(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _HOLDERS)
