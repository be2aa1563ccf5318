"""Where the engine's thread and the event loop meet.

Commands go in through an inbox that the thread empties between steps; what a step did comes out in
one callback on the loop. Knows nothing of HTTP, and nothing of what a step computes.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from engine.core import CoreStatus
from engine.errors import EngineError, EngineStopped, NoRoom, SequenceError
from engine.protocol import (
    AdapterPlace,
    ForgetReport,
    PinRequest,
    ProbeReport,
    SequenceState,
    Submit,
    Tier,
    WarmRequest,
)
from engine.sequence import Sequence as EngineSequence
from engine.sequence import SequenceKey, StepEvent
from engine.slots import Freed
from engine.wishes import Wish

logger = logging.getLogger(__name__)
T = TypeVar("T")

# How long an operator waits for room: sequences of a usual length have ended by then.
ROOM_PATIENCE_S = 60.0


class Core(Protocol):
    """What the thread drives: `engine.core.EngineCore`."""

    wake: Callable[[], None]

    def submit(self, sequence: EngineSequence) -> None: ...
    def abort(self, key: SequenceKey) -> None: ...
    def has_work(self) -> bool: ...
    def step(self) -> list[StepEvent]: ...
    def hold_back(self, owner: str, *, held: bool) -> None: ...
    def status(self) -> CoreStatus: ...
    def prefetch(self, adapter_digest: str) -> None: ...
    def probe(self, adapter_digest: str) -> ProbeReport: ...
    def warm(self, wish: Wish, *, fingerprint: str | None) -> None: ...
    def give_up(self, wish: Wish) -> None: ...
    def pin(self, adapter_digest: str) -> None: ...
    def unpin(self, adapter_digest: str) -> AdapterPlace: ...
    def forget(self, adapter_digest: str) -> Freed: ...
    def forget_files(self, adapter_digest: str) -> int: ...
    def place_of(self, adapter_digest: str) -> AdapterPlace: ...


class EngineWorker:
    """Runs a core in a thread of its own until it is stopped or the core raises."""

    def __init__(self, core: Core, *, room_patience_s: float = ROOM_PATIENCE_S) -> None:
        self._core = core
        self._room_patience_s = room_patience_s
        self._inbox: deque[Callable[[], StepEvent | None]] = deque()
        self._has_news = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # These four are filled by start().
        self._loop: asyncio.AbstractEventLoop
        self._on_step: Callable[[Sequence[StepEvent]], None]
        self._on_end: Callable[[bool], None]
        self._questions: set[asyncio.Future[Any]] = set()
        core.wake = self._has_news.set

    def start(
        self,
        *,
        on_step: Callable[[Sequence[StepEvent]], None],
        on_end: Callable[[bool], None],
    ) -> None:
        """Both are called on the running loop; `on_end` is told whether the core failed."""
        self._loop = asyncio.get_running_loop()
        self._on_step = on_step
        self._on_end = on_end
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, key: SequenceKey, command: Submit) -> None:
        worker_id, worker_epoch, _ = key
        sequence = EngineSequence.from_submit(
            command, worker_id=worker_id, worker_epoch=worker_epoch
        )
        self._post(lambda: self._submit_to_core(sequence))

    def abort(self, key: SequenceKey) -> None:
        self._post(lambda: self._core.abort(key))

    def hold_back(self, owner: str, *, held: bool) -> None:
        self._post(lambda: self._core.hold_back(owner, held=held))

    async def status(self) -> CoreStatus:
        """How the core is between two steps. Raises EngineStopped."""
        return await self._ask(self._core.status)

    async def probe(self, adapter_digest: str) -> ProbeReport:
        """Holds up all steps while it runs. Raises ProbeError, EngineStopped."""
        # The store may be far: steps go on while the files come.
        await asyncio.to_thread(self._core.prefetch, adapter_digest)
        return await self._ask(lambda: self._core.probe(adapter_digest))

    async def warm(self, wanted: WarmRequest) -> AdapterPlace:
        """Raises NoRoom, EngineStopped, or the SequenceError for which it does not come."""
        await self._bring(wanted.adapter_digest, to=wanted.to, fingerprint=wanted.fingerprint)
        return await self._ask(lambda: self._core.place_of(wanted.adapter_digest))

    async def pin(self, wanted: PinRequest) -> AdapterPlace:
        """Raises TooManyPins, EngineStopped, or the SequenceError for which it does not come."""
        digest = wanted.adapter_digest
        await self._ask(lambda: self._core.pin(digest))
        try:
            await self._bring(digest, to="device", fingerprint=wanted.fingerprint)
        except NoRoom:
            # It stays wanted, and comes when there is room.
            logger.info("pin_waits_for_room", extra={"digest": digest})
        except SequenceError:
            await self._ask(lambda: self._core.unpin(digest))
            raise
        return await self._ask(lambda: self._core.place_of(digest))

    async def unpin(self, adapter_digest: str) -> AdapterPlace:
        """Raises EngineStopped."""
        return await self._ask(lambda: self._core.unpin(adapter_digest))

    async def forget(self, adapter_digest: str) -> ForgetReport:
        """Raises EngineStopped."""
        freed = await self._ask(lambda: self._core.forget(adapter_digest))
        disk_bytes = await asyncio.to_thread(self._core.forget_files, adapter_digest)
        return ForgetReport(
            adapter_digest=adapter_digest,
            device_bytes=freed.device_bytes,
            host_bytes=freed.host_bytes,
            disk_bytes=disk_bytes,
            is_in_use=freed.is_in_use,
        )

    async def stop(self) -> None:
        """Let the step that runs end, then end the thread."""
        self._is_stopping = True
        self._has_news.set()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)

    def _post(self, command: Callable[[], StepEvent | None]) -> None:
        self._inbox.append(command)
        self._has_news.set()

    async def _bring(self, digest: str, *, to: Tier, fingerprint: str | None) -> None:
        """Raises NoRoom where the adapter is not there after a while."""
        ended: asyncio.Future[None] = self._loop.create_future()
        wish = Wish(digest, to, on_end=lambda fault: self._tell(ended, fault))
        self._questions.add(ended)
        try:
            await self._ask(lambda: self._core.warm(wish, fingerprint=fingerprint))
            async with asyncio.timeout(self._room_patience_s):
                await ended
        except TimeoutError:
            raise NoRoom from None
        finally:
            self._questions.discard(ended)
            self._post(lambda: self._core.give_up(wish))

    async def _ask(self, question: Callable[[], T]) -> T:
        if not self.is_alive:
            raise EngineStopped
        answer: asyncio.Future[T] = self._loop.create_future()
        self._questions.add(answer)
        try:
            self._post(lambda: self._answer(answer, question))
            return await answer
        finally:
            self._questions.discard(answer)

    # All below runs in the engine's thread.

    def _run(self) -> None:
        has_failed = False
        try:
            while not self._is_stopping:
                self._pass()
        except Exception:
            has_failed = True
            logger.exception("engine_thread_failed")
        finally:
            self._loop.call_soon_threadsafe(self._end, has_failed)

    def _pass(self) -> None:
        self._has_news.clear()
        events = self._empty_inbox()
        # Also without work: what an abort or a failed load ended is told by the next step.
        events += self._core.step()
        if events:
            self._loop.call_soon_threadsafe(self._on_step, events)
        if not self._core.has_work():
            self._has_news.wait()

    def _empty_inbox(self) -> list[StepEvent]:
        refused = []
        while self._inbox:
            event = self._inbox.popleft()()
            if event is not None:
                refused.append(event)
        return refused

    def _submit_to_core(self, sequence: EngineSequence) -> StepEvent | None:
        try:
            self._core.submit(sequence)
        except SequenceError as error:
            return _refusal(sequence, error)
        return None

    def _answer(self, answer: "asyncio.Future[T]", question: Callable[[], T]) -> None:
        try:
            result = question()
        except EngineError as error:
            self._loop.call_soon_threadsafe(_fail, answer, error)
        else:
            self._loop.call_soon_threadsafe(_fulfil, answer, result)

    def _tell(self, ended: "asyncio.Future[None]", fault: SequenceError | None) -> None:
        if fault is None:
            self._loop.call_soon_threadsafe(_fulfil, ended, None)
        else:
            self._loop.call_soon_threadsafe(_fail, ended, fault)

    # On the loop again.

    def _end(self, has_failed: bool) -> None:
        # The thread ends right after it has asked for this call.
        self._thread.join()
        for question in self._questions:
            _fail(question, EngineStopped())
        self._on_end(has_failed)


def _fulfil(answer: "asyncio.Future[T]", result: T) -> None:
    if not answer.done():
        answer.set_result(result)


def _fail(answer: "asyncio.Future[T]", error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)


def _refusal(sequence: EngineSequence, error: SequenceError) -> StepEvent:
    return StepEvent(
        key=sequence.key,
        state=SequenceState.FAILED,
        token_ids=[],
        prompt_tokens=sequence.num_prompt_tokens,
        cached_tokens=0,
        generated_tokens=sequence.num_generated_tokens,
        engine_ns=0,
        fault=error.fault(),
    )
