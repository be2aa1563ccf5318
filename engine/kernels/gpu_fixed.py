"""Plans for decode steps on GPUs whose launches follow from the number of rows alone.

What else differs from step to step is in lists on the device, which stay where they are and are
filled anew: so the launches of one step can be recorded, and replayed for the next. Knows plans.
Knows nothing of who records.
"""

import numpy as np
import torch

from engine.batch import Batch
from engine.kernels.gpu_attention import FixedTiles, GpuAttention
from engine.kernels.gpu_lora import SMALL_TILE, FixedWork, GpuLora, MixedLora, tile_rows_of
from engine.kernels.slot_weights import SlotWeights

# Rows of a tile of LoRA, by which its kernels differ: none without adapters, 1 where nearly all are
# distinct.
NO_LORA, OWN_ROWS, SHARED_ROWS = 0, 1, SMALL_TILE


class GpuFixed:
    """As `FixedKernels`."""

    kinds: tuple[int, ...] = (NO_LORA, OWN_ROWS, SHARED_ROWS)

    def __init__(self, lora: GpuLora, device: torch.device) -> None:
        self._lora, self._device = lora, device

    def kind_of(self, batch: Batch) -> int:
        """As `FixedKernels.kind_of`."""
        if not len(batch.slot_runs):
            return NO_LORA
        return min(tile_rows_of(batch.slot_runs), SHARED_ROWS)

    def plan(
        self, batch: Batch, weights: SlotWeights, *, kind: int, max_context: int, max_rank: int
    ) -> "GpuPlans":
        """As `FixedKernels.plan`."""
        num_rows, work = batch.num_tokens, None
        if kind != NO_LORA:
            work = FixedWork(num_rows, tile_rows=kind, max_rank=max_rank, device=self._device)
        tiles = FixedTiles(num_rows, max_context=max_context, device=self._device)
        return GpuPlans(batch, tiles, work, lora=self._lora, weights=weights)


class GpuPlans:
    """As `FixedPlans`. Mutable; one thread."""

    def __init__(
        self,
        batch: Batch,
        tiles: FixedTiles,
        work: FixedWork | None,
        *,
        lora: GpuLora,
        weights: SlotWeights,
    ) -> None:
        self._batch, self._tiles, self._work = batch, tiles, work
        self._lora, self._weights = lora, weights

    def take(self, batch: Batch) -> bool:
        """As `FixedPlans.take`."""
        contexts = np.ones(self._batch.num_tokens, dtype=np.int64)
        contexts[: batch.num_tokens] = batch.host_context_lens
        if not self._tiles.fill(contexts):
            return False
        if self._work is not None:
            tables = self._lora.tables_of(self._weights, batch.slot_runs)
            self._work.fill(batch.slot_runs, tables.ranks)
        return True

    def attention(self) -> GpuAttention:
        return GpuAttention(self._batch, self._tiles)

    def lora(self) -> MixedLora | None:
        if self._work is None:
            return None
        tables = self._lora.tables_of(self._weights, self._batch.slot_runs)
        return MixedLora.of_any(self._work.list, tables)
