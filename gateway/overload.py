"""Turn requests away early, and fairly, when an engine has more of them waiting than it can start.

A tenant may wait with at most as many requests as there are places left: one tenant alone never
fills the queue, and who has few waiting gets in while who has many is refused. This is the dynamic
threshold of Choudhury and Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet
Switches" (1998), with a factor of one. Knows nothing of engines, models or time.
"""

import uuid
from collections import Counter

from gateway.errors import Overloaded

# Answers that wait for the first token of their request, of one gateway at one engine.
MAX_WAITING = 1024


class WaitingRoom:
    """Mutable: how many answers of each tenant wait for the first token of their request."""

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        self._max_waiting = max_waiting
        self._waiting: Counter[uuid.UUID] = Counter()

    @property
    def num_waiting(self) -> int:
        return self._waiting.total()

    def enter(self, tenant_id: uuid.UUID, *, num_answers: int = 1) -> "Place":
        """Take a place for each answer of a request. Raises Overloaded."""
        if self._waiting[tenant_id] + num_answers > self._max_waiting - self.num_waiting:
            raise Overloaded
        self._waiting[tenant_id] += num_answers
        return Place(self, tenant_id, num_answers)

    def _leave(self, tenant_id: uuid.UUID, num_answers: int) -> None:
        self._waiting[tenant_id] -= num_answers
        if not self._waiting[tenant_id]:
            del self._waiting[tenant_id]


class Place:
    """Mutable: a request's places, given back once, by the first token or by the end."""

    def __init__(self, room: WaitingRoom, tenant_id: uuid.UUID, num_answers: int) -> None:
        self._room: WaitingRoom | None = room
        self._tenant_id = tenant_id
        self._num_answers = num_answers

    def leave(self) -> None:
        """Once more changes nothing."""
        if self._room is not None:
            self._room._leave(self._tenant_id, self._num_answers)
            self._room = None
