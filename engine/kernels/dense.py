"""The operations in torch calls that every device has.

A plan is computed once per step, from the batch alone, and shared by all layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from engine.batch import Batch, Ints
from engine.kernels.slot_weights import SlotWeights

# A decoding neighbour may have this many times the context before it stops sharing a call.
MAX_PADDING_FACTOR = 2


# Attention


@dataclass(slots=True)
class _Group:
    """Sequences with equally many new tokens, attended in one call."""

    # [num_seqs * num_queries] int64, or a slice: which rows of the step
    rows: Tensor | slice
    num_seqs: int
    num_queries: int
    # [num_seqs] int64
    context_lens: Tensor
    max_context: int
    is_ragged: bool
    # [num_seqs, num_blocks] int64, padded with the null block
    block_tables: Tensor
    # By sliding window; filled by the first layer that has such a window
    masks: dict[int | None, Tensor | None]


class DenseAttention:
    """Gathers each sequence's keys and values, then attends to them in one call per group."""

    def __init__(self, batch: Batch) -> None:
        self._blocks = batch.cache_rows // batch.block_size
        self._offsets = batch.cache_rows % batch.block_size
        self._groups = _decode_groups(batch) + [
            _prefill_group(batch, seq)
            for seq in range(batch.num_decodes, len(batch.host_context_lens))
        ]

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
        """As `reference.write_kv` of key and value, then `reference.paged_attention` into `out`."""
        key_cache.index_put_((self._blocks, self._offsets), key)
        value_cache.index_put_((self._blocks, self._offsets), value)
        for group in self._groups:
            out[group.rows] = _attend_group(
                group,
                query[group.rows].view(group.num_seqs, group.num_queries, *query.shape[1:]),
                _gather(key_cache, group),
                _gather(value_cache, group),
                scaling=scaling,
                sliding_window=sliding_window,
                softcap=softcap,
            )


def _decode_groups(batch: Batch) -> list[_Group]:
    """Decoding sequences by similar context, so that they pad each other little."""
    contexts = batch.host_context_lens
    order = sorted(range(batch.num_decodes), key=contexts.__getitem__)
    groups: list[_Group] = []
    first = 0
    for place in range(1, len(order) + 1):
        limit = MAX_PADDING_FACTOR * (contexts[order[first]] + batch.block_size)
        if place == len(order) or contexts[order[place]] > limit:
            seqs = torch.tensor(order[first:place], device=batch.context_lens.device)
            groups.append(_group(batch, seqs, rows=seqs, max_context=contexts[order[place - 1]]))
            first = place
    return groups


def _prefill_group(batch: Batch, seq: int) -> _Group:
    rows = slice(batch.query_starts[seq], batch.query_starts[seq + 1])
    seqs = torch.tensor([seq], device=batch.context_lens.device)
    return _group(batch, seqs, rows=rows, max_context=batch.host_context_lens[seq])


def _group(batch: Batch, seqs: Tensor, *, rows: Tensor | slice, max_context: int) -> _Group:
    context_lens = batch.context_lens[seqs]
    num_rows = rows.stop - rows.start if isinstance(rows, slice) else len(seqs)
    return _Group(
        rows=rows,
        num_seqs=len(seqs),
        num_queries=num_rows // len(seqs),
        context_lens=context_lens,
        max_context=max_context,
        is_ragged=len(seqs) > 1 and bool((context_lens != max_context).any()),
        block_tables=batch.block_tables[seqs, : -(-max_context // batch.block_size)],
        masks={},
    )


def _gather(cache: Tensor, group: _Group) -> Tensor:
    """[num_seqs, num_kv_heads, max_context, head_dim]"""
    picked = torch.index_select(cache, 0, group.block_tables.flatten())
    whole = picked.view(group.num_seqs, -1, *cache.shape[2:])
    whole = whole[:, : group.max_context]
    if group.is_ragged:
        # What lies behind a context may be another's NaN, which no weight of zero takes away.
        positions = torch.arange(group.max_context, device=cache.device)
        is_own = positions < group.context_lens[:, None]
        whole = whole.masked_fill_(~is_own[:, :, None, None], 0)
    return whole.transpose(1, 2)


def _attend_group(
    group: _Group,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """query: [num_seqs, num_queries, num_heads, head_dim]; gives [rows, num_heads, value_dim]."""
    query = query.transpose(1, 2)
    reaches_all = sliding_window is None or sliding_window >= group.max_context
    is_causal = group.num_queries == group.max_context and reaches_all
    if softcap is None:
        mask = None if is_causal else _mask(group, sliding_window)
        out = scaled_dot_product_attention(
            query, keys, values, mask, is_causal=is_causal, scale=scaling, enable_gqa=True
        )
    else:
        mask = _mask(group, sliding_window)
        out = _capped_attention(query, keys, values, mask, scaling=scaling, softcap=softcap)
    return out.transpose(1, 2).flatten(0, 1)


def _capped_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    softcap: float,
) -> Tensor:
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    scores = (query @ keys.transpose(2, 3)).float() * scaling
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1).to(values.dtype) @ values


def _mask(group: _Group, sliding_window: int | None) -> Tensor | None:
    """[num_seqs, 1, num_queries, max_context] bool, True where a query sees a position."""
    if sliding_window not in group.masks:
        group.masks[sliding_window] = _build_mask(group, sliding_window)
    return group.masks[sliding_window]


def _build_mask(group: _Group, sliding_window: int | None) -> Tensor | None:
    reaches_all = sliding_window is None or sliding_window >= group.max_context
    if group.num_queries == 1 and not group.is_ragged and reaches_all:
        return None
    device = group.context_lens.device
    queries = torch.arange(-group.num_queries, 0, device=device) + group.context_lens[:, None]
    positions = torch.arange(group.max_context, device=device)
    mask = positions <= queries[:, :, None]
    if sliding_window is not None:
        mask &= positions > queries[:, :, None] - sliding_window
    return mask[:, None]


# LoRA


class DenseLora:
    """One adapter after the other."""

    def __init__(self, runs: Ints, weights: SlotWeights) -> None:
        """`runs`: as `Batch.slot_runs`."""
        self._runs = [(slice(start, end), slot) for start, end, slot in runs.tolist()]
        self._weights = weights
        self._affine_modules = weights.affine_modules(runs[:, 2])

    def apply(self, out: Tensor, x: Tensor, *, module: int) -> None:
        """As `LoraPlan.apply`; an adapter may have fewer outputs than `out` has columns."""
        if module in self._affine_modules:
            self._scale_and_shift(out, module)
        self.add(out, x, module=module)

    def add(self, out: Tensor, x: Tensor, *, module: int) -> None:
        """out += lora(x), as `reference.lora`."""
        for rows, slot in self._runs:
            pair = self._weights.pair(module, slot)
            if pair is not None:
                lora_A, lora_B = pair
                _columns(out[rows], lora_B.shape[1]).addmm_(linear(x[rows], lora_A), lora_B)

    def _scale_and_shift(self, out: Tensor, module: int) -> None:
        for rows, slot in self._runs:
            affine = self._weights.affine(module, slot)
            if affine is not None:
                gain, shift = affine
                _columns(out[rows], len(gain)).mul_(gain).add_(shift)


def _columns(out: Tensor, num: int) -> Tensor:
    """The first `num`."""
    return out if out.shape[1] == num else out[:, :num]
