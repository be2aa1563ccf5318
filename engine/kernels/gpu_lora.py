"""LoRA on GPUs: the adapters of a step in two kernels for each module, whoever uses which.

A step's work is listed once and read by all modules: which rows meet which adapter, in tiles of
rows, and each tile's rank in pieces. A kernel has a program for each entry of the list, so that an
adapter that is not in the step costs nothing, and one of rank 8 costs its eight rows. Modules that
read the same input (query, key and value; gate and up) shrink it in one launch. Sums are taken in
an order that the shapes fix: the same batch gives the same bits. Knows rows, slots and modules.
Knows nothing of layers.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.batch import Batch, Ints
from engine.kernels.dense import DenseLora
from engine.kernels.gpu import ALIGNMENT_BYTES, FixedLists, kernel, power_of_two, upload
from engine.kernels.slot_weights import RANK, SlotWeights
from engine.kernels.slot_weights import Ints as SlotList

# One adapter with so many rows is worth GEMMs of its own.
MIN_ROWS_OF_GEMM = 32
# Up to so many rows for each adapter, every row by itself reads little more than a tile would.
MAX_ROWS_OF_ITS_OWN = 2
# Rows of a tile: what a tensor core takes at least, and what a prefill fills.
SMALL_TILE, LARGE_TILE = 16, 64
# Ranks that are worked on at once; all of them are read no further than they go.
MIN_RANKS, MAX_RANKS = 16, 64
# Inputs that one program sums up: a row's 4096 give four programs, whatever the batch.
SPLIT_COLUMNS = 1024
# Programs that fill a large GPU; a list that has them needs no split.
MANY_PROGRAMS = 256
SHRINK_COLUMNS = {1: 256, SMALL_TILE: 128, LARGE_TILE: 64}
EXPAND_COLUMNS = {1: 256, SMALL_TILE: 128, LARGE_TILE: 128}
# All that `list_work` chooses from: rows of a tile, ranks of a piece.
KINDS = ((1, 16), (SMALL_TILE, 16), (LARGE_TILE, 16), (LARGE_TILE, 32), (LARGE_TILE, 64))
# Of each module and slot: addresses of lora_A and lora_B, rank, addresses of gain and shift.
_ENTRY: tl.constexpr = tl.constexpr(5)


# Kernels


@kernel(changing=("num_slots", "num_places", "num_splits"))
def _shrink(
    x: "Any",
    rows: "Any",
    tiles: "Any",
    pieces: "Any",
    modules: "Any",
    table: "Any",
    shrunk: "Any",
    x_stride: "Any",
    num_slots: "Any",
    in_features: "Any",
    split_columns: "Any",
    num_places: "Any",
    num_splits: "Any",
    max_rank: "Any",
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """shrunk[member, split, place, r] = lora_A[slot][r] · x[rows[place]], of the split's columns.

    Programs: piece, split, member. A tile of one row is summed up without tensor cores.
    """
    piece = tl.program_id(0)
    split = tl.program_id(1)
    member = tl.program_id(2)
    tile = tl.load(pieces + 2 * piece)
    if tile < 0:
        return
    first_rank = tl.load(pieces + 2 * piece + 1)
    first = tl.load(tiles + 3 * tile)
    end = tl.load(tiles + 3 * tile + 1)
    slot = tl.load(tiles + 3 * tile + 2)
    entry = table + (tl.load(modules + member) * num_slots + slot) * _ENTRY
    rank = tl.load(entry + 2).to(tl.int32)
    if first_rank >= rank:
        return
    lora_A = tl.load(entry).to(tl.pointer_type(x.dtype.element_ty))
    lora_A = tl.multiple_of(lora_A, 16)
    ranks = first_rank + tl.arange(0, RANKS)
    begin = split * split_columns
    stop = tl.minimum(begin + split_columns, in_features)
    target = shrunk + (member * num_splits + split) * num_places * max_rank
    if TILE == 1:
        row = tl.load(rows + first).to(tl.int64)
        products = tl.zeros([RANKS, COLUMNS], dtype=tl.float32)
        for column in tl.range(begin, stop, COLUMNS, num_stages=3):
            columns = column + tl.arange(0, COLUMNS)
            is_column = columns < in_features
            values = tl.load(x + row * x_stride + columns, mask=is_column, other=0.0)
            part_A = tl.load(
                lora_A + ranks[:, None] * in_features + columns[None, :],
                mask=(ranks < rank)[:, None] & is_column[None, :],
                other=0.0,
            )
            products += part_A.to(tl.float32) * values.to(tl.float32)[None, :]
        tl.store(target + first * max_rank + ranks, tl.sum(products, axis=1), mask=ranks < rank)
    else:
        places = first + tl.arange(0, TILE)
        is_own = places < end
        own_rows = tl.load(rows + places, mask=is_own, other=0).to(tl.int64)
        sums = tl.zeros([TILE, RANKS], dtype=tl.float32)
        for column in range(begin, stop, COLUMNS):
            columns = column + tl.arange(0, COLUMNS)
            is_column = columns < in_features
            values = tl.load(
                x + own_rows[:, None] * x_stride + columns[None, :],
                mask=is_own[:, None] & is_column[None, :],
                other=0.0,
            )
            part_A = tl.load(
                lora_A + ranks[None, :] * in_features + columns[:, None],
                mask=(ranks < rank)[None, :] & is_column[:, None],
                other=0.0,
            )
            sums = tl.dot(values, part_A, sums, input_precision="ieee")
        tl.store(
            target + places[:, None] * max_rank + ranks[None, :],
            sums,
            mask=is_own[:, None] & (ranks < rank)[None, :],
        )


@kernel(changing=("module", "num_slots", "num_places", "num_splits"))
def _expand(
    out: "Any",
    rows: "Any",
    tiles: "Any",
    table: "Any",
    shrunk: "Any",
    module: "Any",
    num_slots: "Any",
    out_features: "Any",
    out_stride: "Any",
    num_places: "Any",
    num_splits: "Any",
    max_rank: "Any",
    IS_AFFINE: tl.constexpr,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """out[t] = gain[slot] * out[t] + shift[slot] + lora_B[slot]ᵀ · Σ shrunk[split, place].

    Programs: tile, columns. Each element of `out` has one program that changes it.
    """
    tile = tl.program_id(0)
    first = tl.load(tiles + 3 * tile)
    end = tl.load(tiles + 3 * tile + 1)
    if first >= end:
        return
    slot = tl.load(tiles + 3 * tile + 2)
    entry = table + (module * num_slots + slot) * _ENTRY
    rank = tl.load(entry + 2).to(tl.int32)
    gain = tl.load(entry + 3)
    if (rank == 0) & (gain == 0):
        return
    lora_B = tl.load(entry + 1).to(tl.pointer_type(out.dtype.element_ty))
    lora_B = tl.multiple_of(lora_B, 16)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < out_features
    factors = tl.full([COLUMNS], 1.0, dtype=tl.float32)
    shifts = tl.zeros([COLUMNS], dtype=tl.float32)
    if IS_AFFINE:
        # Compared after it is spread out: the interpreter cannot spread a truth.
        is_scaled = is_column & (tl.zeros([COLUMNS], dtype=tl.int64) + gain != 0)
        gains = tl.multiple_of(gain.to(tl.pointer_type(out.dtype.element_ty)), 16)
        factors = tl.load(gains + columns, mask=is_scaled, other=1.0).to(tl.float32)
        own_shifts = tl.load(entry + 4).to(tl.pointer_type(out.dtype.element_ty))
        own_shifts = tl.multiple_of(own_shifts, 16)
        shifts = tl.load(own_shifts + columns, mask=is_scaled, other=0.0).to(tl.float32)
    if TILE == 1:
        row = tl.load(rows + first).to(tl.int64)
        splits = tl.arange(0, SPLITS)
        products = tl.zeros([RANKS, COLUMNS], dtype=tl.float32)
        for first_rank in tl.range(0, rank, RANKS, num_stages=3):
            ranks = first_rank + tl.arange(0, RANKS)
            parts = tl.load(
                shrunk + (splits[:, None] * num_places + first) * max_rank + ranks[None, :],
                mask=(splits < num_splits)[:, None] & (ranks < rank)[None, :],
                other=0.0,
            )
            part_B = tl.load(
                lora_B + ranks[:, None] * out_features + columns[None, :],
                mask=(ranks < rank)[:, None] & is_column[None, :],
                other=0.0,
            )
            products += tl.sum(parts, axis=0)[:, None] * part_B.to(tl.float32)
        place = out + row * out_stride + columns
        own = tl.load(place, mask=is_column, other=0.0).to(tl.float32)
        own = factors * own + shifts + tl.sum(products, axis=0)
        tl.store(place, own.to(out.dtype.element_ty), mask=is_column)
    else:
        places = first + tl.arange(0, TILE)
        is_own = places < end
        own_rows = tl.load(rows + places, mask=is_own, other=0).to(tl.int64)
        sums = tl.zeros([TILE, COLUMNS], dtype=tl.float32)
        for first_rank in range(0, rank, RANKS):
            ranks = first_rank + tl.arange(0, RANKS)
            is_part = is_own[:, None] & (ranks < rank)[None, :]
            part = tl.zeros([TILE, RANKS], dtype=tl.float32)
            for split in range(0, num_splits):
                source = shrunk + split * num_places * max_rank
                source += places[:, None] * max_rank + ranks[None, :]
                part += tl.load(source, mask=is_part, other=0.0)
            part_B = tl.load(
                lora_B + ranks[:, None] * out_features + columns[None, :],
                mask=(ranks < rank)[:, None] & is_column[None, :],
                other=0.0,
            )
            sums = tl.dot(part.to(part_B.dtype), part_B, sums, input_precision="ieee")
        place = out + own_rows[:, None] * out_stride + columns[None, :]
        is_there = is_own[:, None] & is_column[None, :]
        own = tl.load(place, mask=is_there, other=0.0).to(tl.float32)
        own = factors[None, :] * own + shifts[None, :] + sums
        tl.store(place, own.to(out.dtype.element_ty), mask=is_there)


# Where the adapters lie


class SlotTables:
    """The tables of `SlotWeights` on the device, and what is known of modules. One thread."""

    def __init__(self, weights: SlotWeights, device: torch.device) -> None:
        self.weights, self.device = weights, device
        num_modules, num_slots, _ = weights.table.shape
        # [num_modules, num_slots, 5] int64; right for the slots that `refresh` was given last
        self.entries = torch.zeros(num_modules, num_slots, 5, dtype=torch.int64, device=device)
        # [num_slots]: the largest rank of any module
        self.ranks = np.zeros(num_slots, dtype=np.int64)
        self._versions = np.full(num_slots, -1, dtype=np.int64)
        # Of a module: itself and those that were seen to read the same input after it
        self._readers: dict[int, list[int]] = {}
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def refresh(self, slots: Ints) -> None:
        """Bring over what the slots, each named once, hold by now."""
        stale = slots[self._versions[slots] != self.weights.versions[slots]]
        if not len(stale):
            return
        table, affine = self.weights.table[:, stale], self.weights.affine_table[:, stale]
        entries = np.concatenate([table, affine], axis=2)
        addresses = entries[:, :, [0, 1, 3, 4]]
        assert not (addresses % ALIGNMENT_BYTES).any(), "parts of adapters begin with a line"
        places = torch.from_numpy(stale).to(self.device)
        self.entries[:, places] = torch.from_numpy(entries).to(self.device)
        self.ranks[stale] = table[:, :, RANK].max(axis=0, initial=0)
        self._versions[stale] = self.weights.versions[stale]

    def readers(self, module: int) -> list[int]:
        """The modules that shrink this one's input together with it, itself among them."""
        return self._readers.get(module, [module])

    def learn(self, module: int, *, first_reader: int) -> None:
        """`module` was seen to read what `first_reader` had read before."""
        readers = self._readers.setdefault(first_reader, [first_reader])
        if module not in readers:
            readers.append(module)

    def indices(self, modules: tuple[int, ...]) -> Tensor:
        """[num_modules] int32 on the device."""
        if modules not in self._indices:
            self._indices[modules] = torch.tensor(modules, dtype=torch.int32, device=self.device)
        return self._indices[modules]


# What a step has to do


@dataclass(frozen=True, slots=True)
class WorkList:
    """A step's rows by adapter; those that the base model answers alone are nowhere in it."""

    # [num_places] int32: which row of the step is at a place; rows of a slot are neighbours
    rows: Tensor
    # [num_tiles, 3] int32: first place, end, slot
    tiles: Tensor
    # [num_pieces, 2] int32: tile, first rank
    pieces: Tensor
    # All three may be longer than what they list, with NOTHING behind it.
    # Places of a tile at most, ranks of a piece at most
    tile_rows: int
    piece_ranks: int
    # A multiple of `piece_ranks`
    max_rank: int


def list_work(runs: Ints, ranks: Ints, *, device: torch.device) -> WorkList:
    """`runs`: as `Batch.slot_runs`, at least one. `ranks`: [num_slots], largest of each slot."""
    tile_rows = tile_rows_of(runs)
    piece_ranks = _piece_ranks(tile_rows, int(ranks[runs[:, 2]].max()))
    arrays = _listed(runs, ranks, tile_rows=tile_rows, piece_ranks=piece_ranks)
    rows, tiles, pieces = upload(arrays, device)
    return WorkList(
        rows=rows,
        tiles=tiles,
        pieces=pieces,
        tile_rows=tile_rows,
        piece_ranks=piece_ranks,
        max_rank=piece_ranks + int(arrays[2][:, 1].max(initial=0)),
    )


class FixedWork:
    """Those of decode steps of one number of rows, in a list that stays where it is."""

    def __init__(
        self, num_rows: int, *, tile_rows: int, max_rank: int, device: torch.device
    ) -> None:
        num_pieces = triton.cdiv(max_rank, MIN_RANKS)
        shapes = [(num_rows,), (num_rows, 3), (num_rows * num_pieces, 2)]
        self._lists = FixedLists(shapes, device)
        rows, tiles, pieces = self._lists.tensors
        self.list = WorkList(
            rows=rows,
            tiles=tiles,
            pieces=pieces,
            tile_rows=tile_rows,
            piece_ranks=MIN_RANKS,
            max_rank=MIN_RANKS * num_pieces,
        )
        self._lists.clear()

    def fill(self, runs: Ints, ranks: Ints) -> None:
        """As `list_work`."""
        tile_rows, piece_ranks = self.list.tile_rows, self.list.piece_ranks
        self._lists.fill(_listed(runs, ranks, tile_rows=tile_rows, piece_ranks=piece_ranks))


def _listed(runs: Ints, ranks: Ints, *, tile_rows: int, piece_ranks: int) -> list[Ints]:
    """Rows, tiles and pieces, as `WorkList` has them."""
    runs = runs[np.argsort(runs[:, 2], kind="stable")]
    owners, nth = _spread(runs[:, 1] - runs[:, 0])
    rows = runs[owners, 0] + nth
    slots, counts = np.unique(runs[owners, 2], return_counts=True)
    begins = np.cumsum(counts) - counts
    owners, nth = _spread(-(-counts // tile_rows))
    firsts = begins[owners] + tile_rows * nth
    ends = np.minimum(firsts + tile_rows, begins[owners] + counts[owners])
    tiles = np.stack([firsts, ends, slots[owners]], axis=1)
    num_pieces = -(-ranks[slots[owners]] // piece_ranks)
    owners, nth = _spread(num_pieces)
    return [rows, tiles, np.stack([owners, piece_ranks * nth], axis=1)]


def _spread(counts: Ints) -> tuple[Ints, Ints]:
    """Of sum(counts) things: whose each is, and the how manieth of its owner."""
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners, np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]


def tile_rows_of(runs: Ints) -> int:
    """`runs`: as `Batch.slot_runs`, at least one."""
    counts = np.bincount(runs[:, 2], weights=runs[:, 1] - runs[:, 0])
    counts = counts[counts > 0]
    if counts.sum() <= MAX_ROWS_OF_ITS_OWN * len(counts):
        return 1
    is_mostly_long = 2 * counts[counts >= LARGE_TILE].sum() > counts.sum()
    return LARGE_TILE if is_mostly_long else SMALL_TILE


def _piece_ranks(tile_rows: int, max_rank: int) -> int:
    """Wide pieces read a long tile's input less often; where rows are few that is nothing."""
    if tile_rows < LARGE_TILE:
        return MIN_RANKS
    return min(max(power_of_two(max_rank), MIN_RANKS), MAX_RANKS)


# Launches


def _launch_shrink(
    x: Tensor, work: WorkList, tables: SlotTables, modules: tuple[int, ...]
) -> Tensor:
    """[num_modules, num_splits, num_places, max_rank] float32, for `_launch_expand`."""
    in_features, num_places, num_pieces = x.shape[1], len(work.rows), len(work.pieces)
    split_columns = _split_columns(work, in_features, num_modules=len(modules))
    num_splits = triton.cdiv(in_features, split_columns)
    shrunk = x.new_empty(len(modules), num_splits, num_places, work.max_rank, dtype=torch.float32)
    _shrink[(num_pieces, num_splits, len(modules))](
        x,
        work.rows,
        work.tiles,
        work.pieces,
        tables.indices(modules),
        tables.entries,
        shrunk,
        x.stride(0),
        tables.entries.shape[1],
        in_features,
        split_columns,
        num_places,
        num_splits,
        work.max_rank,
        TILE=work.tile_rows,
        RANKS=work.piece_ranks,
        COLUMNS=SHRINK_COLUMNS[work.tile_rows],
        num_warps=4,
        num_stages=3,
    )
    return shrunk


def _split_columns(work: WorkList, in_features: int, *, num_modules: int) -> int:
    """A multiple of all `SHRINK_COLUMNS`."""
    if work.tile_rows == LARGE_TILE and len(work.pieces) * num_modules >= MANY_PROGRAMS:
        whole: int = triton.cdiv(in_features, SPLIT_COLUMNS) * SPLIT_COLUMNS
        return whole
    return SPLIT_COLUMNS


def _launch_expand(
    out: Tensor,
    work: WorkList,
    tables: SlotTables,
    shrunk: Tensor,
    module: int,
    *,
    is_affine: bool,
) -> None:
    """shrunk: [num_splits, num_places, max_rank]"""
    out_features, columns = out.shape[1], EXPAND_COLUMNS[work.tile_rows]
    num_splits, num_places, _ = shrunk.shape
    _expand[(len(work.tiles), triton.cdiv(out_features, columns))](
        out,
        work.rows,
        work.tiles,
        tables.entries,
        shrunk,
        module,
        tables.entries.shape[1],
        out_features,
        out.stride(0),
        num_places,
        num_splits,
        work.max_rank,
        IS_AFFINE=is_affine,
        TILE=work.tile_rows,
        RANKS=work.piece_ranks,
        COLUMNS=columns,
        # Single rows take their sums in one piece.
        SPLITS=power_of_two(num_splits) if work.tile_rows == 1 else 1,
        num_warps=4,
        num_stages=3,
    )


# Plans


class GpuLora:
    """Makes the plans of all steps. Mutable; one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: SlotTables | None = None

    def plan(self, batch: Batch, weights: SlotWeights) -> "DenseLora | MixedLora":
        """For a batch with at least one adapter."""
        runs = batch.slot_runs
        if len(runs) == 1 and runs[0, 1] - runs[0, 0] >= MIN_ROWS_OF_GEMM:
            return DenseLora(runs, weights)
        tables, slots = self.tables_of(weights, runs), np.unique(runs[:, 2])
        return MixedLora.of(slots, list_work(runs, tables.ranks, device=self._device), tables)

    def tables_of(self, weights: SlotWeights, runs: Ints) -> SlotTables:
        """With all that these runs' slots hold by now."""
        tables = self._tables_of(weights)
        tables.refresh(np.unique(runs[:, 2]))
        return tables

    def warm_up(self, weights: SlotWeights, dtype: torch.dtype) -> None:
        """Compile what steps will launch, so that no step waits for it. No slot is in use yet."""
        tables = self._tables_of(weights)
        for tile_rows, piece_ranks in KINDS:
            # One row of an adapter of rank 0: each program is over as it begins.
            rows, tiles, pieces = upload(
                [np.array([0]), np.array([[0, 1, 0]]), np.array([[0, 0]])], self._device
            )
            work = WorkList(
                rows=rows,
                tiles=tiles,
                pieces=pieces,
                tile_rows=tile_rows,
                piece_ranks=piece_ranks,
                max_rank=piece_ranks,
            )
            for in_features, out_features in sorted(set(weights.features)):
                x, out = (
                    torch.zeros(1, size, dtype=dtype, device=self._device)
                    for size in (in_features, out_features)
                )
                shrunk = _launch_shrink(x, work, tables, (0,))[0]
                for is_affine in (False, True):
                    _launch_expand(out, work, tables, shrunk, 0, is_affine=is_affine)

    def _tables_of(self, weights: SlotWeights) -> SlotTables:
        if self._tables is None or self._tables.weights is not weights:
            self._tables = SlotTables(weights, self._device)
        return self._tables


@dataclass(frozen=True, slots=True)
class _Shrunk:
    """What some modules make of one input."""

    # Alive as long as this is: no other input can lie in its place.
    x: Tensor
    first_reader: int
    modules: tuple[int, ...]
    # [num_modules, num_splits, num_places, max_rank] float32
    values: Tensor

    def is_of(self, x: Tensor) -> bool:
        own = self.x
        return (
            own.data_ptr() == x.data_ptr()
            and own.shape == x.shape
            and own.stride() == x.stride()
            and own.dtype == x.dtype
        )


class MixedLora:
    """One step of several adapters, or of few rows."""

    def __init__(
        self,
        work: WorkList,
        tables: SlotTables,
        *,
        with_lora: frozenset[int],
        affine: frozenset[int],
    ) -> None:
        """`with_lora` and `affine`: the modules that may have either."""
        self._work, self._tables = work, tables
        self._with_lora, self._affine = with_lora, affine
        self._shrunk: _Shrunk | None = None

    @classmethod
    def of(cls, slots: SlotList, work: WorkList, tables: SlotTables) -> "MixedLora":
        """`slots`: those of the step, each once."""
        weights = tables.weights
        has_lora = weights.table[:, slots, RANK].any(axis=1)
        with_lora = frozenset(np.flatnonzero(has_lora).tolist())
        return cls(work, tables, with_lora=with_lora, affine=weights.affine_modules(slots))

    @classmethod
    def of_any(cls, work: WorkList, tables: SlotTables) -> "MixedLora":
        """Whatever slots there will be, and whichever modules they change."""
        every = frozenset(range(len(tables.weights.features)))
        return cls(work, tables, with_lora=every, affine=every)

    def apply(self, out: Tensor, x: Tensor, *, module: int) -> None:
        """As `LoraPlan.apply`."""
        is_affine = module in self._affine
        if module in self._with_lora:
            known = self._shrunk_of(x, module)
            shrunk = known.values[known.modules.index(module)]
        elif is_affine:
            shrunk = x.new_empty(1, len(self._work.rows), 0, dtype=torch.float32)
        else:
            return
        assert out.stride(1) == 1
        _launch_expand(out, self._work, self._tables, shrunk, module, is_affine=is_affine)

    def _shrunk_of(self, x: Tensor, module: int) -> _Shrunk:
        known = self._shrunk
        if known is None or not known.is_of(x):
            readers = tuple(m for m in self._tables.readers(module) if m in self._with_lora)
            known = self._shrink(x, readers, first_reader=module)
        elif module not in known.modules:
            self._tables.learn(module, first_reader=known.first_reader)
            known = self._shrink(x, (module,), first_reader=known.first_reader)
        self._shrunk = known
        return known

    def _shrink(self, x: Tensor, modules: tuple[int, ...], *, first_reader: int) -> _Shrunk:
        assert x.stride(1) == 1
        values = _launch_shrink(x, self._work, self._tables, modules)
        return _Shrunk(x, first_reader, modules, values)
