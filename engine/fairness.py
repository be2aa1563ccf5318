"""Say whose turn it is, and who holds more than is fair.

Weighted virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI
2024): whoever has been served least, by weight, comes first. Input tokens are charged when a step
takes them up, so that long prompts take turns by the chunk; what the prefix cache gives, and what
is computed again after a preemption, costs nothing. Priority classes are strict. Each class counts
for itself: what a key was served as urgent is no debt in its other class, and the paper's bound
holds in every class for what the more urgent ones leave to it. Other than in the paper, a key that
comes back may have saved up a burst: one that asks for little then waits for nobody, and none is
served more than a burst beyond what the paper allows.

Knows keys, weights and token counts. Knows nothing of tenants, slots or where blocks lie.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from operator import attrgetter

from engine.sequence import Sequence

# An answer's token costs a step of its own, a prompt's shares one with many.
INPUT_COST = 1.0
OUTPUT_COST = 2.0
# Idle keys whose counters are kept. Beyond, those that lose least by it are forgotten.
MAX_REMEMBERED = 4096
# So long a key that always has some waiting lets others keep their seats before it claims one:
# answers of usual length end meanwhile, and counters that swing about each other claim nothing.
PATIENCE_STEPS = 64
# So many of a key's sequences are compared for the shortest.
NUM_COMPARED = 16


@dataclass(slots=True, eq=False)
class Account:
    """One key in one priority class."""

    priority: int
    key: str
    # Grows with each account: where all else is equal, the first to come is the first.
    number: int
    # Cost of the tokens that it was served, divided by its weight.
    served: float
    # That of its sequence which came last.
    weight: float = 1.0
    # The pass in which it last got tokens, and the one in which it began to want some.
    last_turn: int = 0
    active_since: int = 0
    # Of its sequences that have not ended.
    num_sequences: int = 0
    # Those that run and have prompt left to compute, in order of admission.
    prefilling: dict[Sequence, None] = field(default_factory=dict)
    # Those that have no blocks, in order of arrival; preempted ones first.
    waiting: OrderedDict[Sequence, None] = field(default_factory=OrderedDict)

    @property
    def is_active(self) -> bool:
        return bool(self.waiting or self.prefilling)

    @property
    def rank(self) -> tuple[int, float, int, int]:
        """The least goes first; of equals, the one that had its last turn longer ago."""
        return self.priority, self.served, self.last_turn, self.number


class Turns:
    """Sequences that want more than their next token, by account. Mutable; one thread."""

    def __init__(self, *, burst: float) -> None:
        """`burst`: of what a key was served less while it was idle, so much counts."""
        self._burst = burst
        self._accounts: dict[tuple[int, str], Account] = {}
        # What idle keys had been served.
        self._remembered: dict[tuple[int, str], float] = {}
        # Of each class: the account that was last to want something, and the highest floor so far.
        self._last_active: dict[int, Account] = {}
        self._floors: dict[int, float] = {}
        self._num_accounts = 0
        self._num_passes = 0

    @property
    def num_remembered(self) -> int:
        return len(self._remembered)

    def waiting(self) -> Iterator[Sequence]:
        for account in self._accounts.values():
            yield from account.waiting

    def prefilling(self) -> Iterator[Sequence]:
        for account in self._accounts.values():
            yield from account.prefilling

    def account_of(self, sequence: Sequence) -> Account:
        return self._accounts[sequence.priority, sequence.fairness_key]

    def is_newcomer(self, account: Account) -> bool:
        """Whether it wants something for a short while only."""
        return self._num_passes - account.active_since <= PATIENCE_STEPS

    def total_weight(self, priority: int) -> float:
        """Of all accounts of a class that have sequences."""
        return sum(a.weight for a in self._accounts.values() if a.priority == priority)

    # The life of a sequence

    def add(self, sequence: Sequence) -> None:
        """`sequence` has come, and waits."""
        account = self._open(sequence)
        account.weight = sequence.weight
        account.num_sequences += 1
        self._activate(account)
        account.waiting[sequence] = None

    def admit(self, sequence: Sequence) -> None:
        """It has its blocks: from now on its prompt is computed."""
        account = self.account_of(sequence)
        del account.waiting[sequence]
        account.prefilling[sequence] = None
        sequence.num_paid_tokens = max(sequence.num_paid_tokens, sequence.num_computed_tokens)

    def catch_up(self, sequence: Sequence) -> None:
        """All its tokens are computed: from now on it wants one after the other."""
        account = self.account_of(sequence)
        if sequence in account.prefilling:
            del account.prefilling[sequence]
            self._note_idleness(account)

    def put_back(self, sequence: Sequence) -> None:
        """Preempted, it waits again, before the others of its account."""
        account = self.account_of(sequence)
        self._activate(account)
        account.prefilling.pop(sequence, None)
        account.waiting[sequence] = None
        account.waiting.move_to_end(sequence, last=False)

    def remove(self, sequence: Sequence) -> None:
        """It has ended."""
        account = self.account_of(sequence)
        was_active = account.is_active
        account.waiting.pop(sequence, None)
        account.prefilling.pop(sequence, None)
        account.num_sequences -= 1
        if was_active:
            self._note_idleness(account)
        if not account.num_sequences:
            del self._accounts[account.priority, account.key]
            self._remember(account)

    # Charges

    def charge_input(self, sequence: Sequence, num_tokens: int) -> None:
        """The coming step computes so many further tokens of it. Each is paid for once."""
        account = self.account_of(sequence)
        account.last_turn = self._num_passes
        end = sequence.num_computed_tokens + num_tokens
        if end > sequence.num_paid_tokens:
            account.served += INPUT_COST * (end - sequence.num_paid_tokens) / account.weight
            sequence.num_paid_tokens = end

    def charge_output(self, sequence: Sequence) -> None:
        """One token was generated; that includes computing it in the next step."""
        account = self.account_of(sequence)
        account.served += OUTPUT_COST / account.weight
        sequence.num_paid_tokens = sequence.num_tokens

    # Order

    def in_turn(
        self, *, admits: Callable[[Account], bool], shortest_first: bool
    ) -> Iterator[Sequence]:
        """In order of turn; charges made meanwhile change the turn of those that follow.

        An account's waiting sequences are left out while `admits` says no. Within an account the
        first to come goes first, or the shortest: in alternate passes, a long prompt gets on and
        a short one behind it begins soon.
        """
        self._num_passes += 1
        heap = [
            (account.rank, account)
            for account in self._accounts.values()
            if account.prefilling or (account.waiting and admits(account))
        ]
        heapq.heapify(heap)
        members: dict[Account, Iterator[Sequence]] = {}
        while heap:
            rank, account = heapq.heappop(heap)
            if not account.prefilling and not admits(account):
                continue
            if account not in members:
                members[account] = self._members(account, admits, shortest_first)
            for sequence in members[account]:
                yield sequence
                if account.rank != rank:
                    heapq.heappush(heap, (account.rank, account))
                    break

    def next_waiting(self, num_wanted: int) -> list[Sequence]:
        """Some that will have their turn soon: the first of each account, then the second."""
        accounts = heapq.nsmallest(
            num_wanted, (a for a in self._accounts.values() if a.waiting), key=attrgetter("rank")
        )
        rows = zip_longest(*(islice(account.waiting, num_wanted) for account in accounts))
        return [s for s in chain.from_iterable(rows) if s is not None][:num_wanted]

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """`sequences`: all that have not ended."""
        expected: dict[tuple[int, str], int] = {}
        for sequence in sequences:
            name = (sequence.priority, sequence.fairness_key)
            expected[name] = expected.get(name, 0) + 1
        assert {n: a.num_sequences for n, a in self._accounts.items()} == expected
        assert not self._remembered.keys() & self._accounts.keys()
        assert len(self._remembered) <= MAX_REMEMBERED

    def _members(
        self, account: Account, admits: Callable[[Account], bool], shortest_first: bool
    ) -> Iterator[Sequence]:
        waiting = tuple(account.waiting) if admits(account) else ()
        first = [*account.prefilling, *waiting[:NUM_COMPARED]]
        if shortest_first:
            # One that is shorter does not take the slot that another has waited for.
            first.sort(key=lambda s: 0 if s.awaits_adapter else s.num_uncomputed_tokens)
        for sequence in first:
            if sequence in account.prefilling or admits(account):
                yield sequence
        for sequence in islice(waiting, NUM_COMPARED, None):
            if not admits(account):
                return
            yield sequence

    # Accounts

    def _open(self, sequence: Sequence) -> Account:
        name = (sequence.priority, sequence.fairness_key)
        if name not in self._accounts:
            self._num_accounts += 1
            served = self._remembered.pop(name, None)
            if served is None:
                # Nobody gains by coming under ever new names.
                served = self._floor(sequence.priority)
            self._accounts[name] = Account(*name, number=self._num_accounts, served=served)
        return self._accounts[name]

    def _activate(self, account: Account) -> None:
        """An idle key saves up a burst at most: beyond, it is lifted to the least served."""
        if not account.is_active:
            floor = self._floor(account.priority)
            account.served = max(account.served, floor - self._burst)
            account.active_since = self._num_passes

    def _floor(self, priority: int) -> float:
        """What the least served of those who want something was served. Never sinks."""
        active = [a for a in self._accounts.values() if a.is_active and a.priority == priority]
        last = self._last_active.get(priority)
        holders = active or ([last] if last is not None else [])
        floor = min((account.served for account in holders), default=0.0)
        self._floors[priority] = max(floor, self._floors.get(priority, 0.0))
        return self._floors[priority]

    def _note_idleness(self, account: Account) -> None:
        """The one that is last to want something holds the floor for its class."""
        if not account.is_active and not any(
            a.is_active for a in self._accounts.values() if a.priority == account.priority
        ):
            self._last_active[account.priority] = account

    def _remember(self, account: Account) -> None:
        self._remembered[account.priority, account.key] = account.served
        if len(self._remembered) > MAX_REMEMBERED:
            self._forget_some()

    def _forget_some(self) -> None:
        """A counter at or below the floor says nothing; the least above it says least."""
        floors = {priority: self._floor(priority) for priority, _ in self._remembered}
        leads = {name: served - floors[name[0]] for name, served in self._remembered.items()}
        kept = heapq.nlargest(MAX_REMEMBERED // 2, leads, key=leads.__getitem__)
        self._remembered = {name: self._remembered[name] for name in kept if leads[name] > 0}


@dataclass(frozen=True, slots=True)
class Shares:
    """How much of something each account of a class holds, and how much of it is fair.

    A claim brings the one who makes it to its share at most, and nobody below its own. So neither
    side of a claim can claim anything back.
    """

    # What the class can have.
    capacity: int
    total_weight: float
    held: Mapping[Account, int]
    # A share is at least this much, however many share.
    least: int

    def may_claim(self, account: Account, num_wanted: int) -> bool:
        num_held = self.held.get(account, 0)
        share = self._share(account)
        return num_held + num_wanted <= share

    def may_lose(self, account: Account, num_lost: int) -> bool:
        return self.held[account] - num_lost >= self._share(account)

    def _share(self, account: Account) -> float:
        return max(self.capacity * account.weight / self.total_weight, self.least)
