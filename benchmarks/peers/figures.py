"""Medians with an interval, and ratios of what was measured side by side.

Knows numbers alone.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """A median, and between which values the true one lies with 95 % probability.

    The interval is that of order statistics, which supposes nothing about the values but that they
    are independent. Fewer than six of them cannot promise as much: then it is their whole range.
    """

    median: float
    low: float
    high: float
    number: int

    @property
    def is_certain(self) -> bool:
        """Whether the interval keeps its promise."""
        return _num_outside(self.number) is not None


def figure(values: Sequence[float]) -> Figure:
    ranked = sorted(values)
    outside = _num_outside(len(ranked)) or 0
    return Figure(
        median=statistics.median(ranked),
        low=ranked[outside],
        high=ranked[len(ranked) - 1 - outside],
        number=len(ranked),
    )


def _num_outside(number: int) -> int | None:
    """How many values may lie beyond each end; None where even all of them are too few.

    The median lies outside of all values but k at each end with twice the probability that of so
    many tosses of a coin at most k are heads.
    """
    beyond = 0.0
    for outside in range(number // 2 + 1):
        beyond += 2 * math.comb(number, outside) / 2**number
        if beyond > 0.05:
            return outside - 1 if outside > 0 else None
    return None
