"""Attention over blocks on GPUs: decoding and prefilling sequences of any lengths in one batch.

Work is listed once for a step: tiles of queries, and for each the positions that one program reads.
The query heads that share a key head are rows of one tile, so that its keys are read once for all
of them. Where a tile is alone with a long context, programs share its positions, as many as its
length asks for, and a second kernel puts their parts together: what a sequence gets does not depend
on what else is in the batch. Dao et al., "FlashAttention" (2022), for the running softmax; Dao et
al., "Flash-Decoding" (2023), for the shared positions. Knows sequences' lengths and blocks. Knows
nothing of layers.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from engine.batch import Batch, Ints
from engine.kernels.gpu import FixedLists, kernel, power_of_two, upload
from engine.kernels.gpu_kv_cache import write_kv

# Rows (queries times heads) of a tile: what a tensor core takes at least, and what a prefill fills.
DECODE_ROWS, PREFILL_ROWS = 16, 64
# Positions that one program reads where several share a context, and how many of these share it at
# most; parts are merged one after the other.
PART_POSITIONS, MAX_PARTS = 512, 64
# Prefills with more tiles have enough programs without sharing positions.
MAX_SHARED_TILES = 4
# Bytes of a head's keys from which on a tile has fewer positions, to fit into shared memory.
WIDE_HEAD_BYTES = 512
POSITIONS, POSITIONS_OF_WIDE_HEADS = 64, 32
WHOLE = -1
# Tiles that there is room for where their number is fixed, in all and for each row: those of 4096
# positions in each. A program that finds no tile costs its launch.
FIXED_TILES, FIXED_TILES_PER_ROW = 256, 8


# Kernels


@kernel(changing=("block_size", "table_width", "window"))
def _attend(
    query: "Any",
    key_cache: "Any",
    value_cache: "Any",
    out: "Any",
    block_tables: "Any",
    tiles: "Any",
    num_tiles: "Any",
    part_sums: "Any",
    part_peaks: "Any",
    part_totals: "Any",
    query_row: "Any",
    query_head: "Any",
    block_stride: "Any",
    block_size: "Any",
    table_width: "Any",
    window: "Any",
    scaling: "Any",
    softcap: "Any",
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
) -> None:
    """out[t, h] = softmax(softcap(q[t, h] · Kᵀ · scaling)) · V, or a part of it for `_merge`.

    Programs: key head, tile. Row m of a tile is query m // GROUP, head m % GROUP of the key head's.
    """
    kv_head = tl.program_id(0)
    if tl.program_id(1) >= tl.load(num_tiles):
        return
    tile = tiles + 7 * tl.program_id(1)
    seq = tl.load(tile).to(tl.int64)
    first_row = tl.load(tile + 1)
    num_queries = tl.load(tile + 2)
    first_query = tl.load(tile + 3)
    first = tl.load(tile + 4)
    end = tl.load(tile + 5)
    part = tl.load(tile + 6)

    m = tl.arange(0, ROWS)
    is_row = m // GROUP < num_queries
    rows = (first_row + m // GROUP).to(tl.int64)
    heads = kv_head * GROUP + m % GROUP
    own_positions = first_query + m // GROUP
    key_columns = tl.arange(0, KEY_COLUMNS)
    value_columns = tl.arange(0, VALUE_COLUMNS)
    queries = tl.load(
        query + (rows * query_row + heads * query_head)[:, None] + key_columns[None, :],
        mask=is_row[:, None] & (key_columns < KEY_DIM)[None, :],
        other=0.0,
    )
    peaks = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    totals = tl.zeros([ROWS], dtype=tl.float32)
    sums = tl.zeros([ROWS, VALUE_COLUMNS], dtype=tl.float32)
    begin = first
    if HAS_WINDOW:
        # What the tile's first query sees first.
        begin = tl.maximum(first, first_query - window + 1)
    for start in range(begin, end, POSITIONS):
        positions = start + tl.arange(0, POSITIONS)
        is_there = positions < end
        blocks = tl.load(
            block_tables + seq * table_width + positions // block_size, mask=is_there, other=0
        )
        places = positions % block_size * NUM_KV_HEADS + kv_head
        keys = tl.load(
            key_cache + (blocks * block_stride + places * KEY_DIM)[None, :] + key_columns[:, None],
            mask=is_there[None, :] & (key_columns < KEY_DIM)[:, None],
            other=0.0,
        )
        scores = tl.dot(queries, keys, input_precision="ieee") * scaling
        if HAS_SOFTCAP:
            # softcap · tanh(scores / softcap)
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        is_seen = is_there[None, :] & (positions[None, :] <= own_positions[:, None])
        if HAS_WINDOW:
            is_seen = is_seen & (positions[None, :] > own_positions[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_peaks = tl.maximum(peaks, tl.max(scores, axis=1))
        # Rows that have seen nothing yet
        bases = tl.where(new_peaks == float("-inf"), 0.0, new_peaks)
        weights = tl.exp(scores - bases[:, None])
        decay = tl.exp(peaks - bases)
        values = tl.load(
            value_cache
            + (blocks * block_stride + places * VALUE_DIM)[:, None]
            + value_columns[None, :],
            mask=is_there[:, None] & (value_columns < VALUE_DIM)[None, :],
            other=0.0,
        )
        totals = totals * decay + tl.sum(weights, axis=1)
        sums = sums * decay[:, None]
        sums = tl.dot(weights.to(values.dtype), values, sums, input_precision="ieee")
        peaks = new_peaks
    is_value = is_row[:, None] & (value_columns < VALUE_DIM)[None, :]
    if part < 0:
        # Rows of no query have seen nothing where a window ends before them.
        results = sums / tl.where(totals == 0.0, 1.0, totals)[:, None]
        target = (rows * (NUM_KV_HEADS * GROUP) + heads) * VALUE_DIM
        target = out + target[:, None] + value_columns[None, :]
        tl.store(target, results.to(out.dtype.element_ty), mask=is_value)
    else:
        places = (part.to(tl.int64) * NUM_KV_HEADS + kv_head) * ROWS + m
        tl.store(
            part_sums + places[:, None] * VALUE_DIM + value_columns[None, :], sums, mask=is_value
        )
        tl.store(part_peaks + places, peaks, mask=is_row)
        tl.store(part_totals + places, totals, mask=is_row)


@kernel()
def _merge(
    out: "Any",
    merges: "Any",
    part_sums: "Any",
    part_peaks: "Any",
    part_totals: "Any",
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """out[t, h] = Σ exp(peak - largest peak) · sums / Σ exp(peak - largest peak) · total.

    Programs: key head, tile that is in parts.
    """
    kv_head = tl.program_id(0)
    entry = merges + 4 * tl.program_id(1)
    first_row = tl.load(entry)
    num_queries = tl.load(entry + 1)
    first_part = tl.load(entry + 2)
    num_parts = tl.load(entry + 3)
    m = tl.arange(0, ROWS)
    is_row = m // GROUP < num_queries
    columns = tl.arange(0, VALUE_COLUMNS)
    is_value = is_row[:, None] & (columns < VALUE_DIM)[None, :]
    peaks = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    totals = tl.zeros([ROWS], dtype=tl.float32)
    sums = tl.zeros([ROWS, VALUE_COLUMNS], dtype=tl.float32)
    for nth in range(0, num_parts):
        part = (first_part + nth).to(tl.int64)
        places = (part * NUM_KV_HEADS + kv_head) * ROWS + m
        own_peaks = tl.load(part_peaks + places, mask=is_row, other=float("-inf"))
        own_totals = tl.load(part_totals + places, mask=is_row, other=0.0)
        own_sums = tl.load(
            part_sums + places[:, None] * VALUE_DIM + columns[None, :], mask=is_value, other=0.0
        )
        new_peaks = tl.maximum(peaks, own_peaks)
        bases = tl.where(new_peaks == float("-inf"), 0.0, new_peaks)
        decay, own_decay = tl.exp(peaks - bases), tl.exp(own_peaks - bases)
        totals = totals * decay + own_totals * own_decay
        sums = sums * decay[:, None] + own_sums * own_decay[:, None]
        peaks = new_peaks
    results = sums / tl.where(totals == 0.0, 1.0, totals)[:, None]
    rows = (first_row + m // GROUP).to(tl.int64)
    target = (rows * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + m % GROUP) * VALUE_DIM
    target = out + target[:, None] + columns[None, :]
    tl.store(target, results.to(out.dtype.element_ty), mask=is_value)


# What a step has to do


@dataclass(frozen=True, slots=True)
class TileList:
    """The programs of one launch."""

    # [num_tiles or more, 7] int32: sequence, first row, number of queries, position of the first
    # query, first position and end of those that are read, part (or WHOLE)
    tiles: Tensor
    # [1] int32: num_tiles
    num_tiles: Tensor
    # [num_merges or more, 4] int32: first row, number of queries, first part, number of parts
    merges: Tensor
    # Queries times heads of a tile at most
    num_rows: int
    # Those of all tiles, or more
    num_parts: int


class StepTiles:
    """Those of one step, listed by the first layer that asks."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self._batch, self._device = batch, device
        # By heads per key head
        self._lists: dict[int, list[TileList]] = {}

    def of(self, group: int) -> list[TileList]:
        """Of layers with so many heads per key head."""
        if group not in self._lists:
            self._lists[group] = list_tiles(self._batch, group=group, device=self._device)
        return self._lists[group]


class FixedTiles:
    """Those of decode steps of one number of rows, in lists that stay where they are."""

    def __init__(self, num_rows: int, *, max_context: int, device: torch.device) -> None:
        self._num_rows = num_rows
        longest = np.array([max_context])
        num_parts = len(_in_parts(_decoding_tiles(longest))[0])
        self._max_tiles = num_rows * num_parts
        if num_parts > 1:
            self._max_tiles = min(self._max_tiles, max(FIXED_TILES, num_rows * FIXED_TILES_PER_ROW))
        self._num_parts = self._max_tiles if num_parts > 1 else 0
        self._lists = FixedLists([(self._max_tiles, 7), (1,), (num_rows, 4)], device)

    def fill(self, contexts: Ints) -> bool:
        """Whether what sequences of these contexts read, one row each, has its place."""
        tiles, merges, _ = _in_parts(_decoding_tiles(contexts))
        if len(tiles) > self._max_tiles:
            return False
        self._lists.fill([tiles, np.array([len(tiles)]), merges])
        return True

    def of(self, group: int) -> list[TileList]:
        """As `StepTiles.of`."""
        tiles, num_tiles, merges = self._lists.tensors
        num_rows = max(DECODE_ROWS, power_of_two(group))
        return [TileList(tiles, num_tiles, merges, num_rows, self._num_parts)]


def list_tiles(batch: Batch, *, group: int, device: torch.device) -> list[TileList]:
    """Decoding sequences, then prefilling ones, where there are any. `group`: heads per key head.

    A sequence's tiles and parts follow from its own lengths alone.
    """
    contexts = np.array(batch.host_context_lens)
    starts = np.array(batch.query_starts)
    lists = []
    for first, end, least_rows in (
        (0, batch.num_decodes, DECODE_ROWS),
        (batch.num_decodes, len(contexts), PREFILL_ROWS),
    ):
        if first < end:
            num_rows = max(least_rows, power_of_two(group))
            whole = _whole_tiles(
                np.arange(first, end),
                starts=starts,
                contexts=contexts,
                queries_of_tile=num_rows // group,
            )
            tiles, merges, num_parts = _in_parts(whole)
            on_device = upload([tiles, np.array([len(tiles)]), merges], device)
            lists.append(TileList(on_device[0], on_device[1], on_device[2], num_rows, num_parts))
    return lists


def _decoding_tiles(contexts: Ints) -> Ints:
    """As `_whole_tiles`, of sequences with one new token each."""
    num_seqs = len(contexts)
    return _whole_tiles(
        np.arange(num_seqs),
        starts=np.arange(num_seqs + 1),
        contexts=contexts,
        queries_of_tile=1,
    )


def _whole_tiles(seqs: Ints, *, starts: Ints, contexts: Ints, queries_of_tile: int) -> Ints:
    """[num_tiles, 6]: as `TileList.tiles` without parts, and how many tiles the sequence has."""
    lengths = starts[seqs + 1] - starts[seqs]
    counts = -(-lengths // queries_of_tile)
    owners = np.repeat(np.arange(len(seqs)), counts)
    nth = np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]
    befores = nth * queries_of_tile
    num_queries = np.minimum(lengths[owners] - befores, queries_of_tile)
    first_queries = contexts[seqs[owners]] - lengths[owners] + befores
    rows = starts[seqs[owners]] + befores
    ends = first_queries + num_queries
    return np.stack([seqs[owners], rows, num_queries, first_queries, ends, counts[owners]], axis=1)


def _in_parts(whole: Ints) -> tuple[Ints, Ints, int]:
    """`TileList.tiles` and `merges`, and the number of parts."""
    ends = whole[:, 4]
    shared = np.maximum(PART_POSITIONS, -(-ends // (MAX_PARTS * POSITIONS)) * POSITIONS)
    sizes = np.where(whole[:, 5] <= MAX_SHARED_TILES, shared, ends)
    counts = -(-ends // sizes)
    owners = np.repeat(np.arange(len(whole)), counts)
    nth = np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]
    firsts = nth * sizes[owners]
    lasts = np.minimum(firsts + sizes[owners], ends[owners])
    is_part = counts[owners] > 1
    parts = np.where(is_part, np.cumsum(is_part) - 1, WHOLE)
    tiles = np.column_stack([whole[owners, :4], firsts, lasts, parts])
    divided = np.flatnonzero(counts > 1)
    first_parts = np.cumsum(counts[divided]) - counts[divided]
    merges = np.column_stack([whole[divided, 1:3], first_parts, counts[divided]])
    return tiles, merges, int(is_part.sum())


# The plan


class GpuAttention:
    """One step; all layers share its lists."""

    def __init__(self, batch: Batch, tiles: "StepTiles | FixedTiles | None" = None) -> None:
        """`tiles`: those of the batch; listed for it where none are given."""
        self._batch = batch
        self._tiles = tiles or StepTiles(batch, batch.cache_rows.device)

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
        """As `AttentionPlan.attend`."""
        assert query.stride(2) == 1
        assert out.is_contiguous()
        cache_rows = self._batch.cache_rows
        write_kv(key, value, key_cache=key_cache, value_cache=value_cache, cache_rows=cache_rows)
        for tiles in self._tiles.of(query.shape[1] // key.shape[1]):
            _launch(
                tiles,
                query,
                key_cache,
                value_cache,
                out,
                block_tables=self._batch.block_tables,
                scaling=scaling,
                window=sliding_window,
                softcap=softcap,
            )


def _launch(
    tiles: TileList,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    out: Tensor,
    *,
    block_tables: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> None:
    num_kv_heads, key_dim, value_dim = *key_cache.shape[2:], value_cache.shape[3]
    group, num_rows = query.shape[1] // num_kv_heads, tiles.num_rows
    # [num_parts, num_kv_heads, num_rows, value_dim]; of each row its peak and its total
    places = (tiles.num_parts, num_kv_heads, num_rows)
    part_sums = query.new_empty(*places, value_dim, dtype=torch.float32)
    part_peaks, part_totals = query.new_empty(2, *places, dtype=torch.float32)
    is_wide = max(key_dim, value_dim) * query.element_size() >= WIDE_HEAD_BYTES
    _attend[(num_kv_heads, len(tiles.tiles))](
        query,
        key_cache,
        value_cache,
        out,
        block_tables,
        tiles.tiles,
        tiles.num_tiles,
        part_sums,
        part_peaks,
        part_totals,
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.shape[1],
        block_tables.shape[1],
        window or 0,
        scaling,
        softcap or 0.0,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_COLUMNS=max(power_of_two(key_dim), 16),
        VALUE_COLUMNS=max(power_of_two(value_dim), 16),
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        ROWS=num_rows,
        POSITIONS=POSITIONS_OF_WIDE_HEADS if is_wide else POSITIONS,
        num_warps=4,
        num_stages=3,
    )
    if tiles.num_parts:
        _merge[(num_kv_heads, len(tiles.merges))](
            out,
            tiles.merges,
            part_sums,
            part_peaks,
            part_totals,
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            VALUE_DIM=value_dim,
            VALUE_COLUMNS=max(power_of_two(value_dim), 16),
            ROWS=num_rows,
            num_warps=4,
        )
