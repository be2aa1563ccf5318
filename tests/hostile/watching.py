"""What a gateway holds, seen from outside: in /proc, at its engine, and on its books."""

import asyncio
import contextlib
import inspect
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
from sqlalchemy import text

from gateway.database import Database

PATIENCE_S = 120
# What an allocator keeps in case. Some hundred kB left behind by each stream would be more.
MEMORY_TOLERANCE_BYTES = 12 << 20

Look = Callable[[], int | Awaitable[int]]


@dataclass(frozen=True)
class Watch:
    """On one process, by an operator who can also read its database."""

    pid: int
    operator: httpx.AsyncClient
    database: Database

    def num_files(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def num_threads(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.pid}/task").iterdir())

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    async def num_sequences(self) -> int:
        engines = (await self.operator.get("/admin/v1/engines")).json()["data"]
        return sum(each["load"]["num_running"] + each["load"]["num_waiting"] for each in engines)

    async def num_holds(self) -> int:
        query = text("SELECT count(*) FROM holds WHERE state = 'open'")
        async with self.database.as_worker() as session:
            return int(await session.scalar(query) or 0)

    async def drain(self) -> None:
        """Wait until nothing is under way."""
        await eventually(self.num_sequences, at_most=0)
        await eventually(self.num_holds, at_most=0)


async def eventually(look: Look, *, at_most: int) -> None:
    found = at_most + 1
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            while (found := await seen(look)) > at_most:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)
    assert found <= at_most, look


async def seen(look: Look) -> int:
    found = look()
    return await found if inspect.isawaitable(found) else found


async def soak(
    watch: Watch, one_round: Callable[[], Awaitable[None]], *looks: Look, num_rounds: int
) -> None:
    """Rounds that end with nothing under way, and with no more than there was after the second.

    The first two fill pools and caches.
    """
    for _ in range(2):
        await one_round()
        await watch.drain()
    counted = (watch.num_files, watch.num_threads, *looks)
    before = [await seen(look) for look in counted]
    resident_bytes = watch.resident_bytes()
    for _ in range(num_rounds - 2):
        await one_round()
        await watch.drain()
    for look, most in zip(counted, before, strict=True):
        await eventually(look, at_most=most)
    assert watch.resident_bytes() < resident_bytes + MEMORY_TOLERANCE_BYTES
