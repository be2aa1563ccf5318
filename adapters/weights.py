"""Load a stored adapter as tensors. The one file of this package that knows torch."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from adapters import lora_config, tensor_file
from adapters.errors import Finding, InvalidAdapter
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, pair


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
    """Rows of an embedding that an adapter brings itself."""

    # [num_tokens] int64, ascending
    token_ids: Tensor
    # [num_tokens, dim]
    rows: Tensor


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """All that an adapter changes."""

    # By module path: linear layers, the output layer and embeddings.
    lora: dict[str, LoraModule]
    # By parameter path, e.g. "lm_head.weight": takes the place of the base model's own. More rows
    # than the base model has are added tokens.
    replaced: dict[str, Tensor]
    # By module path of an embedding.
    tokens: dict[str, TrainedTokens]


def load(folder: Path, *, base_model: str, dtype: torch.dtype) -> AdapterWeights:
    """Return what an adapter changes, on the CPU, in `dtype`.

    `folder` holds `adapter_config.json` and `adapter_model.safetensors`. Raises UnreadableArtifact
    when they cannot be read, and InvalidAdapter when part of them would go unused on `base_model`.
    """
    path = folder / WEIGHTS_FILE
    config, findings = lora_config.parse((folder / CONFIG_FILE).read_bytes())
    entries, leftovers = pair(tensor_file.read_header(path), config)
    findings += [_unused(name, base_model) for name in leftovers]
    if findings:
        raise InvalidAdapter(findings)
    with safe_open(path, framework="pt") as tensors:
        lora = {
            module: LoraModule(
                name=module,
                lora_A=tensors.get_tensor(entry.lora_A.name).to(dtype),
                lora_B=tensors.get_tensor(entry.lora_B.name).to(dtype),
                scaling=entry.scaling,
            )
            for module, entry in entries.items()
        }
    return AdapterWeights(lora=lora, replaced={}, tokens={})


def _unused(name: str, base_model: str) -> Finding:
    return Finding(
        code="unused_tensor",
        where=name,
        message=f"belongs to no LoRA pair on {base_model!r}",
        fix="validate the adapter before it is stored",
    )
