"""The operations in few, large torch calls: chosen for CPUs, right on every device.

A plan is computed once per step, from the batch alone, and shared by all layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from engine.batch import Batch, SlotRun
from engine.sequence import NO_ADAPTER

# Rows of one adapter that are worth a GEMM of their own: fewer share one, masked, with neighbours.
MIN_ROWS_ALONE = 32
# Unused columns that cost less than one more GEMM call.
MAX_WASTED_COLUMNS = 32
# A decoding neighbour may have this many times the context before it stops sharing a call.
MAX_PADDING_FACTOR = 2


# Attention


@dataclass(slots=True)
class _Group:
    """Sequences with equally many new tokens, attended in one call."""

    first_row: int
    num_seqs: int
    num_queries: int
    # [num_seqs] int64
    context_lens: Tensor
    max_context: int
    is_ragged: bool
    # [num_seqs * max_context] int64 rows of the flattened cache; past a context: the null block
    gather_rows: Tensor
    # By sliding window; filled by the first layer that has such a window
    masks: dict[int | None, Tensor | None]

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.num_seqs * self.num_queries)


class AttentionPlan:
    """Where each new token's keys and values go, and which positions it sees."""

    def __init__(self, batch: Batch) -> None:
        self._cache_rows = batch.cache_rows
        self._groups = [_group(batch, first, end) for first, end in _group_bounds(batch)]

    def write_kv(self, cache: Tensor, new: Tensor) -> None:
        """As `reference.write_kv`."""
        cache.flatten(0, 1).index_copy_(0, self._cache_rows, new)

    def attend(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """As `reference.paged_attention`."""
        outputs = [
            _attend_group(
                group,
                query[group.rows].view(group.num_seqs, group.num_queries, *query.shape[1:]),
                _gather(key_cache, group),
                _gather(value_cache, group),
                scaling=scaling,
                sliding_window=sliding_window,
                softcap=softcap,
            )
            for group in self._groups
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _group_bounds(batch: Batch) -> list[tuple[int, int]]:
    """Sequences first..end of each group: decodes by similar context, prefills one by one."""
    contexts = batch.host_context_lens
    bounds: list[tuple[int, int]] = []
    first = 0
    for index in range(1, batch.num_decodes + 1):
        is_last = index == batch.num_decodes
        if is_last or contexts[index] > MAX_PADDING_FACTOR * (contexts[first] + batch.block_size):
            bounds.append((first, index))
            first = index
    return bounds + [(i, i + 1) for i in range(batch.num_decodes, len(contexts))]


def _group(batch: Batch, first: int, end: int) -> _Group:
    contexts = batch.host_context_lens[first:end]
    max_context, size = max(contexts), batch.block_size
    lens = batch.context_lens[first:end]
    positions = torch.arange(max_context, device=lens.device)
    rows = batch.block_tables[first:end, positions // size] * size + positions % size
    rows = rows.masked_fill_(positions >= lens[:, None], 0)
    return _Group(
        first_row=batch.query_starts[first],
        num_seqs=end - first,
        num_queries=batch.query_starts[first + 1] - batch.query_starts[first],
        context_lens=lens,
        max_context=max_context,
        is_ragged=min(contexts) != max_context,
        gather_rows=rows.flatten(),
        masks={},
    )


def _gather(cache: Tensor, group: _Group) -> Tensor:
    """[num_seqs, num_kv_heads, max_context, head_dim]"""
    flat = cache.view(-1, cache.shape[2] * cache.shape[3])
    picked = torch.index_select(flat, 0, group.gather_rows)
    shape = (group.num_seqs, group.max_context, cache.shape[2], cache.shape[3])
    return picked.view(shape).transpose(1, 2)


def _attend_group(
    group: _Group,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """query: [num_seqs, num_queries, num_heads, head_dim]; gives [rows, num_heads, value_dim]."""
    query = query.transpose(1, 2)
    is_causal = group.num_queries == group.max_context and sliding_window is None
    if softcap is None:
        mask = None if is_causal else _mask(group, sliding_window)
        out = scaled_dot_product_attention(
            query, keys, values, mask, is_causal=is_causal, scale=scaling, enable_gqa=True
        )
    else:
        mask = _mask(group, sliding_window)
        out = _capped_attention(query, keys, values, mask, scaling=scaling, softcap=softcap)
    return out.transpose(1, 2).flatten(0, 1)


def _capped_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    softcap: float,
) -> Tensor:
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    scores = (query @ keys.transpose(2, 3)).float() * scaling
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1).to(values.dtype) @ values


def _mask(group: _Group, sliding_window: int | None) -> Tensor | None:
    """[num_seqs, 1, num_queries, max_context] bool, True where a query sees a position."""
    if sliding_window not in group.masks:
        group.masks[sliding_window] = _build_mask(group, sliding_window)
    return group.masks[sliding_window]


def _build_mask(group: _Group, sliding_window: int | None) -> Tensor | None:
    reaches_all = sliding_window is None or sliding_window >= group.max_context
    if group.num_queries == 1 and not group.is_ragged and reaches_all:
        return None
    device = group.context_lens.device
    queries = torch.arange(-group.num_queries, 0, device=device) + group.context_lens[:, None]
    positions = torch.arange(group.max_context, device=device)
    mask = positions <= queries[:, :, None]
    if sliding_window is not None:
        mask &= positions > queries[:, :, None] - sliding_window
    return mask[:, None]


# LoRA

# Which rows of a module's pooled lora_A and lora_B belong to which slot: (slot, first, end).
Layout = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows of the batch times columns of the pool."""

    rows: slice
    columns: slice
    # [rows, columns] bool, True where the column is another adapter's; None where none is
    is_foreign: Tensor | None


class LoraPlan:
    """Which rows meet which adapters.

    Long runs of one adapter get a GEMM of their own. Short ones share a GEMM over all their
    adapters' columns, and what belongs to others is zeroed between shrink and expand: filled, not
    multiplied, so that an overflow in one row can't reach another.
    """

    def __init__(self, batch: Batch) -> None:
        self.num_tokens = batch.num_tokens
        self._device = batch.input_ids.device
        self._run_groups = _run_groups(batch.slot_runs)
        self._tiles: dict[Layout, list[_Tile]] = {}

    def add(
        self, out: Tensor, x: Tensor, *, lora_A: Tensor, lora_B: Tensor, layout: Layout
    ) -> None:
        """out += lora(x), as `reference.lora`.

        x: [num_tokens, in_features]; out: [num_tokens, out_features], changed in place.
        lora_A: [pool, in_features]; lora_B: [pool, out_features], transposed for the expand.
        """
        assert x.shape[0] == self.num_tokens, "a LoRA module must see every row of the batch"
        tiles = self._tiles.get(layout)
        if tiles is None:
            tiles = self._tiles[layout] = self._build_tiles(layout)
        for tile in tiles:
            shrunk = linear(x[tile.rows], lora_A[tile.columns])
            if tile.is_foreign is not None:
                shrunk.masked_fill_(tile.is_foreign, 0)
            out[tile.rows].addmm_(shrunk, lora_B[tile.columns])

    def _build_tiles(self, layout: Layout) -> list[_Tile]:
        columns_of = {slot: (first, end) for slot, first, end in layout}
        tiles = []
        for runs in self._run_groups:
            rows = slice(runs[0].start, runs[-1].end)
            slots = {run.slot for run in runs}
            for first, end in _merge([columns_of[s] for s in slots if s in columns_of]):
                is_foreign = None
                if len(slots) > 1:
                    is_foreign = self._foreign_mask(runs, columns_of, first=first, end=end)
                tiles.append(_Tile(rows, slice(first, end), is_foreign))
        return tiles

    def _foreign_mask(
        self,
        runs: list[SlotRun],
        columns_of: dict[int, tuple[int, int]],
        *,
        first: int,
        end: int,
    ) -> Tensor:
        start = runs[0].start
        mask = torch.ones(runs[-1].end - start, end - first, dtype=torch.bool)
        for run in runs:
            own_first, own_end = columns_of.get(run.slot, (0, 0))
            if first <= own_first and own_end <= end:
                own = slice(own_first - first, own_end - first)
                mask[run.start - start : run.end - start, own] = False
        return mask.to(self._device)


def plan_lora(batch: Batch) -> LoraPlan | None:
    """None when the base model answers all rows alone: then no LoRA operation runs."""
    if all(run.slot == NO_ADAPTER for run in batch.slot_runs):
        return None
    return LoraPlan(batch)


def _run_groups(runs: tuple[SlotRun, ...]) -> list[list[SlotRun]]:
    """Long runs alone, short neighbours together, runs of the base model left out at the edges."""
    groups: list[list[SlotRun]] = []
    is_open = False
    for run in runs:
        is_long = run.end - run.start >= MIN_ROWS_ALONE
        if run.slot == NO_ADAPTER and (is_long or not is_open):
            is_open = False
        elif is_open and not is_long:
            groups[-1].append(run)
        else:
            groups.append([run])
            is_open = not is_long
    return groups


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges joined where the gap between two costs less than one more call."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if merged and first - merged[-1][1] <= MAX_WASTED_COLUMNS:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((first, end))
    return merged


__all__ = ["AttentionPlan", "Layout", "LoraPlan", "plan_lora"]
