"""Read from an adapter's files what it claims to change, for the probe to hold the engine to.

Reads them its own way, independently of `adapters.weights`, and what it does not understand is a
claim that nobody can fulfil. Knows PEFT's names. Knows nothing of how anything is computed.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from engine.model.targets import Targets

# How PEFT calls the parts of a module, each but for the wrappings around it.
_SIDES = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "token_rows",
}
_PREFIX = "base_model.model."
_WRAPPINGS = re.compile(r"\.(default|modules_to_save|(token_adapter\.)?base_layer)(?=\.|$)")
# What a retrained module was before, which PEFT keeps beside it and computes nothing with.
_UNUSED = ".original_module."


@dataclass(slots=True)
class Claim:
    """What the files say of one module. Filled tensor by tensor."""

    # By "lora_A" and so on, as the file has them
    sides: dict[str, Tensor] = field(default_factory=dict)
    scaling: float = 1.0
    # By name: in place of the module's own
    parameters: dict[str, Tensor] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)

    @property
    def lora(self) -> tuple[Tensor, Tensor] | None:
        """[rank, in_features] and [out_features, rank]."""
        found = self.sides.get("lora_A"), self.sides.get("lora_B")
        return None if found[0] is None or found[1] is None else (found[0], found[1])

    @property
    def magnitude(self) -> Tensor | None:
        return self.sides.get("magnitude")

    @property
    def tokens(self) -> tuple[list[int], Tensor] | None:
        rows = self.sides.get("token_rows")
        return None if rows is None else (self.token_ids, rows)

    @property
    def rank(self) -> int:
        return 0 if self.lora is None else len(self.lora[0])

    @property
    def kinds(self) -> Iterator[str]:
        if self.lora is not None:
            yield "lora" if self.magnitude is None else "dora"
        if self.parameters:
            yield "parameters"
        if self.tokens is not None:
            yield "tokens"

    @property
    def num_parameters(self) -> int:
        return sum(part.numel() for part in (*self.sides.values(), *self.parameters.values()))


def read_claims(folder: Path, targets: Targets) -> dict[str, Claim]:
    """By module path, of all modules that the adapter changes."""
    config = json.loads((folder / "adapter_config.json").read_bytes())
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
    claims: dict[str, Claim] = {}
    for name, tensor in tensors.items():
        if _UNUSED in name:
            continue
        module, part = _place(name, targets)
        claim = claims.setdefault(module, Claim())
        if part in _SIDES:
            claim.sides[_SIDES[part]] = tensor
        else:
            claim.parameters[part] = tensor
    for path, name in (config.get("parameter_tensors") or {}).items():
        module, _, part = path.rpartition(".")
        claims.setdefault(module, Claim()).parameters[part] = tensors[name]
    _share_tokens(claims, config, targets)
    for module, claim in claims.items():
        claim.scaling = _scaling(module, config)
        _forget_the_same(module, claim, targets)
    return {module: claim for module, claim in claims.items() if claim.sides or claim.parameters}


def _place(name: str, targets: Targets) -> tuple[str, str]:
    """Module path and part of a tensor."""
    path = _WRAPPINGS.sub("", name.removeprefix(_PREFIX))
    for part in _SIDES:
        if path.endswith(f".{part}"):
            return _path_of(path.removesuffix(f".{part}"), targets), part
    module, _, parameter = path.rpartition(".")
    return _path_of(module, targets), parameter


def _path_of(module: str, targets: Targets) -> str:
    """The base model's path for it: some trainers save without the outermost name, or with more."""
    if module in targets.by_name:
        return module
    longer = [name for name in targets.by_name if name.endswith(f".{module}")]
    shorter = [name for name in targets.by_name if module.endswith(f".{name}")]
    return next(iter([*longer, *sorted(shorter, key=len, reverse=True)]), module)


def _share_tokens(claims: dict[str, Claim], config: dict[str, Any], targets: Targets) -> None:
    """A list of ids is the embedding's, and a tied output layer's; else each module has its own."""
    asked = config.get("trainable_token_indices") or {}
    sources = [module for module, claim in claims.items() if claim.tokens is not None]
    if not isinstance(asked, dict):
        asked = dict.fromkeys(sources, asked)
    by_module = {_path_of(module, targets): list(ids) for module, ids in asked.items()}
    way_in, way_out = targets.input_embedding, targets.output_layer
    if targets.is_tied and way_in in by_module and way_out is not None:
        by_module.setdefault(way_out, by_module[way_in])
    for module, token_ids in by_module.items():
        claim = claims.setdefault(module, Claim())
        claim.token_ids = token_ids
        if claim.tokens is None:
            claim.sides["token_rows"] = claims[sources[0]].sides["token_rows"]


def _forget_the_same(module: str, claim: Claim, targets: Targets) -> None:
    """Trainers save embeddings whole that nobody has trained."""
    for name, own in list(claim.parameters.items()):
        base = targets.parameter(f"{module}.{name}")
        if base is not None and base.shape == own.shape and torch.equal(own.to(base), base):
            del claim.parameters[name]


def _scaling(module: str, config: dict[str, Any]) -> float:
    rank = _by_pattern(module, config.get("rank_pattern") or {}, default=config["r"])
    alpha = _by_pattern(module, config.get("alpha_pattern") or {}, default=config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(module: str, patterns: dict[str, Any], *, default: Any) -> Any:
    """PEFT's rule: the first key that is the module's whole path or its end after a dot."""
    keys: Iterable[str] = patterns
    for key in keys:
        if re.match(rf"(.*\.)?({key})$", module):
            return patterns[key]
    return default
