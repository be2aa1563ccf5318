"""Choose the next token of each row.

Knows logits, sampling parameters and positions. Knows nothing of what the tokens mean.

The noise of a row depends on (seed, position, token id) alone: a sequence draws the same tokens by
itself, in any batch, after a preemption and on another replica.
"""

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from engine.protocol import SamplingParams, TokenLogprob
from engine.scheduler import SampledToken

# Fewest candidates that are sorted for top_k and top_p; the whole vocabulary where they don't do.
MIN_CANDIDATES = 1024

_WORD = 0xFFFFFFFFFFFFFFFF
_STEP = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def sample(
    logits: Tensor, params: Items[SamplingParams], positions: Items[int]
) -> list[SampledToken]:
    """One token for each row of `logits` [num_rows, vocab_size], float32.

    `positions[row]` is the place that the token will have in its sequence.
    """
    if not params:
        return []
    is_valid = torch.isfinite(logits.amax(dim=-1))
    valid_rows: list[bool] = is_valid.tolist()
    if not all(valid_rows):
        logits = logits.masked_fill(~is_valid[:, None], 0)
    chosen = _choose(logits, params, positions)
    token_ids: list[int] = chosen.tolist()
    logprobs = _logprobs(logits, chosen, params)
    return [
        SampledToken(token_id, is_valid=valid, logprob=logprobs.get(row))
        for row, (token_id, valid) in enumerate(zip(token_ids, valid_rows, strict=True))
    ]


def _choose(logits: Tensor, params: Items[SamplingParams], positions: Items[int]) -> Tensor:
    """[num_rows] int64"""
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, p in enumerate(params) if p.temperature > 0]
    for draw, rows in (
        (_draw, [row for row in drawn if not _is_limited(params[row])]),
        (_draw_limited, [row for row in drawn if _is_limited(params[row])]),
    ):
        if rows:
            own = [params[row] for row in rows]
            index = torch.tensor(rows, device=logits.device)
            scaled = logits[index] / _column([p.temperature for p in own], logits)
            starts = [_stream(params[row].seed, positions[row]) for row in rows]
            streams = torch.tensor(starts, dtype=torch.int64, device=logits.device)
            chosen[index] = draw(scaled, streams, own)
    return chosen


def _is_limited(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1


def _draw(scaled: Tensor, streams: Tensor, params: Items[SamplingParams]) -> Tensor:
    """From the whole vocabulary, by the Gumbel-max rule."""
    token_ids = torch.arange(scaled.shape[1], device=scaled.device)
    return (scaled + gumbel_noise(streams, token_ids[None])).argmax(dim=-1)


def _draw_limited(scaled: Tensor, streams: Tensor, params: Items[SamplingParams]) -> Tensor:
    """From the `top_k` likeliest, and of those from the likeliest that make up `top_p`."""
    vocab_size = scaled.shape[1]
    top_k = _column([min(p.top_k or vocab_size, vocab_size) for p in params], scaled)
    top_p = _column([p.top_p for p in params], scaled)
    limited = [p.top_k for p in params if p.top_k]
    num_candidates = min(vocab_size, max(MIN_CANDIDATES, *(k + 1 for k in limited), 1))
    kept = _keep(*_likeliest(scaled, num_candidates), scaled, top_k=top_k, top_p=top_p)
    if kept is None:
        kept = _keep(*_likeliest(scaled, vocab_size), scaled, top_k=top_k, top_p=top_p)
    assert kept is not None
    values, token_ids = kept
    winner = (values + gumbel_noise(streams, token_ids)).argmax(dim=-1, keepdim=True)
    return token_ids.gather(1, winner)[:, 0]


def _likeliest(scaled: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Values and token ids, the likeliest first and of equals the lower id first.

    Of fewer candidates than there are tokens, those that equal the last become -inf: which of the
    equals `topk` picks is not defined.
    """
    if num_candidates == scaled.shape[1]:
        values, token_ids = scaled.sort(dim=-1, descending=True, stable=True)
        return values, token_ids
    values, token_ids = scaled.topk(num_candidates, dim=-1)
    values = values.masked_fill(values == values[:, -1:], float("-inf"))
    token_ids, order = token_ids.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, token_ids.gather(1, order)


def _keep(
    values: Tensor, token_ids: Tensor, scaled: Tensor, *, top_k: Tensor, top_p: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The candidates with -inf for those that the limits leave out; None if more are needed."""
    vocab_size = scaled.shape[1]
    ranks = torch.arange(values.shape[1], device=values.device)
    values = values.masked_fill(ranks >= top_k, float("-inf"))
    total = torch.where(
        top_k < vocab_size,
        values.logsumexp(dim=-1, keepdim=True),
        scaled.logsumexp(dim=-1, keepdim=True),
    )
    mass = (values - total).exp().cumsum(dim=-1)
    if values.shape[1] < vocab_size:
        num_finite = torch.isfinite(values).sum(dim=-1, keepdim=True)
        is_enough = torch.where(top_k < vocab_size, num_finite >= top_k, mass[:, -1:] >= top_p)
        if not bool(is_enough.all()):
            return None
    mass_before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=-1)
    left_out = mass_before >= top_p
    left_out[:, 0] = False
    return values.masked_fill(left_out, float("-inf")), token_ids


def gumbel_noise(streams: Tensor, token_ids: Tensor) -> Tensor:
    """As `reference.gumbel_noise`.

    streams: [num_rows] int64 of `_stream`; token_ids: [num_rows or 1, num_tokens]. Gives
    [num_rows, num_tokens] float32. int64 wraps like the unsigned words of the definition do.
    """
    z = (token_ids + 1) * _signed(_STEP) + streams[:, None]
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        z ^= (z >> shift) & (_WORD >> shift)
        z *= _signed(factor)
    z ^= (z >> 31) & (_WORD >> 31)
    bits = (z >> 32) & 0xFFFFFFFF
    # Small u are the large noise, and float32 is finest there. Below 1, or the noise were -inf.
    u = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


def _stream(seed: int, position: int) -> int:
    """Where the noise of a place starts, as int64."""
    return _signed(_mix64(_mix64(seed) + position))


def _mix64(z: int) -> int:
    z &= _WORD
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        z = (z ^ (z >> shift)) * factor & _WORD
    return z ^ (z >> 31)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _column(values: Items[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _logprobs(
    logits: Tensor, chosen: Tensor, params: Items[SamplingParams]
) -> dict[int, TokenLogprob]:
    """By row, for the rows that ask."""
    rows = [row for row, p in enumerate(params) if p.logprobs is not None]
    if not rows:
        return {}
    index = torch.tensor(rows, device=logits.device)
    table = torch.log_softmax(logits[index], dim=-1)
    own = table.gather(1, chosen[index, None])[:, 0].tolist()
    num_top = max(params[row].logprobs or 0 for row in rows)
    values, token_ids = (t.tolist() for t in table.topk(min(num_top, table.shape[1]), dim=-1))
    return {
        row: TokenLogprob(
            own[i], list(zip(token_ids[i], values[i], strict=True))[: params[row].logprobs]
        )
        for i, row in enumerate(rows)
    }
