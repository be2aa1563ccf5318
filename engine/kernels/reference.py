"""The definition of every operation: what the fast ones must equal.

One row, one sequence at a time, in float32. Used by tests and by nothing that is in a hurry.
"""

import math

import torch
from torch import Tensor

from engine.protocol import SamplingParams
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


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (offset + weight), row by row.

    Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019). x: [..., dim]. weight: [dim];
    `offset` is 1 where a model keeps what it differs from one.
    """
    rows = x.float()
    scale = torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + eps)
    return (rows * scale * (offset + weight.float())).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x · cos + (-second half, first half) · sin, of as many dims as `cos` has; the rest as it is.

    Su et al., "RoFormer" (2021). x: [num_tokens, heads, head_dim]. cos, sin: [num_tokens, dims].
    """
    turned, rest = x[..., : cos.shape[1]].float(), x[..., cos.shape[1] :]
    first, second = turned.chunk(2, dim=-1)
    halves = torch.cat([-second, first], dim=-1)
    turned = turned * cos.float()[:, None] + halves * sin.float()[:, None]
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate · sigmoid(gate) · up. Shazeer, "GLU Variants Improve Transformer" (2020)."""
    return (gate.float() * torch.sigmoid(gate.float()) * up.float()).to(gate.dtype)


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


def affine(out: Tensor, adapters: dict[int, tuple[Tensor, Tensor]], token_slots: Tensor) -> Tensor:
    """gain[slot] * out[t] + shift[slot]; what it is without adapter.

    DoRA's norms and an adapter's own biases: Liu et al., "DoRA" (2024). out: [num_tokens,
    out_features]. adapters: slot -> (gain, shift), both [out_features]. token_slots: [num_tokens].
    """
    rows = out.clone()
    for row, slot in enumerate(token_slots.tolist()):
        if slot != NO_ADAPTER and slot in adapters:
            gain, shift = adapters[slot]
            rows[row] = (gain.float() * out[row].float() + shift.float()).to(out.dtype)
    return rows


def sampled_token(
    logits: Tensor, params: SamplingParams, *, prompt: list[int], generated: list[int]
) -> int:
    """The likeliest token, or with a temperature the Gumbel-max draw from those that are kept.

    logits: [vocab_size]. Of equals the lower id is taken.
    """
    adjusted = adjusted_logits(logits, params, prompt=prompt, generated=generated)
    if params.temperature == 0:
        return max(range(len(adjusted)), key=lambda i: (adjusted[i], -i))
    scaled = [logit / params.temperature for logit in adjusted]
    position = len(prompt) + len(generated)
    return max(
        kept_tokens(scaled, params),
        key=lambda i: (scaled[i] + gumbel_noise(params.seed, position, i), -i),
    )


def adjusted_logits(
    logits: Tensor, params: SamplingParams, *, prompt: list[int], generated: list[int]
) -> list[float]:
    """Repetition penalty, frequency and presence penalties, biases, then the ban on stop tokens.

    Repetition: Keskar et al., "CTRL" (2019), over prompt and answer, with its sign mended for
    negative logits. The other two count generated tokens alone.
    """
    adjusted = logits.tolist()
    for i in {*prompt, *generated}:
        factor = params.repetition_penalty
        adjusted[i] = adjusted[i] / factor if adjusted[i] > 0 else adjusted[i] * factor
    for i in set(generated):
        adjusted[i] -= params.frequency_penalty * generated.count(i) + params.presence_penalty
    for i, bias in params.logit_bias.items():
        adjusted[i] += bias
    for i in params.stop_token_ids:
        if len(generated) < params.min_tokens and i < len(adjusted):
            adjusted[i] = -math.inf
    return adjusted


def kept_tokens(scaled: list[float], params: SamplingParams) -> list[int]:
    """The `top_k` likeliest; of those the likeliest that make up `top_p`; of those by `min_p`.

    top_p: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020). min_p: Nguyen et
    al., "Turning Up the Heat" (2024). The likeliest first; of equals the lower id.
    """
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))[: params.top_k or None]
    probabilities = torch.softmax(torch.tensor(scaled, dtype=torch.float64)[order], dim=0).tolist()
    kept: list[int] = []
    mass = 0.0
    for token_id, probability in zip(order, probabilities, strict=True):
        is_wanted = mass < params.top_p or params.top_p == 1
        if not kept or (is_wanted and probability >= params.min_p * probabilities[0]):
            kept.append(token_id)
        mass += probability
    return kept


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
