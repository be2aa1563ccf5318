"""Tell how likely tokens were, and which were the likeliest, by the model's own distribution."""

import math

import torch
from torch import Tensor

from engine.protocol import TokenLogprob
from engine.scheduler import ScheduledSequence

# Rows of a prompt that are normalised at once, so that a long one doesn't double its memory.
MAX_ROWS_AT_ONCE = 256


def likeliest(scores: Tensor, num_candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and token ids, the likeliest first and of equals the lower id first, and the cut.

    scores: [num_rows, vocab_size]; gives two [num_rows, num_candidates] and [num_rows, 1]. No
    token that is left out scores above the cut. Of fewer candidates than there are tokens, those
    that equal the cut become -inf: which of the equals `topk` picks is not defined.
    """
    if num_candidates == scores.shape[1]:
        values, token_ids = scores.sort(dim=-1, descending=True, stable=True)
        return values, token_ids, torch.full_like(values[:, :1], -math.inf)
    values, token_ids = scores.topk(num_candidates, dim=-1)
    cut = values[:, -1:]
    values = values.masked_fill(values == cut, -math.inf)
    token_ids, order = token_ids.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, token_ids.gather(1, order), cut


def of_tokens(logits: Tensor, token_ids: Tensor, *, nums_top: list[int]) -> list[TokenLogprob]:
    """One for each row: its token's, and of its `nums_top` likeliest.

    logits: [num_rows, vocab_size] float32; token_ids: [num_rows].
    """
    table = torch.log_softmax(logits, dim=-1)
    own: list[float] = table.gather(1, token_ids[:, None])[:, 0].tolist()
    values, ids = (t.tolist() for t in _first(table, min(max(nums_top), table.shape[1])))
    return [
        TokenLogprob(logprob, list(zip(row_ids, row_values, strict=True))[:num_top])
        for logprob, row_ids, row_values, num_top in zip(own, ids, values, nums_top, strict=True)
    ]


def _first(table: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The first `num` of `likeliest`, equals at the end included."""
    if num == 0:
        return table[:, :0], table[:, :0]
    # One more than is asked for shows whether another equals the last.
    values, token_ids, cut = likeliest(table, min(num + 1, table.shape[1]))
    if bool((values[:, num - 1 : num] < cut).any()):
        values, token_ids, _ = likeliest(table, table.shape[1])
    return values[:, :num], token_ids[:, :num]


def score_prompts(logits: Tensor, scheduled: list[ScheduledSequence]) -> None:
    """Add to each sequence's `prompt_logprobs` what its rows of this step tell.

    logits: [num_rows, vocab_size], a row for each of the `scored_positions`, in order.
    """
    start = 0
    for item in scheduled:
        places = item.scored_positions
        _score_prompt(logits[start : start + len(places)], item, places)
        start += len(places)


def _score_prompt(logits: Tensor, item: ScheduledSequence, places: range) -> None:
    found, num_top = item.sequence.prompt_logprobs, item.sequence.sampling.prompt_logprobs
    assert found is not None
    assert num_top is not None
    assert not places or places.start == len(found), "a prompt token was passed over"
    # A position's logits tell of the token that follows it.
    next_ids = torch.tensor(
        item.sequence.token_ids[places.start + 1 : places.stop + 1], dtype=torch.int64
    ).to(logits.device)
    for start in range(0, len(places), MAX_ROWS_AT_ONCE):
        ids = next_ids[start : start + MAX_ROWS_AT_ONCE]
        rows = logits[start : start + MAX_ROWS_AT_ONCE]
        found += of_tokens(rows, ids, nums_top=[num_top] * len(ids))
