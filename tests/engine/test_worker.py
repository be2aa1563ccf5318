"""The border between the engine's thread and the event loop."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence

import pytest

from engine.errors import AdapterMissing, EngineStopped, NoRoom, ProbeError
from engine.protocol import PinRequest, SequenceState, Submit, WarmRequest
from engine.sequence import StepEvent
from engine.worker import EngineWorker
from tests.engine.echo_engine import EchoCore, greedy, until

KEY = ("w", 1, 1)


class Running:
    """A worker on an echo core, and all that it told the loop."""

    def __init__(self) -> None:
        self.core = EchoCore()
        self.worker = EngineWorker(self.core)
        self.steps: list[Sequence[StepEvent]] = []
        self.threads: set[threading.Thread] = set()
        self.has_failed: bool | None = None

    def start(self) -> None:
        self.worker.start(on_step=self._on_step, on_end=self._on_end)

    def submit(self, prompt: list[int], *, max_tokens: int) -> None:
        command = Submit(sequence_id=1, prompt_token_ids=prompt, sampling=greedy(max_tokens))
        self.worker.submit(KEY, command)

    @property
    def states(self) -> list[SequenceState]:
        return [event.state for step in self.steps for event in step]

    def _on_step(self, events: Sequence[StepEvent]) -> None:
        self.threads.add(threading.current_thread())
        self.steps.append(events)

    def _on_end(self, has_failed: bool) -> None:
        self.has_failed = has_failed


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    made = Running()
    made.start()
    yield made
    await made.worker.stop()


async def test_each_step_is_told_once_on_the_loops_thread(running: Running) -> None:
    running.submit([1], max_tokens=3)
    await until(lambda: SequenceState.LENGTH in running.states)
    assert [len(step) for step in running.steps] == [1, 1, 1]
    assert running.threads == {threading.main_thread()}


async def test_an_abort_is_told_though_nothing_else_runs(running: Running) -> None:
    running.core.allow_steps(0)
    running.submit([1], max_tokens=3)
    running.worker.abort(KEY)
    await until(lambda: running.states == [SequenceState.ABORTED])


async def test_a_refused_submit_is_told_as_a_failure(running: Running) -> None:
    running.submit([], max_tokens=3)
    await until(lambda: running.states == [SequenceState.FAILED])


async def test_held_back_sequences_wait_until_they_are_let_go(running: Running) -> None:
    running.worker.hold_back("w", held=True)
    running.submit([1], max_tokens=3)
    await running.worker.status()
    assert running.steps == []
    running.worker.hold_back("w", held=False)
    await until(lambda: SequenceState.LENGTH in running.states)


async def test_a_wake_from_a_load_thread_starts_a_step(running: Running) -> None:
    running.core.allow_steps(0)
    running.submit([1], max_tokens=1)
    await running.worker.status()
    await asyncio.to_thread(running.core.allow_steps, None)
    await until(lambda: SequenceState.LENGTH in running.states)


async def test_questions_are_answered_between_steps(running: Running) -> None:
    running.submit([1], max_tokens=10**6)
    assert (await running.worker.status()).num_running == 1
    with pytest.raises(ProbeError):
        await running.worker.probe("none")
    running.worker.abort(KEY)


async def test_a_failing_core_ends_the_thread_and_open_questions(running: Running) -> None:
    running.core.allow_steps(0)
    running.core.must_fail = True
    with pytest.raises(EngineStopped):
        await running.worker.probe("ab" * 32)
    await until(lambda: running.has_failed is True)
    assert not running.worker.is_alive
    with pytest.raises(EngineStopped):
        await running.worker.status()


async def test_stopping_is_not_failing(running: Running) -> None:
    running.submit([1], max_tokens=10**6)
    await running.worker.stop()
    await until(lambda: running.has_failed is False)


async def test_a_warm_up_ends_when_the_adapter_is_there_or_cannot_come(running: Running) -> None:
    running.core.missing.add("none")
    place = await running.worker.warm(WarmRequest(adapter_digest="a", to="host"))
    assert (place.is_resident, place.is_hosted) == (False, True)
    with pytest.raises(AdapterMissing):
        await running.worker.warm(WarmRequest(adapter_digest="none"))


async def test_a_warm_up_that_finds_no_room_is_given_up_and_a_pin_stays() -> None:
    core = EchoCore()
    core.waiting = {"big", "kept"}
    worker = EngineWorker(core, room_patience_s=0.01)
    worker.start(on_step=lambda events: None, on_end=lambda has_failed: None)
    with pytest.raises(NoRoom):
        await worker.warm(WarmRequest(adapter_digest="big"))
    place = await worker.pin(PinRequest(adapter_digest="kept"))
    assert (place.is_pinned, place.is_resident) == (True, False)
    assert core.given_up == ["big", "kept"]
    await worker.stop()


async def test_an_adapter_that_cannot_come_is_not_pinned(running: Running) -> None:
    running.core.missing.add("none")
    with pytest.raises(AdapterMissing):
        await running.worker.pin(PinRequest(adapter_digest="none"))
    assert running.core.pinned == []


async def test_a_failing_core_ends_a_warm_up(running: Running) -> None:
    running.core.waiting.add("a")
    warming = asyncio.create_task(running.worker.warm(WarmRequest(adapter_digest="a")))
    await until(lambda: "a" in running.core.fingerprints)
    running.core.must_fail = True
    running.core.wake()
    with pytest.raises(EngineStopped):
        await warming
