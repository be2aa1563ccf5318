"""Compiled loops for what torch has no single call for: many adapters, many short contexts.

Decoding rows come one per sequence, with an adapter and a context of its own each. These loops read
every weight and every cached position once, in place, in float32, on torch's own threads. Knows
addresses and sizes. Knows nothing of sequences, slots' owners or layers.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.kernels.cpu_rows import exp
from engine.kernels.dense import DenseAttention, DenseLora
from engine.kernels.loops import (
    LINE,
    barrier,
    fetch_rows,
    floats,
    inlined,
    ints,
    loop,
    run,
    thread_count,
    thread_index,
)
from engine.kernels.products import WIDTH, dots
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
ATTENTION_CALL = np.dtype(
    [
        *(
            (name, np.int64)
            for name in (
                *("query", "query_row", "query_head"),
                *("new_keys", "new_key_row", "new_key_head"),
                *("new_values", "new_value_row", "new_value_head"),
                *("keys", "values", "block_stride", "block_size"),
                *("out", "num_rows", "num_kv_heads", "group", "key_dim", "value_dim"),
                # [num_rows, table_width], [num_rows]; a window of 0 is none
                *("tables", "table_width", "contexts", "window"),
                # [num_threads, group, max_context]
                *("scores", "max_context"),
            )
        ),
        ("scaling", np.float32),
        # 0 is none
        ("softcap", np.float32),
    ],
    align=True,
)
# Of these: what is the same in all layers of a step.
_STEP_FIELDS = ("num_rows", "block_size", "tables", "table_width", "contexts", "max_context")
Calls = np.ndarray[tuple[int], np.dtype[np.void]]
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


@inlined
def _add_scaled(out: Any, factor: Any, b: Any, n: Any) -> None:
    for i in range(n):
        out[i] += factor * b[i]


@inlined
def _add_four_scaled(out: Any, factors: Any, b: Any, stride: Any, n: Any) -> None:
    """out += factors[k] · b[k · stride :], k below 4: `out` is written once for all."""
    factor0, factor1, factor2, factor3 = factors[0], factors[1], factors[2], factors[3]
    for i in range(n):
        out[i] += (
            factor0 * b[i]
            + factor1 * b[stride + i]
            + factor2 * b[2 * stride + i]
            + factor3 * b[3 * stride + i]
        )


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
    r = 0
    while r + 4 <= rank:
        panel = floats(lora_B + 4 * r * width)
        fetch_rows(lora_B + 4 * (r + 4) * width, width, min(4, rank - r - 4), num)
        for row in range(first, end):
            factors = floats(s + 4 * (row * ld + r))
            _add_four_scaled(floats(out + 4 * row * width), factors, panel, width, num)
        r += 4
    while r < rank:
        panel = floats(lora_B + 4 * r * width)
        for row in range(first, end):
            factor = floats(s + 4 * (row * ld + r))[0]
            _add_scaled(floats(out + 4 * row * width), factor, panel, num)
        r += 1


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


# Attention of one query per sequence
#
# out[t, h] = softmax(softcap(q[t, h] · Kᵀ · scaling)) · V, K and V of the sequence's blocks


@inlined
def _softmax(scores: Any, num: Any) -> Any:
    """scores = exp(scores - their largest); gives the sum to divide by."""
    largest = scores[0]
    for i in range(1, num):
        largest = max(largest, scores[i])
    total = np.float32(0)
    for i in range(num):
        scores[i] = exp(scores[i] - largest)
        total += scores[i]
    return total


@inlined
def _score(q: Any, keys: Any, stride: Any, num: Any, dim: Any, out: Any) -> None:
    """out[i] = q · keys[i · stride :] for `num` positions of one block."""
    i = 0
    while i + 4 <= num:
        _four_dots(q, floats(keys + 4 * i * stride), stride, dim, floats(out + 4 * i), 1)
        i += 4
    while i < num:
        floats(out + 4 * i)[0] = _dot(q, floats(keys + 4 * i * stride), dim)
        i += 1


@inlined
def _mix(out: Any, weights: Any, values: Any, stride: Any, num: Any, dim: Any) -> None:
    """out += weights[i] · values[i · stride :] for `num` positions of one block."""
    i = 0
    while i + 4 <= num:
        panel = floats(values + 4 * i * stride)
        _add_four_scaled(out, floats(weights + 4 * i), panel, stride, dim)
        i += 4
    while i < num:
        weight = floats(weights + 4 * i)[0]
        _add_scaled(out, weight, floats(values + 4 * i * stride), dim)
        i += 1


@inlined
def _store(call: Any, row: Any, kv_head: Any) -> None:
    """Put the new position's key and value into the cache."""
    last = ints(call.contexts)[row] - 1
    block = ints(call.tables)[row * call.table_width + last // call.block_size]
    place = (last % call.block_size) * call.num_kv_heads + kv_head
    key = floats(call.keys + 4 * (block * call.block_stride + place * call.key_dim))
    new = floats(call.new_keys + 4 * (row * call.new_key_row + kv_head * call.new_key_head))
    for i in range(call.key_dim):
        key[i] = new[i]
    value = floats(call.values + 4 * (block * call.block_stride + place * call.value_dim))
    new = floats(call.new_values + 4 * (row * call.new_value_row + kv_head * call.new_value_head))
    for i in range(call.value_dim):
        value[i] = new[i]


@inlined
def _reach(call: Any, row: Any) -> Any:
    """How many positions a row's query sees."""
    context = ints(call.contexts)[row]
    return min(context, call.window) if call.window > 0 else context


@inlined
def _attend(call: Any, row: Any, kv_head: Any, scores: Any) -> None:
    """One row and one key head; `scores`: [group, max_context] of this thread."""
    table, context = ints(call.tables + 8 * row * call.table_width), ints(call.contexts)[row]
    first = context - _reach(call, row)
    out = call.out + 4 * (row * call.num_kv_heads + kv_head) * call.group * call.value_dim
    query = call.query + 4 * (row * call.query_row + kv_head * call.group * call.query_head)
    start = first
    while start < context:
        block = start // call.block_size
        end = min((block + 1) * call.block_size, context)
        place = (start % call.block_size) * call.num_kv_heads + kv_head
        keys = call.keys + 4 * (table[block] * call.block_stride + place * call.key_dim)
        values = call.values + 4 * (table[block] * call.block_stride + place * call.value_dim)
        own_scores = scores + 4 * (start - first)
        stride = call.num_kv_heads * call.key_dim
        if call.key_dim % WIDTH == 0:
            dots(
                query,
                call.query_head,
                call.group,
                keys,
                stride,
                end - start,
                call.key_dim,
                own_scores,
                call.max_context,
                values,
            )
        else:
            for member in range(call.group):
                q = floats(query + 4 * member * call.query_head)
                out_scores = own_scores + 4 * member * call.max_context
                _score(q, keys, stride, end - start, call.key_dim, out_scores)
        start = end
    for member in range(call.group):
        own = floats(scores + 4 * member * call.max_context)
        for i in range(context - first):
            own[i] *= call.scaling
        if call.softcap > 0:
            for i in range(context - first):
                own[i] = call.softcap * math.tanh(own[i] / call.softcap)
        total = _softmax(own, context - first)
        for i in range(context - first):
            own[i] /= total
        result = floats(out + 4 * member * call.value_dim)
        for i in range(call.value_dim):
            result[i] = 0
    start = first
    while start < context:
        block = start // call.block_size
        end = min((block + 1) * call.block_size, context)
        place = (start % call.block_size) * call.num_kv_heads + kv_head
        values = call.values + 4 * (table[block] * call.block_stride + place * call.value_dim)
        for member in range(call.group):
            _mix(
                floats(out + 4 * member * call.value_dim),
                scores + 4 * (member * call.max_context + start - first),
                values,
                call.num_kv_heads * call.value_dim,
                end - start,
                call.value_dim,
            )
        start = end


@inlined
def attend_rows(call: Any) -> None:
    """Each thread takes (row, key head) pairs of about equal cost: what they see differs."""
    thread, num_threads = thread_index(), thread_count()
    total = 0
    for row in range(call.num_rows):
        total += _reach(call, row) * call.num_kv_heads
    share_first = total * thread // num_threads
    share_end = total * (thread + 1) // num_threads
    before = 0
    scores = call.scores + 4 * thread * call.group * call.max_context
    for row in range(call.num_rows):
        for kv_head in range(call.num_kv_heads):
            if share_first <= before < share_end:
                _store(call, row, kv_head)
                _attend(call, row, kv_head, scores)
            before += _reach(call, row)


def _attention(pointer: Any) -> None:
    attend_rows(numba.carray(pointer, 1)[0])


_LORA = loop(_lora, _LORA_CALL)
_AFFINE = loop(_affine, _AFFINE_CALL)
_ATTENTION = loop(_attention, ATTENTION_CALL)


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


class CompiledAttention:
    """As `DenseAttention`; decoding rows are attended in place, one loop for all of them."""

    def __init__(self, batch: Batch) -> None:
        # Its tables and contexts are read by address.
        self._batch = batch
        self._num_decodes = batch.num_decodes
        has_prefills = batch.num_decodes < len(batch.host_context_lens)
        self._prefills = (
            DenseAttention(batch, first_seq=batch.num_decodes) if has_prefills else None
        )
        self._max_context = max(batch.host_context_lens[: batch.num_decodes], default=0)
        self._call = np.zeros(1, dtype=ATTENTION_CALL)
        call = self._call[0]
        call["num_rows"], call["block_size"] = batch.num_decodes, batch.block_size
        call["tables"], call["table_width"] = (
            batch.block_tables.data_ptr(),
            batch.block_tables.shape[1],
        )
        call["contexts"], call["max_context"] = batch.context_lens.data_ptr(), self._max_context
        self._record, self._address = call, self._call.ctypes.data
        # [num_threads, group, max_context], flat; filled by the first layer.
        self._scores = torch.empty(0)

    @property
    def only_decodes(self) -> bool:
        return self._prefills is None

    def describe(self, calls: Calls, *, group: int) -> None:
        """Fill in what is the step's own, whatever the layer; `group`: rows of a key head."""
        for name in _STEP_FIELDS:
            calls[name] = self._record[name]
        calls["scores"] = self._room_for_scores(group)

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
        """As `DenseAttention.attend`."""
        if self._prefills is not None:
            self._prefills.attend(
                query,
                key,
                value,
                key_cache=key_cache,
                value_cache=value_cache,
                out=out,
                scaling=scaling,
                sliding_window=sliding_window,
                softcap=softcap,
            )
        if not self._num_decodes:
            return
        assert query.stride(2) == key.stride(2) == value.stride(2) == 1
        assert out.is_contiguous()
        num_kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
        call = self._record
        call["query"], call["query_row"], call["query_head"] = _place(query)
        call["new_keys"], call["new_key_row"], call["new_key_head"] = _place(key)
        call["new_values"], call["new_value_row"], call["new_value_head"] = _place(value)
        call["keys"], call["values"] = key_cache.data_ptr(), value_cache.data_ptr()
        call["block_stride"] = key_cache.stride(0)
        call["out"], call["num_kv_heads"], call["group"] = out.data_ptr(), num_kv_heads, group
        call["key_dim"], call["value_dim"] = key.shape[2], value.shape[2]
        call["window"] = sliding_window or 0
        call["scores"] = self._room_for_scores(group)
        call["scaling"], call["softcap"] = scaling, softcap or 0.0
        run(_ATTENTION, self._address)

    def _room_for_scores(self, group: int) -> int:
        num_scores = torch.get_num_threads() * group * self._max_context
        if len(self._scores) < num_scores:
            self._scores = torch.empty(num_scores)
        return self._scores.data_ptr()


def _place(states: Tensor) -> tuple[int, int, int]:
    """Address, and strides of rows and heads."""
    return states.data_ptr(), states.stride(0), states.stride(1)
