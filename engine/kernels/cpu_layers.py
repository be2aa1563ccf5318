"""A layer of the usual form in two compiled loops: what comes before attention, and what after.

Before: a norm, the products that give query, key and value, RoPE. After: the product of what was
attended, and on its sum with the layer's input a norm, a gated MLP and another sum. Adapters take
part wherever there is a product. Alone each of these would wake all threads and be asked for
through torch, some forty times a layer. Knows addresses and sizes. Knows nothing of modules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from engine.kernels.cpu_lora import CompiledLora, expand
from engine.kernels.cpu_rows import add_row, gate_row, norm_row, rows_of, turn
from engine.kernels.layer_parts import LayerParts, Norm, Product
from engine.kernels.loops import (
    COUNTER_BYTES,
    LINE,
    barrier,
    fetch_rows,
    floats,
    inlined,
    ints,
    loop,
    next_of,
    run,
    thread_count,
    thread_index,
)
from engine.kernels.mixes import PANEL
from engine.kernels.products import (
    COLUMNS,
    MULTIPLE,
    SPAN,
    add_to_rows,
    num_shares,
    product,
    share,
)
from engine.kernels.quantised import GROUP_SIZE
from engine.kernels.quantised_cpu import (
    CAN_MULTIPLY_INTEGERS,
    grouped_columns,
    integer_columns,
    round_rows,
)
from engine.kernels.slot_weights import SlotWeights

# A product as int64: addresses of weight, its scales and bias, 0 for none, sizes, the address of
# the adapters' table, 0 where they can't change it, and what kind of weight it is.
_WEIGHT, _SCALES, _PRODUCT_BIAS, _IN, _OUT, _TABLE, _KIND = range(7)
_FIELDS = 7
_WHOLE, _BF16, _INT8, _INT4, _DYNAMIC = range(5)
_KINDS = {
    None: _WHOLE,
    "bf16": _BF16,
    "int8": _INT8,
    "int4": _INT4,
    "int8-dynamic": _DYNAMIC,
}
# From so many rows on a part of the adapters is fetched after each SPAN of columns.
_MIN_ROWS_OF_FETCHING = 12
# Where a layer's products have their counters: query, key and value first.
_QUERY, _AFTER, _GATE, _UP, _DOWN, _NUM_PRODUCTS = 0, 3, 4, 5, 6, 7
# Most products of the same rows, each of which has a place of its own for what adapters shrink.
_MOST_AT_ONCE = 3

_ADAPTER_FIELDS = (
    # [num_groups, 3]: first row, end, slot
    *("groups", "num_groups"),
    # [_MOST_AT_ONCE, num_rows, max_rank]
    *("shrunk", "max_rank"),
)
_SHARING_FIELDS = (
    # [_NUM_PRODUCTS, num_threads]: how many parts of a thread's columns are taken; zero before use
    "counters",
)
_QUANTISED_FIELDS = (
    # Of each thread room for COLUMNS rows of a weight, and how many floats that is
    *("tile", "tile_size"),
    # Rows as int8-dynamic multiplies them
    *("own_codes", "own_scales"),
)
ENTER_CALL = np.dtype(
    [
        *((name, np.int64) for name in ("x", "norm", "normed", "num_rows", "width")),
        # Of query, key and value, one behind the other
        *((name, np.int64) for name in ("products", "query", "key", "value")),
        *((name, np.int64) for name in ("cos", "cos_row", "sin", "sin_row", "dims", "head_dim")),
        *((name, np.int64) for name in (*_ADAPTER_FIELDS, *_SHARING_FIELDS, *_QUANTISED_FIELDS)),
        ("eps", np.float32),
        ("offset", np.float32),
    ],
    align=True,
)
LEAVE_CALL = np.dtype(
    [
        *((name, np.int64) for name in ("attended", "residual", "total", "norm", "normed")),
        *((name, np.int64) for name in ("num_rows", "width", "inner_width", "gate", "up", "out")),
        # Of what was attended, of gate and up, and down: one behind the other
        ("products", np.int64),
        *((name, np.int64) for name in (*_ADAPTER_FIELDS, *_SHARING_FIELDS, *_QUANTISED_FIELDS)),
        ("eps", np.float32),
        ("offset", np.float32),
    ],
    align=True,
)


# Products and their adapters


@inlined
def _round(x: Any, one: Any, call: Any, first: Any, end: Any) -> None:
    """Make some rows ready for `_multiply`, whoever of the threads multiplies them."""
    if one[_KIND] == _DYNAMIC:
        round_rows(x, call.own_codes, call.own_scales, one[_IN], first, end)


@inlined
def _num_blocks(table: Any, groups: Any, num_groups: Any) -> Any:
    """Of all groups' lora_A, in blocks of COLUMNS rows."""
    total = 0
    for g in range(num_groups):
        total += (table[3 * groups[3 * g + 2] + 2] + COLUMNS - 1) // COLUMNS
    return total


@inlined
def _shrink(x: Any, one: Any, call: Any, place: Any, thread: Any, num_threads: Any) -> None:
    """This thread's share of all groups' lora_A, with the rows of each group."""
    if one[_TABLE] == 0:
        return
    table, groups = ints(one[_TABLE]), ints(call.groups)
    first, end = rows_of(_num_blocks(table, groups, call.num_groups), thread, num_threads)
    shrunk = call.shrunk + 4 * place * call.num_rows * call.max_rank
    before = 0
    for g in range(call.num_groups):
        row, row_end, entry = groups[3 * g], groups[3 * g + 1], 3 * groups[3 * g + 2]
        rank = table[entry + 2]
        num = (rank + COLUMNS - 1) // COLUMNS
        block, block_end = max(first - before, 0), min(end - before, num)
        if block < block_end:
            own, out = x + 4 * row * one[_IN], shrunk + 4 * row * call.max_rank
            column, column_end = COLUMNS * block, min(COLUMNS * block_end, rank)
            num_rows, lora_A = row_end - row, table[entry]
            product(own, num_rows, lora_A, one[_IN], column, column_end, out, call.max_rank)
        before += num


@inlined
def _fetch_adapters(
    one: Any, call: Any, part: Any, num_parts: Any, thread: Any, num_threads: Any
) -> None:
    """Have a part of what this thread's `_shrink` and `_expand` read brought into the cache."""
    table, groups = ints(one[_TABLE]), ints(call.groups)
    first, end = rows_of(_num_blocks(table, groups, call.num_groups), thread, num_threads)
    column, column_end = share(one[_OUT], thread, num_threads)
    own, own_end = rows_of(end - first, part, num_parts)
    row, row_end = rows_of(call.num_groups * call.max_rank, part, num_parts)
    before = -first
    for g in range(call.num_groups):
        entry = 3 * groups[3 * g + 2]
        rank = table[entry + 2]
        num = (rank + COLUMNS - 1) // COLUMNS
        start, stop = max(own - before, 0), min(COLUMNS * min(own_end - before, num), rank)
        if COLUMNS * start < stop:
            address = table[entry] + 4 * COLUMNS * start * one[_IN]
            fetch_rows(address, one[_IN], stop - COLUMNS * start, one[_IN])
        before += num
        start, stop = max(row - g * call.max_rank, 0), min(row_end - g * call.max_rank, rank)
        if start < stop:
            address = table[entry + 1] + 4 * (start * one[_OUT] + column)
            fetch_rows(address, one[_OUT], stop - start, column_end - column)


@inlined
def _expand(out: Any, one: Any, call: Any, place: Any, thread: Any, num_threads: Any) -> None:
    """Add to this thread's columns what the adapters have shrunk."""
    if one[_TABLE] == 0:
        return
    table, groups = ints(one[_TABLE]), ints(call.groups)
    first, end = share(one[_OUT], thread, num_threads)
    shrunk = call.shrunk + 4 * place * call.num_rows * call.max_rank
    for g in range(call.num_groups):
        entry = 3 * groups[3 * g + 2]
        if g + 1 < call.num_groups:
            behind = 3 * groups[3 * g + 5]
            start, width = table[behind + 1] + 4 * first, min(PANEL, end - first)
            fetch_rows(start, one[_OUT], table[behind + 2], width)
        expand(
            out + 4 * first,
            one[_OUT],
            end - first,
            table[entry + 1] + 4 * first,
            table[entry + 2],
            groups[3 * g],
            groups[3 * g + 1],
            shrunk,
            call.max_rank,
        )


@inlined
def _multiply(
    x: Any, one: Any, call: Any, place: Any, out: Any, thread: Any, num_threads: Any
) -> None:
    """x Wᵀ + bias, with what `_round` has made of all rows: behind a barrier all columns are there.

    Many rows keep the arithmetic busy: meanwhile what the adapters need next is fetched.
    """
    num_rows, out_features = call.num_rows, one[_OUT]
    fetches = one[_TABLE] != 0 and call.num_groups > 0 and num_rows >= _MIN_ROWS_OF_FETCHING
    num = num_shares(num_rows, num_threads)
    for i in range(num):
        owner = (thread + i) % num_threads
        first, end = share(out_features, owner, num_threads)
        size = SPAN if fetches or num > 1 else max(end - first, 1)
        num_spans = (end - first + size - 1) // size
        counter = _counter_of(call, place, owner, num_threads)
        span = next_of(counter)
        while span < num_spans:
            start, stop = first + span * size, min(first + span * size + size, end)
            _multiply_columns(x, one, call, out, start, stop, thread)
            if one[_PRODUCT_BIAS]:
                add_to_rows(out, out_features, num_rows, one[_PRODUCT_BIAS], start, stop)
            if fetches and i == 0:
                _fetch_adapters(one, call, span, num_spans, thread, num_threads)
            span = next_of(counter)


@inlined
def _counter_of(call: Any, place: Any, thread: Any, num_threads: Any) -> Any:
    return call.counters + COUNTER_BYTES * (place * num_threads + thread)


@inlined
def _begin_anew(call: Any, place: Any, thread: Any, num_threads: Any) -> None:
    """Behind a barrier: nobody takes any more of this thread's columns."""
    ints(_counter_of(call, place, thread, num_threads))[0] = 0


@inlined
def _multiply_columns(
    x: Any, one: Any, call: Any, out: Any, first: Any, end: Any, thread: Any
) -> None:
    kind, num_rows, width, out_features = one[_KIND], call.num_rows, one[_IN], one[_OUT]
    weight, scales = one[_WEIGHT], one[_SCALES]
    tile = call.tile + 4 * thread * call.tile_size
    if kind == _WHOLE:
        product(x, num_rows, weight, width, first, end, out, out_features)
    elif kind == _DYNAMIC:
        own, own_scales = call.own_codes, call.own_scales
        integer_columns(
            own, own_scales, num_rows, weight, scales, width, first, end, out, out_features
        )
    else:
        bits = 4 if kind == _INT4 else (8 if kind == _INT8 else 16)
        grouped_columns(
            bits, x, num_rows, weight, scales, width, first, end, out, out_features, tile
        )


# Before attention


@inlined
def enter_rows(call: Any) -> None:
    thread, num_threads = thread_index(), thread_count()
    row, row_end = rows_of(call.num_rows, thread, num_threads)
    for r in range(row, row_end):
        place = 4 * r * call.width
        x, normed = floats(call.x + place), floats(call.normed + place)
        norm_row(x, floats(call.norm), normed, call.width, call.eps, call.offset)
    _round(call.normed, ints(call.products), call, row, row_end)
    barrier()
    for i in range(3):
        one = ints(call.products + 8 * _FIELDS * i)
        out = call.query if i == 0 else (call.key if i == 1 else call.value)
        _multiply(call.normed, one, call, _QUERY + i, out, thread, num_threads)
        _shrink(call.normed, one, call, i, thread, num_threads)
    barrier()
    for i in range(3):
        _begin_anew(call, _QUERY + i, thread, num_threads)
    if call.num_groups:
        for i in range(3):
            one = ints(call.products + 8 * _FIELDS * i)
            out = call.query if i == 0 else (call.key if i == 1 else call.value)
            _expand(out, one, call, i, thread, num_threads)
        barrier()
    for r in range(row, row_end):
        cos, sin = floats(call.cos + 4 * r * call.cos_row), floats(call.sin + 4 * r * call.sin_row)
        for i in range(2):
            out = call.query if i == 0 else call.key
            width = ints(call.products + 8 * _FIELDS * i)[_OUT]
            for start in range(0, width, call.head_dim):
                head = floats(out + 4 * (r * width + start))
                turn(head, cos, sin, call.dims // 2)


# After attention


@inlined
def leave_rows(call: Any) -> None:
    thread, num_threads = thread_index(), thread_count()
    after, gate = ints(call.products), ints(call.products + 8 * _FIELDS)
    up, down = ints(call.products + 16 * _FIELDS), ints(call.products + 24 * _FIELDS)
    row, row_end = rows_of(call.num_rows, thread, num_threads)
    if after[_KIND] == _DYNAMIC:
        _round(call.attended, after, call, row, row_end)
        barrier()
    _multiply(call.attended, after, call, _AFTER, call.total, thread, num_threads)
    _shrink(call.attended, after, call, 0, thread, num_threads)
    barrier()
    _begin_anew(call, _AFTER, thread, num_threads)
    if call.num_groups:
        _expand(call.total, after, call, 0, thread, num_threads)
        barrier()
    for r in range(row, row_end):
        place = 4 * r * call.width
        total, normed = floats(call.total + place), floats(call.normed + place)
        add_row(total, floats(call.residual + place), call.width)
        norm_row(total, floats(call.norm), normed, call.width, call.eps, call.offset)
    _round(call.normed, gate, call, row, row_end)
    barrier()
    _multiply(call.normed, gate, call, _GATE, call.gate, thread, num_threads)
    _multiply(call.normed, up, call, _UP, call.up, thread, num_threads)
    if call.num_groups:
        _shrink(call.normed, gate, call, 1, thread, num_threads)
        _shrink(call.normed, up, call, 2, thread, num_threads)
    barrier()
    _begin_anew(call, _GATE, thread, num_threads)
    _begin_anew(call, _UP, thread, num_threads)
    if call.num_groups:
        _expand(call.gate, gate, call, 1, thread, num_threads)
        _expand(call.up, up, call, 2, thread, num_threads)
    first, end = share(call.inner_width, thread, num_threads)
    for r in range(call.num_rows):
        place = 4 * (r * call.inner_width + first)
        own = floats(call.gate + place)
        gate_row(own, floats(call.up + place), end - first)
    barrier()
    if down[_KIND] == _DYNAMIC:
        _round(call.gate, down, call, row, row_end)
        barrier()
    _multiply(call.gate, down, call, _DOWN, call.out, thread, num_threads)
    if call.num_groups:
        _shrink(call.gate, down, call, 0, thread, num_threads)
    barrier()
    _begin_anew(call, _DOWN, thread, num_threads)
    if call.num_groups:
        _expand(call.out, down, call, 0, thread, num_threads)
    first, end = share(call.width, thread, num_threads)
    for r in range(call.num_rows):
        place = 4 * (r * call.width + first)
        own = floats(call.out + place)
        add_row(own, floats(call.total + place), end - first)


def _enter(pointer: Any) -> None:
    enter_rows(numba.carray(pointer, 1)[0])


def _leave(pointer: Any) -> None:
    leave_rows(numba.carray(pointer, 1)[0])


_ENTER, _LEAVE = loop(_enter, ENTER_CALL), loop(_leave, LEAVE_CALL)


# Layers


class Workspace:
    """Rows that live as long as one loop does; all layers share them. Mutable; one thread."""

    def __init__(self) -> None:
        # Of each name: the rows, how many floats of them may be used, and where these begin.
        self._kept: dict[str, tuple[np.ndarray[Any, np.dtype[np.float32]], int, int]] = {}
        # Zero from loop to loop.
        self._counters = np.zeros(0, dtype=np.uint8)
        # What was last asked for, and what was said.
        self._turning: tuple[Tensor, Tensor, dict[str, int]] | None = None

    def take(self, name: str, size: int) -> int:
        """The address of so many floats, which hold anything; a line of the cache begins there."""
        found = self._kept.get(name)
        if found is None or found[1] < size:
            own = np.empty(size + LINE, dtype=np.float32)
            address = -(-own.ctypes.data // (4 * LINE)) * 4 * LINE
            found = self._kept[name] = own, size, address
        return found[2]

    def counters(self, num_threads: int) -> int:
        """The address of those of a layer's products."""
        size = _NUM_PRODUCTS * num_threads * COUNTER_BYTES
        if len(self._counters) != size:
            self._counters = np.zeros(size, dtype=np.uint8)
        return self._counters.ctypes.data

    def turning(self, cos: Tensor, sin: Tensor, *, num_rows: int) -> Mapping[str, int]:
        """Where a step's cosines and sines are, as a call has it; all layers ask for the same."""
        if self._turning is None or cos is not self._turning[0] or sin is not self._turning[1]:
            assert cos.stride(-1) == sin.stride(-1) == 1
            assert cos.shape == sin.shape
            dims = cos.shape[-1]
            assert cos.numel() == num_rows * dims
            fields = {"cos": cos.data_ptr(), "cos_row": cos.stride(-2), "dims": dims}
            fields |= {"sin": sin.data_ptr(), "sin_row": sin.stride(-2)}
            self._turning = cos, sin, fields
        return self._turning[2]


@dataclass(frozen=True, slots=True)
class Step:
    num_rows: int
    # A plan, or None
    adapters: object
    workspace: Workspace


class CompiledLayer:
    """Its parts are read by address, where they lie now."""

    def __init__(self, parts: LayerParts, workspace: Workspace) -> None:
        before = (parts.query, parts.key, parts.value)
        behind = (parts.after, parts.gate, parts.up, parts.down)
        _check(parts, [*before, *behind])
        # Read by address, as long as this layer lives.
        self._parts = parts
        self._before, self._behind = (_table_of(p, parts.weights) for p in (before, behind))
        self.enter_call = np.zeros(1, dtype=ENTER_CALL)
        self.leave_call = np.zeros(1, dtype=LEAVE_CALL)
        # numpy takes microseconds to say this.
        self._enter_address: int = self.enter_call.ctypes.data
        self._leave_address: int = self.leave_call.ctypes.data
        self.width = parts.query.in_features
        self.inner_width = parts.gate.out_features
        # Of query, key and value: how many heads, and how wide they are
        self.heads = [(one.out_features // parts.head_dim, parts.head_dim) for one in before]
        self._widest = max(one.in_features for one in (*before, *behind))
        _fill(self.enter_call, _norm_fields(parts.norms[0], self.width))
        _fill(self.leave_call, _norm_fields(parts.norms[1], self.width))
        _fill(self.enter_call, {"products": self._before.ctypes.data, "head_dim": parts.head_dim})
        inner = {"products": self._behind.ctypes.data, "inner_width": self.inner_width}
        _fill(self.leave_call, inner)
        self._workspace = workspace

    def enter(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, *, adapters: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `WholeLayer.enter`."""
        assert hidden.is_contiguous()
        num_rows = hidden.numel() // self.width
        query, key, value = (hidden.new_empty(num_rows, *heads) for heads in self.heads)
        states = query.data_ptr(), key.data_ptr(), value.data_ptr()
        step = Step(num_rows, adapters, self._workspace)
        self.prepare_enter(self.enter_call[0], step, hidden.data_ptr(), states, cos=cos, sin=sin)
        run(_ENTER, self._enter_address)
        return query, key, value

    def leave(self, attended: Tensor, hidden: Tensor, *, adapters: object) -> Tensor:
        """As `WholeLayer.leave`."""
        assert attended.is_contiguous()
        out = torch.empty_like(hidden)
        step = Step(hidden.numel() // self.width, adapters, self._workspace)
        addresses = attended.data_ptr(), hidden.data_ptr(), out.data_ptr()
        self.prepare_leave(self.leave_call[0], step, addresses)
        run(_LEAVE, self._leave_address)
        return out

    def prepare_enter(
        self, call: Any, step: Step, x: int, states: Sequence[int], *, cos: Tensor, sin: Tensor
    ) -> None:
        """A call, or those of all layers of this shape. `states`: query, key and value."""
        call["x"] = x
        call["query"], call["key"], call["value"] = states
        for name, field in step.workspace.turning(cos, sin, num_rows=step.num_rows).items():
            call[name] = field
        self._bring(call, step)

    def prepare_leave(self, call: Any, step: Step, addresses: tuple[int, int, int]) -> None:
        """As `prepare_enter`. `addresses`: what was attended, the residual, the layer's output."""
        call["attended"], call["residual"], call["out"] = addresses
        call["total"] = step.workspace.take("total", step.num_rows * self.width)
        for name in ("gate", "up"):
            call[name] = step.workspace.take(name, step.num_rows * self.inner_width)
        self._bring(call, step)

    def _bring(self, call: Any, step: Step) -> None:
        workspace, num_rows, adapters = step.workspace, step.num_rows, step.adapters
        call["num_rows"] = num_rows
        call["normed"] = workspace.take("normed", num_rows * self.width)
        num_threads = torch.get_num_threads()
        call["counters"] = workspace.counters(num_threads)
        call["tile_size"] = COLUMNS * self._widest
        call["tile"] = workspace.take("tile", num_threads * COLUMNS * self._widest)
        # No code is wider than a float.
        call["own_codes"] = workspace.take("own codes", num_rows * self._widest)
        own_scales = 2 * num_rows * (self._widest // GROUP_SIZE)
        call["own_scales"] = workspace.take("own scales", own_scales)
        if adapters is None:
            call["num_groups"] = 0
            return
        assert isinstance(adapters, CompiledLora)
        call["groups"], call["num_groups"] = adapters.groups_address, len(adapters.groups)
        size = _MOST_AT_ONCE * num_rows * adapters.max_rank
        call["shrunk"], call["max_rank"] = workspace.take("shrunk", size), adapters.max_rank


def _check(parts: LayerParts, products: list[Product]) -> None:
    """Raises AssertionError for what the loops cannot read."""
    for one in products:
        assert one.weight.is_contiguous()
        assert one.format in _KINDS
        assert one.format is not None or one.weight.dtype is torch.float32
        assert one.format != "int8-dynamic" or CAN_MULTIPLY_INTEGERS
        multiple = MULTIPLE if one.format is None else GROUP_SIZE
        assert one.in_features % multiple == 0, "loops take whole vectors"
    width, inner_width = parts.query.in_features, parts.gate.out_features
    for norm in parts.norms:
        assert norm.weight.dtype is torch.float32
        assert norm.weight.shape == (width,)
    for one in (parts.query, parts.key, parts.value):
        assert one.out_features % parts.head_dim == 0
    # Rows that several products share are rounded once.
    for group in ((parts.query, parts.key, parts.value), (parts.gate, parts.up)):
        assert {(one.in_features, one.format) for one in group} == {(width, group[0].format)}
    assert parts.up.out_features == inner_width
    assert (parts.down.out_features, parts.down.in_features) == (width, inner_width)
    assert parts.after.out_features == width


def _table_of(
    products: tuple[Product, ...], weights: SlotWeights | None
) -> np.ndarray[Any, np.dtype[np.int64]]:
    table = np.zeros((len(products), _FIELDS), dtype=np.int64)
    for row, one in zip(table, products, strict=True):
        row[_WEIGHT], row[_KIND] = one.weight.data_ptr(), _KINDS[one.format]
        row[_SCALES] = 0 if one.scales is None else one.scales.data_ptr()
        row[_PRODUCT_BIAS] = 0 if one.bias is None else one.bias.data_ptr()
        row[_OUT], row[_IN] = one.out_features, one.in_features
        if weights is not None and one.module is not None:
            row[_TABLE] = weights.address_of(one.module)
    return table


def _norm_fields(norm: Norm, width: int) -> dict[str, Any]:
    return {
        "norm": norm.weight.data_ptr(),
        "eps": norm.eps,
        "offset": norm.offset,
        "width": width,
    }


def _fill(record: np.ndarray[Any, Any], fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        record[0][name] = value
