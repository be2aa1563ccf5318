"""Decide whether an adapter can be served on a base model, and tell all that stands against it.

Reads shapes and raw bits. Knows nothing of tenants, and runs no model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from adapters import tensor_file
from adapters.errors import Finding
from adapters.manifest import WEIGHTS_FILE, LoraEntry, Manifest, TensorEntry, split_key

__all__ = ["BaseShape", "Finding", "Limits", "check", "check_values"]

# More would tell nobody more, and a hostile file has a hundred thousand.
MAX_FINDINGS = 1000


@dataclass(frozen=True, slots=True)
class _FloatBits:
    """A float's layout in memory, where a value is not finite when all exponent bits are set."""

    word: str
    exponent: int
    magnitude: int


_FLOATS = {
    "F32": _FloatBits("<u4", exponent=0x7F80_0000, magnitude=0x7FFF_FFFF),
    "F16": _FloatBits("<u2", exponent=0x7C00, magnitude=0x7FFF),
    "BF16": _FloatBits("<u2", exponent=0x7F80, magnitude=0x7FFF),
}

# Parts of a name that PEFT gives to what we do not serve.
_KNOWN_KINDS = {
    "lora_embedding_": "is LoRA on an embedding",
    "lora_magnitude_vector": "is a DoRA magnitude",
    "modules_to_save": "is a retrained module",
    "token_adapter": "is a set of trainable tokens",
    ".bias": "is a bias",
    ".base_layer.": "is a weight of the base model",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What an operator allows an adapter to be."""

    max_rank: int
    max_size_bytes: int


def check(manifest: Manifest, base_shape: BaseShape, *, limits: Limits) -> list[Finding]:
    """Return everything that forbids serving this adapter on this base; empty when nothing does.

    Raises InvalidAdapter when a pattern of the configuration is too expensive to match.
    """
    findings = list(manifest.findings)
    findings += _whole(manifest, base_shape, limits=limits)
    findings += [_leftover(name, manifest) for name in manifest.leftovers]
    for module, entry in manifest.modules.items():
        findings += _module(module, entry, manifest, base_shape=base_shape, limits=limits)
    findings += _absent(manifest, base_shape)
    return _bounded(findings)


def check_values(path: Path, manifest: Manifest) -> list[Finding]:
    """Return what is wrong with the numbers in the weights file at `path`.

    NaN and infinity anywhere, and pairs of which one half is all zero. Raises UnreadableArtifact
    when the file has changed since its manifest was read.
    """
    findings: list[Finding] = []
    for module, entry in manifest.modules.items():
        scans = [_scan(path, half) for half in (entry.lora_A, entry.lora_B)]
        halves = zip((entry.lora_A, entry.lora_B), scans, strict=True)
        findings += [_not_finite(half.name) for half, scan in halves if not scan.is_finite]
        if any(scan.is_zero for scan in scans):
            findings.append(_no_effect(module, "one of its two matrices is all zero"))
    return _bounded(findings)


@dataclass(frozen=True, slots=True)
class _Scan:
    is_finite: bool
    is_zero: bool


def _scan(path: Path, entry: TensorEntry) -> _Scan:
    bits = _FLOATS.get(entry.dtype)
    if bits is None:
        return _Scan(is_finite=True, is_zero=False)
    is_finite = is_zero = True
    for chunk in tensor_file.chunks(path, entry):
        words = np.frombuffer(chunk, dtype=bits.word)
        is_finite = is_finite and not np.any((words & bits.exponent) == bits.exponent)
        is_zero = is_zero and not np.any(words & bits.magnitude)
    return _Scan(is_finite=is_finite, is_zero=is_zero)


def _whole(manifest: Manifest, base_shape: BaseShape, *, limits: Limits) -> Iterator[Finding]:
    if manifest.base_model != base_shape.base_model:
        yield Finding(
            code="base_model_mismatch",
            where="base_model",
            message=f"is for {manifest.base_model!r}, not for {base_shape.base_model!r}",
            fix="upload it for the base model that it was trained on",
        )
    if manifest.size_bytes > limits.max_size_bytes:
        yield Finding(
            code="too_large",
            where=WEIGHTS_FILE,
            message=f"has {manifest.size_bytes} bytes; the limit is {limits.max_size_bytes}",
            fix="train at a lower rank or on fewer modules, or save as bfloat16",
        )
    if not manifest.modules:
        yield Finding(
            code="no_lora",
            where=WEIGHTS_FILE,
            message="holds no pair of lora_A and lora_B",
            fix="upload the adapter that PEFT's save_pretrained wrote",
        )


def _leftover(name: str, manifest: Manifest) -> Finding:
    key = split_key(name)
    if key and key[0] in manifest.modules:
        return Finding(
            code="duplicate_tensor",
            where=name,
            message=f"is a second {key[1]} of {key[0]}",
            fix="keep one of the two",
        )
    if key:
        other = "lora_B" if key[1] == "lora_A" else "lora_A"
        return Finding(
            code="missing_pair",
            where=name,
            message=f"has no {other} beside it",
            fix="save the adapter again, whole",
        )
    kind = next((text for part, text in _KNOWN_KINDS.items() if part in f".{name}"), None)
    if kind:
        return Finding(
            code="tensor_not_served",
            where=name,
            message=f"{kind}, which is not served yet",
            fix="train plain LoRA on linear layers",
        )
    return Finding(
        code="unused_tensor",
        where=name,
        message="belongs to no LoRA pair, and would be silently ignored",
        fix="remove it, or save the adapter with PEFT's save_pretrained",
    )


def _module(
    module: str,
    entry: LoraEntry,
    manifest: Manifest,
    *,
    base_shape: BaseShape,
    limits: Limits,
) -> Iterator[Finding]:
    yield from _dtypes(entry)
    yield from _strength(module, entry, limits=limits)
    shape = base_shape.modules.get(module)
    if shape is None:
        yield _unknown_module(module, manifest, base_shape)
        return
    yield from _shapes(entry, *shape, base=_base_hint(manifest, base_shape))
    if not manifest.config.targets(module):
        yield Finding(
            code="not_targeted",
            where=module,
            message="has LoRA weights but is not among the target modules, so PEFT ignores them",
            fix="correct target_modules, exclude_modules or layers_to_transform",
        )


def _dtypes(entry: LoraEntry) -> Iterator[Finding]:
    for half in (entry.lora_A, entry.lora_B):
        if half.dtype not in _FLOATS:
            yield Finding(
                code="dtype_not_served",
                where=half.name,
                message=f"has dtype {half.dtype}; served are {', '.join(_FLOATS)}",
                fix="save the adapter in float32, float16 or bfloat16",
            )


def _strength(module: str, entry: LoraEntry, *, limits: Limits) -> Iterator[Finding]:
    if entry.rank > limits.max_rank:
        yield Finding(
            code="rank_too_large",
            where=module,
            message=f"has rank {entry.rank}; the limit is {limits.max_rank}",
            fix="train at a lower rank, or raise the operator's limit",
        )
    if entry.scaling == 0:
        yield _no_effect(module, "its alpha is 0")


def _shapes(
    entry: LoraEntry, in_features: int, out_features: int, *, base: str
) -> Iterator[Finding]:
    wanted = {
        entry.lora_A: (entry.rank, in_features),
        entry.lora_B: (out_features, entry.rank),
    }
    for rank_axis, (half, shape) in enumerate(wanted.items()):
        if half.shape == shape:
            continue
        is_rank = len(half.shape) == 2 and half.shape[1 - rank_axis] == shape[1 - rank_axis]
        yield Finding(
            code="rank_mismatch" if is_rank else "shape_mismatch",
            where=half.name,
            message=f"has shape {list(half.shape)}; {list(shape)} is needed ({base})",
            fix="make r and rank_pattern say the rank that was trained"
            if is_rank
            else "upload the adapter for the base model that it was trained on",
        )


def _unknown_module(module: str, manifest: Manifest, base_shape: BaseShape) -> Finding:
    return Finding(
        code="unknown_module",
        where=module,
        message=f"is no linear layer of the base model ({_base_hint(manifest, base_shape)})",
        fix="upload the adapter for the base model that it was trained on, with PEFT's own names",
    )


def _base_hint(manifest: Manifest, base_shape: BaseShape) -> str:
    trained_on = manifest.config.base_model_name
    told = f", trained on {trained_on[:200]!r}" if trained_on else ""
    return f"served is {base_shape.base_model!r}{told}"


def _absent(manifest: Manifest, base_shape: BaseShape) -> Iterator[Finding]:
    """Modules that the configuration promises to change and that have no weights."""
    for module in base_shape.modules:
        if module not in manifest.modules and manifest.config.targets(module):
            yield Finding(
                code="missing_tensors",
                where=module,
                message="is a target module without LoRA weights",
                fix="save the adapter again, whole, or correct target_modules",
            )


def _not_finite(name: str) -> Finding:
    return Finding(
        code="not_finite",
        where=name,
        message="holds NaN or infinity",
        fix="train again with a lower learning rate, or save in a wider dtype",
    )


def _no_effect(module: str, reason: str) -> Finding:
    return Finding(
        code="zero_delta",
        where=module,
        message=f"changes nothing: {reason}",
        fix="upload the adapter after training, or leave this module out",
    )


def _bounded(findings: list[Finding]) -> list[Finding]:
    if len(findings) <= MAX_FINDINGS:
        return findings
    rest = Finding(
        code="more_findings",
        where=WEIGHTS_FILE,
        message=f"has {len(findings) - MAX_FINDINGS} findings more",
        fix="correct these first",
    )
    return [*findings[:MAX_FINDINGS], rest]
