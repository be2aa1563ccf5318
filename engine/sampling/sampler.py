"""Choose the next token of each sequence that a step has brought to its end.

Knows logits and sequences. Knows nothing of what the tokens mean, or of why these were scheduled.
"""

import math
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from engine.errors import InvalidLogits
from engine.sampling import logprobs
from engine.sampling.rows import Positions, Rows
from engine.scheduler import SampledToken, ScheduledSequence
from engine.sequence import Sequence

_token_ids = attrgetter("token_ids")


class Sampler:
    """Keeps the parameters of the rows it sampled last as tensors. Mutable; one thread.

    A step whose rows are those of the step before makes no tensor of parameters, and runs no Python
    per row; a step with others starts afresh. A sequence's tokens depend on its own logits, its
    parameters and its position alone, so what is kept changes nothing but the time.
    """

    def __init__(self) -> None:
        self._rows: Rows | None = None

    @torch.inference_mode()
    def sample(self, logits: Tensor, scheduled: list[ScheduledSequence]) -> list[SampledToken]:
        """One token for each `is_sampled`, in order; adds to `prompt_logprobs` where asked for.

        logits: [num_rows, vocab_size] float32 of the batch's `logit_rows`. They stay as they are.
        """
        sequences = [item.sequence for item in scheduled if item.is_sampled]
        asking = [item for item in scheduled if item.sequence.prompt_logprobs is not None]
        if asking:
            logprobs.score_prompts(logits[len(sequences) :], asking)
        if not sequences:
            return []
        samples = self._rows_of(sequences, logits).sample(logits[: len(sequences)])
        return _without_invalid_prompts(samples, sequences) if asking else samples

    def _rows_of(self, sequences: list[Sequence], logits: Tensor) -> Rows:
        positions: Positions = np.fromiter(
            map(len, map(_token_ids, sequences)), dtype=np.int64, count=len(sequences)
        )
        vocab_size = logits.shape[1]
        if self._rows is None or not self._rows.go_on(sequences, positions, vocab_size=vocab_size):
            self._rows = Rows(sequences, positions, logits=logits)
        return self._rows


def _without_invalid_prompts(
    samples: list[SampledToken], sequences: list[Sequence]
) -> list[SampledToken]:
    """A prompt that got NaN somewhere is as invalid as an answer that did."""
    return [
        SampledToken(sample.token_id, InvalidLogits()) if _is_invalid(sequence) else sample
        for sample, sequence in zip(samples, sequences, strict=True)
    ]


def _is_invalid(sequence: Sequence) -> bool:
    return math.isnan(sum(found.logprob for found in sequence.prompt_logprobs or ()))
