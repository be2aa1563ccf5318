"""Facts about the parts of a gateway that do something by themselves."""

import asyncio
import logging

import pytest

from gateway.background import Background
from tests.engine.echo_engine import until


class Clock(Background):
    """Ticks, and fails where it is told to."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.num_ticks = 0
        self.has_ended = asyncio.Event()
        self._fails_at = fails_at

    async def _run_forever(self) -> None:
        try:
            while True:
                await asyncio.sleep(0)
                self.num_ticks += 1
                assert self.num_ticks != self._fails_at, "no such hour"
        finally:
            self.has_ended.set()


async def test_a_part_works_while_it_is_entered_and_no_longer() -> None:
    clock = Clock()
    async with clock as entered:
        assert entered is clock
        await until(lambda: clock.num_ticks >= 3)
    assert clock.has_ended.is_set()
    num_ticks = clock.num_ticks
    await asyncio.sleep(0.01)
    assert clock.num_ticks == num_ticks
    async with clock:
        await until(lambda: clock.num_ticks > num_ticks)


async def test_a_part_that_fails_says_so_at_once_and_does_not_hinder_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Clock(fails_at=2) as clock:
        await clock.has_ended.wait()
        await asyncio.sleep(0)
        [record] = [each for each in caplog.records if each.levelno == logging.ERROR]
        assert (record.message, record.__dict__["part"]) == ("background_task_failed", "Clock")


async def test_whoever_is_cancelled_while_a_part_ends_hears_of_it() -> None:
    class Slow(Background):
        async def _run_forever(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.05)

    async def leave() -> None:
        async with Slow():
            await asyncio.sleep(0)

    leaving = asyncio.create_task(leave())
    await asyncio.sleep(0.01)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
