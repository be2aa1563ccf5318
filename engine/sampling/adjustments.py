"""Change the raw logits of a group of rows as their parameters ask: penalties, biases, bans.

Counts of earlier tokens are kept from step to step: made once from the tokens that a sequence has,
then grown by one token per step. Knows nothing of temperature or of draws.
"""

import math
from collections.abc import Callable
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from engine.protocol import SamplingParams
from engine.sequence import Sequence

# Position of the first token that is past every ban.
_NEVER = 2**62


def has_any(sequence: Sequence) -> bool:
    """Whether a row's logits are not taken as they are."""
    return bool(
        _has_repetition_penalty(sequence.sampling)
        or _has_count_penalty(sequence.sampling)
        or sequence.sampling.logit_bias
        or _is_banned_from_ending(sequence)
    )


class Adjustments:
    """Those of the same rows, while the rows stay the same. Mutable; one thread."""

    def __init__(self, sequences: list[Sequence], *, vocab_size: int, device: torch.device) -> None:
        self._repetition = _RepetitionPenalty(sequences, vocab_size=vocab_size, device=device)
        self._counts = _CountPenalties(sequences, vocab_size=vocab_size, device=device)
        self._additions = _Additions(sequences, vocab_size=vocab_size, device=device)

    def apply_(self, logits: Tensor, positions: Tensor) -> None:
        """In place, in the order of `reference.adjusted_logits`.

        logits: [num_rows, vocab_size]; positions: [num_rows], place of the token to be chosen.
        """
        self._repetition.apply_(logits)
        self._counts.apply_(logits)
        self._additions.apply_(logits, positions)

    def count(self, token_ids: Tensor) -> None:
        """The rows got these tokens, [num_rows]."""
        self._repetition.count(token_ids)
        self._counts.count(token_ids)


class _RepetitionPenalty:
    """logit / penalty, or logit * penalty where it is negative, of all tokens that were there."""

    def __init__(self, sequences: list[Sequence], *, vocab_size: int, device: torch.device) -> None:
        own, self._rows = _select(sequences, _has_repetition_penalty, device=device)
        if own:
            counts = _counts([s.token_ids for s in own], vocab_size=vocab_size, device=device)
            self._penalty = _column([s.sampling.repetition_penalty for s in own], device=device)
            # [num_own, vocab_size] float32, 1 for a token that was not there
            self._penalties = torch.where(counts > 0, self._penalty, 1.0)

    def apply_(self, logits: Tensor) -> None:
        if len(self._rows):
            own = logits.index_select(0, self._rows)
            divided, is_positive = own / self._penalties, own > 0
            own = torch.where(is_positive, divided, own.mul_(self._penalties))
            logits.index_copy_(0, self._rows, own)

    def count(self, token_ids: Tensor) -> None:
        if len(self._rows):
            self._penalties.scatter_(1, token_ids[self._rows, None], self._penalty)


class _CountPenalties:
    """logit - frequency * count - presence * (count > 0), counting generated tokens alone."""

    def __init__(self, sequences: list[Sequence], *, vocab_size: int, device: torch.device) -> None:
        own, self._rows = _select(sequences, _has_count_penalty, device=device)
        if own:
            generated = [s.token_ids[s.num_prompt_tokens :] for s in own]
            self._frequency = _column([s.sampling.frequency_penalty for s in own], device=device)
            self._presence = _column([s.sampling.presence_penalty for s in own], device=device)
            self._one = torch.ones_like(self._presence)
            # Both [num_own, vocab_size] float32
            self._counts = _counts(generated, vocab_size=vocab_size, device=device).float()
            self._penalties = self._of_counts(self._counts)

    def apply_(self, logits: Tensor) -> None:
        if len(self._rows):
            logits.index_add_(0, self._rows, self._penalties, alpha=-1)

    def count(self, token_ids: Tensor) -> None:
        if len(self._rows):
            tokens = token_ids[self._rows, None]
            self._counts.scatter_add_(1, tokens, self._one)
            self._penalties.scatter_(1, tokens, self._of_counts(self._counts.gather(1, tokens)))

    def _of_counts(self, counts: Tensor) -> Tensor:
        return counts * self._frequency + counts.clamp(max=1) * self._presence


class _Additions:
    """logit + bias; a stop token that comes too early is added -inf."""

    def __init__(self, sequences: list[Sequence], *, vocab_size: int, device: torch.device) -> None:
        entries = [
            *chain.from_iterable(_biases(row, s) for row, s in enumerate(sequences)),
            *chain.from_iterable(_bans(row, s, vocab_size) for row, s in enumerate(sequences)),
        ]
        self._is_empty = not entries
        if entries:
            rows, token_ids, values, ends = zip(*entries, strict=True)
            self._rows = torch.tensor(rows, device=device)
            self._token_ids = torch.tensor(token_ids, device=device)
            self._values = torch.tensor(values, dtype=torch.float32, device=device)
            self._ends = torch.tensor(ends, device=device)

    def apply_(self, logits: Tensor, positions: Tensor) -> None:
        if not self._is_empty:
            is_active = positions[self._rows] < self._ends
            values = self._values.masked_fill(~is_active, 0)
            logits.index_put_((self._rows, self._token_ids), values, accumulate=True)


# Row within the group, token id, what is added, first position where it no longer is.
_Entry = tuple[int, int, float, int]


def _biases(row: int, sequence: Sequence) -> list[_Entry]:
    return [(row, i, bias, _NEVER) for i, bias in sequence.sampling.logit_bias.items()]


def _bans(row: int, sequence: Sequence, vocab_size: int) -> list[_Entry]:
    if not _is_banned_from_ending(sequence):
        return []
    end = sequence.num_prompt_tokens + sequence.sampling.min_tokens
    # What the model can't say needs no ban, and has no logit.
    banned = [i for i in sequence.sampling.stop_token_ids if 0 <= i < vocab_size]
    return [(row, i, -math.inf, end) for i in banned]


def _is_banned_from_ending(sequence: Sequence) -> bool:
    """A grammar's own masks see to that, for they know when nothing else may come."""
    is_early = sequence.num_generated_tokens < sequence.sampling.min_tokens
    return is_early and sequence.walk is None


def _has_repetition_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1


def _has_count_penalty(params: SamplingParams) -> bool:
    return bool(params.frequency_penalty or params.presence_penalty)


def _select(
    sequences: list[Sequence], is_own: Callable[[SamplingParams], bool], *, device: torch.device
) -> tuple[list[Sequence], Tensor]:
    rows = [row for row, sequence in enumerate(sequences) if is_own(sequence.sampling)]
    return [sequences[row] for row in rows], torch.tensor(rows, dtype=torch.int64, device=device)


def _counts(tokens: list[list[int]], *, vocab_size: int, device: torch.device) -> Tensor:
    """[num_rows, vocab_size] int64: how often each row has each token."""
    lengths = [len(row) for row in tokens]
    ids = np.fromiter(chain.from_iterable(tokens), dtype=np.int64, count=sum(lengths))
    ids += np.repeat(np.arange(len(tokens)) * vocab_size, lengths)
    flat = torch.from_numpy(ids).to(device)
    return torch.bincount(flat, minlength=len(tokens) * vocab_size).view(-1, vocab_size)


def _column(values: list[float], *, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]
