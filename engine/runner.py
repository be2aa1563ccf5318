"""Run the model over a batch.

Knows the model, its memory and its adapters. Knows nothing of why these rows, or what becomes of
their logits.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from engine.batch import Batch
from engine.kernels.dense import adapted_runs
from engine.model.attention import forward
from engine.model.loader import LoadedModel
from engine.model.memory import DeviceMemory, block_elements

MEMINFO = Path("/proc/meminfo")
# On CPU the cache shares memory with everything else on the machine.
MAX_CPU_MEMORY_SHARE = 0.25
MAX_CPU_CACHE_BYTES = 4 * 1024**3
# For activations and the allocator's own losses.
CUDA_RESERVE_BYTES = 1024**3


class Runner:
    """Runs steps over one piece of device memory."""

    def __init__(self, loaded: LoadedModel, memory: DeviceMemory) -> None:
        self._loaded = loaded
        self._memory = memory

    @torch.inference_mode()
    def run(self, batch: Batch, *, memory: DeviceMemory | None = None) -> Tensor:
        """[num_logits, vocab_size] float32: the logits of the batch's `logit_rows`.

        `memory` takes the place of the runner's own, for batches that are nobody's sequences.
        """
        model, bank, kernels = self._loaded.model, self._loaded.bank, self._loaded.kernels
        # Without an adapter in the batch the base model runs as if there were none at all.
        bank.plan = kernels.plan_lora(batch, bank.weights) if adapted_runs(batch) else None
        try:
            return forward(
                model, batch, memory=memory or self._memory, plan=kernels.plan_attention(batch)
            )
        finally:
            bank.plan = None


def num_blocks_that_fit(
    loaded: LoadedModel,
    *,
    block_size: int,
    max_num_seqs: int,
    kv_memory_bytes: int | None,
    gpu_memory_utilization: float,
    lora_bytes: int,
) -> int:
    """As many blocks as the memory allows, and not more than all sequences at full length need."""
    if kv_memory_bytes is None:
        kv_memory_bytes = _memory_for_cache(loaded.device, gpu_memory_utilization, lora_bytes)
    block_bytes = block_elements(loaded.layers, block_size=block_size) * loaded.dtype.itemsize
    num_useful = max_num_seqs * -(-loaded.max_model_len // block_size)
    return min(kv_memory_bytes // block_bytes, num_useful)


def _memory_for_cache(device: torch.device, utilization: float, lora_bytes: int) -> int:
    if device.type == "cpu":
        share = int(_available_memory_bytes() * MAX_CPU_MEMORY_SHARE)
        return min(share, MAX_CPU_CACHE_BYTES)
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(free - total * (1 - utilization)) - CUDA_RESERVE_BYTES - lora_bytes)


def _available_memory_bytes() -> int:
    if MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
