"""Compiled loops for attention over blocks, whether a sequence has one new token or many.

They read every cached position in place, in float32, on torch's own threads: a few neighbouring
queries of a sequence together, each with all heads that share a key, and with the next heads too
where these queries are few, so that a block is read as it lies. What a query gives never depends on
the queries beside it. Knows addresses and sizes. Knows nothing of layers.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.kernels.cpu_rows import copy_row, exp, rows_of
from engine.kernels.loops import (
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
from engine.kernels.mixes import PANEL, mix
from engine.kernels.products import WIDTH, dots

# Fields of int64: addresses of float32 or int64, sizes in elements.
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
                # [num_rows]: where in the flattened cache each row goes
                "places",
                # [num_seqs + 1]: first row of each sequence, and the end of the last
                *("starts", "num_seqs"),
                # [num_seqs, table_width], [num_seqs]; a window of 0 is none
                *("tables", "table_width", "contexts", "window"),
                # How many neighbouring rows meet a key head together
                "at_once",
                # Of each thread room for `room_size` floats, which hold what so many rows need
                *("room", "room_size", "max_context"),
            )
        ),
        ("scaling", np.float32),
        # 0 is none
        ("softcap", np.float32),
    ],
    align=True,
)
# Of these: what is the same in all layers of a step.
_STEP_FIELDS = (
    *("num_rows", "block_size", "places", "starts", "num_seqs", "tables", "table_width"),
    *("contexts", "max_context"),
)
Calls = np.ndarray[tuple[int], np.dtype[np.void]]
# Rows of queries, a row for each head, that meet a block together.
_MOST_ROWS = 32


@inlined
def fetch_places(call: Any) -> None:
    """Have brought into the cache what `store_rows` writes to, while something else is computed."""
    first, end = rows_of(call.num_rows, thread_index(), thread_count())
    for row in range(first, end):
        place = ints(call.places)[row]
        block, own = place // call.block_size, place % call.block_size * call.num_kv_heads
        key = call.keys + 4 * (block * call.block_stride + own * call.key_dim)
        fetch_rows(key, 0, 1, call.num_kv_heads * call.key_dim)
        value = call.values + 4 * (block * call.block_stride + own * call.value_dim)
        fetch_rows(value, 0, 1, call.num_kv_heads * call.value_dim)


@inlined
def store_rows(call: Any) -> None:
    """Put this thread's rows of keys and values, as `rows_of` shares them, into the cache."""
    first, end = rows_of(call.num_rows, thread_index(), thread_count())
    for row in range(first, end):
        place = ints(call.places)[row]
        block, offset = place // call.block_size, place % call.block_size
        for head in range(call.num_kv_heads):
            own = offset * call.num_kv_heads + head
            key = floats(call.keys + 4 * (block * call.block_stride + own * call.key_dim))
            new = floats(call.new_keys + 4 * (row * call.new_key_row + head * call.new_key_head))
            copy_row(new, key, call.key_dim)
            value = floats(call.values + 4 * (block * call.block_stride + own * call.value_dim))
            start = row * call.new_value_row + head * call.new_value_head
            copy_row(floats(call.new_values + 4 * start), value, call.value_dim)


# Attention of some queries of a sequence
#
# out[t, h] = softmax(softcap(q[t, h] · Kᵀ · scaling)) · V, K and V of the sequence's blocks


@inlined
def _softmax(scores: Any, num: Any) -> None:
    largest = scores[0]
    for i in range(1, num):
        largest = max(largest, scores[i])
    total = np.float32(0)
    for i in range(num):
        scores[i] = exp(scores[i] - largest)
        total += scores[i]
    for i in range(num):
        scores[i] /= total


@inlined
def _reach(call: Any, context: Any) -> Any:
    """How many positions a query sees that is the last of so many."""
    return min(context, call.window) if call.window > 0 else context


@inlined
def _score(
    call: Any, queries: Any, num_rows: Any, keys: Any, num: Any, out: Any, ahead: Any
) -> None:
    """out[r, i] = queries[r] · keys[i] for `num` positions of one block.

    Meanwhile as much is fetched from `ahead` on.
    """
    dim, stride = call.key_dim, call.num_kv_heads * call.key_dim
    if dim % WIDTH == 0:
        dots(queries, dim, num_rows, keys, stride, num, dim, out, call.max_context, ahead)
        return
    for row in range(num_rows):
        query, own = floats(queries + 4 * row * dim), floats(out + 4 * row * call.max_context)
        for i in range(num):
            key, total = floats(keys + 4 * i * stride), np.float32(0)
            for k in range(dim):
                total += query[k] * key[k]
            own[i] = total


@inlined
def _weigh(call: Any, scores: Any, first: Any, end: Any, context: Any) -> None:
    """One row's scores of the positions from `first` to `end` become weights: 0 where its query,
    the last of `context`, does not look."""
    num = _reach(call, context)
    start = context - num
    before, own, behind = (
        floats(scores),
        floats(scores + 4 * (start - first)),
        floats(scores + 4 * (context - first)),
    )
    for i in range(start - first):
        before[i] = 0
    for i in range(num):
        own[i] *= call.scaling
    if call.softcap > 0:
        for i in range(num):
            own[i] = call.softcap * math.tanh(own[i] / call.softcap)
    _softmax(own, num)
    for i in range(end - context):
        behind[i] = 0


@inlined
def _context(call: Any, seq: Any, row: Any) -> Any:
    """How many positions of its sequence come up to a row, its own among them."""
    return ints(call.contexts)[seq] - ints(call.starts)[seq + 1] + row + 1


@inlined
def _score_blocks(
    call: Any,
    table: Any,
    first: Any,
    end: Any,
    queries: Any,
    num_rows: Any,
    head: Any,
    head_end: Any,
    scores: Any,
) -> None:
    """Scores of the positions from `first` to `end`: those of each key head's rows."""
    size, dim, start = call.block_size, call.key_dim, first
    block = first // size
    offset, values = first - block * size, call.values + 4 * table[block] * call.block_stride
    while start < end:
        num = min(size - offset, end - start)
        place = offset * call.num_kv_heads + head
        keys = call.keys + 4 * (table[block] * call.block_stride + place * dim)
        # The next block of keys, or the first of values, comes while this one is computed.
        ahead = values
        if start + num < end:
            ahead = call.keys + 4 * table[block + 1] * call.block_stride
        for i in range(head_end - head):
            own = scores + 4 * (i * num_rows * call.max_context + start - first)
            rows = queries + 4 * i * num_rows * dim
            _score(call, rows, num_rows, keys + 4 * i * dim, num, own, ahead)
            ahead += 4 * num * dim
        start, block, offset = start + num, block + 1, 0


@inlined
def _mix_blocks(
    call: Any,
    table: Any,
    first: Any,
    end: Any,
    scores: Any,
    num_rows: Any,
    head: Any,
    head_end: Any,
    out: Any,
    behind: Any,
) -> None:
    """Add up the values of these positions, by their scores. Last comes the block `behind`."""
    size, dim, start = call.block_size, call.value_dim, first
    block = first // size
    offset = first - block * size
    while start < end:
        num = min(size - offset, end - start)
        # The next block comes while this one is mixed, as it lies.
        ahead = behind
        if start + num < end:
            ahead = call.values + 4 * table[block + 1] * call.block_stride
        own = call.values + 4 * table[block] * call.block_stride
        place = offset * call.num_kv_heads + head
        for i in range(head_end - head):
            mix(
                scores + 4 * (i * num_rows * call.max_context + start - first),
                call.max_context,
                num_rows,
                own + 4 * (place + i) * dim,
                call.num_kv_heads * dim,
                num,
                dim,
                out + 4 * i * num_rows * dim,
                dim,
                ahead + 4 * i * num * dim,
                PANEL,
                num * PANEL,
            )
        start, block, offset = start + num, block + 1, 0


@inlined
def _attend(call: Any, seq: Any, row: Any, num: Any, head: Any, head_end: Any, room: Any) -> None:
    """`num` neighbouring rows of a sequence, and these key heads. `room`: this thread's."""
    # What the first of the rows sees, and what the last.
    context = _context(call, seq, row)
    first, end = context - _reach(call, context), context + num - 1
    table = ints(call.tables + 8 * seq * call.table_width)
    group, key_dim, value_dim = call.group, call.key_dim, call.value_dim
    # Of one key head, and of all.
    num_rows = num * group
    num_all = num_rows * (head_end - head)
    queries = room
    mixed = queries + 4 * num_all * key_dim
    scores = mixed + 4 * num_all * value_dim
    for i in range(num_all):
        own_head = (head + i // num_rows) * group + i % group
        start = (row + i % num_rows // group) * call.query_row + own_head * call.query_head
        copy_row(floats(call.query + 4 * start), floats(queries + 4 * i * key_dim), key_dim)
    _score_blocks(call, table, first, end, queries, num_rows, head, head_end, scores)
    for i in range(num_all):
        own, seen = scores + 4 * i * call.max_context, context + i % num_rows // group
        _weigh(call, own, first, end, seen)
    sums = floats(mixed)
    for i in range(num_all * value_dim):
        sums[i] = 0
    behind = _first_keys(call, min(seq + 1, call.num_seqs - 1))
    _mix_blocks(call, table, first, end, scores, num_rows, head, head_end, mixed, behind)
    for i in range(num_all):
        own_head = (head + i // num_rows) * group + i % group
        start = (row + i % num_rows // group) * call.num_kv_heads * group + own_head
        own, out = floats(mixed + 4 * i * value_dim), floats(call.out + 4 * start * value_dim)
        copy_row(own, out, value_dim)


@inlined
def _first_keys(call: Any, seq: Any) -> Any:
    """Where the first block is that a sequence's rows see."""
    context = _context(call, seq, ints(call.starts)[seq])
    block = (context - _reach(call, context)) // call.block_size
    table = ints(call.tables + 8 * seq * call.table_width)
    return call.keys + 4 * table[block] * call.block_stride


@inlined
def _cost(call: Any, seq: Any, row: Any, num: Any) -> Any:
    """Of `num` rows of a sequence, or as many as it has left: what they see together, about."""
    end = ints(call.starts)[seq + 1]
    last = min(row + num, end)
    return (last - row) * _reach(call, ints(call.contexts)[seq] - end + last)


@inlined
def _num_heads_before(call: Any, bound: Any, cost: Any) -> Any:
    """How many key heads begin below `bound`, one after the other, each of the same cost."""
    return min(max(-(-bound // cost), 0), call.num_kv_heads)


@inlined
def attend_rows(call: Any) -> None:
    """Each thread takes neighbouring rows and key heads of about equal cost: what they see differs.

    All keys and values must have been stored.
    """
    thread, num_threads = thread_index(), thread_count()
    starts = ints(call.starts)
    size = call.at_once
    room = call.room + 4 * thread * call.room_size
    total = 0
    for seq in range(call.num_seqs):
        for row in range(starts[seq], starts[seq + 1], size):
            total += _cost(call, seq, row, size)
    share_first = total * call.num_kv_heads * thread // num_threads
    share_end = total * call.num_kv_heads * (thread + 1) // num_threads
    before = 0
    for seq in range(call.num_seqs):
        for row in range(starts[seq], starts[seq + 1], size):
            cost = _cost(call, seq, row, size)
            num = min(size, starts[seq + 1] - row)
            most = max(_MOST_ROWS // (num * call.group), 1)
            # The heads that begin within this thread's share.
            head = _num_heads_before(call, share_first - before, cost)
            end = _num_heads_before(call, share_end - before, cost)
            while head < end:
                _attend(call, seq, row, num, head, min(head + most, end), room)
                head += most
            before += cost * call.num_kv_heads


def _attention(pointer: Any) -> None:
    call = numba.carray(pointer, 1)[0]
    store_rows(call)
    barrier()
    attend_rows(call)


_ATTENTION = loop(_attention, ATTENTION_CALL)


class CompiledAttention:
    """As `DenseAttention`, in one loop for all sequences."""

    def __init__(self, batch: Batch) -> None:
        # Read by address, as long as this plan lives.
        self._batch = batch
        self._starts = np.array(batch.query_starts, dtype=np.int64)
        self._max_context = max(batch.host_context_lens)
        self._longest = int(np.diff(self._starts).max())
        self._call = np.zeros(1, dtype=ATTENTION_CALL)
        call = self._call[0]
        call["num_rows"], call["block_size"] = batch.num_tokens, batch.block_size
        call["places"] = batch.cache_rows.data_ptr()
        call["starts"], call["num_seqs"] = self._starts.ctypes.data, len(self._starts) - 1
        call["tables"] = batch.block_tables.data_ptr()
        call["table_width"] = batch.block_tables.shape[1]
        call["contexts"], call["max_context"] = batch.context_lens.data_ptr(), self._max_context
        self._record, self._address = call, self._call.ctypes.data
        # [num_threads, room_size], flat; made by the first layer.
        self._room = torch.empty(0)

    def describe(self, calls: Calls, *, group: int, key_dim: int, value_dim: int) -> None:
        """Fill in what is the step's own, whatever the layer; `group`: heads of a key head."""
        for name in _STEP_FIELDS:
            calls[name] = self._record[name]
        self._make_room(calls, group=group, dims=key_dim + value_dim)

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
        assert query.stride(2) == key.stride(2) == value.stride(2) == 1
        assert out.is_contiguous()
        num_kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
        key_dim, value_dim = key.shape[2], value.shape[2]
        call = self._record
        call["query"], call["query_row"], call["query_head"] = _place(query)
        call["new_keys"], call["new_key_row"], call["new_key_head"] = _place(key)
        call["new_values"], call["new_value_row"], call["new_value_head"] = _place(value)
        call["keys"], call["values"] = key_cache.data_ptr(), value_cache.data_ptr()
        call["block_stride"] = key_cache.stride(0)
        call["out"], call["num_kv_heads"], call["group"] = out.data_ptr(), num_kv_heads, group
        call["key_dim"], call["value_dim"] = key_dim, value_dim
        call["window"] = sliding_window or 0
        self._make_room(self._call, group=group, dims=key_dim + value_dim)
        call["scaling"], call["softcap"] = scaling, softcap or 0.0
        run(_ATTENTION, self._address)

    def _make_room(self, calls: Calls, *, group: int, dims: int) -> None:
        """Say how many rows attend at once, and where their queries, sums and scores go."""
        at_once = min(self._longest, max(_MOST_ROWS // group, 1))
        size = max(_MOST_ROWS, group) * (dims + self._max_context)
        if len(self._room) < torch.get_num_threads() * size:
            self._room = torch.empty(torch.get_num_threads() * size)
        calls["at_once"] = at_once
        calls["room"], calls["room_size"] = self._room.data_ptr(), size


def _place(states: Tensor) -> tuple[int, int, int]:
    """Address, and strides of rows and heads."""
    return states.data_ptr(), states.stride(0), states.stride(1)
