"""The sampled rows of a step, their parameters as tensors for as long as they stay the same.

Rows that are treated alike form a group: greedy ones as they are, greedy ones after adjustments,
draws from the whole vocabulary and draws within limits, those with a grammar by themselves. A row
costs what its own group costs.
Knows how a token is chosen. Knows nothing of schedules.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.errors import InvalidLogits, NoTokenLeft, SequenceError
from engine.protocol import SamplingParams, TokenLogprob
from engine.sampling import adjustments, draws, logprobs
from engine.sampling.adjustments import Adjustments
from engine.sampling.draws import Limits, Scaling
from engine.sampling.masks import Masks
from engine.sampling.noise import mixed_seeds, streams
from engine.scheduler import SampledToken
from engine.sequence import Sequence

Positions = np.ndarray[tuple[int], np.dtype[np.int64]]

# Nearer to zero, a temperature is as good as zero; float32 could not divide by it.
MIN_TEMPERATURE = 1e-30

# What was wrong with a row, as `Rows` keeps it on the device.
_FINE, _INVALID, _NOTHING_LEFT = 0, 1, 2


class Rows:
    """The rows of some sequences, in their order. Mutable; one thread."""

    def __init__(self, sequences: list[Sequence], positions: Positions, *, logits: Tensor) -> None:
        """`logits` shows the vocabulary's size and the device."""
        self._sequences = sequences
        self._positions = positions
        self._vocab_size = logits.shape[1]
        # None where no row has a grammar.
        self._masks = Masks.of(sequences, vocab_size=logits.shape[1], device=logits.device)
        kinds = _grouped(sequences, logits.shape[1])
        self._groups = [
            _Group(
                sequences,
                rows,
                is_adjusted=kind.is_adjusted,
                is_drawn=kind.is_drawn,
                masks=self._masks if kind.is_masked else None,
                logits=logits,
            )
            for kind, rows in kinds.items()
            if kind != _PLAIN
        ]
        self._asking = [row for row, s in enumerate(sequences) if s.sampling.logprobs is not None]
        self._nums_top = [sequences[row].sampling.logprobs or 0 for row in self._asking]
        self._asking_index = torch.tensor(self._asking, dtype=torch.int64, device=logits.device)

    def go_on(self, sequences: list[Sequence], positions: Positions, *, vocab_size: int) -> bool:
        """Whether these are the same rows, each one token further than the last time."""
        is_as_wide = vocab_size == self._vocab_size
        is_same = is_as_wide and sequences == self._sequences
        return is_same and bool((positions == self._positions).all())

    def sample(self, logits: Tensor) -> list[SampledToken]:
        """One token for each row of `logits` [num_rows, vocab_size] float32."""
        faults_of_masks = self._masks.fill() if self._masks is not None else []
        chosen, faults = self._choose(logits)
        self._positions = self._positions + 1
        tokens, codes = torch.stack([chosen, faults]).tolist()
        errors = _errors(codes)
        for row, error in faults_of_masks:
            errors[row] = error
        return list(map(SampledToken, tokens, errors, self._logprobs(logits, chosen)))

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and faults, both [num_rows] int64."""
        chosen = _largest(logits)
        # The largest tells of the whole row: NaN counts as such.
        peaks = logits.gather(1, chosen[:, None])
        faults = torch.where(torch.isfinite(peaks[:, 0]), _FINE, _INVALID)
        if self._groups:
            positions = torch.from_numpy(self._positions).to(logits.device)
            for group in self._groups:
                group.choose_into(chosen, faults, logits=logits, peaks=peaks, positions=positions)
        return chosen, faults

    def _logprobs(self, logits: Tensor, chosen: Tensor) -> list[TokenLogprob | None]:
        found: list[TokenLogprob | None] = [None] * len(self._sequences)
        if self._asking:
            own, token_ids = logits[self._asking_index], chosen[self._asking_index]
            told = logprobs.of_tokens(own, token_ids, nums_top=self._nums_top)
            for row, logprob in zip(self._asking, told, strict=True):
                found[row] = logprob
        return found


def _largest(logits: Tensor) -> Tensor:
    """`logits.argmax(dim=-1)`, for which torch takes twelve times numpy's time on a CPU."""
    if logits.device.type == "cpu":
        return torch.from_numpy(np.argmax(logits.numpy(), axis=-1))
    return logits.argmax(dim=-1)


def _errors(codes: list[int]) -> list[SequenceError | None]:
    if not any(codes):
        return [None] * len(codes)
    return [
        InvalidLogits() if code == _INVALID else NoTokenLeft() if code == _NOTHING_LEFT else None
        for code in codes
    ]


class _Kind(NamedTuple):
    """How a row is treated."""

    is_drawn: bool
    # How many candidates are sorted for the draw.
    num_sorted: int
    is_adjusted: bool
    # Whether it has a grammar.
    is_masked: bool


_PLAIN = _Kind(is_drawn=False, num_sorted=0, is_adjusted=False, is_masked=False)


def _grouped(sequences: list[Sequence], vocab_size: int) -> dict[_Kind, list[int]]:
    """Row numbers by what is to be done."""
    groups: dict[_Kind, list[int]] = defaultdict(list)
    for row, sequence in enumerate(sequences):
        params = sequence.sampling
        is_drawn = params.temperature > 0
        num_sorted = draws.num_candidates(params, vocab_size) if is_drawn else 0
        kind = _Kind(is_drawn, num_sorted, adjustments.has_any(sequence), sequence.walk is not None)
        groups[kind].append(row)
    return groups


class _Group:
    """Rows that are treated alike."""

    def __init__(
        self,
        sequences: list[Sequence],
        rows: list[int],
        *,
        is_adjusted: bool,
        is_drawn: bool,
        masks: Masks | None,
        logits: Tensor,
    ) -> None:
        own, vocab_size, device = [sequences[row] for row in rows], logits.shape[1], logits.device
        self._rows = torch.tensor(rows, device=device)
        self._order = torch.arange(len(rows), device=device)
        self._adjustments = (
            Adjustments(own, vocab_size=vocab_size, device=device) if is_adjusted else None
        )
        # Those of the rows of this group are at `_mask_places`.
        self._masks = masks
        self._mask_places = torch.tensor(
            [masks.places[row] for row in rows] if masks else [], dtype=torch.int64, device=device
        )
        params = [s.sampling for s in own]
        self._draw = _Draw.of(params, vocab_size=vocab_size, device=device) if is_drawn else None

    def choose_into(
        self, chosen: Tensor, faults: Tensor, *, logits: Tensor, peaks: Tensor, positions: Tensor
    ) -> None:
        """Set this group's rows of `chosen` and, where nothing is left, of `faults`."""
        rows, places = self._rows, positions[self._rows]
        if self._adjustments is None and self._masks is None:
            assert self._draw is not None, "rows that are taken as they are have no group"
            chosen[rows] = self._draw.choose(logits, rows, peaks=peaks[rows], positions=places)
            return
        own = logits.index_select(0, rows)
        if self._masks is not None:
            self._masks.apply_(own, self._mask_places)
        if self._adjustments is not None:
            self._adjustments.apply_(own, places)
        own_peaks = own.amax(dim=-1, keepdim=True)
        is_empty = ~torch.isfinite(own_peaks[:, 0]) & (faults[rows] == _FINE)
        faults[rows] = faults[rows].masked_fill(is_empty, _NOTHING_LEFT)
        if self._draw is None:
            tokens = own.argmax(dim=-1)
        else:
            tokens = self._draw.choose(own, self._order, peaks=own_peaks, positions=places)
        if self._adjustments is not None:
            self._adjustments.count(tokens)
        chosen[rows] = tokens


@dataclass(frozen=True, slots=True)
class _Draw:
    """How a group's tokens are drawn."""

    # [num_rows, 1] float32
    temperature: Tensor
    # [num_rows] int64 of `mixed_seeds`
    seeds: Tensor
    limits: Limits
    # 0 where nothing is limited
    num_candidates: int

    @classmethod
    def of(cls, params: list[SamplingParams], *, vocab_size: int, device: torch.device) -> "_Draw":
        temperature = [max(p.temperature, MIN_TEMPERATURE) for p in params]
        return cls(
            temperature=torch.tensor(temperature, dtype=torch.float32, device=device)[:, None],
            seeds=mixed_seeds([p.seed for p in params], device=device),
            limits=Limits.of(params, vocab_size=vocab_size, device=device),
            num_candidates=draws.num_candidates(params[0], vocab_size),
        )

    def choose(self, logits: Tensor, rows: Tensor, *, peaks: Tensor, positions: Tensor) -> Tensor:
        """[num_rows] int64, from `rows` of `logits`."""
        scaling = Scaling(peaks, self.temperature)
        starts = streams(self.seeds, positions)
        if not self.num_candidates:
            return draws.draw(logits, starts, rows=rows, scaling=scaling)
        return draws.draw_limited(
            scaling.apply(logits.index_select(0, rows)),
            starts,
            self.limits,
            num_candidates=self.num_candidates,
        )
