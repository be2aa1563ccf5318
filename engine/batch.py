"""Lay the scheduled sequences end to end: what one step computes, as tensors on the device.

Knows tokens, positions, blocks and slots. Knows nothing of layers, or of why these were chosen.
"""

from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from engine.block_manager import NULL_BLOCK
from engine.scheduler import ScheduledSequence
from engine.sequence import NO_ADAPTER

Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences with a single token come first."""

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
    # [num_logits] int64, rows whose logits are wanted
    logit_rows: Tensor
    # Of each sequence, on the host: first row of its tokens, with num_tokens at the end
    query_starts: tuple[int, ...]
    # Of each sequence, on the host: as context_lens
    host_context_lens: tuple[int, ...]
    # How many of the first sequences have a single token
    num_decodes: int
    # Whether `logit_rows` are all rows, in their order
    wants_all_rows: bool
    # [num_runs, 3] int64, on the host: first row, end and slot of neighbours that use one adapter;
    # rows that the base model answers alone are in none
    slot_runs: Ints
    # [num_runs, 3] int64, on the host: the same of the rows of logits
    logit_slot_runs: Ints
    block_size: int

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]


def build(scheduled: list[ScheduledSequence], *, block_size: int, device: torch.device) -> Batch:
    """The batch of `scheduled`, whose sequences already have their blocks."""
    # Nothing here is called once for each row: decoding batches have many.
    lengths = np.array([item.num_tokens for item in scheduled])
    befores = np.array([item.sequence.num_computed_tokens for item in scheduled])
    slots = np.array([item.sequence.slot for item in scheduled])
    num_decodes = int((lengths == 1).sum())
    contexts = befores + lengths
    starts = np.concatenate([[0], np.cumsum(lengths)])
    owners = np.repeat(np.arange(len(scheduled)), lengths)
    positions = np.arange(starts[-1]) - starts[owners] + befores[owners]
    tables = _block_tables(scheduled)
    logit_rows = _logit_rows(scheduled, starts.tolist())
    wants_all_rows = len(logit_rows) == starts[-1] and logit_rows == list(range(starts[-1]))
    cache_rows = tables[owners, positions // block_size] * block_size + positions % block_size

    def on_device(values: Ints | list[int]) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64)).to(device, non_blocking=True)

    return Batch(
        input_ids=on_device(_new_tokens(scheduled, num_decodes)),
        position_ids=on_device(positions),
        cache_rows=on_device(cache_rows),
        block_tables=on_device(tables),
        context_lens=on_device(contexts),
        logit_rows=on_device(logit_rows),
        query_starts=tuple(starts.tolist()),
        host_context_lens=tuple(contexts.tolist()),
        num_decodes=num_decodes,
        wants_all_rows=wants_all_rows,
        slot_runs=_slot_runs(slots, starts),
        logit_slot_runs=_slot_runs(slots[owners[logit_rows]], np.arange(len(logit_rows) + 1)),
        block_size=block_size,
    )


def _new_tokens(scheduled: list[ScheduledSequence], num_decodes: int) -> list[int]:
    decodes = [item.sequence for item in scheduled[:num_decodes]]
    tokens = [sequence.token_ids[sequence.num_computed_tokens] for sequence in decodes]
    for item in scheduled[num_decodes:]:
        first = item.sequence.num_computed_tokens
        tokens += item.sequence.token_ids[first : first + item.num_tokens]
    return tokens


def _logit_rows(scheduled: list[ScheduledSequence], starts: list[int]) -> list[int]:
    rows = [end - 1 for end, item in zip(starts[1:], scheduled, strict=True) if item.is_sampled]
    for start, item in zip(starts[:-1], scheduled, strict=True):
        if item.sequence.prompt_logprobs is not None:
            first = item.sequence.num_computed_tokens
            rows += [start + position - first for position in item.scored_positions]
    return rows


def _block_tables(scheduled: list[ScheduledSequence]) -> Ints:
    tables = [item.sequence.block_table for item in scheduled]
    columns = list(zip_longest(*tables, fillvalue=NULL_BLOCK))
    return np.ascontiguousarray(np.array(columns, dtype=np.int64).T)


def _slot_runs(slots: Ints, starts: Ints) -> Ints:
    """`slots`: of each sequence or row; `starts`: where it begins, and the end of the last."""
    is_first = np.concatenate([[True], slots[1:] != slots[:-1]])[: len(slots)]
    firsts = np.flatnonzero(is_first)
    ends = np.append(firsts, len(slots))[1:]
    runs = np.stack([starts[firsts], starts[ends], slots[firsts]], axis=1)
    return np.ascontiguousarray(runs[runs[:, 2] != NO_ADAPTER])
