"""Whose line may run next: one after the other, of the tenant that has the fewest under way.

Bounds what one gateway answers of batches at a time. Knows nothing of lines.
"""

import asyncio
import contextlib
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator


class Slots:
    """Mutable: how many places are taken, by whom, and who waits."""

    def __init__(self, num_slots: int) -> None:
        self._num_free = num_slots
        self._taken: Counter[uuid.UUID] = Counter()
        self._waiting: dict[uuid.UUID, deque[asyncio.Future[None]]] = {}

    @contextlib.asynccontextmanager
    async def place(self, tenant_id: uuid.UUID) -> AsyncIterator[None]:
        """Wait for a place, and give it back at the end."""
        await self._take(tenant_id)
        try:
            yield
        finally:
            self._give_back(tenant_id)

    async def _take(self, tenant_id: uuid.UUID) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant_id, deque()).append(turn)
        self._call()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(tenant_id, turn)
            else:
                self._give_back(tenant_id)
            raise

    def _give_back(self, tenant_id: uuid.UUID) -> None:
        self._num_free += 1
        self._taken[tenant_id] -= 1
        self._taken += Counter()
        self._call()

    def _call(self) -> None:
        """Let in who may come in."""
        while self._num_free and self._waiting:
            tenant_id = min(self._waiting, key=lambda each: self._taken[each])
            turn = self._waiting[tenant_id].popleft()
            if not self._waiting[tenant_id]:
                del self._waiting[tenant_id]
            if not turn.done():
                self._num_free -= 1
                self._taken[tenant_id] += 1
                turn.set_result(None)

    def _forget(self, tenant_id: uuid.UUID, turn: asyncio.Future[None]) -> None:
        waiting = self._waiting.get(tenant_id)
        if waiting is not None and turn in waiting:
            waiting.remove(turn)
            if not waiting:
                del self._waiting[tenant_id]
