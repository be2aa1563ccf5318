"""Render the chat templates that adapters bring, in processes that may be lost.

A template is a stranger's program, so it runs in `gateway.template_worker`, a few of which live as
long as the gateway. Callers take turns; none uses two workers at once, and what is slow or not
known yet never uses them all, so that somebody else's template finds one free. Also makes text
bundles of uploads, in a process of its own each. Knows nothing of HTTP or the registry.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from adapters import text_bundle, tokenizer_files
from adapters.errors import Finding
from adapters.text_bundle import TextBundle
from gateway import template_worker
from gateway.errors import InvalidRequest, LimitReached, Unavailable
from gateway.template_worker import Answer, Build, Built, Fault, Findings, Job, Mode, Render, Text

logger = logging.getLogger(__name__)

NUM_WORKERS = 2
NICENESS = 10
# A published template renders a hundred messages in some 5 ms.
MAX_CPU_S = 0.5
# What took longer is slow for a minute, and shares one lane with all that is slow.
QUICK_S = 0.02
SLOW_FOR_S = 60.0
# Templates that were stopped so often in so long are not tried again before the oldest is past.
MAX_STOPS = 3
STOPS_WINDOW_S = 60.0
MAX_WAITING = 64
# A body has at most 10 MB: an honest template's long prompt is told that it is too long instead.
MAX_CHARACTERS = 16 << 20
# Last resort for a worker that neither answers nor uses its processor.
RENDER_PATIENCE_S = 30.0
BUILD_PATIENCE_S = 180.0
# Of (caller, template): what each did lately.
MAX_HISTORIES = 4096
MAX_ANSWER_BYTES = 256 << 20

_LENGTH = struct.Struct("!I")
_decode_answer = msgspec.msgpack.Decoder(Answer).decode
_encode_job = msgspec.msgpack.Encoder().encode


class TemplateFault(InvalidRequest):
    """The model's chat template does not take these messages."""

    code = "invalid_messages"


class Lost(Exception):
    """A worker ended instead of answering; the message says why, as part of a sentence."""


@dataclass(frozen=True, slots=True)
class OwnTemplate:
    """A template that an adapter brought."""

    source: str
    digest: str

    @classmethod
    def of(cls, source: str) -> "OwnTemplate":
        return cls(source, hashlib.sha256(source.encode()).hexdigest())


@dataclass(slots=True, eq=False)
class History:
    """What one caller's use of one thing, a template say, has come to. Its owner changes it."""

    stops: deque[float] = field(default_factory=deque)
    slow_until: float = float("inf")

    def is_quick(self, now: float) -> bool:
        return now >= self.slow_until

    def took(self, cpu_s: float, *, now: float) -> None:
        if cpu_s > QUICK_S:
            self.slow_until = now + SLOW_FOR_S
        elif self.slow_until == float("inf"):
            self.slow_until = now

    def stopped(self, now: float) -> None:
        self.slow_until = now + SLOW_FOR_S
        self.stops.append(now)

    def refused_for_s(self, now: float) -> float:
        """How long it is not tried any more; 0 where it may be."""
        while self.stops and self.stops[0] + STOPS_WINDOW_S <= now:
            self.stops.popleft()
        return self.stops[0] + STOPS_WINDOW_S - now if len(self.stops) >= MAX_STOPS else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    job: Render
    caller: str
    history: History
    answer: asyncio.Future[str]


class Templates:
    """The workers, and whose turn it is. `close` it in the loop that used it."""

    def __init__(self, *, num_workers: int = NUM_WORKERS, max_cpu_s: float = MAX_CPU_S) -> None:
        self._max_cpu_s = max_cpu_s
        # Lanes that what is slow may use; with a single worker there is but one.
        self._max_slow = max(1, num_workers - 1)
        self._idle = [Worker("render") for _ in range(num_workers)]
        self._workers = tuple(self._idle)
        # The caller whose turn is next comes first.
        self._waiting: OrderedDict[str, deque[_Waiting]] = OrderedDict()
        self._running: dict[str, _Waiting] = {}
        self._num_slow = 0
        self._histories: OrderedDict[tuple[str, str], History] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._building = asyncio.Semaphore(1)
        self._is_closed = False

    async def render(
        self, template: OwnTemplate, variables: Mapping[str, Any], *, caller: str
    ) -> str:
        """Render for `caller`, somebody who takes turns with others.

        Raises TemplateFault where the template refuses or had to be stopped, LimitReached where
        too many of this caller's conversations wait, Unavailable where no worker can be had.
        """
        if self._is_closed:
            raise Unavailable()
        history = self._history(caller, template)
        if refused_for_s := history.refused_for_s(time.monotonic()):
            raise TemplateFault(
                f"This adapter's chat template had to be stopped {MAX_STOPS} times within"
                f" {STOPS_WINDOW_S:.0f} s. It is tried again in {refused_for_s:.0f} s; repair the"
                " template, and upload the adapter again.",
                param="messages",
            )
        queue = self._waiting.setdefault(caller, deque())
        if len(queue) >= MAX_WAITING:
            raise _too_many()
        job = Render(
            source=template.source,
            variables=dict(variables),
            max_characters=MAX_CHARACTERS,
            max_cpu_s=self._max_cpu_s,
        )
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        queue.append(_Waiting(job, caller, history, answer))
        self._start_next()
        return await answer

    async def build(
        self, files: Mapping[str, Path], base: TextBundle, *, num_added_tokens: int
    ) -> tuple[TextBundle | None, list[Finding]]:
        """Make the text bundle of an upload, and try its tokenizer and its template.

        `files` holds the text files that were uploaded, by name; `num_added_tokens` is how many
        embedding rows its weights bring beyond the base model's. None where the base's bundle
        serves, or where there are findings.
        """
        contents, findings = await asyncio.to_thread(tokenizer_files.read, files)
        if not contents and not num_added_tokens:
            return None, findings
        async with self._building:
            job = Build(contents, text_bundle.encode(base), num_added_tokens=num_added_tokens)
            built = await _build(job)
            findings += built.findings
            if built.template is not None:
                findings += await _try(built.template, built.special_tokens)
        if findings or built.bundle is None:
            return None, findings
        return text_bundle.decode(built.bundle), []

    async def close(self) -> None:
        """End the workers; whoever waits for one is told to come again."""
        self._is_closed = True
        for queue in self._waiting.values():
            for waiting in queue:
                _fail(waiting, Unavailable())
        self._waiting.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    def _history(self, caller: str, template: OwnTemplate) -> History:
        key = (caller, template.digest)
        history = self._histories.setdefault(key, History())
        self._histories.move_to_end(key)
        if len(self._histories) > MAX_HISTORIES:
            self._histories.popitem(last=False)
        return history

    def _start_next(self) -> None:
        while self._idle and (waiting := self._next()):
            is_quick = waiting.history.is_quick(time.monotonic())
            self._num_slow += not is_quick
            self._running[waiting.caller] = waiting
            task = asyncio.create_task(self._serve(self._idle.pop(), waiting, is_quick=is_quick))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _next(self) -> _Waiting | None:
        """Take the first of the first caller who may have a worker now."""
        now = time.monotonic()
        for caller in list(self._waiting):
            queue = self._waiting[caller]
            while queue and queue[0].answer.done():
                queue.popleft()
            if not queue:
                del self._waiting[caller]
                continue
            may_start = self._num_slow < self._max_slow or queue[0].history.is_quick(now)
            if caller not in self._running and may_start:
                self._waiting.move_to_end(caller)
                return queue.popleft()
        return None

    async def _serve(self, worker: "Worker", waiting: _Waiting, *, is_quick: bool) -> None:
        try:
            await self._ask(worker, waiting)
        finally:
            _fail(waiting, Unavailable())
            del self._running[waiting.caller]
            self._num_slow -= not is_quick
            self._idle.append(worker)
            self._start_next()

    async def _ask(self, worker: "Worker", waiting: _Waiting) -> None:
        history, answer = waiting.history, waiting.answer
        try:
            reply = await worker.ask(waiting.job, patience_s=RENDER_PATIENCE_S)
        except (TypeError, ValueError, OverflowError) as error:
            # What JSON can say and msgpack cannot, such as integers beyond 64 bits.
            return _fail(waiting, _fault(f"The messages cannot be rendered: {error}"))
        except Lost as lost:
            history.stopped(time.monotonic())
            logger.warning("template_stopped", extra={"caller": waiting.caller, "why": str(lost)})
            return _fail(waiting, _fault(f"The chat template was stopped: it {lost}."))
        except OSError as error:
            logger.warning("template_worker_failed", extra={"reason": str(error)})
            return _fail(waiting, Unavailable())
        match reply:
            case Text():
                history.took(reply.cpu_s, now=time.monotonic())
                if not answer.done():
                    answer.set_result(reply.text)
            case Fault():
                if reply.is_stopped:
                    history.stopped(time.monotonic())
                _fail(waiting, _fault(f"The chat template refused the messages: {reply.message}"))
            case _:
                raise AssertionError("renders are answered by a text or a fault")
        return None


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)


def _fault(message: str) -> TemplateFault:
    return TemplateFault(message, param="messages")


def _too_many() -> LimitReached:
    error = LimitReached(
        f"{MAX_WAITING} of your conversations wait for chat templates that adapters brought:"
        " send fewer at a time."
    )
    error.headers["retry-after"] = "1"
    return error


async def _build(job: Build) -> Built:
    try:
        async with _one_shot("build") as worker:
            reply = await worker.ask(job, patience_s=BUILD_PATIENCE_S)
    except Lost as lost:
        finding = Finding(
            code="tokenizer_bomb",
            where=tokenizer_files.TOKENIZER_FILE,
            message=f"was stopped while it was read and tried: it {lost}",
            fix="use the base model's tokenizer, and only add tokens to it",
        )
        return Built(None, [finding], template=None, special_tokens={})
    assert isinstance(reply, Built)
    return reply


async def _try(template: str, special_tokens: dict[str, str]) -> list[Finding]:
    try:
        async with _one_shot("render") as worker:
            reply = await worker.ask(
                template_worker.Try(template, special_tokens), patience_s=RENDER_PATIENCE_S
            )
    except Lost as lost:
        problem = f"was stopped on a short conversation: it {lost}"
        return [template_worker.finding("template_bomb", problem)]
    assert isinstance(reply, Findings)
    return reply.findings


class Worker:
    """One process of `gateway.template_worker`; started when it is first asked."""

    def __init__(self, mode: Mode) -> None:
        self._mode: Mode = mode
        self._process: _Process | None = None

    async def ask(self, job: Job, *, patience_s: float) -> Answer:
        """Raises Lost where the process ended at this job, OSError where none can be started."""
        data = _encode_job(job)
        process = self._process = self._process or await _start(self._mode)
        is_whole = False
        try:
            async with asyncio.timeout(patience_s):
                answer = await _exchange(process, data)
            is_whole = True
        except TimeoutError:
            raise Lost(f"gave no answer for {patience_s:.0f} s") from None
        except (EOFError, ConnectionError):
            raise Lost(_why(await process.wait())) from None
        finally:
            if not is_whole:
                # Whatever it may still say is no answer to the next job.
                await self.stop()
        return answer

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.end()


@contextlib.asynccontextmanager
async def _one_shot(mode: Mode) -> AsyncIterator["Worker"]:
    worker = Worker(mode)
    try:
        yield worker
    finally:
        await worker.stop()


@dataclass(frozen=True, slots=True)
class _Process:
    """A process of `gateway.template_worker`, and the socket that is its standard input and output.

    It is started beside the event loop: uvloop forks, and copying the tables of our memory for that
    stops all streams for 35 ms.
    """

    popen: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def wait(self) -> int:
        return await asyncio.to_thread(self.popen.wait)

    async def end(self) -> int:
        self.popen.kill()
        self.writer.close()
        return await self.wait()


async def _start(mode: Mode) -> _Process:
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            popen = await _spawn_beside(mode, theirs)
        process = _Process(popen, *await asyncio.open_connection(sock=ours))
    except BaseException:
        ours.close()
        raise
    is_ready = False
    try:
        is_ready = await process.reader.read(1) == template_worker.READY
    finally:
        status = None if is_ready else await process.end()
    if status is not None:
        raise OSError(f"a template worker ended at its start, with status {status}")
    return process


async def _spawn_beside(mode: Mode, end: socket.socket) -> subprocess.Popen[bytes]:
    spawning = asyncio.create_task(asyncio.to_thread(_spawn, mode, end))
    try:
        return await asyncio.shield(spawning)
    except asyncio.CancelledError:
        popen = await spawning
        popen.kill()
        await asyncio.to_thread(popen.wait)
        raise


def _spawn(mode: Mode, end: socket.socket) -> subprocess.Popen[bytes]:
    popen = subprocess.Popen(
        [sys.executable, "-m", template_worker.__name__, mode],
        stdin=end.fileno(),
        stdout=end.fileno(),
        stderr=subprocess.DEVNULL,
        env={},
        # Where our packages lie, so that it runs this code and no other.
        cwd=Path(template_worker.__file__).parents[1],
        # A terminal's Ctrl-C is for the gateway, which may still have answers to finish.
        start_new_session=True,
    )
    # Strangers' work, and the start of who does it, comes after everybody's answers.
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, popen.pid, NICENESS)
    return popen


async def _exchange(process: _Process, data: bytes) -> Answer:
    process.writer.write(_LENGTH.pack(len(data)) + data)
    await process.writer.drain()
    size_bytes = _LENGTH.unpack(await process.reader.readexactly(_LENGTH.size))[0]
    if size_bytes > MAX_ANSWER_BYTES:
        raise EOFError
    answer: Answer = _decode_answer(await process.reader.readexactly(size_bytes))
    return answer


def _why(status: int) -> str:
    if status == -signal.SIGPROF:
        return "took too long"
    if status in (-signal.SIGKILL, -signal.SIGABRT):
        return "took too much memory"
    return f"ended its process with status {status}"
