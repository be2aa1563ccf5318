"""Decide whether an adapter can be served on a base model, and tell all that stands against it.

Reads shapes and raw bits. Knows nothing of tenants, and runs no model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters import names, tensor_file
from adapters.base_shape import BaseShape
from adapters.errors import Finding
from adapters.manifest import WEIGHTS_FILE, LoraEntry, Manifest, TensorEntry, TokensEntry

__all__ = ["BaseShape", "Finding", "Limits", "check", "check_values"]

# More would tell nobody more, and a hostile file has a hundred thousand.
MAX_FINDINGS = 1000

# Bounds beyond which numbers are absurd, each a hundred times what training is known to leave.
# How much louder a linear layer's output is than its input, as root mean squares: with weights of
# 0.1, which is much, 16,384 inputs make it 13. What LoRA adds to it is at most
# ||scaling * B|| * ||A|| / sqrt(out_features).
MAX_GAIN = 1000.0
# The root mean square of a matrix that is looked up or takes a whole layer's place, and of what
# LoRA adds to an embedding; 0.02 to 1 is usual.
MAX_RMS_MATRIX = 100.0
# The same of biases, norms' weights and DoRA's magnitudes: biases of keys reach some hundreds.
MAX_RMS_VECTOR = 10_000.0

_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Limits:
    """What an operator allows an adapter to be."""

    max_rank: int
    max_size_bytes: int
    max_added_tokens: int = 1024


def check(manifest: Manifest, base_shape: BaseShape, *, limits: Limits) -> list[Finding]:
    """Return everything that forbids serving this adapter on this base; empty when nothing does.

    Raises InvalidAdapter when a pattern of the configuration is too expensive to match.
    """
    fit = _Fit(manifest, base_shape, limits)
    findings = list(manifest.findings)
    findings += fit.whole()
    findings += [fit.leftover(name, code) for name, code in manifest.leftovers.items()]
    for module, entry in manifest.modules.items():
        findings += fit.lora(module, entry)
    for path, tensor in manifest.replaced.items():
        findings += fit.parameter(path, tensor)
    for module, tokens in manifest.tokens.items():
        findings += fit.tokens(module, tokens)
    findings += fit.added_tokens()
    findings += fit.absent()
    return _bounded(list(dict.fromkeys(findings)))


def check_values(path: Path, manifest: Manifest) -> list[Finding]:
    """Return what is wrong with the numbers in the weights file at `path`.

    NaN and infinity, norms beyond anything trained, LoRA that adds nothing, and tensors that
    should be copies of each other and are not. Raises UnreadableArtifact when the file has changed
    since its manifest was read.
    """
    values = _Values(path)
    findings: list[Finding] = []
    for module, entry in manifest.modules.items():
        findings += values.lora(module, entry)
    for tensor in manifest.replaced.values():
        findings += values.tensor(tensor)
    for tokens in manifest.tokens.values():
        findings += values.tensor(tokens.rows)
    findings += _nothing_at_all(manifest, findings)
    for copy, original in manifest.copies:
        if not _is_equal(path, manifest.tensors[copy], manifest.tensors[original]):
            findings.append(_no_copy(copy, original))
    return _bounded(list(dict.fromkeys(findings)))


# Numbers


class _Values:
    """Reads each tensor of a file once, a chunk at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # By name: the sum of the squares of a tensor's numbers; not finite where one is not.
        self._energies: dict[str, float] = {}

    def lora(self, module: str, entry: LoraEntry) -> Iterator[Finding]:
        halves = (entry.lora_A, entry.lora_B)
        if entry.magnitude:
            yield from self.tensor(entry.magnitude)
        if any(half.dtype not in _DTYPES for half in halves):
            return
        energies = [self._energy(half) for half in halves]
        for half, energy in zip(halves, energies, strict=True):
            if not math.isfinite(energy):
                yield _not_finite(half.name)
        if 0.0 in energies and not entry.magnitude:
            yield _no_effect(module, "one of its two matrices is all zero")
        norm = abs(entry.scaling) * math.sqrt(energies[0]) * math.sqrt(energies[1])
        num_inputs, num_outputs = (_size(half) / entry.rank for half in halves)
        if not (num_inputs and num_outputs and math.isfinite(norm)):
            return
        gain = norm / math.sqrt(num_outputs)
        if entry.is_embedding and gain / math.sqrt(num_inputs) > MAX_RMS_MATRIX:
            yield _absurd(module, "LoRA's rows", gain / math.sqrt(num_inputs), MAX_RMS_MATRIX)
        if not entry.is_embedding and gain > MAX_GAIN:
            yield _absurd(module, "LoRA's output for inputs of 1", gain, MAX_GAIN)

    def tensor(self, entry: TensorEntry) -> Iterator[Finding]:
        if entry.dtype not in _DTYPES or not _size(entry):
            return
        energy = self._energy(entry)
        rms = math.sqrt(energy / _size(entry))
        bound = MAX_RMS_VECTOR if len(entry.shape) == 1 else MAX_RMS_MATRIX
        if not math.isfinite(energy):
            yield _not_finite(entry.name)
        elif rms > bound:
            yield _absurd(entry.name, "its numbers", rms, bound)

    def _energy(self, entry: TensorEntry) -> float:
        if entry.name not in self._energies:
            pieces = (
                _floats(chunk, entry.dtype) for chunk in tensor_file.chunks(self._path, entry)
            )
            self._energies[entry.name] = sum(float(np.dot(piece, piece)) for piece in pieces)
        return self._energies[entry.name]


def _floats(chunk: bytes, dtype: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """In float64, where no square of a float32 is zero or infinite."""
    if dtype == "BF16":
        # The upper half of a float32.
        words = np.frombuffer(chunk, dtype="<u2").astype("<u4") << 16
        return words.view("<f4").astype(np.float64)
    return np.frombuffer(chunk, dtype="<f4" if dtype == "F32" else "<f2").astype(np.float64)


def _size(entry: TensorEntry) -> int:
    return math.prod(entry.shape)


def _is_equal(path: Path, one: TensorEntry, other: TensorEntry) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pairs = zip(tensor_file.chunks(path, one), tensor_file.chunks(path, other), strict=True)
    return all(left == right for left, right in pairs)


def _nothing_at_all(manifest: Manifest, findings: list[Finding]) -> Iterator[Finding]:
    idle = {finding.where for finding in findings if finding.code == "zero_delta"}
    is_lora_alone = manifest.modules and not (manifest.replaced or manifest.tokens)
    if is_lora_alone and idle.issuperset(manifest.modules):
        yield _no_effect(WEIGHTS_FILE, "no module of the adapter adds anything")


# Names and shapes


class _Fit:
    """Compares an adapter with the base model that it is for."""

    def __init__(self, manifest: Manifest, base_shape: BaseShape, limits: Limits) -> None:
        self._manifest = manifest
        self._config = manifest.config
        self._base = base_shape
        self._limits = limits
        told = manifest.config.base_model_name
        trained_on = f", trained on {told[:200]!r}" if told else ""
        self._hint = f"served is {base_shape.base_model!r}{trained_on}"

    def whole(self) -> Iterator[Finding]:
        manifest, limits = self._manifest, self._limits
        if manifest.base_model != self._base.base_model:
            yield Finding(
                code="base_model_mismatch",
                where="base_model",
                message=f"is for {manifest.base_model!r}, not for {self._base.base_model!r}",
                fix="upload it for the base model that it was trained on",
            )
        if manifest.size_bytes > limits.max_size_bytes:
            yield Finding(
                code="too_large",
                where=WEIGHTS_FILE,
                message=f"has {manifest.size_bytes} bytes; the limit is {limits.max_size_bytes}",
                fix="train at a lower rank or on fewer modules, or save as bfloat16",
            )
        if not (manifest.modules or manifest.replaced or manifest.tokens):
            yield Finding(
                code="no_lora",
                where=WEIGHTS_FILE,
                message="holds no pair of lora_A and lora_B, nor anything else that has an effect",
                fix="upload the adapter that PEFT's save_pretrained wrote",
            )

    def leftover(self, name: str, code: str) -> Finding:
        meaning = names.parse(name)
        group = self._base.expert_group(meaning.module) if meaning else None
        return self._experts(group) if group else _leftover(name, code)

    def _experts(self, group: str) -> Finding:
        """The same one for all that an adapter has for these experts."""
        stacked = {path.rpartition("."): shape for path, shape in self._base.experts.items()}
        own = [f"{at[2]} {list(shape)}" for at, shape in stacked.items() if at[0] == group]
        return Finding(
            code="experts_not_served",
            where=group,
            message=f"are experts, which stay the base model's own{': ' if own else ''}"
            f"{', '.join(own)} ({self._hint})",
            fix="train on other layers, such as those of attention: leave experts out of "
            "target_modules, target_parameters and modules_to_save",
        )

    # LoRA

    def lora(self, module: str, entry: LoraEntry) -> Iterator[Finding]:
        features, group = self._features(module, entry), self._base.expert_group(module)
        if features is None and group:
            yield self._experts(group)
            return
        for _, tensor in entry.tensors():
            yield from _dtype(tensor)
        yield from self._strength(module, entry)
        if features is None:
            yield self._unknown_module(
                module, "embedding" if entry.is_embedding else "linear layer"
            )
            return
        yield from self._shapes(entry, *features)
        yield from self._beside_lora(module, entry)
        if not (self._is_targeted(module) or self._is_targeted(module, name=entry.trained_as)):
            yield Finding(
                code="not_targeted",
                where=module,
                message="has LoRA weights but is no target module, so PEFT ignores them",
                fix="correct target_modules, exclude_modules, modules_to_save or "
                "layers_to_transform",
            )

    def _features(self, module: str, entry: LoraEntry) -> tuple[int, int] | None:
        """(in_features, out_features) of a module, an adapter's added tokens included."""
        num_tokens = self._num_tokens(f"{module}.weight")
        if entry.is_embedding:
            shape = self._base.embeddings.get(module)
            return shape and (max(num_tokens, shape[0]), shape[1])
        features = self._base.modules.get(module)
        return features and (features[0], max(num_tokens, features[1]))

    def _num_tokens(self, path: str) -> int:
        """Rows of a parameter with one for each token, as the adapter has it; 0 for others."""
        base = self._base.num_tokens_of(path)
        entry = self._manifest.replaced.get(path)
        return max(base, entry.shape[0]) if base and entry and entry.shape else base

    def _strength(self, module: str, entry: LoraEntry) -> Iterator[Finding]:
        if entry.rank > self._limits.max_rank:
            yield Finding(
                code="rank_too_large",
                where=module,
                message=f"has rank {entry.rank}; the limit is {self._limits.max_rank}",
                fix="train at a lower rank, or raise the operator's limit",
            )
        if entry.scaling == 0 and not entry.magnitude:
            yield _no_effect(module, "its alpha is 0")

    def _shapes(self, entry: LoraEntry, in_features: int, out_features: int) -> Iterator[Finding]:
        wanted = {entry.lora_A: (entry.rank, in_features), entry.lora_B: (out_features, entry.rank)}
        for rank_axis, (half, shape) in enumerate(wanted.items()):
            is_rank = len(half.shape) == 2 and half.shape[1 - rank_axis] == shape[1 - rank_axis]
            if half.shape != shape and is_rank:
                yield _shape_finding(
                    half,
                    shape,
                    code="rank_mismatch",
                    hint=self._hint,
                    fix="make r and rank_pattern say the rank that was trained",
                )
            elif half.shape != shape:
                yield self._wrong_shape(half, shape)
        magnitude = entry.magnitude
        if magnitude and magnitude.shape != (out_features,):
            yield self._wrong_shape(magnitude, (out_features,))

    def _wrong_shape(self, entry: TensorEntry, wanted: tuple[int, ...]) -> Finding:
        return _shape_finding(
            entry,
            wanted,
            code="shape_mismatch",
            hint=self._hint,
            fix="upload the adapter for the base model that it was trained on",
        )

    def _beside_lora(self, module: str, entry: LoraEntry) -> Iterator[Finding]:
        manifest, tied = self._manifest, self._base.tied_modules
        is_replaced = f"{module}.weight" in manifest.replaced
        is_dense = module in self._base.embeddings or module == self._base.output_layer
        if is_replaced and not is_dense:
            yield _not_together(module, "LoRA and a retrained weight")
        if module in manifest.tokens:
            yield _not_together(module, "LoRA and trained tokens")
        if self._config.is_tying and tied and module == tied[0]:
            yield Finding(
                code="field_not_served",
                where="ensure_weight_tying",
                message="LoRA that an embedding and a tied output layer share is not served",
                fix="set it to false and name both layers in target_modules",
            )
        if self._config.use_dora and not entry.magnitude:
            yield _missing(module, "has no lora_magnitude_vector, although use_dora is set")

    def _unknown_module(self, module: str, kind: str) -> Finding:
        return Finding(
            code="unknown_module",
            where=module,
            message=f"is no {kind} of the base model that can be adapted ({self._hint})",
            fix="upload the adapter for the base model that it was trained on, with PEFT's own "
            "names",
        )

    # Parameters

    def parameter(self, path: str, entry: TensorEntry) -> Iterator[Finding]:
        shape = self._base.parameters.get(path)
        module = path.rpartition(".")[0]
        group = self._base.expert_group(module)
        if shape is None and group:
            yield self._experts(group)
            return
        if shape is None and self._config.saves(module):
            yield Finding(
                code="module_not_served",
                where=module,
                message="is no module of the base model that treats each token by itself "
                f"({self._hint})",
                fix="leave it out of modules_to_save",
            )
            return
        if shape is None:
            yield _leftover(entry.name, "unused_tensor")
            return
        yield from _dtype(entry)
        num_tokens = self._num_tokens(path)
        wanted = (num_tokens, *shape[1:]) if num_tokens else shape
        if entry.shape != wanted:
            yield self._wrong_shape(entry, wanted)

    def tokens(self, module: str, entry: TokensEntry) -> Iterator[Finding]:
        path = f"{module}.weight"
        shape = self._base.parameters.get(path) or self._base.embeddings.get(module)
        if shape is None or not self._is_of_tokens(module):
            yield self._unknown_module(module, "embedding of tokens")
            return
        yield from _dtype(entry.rows)
        wanted = (len(entry.token_ids), shape[1])
        if entry.rows.shape != wanted:
            yield self._wrong_shape(entry.rows, wanted)
        num_tokens = max(self._num_tokens(path), shape[0])
        if max(entry.token_ids) >= num_tokens:
            yield Finding(
                code="unknown_token",
                where="trainable_token_indices",
                message=f"names token {max(entry.token_ids)}; {module} has {num_tokens}",
                fix="save with save_embedding_layers=True, so that added tokens are in the file",
            )
        if self._config.saves(module):
            yield _not_together(module, "trained tokens and modules_to_save")
        if module == self._base.output_layer and f"{module}.bias" in self._base.parameters:
            # PEFT computes such a layer without its bias, which nobody can have meant.
            yield _not_together(module, "trained tokens and a bias")

    def _is_of_tokens(self, module: str) -> bool:
        return module in self._base.embeddings or module == self._base.output_layer

    def added_tokens(self) -> Iterator[Finding]:
        num_added, limit = self._manifest.num_added_tokens, self._limits.max_added_tokens
        if num_added > limit:
            yield Finding(
                code="too_many_added_tokens",
                where=WEIGHTS_FILE,
                message=f"adds {num_added} tokens to the vocabulary; the limit is {limit}",
                fix="add fewer tokens, or raise the operator's limit",
            )
        layers = [self._base.input_embedding, self._base.output_layer]
        sizes = {layer: self._num_tokens(f"{layer}.weight") for layer in layers if layer}
        if num_added and len(set(sizes.values())) > 1:
            told = " and ".join(f"{layer} {size}" for layer, size in sizes.items())
            yield Finding(
                code="added_tokens_incomplete",
                where=WEIGHTS_FILE,
                message=f"adds tokens to one layer and not to another: {told}",
                fix="save with save_embedding_layers=True, so that both layers are in the file",
            )

    # What is missing

    def absent(self) -> Iterator[Finding]:
        """What the configuration promises to change and that has no weights."""
        manifest, config = self._manifest, self._config
        for module in (*self._base.modules, *self._base.embeddings):
            if module not in manifest.modules and self._is_targeted(module):
                yield _missing(module, "is a target module without LoRA weights")
        for path in self._base.parameters:
            if path not in manifest.replaced and self._is_to_save(path):
                yield _missing(path, "belongs to a module to save, and is not in the file")
        ends = list(config.token_ids) if isinstance(config.token_ids, dict) else [""]
        for end in ends:
            if config.token_ids and not any(module.endswith(end) for module in manifest.tokens):
                yield _missing("trainable_token_indices", f"has no trained rows of {end!r}")

    def _is_to_save(self, path: str) -> bool:
        if self._config.saves(path.rpartition(".")[0]):
            return True
        tied = self._base.tied_modules
        if tied is None or not self._config.is_tying:
            return False
        return path == f"{tied[1]}.weight" and self._config.saves(tied[0])

    def _is_targeted(self, module: str, *, name: str | None = None) -> bool:
        is_inner = module in self._base.modules and module != self._base.output_layer
        return self._config.targets(name or module, is_inner_linear=is_inner)


# Findings


def _leftover(name: str, code: str) -> Finding:
    message, fix = _LEFTOVERS[code]
    return Finding(code=code, where=name, message=message, fix=fix)


_LEFTOVERS = {
    "unused_tensor": (
        "belongs to no LoRA pair and to no parameter that an adapter can replace, and would be "
        "silently ignored",
        "remove it, or save the adapter with PEFT's save_pretrained",
    ),
    "duplicate_tensor": ("is there a second time under another name", "keep one of the two"),
    "missing_pair": ("has no other half of its pair beside it", "save the adapter again, whole"),
    "not_configured": (
        "is of a kind that the configuration does not mention, so PEFT would ignore it",
        "set use_dora or trainable_token_indices as they were in training, or remove it",
    ),
}


def _dtype(entry: TensorEntry) -> Iterator[Finding]:
    if entry.dtype not in _DTYPES:
        yield Finding(
            code="dtype_not_served",
            where=entry.name,
            message=f"has dtype {entry.dtype}; served are {', '.join(_DTYPES)}",
            fix="save the adapter in float32, float16 or bfloat16",
        )


def _shape_finding(
    entry: TensorEntry, wanted: tuple[int, ...], *, code: str, hint: str, fix: str
) -> Finding:
    return Finding(
        code=code,
        where=entry.name,
        message=f"has shape {list(entry.shape)}; {list(wanted)} is needed ({hint})",
        fix=fix,
    )


def _not_together(module: str, what: str) -> Finding:
    return Finding(
        code="combination_not_served",
        where=module,
        message=f"has {what} at once, which is not served",
        fix="train it with one of the two",
    )


def _missing(where: str, problem: str) -> Finding:
    return Finding(
        code="missing_tensors",
        where=where,
        message=problem,
        fix="save the adapter again, whole, or correct the configuration",
    )


def _no_copy(copy: str, original: str) -> Finding:
    return Finding(
        code="duplicate_tensor",
        where=copy,
        message=f"should be equal to {original[:200]!r} and is not",
        fix="save the adapter again; PEFT would use only one of the two",
    )


def _absurd(where: str, what: str, rms: float, bound: float) -> Finding:
    return Finding(
        code="absurd_norm",
        where=where,
        message=f"the root mean square of {what} may reach {rms:.3g}; the bound is {bound:g}, a "
        "hundred times what trained weights have",
        fix="check lora_alpha and the training, which has most likely diverged",
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
