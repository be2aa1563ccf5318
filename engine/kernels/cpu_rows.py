"""What a model does to rows between its products, each in one compiled loop: norms, RoPE, gates.

A model's own code calls up to ten operations for each of these, and reads and writes its rows as
often. Knows addresses and rows. Knows nothing of layers.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from engine.kernels.loops import floats, inlined, loop, run, thread_count, thread_index
from engine.kernels.vectors import WORD, Builder

# Beyond these exp is as good as zero, or as infinite.
_LEAST, _MOST = -87.0, 88.0
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_NUM_TERMS = 8
_MANTISSA_BITS, _BIAS = 23, 127


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def exp(_: Any, x: Any) -> Any:
    """2ⁿ · exp(r), |r| below ln(2) / 2, of which Taylor's series gives all of float32's digits.

    Unlike libm's, LLVM makes vectors of it.
    """
    kind = ir.FloatType()

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b = Builder(builder)
        (x,) = arguments
        for limit, sign in ((_LEAST, "<"), (_MOST, ">")):
            # NaN stays what it is.
            x = builder.select(builder.fcmp_ordered(sign, x, kind(limit)), kind(limit), x)
        n = b.call("llvm.rint.f32", kind, builder.fmul(x, kind(1 / math.log(2))))
        minus = builder.fneg(n)
        r = b.call("llvm.fma.f32", kind, minus, kind(_LN2_HIGH), x)
        r = b.call("llvm.fma.f32", kind, minus, kind(_LN2_LOW), r)
        total = kind(1 / math.factorial(_NUM_TERMS - 1))
        for k in reversed(range(_NUM_TERMS - 1)):
            total = b.call("llvm.fma.f32", kind, total, r, kind(1 / math.factorial(k)))
        exponent = builder.add(builder.fptosi(n, WORD), WORD(_BIAS))
        power = builder.bitcast(builder.shl(exponent, WORD(_MANTISSA_BITS)), kind)
        return builder.fmul(total, power)

    return types.float32(types.float32), generate


# Rows
#
# What is changed in place is one argument: of two that are the same no compiler makes vectors.


@inlined
def copy_row(x: Any, out: Any, width: Any) -> None:
    for i in range(width):
        out[i] = x[i]


@inlined
def norm_row(x: Any, weight: Any, out: Any, width: Any, eps: Any, offset: Any) -> None:
    total = np.float32(0)
    for i in range(width):
        total += x[i] * x[i]
    scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
    for i in range(width):
        out[i] = x[i] * scale * (offset + weight[i])


@inlined
def add_row(total: Any, x: Any, width: Any) -> None:
    """total += x"""
    for i in range(width):
        total[i] += x[i]


@inlined
def gate_row(gate: Any, up: Any, width: Any) -> None:
    """gate = silu(gate) · up"""
    for i in range(width):
        gate[i] = gate[i] / (np.float32(1) + exp(-gate[i])) * up[i]


@inlined
def turn(head: Any, cos: Any, sin: Any, half: Any) -> None:
    for i in range(half):
        first, second = head[i], head[half + i]
        head[i] = first * cos[i] - second * sin[i]
        head[half + i] = second * cos[half + i] + first * sin[half + i]


@inlined
def rows_of(num_rows: Any, thread: Any, num_threads: Any) -> Any:
    """First and end of a thread's."""
    return num_rows * thread // num_threads, num_rows * (thread + 1) // num_threads


# Operations

_NORM_CALL = np.dtype(
    [
        *((name, np.int64) for name in ("x", "residual", "weight", "total", "out")),
        *((name, np.int64) for name in ("num_rows", "width")),
        ("eps", np.float32),
        ("offset", np.float32),
    ],
    align=True,
)
_GATE_CALL = np.dtype(
    [(name, np.int64) for name in ("gate", "up", "out", "gate_row", "up_row", "num_rows", "width")]
)
_TURN_CALL = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("x", "row", "head", "out", "num_rows", "num_heads", "head_dim"),
            *("cos", "cos_row", "sin", "sin_row", "dims"),
        )
    ]
)


def _norm(pointer: Any) -> None:
    call = numba.carray(pointer, 1)[0]
    first, end = rows_of(call.num_rows, thread_index(), thread_count())
    for row in range(first, end):
        place = 4 * row * call.width
        x = floats(call.x + place)
        if call.residual:
            total = floats(call.total + place)
            copy_row(x, total, call.width)
            add_row(total, floats(call.residual + place), call.width)
            x = total
        weight, out = floats(call.weight), floats(call.out + place)
        norm_row(x, weight, out, call.width, call.eps, call.offset)


def _gate(pointer: Any) -> None:
    call = numba.carray(pointer, 1)[0]
    first, end = rows_of(call.num_rows, thread_index(), thread_count())
    for row in range(first, end):
        gate, up = (
            floats(call.gate + 4 * row * call.gate_row),
            floats(call.up + 4 * row * call.up_row),
        )
        out = floats(call.out + 4 * row * call.width)
        copy_row(gate, out, call.width)
        gate_row(out, up, call.width)


def _turn(pointer: Any) -> None:
    call = numba.carray(pointer, 1)[0]
    first, end = rows_of(call.num_rows, thread_index(), thread_count())
    for row in range(first, end):
        cos, sin = (
            floats(call.cos + 4 * row * call.cos_row),
            floats(call.sin + 4 * row * call.sin_row),
        )
        for head in range(call.num_heads):
            x = floats(call.x + 4 * (row * call.row + head * call.head))
            out = floats(call.out + 4 * (row * call.num_heads + head) * call.head_dim)
            copy_row(x, out, call.head_dim)
            turn(out, cos, sin, call.dims // 2)


_NORM, _GATE, _TURN = loop(_norm, _NORM_CALL), loop(_gate, _GATE_CALL), loop(_turn, _TURN_CALL)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float) -> Tensor:
    """`reference.rms_norm`."""
    rows = x.contiguous()
    out = torch.empty_like(rows)
    _run_norm(rows, None, weight, out, out, eps=eps, offset=offset)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """x + residual, and `reference.rms_norm` of it."""
    rows = x.contiguous()
    total, out = torch.empty_like(rows), torch.empty_like(rows)
    _run_norm(rows, residual.contiguous(), weight, total, out, eps=eps, offset=offset)
    return total, out


def _run_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    total: Tensor,
    out: Tensor,
    *,
    eps: float,
    offset: float,
) -> None:
    assert x.dtype is weight.dtype is torch.float32
    assert weight.shape == x.shape[-1:]
    record = np.zeros(1, dtype=_NORM_CALL)
    call = record[0]
    call["x"], call["weight"] = x.data_ptr(), weight.data_ptr()
    call["residual"] = 0 if residual is None else residual.data_ptr()
    call["total"], call["out"] = total.data_ptr(), out.data_ptr()
    call["num_rows"], call["width"] = x.numel() // x.shape[-1], x.shape[-1]
    call["eps"], call["offset"] = eps, offset
    run(_NORM, record.ctypes.data)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`reference.silu_mul`. Both [num_rows, width], their rows anywhere."""
    assert gate.dtype is up.dtype is torch.float32
    assert gate.shape == up.shape
    assert gate.stride(1) == up.stride(1) == 1
    out = gate.new_empty(gate.shape)
    record = np.zeros(1, dtype=_GATE_CALL)
    call = record[0]
    call["gate"], call["up"], call["out"] = gate.data_ptr(), up.data_ptr(), out.data_ptr()
    call["gate_row"], call["up_row"] = gate.stride(0), up.stride(0)
    call["num_rows"], call["width"] = gate.shape
    run(_GATE, record.ctypes.data)
    return out


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.rotate` of both."""
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    assert x.dtype is cos.dtype is sin.dtype is torch.float32
    assert x.stride(2) == cos.stride(1) == sin.stride(1) == 1
    assert cos.shape == sin.shape
    assert cos.shape[0] == x.shape[0]
    out = x.new_empty(x.shape)
    record = np.zeros(1, dtype=_TURN_CALL)
    call = record[0]
    call["x"], call["row"], call["head"] = x.data_ptr(), x.stride(0), x.stride(1)
    call["out"] = out.data_ptr()
    call["num_rows"], call["num_heads"], call["head_dim"] = x.shape
    call["cos"], call["cos_row"] = cos.data_ptr(), cos.stride(0)
    call["sin"], call["sin_row"] = sin.data_ptr(), sin.stride(0)
    call["dims"] = cos.shape[1]
    run(_TURN, record.ctypes.data)
    return out
