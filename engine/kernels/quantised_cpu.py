"""Compiled loops for products with weights in few bits: x in float32, on a CPU.

A decode step reads every weight once and does little with it. Here that is the codes as they are:
they become floats in registers, 16 at a time, and meet up to four rows of x there. Many rows are
worth a GEMM, for which the codes are written out a tile at a time; where x is rounded to int8 too
there are integers all the way, whatever the number of rows. `quantised` defines what is computed.
Knows addresses and sizes. Knows nothing of modules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from torch import Tensor

from engine.kernels.loops import (
    barrier,
    floats,
    inlined,
    loop,
    run,
    thread_count,
    thread_index,
)
from engine.kernels.quantised import GROUP_SIZE, INT8, INT8_DYNAMIC, INT8_MAX

# Rows of x that are worth a GEMM.
MIN_ROWS_OF_GEMM = 16
# Rows of a weight that are written out at once: they stay in a core's cache.
TILE_SIZE = 512
# Rows of a weight that a thread takes at once.
COLUMNS = 4
LANES = 16

# Records of int64: addresses, sizes in elements.
_CALL = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("x", "codes", "scales", "out"),
            *("num_rows", "in_features", "out_features"),
            # From one row of `out` to the next
            "out_stride",
            # int8-dynamic: [num_rows, in_features] in the form that integers are multiplied in, and
            # [num_rows] float32
            *("own_codes", "own_scales"),
        )
    ]
)

_FEATURES = binding.get_host_cpu_features()
# Rows of a weight, and of x, whose sums registers hold at once: there are 32 of 16 floats, or 16 of
# half as many.
_TILE, _ROWS, _INTEGER_ROWS = (4, 4, 4) if _FEATURES.get("avx512f") else (2, 2, 4)
# Multiplies int8 by uint8, four products to a sum. Else int16 by int16, two to a sum: both exact.
HAS_VNNI = bool(_FEATURES.get("avx512vnni") and _FEATURES.get("avx512vl"))
CAN_MULTIPLY_INTEGERS = HAS_VNNI or bool(_FEATURES.get("avx2"))
# Of x where it is rounded to int8; what is added to its codes so that they fit; how many of them
# are multiplied at once.
_OWN_DTYPE, _OFFSET, _STEP = (torch.uint8, 128, 32) if HAS_VNNI else (torch.int16, 0, 16)
# Of a row's codes, whichever way they are multiplied.
INTEGER_MULTIPLE = 32

_OWN_BYTES = _OWN_DTYPE.itemsize
Calls = np.ndarray[tuple[int], np.dtype[np.void]]

_SUM_FLAGS = ("reassoc", "contract", "nsz")
_LONG, _WORD = ir.IntType(64), ir.IntType(32)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_WORDS = ir.VectorType(_WORD, LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_HALVES = ir.VectorType(ir.HalfType(), 2)
_OWN = ir.VectorType(ir.IntType(8 * _OWN_DTYPE.itemsize), LANES)
_TOTALS = ir.VectorType(_WORD, 8)


# Loops over vectors, in LLVM's own words


@dataclass(frozen=True, slots=True)
class _Builder:
    """The few words that the loops below are made of."""

    ir: Any

    def load(self, address: Any, offset: Any, kind: Any) -> Any:
        place = self.ir.inttoptr(self.ir.add(address, offset), kind.as_pointer())
        # Of any alignment.
        return self.ir.load(place, align=1, typ=kind)

    def times(self, number: Any, factor: int) -> Any:
        return self.ir.mul(number, _LONG(factor))

    def starts(self, address: Any, stride: Any, num: int) -> list[Any]:
        return [self.ir.add(address, self.times(stride, i)) for i in range(num)]

    def floats(self, codes: Any) -> Any:
        return self.ir.sitofp(codes, _FLOATS)

    def added(self, total: Any, a: Any, b: Any) -> Any:
        return self.ir.fadd(total, self.ir.fmul(a, b, flags=_SUM_FLAGS), flags=_SUM_FLAGS)

    def spread(self, number: Any) -> Any:
        one = self.ir.insert_element(ir.Constant(_FLOATS, ir.Undefined), number, _WORD(0))
        mask = ir.Constant(_WORDS, [0] * LANES)
        return self.ir.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), mask)

    def joined(self, vector: Any, join: Callable[[Any, Any], Any]) -> Any:
        """One number of all that the vector has, by halves."""
        size = vector.type.count
        while size > 1:
            size //= 2
            parts = [
                self.ir.shuffle_vector(
                    vector,
                    ir.Constant(vector.type, ir.Undefined),
                    ir.Constant(ir.VectorType(_WORD, size), list(range(first, first + size))),
                )
                for first in (0, size)
            ]
            vector = join(*parts)
        return self.ir.extract_element(vector, _WORD(0))

    def sum_of(self, vector: Any) -> Any:
        return self.joined(vector, lambda a, b: self.ir.fadd(a, b, flags=_SUM_FLAGS))

    def larger(self, a: Any, b: Any) -> Any:
        return self.ir.select(self.ir.fcmp_ordered(">", a, b), a, b)

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """One of LLVM's own functions."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = get_or_insert_function(self.ir.module, kind, name)
        return self.ir.call(function, arguments)

    def store(self, number: Any, address: Any) -> None:
        place = self.ir.inttoptr(address, number.type.as_pointer())
        self.ir.store(number, place, align=1)

    def sums(
        self,
        num: int,
        count: Any,
        add: Callable[[Any, list[Any]], list[Any]],
        *,
        kind: Any = _FLOATS,
    ) -> list[Any]:
        """What `add(i, sums)` ends with, for i below `count`, which is at least 1."""
        zero = ir.Constant(kind, [kind.element(0)] * kind.count)
        before = self.ir.block
        body = self.ir.append_basic_block("sums")
        after = self.ir.append_basic_block("sums.end")
        self.ir.branch(body)
        self.ir.position_at_end(body)
        index = self.ir.phi(_LONG)
        sums = [self.ir.phi(kind) for _ in range(num)]
        results = add(index, sums)
        following = self.ir.add(index, _LONG(1))
        firsts = [_LONG(0), *[zero] * num]
        for phi, first, result in zip([index, *sums], firsts, [following, *results], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(result, body)
        self.ir.cbranch(self.ir.icmp_signed("<", following, count), body, after)
        self.ir.position_at_end(after)
        return results


def _dots(num_columns: int, num_rows: int, kind: "_Grouped") -> Any:
    """out[r, c] = W[c] · x[r] for so many rows of W and of x, whose groups are read once."""

    @intrinsic  # type: ignore[untyped-decorator]  # numba has no types
    def dots(
        _: Any, codes: Any, scales: Any, x: Any, out: Any, out_stride: Any, num_groups: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes, scales, x, out, out_stride, num_groups = arguments
            b = _Builder(builder)
            columns = b.starts(codes, b.times(num_groups, kind.code_bytes), num_columns)
            scale_rows = b.starts(scales, b.times(num_groups, kind.scale_bytes), num_columns)
            rows = b.starts(x, b.times(num_groups, 4 * GROUP_SIZE), num_rows)

            def add(group: Any, sums: list[Any]) -> list[Any]:
                place = b.times(group, 4 * GROUP_SIZE)
                upper = builder.add(place, _LONG(4 * LANES))
                parts = [(b.load(r, place, _FLOATS), b.load(r, upper, _FLOATS)) for r in rows]
                results: list[Any] = []
                for column, own_scales in zip(columns, scale_rows, strict=True):
                    low, high = kind.weights(b, column, own_scales, group)
                    for part in parts:
                        total = b.added(sums[len(results)], low, part[0])
                        results.append(b.added(total, high, part[1]))
                return results

            totals = b.sums(num_columns * num_rows, num_groups, add)
            for column in range(num_columns):
                starts = b.starts(builder.add(out, _LONG(4 * column)), out_stride, num_rows)
                for row, start in enumerate(starts):
                    b.store(b.sum_of(totals[column * num_rows + row]), start)
            return context.get_dummy_value()

        return types.void(*6 * (types.int64,)), generate

    return dots


@dataclass(frozen=True, slots=True)
class _Grouped:
    """How the groups of a format lie in memory."""

    code_bytes: int
    scale_bytes: int
    # A group's weights as two vectors, from addresses of its row's codes and scales.
    weights: Callable[[_Builder, Any, Any, Any], tuple[Any, Any]]


def _int8_weights(b: _Builder, column: Any, scales: Any, group: Any) -> tuple[Any, Any]:
    """scale · code"""
    place = b.times(group, GROUP_SIZE)
    scale = b.load(scales, b.times(group, 2), ir.HalfType())
    factor = b.spread(b.ir.fpext(scale, ir.FloatType()))
    low, high = (
        b.ir.fmul(factor, b.floats(b.ir.sext(b.load(column, at, _BYTES), _WORDS)))
        for at in (place, b.ir.add(place, _LONG(LANES)))
    )
    return low, high


def _int4_weights(b: _Builder, column: Any, scales: Any, group: Any) -> tuple[Any, Any]:
    """step · code + floor"""
    packed = b.load(column, b.times(group, LANES), _BYTES)
    halves = (
        b.ir.and_(packed, ir.Constant(_BYTES, [15] * LANES)),
        b.ir.lshr(packed, ir.Constant(_BYTES, [4] * LANES)),
    )
    pair = b.load(scales, b.times(group, 4), _HALVES)
    pair = b.ir.fpext(pair, ir.VectorType(ir.FloatType(), 2))
    step, floor = (b.spread(b.ir.extract_element(pair, _WORD(i))) for i in range(2))
    low, high = (b.added(floor, step, b.floats(b.ir.zext(half, _WORDS))) for half in halves)
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
            b = _Builder(builder)
            columns = b.starts(codes, in_features, num_columns)
            rows = b.starts(own_codes, b.times(in_features, _OWN_DTYPE.itemsize), num_rows)

            def add(index: Any, sums: list[Any]) -> list[Any]:
                place = b.times(index, _STEP)
                own_place = b.times(place, _OWN_DTYPE.itemsize)
                parts = [_integers(b, row, own_place) for row in rows]
                results: list[Any] = []
                for column in columns:
                    weight = _integer_weights(b, column, place)
                    for part in [*parts, *_offsets(b)]:
                        results.append(_added_integers(b, sums[len(results)], part, weight))
                return results

            # With an offset, the sum of a column's codes comes after those of the rows.
            width = num_rows + len(_offsets(b))
            count = builder.sdiv(in_features, _LONG(_STEP))
            totals = b.sums(num_columns * width, count, add, kind=_TOTALS)
            totals = [b.joined(total, builder.add) for total in totals]
            for column in range(num_columns):
                scale = b.load(scales, _LONG(4 * column), ir.FloatType())
                starts = b.starts(builder.add(out, _LONG(4 * column)), out_stride, num_rows)
                own = totals[column * width : (column + 1) * width]
                for row, start in enumerate(starts):
                    total = builder.sub(own[row], own[-1]) if _OFFSET else own[row]
                    own_scale = b.load(own_scales, _LONG(4 * row), ir.FloatType())
                    scaled = builder.fmul(builder.sitofp(total, ir.FloatType()), own_scale)
                    b.store(builder.fmul(scaled, scale), start)
            return context.get_dummy_value()

        return types.void(*7 * (types.int64,)), generate

    return dots


def _integers(b: _Builder, row: Any, place: Any) -> Any:
    """`_STEP` codes of x."""
    return b.load(row, place, _TOTALS if HAS_VNNI else _OWN)


def _integer_weights(b: _Builder, column: Any, place: Any) -> Any:
    """`_STEP` codes of the weight."""
    if HAS_VNNI:
        return b.load(column, place, _TOTALS)
    return b.ir.sext(b.load(column, place, _BYTES), _OWN)


def _offsets(b: _Builder) -> list[Any]:
    """What is in every code of x and must be taken off again, as `_integers` has it."""
    return [ir.Constant(_TOTALS, [_OFFSET * 0x01010101 - 2**32] * 8)] if _OFFSET else []


def _added_integers(b: _Builder, total: Any, part: Any, weight: Any) -> Any:
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
        b = _Builder(builder)
        count = builder.sdiv(in_features, _LONG(LANES))
        zero = ir.Constant(_FLOATS, [ir.FloatType()(0)] * LANES)

        def look(index: Any, found: list[Any]) -> list[Any]:
            part = b.load(x, b.times(index, 4 * LANES), _FLOATS)
            size = b.call("llvm.fabs.v16f32", _FLOATS, part)
            return [b.larger(size, found[0]), builder.fadd(found[1], builder.fmul(part, zero))]

        largest, nothing = b.sums(2, count, look)
        scale = builder.fdiv(b.joined(largest, b.larger), ir.FloatType()(INT8_MAX))
        is_zero = builder.fcmp_ordered("==", scale, ir.FloatType()(0))
        scale = builder.select(is_zero, ir.FloatType()(1), scale)
        scale = builder.fadd(scale, b.joined(nothing, builder.fadd))
        b.store(scale, own_scale)
        divisor = b.spread(scale)

        def put(index: Any, _: list[Any]) -> list[Any]:
            part = builder.fdiv(b.load(x, b.times(index, 4 * LANES), _FLOATS), divisor)
            codes = builder.fptosi(b.call("llvm.rint.v16f32", _FLOATS, part), _WORDS)
            codes = builder.trunc(builder.add(codes, ir.Constant(_WORDS, [_OFFSET] * LANES)), _OWN)
            place = b.times(index, LANES * _OWN_DTYPE.itemsize)
            b.store(codes, builder.add(own_codes, place))
            return []

        b.sums(0, count, put)
        return context.get_dummy_value()

    return types.void(*4 * (types.int64,)), generate


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def _half(_: Any, address: Any) -> Any:
    """The float16 at an address, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        half = _Builder(builder).load(arguments[0], _LONG(0), ir.HalfType())
        return builder.fpext(half, ir.FloatType())

    return types.float32(types.int64), generate


def _pointer(kind: Any) -> Any:
    """An intrinsic: a pointer to what lies at an address."""
    pointer = types.CPointer(kind)

    @intrinsic  # type: ignore[untyped-decorator]  # numba has no types
    def at(_: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.int64), generate

    return at


_int8s, _uint8s = _pointer(types.int8), _pointer(types.uint8)
_int8_tile, _int8_row, _int8_one = (
    _dots(_TILE, _ROWS, _INT8),
    _dots(COLUMNS, 1, _INT8),
    _dots(1, 1, _INT8),
)
_int4_tile, _int4_row, _int4_one = (
    _dots(_TILE, _ROWS, _INT4),
    _dots(COLUMNS, 1, _INT4),
    _dots(1, 1, _INT4),
)
_integer_tile, _integer_row, _integer_one = (
    _integer_dots(_TILE, _INTEGER_ROWS),
    _integer_dots(COLUMNS, 1),
    _integer_dots(1, 1),
)


# Products: out[t] = W · x[t]. The threads share the rows of W.


@inlined
def _share(num: Any, thread: Any, num_threads: Any) -> Any:
    """First and end of a thread's, in blocks of `COLUMNS`."""
    num_blocks = (num + COLUMNS - 1) // COLUMNS
    first = num_blocks * thread // num_threads * COLUMNS
    return first, min(num_blocks * (thread + 1) // num_threads * COLUMNS, num)


def _int8_product(pointer: Any) -> None:
    call = numba.carray(pointer, 1)[0]
    num_groups, stride = call.in_features // GROUP_SIZE, 4 * call.out_stride
    # Bytes from one row to the next, of codes and of x; scales take 2 for each group.
    code_width, width = num_groups * GROUP_SIZE, 4 * call.in_features
    first, end = _share(call.out_features, thread_index(), thread_count())
    whole_end = end - (end - first) % COLUMNS
    num_tiled = call.num_rows // _ROWS * _ROWS
    for column in range(first, whole_end, COLUMNS):
        for row in range(0, num_tiled, _ROWS):
            for own in range(column, column + COLUMNS, _TILE):
                codes, scales = call.codes + own * code_width, call.scales + 2 * own * num_groups
                out = call.out + 4 * own + row * stride
                _int8_tile(codes, scales, call.x + row * width, out, stride, num_groups)
        codes, scales = call.codes + column * code_width, call.scales + 2 * column * num_groups
        for row in range(num_tiled, call.num_rows):
            out = call.out + 4 * column + row * stride
            _int8_row(codes, scales, call.x + row * width, out, stride, num_groups)
    for column in range(whole_end, end):
        codes, scales = call.codes + column * code_width, call.scales + 2 * column * num_groups
        for row in range(call.num_rows):
            out = call.out + 4 * column + row * stride
            _int8_one(codes, scales, call.x + row * width, out, stride, num_groups)


def _int4_product(pointer: Any) -> None:
    call = numba.carray(pointer, 1)[0]
    num_groups, stride = call.in_features // GROUP_SIZE, 4 * call.out_stride
    # Bytes from one row to the next, of codes and of x; scales take 4 for each group.
    code_width, width = num_groups * LANES, 4 * call.in_features
    first, end = _share(call.out_features, thread_index(), thread_count())
    whole_end = end - (end - first) % COLUMNS
    num_tiled = call.num_rows // _ROWS * _ROWS
    for column in range(first, whole_end, COLUMNS):
        for row in range(0, num_tiled, _ROWS):
            for own in range(column, column + COLUMNS, _TILE):
                codes, scales = call.codes + own * code_width, call.scales + 4 * own * num_groups
                out = call.out + 4 * own + row * stride
                _int4_tile(codes, scales, call.x + row * width, out, stride, num_groups)
        codes, scales = call.codes + column * code_width, call.scales + 4 * column * num_groups
        for row in range(num_tiled, call.num_rows):
            out = call.out + 4 * column + row * stride
            _int4_row(codes, scales, call.x + row * width, out, stride, num_groups)
    for column in range(whole_end, end):
        codes, scales = call.codes + column * code_width, call.scales + 4 * column * num_groups
        for row in range(call.num_rows):
            out = call.out + 4 * column + row * stride
            _int4_one(codes, scales, call.x + row * width, out, stride, num_groups)


def _integer_product(pointer: Any) -> None:
    """The threads share the rows of x first, to round them."""
    call = numba.carray(pointer, 1)[0]
    thread, num_threads = thread_index(), thread_count()
    width, stride = call.in_features, 4 * call.out_stride
    own_width = width * _OWN_BYTES
    row_end = call.num_rows * (thread + 1) // num_threads
    for row in range(call.num_rows * thread // num_threads, row_end):
        own, own_scale = call.own_codes + row * own_width, call.own_scales + 4 * row
        _round_row(call.x + 4 * row * width, own, own_scale, width)
    barrier()
    first, end = _share(call.out_features, thread, num_threads)
    whole_end = end - (end - first) % COLUMNS
    num_tiled = call.num_rows // _INTEGER_ROWS * _INTEGER_ROWS
    for column in range(first, whole_end, COLUMNS):
        for row in range(0, num_tiled, _INTEGER_ROWS):
            x, x_scales = call.own_codes + row * own_width, call.own_scales + 4 * row
            for own in range(column, column + COLUMNS, _TILE):
                codes, scales = call.codes + own * width, call.scales + 4 * own
                out = call.out + 4 * own + row * stride
                _integer_tile(codes, scales, x, x_scales, out, stride, width)
        codes, scales = call.codes + column * width, call.scales + 4 * column
        for row in range(num_tiled, call.num_rows):
            x, x_scales = call.own_codes + row * own_width, call.own_scales + 4 * row
            out = call.out + 4 * column + row * stride
            _integer_row(codes, scales, x, x_scales, out, stride, width)
    for column in range(whole_end, end):
        codes, scales = call.codes + column * width, call.scales + 4 * column
        for row in range(call.num_rows):
            x, x_scales = call.own_codes + row * own_width, call.own_scales + 4 * row
            out = call.out + 4 * column + row * stride
            _integer_one(codes, scales, x, x_scales, out, stride, width)


# Writing out: out[n] = W[n]


@inlined
def _write_int8(out: Any, codes: Any, scale: Any) -> None:
    for i in range(GROUP_SIZE):
        out[i] = scale * np.float32(codes[i])


@inlined
def _write_int4(out: Any, codes: Any, step: Any, floor: Any) -> None:
    for i in range(LANES):
        out[i] = step * np.float32(codes[i] & 15) + floor
        out[LANES + i] = step * np.float32(codes[i] >> 4) + floor


def _int8_rows(pointer: Any) -> None:
    call = numba.carray(pointer, 1)[0]
    num_groups = call.in_features // GROUP_SIZE
    first, end = _share(call.out_features, thread_index(), thread_count())
    for group in range(first * num_groups, end * num_groups):
        codes = _int8s(call.codes + GROUP_SIZE * group)
        _write_int8(floats(call.out + 128 * group), codes, _half(call.scales + 2 * group))


def _int4_rows(pointer: Any) -> None:
    call = numba.carray(pointer, 1)[0]
    num_groups = call.in_features // GROUP_SIZE
    first, end = _share(call.out_features, thread_index(), thread_count())
    for group in range(first * num_groups, end * num_groups):
        scales = call.scales + 4 * group
        codes = _uint8s(call.codes + LANES * group)
        _write_int4(floats(call.out + 128 * group), codes, _half(scales), _half(scales + 2))


_INT8_PRODUCT, _INT4_PRODUCT = loop(_int8_product, _CALL), loop(_int4_product, _CALL)
_INT8_ROWS, _INT4_ROWS = loop(_int8_rows, _CALL), loop(_int4_rows, _CALL)
# What is rounded must not depend on how a compiler orders things.
_INTEGER_PRODUCT = loop(_integer_product, _CALL, is_exact=True) if CAN_MULTIPLY_INTEGERS else None


def int8_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """As `Format.product` of int8."""
    if x.shape[1] % GROUP_SIZE:
        return INT8.product(x, codes, scales)
    return _product(x, codes, scales, few=_INT8_PRODUCT, rows=_INT8_ROWS)


def int4_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """As `Format.product` of int4."""
    return _product(x, codes, scales, few=_INT4_PRODUCT, rows=_INT4_ROWS)


def int8_dynamic_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """As `Format.product` of int8-dynamic."""
    if x.shape[1] % INTEGER_MULTIPLE or not CAN_MULTIPLY_INTEGERS:
        return INT8_DYNAMIC.product(x, codes, scales)
    x = x.contiguous()
    out = torch.empty(x.shape[0], codes.shape[0])
    own_codes, own_scales = torch.empty(x.shape, dtype=_OWN_DTYPE), torch.empty(x.shape[0])
    call = _call(x, codes, scales, out=out)
    call[0]["own_codes"], call[0]["own_scales"] = own_codes.data_ptr(), own_scales.data_ptr()
    run(_INTEGER_PRODUCT, call.ctypes.data)
    return out


def _product(x: Tensor, codes: Tensor, scales: Tensor, *, few: Any, rows: Any) -> Tensor:
    x = x.contiguous()
    out = torch.empty(x.shape[0], codes.shape[0])
    if x.shape[0] < MIN_ROWS_OF_GEMM:
        _run(few, x, codes, scales, out=out)
        return out
    tile = torch.empty(min(TILE_SIZE, codes.shape[0]), x.shape[1])
    for first in range(0, codes.shape[0], TILE_SIZE):
        own = codes[first : first + TILE_SIZE]
        weight = tile[: len(own)]
        _run(rows, x, own, scales[first : first + TILE_SIZE], out=weight)
        torch.mm(x, weight.T, out=out[:, first : first + len(own)])
    return out


def _run(loop: Any, x: Tensor, codes: Tensor, scales: Tensor, *, out: Tensor) -> None:
    run(loop, _call(x, codes, scales, out=out).ctypes.data)


def _call(x: Tensor, codes: Tensor, scales: Tensor, *, out: Tensor) -> Calls:
    """One record."""
    record = np.zeros(1, dtype=_CALL)
    call = record[0]
    call["x"], call["num_rows"], call["in_features"] = x.data_ptr(), x.shape[0], x.shape[1]
    call["codes"], call["scales"], call["out"] = (t.data_ptr() for t in (codes, scales, out))
    call["out_features"], call["out_stride"] = codes.shape[0], out.stride(0)
    return record


PRODUCTS = {"int8": int8_product, "int4": int4_product, "int8-dynamic": int8_dynamic_product}
