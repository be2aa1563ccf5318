"""What a model does to rows between its GEMMs, each in one kernel: norms, RoPE, gates.

A model's own code launches up to ten kernels for each of these, and reads and writes its rows as
often. Sums are taken in float32, and rounded once. Knows rows. Knows nothing of layers.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu import kernel, power_of_two

# Elements that one program takes of narrow rows, and from which on more threads share one.
NORM_ELEMENTS, WIDE_NORM_ELEMENTS = 1024, 2048
GATE_COLUMNS = 1024


# Norms


@kernel(changing=("num_rows",))
def _norm(
    x: "Any",
    residual: "Any",
    weight: "Any",
    total: "Any",
    out: "Any",
    num_rows: "Any",
    num_columns: "Any",
    eps: "Any",
    offset: "Any",
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """total = x + residual; out = total / sqrt(mean(total²) + eps) · (offset + weight).

    Programs: rows.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    is_column = columns < num_columns
    is_there = (rows < num_rows)[:, None] & is_column[None, :]
    places = rows[:, None] * num_columns + columns[None, :]
    values = tl.load(x + places, mask=is_there, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + places, mask=is_there, other=0.0).to(tl.float32)
        # What the next layer reads is what is normed here.
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + places, rounded, mask=is_there)
        values = rounded.to(tl.float32)
    factors = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32) + offset
    means = tl.sum(values * values, axis=1) / num_columns
    results = values * (1.0 / tl.sqrt(means + eps))[:, None] * factors[None, :]
    tl.store(out + places, results.to(out.dtype.element_ty), mask=is_there)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float) -> Tensor:
    """`reference.rms_norm`."""
    rows = x.contiguous()
    out = rows.new_empty(rows.shape)
    _launch_norm(rows, None, weight, out, out, eps=eps, offset=offset)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """x + residual, and `reference.rms_norm` of it."""
    rows = x.contiguous()
    total, out = rows.new_empty(rows.shape), rows.new_empty(rows.shape)
    _launch_norm(rows, residual.contiguous(), weight, total, out, eps=eps, offset=offset)
    return total, out


def _launch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    total: Tensor,
    out: Tensor,
    *,
    eps: float,
    offset: float,
) -> None:
    num_columns = x.shape[-1]
    num_rows, columns = x.numel() // num_columns, power_of_two(num_columns)
    rows = max(1, NORM_ELEMENTS // columns)
    _norm[(triton.cdiv(num_rows, rows),)](
        x,
        x if residual is None else residual,
        weight,
        total,
        out,
        num_rows,
        num_columns,
        eps,
        offset,
        HAS_RESIDUAL=residual is not None,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=8 if columns >= WIDE_NORM_ELEMENTS else 4,
    )


# RoPE


@kernel()
def _turn(
    source: "Any",
    target: "Any",
    cos: "Any",
    sin: "Any",
    head_stride: "Any",
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST_COLUMNS: tl.constexpr,
) -> None:
    """All heads of one token, of which source, target, cos and sin are the beginnings."""
    heads = tl.arange(0, HEADS)
    columns = tl.arange(0, COLUMNS)
    is_column = columns < HALF
    is_there = (heads < NUM_HEADS)[:, None] & is_column[None, :]
    own = source + heads[:, None] * head_stride + columns[None, :]
    first = tl.load(own, mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(own + HALF, mask=is_there, other=0.0).to(tl.float32)
    first_cos = tl.load(cos + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    first_sin = tl.load(sin + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    second_cos = tl.load(cos + HALF + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    second_sin = tl.load(sin + HALF + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    turned = target + heads[:, None] * HEAD_DIM + columns[None, :]
    kind = target.dtype.element_ty
    tl.store(turned, (first * first_cos - second * first_sin).to(kind), mask=is_there)
    tl.store(turned + HALF, (second * second_cos + first * second_sin).to(kind), mask=is_there)
    if HEAD_DIM > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, REST_COLUMNS)
        is_rest = (heads < NUM_HEADS)[:, None] & (rest < HEAD_DIM)[None, :]
        kept = tl.load(source + heads[:, None] * head_stride + rest[None, :], mask=is_rest)
        tl.store(target + heads[:, None] * HEAD_DIM + rest[None, :], kept, mask=is_rest)


@kernel()
def _rotate(
    query: "Any",
    key: "Any",
    turned_query: "Any",
    turned_key: "Any",
    cos: "Any",
    sin: "Any",
    query_row: "Any",
    query_head: "Any",
    key_row: "Any",
    key_head: "Any",
    angle_row: "Any",
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST_COLUMNS: tl.constexpr,
) -> None:
    """x[c] · cos[c] + sin[c] · (-x[c + half] in the first half, x[c - half] in the second).

    Programs: tokens, and of each its query heads, then its key heads.
    """
    token = tl.program_id(0).to(tl.int64)
    cos += token * angle_row
    sin += token * angle_row
    if tl.program_id(1) == 0:
        _turn(
            query + token * query_row,
            turned_query + token * NUM_HEADS * HEAD_DIM,
            cos,
            sin,
            query_head,
            NUM_HEADS,
            HEAD_DIM,
            HALF,
            HEADS,
            COLUMNS,
            REST_COLUMNS,
        )
    else:
        _turn(
            key + token * key_row,
            turned_key + token * NUM_KV_HEADS * HEAD_DIM,
            cos,
            sin,
            key_head,
            NUM_KV_HEADS,
            HEAD_DIM,
            HALF,
            KV_HEADS,
            COLUMNS,
            REST_COLUMNS,
        )


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.rotate` of both, which keep their heads and may have their own numbers of them.

    query, key: [num_tokens, heads, head_dim]; cos, sin: [num_tokens, rotated dims].
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, half = key.shape[1], cos.shape[1] // 2
    assert key.shape[2] == head_dim >= 2 * half
    assert cos.stride() == sin.stride()
    assert query.stride(2) == key.stride(2) == cos.stride(1) == 1
    turned_query, turned_key = query.new_empty(query.shape), key.new_empty(key.shape)
    _rotate[(num_tokens, 2)](
        query,
        key,
        turned_query,
        turned_key,
        cos,
        sin,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        cos.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        HEADS=power_of_two(num_heads),
        KV_HEADS=power_of_two(num_kv_heads),
        COLUMNS=power_of_two(half),
        REST_COLUMNS=power_of_two(head_dim - 2 * half),
        num_warps=4,
    )
    return turned_query, turned_key


# Gates


@kernel()
def _gate(
    gate: "Any",
    up: "Any",
    out: "Any",
    gate_row: "Any",
    up_row: "Any",
    num_columns: "Any",
    COLUMNS: tl.constexpr,
) -> None:
    """out = gate · sigmoid(gate) · up. Programs: row, columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < num_columns
    gates = tl.load(gate + row * gate_row + columns, mask=is_column, other=0.0).to(tl.float32)
    ups = tl.load(up + row * up_row + columns, mask=is_column, other=0.0).to(tl.float32)
    results = gates * tl.sigmoid(gates) * ups
    tl.store(out + row * num_columns + columns, results.to(out.dtype.element_ty), mask=is_column)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`reference.silu_mul`. gate, up: [num_rows, num_columns]."""
    assert gate.stride(1) == up.stride(1) == 1
    num_rows, num_columns = gate.shape
    out = gate.new_empty(gate.shape)
    _gate[(num_rows, triton.cdiv(num_columns, GATE_COLUMNS))](
        gate,
        up,
        out,
        gate.stride(0),
        up.stride(0),
        num_columns,
        COLUMNS=GATE_COLUMNS,
        num_warps=4,
    )
    return out
