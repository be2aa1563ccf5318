"""Lay the scheduled sequences end to end: what one step computes, as tensors on the device.

Knows tokens, positions, blocks and slots. Knows nothing of layers, or of why these were chosen.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from engine.block_manager import NULL_BLOCK
from engine.scheduler import ScheduledSequence


@dataclass(frozen=True, slots=True)
class SlotRun:
    """Neighbouring rows of the batch that use one slot."""

    start: int
    end: int
    slot: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences with a single token come first; neighbours use one slot."""

    # [num_tokens] int64, sequences laid end to end
    input_ids: Tensor
    # [num_tokens] int64, place of each token in its own sequence
    position_ids: Tensor
    # [num_tokens] int64, where in the flattened cache (block * block_size + offset) each token goes
    cache_rows: Tensor
    # [num_seqs, max_blocks] int64, padded with the null block
    block_tables: Tensor
    # [num_seqs] int64, tokens of each sequence after this step
    context_lens: Tensor
    # [num_logits] int64, rows whose logits are wanted: the last one of each sequence that is
    # sampled, then those of the `scored_positions`, both in the order of the sequences
    logit_rows: Tensor
    # Of each sequence, on the host: first row of its tokens, with num_tokens at the end
    query_starts: tuple[int, ...]
    # Of each sequence, on the host: as context_lens
    host_context_lens: tuple[int, ...]
    # How many of the first sequences have a single token
    num_decodes: int
    # On the host: which rows use which slot; NO_ADAPTER where the base model answers alone
    slot_runs: tuple[SlotRun, ...]
    block_size: int

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]


def build(scheduled: list[ScheduledSequence], *, block_size: int, device: torch.device) -> Batch:
    """The batch of `scheduled`, whose sequences already have their blocks."""
    lengths = [item.num_tokens for item in scheduled]
    starts = (0, *np.cumsum(lengths).tolist())
    contexts = [item.sequence.num_computed_tokens + item.num_tokens for item in scheduled]
    positions = np.concatenate(
        [np.arange(end - n, end) for n, end in zip(lengths, contexts, strict=True)]
    )
    tables = _block_tables(scheduled, [-(-end // block_size) for end in contexts])
    owners = np.repeat(np.arange(len(scheduled)), lengths)
    cache_rows = tables[owners, positions // block_size] * block_size + positions % block_size
    ids = np.concatenate([_new_tokens(item) for item in scheduled])

    def on_device(values: object) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64)).to(device, non_blocking=True)

    return Batch(
        input_ids=on_device(ids),
        position_ids=on_device(positions),
        cache_rows=on_device(cache_rows),
        block_tables=on_device(tables),
        context_lens=on_device(contexts),
        logit_rows=on_device(_logit_rows(scheduled, starts)),
        query_starts=starts,
        host_context_lens=tuple(contexts),
        num_decodes=sum(n == 1 for n in lengths),
        slot_runs=_slot_runs(scheduled, starts),
        block_size=block_size,
    )


def _new_tokens(item: ScheduledSequence) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    first = item.sequence.num_computed_tokens
    return np.asarray(item.sequence.token_ids[first : first + item.num_tokens], dtype=np.int64)


def _logit_rows(scheduled: list[ScheduledSequence], starts: tuple[int, ...]) -> list[int]:
    rows = [end - 1 for end, item in zip(starts[1:], scheduled, strict=True) if item.is_sampled]
    for start, item in zip(starts[:-1], scheduled, strict=True):
        if item.sequence.prompt_logprobs is not None:
            first = item.sequence.num_computed_tokens
            rows += [start + position - first for position in item.scored_positions]
    return rows


def _block_tables(
    scheduled: list[ScheduledSequence], num_blocks: list[int]
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    tables = np.full((len(scheduled), max(num_blocks)), NULL_BLOCK, dtype=np.int64)
    for row, (item, num) in enumerate(zip(scheduled, num_blocks, strict=True)):
        tables[row, :num] = item.sequence.block_table[:num]
    return tables


def _slot_runs(
    scheduled: Iterable[ScheduledSequence], starts: tuple[int, ...]
) -> tuple[SlotRun, ...]:
    runs = []
    rows = zip(scheduled, starts[:-1], starts[1:], strict=True)
    for slot, group in groupby(rows, key=lambda row: row[0].sequence.slot):
        members = list(group)
        runs.append(SlotRun(start=members[0][1], end=members[-1][2], slot=slot))
    return tuple(runs)
