"""Keep adapters that fail again and again away from the batch, for a time.

A circuit breaker for each weights digest: several faults in a short while open it, or one that
leaves no doubt; then one sequence may try, and its first token closes it. Knows digests and times;
the base model alone is never refused.
"""

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engine.errors import AdapterQuarantined, InvalidLogits
from engine.sequence import SequenceKey, StepEvent

NUM_FAULTS = 3
SERIES = f"failed {NUM_FAULTS} times in a short while"
FAULTS_WITHIN_S = 60.0
SHORTEST_QUARANTINE_S = 30.0
LONGEST_QUARANTINE_S = 600.0
# A few hundred bytes each.
MAX_DIGESTS = 10_000


@dataclass(slots=True)
class _Record:
    """What is held against one adapter."""

    # When the last ones were since it worked; and the very last of all.
    faults_s: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_FAULTS))
    last_fault_s: float = -math.inf
    # The next quarantine.
    quarantine_s: float = SHORTEST_QUARANTINE_S
    # None: sequences pass.
    until_s: float | None = None
    # Why it is in quarantine, or was.
    reason: str = ""
    # The sequence that tries whether it works again.
    trial: SequenceKey | None = None


class Breaker:
    """Faults by weights digest. Mutable; one thread."""

    def __init__(
        self, *, clock_s: Callable[[], float] = time.monotonic, max_digests: int = MAX_DIGESTS
    ) -> None:
        self._clock_s = clock_s
        self._max_digests = max_digests
        # The one with the oldest last fault first.
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._trials: dict[SequenceKey, str] = {}

    @property
    def quarantined(self) -> tuple[str, ...]:
        return tuple(d for d, record in self._records.items() if record.until_s is not None)

    def admit(self, digest: str | None, key: SequenceKey) -> None:
        """Let a sequence pass, perhaps as the one that tries. Raises AdapterQuarantined."""
        record = self._records.get(digest) if digest is not None else None
        if digest is None or record is None or record.until_s is None:
            return
        self.check(digest)
        if record.trial is not None:
            raise AdapterQuarantined(
                f"The adapter {digest} {record.reason}. It is being tried again now; ask again in "
                "a few seconds."
            )
        record.trial = key
        self._trials[key] = digest

    def check(self, digest: str) -> None:
        """Without a sequence that could try it. Raises AdapterQuarantined."""
        record = self._records.get(digest)
        if record is None or record.until_s is None:
            return
        left_s = record.until_s - self._clock_s()
        if left_s > 0:
            raise AdapterQuarantined(
                f"The adapter {digest} {record.reason}. It is tried again in {math.ceil(left_s)} s."
            )

    def record_fault(self, digest: str | None) -> None:
        """The adapter did not load, or a sequence that used it went wrong. None: the base model."""
        if digest is None:
            return
        now_s = self._clock_s()
        record = self._records.setdefault(digest, _Record())
        self._records.move_to_end(digest)
        if record.until_s is not None and now_s < record.until_s:
            return  # of a sequence that was admitted before
        if now_s - record.last_fault_s > LONGEST_QUARANTINE_S:
            record.quarantine_s = SHORTEST_QUARANTINE_S
        record.last_fault_s = now_s
        record.faults_s.append(now_s)
        if record.until_s is not None or _is_series(record):
            self._quarantine(record, now_s, reason=record.reason or SERIES)
        self._forget_oldest()

    def quarantine(self, digest: str, *, reason: str) -> None:
        """Keep an adapter away at once. `reason` goes on after its name."""
        now_s = self._clock_s()
        record = self._records.setdefault(digest, _Record())
        self._records.move_to_end(digest)
        record.last_fault_s = now_s
        self._quarantine(record, now_s, reason=reason)
        self._forget_oldest()

    def observe(self, events: Iterable[StepEvent]) -> None:
        """Take over what a step did: logits that were no numbers, and what became of trials."""
        for event in events:
            if event.fault is not None and event.fault.code == InvalidLogits.code:
                self.record_fault(event.adapter_digest)
            if self._trials and event.key in self._trials:
                self._end_trial(event)

    def _quarantine(self, record: _Record, now_s: float, *, reason: str) -> None:
        self._drop_trial(record)
        record.reason = reason
        record.until_s = now_s + record.quarantine_s
        record.quarantine_s = min(2 * record.quarantine_s, LONGEST_QUARANTINE_S)

    def _end_trial(self, event: StepEvent) -> None:
        """A token or a vector is a success; an end without, as by an abort, lets another try."""
        has_worked = bool(event.token_ids) or event.vector is not None
        if not has_worked and not event.state.is_final:
            return
        record = self._records[self._trials[event.key]]
        self._drop_trial(record)
        if has_worked:
            record.until_s = None
            record.reason = ""
            record.faults_s.clear()

    def _drop_trial(self, record: _Record) -> None:
        if record.trial is not None:
            del self._trials[record.trial]
            record.trial = None

    def _forget_oldest(self) -> None:
        while len(self._records) > self._max_digests:
            _, record = self._records.popitem(last=False)
            self._drop_trial(record)


def _is_series(record: _Record) -> bool:
    faults_s = record.faults_s
    return len(faults_s) == NUM_FAULTS and faults_s[-1] - faults_s[0] <= FAULTS_WITHIN_S
