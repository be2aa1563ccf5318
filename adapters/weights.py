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
    """The LoRA of one module: y = W x + scaling * B A x."""

    # Full path in the base model, e.g. "model.layers.0.self_attn.q_proj".
    name: str
    # [rank, in_features]
    lora_A: Tensor
    # [out_features, rank]
    lora_B: Tensor
    scaling: float


def load(folder: Path, *, base_model: str, dtype: torch.dtype) -> dict[str, LoraModule]:
    """Return the LoRA modules of an adapter by module path, on the CPU, in `dtype`.

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
        return {
            module: LoraModule(
                name=module,
                lora_A=tensors.get_tensor(entry.lora_A.name).to(dtype),
                lora_B=tensors.get_tensor(entry.lora_B.name).to(dtype),
                scaling=entry.scaling,
            )
            for module, entry in entries.items()
        }


def _unused(name: str, base_model: str) -> Finding:
    return Finding(
        code="unused_tensor",
        where=name,
        message=f"belongs to no LoRA pair on {base_model!r}",
        fix="validate the adapter before it is stored",
    )
