"""Say who makes room: for one that needs its next block, or for one that waits.

Whoever is held back goes first, then the least urgent class; among equals the account that holds
most for its weight, and of its sequences the one that was admitted last. For one that waits in the
same class, only those who hold more than their share make room (`Shares`), and only while it is
not their turn before its own; for a backlog only after some patience, so that a steady one sends
nobody away. What a preempted sequence has computed stays in the prefix cache
until it is needed for something else, so that coming back is mostly cheap.

Knows classes, accounts and how much each holds. Preempts nobody itself.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

from engine.block_manager import BlockManager
from engine.fairness import OUTPUT_COST, PATIENCE_STEPS, Account, Shares, Turns
from engine.sequence import Sequence

Size = Callable[[Sequence], int]


@dataclass(frozen=True, slots=True)
class SeatClaims:
    """Which accounts of a class may have a seat that another holds."""

    shares: Shares
    # An account that was served more has no claim, as its turn comes later than the holders'.
    most_served: float
    # The same for an account that has waited for long: with patience taken off.
    most_served_for_long: float

    @property
    def are_any(self) -> bool:
        return self.most_served > -math.inf

    def allow(self, account: Account, *, is_newcomer: bool) -> bool:
        most_served = self.most_served if is_newcomer else self.most_served_for_long
        return account.served <= most_served and self.shares.may_claim(account, 1)


class Preemption:
    """Sees the running sequences, in order of admission, through the eyes of others."""

    def __init__(self, blocks: BlockManager, turns: Turns, *, held_owners: set[str]) -> None:
        self._blocks = blocks
        self._turns = turns
        # The scheduler's own, which changes.
        self._held_owners = held_owners

    def victim_of_growth(self, running: Iterable[Sequence]) -> Sequence:
        """Whoever goes when those who run need more blocks than there are."""
        candidates = list(running)
        held = [s for s in candidates if self._is_held(s)]
        return held[-1] if held else self._first_to_go(candidates, _num_blocks)

    def seat_claims(
        self, priority: int, running: Iterable[Sequence], *, num_seats: int
    ) -> SeatClaims:
        ready = [s for s in running if not self._is_held(s)]
        shares = self._shares(priority, ready, _one_seat, capacity=num_seats)
        losers = [account for account in shares.held if shares.may_lose(account, 1)]
        return SeatClaims(
            shares,
            most_served=max((a.served for a in losers), default=-math.inf),
            most_served_for_long=max(
                (a.served - _patience(a, shares.held[a]) for a in losers), default=-math.inf
            ),
        )

    def victims_for(
        self,
        newcomer: Sequence,
        running: Iterable[Sequence],
        *,
        num_seats: int,
        needs_seat: bool,
        num_blocks_short: int,
    ) -> list[Sequence] | None:
        """Whom to preempt so that `newcomer` has its seat and blocks; None: it has to wait."""
        staying, victims = list(running), []
        while needs_seat or num_blocks_short > 0:
            size, capacity = (_one_seat, num_seats) if needs_seat else (_num_blocks, None)
            victim = self._victim_for(newcomer, staying, size, capacity=capacity)
            if victim is None:
                return None
            staying.remove(victim)
            victims.append(victim)
            needs_seat = False
            num_blocks_short -= self._blocks.num_freed_by(victim)
        return victims

    def _victim_for(
        self, newcomer: Sequence, running: list[Sequence], size: Size, *, capacity: int | None
    ) -> Sequence | None:
        """`capacity`: of seats; None where blocks are short."""
        held = [s for s in running if self._is_held(s)]
        if held and capacity is None:
            return held[-1]
        ready = [s for s in running if not self._is_held(s)]
        less_urgent = [s for s in ready if s.priority > newcomer.priority]
        candidates = less_urgent or self._over_share(newcomer, ready, size, capacity=capacity)
        return self._first_to_go(candidates, size) if candidates else None

    def _over_share(
        self, newcomer: Sequence, ready: list[Sequence], size: Size, *, capacity: int | None
    ) -> list[Sequence]:
        """Those whose account holds its share without them, and whose turn is not before."""
        account = self._turns.account_of(newcomer)
        num_wanted = 1 if capacity is not None else self._blocks.num_missing_blocks(newcomer)
        shares = self._shares(newcomer.priority, ready, size, capacity=capacity)
        if not shares.may_claim(account, num_wanted):
            return []
        equals = [s for s in ready if s.priority == newcomer.priority]
        seats = self._holdings(equals, _one_seat)
        is_new = self._turns.is_newcomer(account)

        def may_go(sequence: Sequence) -> bool:
            other = self._turns.account_of(sequence)
            patience = 0.0 if is_new else _patience(other, seats[other])
            is_later = other is not account and other.served - patience >= account.served
            return is_later and shares.may_lose(other, size(sequence))

        return [s for s in equals if may_go(s)]

    def _shares(
        self, priority: int, ready: list[Sequence], size: Size, *, capacity: int | None
    ) -> Shares:
        """What more urgent classes hold is not the class's own to share."""
        urgent = sum(size(s) for s in ready if s.priority < priority)
        num_blocks = self._blocks.num_blocks - self._blocks.num_window_blocks
        whole = num_blocks if capacity is None else capacity
        return Shares(
            capacity=whole - urgent,
            total_weight=self._turns.total_weight(priority),
            held=self._holdings((s for s in ready if s.priority == priority), size),
            least=1,
        )

    def _first_to_go(self, candidates: Ordered[Sequence], size: Size) -> Sequence:
        least_urgent = max(s.priority for s in candidates)
        candidates = [s for s in candidates if s.priority == least_urgent]
        held = self._holdings(candidates, size)
        largest = max(held, key=lambda account: held[account] / account.weight)
        # Where two hold the same, the later one of all goes.
        equals = {a for a in held if held[a] / a.weight == held[largest] / largest.weight}
        return next(s for s in reversed(candidates) if self._turns.account_of(s) in equals)

    def _holdings(self, sequences: Iterable[Sequence], size: Size) -> Counter[Account]:
        held: Counter[Account] = Counter()
        for sequence in sequences:
            held[self._turns.account_of(sequence)] += size(sequence)
        return held

    def _is_held(self, sequence: Sequence) -> bool:
        return sequence.owner in self._held_owners


def _patience(account: Account, num_seats: int) -> float:
    """What its seats alone serve it while another is patient."""
    return PATIENCE_STEPS * OUTPUT_COST * num_seats / account.weight


def _one_seat(sequence: Sequence) -> int:
    return 1


def _num_blocks(sequence: Sequence) -> int:
    return len(sequence.block_table)
