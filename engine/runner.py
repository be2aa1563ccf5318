"""Run the model over a batch.

Knows the model, its memory and its adapters. Knows nothing of why these rows, or what becomes of
their logits.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.block_manager import Window
from engine.model import pooling
from engine.model.attention import forward
from engine.model.loader import LoadedModel
from engine.model.memory import DeviceMemory, block_elements
from engine.model.prepared import PreparedAdapter
from engine.model.targets import Vocabulary
from engine.replay import CudaGraphs, Replays, again

MEMINFO = Path("/proc/meminfo")
# A CPU's memory is shared with everything else on the machine.
MAX_CPU_MEMORY_SHARE = 0.25
MAX_CPU_MEMORY_BYTES = 4 * 1024**3
# For activations, recorded steps and the allocator's own losses.
CUDA_RESERVE_BYTES = 1280 * 1024**2


class Runner:
    """Runs steps over one piece of device memory, in which the adapters lie as well."""

    def __init__(
        self, loaded: LoadedModel, memory: DeviceMemory, replays: Replays | None = None
    ) -> None:
        """`replays`: steps over this memory that are not to be launched piece by piece."""
        self._loaded = loaded
        self._memory = memory
        self._replays = replays
        # Adapters are copied beside what computes.
        is_cuda = loaded.device.type == "cuda"
        self._copies = torch.Stream(loaded.device) if is_cuda else None

    @torch.inference_mode()
    def run(
        self,
        batch: Batch,
        *,
        memory: DeviceMemory | None = None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """[num_logits, vocab_size] float32: the logits of the batch's `logit_rows`.

        Wider where an adapter of these rows adds tokens, with -inf for rows that don't know them.
        `memory` takes the place of the runner's own, for batches that are nobody's sequences.
        `watch` is given the final hidden states on the way, [num_tokens, hidden_size].
        The logits are good until the next call.
        """
        if self._replays is not None and memory is None and watch is None:
            replayed = self._replays.run(batch)
            if replayed is not None:
                return replayed
        model, bank, kernels = self._loaded.model, self._loaded.bank, self._loaded.kernels
        bank.begin(batch, kernels)
        try:
            with nullcontext() if watch is None else pooling.watched(model, watch):
                logits = forward(
                    model,
                    batch,
                    input_ids=bank.changes.input_ids(batch),
                    memory=memory or self._memory,
                    plan=kernels.plan_attention(batch),
                )
        finally:
            bank.end()
        return bank.changes.fitted(logits.float(), batch)

    # Adapters

    def copy_slice(self, adapter: PreparedAdapter, window: Window, start: int, end: int) -> None:
        """Bytes start .. end of an adapter into its window; called in a load thread."""
        source = adapter.values.view(torch.uint8)[start:end]
        target = self._window(window).view(torch.uint8)[start:end]
        if self._copies is None:
            # torch would start threads of its own for it.
            np.copyto(target.numpy(), source.numpy())
            return
        with self._copies:
            target.copy_(source, non_blocking=True)
        self._copies.synchronize()

    def install(self, slot: int, adapter: PreparedAdapter, window: Window) -> None:
        """`window` holds the adapter now: rows of this slot take it from there."""
        self._loaded.bank.install(slot, adapter, memory=self._window(window))

    def move(self, slot: int, window: Window) -> None:
        """What the slot holds lies in `window` now."""
        self._loaded.bank.move(slot, memory=self._window(window))

    def clear(self, slot: int) -> None:
        self._loaded.bank.clear(slot)

    def vocabulary(self, slot: int) -> Vocabulary:
        """The token ids that the slot's adapter knows; those of the base model without one."""
        return self._loaded.bank.vocabulary(slot)

    def _window(self, window: Window) -> Tensor:
        return self._memory.window(window.first, window.num_blocks)


def recorded(
    loaded: LoadedModel,
    memory: DeviceMemory,
    *,
    max_num_seqs: int,
    max_context: int,
    max_rank: int,
) -> Replays | None:
    """The decode steps of the model, recorded; None where its kernels gain nothing by that."""
    fixed = loaded.kernels.fixed
    if fixed is None:
        return None
    replays = Replays(
        loaded,
        fixed,
        memory,
        max_num_seqs=max_num_seqs,
        max_context=max_context,
        max_rank=max_rank,
    )
    replays.record(CudaGraphs() if loaded.device.type == "cuda" else again)
    return replays


def block_bytes(loaded: LoadedModel, *, block_size: int) -> int:
    return block_elements(loaded.layers, block_size=block_size) * loaded.dtype.itemsize


def num_blocks_that_fit(
    loaded: LoadedModel,
    *,
    block_size: int,
    max_num_seqs: int,
    memory_bytes: int | None,
    gpu_memory_utilization: float,
    adapter_bytes: int,
) -> int:
    """As many blocks as the memory allows, and not more than could ever be used.

    That is what all sequences at full length need, and `adapter_bytes` for all adapters.
    """
    if memory_bytes is None:
        memory_bytes = _free_memory_bytes(loaded.device, gpu_memory_utilization)
    size_bytes = block_bytes(loaded, block_size=block_size)
    num_useful = max_num_seqs * -(-loaded.max_model_len // block_size)
    return min(memory_bytes // size_bytes, num_useful + -(-adapter_bytes // size_bytes))


def _free_memory_bytes(device: torch.device, utilization: float) -> int:
    if device.type == "cpu":
        share = int(_available_memory_bytes() * MAX_CPU_MEMORY_SHARE)
        return min(share, MAX_CPU_MEMORY_BYTES)
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(free - total * (1 - utilization)) - CUDA_RESERVE_BYTES)


def _available_memory_bytes() -> int:
    if MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
