"""List what an adapter's two files hold: what of the base model they change, by which tensors.

Reads the header; of the weights themselves only their digest. Whether the adapter fits a base model
is for `validate` to say.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters import lora_config, parts, tensor_file
from adapters.base_shape import BaseShape
from adapters.errors import Finding
from adapters.lora_config import LoraConfig
from adapters.parts import LoraEntry, TokensEntry
from adapters.tensor_file import TensorEntry

__all__ = [
    "LoraConfig",
    "LoraEntry",
    "Manifest",
    "TensorEntry",
    "TokensEntry",
    "is_canonical",
    "read",
]

CONFIG_FILE = lora_config.FILE_NAME
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one adapter is, for one base model."""

    # The served name.
    base_model: str
    config: LoraConfig
    # LoRA by the module's full path, e.g. "model.layers.0.self_attn.q_proj".
    modules: dict[str, LoraEntry]
    # Parameters of the base model whose place the adapter's take, by full path.
    replaced: dict[str, TensorEntry]
    # Trained rows of embeddings and output layers, by module path.
    tokens: dict[str, TokensEntry]
    # Pairs of tensors that must be equal: one that is not used, one that is.
    copies: tuple[tuple[str, str], ...]
    # All tensors of the file, by the names they have there.
    tensors: dict[str, TensorEntry]
    # Tensors that would go unused: name -> why, as the code of a finding.
    leftovers: dict[str, str]
    # What the configuration asks for and we do not serve.
    findings: tuple[Finding, ...]
    # Tokens that the base model does not have; 0 where it was read without a base model.
    num_added_tokens: int
    # The output layer, where the base model that it was read for has one for adapters.
    output_layer: str | None
    size_bytes: int
    # SHA-256 of base model, scalings and tensors: all that decides what the adapter computes.
    weights_digest: str

    @property
    def max_rank(self) -> int:
        """The largest rank of all modules; 0 without LoRA."""
        return max((entry.rank for entry in self.modules.values()), default=0)

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors that the adapter uses, each counted once."""
        used = {entry for _, entry in _used(self)}
        return sum(math.prod(entry.shape) for entry in used)

    @property
    def features(self) -> tuple[str, ...]:
        """What of PEFT the adapter uses beyond LoRA on linear layers inside the model."""
        config, entries = self.config, self.modules.values()
        is_bias = [path.endswith(".bias") and not self._is_saved(path) for path in self.replaced]
        claims = {
            "rslora": config.use_rslora and bool(self.modules),
            "rank_pattern": any(entry.rank != config.rank for entry in entries),
            "alpha_pattern": any(entry.alpha != config.alpha for entry in entries),
            "dora": any(entry.magnitude for entry in entries),
            "embedding": any(entry.is_embedding for entry in entries),
            "lm_head": self.output_layer in self.modules,
            "bias": any(is_bias),
            "modules_to_save": not all(is_bias),
            "trainable_tokens": bool(self.tokens),
            "added_tokens": self.num_added_tokens > 0,
        }
        return tuple(name for name, is_used in claims.items() if is_used)

    def canonical_config(self) -> bytes:
        """Return the `adapter_config.json` under which the adapter is stored.

        PEFT reads it as the same adapter. Every module is named in full, so whoever loads it needs
        neither a pattern of the uploader's nor the base model's own names.
        """
        fields = self._canonical_fields()
        data = json.dumps(fields, sort_keys=True).encode()
        told = {path: entry.name for path, entry in self.replaced.items()}
        understood = parts.sort(self.tensors, lora_config.parse(data)[0]).replaced
        if told == {path: entry.name for path, entry in understood.items()}:
            return data
        # The tensor has another name here than in the base model, or stands for two parameters.
        return json.dumps({**fields, "parameter_tensors": told}, sort_keys=True).encode()

    def _canonical_fields(self) -> dict[str, Any]:
        config = self.config
        ranks = {re.escape(m): e.rank for m, e in self.modules.items() if e.rank != config.rank}
        alphas = {re.escape(m): e.alpha for m, e in self.modules.items() if e.alpha != config.alpha}
        saved = {path.rpartition(".")[0] for path in self.replaced if self._is_saved(path)}
        extras = {
            "bias": config.bias if config.bias != "none" else None,
            "fan_in_fan_out": config.is_transposed,
            "modules_to_save": sorted(saved),
            "trainable_token_indices": {m: list(e.token_ids) for m, e in self.tokens.items()},
            "use_dora": config.use_dora,
        }
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model,
            "inference_mode": True,
            "r": config.rank,
            "lora_alpha": config.alpha,
            "use_rslora": config.use_rslora,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "target_modules": sorted(self.modules),
            **{field: value for field, value in extras.items() if value},
        }

    def _is_saved(self, path: str) -> bool:
        return self.config.saves(path.rpartition(".")[0])


def read(
    config: bytes,
    weights_path: Path,
    *,
    base_model: str,
    base_shape: BaseShape | None = None,
) -> Manifest:
    """Read an adapter from its configuration's bytes and its weights file.

    `base_model` is the served name of the model that it is for, `base_shape` that model's names,
    by which a trainer's own spelling is understood; a canonical configuration needs none. Raises
    UnreadableArtifact when a file is not what it should be, InvalidAdapter when the configuration
    makes no sense.
    """
    parsed, findings = lora_config.parse(config)
    tensors = tensor_file.read_header(weights_path)
    sorted_out = parts.sort(tensors, parsed, base_shape)
    return Manifest(
        base_model=base_model,
        config=sorted_out.config,
        modules=sorted_out.lora,
        replaced=sorted_out.replaced,
        tokens=sorted_out.tokens,
        copies=sorted_out.copies,
        tensors=tensors,
        leftovers=sorted_out.leftovers,
        findings=tuple(findings),
        num_added_tokens=_num_added_tokens(sorted_out.replaced, base_shape),
        output_layer=base_shape.output_layer if base_shape else None,
        size_bytes=weights_path.stat().st_size,
        weights_digest=_digest(weights_path, sorted_out, base_model=base_model),
    )


def is_canonical(config: bytes) -> bool:
    """Whether a configuration is one that `Manifest.canonical_config` writes.

    Raises InvalidAdapter when it is none at all.
    """
    return lora_config.parse(config)[0].is_canonical


def _num_added_tokens(replaced: dict[str, TensorEntry], base_shape: BaseShape | None) -> int:
    if base_shape is None:
        return 0
    added = [
        entry.shape[0] - base_shape.num_tokens_of(path)
        for path, entry in replaced.items()
        if base_shape.num_tokens_of(path) and entry.shape
    ]
    return max([0, *added])


def _used(manifest: Manifest) -> Iterator[tuple[str, TensorEntry]]:
    """Every tensor that does something, with the path of what it changes."""
    for module, entry in manifest.modules.items():
        yield from ((module, tensor) for _, tensor in entry.tensors())
    yield from manifest.replaced.items()
    yield from ((module, entry.rows) for module, entry in manifest.tokens.items())


def _digest(path: Path, used: parts.Parts, *, base_model: str) -> str:
    """SHA-256 over one line of JSON about the adapter, then each tensor: a line and its bytes."""
    scalings = {module: entry.scaling for module, entry in used.lora.items()}
    sha = hashlib.sha256(_line({"base_model": base_model, "format": 1, "scaling": scalings}))
    for label, tensor in _labelled(used):
        sha.update(_line([*label, tensor.dtype, tensor.shape]))
        for chunk in tensor_file.chunks(path, tensor):
            sha.update(chunk)
    return sha.hexdigest()


def _labelled(used: parts.Parts) -> Iterator[tuple[list[Any], TensorEntry]]:
    """What the digest says of each tensor, in its order, which no spelling changes."""
    for module, lora in sorted(used.lora.items()):
        for name, tensor in lora.tensors():
            yield [f"{module}.{name}"], tensor
    for path, tensor in sorted(used.replaced.items()):
        yield ["replaced", path], tensor
    for module, tokens in sorted(used.tokens.items()):
        yield ["tokens", module, tokens.token_ids], tokens.rows


def _line(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"
