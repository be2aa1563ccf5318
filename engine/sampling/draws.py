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

# Candidates that are sorted for a row's limits at first, and how many times more where they don't
# do. Sorting 256 of 49,152 takes a third of the time of 1,024, and few rows need more.
MIN_CANDIDATES = 256
MORE_CANDIDATES = 8
# Tokens whose noise is computed at once: little enough to stay in a CPU's cache, which halves the
# time; a GPU rather wants few launches.
TILE_TOKENS = {"cpu": 4096, "cuda": 65_536}


def num_candidates(params: SamplingParams, vocab_size: int) -> int:
    """How many tokens to sort first; 0 for no limits. A matter of the row alone, not its batch."""
    if not params.top_k and params.top_p == 1 and not params.min_p:
        return 0
    num = MIN_CANDIDATES
    # One more than top_k, or a tie at its end could not be seen.
    while num <= params.top_k:
        num *= MORE_CANDIDATES
    return min(num, vocab_size)


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


@dataclass(frozen=True, slots=True)
class Scaling:
    """How logits become what is drawn from: (logit - peak) / temperature."""

    # [num_rows, 1] float32, the largest logit; without it a temperature near zero would overflow
    peaks: Tensor
    # [num_rows, 1] float32
    temperature: Tensor

    def apply(self, logits: Tensor) -> Tensor:
        return (logits - self.peaks).div_(self.temperature)


def draw(logits: Tensor, streams: Tensor, *, rows: Tensor, scaling: Scaling) -> Tensor:
    """[num_rows] int64, from the whole vocabulary.

    logits: [any number, vocab_size] float32, of which `rows` [num_rows] are drawn from; streams:
    [num_rows], where their noise starts.
    """
    best = torch.full_like(scaling.peaks[:, 0], -math.inf)
    chosen = torch.zeros_like(rows)
    token_ids = torch.arange(logits.shape[1], device=logits.device)
    width = TILE_TOKENS[logits.device.type]
    for start in range(0, logits.shape[1], width):
        scaled = scaling.apply(logits[:, start : start + width].index_select(0, rows))
        noise = gumbel_noise(streams, token_ids[None, start : start + width])
        values, places = noise.add_(scaled).max(dim=-1)
        chosen = torch.where(values > best, places + start, chosen)
        best = torch.maximum(best, values)
    return chosen


def draw_limited(scaled: Tensor, streams: Tensor, limits: Limits, *, num_candidates: int) -> Tensor:
    """[num_rows] int64, from what the limits leave, in the order of `reference.kept_tokens`.

    scaled: [num_rows, vocab_size] float32, 0 for the likeliest; streams: [num_rows] of the noise.
    """
    values, token_ids, cut = likeliest(scaled, num_candidates)
    is_out, is_enough = _left_out(scaled, values, token_ids, cut=cut, limits=limits)
    values.masked_fill_(is_out, -math.inf)
    winner = gumbel_noise(streams, token_ids).add_(values).argmax(dim=-1, keepdim=True)
    chosen = token_ids.gather(1, winner)[:, 0]
    if not bool(is_enough.all()):
        rows = (~is_enough).nonzero()[:, 0]
        num_more = min(MORE_CANDIDATES * num_candidates, scaled.shape[1])
        chosen[rows] = draw_limited(
            scaled[rows], streams[rows], limits.of_rows(rows), num_candidates=num_more
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
