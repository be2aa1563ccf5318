"""Choose the implementation of the operations that fits a device.

Each computes what `reference` defines. Knows devices and dtypes. Knows nothing of how it is done.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.batch import Batch
from engine.kernels import threads
from engine.kernels.dense import DenseAttention, DenseLora
from engine.kernels.slot_weights import SlotWeights

# What tensor cores take; float32 has no advantage of kernels that are tiled for them.
HALF = (torch.float16, torch.bfloat16)


class AttentionPlan(Protocol):
    """Which positions each new token of a step sees."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_cache: Tensor,
        value_cache: Tensor,
        out: Tensor,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> None:
        """As `reference.write_kv` of key and value, then `reference.paged_attention` into `out`."""


class LoraPlan(Protocol):
    """Which rows of a step meet which adapters."""

    def apply(self, out: Tensor, x: Tensor, *, module: int) -> None:
        """out = affine(out) + lora(x), as `reference.affine` and `reference.lora`.

        x: [num_tokens, in_features]; out: [num_tokens, out_features], changed in place.
        """


def _is_warm(weights: SlotWeights, dtype: torch.dtype) -> None:
    """Nothing is compiled ahead."""


@dataclass(frozen=True, slots=True)
class Kernels:
    plan_attention: Callable[[Batch], AttentionPlan]
    # For batches with at least one adapter.
    plan_lora: Callable[[Batch, SlotWeights], LoraPlan]
    # Before any slot is in use: what is left to be done for LoRA, so that no step waits for it.
    warm_up_lora: Callable[[SlotWeights, torch.dtype], None] = _is_warm


def _dense_lora(batch: Batch, weights: SlotWeights) -> LoraPlan:
    return DenseLora(batch.slot_runs, weights)


DENSE = Kernels(DenseAttention, _dense_lora)


def choose(device: torch.device, dtype: torch.dtype) -> Kernels:
    if device.type == "cuda" and dtype in HALF and importlib.util.find_spec("triton") is not None:
        return on_gpu(device)
    if device.type != "cpu" or dtype is not torch.float32 or not _can_compile():
        return DENSE
    # Not at the top: a GPU's machine needs no compiler for CPUs.
    from engine.kernels import cpu

    return Kernels(cpu.CompiledAttention, cpu.CompiledLora)


def on_gpu(device: torch.device) -> Kernels:
    """Triton's kernels; on a CPU they run where Triton interprets them."""
    # Not at the top: a CPU's machine needs no compiler for GPUs.
    from engine.kernels.gpu_attention import GpuAttention
    from engine.kernels.gpu_lora import GpuLora

    lora = GpuLora(device)
    return Kernels(GpuAttention, lora.plan, lora.warm_up)


def _can_compile() -> bool:
    return importlib.util.find_spec("numba") is not None and threads.find_runtime() is not None
