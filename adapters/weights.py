"""Load a stored adapter as tensors. The one file of this package that knows torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from adapters import lora_config, parts, tensor_file
from adapters.errors import Finding, InvalidAdapter
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from adapters.parts import LoraEntry, TokensEntry
from adapters.tensor_file import TensorEntry


@dataclass(frozen=True, slots=True)
class LoraModule:
    """The LoRA of one module: y = W x + scaling * B A x, and with DoRA its rows' norms."""

    # Full path in the base model, e.g. "model.layers.0.self_attn.q_proj".
    name: str
    # [rank, in_features]; of an embedding [rank, num_embeddings]
    lora_A: Tensor
    # [out_features, rank]; of an embedding [dim, rank]
    lora_B: Tensor
    scaling: float
    # [out_features] or [dim]: DoRA's trained norm of each row of W + scaling * B A; None without
    magnitude: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TrainedTokens:
    """Rows of an embedding or an output layer that an adapter brings itself."""

    # [num_tokens] int64, ascending
    token_ids: Tensor
    # [num_tokens, dim]
    rows: Tensor


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """All that an adapter changes.

    Two layers that the base model ties have an entry each, with the same tensors where they stay
    tied.
    """

    # By module path: linear layers, the output layer and embeddings.
    lora: dict[str, LoraModule]
    # By parameter path, e.g. "lm_head.weight": takes the place of the base model's own. More rows
    # than the base model has are added tokens. LoRA and trained tokens come on top of it.
    replaced: dict[str, Tensor]
    # By module path of an embedding or the output layer.
    tokens: dict[str, TrainedTokens]


def load(folder: Path, *, base_model: str, dtype: torch.dtype) -> AdapterWeights:
    """Return what an adapter changes, on the CPU, in `dtype`.

    `folder` holds the canonical `adapter_config.json` and `adapter_model.safetensors`. Raises
    UnreadableArtifact when they cannot be read, and InvalidAdapter when part of them would go
    unused on `base_model`.
    """
    path = folder / WEIGHTS_FILE
    config, findings = lora_config.parse((folder / CONFIG_FILE).read_bytes())
    found = parts.sort(tensor_file.read_header(path), config)
    findings += [_unused(name, base_model) for name in found.leftovers]
    if findings:
        raise InvalidAdapter(findings)
    with safe_open(path, framework="pt") as file:
        tensors = _Tensors(file, dtype)
        tokens = {entry: _tokens(entry, tensors) for entry in found.tokens.values()}
        return AdapterWeights(
            lora={module: _lora(module, entry, tensors) for module, entry in found.lora.items()},
            replaced={name: tensors.read(entry) for name, entry in found.replaced.items()},
            tokens={module: tokens[entry] for module, entry in found.tokens.items()},
        )


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The tensors of an open file; one that is asked for twice is read once."""

    _file: Any
    _dtype: torch.dtype
    _read: dict[str, Tensor] = field(default_factory=dict)

    def read(self, entry: TensorEntry) -> Tensor:
        tensor = self._read.get(entry.name)
        if tensor is None:
            tensor = self._read[entry.name] = self._file.get_tensor(entry.name).to(self._dtype)
        return tensor

    def read_if(self, entry: TensorEntry | None) -> Tensor | None:
        return self.read(entry) if entry else None


def _lora(module: str, entry: LoraEntry, tensors: _Tensors) -> LoraModule:
    return LoraModule(
        name=module,
        lora_A=tensors.read(entry.lora_A),
        lora_B=tensors.read(entry.lora_B),
        scaling=entry.scaling,
        magnitude=tensors.read_if(entry.magnitude),
    )


def _tokens(entry: TokensEntry, tensors: _Tensors) -> TrainedTokens:
    token_ids, order = torch.tensor(entry.token_ids).sort()
    return TrainedTokens(token_ids, tensors.read(entry.rows)[order])


def _unused(name: str, base_model: str) -> Finding:
    return Finding(
        code="unused_tensor",
        where=name,
        message=f"changes nothing on {base_model!r}",
        fix="validate the adapter before it is stored",
    )
