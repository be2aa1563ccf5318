"""Compiled loops for products with whole weights: x · Wᵀ in float32, on a CPU, as torch keeps W.

A step has few rows and many weights. Here four rows of W meet up to six of x in registers, so that
W comes out of memory once, in order, and is nowhere kept a second time in another one. Each sum is
taken in one order, whatever the number of rows: what a row gives never depends on the rows beside
it. Knows addresses and sizes. Knows nothing of modules.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from engine.kernels.loops import (
    COUNTER_BYTES,
    LINE,
    exact,
    floats,
    inlined,
    loop,
    next_of,
    run,
    thread_count,
    thread_index,
)
from engine.kernels.vectors import FEATURES, LONG, WORD, Builder

# Rows of W, and of x, whose sums registers hold at once: there are 32 of 16 floats, or 16 of 8.
COLUMNS = 4
MAX_ROWS, WIDTH = (6, 16) if FEATURES.get("avx512f") else (3, 8)
# Of a row whose products one sum waits for, each for the one before, while the next rows begin. One
# row of x with 3,072 of 576 took 329 µs like this, 561 four at a time; rows of 1,536 are slower.
MAX_WIDTH_OF_CHAINS = 1024
# Of rows of x that meet SPAN rows of W after each other, so that they stay in the second level.
_MOST_FLOATS = 80 * 1024
# From so many rows on a thread that is through with its columns goes on with those that are left to
# its neighbours, part by part: cores that others use as well are not equally fast.
_MIN_ROWS_OF_HELPING, _NUM_NEIGHBOURS, SPAN = 12, 3, 3 * LINE
# What `in_features` must be a multiple of.
MULTIPLE = 16

VECTOR = ir.VectorType(ir.FloatType(), WIDTH)


def _tile(num_columns: int, most_rows: int) -> Any:
    """out[r, c] = x[r] · W[c] for so many rows of W, and `num_rows` of x. Strides are in bytes.

    Meanwhile `pace` bytes behind `ahead` are fetched for each vector of a row.
    """

    @intrinsic  # type: ignore[untyped-decorator]  # numba has no types
    def tile(
        _: Any,
        num_rows: Any,
        x: Any,
        x_stride: Any,
        weight: Any,
        stride: Any,
        width: Any,
        out: Any,
        out_stride: Any,
        ahead: Any,
        pace: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            b, num_lines = Builder(builder), num_columns * WIDTH // LINE

            def put(num: int) -> None:
                own = arguments[1:]
                put_tile(b, num_columns, num, own, load=_load, itemsize=4, num_lines=num_lines)

            b.for_number(arguments[0], most_rows, put)
            return context.get_dummy_value()

        return types.void(*10 * (types.int64,)), generate

    return tile


def put_tile(
    b: Builder,
    num_columns: int,
    num_rows: int,
    arguments: Any,
    *,
    load: Callable[[Builder, Any, Any], Any],
    itemsize: int,
    num_lines: int,
) -> None:
    """As `_tile`, of weights of so many bytes, WIDTH of which `load` makes floats.

    For each vector of a row `num_lines` of the cache are fetched.
    """
    x, x_stride, weight, stride, width, out, out_stride, ahead, pace = arguments
    columns = b.starts(weight, stride, num_columns)
    rows = b.starts(x, x_stride, num_rows)

    def add(index: Any, sums: list[Any]) -> list[Any]:
        place, own_place = b.times(index, 4 * WIDTH), b.times(index, itemsize * WIDTH)
        of_rows = [functools.partial(b.load, row, place, VECTOR) for row in rows]
        of_columns = [functools.partial(load, b, column, own_place) for column in columns]
        # Those that are fewer stay in registers.
        kept, others = sorted((of_rows, of_columns), key=len)
        parts = [each() for each in kept]
        # In the order in which they lie, as the machine's own fetching expects.
        next_line = b.ir.mul(index, pace)
        for line in range(num_lines):
            b.prefetch(ahead, b.ir.add(next_line, LONG(4 * LINE * line)))
        return b.outer(sums, parts, others)

    count = b.ir.sdiv(width, LONG(WIDTH))
    totals = b.sums(num_columns * num_rows, count, add, kind=VECTOR)
    for row, start in enumerate(b.starts(out, out_stride, num_rows)):
        first = row * num_columns
        own = totals[row::num_rows] if num_columns < num_rows else totals[first:][:num_columns]
        b.store(sums_of(b, own), start)


def _load(b: Builder, column: Any, place: Any) -> Any:
    return b.load(column, place, VECTOR)


def sums_of(b: Builder, vectors: list[Any]) -> Any:
    """Of each of one, two or four vectors the sum: as one vector.

    Within each four numbers first, where moving them costs least, then across the fours.
    """
    num = len(vectors)
    for low, high in (((0, 4, 1, 5), (2, 6, 3, 7)), ((0, 1, 4, 5), (2, 3, 6, 7))):
        # One that is left alone is its own partner.
        partners = vectors[1::2] or vectors
        vectors = [
            b.ir.fadd(_in_fours(b, first, second, low), _in_fours(b, first, second, high))
            for first, second in zip(vectors[::2], partners, strict=True)
        ]
    (whole,) = vectors
    while whole.type.count > 4:
        half = whole.type.count // 2
        parts = [_taken(b, whole, whole, range(first, first + half)) for first in (0, half)]
        whole = b.ir.fadd(*parts)
    return whole if num == 4 else _taken(b, whole, whole, range(num))


def _in_fours(b: Builder, first: Any, second: Any, places: tuple[int, ...]) -> Any:
    """Of each four numbers of `first` and the four beside them these; `second`'s begin with 4."""
    width = first.type.count
    own = [start + (i if i < 4 else width + i - 4) for start in range(0, width, 4) for i in places]
    return _taken(b, first, second, own)


def _taken(b: Builder, first: Any, second: Any, places: Iterable[int]) -> Any:
    chosen = list(places)
    mask = ir.Constant(ir.VectorType(WORD, len(chosen)), chosen)
    return b.ir.shuffle_vector(first, second, mask)


_four, _single = _tile(COLUMNS, MAX_ROWS), _tile(1, 1)


@inlined
def tiles_of(num_rows: Any, most: Any) -> Any:
    """How many tiles, the rows of each of them, and how many have one more.

    Asked once: a division takes as long as a part of a short tile.
    """
    num_tiles = (num_rows + most - 1) // most
    return num_tiles, num_rows // num_tiles, num_rows % num_tiles


@exact
def _tiles(
    x: Any,
    x_stride: Any,
    num_rows: Any,
    weight: Any,
    stride: Any,
    width: Any,
    out: Any,
    out_stride: Any,
    ahead: Any,
    pace: Any,
    ahead_stride: Any,
) -> None:
    """out[r, c] = x[r] · weight[c] for the first COLUMNS of c; strides of rows in bytes.

    Each tile of x fetches `ahead_stride` bytes behind the one before, as `_tile` does.
    """
    num_tiles, size, num_larger = tiles_of(num_rows, MAX_ROWS)
    for tile in range(num_tiles):
        num = size + 1 if tile < num_larger else size
        _four(num, x, x_stride, weight, stride, width, out, out_stride, ahead, pace)
        x, out, ahead = x + num * x_stride, out + num * out_stride, ahead + ahead_stride


@exact
def _last(
    x: Any,
    x_stride: Any,
    num_rows: Any,
    weight: Any,
    stride: Any,
    num: Any,
    width: Any,
    out: Any,
    out_stride: Any,
) -> None:
    """out[r, c] = x[r] · weight[c] for the few c that are left; strides in bytes."""
    for c in range(num):
        own = weight + c * stride
        for row in range(num_rows):
            place = out + row * out_stride + 4 * c
            _single(1, x + row * x_stride, 0, own, 0, width, place, 0, own, 0)


@exact
def block(
    x: Any, num_rows: Any, weight: Any, width: Any, out: Any, out_stride: Any, ahead: Any, num: Any
) -> None:
    """out[r, c] = x[r] · weight[c] for the first COLUMNS of c.

    x and weight: addresses of rows of `width` floats, one behind the other; `out_stride` in floats.
    Meanwhile what is needed next is fetched: from `ahead` on, `num` bytes for each vector of a row.
    """
    num_tiles = (num_rows + MAX_ROWS - 1) // MAX_ROWS
    # Each tile of x brings its part, so that memory has no idle time.
    pace = (num + num_tiles - 1) // num_tiles
    size, part = 4 * width, pace * (width // WIDTH)
    _tiles(x, size, num_rows, weight, size, width, out, 4 * out_stride, ahead, pace, part)


@exact
def product(
    x: Any, num_rows: Any, weight: Any, width: Any, first: Any, end: Any, out: Any, out_stride: Any
) -> None:
    """out[r, c] = x[r] · weight[c] for c from `first` to `end`.

    x and weight: addresses of rows of `width` floats, one behind the other; `out_stride` in floats.
    """
    size = 4 * width
    if num_rows == 1 and width <= MAX_WIDTH_OF_CHAINS:
        # One after the other, as they lie: memory is read faster than in four places at once.
        for column in range(first, end):
            own = weight + column * size
            ahead = own + COLUMNS * size
            _single(1, x, 0, own, 0, width, out + 4 * column, 0, ahead, 4 * WIDTH)
        return
    num_groups = (num_rows * width + _MOST_FLOATS - 1) // _MOST_FLOATS
    span = SPAN if num_groups > 1 else max(end - first, 1)
    for start in range(first, end, span):
        stop = min(start + span, end)
        for group in range(num_groups):
            row, row_end = num_rows * group // num_groups, num_rows * (group + 1) // num_groups
            own, place = x + row * size, out + 4 * row * out_stride
            fetched = 4 * COLUMNS * WIDTH if group == 0 else 0
            _columns(own, row_end - row, weight, width, start, stop, place, out_stride, fetched)


@exact
def _columns(
    x: Any,
    num_rows: Any,
    weight: Any,
    width: Any,
    first: Any,
    end: Any,
    out: Any,
    out_stride: Any,
    fetched: Any,
) -> None:
    """As `product`; for each vector of a row so many bytes of the next ones are fetched."""
    size, column = 4 * width, first
    while column + COLUMNS <= end:
        own = weight + column * size
        ahead = own + COLUMNS * size
        block(x, num_rows, own, width, out + 4 * column, out_stride, ahead, fetched)
        column += COLUMNS
    own, place = weight + column * size, out + 4 * column
    _last(x, size, num_rows, own, size, end - column, width, place, 4 * out_stride)


@exact
def dots(
    x: Any,
    x_stride: Any,
    num_rows: Any,
    keys: Any,
    stride: Any,
    num: Any,
    width: Any,
    out: Any,
    out_stride: Any,
    ahead: Any,
) -> None:
    """out[r, i] = x[r] · keys[i]; all strides in floats, `width` a multiple of WIDTH.

    As much as the keys are is brought into the cache meanwhile, from `ahead` on.
    """
    size, own_size, out_size = 4 * stride, 4 * x_stride, 4 * out_stride
    pace, i = 4 * COLUMNS * WIDTH, 0
    while i + COLUMNS <= num:
        own, place, part = keys + i * size, out + 4 * i, ahead + 4 * i * width
        _tiles(x, own_size, num_rows, own, size, width, place, out_size, part, pace, 0)
        i += COLUMNS
    _last(x, own_size, num_rows, keys + i * size, size, num - i, width, out + 4 * i, out_size)


@inlined
def add_to_rows(out: Any, out_stride: Any, num_rows: Any, shift: Any, first: Any, end: Any) -> None:
    """out[r, c] += shift[c] for c from `first` to `end`."""
    for row in range(num_rows):
        own, what = floats(out + 4 * (row * out_stride + first)), floats(shift + 4 * first)
        for i in range(end - first):
            own[i] += what[i]


@inlined
def share(num: Any, thread: Any, num_threads: Any) -> Any:
    """First and end of a thread's columns, in whole lines of the cache."""
    num_lines = (num + LINE - 1) // LINE
    first = num_lines * thread // num_threads * LINE
    return first, min(num_lines * (thread + 1) // num_threads * LINE, num)


@inlined
def num_shares(num_rows: Any, num_threads: Any) -> Any:
    """How many threads' columns a thread looks through, its own first."""
    return min(num_threads, 1 + _NUM_NEIGHBOURS) if num_rows >= _MIN_ROWS_OF_HELPING else 1


_CALL = np.dtype(
    [
        *((name, np.int64) for name in ("x", "weight", "bias", "out", "num_rows")),
        # `counters`: of each thread how many parts of its share are taken
        *((name, np.int64) for name in ("in_features", "out_features", "counters")),
    ]
)


def _linear(pointer: Any) -> None:
    call = numba.carray(pointer, 1)[0]
    thread, num_threads, width = thread_index(), thread_count(), call.out_features
    num = num_shares(call.num_rows, num_threads)
    for i in range(num):
        owner = (thread + i) % num_threads
        start, end = share(width, owner, num_threads)
        size = SPAN if num > 1 else width
        counter = call.counters + COUNTER_BYTES * owner
        first = start + size * next_of(counter)
        while first < end:
            last = min(first + size, end)
            product(
                call.x, call.num_rows, call.weight, call.in_features, first, last, call.out, width
            )
            if call.bias:
                add_to_rows(call.out, width, call.num_rows, call.bias, first, last)
            first = start + size * next_of(counter)


_LINEAR = loop(_linear, _CALL)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias: float32, with `in_features` a multiple of MULTIPLE.

    x: [..., in_features]; weight: [out_features, in_features], row by row.
    """
    out_features, in_features = weight.shape
    assert weight.is_contiguous()
    assert in_features % MULTIPLE == 0, "loops take whole vectors"
    assert x.dtype is weight.dtype is torch.float32
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], out_features)
    record = np.zeros(1, dtype=_CALL)
    call = record[0]
    call["x"], call["weight"], call["out"] = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    call["bias"] = 0 if bias is None else bias.data_ptr()
    call["num_rows"] = x.numel() // in_features
    call["in_features"], call["out_features"] = in_features, out_features
    counters = np.zeros(torch.get_num_threads() * COUNTER_BYTES, dtype=np.uint8)
    call["counters"] = counters.ctypes.data
    run(_LINEAR, record.ctypes.data)
    return out
