"""Say whose turn it is among those who wait.

Weighted virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI
2024): whoever has been served least, by weight, comes first; within one key, first come first
served. Knows keys, weights and token counts. Knows nothing of blocks, slots or tenants.
"""

from collections import deque
from collections.abc import Iterator

from engine.sequence import Sequence

# An answer's token costs a step of its own, a prompt's shares one with many.
INPUT_COST = 1.0
OUTPUT_COST = 2.0


class WaitingLine:
    """Sequences that wait, by fairness key. Mutable; one thread."""

    def __init__(self) -> None:
        # Preempted sequences: their turn came already, and their tokens are paid for.
        self._returning: deque[Sequence] = deque()
        self._lines: dict[str, deque[Sequence]] = {}
        # Of each key: cost of the tokens that it was served, divided by its weight.
        self._served: dict[str, float] = {}
        # What the key that left last had been served.
        self._last_served = 0.0

    def __len__(self) -> int:
        return len(self._returning) + sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Sequence]:
        """In order of turn; charges made meanwhile change the turn of those that follow."""
        yield from tuple(self._returning)
        rests = {key: deque(line) for key, line in self._lines.items()}
        while rests:
            key = min(rests, key=self._served.__getitem__)
            yield rests[key].popleft()
            if not rests[key]:
                del rests[key]

    def append(self, sequence: Sequence) -> None:
        key = sequence.fairness_key
        if key not in self._lines:
            # An idle key saves nothing up: it starts level with the least served that waits.
            floor = min((self._served[k] for k in self._lines), default=self._last_served)
            self._served[key] = max(self._served.get(key, 0.0), floor)
            self._lines[key] = deque()
        self._lines[key].append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """A preempted sequence waits again, before all others."""
        self._returning.appendleft(sequence)

    def take(self, sequence: Sequence) -> None:
        """`sequence` is admitted: its prompt is charged, unless it was preempted."""
        if sequence in self._returning:
            self._returning.remove(sequence)
            return
        self._charge(sequence, INPUT_COST * sequence.num_tokens)
        self.discard(sequence)

    def charge_output(self, sequence: Sequence) -> None:
        """One token was generated."""
        self._charge(sequence, OUTPUT_COST)

    def discard(self, sequence: Sequence) -> None:
        """`sequence` waits no more, if it did."""
        if sequence in self._returning:
            self._returning.remove(sequence)
        key = sequence.fairness_key
        line = self._lines.get(key)
        if line is not None and sequence in line:
            line.remove(sequence)
            if not line:
                del self._lines[key]
                self._last_served = self._served[key]

    def _charge(self, sequence: Sequence, cost: float) -> None:
        self._served[sequence.fairness_key] += cost / sequence.weight
