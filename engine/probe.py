"""See whether the engine computes an adapter as its files say.

Fixed prompts run through the serving path; beside it each target module is computed again, alone,
in float32, as x(W + dW)ᵀ, from the files, with code that shares nothing with the serving path.
Knows one adapter. Knows nothing of scheduling.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from engine import batch as batches
from engine.model.loader import LoadedModel
from engine.model.lora import LoraLinear
from engine.model.memory import DeviceMemory
from engine.protocol import ProbeReport
from engine.runner import Runner
from engine.scheduler import ScheduledSequence
from engine.sequence import NO_ADAPTER, Sequence

PROMPT_LENGTHS = (6, 11, 16)
BLOCK_SIZE = 8
# |found - expected| / |expected| of one module. Measured on SmolLM2-135M: 5e-7, 4e-4 and 3e-3.
ERROR_BOUNDS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# An adapter must move the logits by this many times what another batch order does.
MIN_SHIFT_OVER_NOISE = 10
# Output features for which dW is built at a time.
TILE_SIZE = 512


@dataclass(frozen=True, slots=True)
class _Delta:
    """One module's tensors as the file has them."""

    # [rank, in_features] and [out_features, rank]
    lora_A: Tensor
    lora_B: Tensor
    scaling: float


@dataclass(slots=True)
class _Findings:
    """Filled by the hooks while the prompts run."""

    errors: dict[str, float] = field(default_factory=dict)
    unchanged: set[str] = field(default_factory=set)


def examine(
    folder: Path, weights_digest: str, *, slot: int, loaded: LoadedModel, runner: Runner
) -> ProbeReport:
    """Probe the adapter in `folder`, which is installed in `slot`."""
    deltas = _read_deltas(folder)
    findings = _Findings()
    prompts = _prompts(loaded.vocab_size)
    handles = [
        loaded.bank.module(name).register_forward_hook(_hook(name, delta, findings))
        for name, delta in deltas.items()
    ]
    try:
        adapted = _logits(prompts, slot=slot, loaded=loaded, runner=runner)
    finally:
        for handle in handles:
            handle.remove()
    base = _logits(prompts, slot=NO_ADAPTER, loaded=loaded, runner=runner)
    alone = [_logits([p], slot=NO_ADAPTER, loaded=loaded, runner=runner) for p in prompts]
    noise = max(_largest(torch.cat(alone) - base), _rounding(base))
    untouched = sorted(findings.unchanged | (deltas.keys() - findings.errors.keys()))
    error = max(findings.errors.values(), default=math.inf)
    shift = _largest(adapted - base)
    bound = ERROR_BOUNDS[loaded.dtype]
    return ProbeReport(
        weights_digest=weights_digest,
        num_modules=len(deltas),
        largest_relative_error=error,
        error_bound=bound,
        logit_shift=shift,
        noise=noise,
        untouched_modules=untouched,
        is_passed=error <= bound and shift > MIN_SHIFT_OVER_NOISE * noise and not untouched,
    )


# Running


def _prompts(vocab_size: int) -> list[list[int]]:
    return [[(31 + 7919 * i + 104729 * n) % vocab_size for i in range(n)] for n in PROMPT_LENGTHS]


def _logits(prompts: list[list[int]], *, slot: int, loaded: LoadedModel, runner: Runner) -> Tensor:
    """[num_prompts, vocab_size] of the last tokens, over memory that is thrown away."""
    scheduled, num_blocks = [], 0
    for prompt in prompts:
        table = [num_blocks + 1 + i for i in range(-(-len(prompt) // BLOCK_SIZE))]
        num_blocks += len(table)
        sequence = Sequence.unowned(prompt, block_table=table, slot=slot)
        scheduled.append(ScheduledSequence(sequence, len(prompt), is_sampled=True))
    memory = DeviceMemory(
        loaded.layers, num_blocks=num_blocks, block_size=BLOCK_SIZE, device=loaded.device
    )
    batch = batches.build(scheduled, block_size=BLOCK_SIZE, device=loaded.device)
    return runner.run(batch, memory=memory)


def _hook(name: str, delta: _Delta, findings: _Findings) -> Any:
    def compare(module: LoraLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].flatten(0, -2)
        found = output.flatten(0, -2).float()
        expected = _recompute(x.float(), module, delta)
        difference = torch.linalg.vector_norm(found - expected)
        findings.errors[name] = float(difference / torch.linalg.vector_norm(expected))
        if torch.equal(module.base(x), output.flatten(0, -2)):
            findings.unchanged.add(name)

    return compare


def _recompute(x: Tensor, module: LoraLinear, delta: _Delta) -> Tensor:
    """x(W + dW)ᵀ + bias in float32, a tile of output features at a time."""
    weight, bias = module.base.weight, module.base.bias
    lora_A = delta.lora_A.to(x.device, torch.float32)
    columns = []
    for first in range(0, weight.shape[0], TILE_SIZE):
        tile = slice(first, first + TILE_SIZE)
        merged = delta.lora_B[tile].to(x.device, torch.float32) @ lora_A
        merged = weight[tile].float() + delta.scaling * merged
        columns.append(x @ merged.T)
    out = torch.cat(columns, dim=-1)
    return out if bias is None else out + bias.float()


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _rounding(logits: Tensor) -> float:
    """What float32 alone leaves open, where two orders happen to agree to the last bit."""
    return _largest(logits) * torch.finfo(torch.float32).eps


# Reading the files, independently of adapters.weights


def _read_deltas(folder: Path) -> dict[str, _Delta]:
    config = json.loads((folder / "adapter_config.json").read_bytes())
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
    return {
        _module(name): _Delta(
            lora_A=tensor,
            lora_B=tensors[name.replace(".lora_A.", ".lora_B.")],
            scaling=_scaling(_module(name), config),
        )
        for name, tensor in tensors.items()
        if ".lora_A." in name
    }


def _module(tensor_name: str) -> str:
    return tensor_name.removeprefix("base_model.model.").split(".lora_")[0]


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
