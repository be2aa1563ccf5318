"""Draw from scaled logits by the Gumbel-max rule, within the limits of each row.

Knows rows of numbers and their noise. Knows nothing of sequences or of what was done before.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from engine.protocol import SamplingParams
from engine.sampling.logprobs import likeliest
from engine.sampling.noise import gumbel_noise

# Candidates that are sorted for a row's limits; the whole vocabulary where they don't do.
MIN_CANDIDATES = 1024


def num_candidates(params: SamplingParams, vocab_size: int) -> int:
    """How many tokens to sort first; 0 for no limits. A matter of the row alone, not its batch."""
    if not params.top_k and params.top_p == 1 and not params.min_p:
        return 0
    return vocab_size if params.top_k >= MIN_CANDIDATES else min(MIN_CANDIDATES, vocab_size)


@dataclass(frozen=True, slots=True)
class Limits:
    """Which tokens of a row may be drawn: by rank, by the mass before them, by their own."""

    # [num_rows, 1] int64, the vocabulary's size for no limit
    top_k: Tensor
    # [num_rows, 1] float64, infinite for no limit
    top_p: Tensor
    # [num_rows, 1] float32, least distance to the likeliest; -inf for no limit
    floor: Tensor

    @classmethod
    def of(cls, params: list[SamplingParams], *, vocab_size: int, device: torch.device) -> Self:
        top_k = [min(p.top_k or vocab_size, vocab_size) for p in params]
        top_p = [p.top_p if p.top_p < 1 else math.inf for p in params]
        floor = [math.log(p.min_p) if p.min_p else -math.inf for p in params]
        return cls(
            torch.tensor(top_k, device=device)[:, None],
            torch.tensor(top_p, dtype=torch.float64, device=device)[:, None],
            torch.tensor(floor, dtype=torch.float32, device=device)[:, None],
        )

    def of_rows(self, rows: Tensor) -> "Limits":
        return Limits(self.top_k[rows], self.top_p[rows], self.floor[rows])


def draw(scaled: Tensor, streams: Tensor) -> Tensor:
    """[num_rows] int64, from the whole vocabulary.

    scaled: [num_rows, vocab_size] float32, 0 for the likeliest; streams: [num_rows] of the noise.
    """
    token_ids = torch.arange(scaled.shape[1], device=scaled.device)
    return gumbel_noise(streams, token_ids[None]).add_(scaled).argmax(dim=-1)


def draw_limited(scaled: Tensor, streams: Tensor, limits: Limits, *, num_candidates: int) -> Tensor:
    """As `draw`, from what the limits leave; they apply in the order of `reference.kept_tokens`."""
    values, token_ids, cut = likeliest(scaled, num_candidates)
    is_out, is_enough = _left_out(scaled, values, token_ids, cut=cut, limits=limits)
    values.masked_fill_(is_out, -math.inf)
    winner = gumbel_noise(streams, token_ids).add_(values).argmax(dim=-1, keepdim=True)
    chosen = token_ids.gather(1, winner)[:, 0]
    if not bool(is_enough.all()):
        rows = (~is_enough).nonzero()[:, 0]
        chosen[rows] = draw_limited(
            scaled[rows], streams[rows], limits.of_rows(rows), num_candidates=scaled.shape[1]
        )
    return chosen


def _left_out(
    scaled: Tensor, values: Tensor, token_ids: Tensor, *, cut: Tensor, limits: Limits
) -> tuple[Tensor, Tensor]:
    """Which candidates the limits leave out, and for which rows these candidates are enough.

    [num_rows, num_candidates] and [num_rows], bool.
    """
    known = values > -math.inf
    mass = torch.softmax(scaled, dim=-1).gather(1, token_ids).masked_fill_(~known, 0)
    mass = mass.cumsum(dim=-1, dtype=torch.float64)
    mass_before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=-1)
    has_top_k = limits.top_k < scaled.shape[1]
    mass_of_top_k = mass.gather(1, limits.top_k.clamp(max=values.shape[1]) - 1)
    enough_mass = limits.top_p * torch.where(has_top_k, mass_of_top_k, 1.0)
    ranks = torch.arange(values.shape[1], device=values.device)
    is_out = (ranks >= limits.top_k) | (mass_before >= enough_mass) | (values < limits.floor)
    # Rounding must not leave out the likeliest too.
    is_out[:, 0] = False
    reaches_rank = known.sum(dim=-1, keepdim=True) >= limits.top_k
    reaches_end = (mass[:, -1:] >= enough_mass) | (cut < limits.floor)
    is_enough = torch.where(has_top_k, reaches_rank, reaches_end) | (cut == -math.inf)
    return is_out, is_enough[:, 0]
