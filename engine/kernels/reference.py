"""The definition of every operation: what the fast ones must equal.

One row, one sequence at a time, in float32. Used by tests and by nothing that is in a hurry.
"""

import math

import torch
from torch import Tensor

from engine.sequence import NO_ADAPTER


def write_kv(cache: Tensor, new: Tensor, cache_rows: Tensor) -> None:
    """cache[cache_rows[t]] = new[t].

    cache: [num_blocks, block_size, num_kv_heads, head_dim], changed in place.
    new: [num_tokens, num_kv_heads, head_dim].
    cache_rows: [num_tokens], block * block_size + offset.
    """
    block_size = cache.shape[1]
    for token, row in enumerate(cache_rows.tolist()):
        cache[row // block_size, row % block_size] = new[token]


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    block_tables: Tensor,
    query_starts: tuple[int, ...],
    context_lens: tuple[int, ...],
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(softcap(query · keyᵀ · scaling) + mask) · value, for each sequence by itself.

    The last query of a sequence stands at position context_len - 1; a query sees the positions up
    to its own, and with a sliding window only the last `sliding_window` of them.

    query: [num_tokens, num_heads, head_dim]. Caches: [num_blocks, block_size, num_kv_heads,
    head_dim]. block_tables: [num_seqs, max_blocks]. Gives [num_tokens, num_heads, value_dim].
    """
    rows = []
    for index, context in enumerate(context_lens):
        start, end = query_starts[index], query_starts[index + 1]
        keys = key_cache[block_tables[index]].flatten(0, 1)[:context].float()
        values = value_cache[block_tables[index]].flatten(0, 1)[:context].float()
        for row in range(start, end):
            last = context - (end - row)
            first = 0 if sliding_window is None else max(0, last + 1 - sliding_window)
            rows.append(
                _attend(
                    query[row].float(),
                    keys[first : last + 1],
                    values[first : last + 1],
                    scaling=scaling,
                    softcap=softcap,
                )
            )
    return torch.stack(rows).to(query.dtype)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, *, scaling: float, softcap: float | None
) -> Tensor:
    """query: [num_heads, head_dim]; keys, values: [context, num_kv_heads, head_dim]."""
    group = query.shape[0] // keys.shape[1]
    scores = torch.einsum("hd,chd->hc", query, keys.repeat_interleave(group, dim=1)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores, dim=-1)
    return torch.einsum("hc,chd->hd", weights, values.repeat_interleave(group, dim=1))


def lora(x: Tensor, adapters: dict[int, tuple[Tensor, Tensor]], token_slots: Tensor) -> Tensor:
    """lora_B[slot] · (lora_A[slot] · x[t]), scaling already inside lora_B; zero without adapter.

    x: [num_tokens, in_features]. adapters: slot -> (lora_A [rank, in_features], lora_B
    [out_features, rank]). token_slots: [num_tokens]. Gives [num_tokens, out_features] float32.
    """
    out_features = next(iter(adapters.values()))[1].shape[0]
    out = torch.zeros(x.shape[0], out_features, dtype=torch.float32, device=x.device)
    for row, slot in enumerate(token_slots.tolist()):
        if slot != NO_ADAPTER and slot in adapters:
            lora_A, lora_B = adapters[slot]
            out[row] = lora_B.float() @ (lora_A.float() @ x[row].float())
    return out


def gumbel_noise(seed: int, position: int, token_id: int) -> float:
    """-log(-log(1 - u)), u from output `token_id` of a SplitMix64 stream of its own per position.

    SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).
    """
    stream = _mix64(_mix64(seed) + position)
    bits = _mix64(stream + (token_id + 1) * 0x9E3779B97F4A7C15) >> 32
    u = min((bits + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -math.log(-math.log1p(-u))


def _mix64(z: int) -> int:
    z &= 0xFFFFFFFFFFFFFFFF
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)
