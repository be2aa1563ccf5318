"""Decode steps of a few sizes, each recorded once and replayed from then on.

A step of some rows is computed as one of the next larger size: the rows behind are tokens of
nobody, whose keys and values go into a block of nobody. All that differs from step to step lies in
tensors that stay where they are, so that what a step launches follows from its size, and from how
its adapters are computed. Knows batches and devices. Knows nothing of why these rows, or of what
becomes of their logits.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.kernels.choice import FixedKernels, FixedPlans
from engine.model.attention import forward
from engine.model.loader import LoadedModel
from engine.model.memory import DeviceMemory

logger = logging.getLogger(__name__)

# A GEMM of few rows takes as long as one of eight; of many, an eighth may be nobody's.
SMALL_SIZES = (1, 2, 4, 8)
SIZE_STEP, LARGEST_SHARE = 8, 8
# Recording ends where it has taken so long, or has left so little of the device's memory; steps of
# sizes that are not recorded are computed as one of a larger size, or by themselves.
MAX_RECORDING_S = 40.0
MIN_FREE_BYTES = 256 * 1024**2

Compute = Callable[[], None]
# Makes of a computation one that does the same with what its tensors hold by then. Raises
# RuntimeError where it can't.
Record = Callable[[Compute], Compute]


def sizes_up_to(largest: int) -> tuple[int, ...]:
    """Numbers of rows that steps are computed with."""
    sizes = list(SMALL_SIZES)
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + SIZE_STEP * max(1, sizes[-1] // (SIZE_STEP * LARGEST_SHARE)))
    return (*(size for size in sizes if size < largest), largest)


class Replays:
    """Mutable; one thread."""

    def __init__(
        self,
        loaded: LoadedModel,
        fixed: FixedKernels,
        memory: DeviceMemory,
        *,
        max_num_seqs: int,
        max_context: int,
        max_rank: int,
    ) -> None:
        """`max_rank` is 0 where no adapters are served."""
        self._loaded, self._fixed, self._memory = loaded, fixed, memory
        self._max_context, self._max_rank = max_context, max_rank
        self._buffers = Buffers(memory, max_num_seqs=max_num_seqs, max_context=max_context)
        # [max_num_seqs, vocab_size] float32; filled by each step
        self._logits = torch.empty(
            max_num_seqs, loaded.vocab_size, dtype=torch.float32, device=loaded.device
        )
        self._sizes = sizes_up_to(max_num_seqs)
        # By kind, then by size, the smallest first; filled by `record`
        self._steps: dict[int, dict[int, _Step]] = {}

    @torch.inference_mode()
    def record(self, record: Record) -> None:
        """Largest first: then all others find their memory in what the first has taken."""
        started_s = time.monotonic()
        for size, kind in self._wanted():
            if time.monotonic() - started_s > MAX_RECORDING_S or not self._has_memory():
                break
            try:
                step = self._recorded(size, kind, record)
            except RuntimeError as error:
                logger.warning("steps_not_recorded", extra={"reason": str(error)})
                break
            self._steps[kind] = {size: step} | self._steps.get(kind, {})
        logger.info(
            "steps_recorded",
            extra={"num_steps": self.num_steps, "seconds": round(time.monotonic() - started_s, 1)},
        )

    @property
    def num_steps(self) -> int:
        return sum(map(len, self._steps.values()))

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor | None:
        """As `Runner.run`; None for a batch that is none of the recorded steps.

        The logits are good until the next call.
        """
        step = self._step_of(batch)
        if step is None or not step.plans.take(batch):
            return None
        self._buffers.take(batch, size=step.size)
        step.compute()
        return self._logits[: batch.num_tokens]

    def _step_of(self, batch: Batch) -> "_Step | None":
        num_rows = batch.num_tokens
        is_decode = batch.num_decodes == num_rows and batch.wants_all_rows
        if not is_decode or not self._loaded.bank.is_lora_alone(batch):
            return None
        steps = self._steps.get(self._fixed.kind_of(batch), {})
        return next((step for size, step in steps.items() if size >= num_rows), None)

    def _wanted(self) -> Iterator[tuple[int, int]]:
        kinds = self._fixed.kinds if self._max_rank else self._fixed.kinds[:1]
        for size in reversed(self._sizes):
            for kind in kinds:
                yield size, kind

    def _recorded(self, size: int, kind: int, record: Record) -> "_Step":
        batch = self._buffers.batch_of(size)
        plans = self._fixed.plan(
            batch,
            self._loaded.bank.weights,
            kind=kind,
            max_context=self._max_context,
            max_rank=self._max_rank,
        )
        assert plans.take(batch), "rows of nobody read one position each"
        return _Step(size, plans, record(partial(self._compute, batch, plans)))

    @torch.inference_mode()
    def _compute(self, batch: Batch, plans: FixedPlans) -> None:
        with self._loaded.bank.served(plans.lora()):
            logits = forward(
                self._loaded.model,
                batch,
                input_ids=batch.input_ids,
                memory=self._memory,
                plan=plans.attention(),
            )
        self._logits[: batch.num_tokens].copy_(logits)

    def _has_memory(self) -> bool:
        device = self._loaded.device
        return device.type != "cuda" or torch.cuda.mem_get_info(device)[0] > MIN_FREE_BYTES


@dataclass(frozen=True, slots=True)
class _Step:
    size: int
    plans: FixedPlans
    compute: Compute


class Buffers:
    """Where the rows of all recorded steps lie; first all of them are nobody's."""

    def __init__(self, memory: DeviceMemory, *, max_num_seqs: int, max_context: int) -> None:
        self._block_size, self._scratch_block = memory.block_size, memory.scratch_block
        width = -(-max_context // memory.block_size)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=memory.device)

        # As those of a `Batch`
        self._input_ids, self._position_ids, self._cache_rows = (
            zeros(max_num_seqs) for _ in range(3)
        )
        self._block_tables = zeros(max_num_seqs, width)
        self._context_lens = zeros(max_num_seqs) + 1
        self._all_rows = torch.arange(max_num_seqs, device=memory.device)
        self._give_to_nobody(0, max_num_seqs)

    def batch_of(self, size: int) -> Batch:
        """The first rows, each of a sequence of its own; what they hold may change."""
        none = np.empty((0, 3), dtype=np.int64)
        return Batch(
            input_ids=self._input_ids[:size],
            position_ids=self._position_ids[:size],
            cache_rows=self._cache_rows[:size],
            block_tables=self._block_tables[:size],
            context_lens=self._context_lens[:size],
            logit_rows=self._all_rows[:size],
            query_starts=tuple(range(size + 1)),
            host_context_lens=(1,) * size,
            num_decodes=size,
            wants_all_rows=True,
            slot_runs=none,
            logit_slot_runs=none,
            block_size=self._block_size,
        )

    def take(self, batch: Batch, *, size: int) -> None:
        """Of `size` rows the first are the batch's, the others nobody's."""
        num_rows, width = batch.block_tables.shape
        self._input_ids[:num_rows].copy_(batch.input_ids)
        self._position_ids[:num_rows].copy_(batch.position_ids)
        self._cache_rows[:num_rows].copy_(batch.cache_rows)
        self._context_lens[:num_rows].copy_(batch.context_lens)
        self._block_tables[:num_rows, :width].copy_(batch.block_tables)
        if num_rows < size:
            self._give_to_nobody(num_rows, size)

    def _give_to_nobody(self, first: int, end: int) -> None:
        """Their token stays what it was: whatever comes of it, nobody reads it."""
        self._position_ids[first:end] = 0
        self._cache_rows[first:end] = self._scratch_block * self._block_size
        self._context_lens[first:end] = 1
        self._block_tables[first:end, 0] = self._scratch_block


# Ways to record


def again(compute: Compute) -> Compute:
    """Do it again, for devices that keep no record."""
    return compute


class CudaGraphs:
    """Launches all that was launched once by one call."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        make_stream: Any = torch.cuda.Stream  # has no types
        self._stream = make_stream()

    def __call__(self, compute: Compute) -> Compute:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Compiles, and learns which modules read one input; then has these listed.
            compute()
            compute()
            self._rehearse(compute)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            compute()
        return graph.replay

    def _rehearse(self, compute: Compute) -> None:
        """Raises RuntimeError where the host has to wait for what the device finds.

        Some models ask which experts a step needs; a recording that breaks off leaves torch in
        disorder.
        """
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            # It says that it does not find all; what it misses, the recording will.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        try:
            compute()
        finally:
            torch.cuda.set_sync_debug_mode(before)
