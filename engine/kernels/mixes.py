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
from engine.kernels.products import COLUMNS, MAX_ROWS, VECTOR, WIDTH
from engine.kernels.vectors import LONG, Builder

# Floats of a row of V that registers hold the sums of.
PANEL = COLUMNS * WIDTH


def _panel(num_vectors: int, num_rows: int) -> Any:
    """out[r] += Σ weights[r, i] · values[i], so many vectors of so many rows; strides in bytes.

    Meanwhile of each row of V what lies `ahead` bytes behind is fetched.
    """

    @intrinsic  # type: ignore[untyped-decorator]  # numba has no types
    def panel(
        _: Any,
        weights: Any,
        weights_stride: Any,
        values: Any,
        stride: Any,
        count: Any,
        out: Any,
        out_stride: Any,
        ahead: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, weights_stride, values, stride, count, out, out_stride, ahead = arguments
            b = Builder(builder)
            rows = b.starts(weights, weights_stride, num_rows)
            places = [LONG(4 * WIDTH * i) for i in range(num_vectors)]

            def add(index: Any, sums: list[Any]) -> list[Any]:
                value = builder.add(values, builder.mul(index, stride))
                for line in range(num_vectors * WIDTH // LINE):
                    b.prefetch(value, builder.add(ahead, LONG(4 * LINE * line)))
                factors = [
                    b.spread(b.load(row, b.times(index, 4), ir.FloatType()), VECTOR) for row in rows
                ]
                loads = [functools.partial(b.load, value, place, VECTOR) for place in places]
                return b.outer(sums, factors, loads)

            totals = b.sums(num_vectors * num_rows, count, add, kind=VECTOR)
            for row, start in enumerate(b.starts(out, out_stride, num_rows)):
                for i, place in enumerate(places):
                    before = b.load(start, place, VECTOR)
                    total = builder.fadd(before, totals[row * num_vectors + i])
                    b.store(total, builder.add(start, place))
            return context.get_dummy_value()

        return types.void(*8 * (types.int64,)), generate

    return panel


_one, _two, _three, _four, _five, _six = (_panel(COLUMNS, num_rows) for num_rows in range(1, 7))
_narrow = _panel(1, 1)


@exact
def _rows_of_panel(
    num: Any,
    weights: Any,
    weights_stride: Any,
    values: Any,
    stride: Any,
    count: Any,
    out: Any,
    out_stride: Any,
    ahead: Any,
) -> None:
    if num == 6:
        _six(weights, weights_stride, values, stride, count, out, out_stride, ahead)
    elif num == 5:
        _five(weights, weights_stride, values, stride, count, out, out_stride, ahead)
    elif num == 4:
        _four(weights, weights_stride, values, stride, count, out, out_stride, ahead)
    elif num == 3:
        _three(weights, weights_stride, values, stride, count, out, out_stride, ahead)
    elif num == 2:
        _two(weights, weights_stride, values, stride, count, out, out_stride, ahead)
    else:
        _one(weights, weights_stride, values, stride, count, out, out_stride, ahead)


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
) -> None:
    """out[r, c] += Σ weights[r, i] · values[i, c], i below `count`, c below `width`.

    Strides in floats. While a panel is computed what lies `ahead` floats behind it is fetched.
    """
    if count == 0:
        return
    num_tiles = (num_rows + MAX_ROWS - 1) // MAX_ROWS
    c = 0
    while c + PANEL <= width:
        for tile in range(num_tiles):
            row, end = num_rows * tile // num_tiles, num_rows * (tile + 1) // num_tiles
            _rows_of_panel(
                end - row,
                weights + 4 * row * weights_stride,
                4 * weights_stride,
                values + 4 * c,
                4 * stride,
                count,
                out + 4 * (row * out_stride + c),
                4 * out_stride,
                4 * ahead,
            )
        c += PANEL
    while c + WIDTH <= width:
        for row in range(num_rows):
            own, place = weights + 4 * row * weights_stride, out + 4 * (row * out_stride + c)
            _narrow(own, 0, values + 4 * c, 4 * stride, count, place, 0, 4 * ahead)
        c += WIDTH
    for row in range(num_rows):
        own, place = floats(weights + 4 * row * weights_stride), floats(out + 4 * row * out_stride)
        for last in range(c, width):
            total = numba.float32(0)
            for i in range(count):
                total += own[i] * floats(values + 4 * i * stride)[last]
            place[last] += total
