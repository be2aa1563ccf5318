"""Which gateway workers are connected, and what each of them has running.

Turns the events of a step into one frame per worker, gives up workers that stay away, and holds
back those that take nothing over. Lives on the event loop; knows nothing of HTTP or of tensors.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Protocol

from engine.errors import FramesGone, NotConnected, StaleEpoch
from engine.metrics import Metrics
from engine.outbox import Outbox
from engine.protocol import Abort, CommandBatch, SequenceEvent, Submit
from engine.sequence import SequenceKey, StepEvent


@dataclass(frozen=True, slots=True)
class LinkLimits:
    # How long a worker may be away before its sequences are aborted.
    resume_window_s: float = 3.0
    heartbeat_s: float = 1.0
    # A connected worker that acknowledges nothing for so long counts as gone: its host may be.
    max_silence_s: float = 30.0
    # Some 5,000 steps of 64 sequences without log-probabilities; a worker acknowledges every few
    # hundred steps.
    max_unacknowledged_bytes: int = 8 * 1024**2


class CommandSink(Protocol):
    """The engine thread's inbox."""

    def submit(self, key: SequenceKey, command: Submit) -> None: ...
    def abort(self, key: SequenceKey) -> None: ...
    def hold_back(self, owner: str, *, held: bool) -> None: ...


class Session:
    """One (worker, epoch): its frames, its running sequences and the one connection that reads."""

    def __init__(self, worker_id: str, worker_epoch: int, *, outbox: Outbox) -> None:
        self.worker_id = worker_id
        self.worker_epoch = worker_epoch
        self.outbox = outbox
        self.running: set[int] = set()
        self.highest_sequence_id = 0
        self.is_held = False
        self.is_closed = False
        # Set while no connection reads.
        self.away_since_s: float | None = time.monotonic()
        self._reader: FrameReader | None = None
        self._news = asyncio.Event()

    def attach(self, *, after: int, heartbeat_s: float) -> "FrameReader":
        """Let a new connection read; the one that did so far ends."""
        self._reader = FrameReader(self, after=after, heartbeat_s=heartbeat_s)
        self.away_since_s = None
        self.notify()
        return self._reader

    def detach(self, reader: "FrameReader") -> None:
        if self._reader is reader:
            self._reader = None
            self.away_since_s = time.monotonic()
        self.notify()

    def is_read_by(self, reader: "FrameReader") -> bool:
        return self._reader is reader

    def notify(self) -> None:
        self._news.set()

    async def wait(self, timeout_s: float) -> bool:
        """Whether there was news before the time was over."""
        self._news.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return False
        return True

    def is_given_up(self, now_s: float, limits: LinkLimits) -> bool:
        if self.away_since_s is not None:
            return now_s - self.away_since_s > limits.resume_window_s
        waiting_since_s = self.outbox.waiting_since_s
        return waiting_since_s is not None and now_s - waiting_since_s > limits.max_silence_s


class FrameReader:
    """One connection's place in a session's frames: yields encoded frames until it has to end."""

    def __init__(self, session: Session, *, after: int, heartbeat_s: float) -> None:
        self._session = session
        self._position = after
        self._heartbeat_s = heartbeat_s

    def close(self) -> None:
        self._session.detach(self)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        outbox = self._session.outbox
        while self._session.is_read_by(self):
            # First of all, so that what was sampled before the end is not lost with it.
            if self._position < outbox.last_number:
                packets = outbox.packets_after(self._position)
                self._position = outbox.last_number
                yield packets
            elif self._session.is_closed:
                return
            elif not await self._session.wait(self._heartbeat_s):
                yield outbox.heartbeat(self._position)


class Sessions:
    def __init__(
        self, engine: CommandSink, *, engine_epoch: int, limits: LinkLimits, metrics: Metrics
    ) -> None:
        self.limits = limits
        self._engine = engine
        self._engine_epoch = engine_epoch
        self._metrics = metrics
        self._by_worker: dict[str, Session] = {}

    def connect(self, worker_id: str, worker_epoch: int, *, after: int, resume: bool) -> Session:
        """The session whose frames later than `after` a connection may now read.

        Raises StaleEpoch for a worker that a newer one replaced, FramesGone when `resume` is asked
        for and cannot be.
        """
        session = self._by_worker.get(worker_id)
        if session is not None and session.worker_epoch > worker_epoch:
            raise StaleEpoch
        if resume:
            if session is None or session.worker_epoch != worker_epoch:
                raise FramesGone
            if not session.outbox.can_resume(after):
                raise FramesGone
            self._acknowledge(session, after)
            return session
        if session is not None:
            self._give_up(session)
        return self._begin(worker_id, worker_epoch, after)

    def command(self, batch: CommandBatch) -> None:
        """Hand a worker's commands to the engine. Raises NotConnected, StaleEpoch."""
        session = self._by_worker.get(batch.worker_id)
        if session is not None and session.worker_epoch > batch.worker_epoch:
            raise StaleEpoch
        if session is None or session.worker_epoch < batch.worker_epoch:
            raise NotConnected
        self._acknowledge(session, batch.acknowledged)
        for command in batch.commands:
            match command:
                case Submit():
                    self._submit(session, command)
                case Abort():
                    self._engine.abort(_key(session, command.sequence_id))

    def publish(self, events: Iterable[StepEvent]) -> None:
        """Put what one step did into one frame per worker."""
        by_worker: defaultdict[tuple[str, int], list[SequenceEvent]] = defaultdict(list)
        for event in events:
            worker_id, worker_epoch, _ = event.key
            by_worker[worker_id, worker_epoch].append(_on_the_wire(event))
        for (worker_id, worker_epoch), worker_events in by_worker.items():
            session = self._by_worker.get(worker_id)
            if session is not None and session.worker_epoch == worker_epoch:
                self._append(session, worker_events)

    def give_up_absent(self) -> None:
        """Abort what belongs to workers that have been away or silent for too long."""
        now_s = time.monotonic()
        for session in list(self._by_worker.values()):
            if session.is_given_up(now_s, self.limits):
                self._give_up(session)

    def close(self) -> None:
        """End all connections; the engine is going away."""
        for session in self._by_worker.values():
            session.is_closed = True
            session.notify()

    @property
    def num_connected(self) -> int:
        return sum(session.away_since_s is None for session in self._by_worker.values())

    @property
    def num_unacknowledged_bytes(self) -> int:
        return sum(session.outbox.size_bytes for session in self._by_worker.values())

    def _begin(self, worker_id: str, worker_epoch: int, after: int) -> Session:
        outbox = Outbox(
            engine_epoch=self._engine_epoch,
            after=after,
            max_bytes=self.limits.max_unacknowledged_bytes,
        )
        session = Session(worker_id, worker_epoch, outbox=outbox)
        self._by_worker[worker_id] = session
        return session

    def _give_up(self, session: Session) -> None:
        del self._by_worker[session.worker_id]
        session.is_closed = True
        session.notify()
        for sequence_id in session.running:
            self._engine.abort(_key(session, sequence_id))
        self._let_go(session)
        self._metrics.sessions_given_up += 1

    def _submit(self, session: Session, command: Submit) -> None:
        if command.sequence_id <= session.highest_sequence_id:
            return
        session.highest_sequence_id = command.sequence_id
        session.running.add(command.sequence_id)
        self._engine.submit(_key(session, command.sequence_id), command)

    def _append(self, session: Session, events: list[SequenceEvent]) -> None:
        session.running.difference_update(e.sequence_id for e in events if e.state.is_final)
        session.outbox.append(events, now_s=time.monotonic())
        session.notify()
        self._metrics.frames += 1
        if session.outbox.is_full and not session.is_held:
            session.is_held = True
            self._engine.hold_back(session.worker_id, held=True)

    def _acknowledge(self, session: Session, number: int) -> None:
        session.outbox.acknowledge(number)
        if session.outbox.has_room:
            self._let_go(session)

    def _let_go(self, session: Session) -> None:
        if session.is_held:
            session.is_held = False
            self._engine.hold_back(session.worker_id, held=False)


def _key(session: Session, sequence_id: int) -> SequenceKey:
    return session.worker_id, session.worker_epoch, sequence_id


def _on_the_wire(event: StepEvent) -> SequenceEvent:
    return SequenceEvent(
        sequence_id=event.key[2],
        state=event.state,
        token_ids=event.token_ids,
        prompt_tokens=event.prompt_tokens,
        cached_tokens=event.cached_tokens,
        generated_tokens=event.generated_tokens,
        engine_ns=event.engine_ns,
        logprobs=event.logprobs,
        fault=event.fault,
        prompt_logprobs=event.prompt_logprobs,
        adapter_wait_ns=event.adapter_wait_ns,
        vector=event.vector,
    )
