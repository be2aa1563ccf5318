"""Streams that their clients leave, or do not read, leave nothing behind in a gateway.

The gateway is a process of its own, so that all that it holds can be counted. The same is done with
a real engine in `tests/end_to_end/test_drains.py`.
"""

import os
import random
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import select

from gateway.database import Database
from gateway.tables import UsageEvent
from tests.conftest import Home
from tests.engine.echo_engine import EchoCore, until
from tests.gateway.whole_gateway import MODEL, gateway_process, whole_gateway
from tests.hostile.streams import Asker, crowd, read_all
from tests.hostile.watching import MEMORY_TOLERANCE_BYTES, Watch, eventually, soak

NUM_STREAMS = 64
# An answer of so many tokens has a hundred megabytes, as chunks.
CONTEXT_LENGTH = 500_000
# What fits between the engine and a client that does not read: 1,024 steps in the gateway's queue,
# as much in the buffers of its connection, and what the engine is ahead until it hears of the end.
MAX_UNREAD_TOKENS = 10_000


@dataclass(frozen=True)
class Watched:
    """A gateway that can be asked for its tasks as well, and the core of its engine."""

    watch: Watch
    asker: Asker
    core: EchoCore
    tasks_file: Path

    async def num_tasks(self) -> int:
        self.tasks_file.unlink(missing_ok=True)
        os.kill(self.watch.pid, signal.SIGUSR1)
        await until(self.tasks_file.exists)
        return int(self.tasks_file.read_text())


@pytest.fixture
async def watched(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Watched]:
    tasks_file = tmp_path / "tasks"
    async with gateway_process(
        home,
        database,
        tmp_path,
        module="tests.hostile.counted_gateway",
        environment={"TASKS_FILE": str(tasks_file)},
        context_length=CONTEXT_LENGTH,
    ) as process:
        watch = Watch(process.pid, process.operator, database)
        yield Watched(watch, Asker(process.url, process.key, MODEL), process.core, tasks_file)


async def come_and_go(watched: Watched, *, num_rounds: int) -> None:
    dice = random.Random(64)

    async def one_round() -> None:
        await crowd(watched.asker, dice, number=NUM_STREAMS, max_tokens=200)

    await soak(watched.watch, one_round, watched.num_tasks, num_rounds=num_rounds)


async def test_a_crowd_that_reads_slowly_and_leaves_at_random_leaves_nothing_behind(
    watched: Watched,
) -> None:
    await come_and_go(watched, num_rounds=4)


@pytest.mark.slow
async def test_a_crowd_leaves_nothing_behind_however_often_it_comes(watched: Watched) -> None:
    await come_and_go(watched, num_rounds=40)


async def test_a_stream_that_nobody_reads_is_given_up_alone(
    watched: Watched, database: Database
) -> None:
    async with watched.asker.ask(max_tokens=CONTEXT_LENGTH - 1000):
        await until(lambda: bool(watched.core.running))
        resident_bytes = watched.watch.resident_bytes()
        async with watched.asker.ask(max_tokens=500) as attentive:
            assert b"[DONE]" in await read_all(attentive)
        # Its client is still on the line, and has not read a byte.
        await eventually(watched.watch.num_sequences, at_most=0)
        assert watched.watch.resident_bytes() < resident_bytes + MEMORY_TOLERANCE_BYTES
    await watched.watch.drain()
    async with database.as_worker() as session:
        events = (await session.scalars(select(UsageEvent))).all()
    tokens = {event.outcome: event.completion_tokens for event in events}
    assert tokens.pop("length") == 500
    [unread] = tokens.values()
    assert unread < MAX_UNREAD_TOKENS


async def test_a_stream_whose_client_leaves_is_over_before_the_engines_next_step(
    home: Home, database: Database, tmp_path: Path
) -> None:
    async with whole_gateway(home, database, tmp_path) as gateway:
        gateway.core.allow_steps(3)
        key = gateway.client.headers["authorization"].removeprefix("Bearer ")
        async with Asker(gateway.url, key, MODEL).ask(max_tokens=500) as (reader, _):
            await reader.readuntil(b"w9")
            assert len(gateway.core.running) == 1
        await until(lambda: not gateway.core.running)
        [event] = await gateway.events(1)
        assert (event.outcome, event.completion_tokens) == ("abort", 3)
