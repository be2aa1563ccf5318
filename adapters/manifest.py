"""List what an adapter's two files hold: which modules it changes, by which tensors, how strongly.

Reads the header; of the weights themselves only their digest. Whether the adapter fits a base model
is for `validate` to say.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from adapters import lora_config, tensor_file
from adapters.errors import Finding
from adapters.lora_config import LoraConfig
from adapters.tensor_file import TensorEntry

__all__ = [
    "LoraConfig",
    "LoraEntry",
    "Manifest",
    "TensorEntry",
    "is_canonical",
    "pair",
    "read",
    "split_key",
]

CONFIG_FILE = lora_config.FILE_NAME
WEIGHTS_FILE = "adapter_model.safetensors"

_CANONICAL_FIELDS = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "inference_mode",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
}

# PEFT wraps the model twice; some trainers unwrap it, some keep the adapter's local name.
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_[AB])(?:\.default)?\.weight")


@dataclass(frozen=True, slots=True)
class LoraEntry:
    """The LoRA of one module: y = W x + scaling * B A x."""

    rank: int
    alpha: int | float
    scaling: float
    # [rank, in_features]
    lora_A: TensorEntry
    # [out_features, rank]
    lora_B: TensorEntry


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one adapter is, for one base model."""

    # The served name.
    base_model: str
    config: LoraConfig
    # By the module's full path, e.g. "model.layers.0.self_attn.q_proj".
    modules: dict[str, LoraEntry]
    # All tensors of the file, by the names they have there.
    tensors: dict[str, TensorEntry]
    # Names of tensors that are no half of a LoRA pair.
    leftovers: tuple[str, ...]
    # What the configuration asks for and we do not serve.
    findings: tuple[Finding, ...]
    size_bytes: int
    # SHA-256 of base model, scalings and LoRA pairs: all that decides what the adapter computes.
    weights_digest: str

    def canonical_config(self) -> bytes:
        """Return the `adapter_config.json` under which the adapter is stored.

        PEFT reads it as the same adapter. Every module is named in full, so whoever loads it needs
        no pattern of the uploader's.
        """
        config = self.config
        ranks = {re.escape(m): e.rank for m, e in self.modules.items() if e.rank != config.rank}
        alphas = {re.escape(m): e.alpha for m, e in self.modules.items() if e.alpha != config.alpha}
        fields = {
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
        }
        return json.dumps(fields, sort_keys=True).encode()


def read(config: bytes, weights_path: Path, *, base_model: str) -> Manifest:
    """Read an adapter from its configuration's bytes and its weights file.

    `base_model` is the served name of the model that it is for. Raises UnreadableArtifact when a
    file is not what it should be, InvalidAdapter when the configuration makes no sense.
    """
    parsed, findings = lora_config.parse(config)
    tensors = tensor_file.read_header(weights_path)
    modules, leftovers = pair(tensors, parsed)
    return Manifest(
        base_model=base_model,
        config=parsed,
        modules=modules,
        tensors=tensors,
        leftovers=leftovers,
        findings=tuple(findings),
        size_bytes=weights_path.stat().st_size,
        weights_digest=_digest(weights_path, modules, base_model=base_model),
    )


def is_canonical(config: bytes) -> bool:
    """Whether a configuration is one that `Manifest.canonical_config` writes.

    Raises InvalidAdapter when it is none at all.
    """
    parsed, _ = lora_config.parse(config)
    is_literal = parsed.rank_pattern.is_literal and parsed.alpha_pattern.is_literal
    return is_literal and set(json.loads(config)) == _CANONICAL_FIELDS


def pair(
    tensors: dict[str, TensorEntry], config: LoraConfig
) -> tuple[dict[str, LoraEntry], tuple[str, ...]]:
    """Return the LoRA pairs by module path, and the names of the tensors that are in none."""
    halves: dict[str, dict[str, TensorEntry]] = {}
    for name in sorted(tensors):
        if key := split_key(name):
            module, side = key
            halves.setdefault(module, {}).setdefault(side, tensors[name])
    modules = {
        module: _entry(module, config, sides) for module, sides in halves.items() if len(sides) == 2
    }
    used = {e.name for entry in modules.values() for e in (entry.lora_A, entry.lora_B)}
    return modules, tuple(name for name in sorted(tensors) if name not in used)


def split_key(name: str) -> tuple[str, str] | None:
    """Return (module path, "lora_A" or "lora_B") for the name of a LoRA tensor, else None."""
    match = _KEY.fullmatch(name)
    return (match[1], match[2]) if match else None


def _entry(module: str, config: LoraConfig, sides: dict[str, TensorEntry]) -> LoraEntry:
    return LoraEntry(
        rank=config.rank_of(module),
        alpha=config.alpha_of(module),
        scaling=config.scaling_of(module),
        lora_A=sides["lora_A"],
        lora_B=sides["lora_B"],
    )


def _digest(path: Path, modules: dict[str, LoraEntry], *, base_model: str) -> str:
    """SHA-256 over one line of JSON about the adapter, then each tensor: a line and its bytes."""
    scalings = {module: entry.scaling for module, entry in modules.items()}
    sha = hashlib.sha256(_line({"base_model": base_model, "format": 1, "scaling": scalings}))
    for module, entry in sorted(modules.items()):
        for side, tensor in (("lora_A", entry.lora_A), ("lora_B", entry.lora_B)):
            sha.update(_line([f"{module}.{side}.weight", tensor.dtype, tensor.shape]))
            for chunk in tensor_file.chunks(path, tensor):
                sha.update(chunk)
    return sha.hexdigest()


def _line(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"
