"""Compiled loops that mix rows: sums of rows of V, each by a weight of its own, added to others.

So attention sums up values, and LoRA the rows of lora_B. Up to six rows of weights meet four
vectors of each row of V in registers. Each sum is taken in one order, whatever the number of rows.
Knows addresses and sizes. Knows nothing of modules.
"""

import functools
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from engine.kernels.loops import LINE, exact, floats
from engine.kernels.products import COLUMNS, MAX_ROWS, VECTOR, WIDTH, tiles_of
from engine.kernels.vectors import LONG, Builder

# Floats of a row of V that registers hold the sums of.
PANEL = COLUMNS * WIDTH


def _panel(num_vectors: int, most_rows: int) -> Any:
    """out[r] += Σ weights[r, i] · values[i], so many vectors of `num_rows`; strides in bytes.

    Meanwhile as much as it reads of V is fetched from `ahead` on, its rows `pace` bytes apart.
    """

    @intrinsic  # type: ignore[untyped-decorator]  # numba has no types
    def panel(
        _: Any,
        num_rows: Any,
        weights: Any,
        weights_stride: Any,
        values: Any,
        stride: Any,
        count: Any,
        out: Any,
        out_stride: Any,
        ahead: Any,
        pace: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            b = Builder(builder)
            put = functools.partial(_put_panel, b, num_vectors, arguments[1:])
            b.for_number(arguments[0], most_rows, put)
            return context.get_dummy_value()

        return types.void(*10 * (types.int64,)), generate

    return panel


def _put_panel(b: Builder, num_vectors: int, arguments: Any, num_rows: int) -> None:
    weights, weights_stride, values, stride, count, out, out_stride, ahead, pace = arguments
    rows = b.starts(weights, weights_stride, num_rows)
    places = [LONG(4 * WIDTH * i) for i in range(num_vectors)]

    def add(index: Any, sums: list[Any]) -> list[Any]:
        value = b.ir.add(values, b.ir.mul(index, stride))
        following = b.ir.add(ahead, b.ir.mul(index, pace))
        for line in range(num_vectors * WIDTH // LINE):
            b.prefetch(following, LONG(4 * LINE * line))
        factors = [b.spread(b.load(row, b.times(index, 4), ir.FloatType()), VECTOR) for row in rows]
        loads = [functools.partial(b.load, value, place, VECTOR) for place in places]
        return b.outer(sums, factors, loads)

    totals = b.sums(num_vectors * num_rows, count, add, kind=VECTOR)
    for row, start in enumerate(b.starts(out, out_stride, num_rows)):
        for i, place in enumerate(places):
            before = b.load(start, place, VECTOR)
            total = b.ir.fadd(before, totals[row * num_vectors + i])
            b.store(total, b.ir.add(start, place))


_wide, _narrow = _panel(COLUMNS, MAX_ROWS), _panel(1, 1)


@exact
def mix(
    weights: Any,
    weights_stride: Any,
    num_rows: Any,
    values: Any,
    stride: Any,
    count: Any,
    width: Any,
    out: Any,
    out_stride: Any,
    ahead: Any,
    pace: Any,
    step: Any,
) -> None:
    """out[r, c] += Σ weights[r, i] · values[i, c], i below `count`, c below `width`.

    Strides in floats. While a panel is computed another one is fetched, whose rows are `pace`
    floats apart: the first from `ahead` on, each of the others `step` floats behind.
    """
    if count == 0:
        return
    num_tiles, size, num_larger = tiles_of(num_rows, MAX_ROWS)
    c = 0
    while c + PANEL <= width:
        row = 0
        for tile in range(num_tiles):
            num = size + 1 if tile < num_larger else size
            _wide(
                num,
                weights + 4 * row * weights_stride,
                4 * weights_stride,
                values + 4 * c,
                4 * stride,
                count,
                out + 4 * (row * out_stride + c),
                4 * out_stride,
                ahead,
                4 * pace,
            )
            row += num
        c, ahead = c + PANEL, ahead + 4 * step
    while c + WIDTH <= width:
        for row in range(num_rows):
            own, place = weights + 4 * row * weights_stride, out + 4 * (row * out_stride + c)
            _narrow(1, own, 0, values + 4 * c, 4 * stride, count, place, 0, ahead, 4 * pace)
        c += WIDTH
    for row in range(num_rows):
        own, place = floats(weights + 4 * row * weights_stride), floats(out + 4 * row * out_stride)
        for last in range(c, width):
            total = numba.float32(0)
            for i in range(count):
                total += own[i] * floats(values + 4 * i * stride)[last]
            place[last] += total
