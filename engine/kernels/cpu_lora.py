"""Compiled loops for what torch has no single call for: many adapters in one step.

Decoding rows come one per sequence, with an adapter of its own each. These loops read every weight
once, in place, in float32, on torch's own threads. Knows addresses and sizes. Knows nothing of
sequences, slots' owners or layers.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.kernels.dense import DenseLora
from engine.kernels.loops import (
    LINE,
    barrier,
    floats,
    inlined,
    ints,
    loop,
    run,
    thread_count,
    thread_index,
)
from engine.kernels.mixes import PANEL, mix
from engine.kernels.slot_weights import SlotWeights

# Records of int64: addresses of float32 or int64, sizes in elements.
_LORA_CALL = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("x", "out", "in_features", "out_features"),
            # [num_slots, 3]: addresses of lora_A and lora_B, rank
            "table",
            # [num_groups, 3]: first row, end, slot
            *("groups", "num_groups"),
            # [num_rows, max_rank]
            *("shrunk", "max_rank"),
        )
    ]
)
_AFFINE_CALL = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("out", "out_features"),
            # [num_slots, 2]: addresses of gain and shift
            "table",
            # [num_groups, 3]: first row, end, slot
            *("groups", "num_groups"),
        )
    ]
)
# Rows of one adapter that are worth a GEMM of their own.
MIN_ROWS_OF_GEMM = 32


# Sums over neighbouring floats


@inlined
def _dot(a: Any, b: Any, n: Any) -> Any:
    total = np.float32(0)
    for i in range(n):
        total += a[i] * b[i]
    return total


@inlined
def _four_dots(a: Any, b: Any, stride: Any, n: Any, out: Any, out_stride: Any) -> None:
    """out[k · out_stride] = a · b[k · stride :], k below 4: `a` is read once for all."""
    total0 = total1 = total2 = total3 = np.float32(0)
    for i in range(n):
        value = a[i]
        total0 += value * b[i]
        total1 += value * b[stride + i]
        total2 += value * b[2 * stride + i]
        total3 += value * b[3 * stride + i]
    out[0] = total0
    out[out_stride] = total1
    out[2 * out_stride] = total2
    out[3 * out_stride] = total3


# LoRA
#
# shrunk[t] = lora_A[slot(t)] · x[t];   out[t] += lora_B[slot(t)]ᵀ · shrunk[t]


@inlined
def _shrink(x: Any, width: Any, lora_A: Any, first: Any, end: Any, out: Any, ld: Any) -> None:
    """One row of lora_A with rows first..end of x: one entry of each row of `out`, `ld` apart."""
    row = first
    while row + 4 <= end:
        _four_dots(
            lora_A, floats(x + 4 * row * width), width, width, floats(out + 4 * row * ld), ld
        )
        row += 4
    while row < end:
        floats(out + 4 * row * ld)[0] = _dot(lora_A, floats(x + 4 * row * width), width)
        row += 1


@inlined
def expand(
    out: Any, width: Any, num: Any, lora_B: Any, rank: Any, first: Any, end: Any, s: Any, ld: Any
) -> None:
    """Add to the first `num` columns of rows first..end of `out`."""
    shrunk, own = s + 4 * first * ld, out + 4 * first * width
    num_rows, ahead = end - first, lora_B + 4 * PANEL
    mix(shrunk, ld, num_rows, lora_B, width, rank, num, own, width, ahead, width, PANEL)


def _lora(pointer: Any) -> None:
    """All threads at once: first they share the rows of all lora_A, then the columns of `out`."""
    thread, num_threads = thread_index(), thread_count()
    call = numba.carray(pointer, 1)[0]
    table, groups = ints(call.table), ints(call.groups)
    total_rank = 0
    for g in range(call.num_groups):
        total_rank += table[3 * groups[3 * g + 2] + 2]
    share_first = total_rank * thread // num_threads
    share_end = total_rank * (thread + 1) // num_threads
    before = 0
    for g in range(call.num_groups):
        entry = 3 * groups[3 * g + 2]
        rank = table[entry + 2]
        for r in range(max(share_first - before, 0), min(share_end - before, rank)):
            lora_A = floats(table[entry] + 4 * r * call.in_features)
            first, end = groups[3 * g], groups[3 * g + 1]
            _shrink(
                call.x, call.in_features, lora_A, first, end, call.shrunk + 4 * r, call.max_rank
            )
        before += rank
    barrier()
    num_lines = (call.out_features + LINE - 1) // LINE
    column = num_lines * thread // num_threads * LINE
    column_end = min(num_lines * (thread + 1) // num_threads * LINE, call.out_features)
    for g in range(call.num_groups):
        entry = 3 * groups[3 * g + 2]
        expand(
            call.out + 4 * column,
            call.out_features,
            column_end - column,
            table[entry + 1] + 4 * column,
            table[entry + 2],
            groups[3 * g],
            groups[3 * g + 1],
            call.shrunk,
            call.max_rank,
        )


# Gains and shifts
#
# out[t] = gain[slot] * out[t] + shift[slot]


@inlined
def _scale_and_shift(out: Any, gain: Any, shift: Any, n: Any) -> None:
    for i in range(n):
        out[i] = gain[i] * out[i] + shift[i]


def _affine(pointer: Any) -> None:
    """The threads share the columns of `out`."""
    thread, num_threads = thread_index(), thread_count()
    call = numba.carray(pointer, 1)[0]
    table, groups = ints(call.table), ints(call.groups)
    num_lines = (call.out_features + LINE - 1) // LINE
    column = num_lines * thread // num_threads * LINE
    column_end = min(num_lines * (thread + 1) // num_threads * LINE, call.out_features)
    for g in range(call.num_groups):
        entry = 2 * groups[3 * g + 2]
        if table[entry] == 0:
            continue
        gain, shift = table[entry] + 4 * column, table[entry + 1] + 4 * column
        for row in range(groups[3 * g], groups[3 * g + 1]):
            own = call.out + 4 * (row * call.out_features + column)
            _scale_and_shift(floats(own), floats(gain), floats(shift), column_end - column)


_LORA = loop(_lora, _LORA_CALL)
_AFFINE = loop(_affine, _AFFINE_CALL)


# Plans


class CompiledAffine:
    """What `reference.affine` defines, for all runs in one loop."""

    def __init__(self, batch: Batch, weights: SlotWeights) -> None:
        # Read by address, as long as this plan lives.
        self._groups = np.ascontiguousarray(batch.slot_runs)
        self._weights = weights
        self.modules = weights.affine_modules(self._groups[:, 2])
        self._call = np.zeros(1, dtype=_AFFINE_CALL)
        call = self._call[0]
        call["groups"], call["num_groups"] = self._groups.ctypes.data, len(self._groups)
        self._record, self._address = call, self._call.ctypes.data

    def apply(self, out: Tensor, *, module: int) -> None:
        """out: [num_tokens, out_features], contiguous, changed in place."""
        assert out.is_contiguous()
        call = self._record
        call["out"], call["out_features"] = out.data_ptr(), out.shape[1]
        call["table"] = self._weights.affine_address_of(module)
        run(_AFFINE, self._address)


class CompiledLora:
    """As `DenseLora`; adapters with few rows share one loop, long runs get GEMMs of their own."""

    def __init__(self, batch: Batch, weights: SlotWeights) -> None:
        runs = batch.slot_runs
        is_long = runs[:, 1] - runs[:, 0] >= MIN_ROWS_OF_GEMM
        self._weights = weights
        # For loops that take all runs, long or not. Read by address, as long as this plan lives.
        self.groups = np.ascontiguousarray(runs)
        self.groups_address: int = self.groups.ctypes.data
        self.max_rank = weights.max_rank(runs[:, 2])
        self._affine = CompiledAffine(batch, weights)
        self._long = DenseLora(runs[is_long], weights)
        self._call = np.zeros(1, dtype=_LORA_CALL)
        # Read by address, as long as this plan lives.
        self._groups = np.ascontiguousarray(runs[~is_long])
        self._shrunk = torch.empty(batch.num_tokens, weights.max_rank(self._groups[:, 2]))
        call = self._call[0]
        call["groups"], call["num_groups"] = self._groups.ctypes.data, len(self._groups)
        call["shrunk"], call["max_rank"] = self._shrunk.data_ptr(), self._shrunk.shape[1]
        self._record, self._address = call, self._call.ctypes.data

    @property
    def is_affine(self) -> bool:
        """Whether any of its adapters scales or shifts anything."""
        return bool(self._affine.modules)

    def apply(self, out: Tensor, x: Tensor, *, module: int) -> None:
        """As `LoraPlan.apply`; both are contiguous."""
        if module in self._affine.modules:
            self._affine.apply(out, module=module)
        self._long.add(out, x, module=module)
        if not len(self._groups):
            return
        assert x.is_contiguous()
        assert out.is_contiguous()
        call = self._record
        call["x"], call["out"] = x.data_ptr(), out.data_ptr()
        call["in_features"], call["out_features"] = x.shape[1], out.shape[1]
        call["table"] = self._weights.address_of(module)
        run(_LORA, self._address)
