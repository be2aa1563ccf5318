"""Compiled loops for products with weights in few bits: x in float32, on a CPU.

A decode step reads every weight once and does little with it. Here that is the codes as they are:
they become floats in registers, 16 at a time, and meet a row of x there. For more rows they are
written out, four rows of the weight at a time, which stay in the core's nearest cache; where x is
rounded to int8 too there are integers all the way, whatever the number of rows. `quantised` defines
what is computed. Knows addresses and sizes. Knows nothing of modules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from engine.kernels.loops import (
    barrier,
    exact,
    loop,
    run,
    thread_count,
    thread_index,
)
from engine.kernels.products import COLUMNS, WIDTH, block, share
from engine.kernels.quantised import GROUP_SIZE, INT8, INT8_DYNAMIC, INT8_MAX
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
            # int8-dynamic: [num_rows, in_features] in the form that integers are multiplied in, and
            # [num_rows] float32
            *("own_codes", "own_scales"),
        )
    ]
)

# Rows of a weight, and of x, whose integer sums registers hold at once: there are 32, or 16.
_TILE, _INTEGER_ROWS = (4, 4) if FEATURES.get("avx512f") else (2, 4)
# Multiplies int8 by uint8, four products to a sum. Else int16 by int16, two to a sum: both exact.
HAS_VNNI = bool(FEATURES.get("avx512vnni") and FEATURES.get("avx512vl"))
CAN_MULTIPLY_INTEGERS = HAS_VNNI or bool(FEATURES.get("avx2"))
# Of x where it is rounded to int8; what is added to its codes so that they fit; how many of them
# are multiplied at once.
OWN_DTYPE, _OFFSET, _STEP = (torch.uint8, 128, 32) if HAS_VNNI else (torch.int16, 0, 16)
# Of a row's codes, whichever way they are multiplied.
INTEGER_MULTIPLE = 32

_OWN_BYTES = OWN_DTYPE.itemsize
Calls = np.ndarray[tuple[int], np.dtype[np.void]]

_BYTES = ir.VectorType(ir.IntType(8), LANES)
_HALVES = ir.VectorType(ir.HalfType(), 2)
_SUMS = ir.VectorType(ir.FloatType(), WIDTH)
_OWN = ir.VectorType(ir.IntType(8 * OWN_DTYPE.itemsize), LANES)
_TOTALS = ir.VectorType(WORD, 8)


def _dots(num_columns: int, kind: "_Grouped") -> Any:
    """out[c] = W[c] · x for so many rows of W: as `products`, in the same order."""

    @intrinsic  # type: ignore[untyped-decorator]  # numba has no types
    def dots(_: Any, codes: Any, scales: Any, x: Any, out: Any, num_groups: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes, scales, x, out, num_groups = arguments
            b = Builder(builder)
            columns = b.starts(codes, b.times(num_groups, kind.code_bytes), num_columns)
            scale_rows = b.starts(scales, b.times(num_groups, kind.scale_bytes), num_columns)

            def add(group: Any, sums: list[Any]) -> list[Any]:
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
            for column, total in enumerate(totals):
                b.store(b.sum_of(total), builder.add(out, LONG(4 * column)))
            return context.get_dummy_value()

        return types.void(*5 * (types.int64,)), generate

    return dots


def _added(b: Builder, total: Any, own: Any, part: Any) -> Any:
    """As many at a time as `products` adds."""
    for first in range(0, LANES, WIDTH):
        lanes = ir.Constant(ir.VectorType(WORD, WIDTH), list(range(first, first + WIDTH)))
        pieces = (b.ir.shuffle_vector(each, each, lanes) for each in (part, own))
        total = b.call(f"llvm.fma.v{WIDTH}f32", _SUMS, *pieces, total)
    return total


@dataclass(frozen=True, slots=True)
class _Grouped:
    """How the groups of a format lie in memory."""

    code_bytes: int
    scale_bytes: int
    # A group's weights as two vectors, from addresses of its row's codes and scales.
    weights: Callable[[Builder, Any, Any, Any], tuple[Any, Any]]


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


_INT8 = _Grouped(GROUP_SIZE, 2, _int8_weights)
_INT4 = _Grouped(GROUP_SIZE // 2, 4, _int4_weights)


def _integer_dots(num_columns: int, num_rows: int) -> Any:
    """out[r, c] = (codes[c] · own_codes[r]) · own_scales[r] · scales[c], the sum in integers."""

    @intrinsic  # type: ignore[untyped-decorator]  # numba has no types
    def dots(
        _: Any,
        codes: Any,
        scales: Any,
        own_codes: Any,
        own_scales: Any,
        out: Any,
        out_stride: Any,
        in_features: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes, scales, own_codes, own_scales, out, out_stride, in_features = arguments
            b = Builder(builder)
            columns = b.starts(codes, in_features, num_columns)
            rows = b.starts(own_codes, b.times(in_features, OWN_DTYPE.itemsize), num_rows)

            def add(index: Any, sums: list[Any]) -> list[Any]:
                place = b.times(index, _STEP)
                own_place = b.times(place, OWN_DTYPE.itemsize)
                parts = [_integers(b, row, own_place) for row in rows]
                results: list[Any] = []
                for column in columns:
                    weight = _integer_weights(b, column, place)
                    for part in [*parts, *_offsets(b)]:
                        results.append(_added_integers(b, sums[len(results)], part, weight))
                return results

            # With an offset, the sum of a column's codes comes after those of the rows.
            width = num_rows + len(_offsets(b))
            count = builder.sdiv(in_features, LONG(_STEP))
            totals = b.sums(num_columns * width, count, add, kind=_TOTALS)
            totals = [b.joined(total, builder.add) for total in totals]
            for column in range(num_columns):
                scale = b.load(scales, LONG(4 * column), ir.FloatType())
                starts = b.starts(builder.add(out, LONG(4 * column)), out_stride, num_rows)
                own = totals[column * width : (column + 1) * width]
                for row, start in enumerate(starts):
                    total = builder.sub(own[row], own[-1]) if _OFFSET else own[row]
                    own_scale = b.load(own_scales, LONG(4 * row), ir.FloatType())
                    scaled = builder.fmul(builder.sitofp(total, ir.FloatType()), own_scale)
                    b.store(builder.fmul(scaled, scale), start)
            return context.get_dummy_value()

        return types.void(*7 * (types.int64,)), generate

    return dots


def _integers(b: Builder, row: Any, place: Any) -> Any:
    """`_STEP` codes of x."""
    return b.load(row, place, _TOTALS if HAS_VNNI else _OWN)


def _integer_weights(b: Builder, column: Any, place: Any) -> Any:
    """`_STEP` codes of the weight."""
    if HAS_VNNI:
        return b.load(column, place, _TOTALS)
    return b.ir.sext(b.load(column, place, _BYTES), _OWN)


def _offsets(b: Builder) -> list[Any]:
    """What is in every code of x and must be taken off again, as `_integers` has it."""
    return [ir.Constant(_TOTALS, [_OFFSET * 0x01010101 - 2**32] * 8)] if _OFFSET else []


def _added_integers(b: Builder, total: Any, part: Any, weight: Any) -> Any:
    if HAS_VNNI:
        return b.call("llvm.x86.avx512.vpdpbusd.256", _TOTALS, total, part, weight)
    return b.ir.add(total, b.call("llvm.x86.avx2.pmadd.wd", _TOTALS, part, weight))


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def _round_row(_: Any, x: Any, own_codes: Any, own_scale: Any, in_features: Any) -> Any:
    """As `quantised.encode_int8_rows`, with `_OFFSET` added.

    The scale is NaN if any of the row is not finite.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, own_codes, own_scale, in_features = arguments
        b = Builder(builder)
        count = builder.sdiv(in_features, LONG(LANES))
        zero = ir.Constant(FLOATS, [ir.FloatType()(0)] * LANES)

        def look(index: Any, found: list[Any]) -> list[Any]:
            part = b.load(x, b.times(index, 4 * LANES), FLOATS)
            size = b.call("llvm.fabs.v16f32", FLOATS, part)
            return [b.larger(size, found[0]), builder.fadd(found[1], builder.fmul(part, zero))]

        largest, nothing = b.sums(2, count, look)
        scale = builder.fdiv(b.joined(largest, b.larger), ir.FloatType()(INT8_MAX))
        is_zero = builder.fcmp_ordered("==", scale, ir.FloatType()(0))
        scale = builder.select(is_zero, ir.FloatType()(1), scale)
        scale = builder.fadd(scale, b.joined(nothing, builder.fadd))
        b.store(scale, own_scale)
        divisor = b.spread(scale)

        def put(index: Any, _: list[Any]) -> list[Any]:
            part = builder.fdiv(b.load(x, b.times(index, 4 * LANES), FLOATS), divisor)
            codes = builder.fptosi(b.call("llvm.rint.v16f32", FLOATS, part), WORDS)
            codes = builder.trunc(builder.add(codes, ir.Constant(WORDS, [_OFFSET] * LANES)), _OWN)
            place = b.times(index, LANES * OWN_DTYPE.itemsize)
            b.store(codes, builder.add(own_codes, place))
            return []

        b.sums(0, count, put)
        return context.get_dummy_value()

    return types.void(*4 * (types.int64,)), generate


_int8_row, _int8_one = _dots(COLUMNS, _INT8), _dots(1, _INT8)
_int4_row, _int4_one = _dots(COLUMNS, _INT4), _dots(1, _INT4)
_integer_tile, _integer_row, _integer_one = (
    _integer_dots(_TILE, _INTEGER_ROWS),
    _integer_dots(COLUMNS, 1),
    _integer_dots(1, 1),
)


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


_write_int8, _write_int4 = _writing(_INT8), _writing(_INT4)


# Products: out[t] = W · x[t]. The threads share the rows of W.


@exact
def _grouped_row(bits: Any, codes: Any, scales: Any, x: Any, out: Any, num_groups: Any) -> None:
    if bits == 4:
        _int4_row(codes, scales, x, out, num_groups)
    else:
        _int8_row(codes, scales, x, out, num_groups)


@exact
def _grouped_one(bits: Any, codes: Any, scales: Any, x: Any, out: Any, num_groups: Any) -> None:
    if bits == 4:
        _int4_one(codes, scales, x, out, num_groups)
    else:
        _int8_one(codes, scales, x, out, num_groups)


@exact
def _write_groups(bits: Any, out: Any, codes: Any, scales: Any, num_groups: Any) -> None:
    if bits == 4:
        _write_int4(out, codes, scales, num_groups)
    else:
        _write_int8(out, codes, scales, num_groups)


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
    """As `products.product`, of weights in 8 or 4 bits; `tile`: room for COLUMNS rows of them."""
    num_groups = width // GROUP_SIZE
    code_stride, scale_stride = width * bits // 8, num_groups * (4 if bits == 4 else 2)
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
    for row in range(first, end):
        codes = own_codes + row * width * _OWN_BYTES
        _round_row(x + 4 * row * width, codes, own_scales + 4 * row, width)


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
    """As `products.product`, of rounded rows."""
    own_width, stride = width * _OWN_BYTES, 4 * out_stride
    whole_end = end - (end - first) % COLUMNS
    num_tiled = num_rows // _INTEGER_ROWS * _INTEGER_ROWS
    for column in range(first, whole_end, COLUMNS):
        for row in range(0, num_tiled, _INTEGER_ROWS):
            x, x_scales = own_codes + row * own_width, own_scales + 4 * row
            for own in range(column, column + COLUMNS, _TILE):
                place = out + 4 * own + row * stride
                weight, weight_scales = codes + own * width, scales + 4 * own
                _integer_tile(weight, weight_scales, x, x_scales, place, stride, width)
        weight, weight_scales = codes + column * width, scales + 4 * column
        for row in range(num_tiled, num_rows):
            x, x_scales = own_codes + row * own_width, own_scales + 4 * row
            place = out + 4 * column + row * stride
            _integer_row(weight, weight_scales, x, x_scales, place, stride, width)
    for column in range(whole_end, end):
        weight, weight_scales = codes + column * width, scales + 4 * column
        for row in range(num_rows):
            x, x_scales = own_codes + row * own_width, own_scales + 4 * row
            place = out + 4 * column + row * stride
            _integer_one(weight, weight_scales, x, x_scales, place, stride, width)


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


def int8_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """As `Format.product` of int8."""
    if x.shape[1] % GROUP_SIZE:
        return INT8.product(x, codes, scales)
    return _product(x, codes, scales, bits=8)


def int4_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """As `Format.product` of int4."""
    return _product(x, codes, scales, bits=4)


def int8_dynamic_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """As `Format.product` of int8-dynamic."""
    if x.shape[1] % INTEGER_MULTIPLE or not CAN_MULTIPLY_INTEGERS:
        return INT8_DYNAMIC.product(x, codes, scales)
    x = x.contiguous()
    out = torch.empty(x.shape[0], codes.shape[0])
    own_codes, own_scales = torch.empty(x.shape, dtype=OWN_DTYPE), torch.empty(x.shape[0])
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


PRODUCTS = {"int8": int8_product, "int4": int4_product, "int8-dynamic": int8_dynamic_product}
