"""Compiled loops for products with weights in fewer bits: x in float32, on a CPU.

A decode step reads every weight once and does little with it. Here that is the codes as they are:
they become floats in registers, 16 at a time, and meet a row of x there. For more rows they are
written out, four rows of the weight at a time, which stay in the core's nearest cache. Where x is
rounded to int8 too there are integers all the way, whatever the number of rows, and the codes lie
in the order in which they are multiplied. `quantised` defines what is computed. Knows addresses and
sizes. Knows nothing of modules.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from engine.kernels.loops import (
    LINE,
    barrier,
    exact,
    loop,
    run,
    thread_count,
    thread_index,
)
from engine.kernels.products import (
    COLUMNS,
    VECTOR,
    WIDTH,
    block,
    put_tile,
    share,
    sums_of,
    tiles_of,
)
from engine.kernels.quantised import (
    BF16,
    GROUP_SIZE,
    INT4,
    INT8,
    INT8_DYNAMIC,
    INT8_MAX,
    decode_int8,
    encode_int8,
)
from engine.kernels.vectors import FEATURES, FLOATS, LANES, LONG, WORD, WORDS, Builder

# Records of int64: addresses, sizes in elements.
_CALL = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("x", "codes", "scales", "out"),
            *("num_rows", "in_features", "out_features"),
            # Of a code, where weights are in groups; room for COLUMNS rows of them for each thread
            *("bits", "tile"),
            # int8-dynamic: [num_rows, in_features] as integers that can be multiplied, and of each
            # row's groups the scale, float32, and what its sums begin with, int32
            *("own_codes", "own_scales"),
        )
    ]
)

# Multiplies uint8 by int8, four products to a sum. Else int16 by int16, two to a sum: both exact.
HAS_VNNI = bool(FEATURES.get("avx512vnni"))
CAN_MULTIPLY_INTEGERS = HAS_VNNI or bool(FEATURES.get("avx2"))
# Rows of an int8-dynamic weight that lie together, and neighbours in a row that do: a panel has the
# first few codes of each of its rows, as many as one sum takes, then the next ones, and its rows'
# scales of the first group, then of the next one. A vector's sums are those of its rows.
_PANEL, _TOGETHER = 16, 4 if HAS_VNNI else 2
# Added to a weight's codes there, so that they have no sign.
_OFFSET = 128
# Panels, and rows of x, whose sums registers hold at once.
_PANELS, _INTEGER_ROWS = (3, 4) if HAS_VNNI else (1, 4)
# Rows of a weight in bf16, and of x, whose sums registers hold at once: what becomes floats should
# meet many.
_BF16_COLUMNS, _BF16_ROWS = (4, 6) if FEATURES.get("avx512f") else (2, 6)
# Of the cache, for a vector of each row; half a line is fetched twice.
_BF16_LINES = -(-_BF16_COLUMNS * WIDTH // (2 * LINE))
# From so many rows on a weight in bf16 is written out, four of its rows at a time, before they meet
# it; fewer find it in the halves of floats that it is kept in.
_MIN_ROWS_OF_WRITING = 24
# Of x where it is rounded to int8.
OWN_DTYPE = torch.int8 if HAS_VNNI else torch.int16

_OWN_BYTES = OWN_DTYPE.itemsize
# Of a panel's codes.
_LINES_OF_A_GROUP = _PANEL * GROUP_SIZE // (4 * LINE)
Calls = np.ndarray[tuple[int], np.dtype[np.void]]

_BYTES = ir.VectorType(ir.IntType(8), LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)
_HALVES = ir.VectorType(ir.HalfType(), 2)
_SCALES = ir.VectorType(ir.HalfType(), LANES)
_SUMS = ir.VectorType(ir.FloatType(), WIDTH)
_OWN = ir.VectorType(ir.IntType(8 * _OWN_BYTES), LANES)
# Of sums: in each those of a panel, or of half a panel's pairs.
_TOTALS = ir.VectorType(WORD, 16 if HAS_VNNI else 8)


def _dots(num_columns: int, kind: "_Grouped") -> Any:
    """out[c] = W[c] · x for so many rows of W: as `products`, in the same order.

    Meanwhile as many rows behind them are fetched.
    """

    @intrinsic  # type: ignore[untyped-decorator]  # numba has no types
    def dots(_: Any, codes: Any, scales: Any, x: Any, out: Any, num_groups: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes, scales, x, out, num_groups = arguments
            b = Builder(builder)
            columns = b.starts(codes, b.times(num_groups, kind.code_bytes), num_columns)
            scale_rows = b.starts(scales, b.times(num_groups, kind.scale_bytes), num_columns)
            ahead, scales_ahead = (
                builder.add(start, b.times(num_groups, num_columns * size))
                for start, size in ((codes, kind.code_bytes), (scales, kind.scale_bytes))
            )

            def add(group: Any, sums: list[Any]) -> list[Any]:
                size = num_columns * kind.code_bytes
                for line in range(0, size, 4 * LINE):
                    b.prefetch(ahead, builder.add(b.times(group, size), LONG(line)))
                if kind.scale_bytes:
                    b.prefetch(scales_ahead, b.times(group, num_columns * kind.scale_bytes))
                place = b.times(group, 4 * GROUP_SIZE)
                parts = [b.load(x, b.ir.add(place, LONG(at)), FLOATS) for at in (0, 4 * LANES)]
                results: list[Any] = []
                for column, own_scales, total in zip(columns, scale_rows, sums, strict=True):
                    for own, part in zip(
                        kind.weights(b, column, own_scales, group), parts, strict=True
                    ):
                        total = _added(b, total, own, part)
                    results.append(total)
                return results

            totals = b.sums(num_columns, num_groups, add, kind=_SUMS)
            b.store(sums_of(b, totals), out)
            return context.get_dummy_value()

        return types.void(*5 * (types.int64,)), generate

    return dots


def _added(b: Builder, total: Any, own: Any, part: Any) -> Any:
    """As many at a time as `products` adds."""
    for first in range(0, LANES, WIDTH):
        lanes = ir.Constant(ir.VectorType(WORD, WIDTH), list(range(first, first + WIDTH)))
        own_piece, piece = (b.ir.shuffle_vector(each, each, lanes) for each in (own, part))
        total = b.fma(own_piece, piece, total)
    return total


@dataclass(frozen=True, slots=True)
class _Grouped:
    """How the groups of a format lie in memory."""

    code_bytes: int
    scale_bytes: int
    # A group's weights as two vectors, from addresses of its row's codes and scales.
    weights: Callable[[Builder, Any, Any, Any], tuple[Any, Any]]


def _bf16_weights(b: Builder, column: Any, _: Any, group: Any) -> tuple[Any, Any]:
    """Upper halves of floats"""
    place = b.times(group, 2 * GROUP_SIZE)
    upper = ir.Constant(WORDS, LANES * [16])
    low, high = (
        b.ir.bitcast(b.ir.shl(b.ir.zext(b.load(column, at, _SHORTS), WORDS), upper), FLOATS)
        for at in (place, b.ir.add(place, LONG(2 * LANES)))
    )
    return low, high


def _int8_weights(b: Builder, column: Any, scales: Any, group: Any) -> tuple[Any, Any]:
    """scale · code"""
    place = b.times(group, GROUP_SIZE)
    scale = b.load(scales, b.times(group, 2), ir.HalfType())
    factor = b.spread(b.ir.fpext(scale, ir.FloatType()))
    low, high = (
        b.ir.fmul(factor, b.floats(b.ir.sext(b.load(column, at, _BYTES), WORDS)))
        for at in (place, b.ir.add(place, LONG(LANES)))
    )
    return low, high


def _int4_weights(b: Builder, column: Any, scales: Any, group: Any) -> tuple[Any, Any]:
    """step · code + floor"""
    packed = b.load(column, b.times(group, LANES), _BYTES)
    halves = (
        b.ir.and_(packed, ir.Constant(_BYTES, [15] * LANES)),
        b.ir.lshr(packed, ir.Constant(_BYTES, [4] * LANES)),
    )
    pair = b.load(scales, b.times(group, 4), _HALVES)
    pair = b.ir.fpext(pair, ir.VectorType(ir.FloatType(), 2))
    step, floor = (b.spread(b.ir.extract_element(pair, WORD(i))) for i in range(2))
    low, high = (b.added(floor, step, b.floats(b.ir.zext(half, WORDS))) for half in halves)
    return low, high


_BF16 = _Grouped(2 * GROUP_SIZE, 0, _bf16_weights)
_INT8 = _Grouped(GROUP_SIZE, 2, _int8_weights)
_INT4 = _Grouped(GROUP_SIZE // 2, 4, _int4_weights)


def _integer_dots(num_panels: int) -> Any:
    """out[r, c] = Σ (codes[c] · own_codes[r]) · own_scales[r] · scales[c], over groups.

    The sum of a group in integers, then as `quantised.product_int8_dynamic`. Of so many panels and
    up to `_INTEGER_ROWS` rows of x; `out_stride` in bytes. Meanwhile what is behind `ahead` and
    `scales_ahead` is fetched, `pace` lines of codes for each group.
    """

    @intrinsic  # type: ignore[untyped-decorator]  # numba has no types
    def dots(
        _: Any,
        own_codes: Any,
        own_scales: Any,
        num_rows: Any,
        codes: Any,
        scales: Any,
        num_groups: Any,
        out: Any,
        out_stride: Any,
        ahead: Any,
        scales_ahead: Any,
        pace: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            b = Builder(builder)
            put = functools.partial(_put_integer_tile, b, num_panels, arguments=arguments)
            b.for_number(arguments[2], _INTEGER_ROWS, put)
            return context.get_dummy_value()

        return types.void(*11 * (types.int64,)), generate

    return dots


def _put_integer_tile(b: Builder, num_panels: int, num_rows: int, *, arguments: Any) -> None:
    own_codes, own_scales, _, codes, scales, num_groups, out, out_stride = arguments[:8]
    ahead, scales_ahead, pace = arguments[8:]
    panels = b.starts(codes, b.times(num_groups, _PANEL * GROUP_SIZE), num_panels)
    panel_scales = b.starts(scales, b.times(num_groups, 2 * _PANEL), num_panels)
    rows = b.starts(own_codes, b.times(num_groups, GROUP_SIZE * _OWN_BYTES), num_rows)
    row_scales = b.starts(own_scales, b.times(num_groups, 8), num_rows)

    def add(group: Any, sums: list[Any]) -> list[Any]:
        b.prefetch(scales_ahead, b.times(group, 2 * _PANEL * num_panels))
        lines = b.ir.add(ahead, b.times(b.ir.mul(group, pace), 4 * LINE))

        def fetch(index: Any, _: list[Any]) -> list[Any]:
            b.prefetch(lines, b.times(index, 4 * LINE))
            return []

        b.sums(0, pace, fetch)
        own_place = b.times(group, 8)
        firsts = [
            b.spread(b.load(row, b.ir.add(own_place, LONG(4)), WORD), _TOTALS) for row in row_scales
        ]
        totals = [first for own in firsts for first in num_panels * _SUMS_OF_A_PANEL * [own]]
        for part in range(GROUP_SIZE // _TOGETHER):
            index = b.ir.add(b.times(group, GROUP_SIZE // _TOGETHER), LONG(part))
            place = b.times(index, _PANEL * _TOGETHER)
            weights = [part for panel in panels for part in _panel_parts(b, panel, place)]
            owns = [_own_part(b, row, b.times(index, _TOGETHER * _OWN_BYTES)) for row in rows]
            pairs = [(weight, own) for own in owns for weight in weights]
            totals = [
                _added_integers(b, total, *pair) for total, pair in zip(totals, pairs, strict=True)
            ]
        factors = [
            b.ir.fpext(b.load(panel, b.times(group, 2 * _PANEL), _SCALES), FLOATS)
            for panel in panel_scales
        ]
        results: list[Any] = []
        for row in row_scales:
            own_scale = b.spread(b.load(row, own_place, ir.FloatType()))
            for factor in factors:
                at = _SUMS_OF_A_PANEL * len(results)
                total = b.floats(_panel_sums(b, totals[at : at + _SUMS_OF_A_PANEL]))
                scaled = b.ir.fmul(b.ir.fmul(total, own_scale), factor)
                results.append(b.ir.fadd(sums[len(results)], scaled))
        return results

    sums = iter(b.sums(num_panels * num_rows, num_groups, add))
    for start in b.starts(out, out_stride, num_rows):
        for panel in range(num_panels):
            b.store(next(sums), b.ir.add(start, LONG(4 * _PANEL * panel)))


# In vectors.
_SUMS_OF_A_PANEL = 1 if HAS_VNNI else 2


def _panel_parts(b: Builder, panel: Any, place: Any) -> list[Any]:
    """`_TOGETHER` codes of each row."""
    if HAS_VNNI:
        return [b.load(panel, place, _TOTALS)]
    starts = (b.ir.add(place, LONG(LANES * part)) for part in range(_SUMS_OF_A_PANEL))
    return [b.ir.zext(b.load(panel, start, _BYTES), _OWN) for start in starts]


def _own_part(b: Builder, row: Any, place: Any) -> Any:
    """The same codes of x for each row."""
    own = b.spread(b.load(row, place, WORD), _TOTALS)
    return own if HAS_VNNI else b.ir.bitcast(own, _OWN)


def _added_integers(b: Builder, total: Any, weight: Any, own: Any) -> Any:
    if HAS_VNNI:
        return b.call("llvm.x86.avx512.vpdpbusd.512", _TOTALS, total, weight, own)
    # Else the compiler makes a tree of these sums, for which there are no registers.
    return b.kept(b.ir.add(total, b.call("llvm.x86.avx2.pmadd.wd", _TOTALS, weight, own)))


def _panel_sums(b: Builder, parts: list[Any]) -> Any:
    """One for each row."""
    if HAS_VNNI:
        return parts[0]
    return b.ir.shuffle_vector(*parts, ir.Constant(WORDS, list(range(_PANEL))))


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def _integer_dot(
    _: Any, codes: Any, scales: Any, own_codes: Any, own_scales: Any, out: Any, num_groups: Any
) -> Any:
    """As `_integer_dots`, of one row that is in no panel."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, scales, own_codes, own_scales, out, num_groups = arguments
        b = Builder(builder)

        def add(group: Any, sums: list[Any]) -> list[Any]:
            total = ir.Constant(WORDS, LANES * [0])
            for part in range(GROUP_SIZE // LANES):
                place = builder.add(b.times(group, GROUP_SIZE), LONG(LANES * part))
                weight = builder.sext(b.load(codes, place, _BYTES), WORDS)
                own = builder.sext(b.load(own_codes, b.times(place, _OWN_BYTES), _OWN), WORDS)
                total = builder.add(total, builder.mul(weight, own))
            number = builder.sitofp(b.joined(total, builder.add), ir.FloatType())
            own_scale = b.load(own_scales, b.times(group, 8), ir.FloatType())
            scale = builder.fpext(b.load(scales, b.times(group, 2), ir.HalfType()), ir.FloatType())
            return [builder.fadd(sums[0], builder.fmul(builder.fmul(number, own_scale), scale))]

        (number,) = b.sums(1, num_groups, add, kind=ir.FloatType())
        b.store(number, out)
        return context.get_dummy_value()

    return types.void(*6 * (types.int64,)), generate


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def _round_row(_: Any, x: Any, own_codes: Any, own_scales: Any, num_groups: Any) -> Any:
    """As `quantised.encode_int8_input`; behind each scale what the group's sums begin with.

    That takes off what the offset of the weight's codes adds. The scale of a group that is not
    finite is not either.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, own_codes, own_scales, num_groups = arguments
        b = Builder(builder)

        def put(group: Any, _: list[Any]) -> list[Any]:
            starts = [
                builder.add(b.times(group, GROUP_SIZE), LONG(at))
                for at in range(0, GROUP_SIZE, LANES)
            ]
            parts = [b.load(x, b.times(start, 4), FLOATS) for start in starts]
            # The bits of what has no sign are in its order, NaN the largest.
            sizes = (builder.bitcast(b.call("llvm.fabs.v16f32", FLOATS, p), WORDS) for p in parts)
            largest = b.joined(functools.reduce(b.larger_integer, sizes), b.larger_integer)
            largest = builder.bitcast(largest, ir.FloatType())
            scale = builder.fdiv(largest, ir.FloatType()(INT8_MAX))
            is_zero = builder.fcmp_ordered("==", scale, ir.FloatType()(0))
            scale = builder.select(is_zero, ir.FloatType()(1), scale)
            divisor, total = b.spread(scale), ir.Constant(WORDS, LANES * [0])
            for part, start in zip(parts, starts, strict=True):
                quotient = builder.fdiv(part, divisor)
                codes = builder.fptosi(b.call("llvm.rint.v16f32", FLOATS, quotient), WORDS)
                place = builder.add(own_codes, b.times(start, _OWN_BYTES))
                b.store(builder.trunc(codes, _OWN), place)
                total = builder.add(total, codes)
            first = builder.mul(b.joined(total, builder.add), WORD(-_OFFSET))
            place = builder.add(own_scales, b.times(group, 8))
            b.store(scale, place)
            b.store(first, builder.add(place, LONG(4)))
            return []

        b.sums(0, num_groups, put)
        return context.get_dummy_value()

    return types.void(*4 * (types.int64,)), generate


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def _bf16_tile(
    _: Any,
    num_rows: Any,
    x: Any,
    x_stride: Any,
    codes: Any,
    stride: Any,
    width: Any,
    out: Any,
    out_stride: Any,
    ahead: Any,
    pace: Any,
) -> Any:
    """out[r, c] = x[r] · W[c] for so many rows and _BF16_COLUMNS: as `products._tile`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        num_rows, *rest = arguments
        b = Builder(builder)

        def put(num: int) -> None:
            put_tile(
                b, _BF16_COLUMNS, num, rest, load=_load_bf16, itemsize=2, num_lines=_BF16_LINES
            )

        b.for_number(num_rows, _BF16_ROWS, put)
        return context.get_dummy_value()

    return types.void(*10 * (types.int64,)), generate


def _load_bf16(b: Builder, column: Any, place: Any) -> Any:
    """Upper halves of floats"""
    kind = ir.VectorType(WORD, WIDTH)
    halves = b.load(column, place, ir.VectorType(ir.IntType(16), WIDTH))
    shift = ir.Constant(kind, WIDTH * [16])
    return b.ir.bitcast(b.ir.shl(b.ir.zext(halves, kind), shift), VECTOR)


_bf16_row, _bf16_one = _dots(COLUMNS, _BF16), _dots(1, _BF16)
_int8_row, _int8_one = _dots(COLUMNS, _INT8), _dots(1, _INT8)
_int4_row, _int4_one = _dots(COLUMNS, _INT4), _dots(1, _INT4)
_wide_tile, _narrow_tile = _integer_dots(_PANELS), _integer_dots(1)


# Writing out: out[n] = W[n]


def _writing(kind: _Grouped) -> Any:
    """out = so many groups of weights, one behind the other."""

    @intrinsic  # type: ignore[untyped-decorator]  # numba has no types
    def write(_: Any, out: Any, codes: Any, scales: Any, num_groups: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            out, codes, scales, num_groups = arguments
            b = Builder(builder)

            def put(group: Any, _: list[Any]) -> list[Any]:
                start = builder.add(out, b.times(group, 4 * GROUP_SIZE))
                for part, weights in enumerate(kind.weights(b, codes, scales, group)):
                    b.store(weights, builder.add(start, LONG(4 * LANES * part)))
                return []

            b.sums(0, num_groups, put)
            return context.get_dummy_value()

        return types.void(*4 * (types.int64,)), generate

    return write


_write_bf16, _write_int8, _write_int4 = (_writing(kind) for kind in (_BF16, _INT8, _INT4))


# Products: out[t] = W · x[t]. The threads share the rows of W.


@exact
def _grouped_row(bits: Any, codes: Any, scales: Any, x: Any, out: Any, num_groups: Any) -> None:
    if bits == 4:
        _int4_row(codes, scales, x, out, num_groups)
    elif bits == 16:
        _bf16_row(codes, scales, x, out, num_groups)
    else:
        _int8_row(codes, scales, x, out, num_groups)


@exact
def _grouped_one(bits: Any, codes: Any, scales: Any, x: Any, out: Any, num_groups: Any) -> None:
    if bits == 4:
        _int4_one(codes, scales, x, out, num_groups)
    elif bits == 16:
        _bf16_one(codes, scales, x, out, num_groups)
    else:
        _int8_one(codes, scales, x, out, num_groups)


@exact
def _write_groups(bits: Any, out: Any, codes: Any, scales: Any, num_groups: Any) -> None:
    if bits == 4:
        _write_int4(out, codes, scales, num_groups)
    elif bits == 16:
        _write_bf16(out, codes, scales, num_groups)
    else:
        _write_int8(out, codes, scales, num_groups)


@exact
def _bf16_block(
    x: Any, num_rows: Any, codes: Any, width: Any, out: Any, out_stride: Any, ahead: Any
) -> None:
    """As `products.block`, of weights in bf16."""
    num_tiles, size, num_larger = tiles_of(num_rows, _BF16_ROWS)
    pace = (_BF16_COLUMNS * WIDTH * 2 + num_tiles - 1) // num_tiles
    part = pace * (width // WIDTH)
    for column in range(0, COLUMNS, _BF16_COLUMNS):
        own, place, start = codes + 2 * column * width, out + 4 * column, ahead + 2 * column * width
        row = 0
        for tile in range(num_tiles):
            num = size + 1 if tile < num_larger else size
            _bf16_tile(
                num,
                x + 4 * row * width,
                4 * width,
                own,
                2 * width,
                width,
                place + 4 * row * out_stride,
                4 * out_stride,
                start + tile * part,
                pace,
            )
            row += num


@exact
def grouped_columns(
    bits: Any,
    x: Any,
    num_rows: Any,
    codes: Any,
    scales: Any,
    width: Any,
    first: Any,
    end: Any,
    out: Any,
    out_stride: Any,
    tile: Any,
) -> None:
    """As `products.product`, of weights in so many bits; `tile`: room for COLUMNS rows of them."""
    num_groups = width // GROUP_SIZE
    code_stride = width * bits // 8
    scale_stride = num_groups * (4 if bits == 4 else (2 if bits == 8 else 0))
    for column in range(first, end, COLUMNS):
        own, own_scales = codes + column * code_stride, scales + column * scale_stride
        place = out + 4 * column
        if column + COLUMNS > end:
            for i in range(end - column):
                one, one_scales = own + i * code_stride, own_scales + i * scale_stride
                for row in range(num_rows):
                    at = place + 4 * (row * out_stride + i)
                    _grouped_one(bits, one, one_scales, x + 4 * row * width, at, num_groups)
        elif num_rows == 1:
            _grouped_row(bits, own, own_scales, x, place, num_groups)
        elif bits == 16 and num_rows < _MIN_ROWS_OF_WRITING:
            ahead = own + COLUMNS * code_stride
            _bf16_block(x, num_rows, own, width, place, out_stride, ahead)
        else:
            _write_groups(bits, tile, own, own_scales, COLUMNS * num_groups)
            ahead = own + COLUMNS * code_stride
            # So much of the next rows' codes for each vector of floats.
            block(x, num_rows, tile, width, place, out_stride, ahead, COLUMNS * WIDTH * bits // 8)


def _grouped_product(pointer: Any) -> None:
    call = numba.carray(pointer, 1)[0]
    thread, width = thread_index(), call.in_features
    first, end = share(call.out_features, thread, thread_count())
    tile = call.tile + 4 * COLUMNS * width * thread
    grouped_columns(
        call.bits,
        call.x,
        call.num_rows,
        call.codes,
        call.scales,
        width,
        first,
        end,
        call.out,
        call.out_features,
        tile,
    )


# What is rounded must not depend on how a compiler orders things.
@exact
def round_rows(x: Any, own_codes: Any, own_scales: Any, width: Any, first: Any, end: Any) -> None:
    """Rows of x as integers and scales."""
    num_groups = width // GROUP_SIZE
    for row in range(first, end):
        codes = own_codes + row * width * _OWN_BYTES
        _round_row(x + 4 * row * width, codes, own_scales + 8 * row * num_groups, num_groups)


@exact
def _integer_block(
    own_codes: Any,
    own_scales: Any,
    num_rows: Any,
    codes: Any,
    scales: Any,
    num_groups: Any,
    out: Any,
    stride: Any,
    num_panels: Any,
) -> None:
    """`integer_columns` of so many panels, with the next ones fetched meanwhile."""
    num_tiles, size, num_larger = tiles_of(num_rows, _INTEGER_ROWS)
    ahead = codes + num_panels * _PANEL * GROUP_SIZE * num_groups
    next_scales = scales + num_panels * 2 * _PANEL * num_groups
    # Each tile of x brings its part, so that memory has no idle time.
    pace = (num_panels * _LINES_OF_A_GROUP + num_tiles - 1) // num_tiles
    row = 0
    for tile in range(num_tiles):
        num = size + 1 if tile < num_larger else size
        x, x_scales = (
            own_codes + row * num_groups * GROUP_SIZE * _OWN_BYTES,
            own_scales + 8 * row * num_groups,
        )
        place = out + row * stride
        part = ahead + tile * pace * 4 * LINE * num_groups
        if num_panels == _PANELS:
            _wide_tile(
                x, x_scales, num, codes, scales, num_groups, place, stride, part, next_scales, pace
            )
        else:
            _narrow_tile(
                x, x_scales, num, codes, scales, num_groups, place, stride, part, next_scales, pace
            )
        row += num


@exact
def integer_columns(
    own_codes: Any,
    own_scales: Any,
    num_rows: Any,
    codes: Any,
    scales: Any,
    width: Any,
    first: Any,
    end: Any,
    out: Any,
    out_stride: Any,
) -> None:
    """As `products.product`, of rounded rows; `first` is where a panel begins."""
    stride, column, num_groups = 4 * out_stride, first, width // GROUP_SIZE
    while column + _PANEL <= end:
        num = _PANELS if column + _PANELS * _PANEL <= end else 1
        own, factors = codes + column * width, scales + 2 * column * num_groups
        _integer_block(
            own_codes,
            own_scales,
            num_rows,
            own,
            factors,
            num_groups,
            out + 4 * column,
            stride,
            num,
        )
        column += num * _PANEL
    for c in range(column, end):
        own, factors = codes + c * width, scales + 2 * c * num_groups
        for row in range(num_rows):
            x, x_scales = own_codes + row * width * _OWN_BYTES, own_scales + 8 * row * num_groups
            _integer_dot(own, factors, x, x_scales, out + row * stride + 4 * c, num_groups)


def _integer_product(pointer: Any) -> None:
    """The threads share the rows of x first, to round them."""
    call = numba.carray(pointer, 1)[0]
    thread, num_threads, width = thread_index(), thread_count(), call.in_features
    row, row_end = (
        call.num_rows * thread // num_threads,
        call.num_rows * (thread + 1) // num_threads,
    )
    round_rows(call.x, call.own_codes, call.own_scales, width, row, row_end)
    barrier()
    first, end = share(call.out_features, thread, num_threads)
    integer_columns(
        call.own_codes,
        call.own_scales,
        call.num_rows,
        call.codes,
        call.scales,
        width,
        first,
        end,
        call.out,
        call.out_features,
    )


_GROUPED_PRODUCT = loop(_grouped_product, _CALL)
_INTEGER_PRODUCT = loop(_integer_product, _CALL) if CAN_MULTIPLY_INTEGERS else None


def bf16_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """As `Format.product` of bf16."""
    if x.shape[1] % GROUP_SIZE:
        return BF16.product(x, codes, scales)
    return _product(x, codes, scales, bits=16)


def int8_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """As `Format.product` of int8."""
    if x.shape[1] % GROUP_SIZE:
        return INT8.product(x, codes, scales)
    return _product(x, codes, scales, bits=8)


def int4_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """As `Format.product` of int4."""
    return _product(x, codes, scales, bits=4)


def int8_dynamic_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """As `Format.product` of int8-dynamic, of codes in panels."""
    if not _is_in_panels(x.shape[1]):
        return INT8_DYNAMIC.product(x, codes, scales)
    x = x.contiguous()
    out = torch.empty(x.shape[0], codes.shape[0])
    own_codes = torch.empty(x.shape, dtype=OWN_DTYPE)
    own_scales = torch.empty(x.shape[0], x.shape[1] // GROUP_SIZE, 2)
    call = _call(x, codes, scales, out=out)
    call[0]["own_codes"], call[0]["own_scales"] = own_codes.data_ptr(), own_scales.data_ptr()
    run(_INTEGER_PRODUCT, call.ctypes.data)
    return out


def _product(x: Tensor, codes: Tensor, scales: Tensor, *, bits: int) -> Tensor:
    x = x.contiguous()
    out = torch.empty(x.shape[0], codes.shape[0])
    call = _call(x, codes, scales, out=out)
    tile = torch.empty(torch.get_num_threads() * COLUMNS * x.shape[1])
    call[0]["tile"], call[0]["bits"] = tile.data_ptr(), bits
    run(_GROUPED_PRODUCT, call.ctypes.data)
    return out


def _call(x: Tensor, codes: Tensor, scales: Tensor, *, out: Tensor) -> Calls:
    """One record."""
    record = np.zeros(1, dtype=_CALL)
    call = record[0]
    call["x"], call["num_rows"], call["in_features"] = x.data_ptr(), x.shape[0], x.shape[1]
    call["codes"], call["scales"], call["out"] = (t.data_ptr() for t in (codes, scales, out))
    call["out_features"] = codes.shape[0]
    return record


# Panels: the order in which an int8-dynamic weight's codes and scales lie


def _is_in_panels(in_features: int) -> bool:
    return CAN_MULTIPLY_INTEGERS and in_features % GROUP_SIZE == 0


def _encode_in_panels(rows: Tensor) -> tuple[Tensor, Tensor]:
    """As `encode_int8`, of rows that begin where a panel does."""
    codes, scales = encode_int8(rows)
    if _is_in_panels(rows.shape[1]):
        _turn_panels(codes, together=_TOGETHER, are_turned=False)
        _turn_panels(scales, together=1, are_turned=False)
        # The bits of code + _OFFSET.
        _whole_panels(codes).bitwise_xor_(-_OFFSET)
    return codes, scales


def _decode_from_panels(codes: Tensor, scales: Tensor) -> Tensor:
    """As `decode_int8`."""
    if _is_in_panels(codes.shape[1]):
        codes, scales = codes.clone(), scales.clone()
        _whole_panels(codes).bitwise_xor_(-_OFFSET)
        _turn_panels(codes, together=_TOGETHER, are_turned=True)
        _turn_panels(scales, together=1, are_turned=True)
    return decode_int8(codes, scales)


def _turn_panels(part: Tensor, *, together: int, are_turned: bool) -> None:
    """Row after row becomes `together` numbers of each row after the next, or the way back."""
    whole = _whole_panels(part)
    sizes = (_PANEL, part.shape[1] // together)
    parts = whole.view(-1, *(sizes[::-1] if are_turned else sizes), together)
    whole.copy_(parts.transpose(1, 2).contiguous().view_as(whole))


def _whole_panels(rows: Tensor) -> Tensor:
    """Without the last rows, which fill none and stay as they are."""
    return rows[: len(rows) // _PANEL * _PANEL]


FORMATS = {
    "bf16": replace(BF16, product=bf16_product),
    "int8": replace(INT8, product=int8_product),
    "int4": replace(INT4, product=int4_product),
    "int8-dynamic": replace(
        INT8_DYNAMIC,
        encode=_encode_in_panels,
        decode=_decode_from_panels,
        product=int8_dynamic_product,
        panel=_PANEL,
    ),
}
