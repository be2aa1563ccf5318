"""The implementations of the operations, the definition among them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import Batch
from engine.kernels import reference
from engine.kernels.choice import DENSE, Kernels, choose, on_gpu
from engine.kernels.slot_weights import SlotWeights
from engine.sequence import NO_ADAPTER

__all__ = ["COMPILED", "DEFINED", "DENSE", "INTERPRETED"]


@dataclass(frozen=True, slots=True)
class DefinedAttention:
    batch: Batch

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
        reference.write_kv(key_cache, key, self.batch.cache_rows)
        reference.write_kv(value_cache, value, self.batch.cache_rows)
        out[:] = reference.paged_attention(
            query,
            key_cache,
            value_cache,
            block_tables=self.batch.block_tables,
            query_starts=self.batch.query_starts,
            context_lens=self.batch.host_context_lens,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
        )


@dataclass(frozen=True, slots=True)
class DefinedLora:
    batch: Batch
    weights: SlotWeights

    def apply(self, out: Tensor, x: Tensor, *, module: int) -> None:
        token_slots = torch.full((self.batch.num_tokens,), NO_ADAPTER)
        adapters, affine = {}, {}
        for start, end, slot in self.batch.slot_runs.tolist():
            token_slots[start:end] = slot
            pair = self.weights.pair(module, slot)
            if pair is not None:
                adapters[slot] = (pair[0], pair[1].T)
            gain_and_shift = self.weights.affine(module, slot)
            if gain_and_shift is not None:
                affine[slot] = gain_and_shift
        out[:] = reference.affine(out, affine, token_slots)
        if adapters:
            out += reference.lora(x, adapters, token_slots)


COMPILED = choose(torch.device("cpu"), torch.float32)
DEFINED = Kernels(DefinedAttention, DefinedLora)
# Those of GPUs, line by line.
INTERPRETED = on_gpu(torch.device("cpu"))
