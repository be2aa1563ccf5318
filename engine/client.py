"""A gateway worker's side of the link to one engine.

Sends all commands of one event-loop tick in one POST, reads one frame per engine step, hands each
new frame to the journal and then its events to the streams they belong to. Reconnects by itself.
Knows nothing of text, tenants or money; imports no torch.
"""

import asyncio
import itertools
import logging
import ssl
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import urlencode, urlsplit

import httpx
import msgspec

from adapters.text_bundle import PoolingKind
from engine.courier import Courier, Feed
from engine.errors import EngineLost, EngineRefused, EngineUnreachable, LinkError, SlowConsumer
from engine.protocol import (
    FRAME_LENGTH,
    MSGPACK,
    UNIX_PREFIX,
    Abort,
    AdapterPlace,
    Command,
    CommandBatch,
    EngineInfo,
    EngineProblem,
    EngineStatus,
    ForgetReport,
    ForgetRequest,
    Frame,
    Grammar,
    PinRequest,
    ProbeReport,
    ProbeRequest,
    SamplingParams,
    SequenceEvent,
    Submit,
    Tier,
    UnpinRequest,
    WarmRequest,
    bearer,
)

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=msgspec.Struct)

# The engine forgets a worker that has been away for so long.
RESUME_WINDOW_S = 3.0
# Several heartbeats of silence mean that the connection is dead.
_SILENCE_S = 5.0
_CALL_S = 10.0
# A probe runs the model many times, on a CPU perhaps.
_PROBE_S = 600.0
# The engine itself gives up before.
_WARM_S = 120.0
_SHORTEST_PAUSE_S = 0.05
# An attempt that is refused costs less than a millisecond, and a start waits for one that is not.
_LONGEST_PAUSE_S = 0.1
_FRAMES_PER_TURN = 32
# Acknowledge after so many frames, or when the first of them is so old.
_FRAMES_PER_ACKNOWLEDGEMENT = 256
_ACKNOWLEDGEMENT_DELAY_S = 0.2
# Token ids of 5 bytes each stay well under the engine's limit of a body.
_MAX_TOKENS_PER_BATCH = 2_000_000
_MAX_FRAME_BYTES = 256 * 1024**2
# The kernel's limit of a socket's path, and our prefix.
_MAX_SOCKET_BYTES = 107 + len(UNIX_PREFIX)


def is_address(text: str) -> bool:
    """Whether a link could be made to it: `unix:/path` or `http://host:port`."""
    if not text.isprintable() or " " in text:
        return False
    if text.startswith(UNIX_PREFIX):
        return text.startswith(f"{UNIX_PREFIX}/") and len(text.encode()) <= _MAX_SOCKET_BYTES
    try:
        url = urlsplit(text)
        is_whole = url.scheme == "http" and bool(url.hostname) and url.port is not None
        return is_whole and text == f"http://{url.netloc}" and "@" not in url.netloc
    except ValueError:
        return False


# What the encoder raises for a value that has no place in a message, e.g. an integer above 2**64.
_NOT_ENCODABLE = (OverflowError, TypeError, ValueError)


class _FramesGone(Exception):
    """The engine cannot go on after the last frame."""


class _BrokenFrames(Exception):
    """What came is not the frames that should have come."""


class SequenceStream:
    """The events of one sequence, in order, the final one last.

    Iterating raises EngineLost when the engine or the link is gone, SlowConsumer when events were
    not taken in time, and EngineRefused when the engine did not take the submit; what had come
    before is delivered first.
    """

    def __init__(self, link: "EngineLink", sequence_id: int, *, max_events: int) -> None:
        self.sequence_id = sequence_id
        self._link = link
        self._max_events = max_events
        self._events: deque[SequenceEvent] = deque()
        self._news = asyncio.Event()
        self._error: LinkError | None = None
        self._is_over = False

    @property
    def next_event(self) -> SequenceEvent | None:
        """What iterating gives next, where that is there already."""
        return self._events[0] if self._events else None

    def pop(self) -> SequenceEvent | None:
        """What iterating gives next, taken without waiting, where that is there already."""
        return self._events.popleft() if self._events else None

    def abort(self) -> None:
        """End the sequence within a step; its final event still comes."""
        self._link._abort(self.sequence_id)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SequenceEvent:
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._is_over:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()

    def _push(self, event: SequenceEvent) -> None:
        if self._is_over:
            return
        if len(self._events) >= self._max_events:
            self.abort()
            self._fail(SlowConsumer())
            return
        self._events.append(event)
        self._is_over = event.state.is_final
        self._news.set()

    def _fail(self, error: LinkError) -> None:
        if not self._is_over:
            self._is_over = True
            self._error = error
            self._news.set()


class MergedStreams:
    """The events of several sequences as they come, those of each in order.

    Iterating ends after the last sequence's final event, and raises what iterating any of the
    streams would. Nobody else may iterate them.
    """

    def __init__(self, streams: Sequence[SequenceStream]) -> None:
        # The one whose turn it is comes first.
        self._streams = deque(streams)
        self._news = asyncio.Event()
        for stream in streams:
            stream._news = self._news

    @property
    def next_event(self) -> SequenceEvent | None:
        """What iterating gives next, where that is there already."""
        return next((each._events[0] for each in self._streams if each._events), None)

    def pop(self) -> SequenceEvent | None:
        """What iterating gives next, taken without waiting, where that is there already."""
        for place, stream in enumerate(self._streams):
            if stream._events:
                self._streams.rotate(-place - 1)
                return stream._events.popleft()
        return None

    def abort(self) -> None:
        for stream in self._streams:
            stream.abort()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SequenceEvent:
        while (event := self.pop()) is None:
            for stream in self._streams:
                if stream._error is not None:
                    raise stream._error
            if all(stream._is_over for stream in self._streams):
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return event


class EngineLink:
    """Async context manager; `is_connected` tells whether submits reach the engine now.

    `on_frame` is called for each frame number exactly once, in order, before the frame's events
    reach any stream. It must not raise: if it does, the link ends and the exception with it.
    `on_session` is called whenever an engine begins to serve this link that knows nothing of what
    was said before: at first, and after the engine or the link was away for long. `sequence_ids`
    only grows; links that share it never give one id twice.
    """

    def __init__(
        self,
        address: str,
        *,
        worker_id: str,
        worker_epoch: int,
        secret: str | None,
        on_frame: Callable[[Frame], None],
        on_session: Callable[[], None] = lambda: None,
        sequence_ids: Iterator[int] | None = None,
        max_queued_events: int = 1024,
    ) -> None:
        self._worker_id = worker_id
        self._worker_epoch = worker_epoch
        self.address = address
        self._on_frame = on_frame
        self._on_session = on_session
        self._max_queued_events = max_queued_events
        self._secret = secret
        self._http = _http_client(address, secret)
        self._courier = Courier(address, secret=secret)
        self._tasks = asyncio.TaskGroup()
        self._own: list[asyncio.Task[None]] = []
        self._streams: dict[int, SequenceStream] = {}
        self._sequence_ids = sequence_ids or itertools.count(1)
        self._outgoing: deque[Command] = deque()
        self._sender_has_work = asyncio.Event()
        self._connected = asyncio.Event()
        # Number of the last frame given to on_frame, and of the last that the engine may forget.
        self._last_frame = 0
        self._acknowledged = 0
        self._is_acknowledgement_due = False
        self._acknowledgement_timer: asyncio.TimerHandle | None = None
        # Whether the engine may still know our sequences; how often it turned out not to.
        self._can_resume = False
        self._times_lost = 0
        self._loss_timer: asyncio.TimerHandle | None = None
        # How long to wait before the next attempt, and why the last one failed.
        self._pause_s = _SHORTEST_PAUSE_S
        self._trouble = ""

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._own = [
            self._tasks.create_task(self._read_forever()),
            self._tasks.create_task(self._send_forever()),
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in self._own:
            task.cancel()
        # A cancellation may be the group's own, which it turns into what a task of ours raised; any
        # other error is the caller's, and reaches them as it is.
        is_cancelled = isinstance(error, asyncio.CancelledError)
        try:
            await self._tasks.__aexit__(
                kind if is_cancelled else None, error if is_cancelled else None, traceback
            )
        finally:
            self._lose()
            self._courier.close()
            await self._http.aclose()

    @property
    def is_connected(self) -> bool:
        return self._connected.is_set()

    @property
    def num_sequences(self) -> int:
        """How many of this link's sequences have not ended."""
        return len(self._streams)

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        *,
        sampling: SamplingParams,
        adapter_digest: str | None = None,
        adapter_fingerprint: str | None = None,
        generated_token_ids: Sequence[int] = (),
        cache_salt: bytes = b"",
        fairness_key: str = "",
        weight: float = 1.0,
        priority: int = 0,
        grammar: Grammar | None = None,
        pooling: PoolingKind | None = None,
    ) -> SequenceStream:
        """Queue a sequence for the POST of this tick. Its id is known at once."""
        command = Submit(
            sequence_id=next(self._sequence_ids),
            prompt_token_ids=list(prompt_token_ids),
            sampling=sampling,
            adapter_digest=adapter_digest,
            adapter_fingerprint=adapter_fingerprint,
            generated_token_ids=list(generated_token_ids),
            cache_salt=cache_salt,
            fairness_key=fairness_key,
            weight=weight,
            priority=priority,
            grammar=grammar,
            pooling=pooling,
        )
        stream = SequenceStream(self, command.sequence_id, max_events=self._max_queued_events)
        if self._can_resume:
            self._streams[stream.sequence_id] = stream
            self._send(command)
        else:
            stream._fail(EngineLost())
        return stream

    async def info(self) -> EngineInfo:
        """Raises EngineUnreachable, EngineRefused."""
        return _decode(await self._call("GET", "/v1/info"), EngineInfo)

    async def status(self) -> EngineStatus:
        """Raises EngineUnreachable, EngineRefused."""
        return _decode(await self._call("GET", "/v1/status"), EngineStatus)

    async def probe(self, adapter_digest: str) -> ProbeReport:
        """Raises EngineUnreachable, EngineRefused."""
        request = ProbeRequest(adapter_digest=adapter_digest)
        return await self._order("/v1/probe", request, ProbeReport, timeout_s=_PROBE_S)

    async def warm(
        self, adapter_digest: str, *, to: Tier, fingerprint: str | None = None
    ) -> AdapterPlace:
        """Returns when the adapter is there. Raises EngineUnreachable, EngineRefused."""
        request = WarmRequest(adapter_digest=adapter_digest, to=to, fingerprint=fingerprint)
        return await self._order("/v1/warm", request, AdapterPlace, timeout_s=_WARM_S)

    async def pin(self, adapter_digest: str, *, fingerprint: str | None = None) -> AdapterPlace:
        """Returns when the adapter is there, or has to wait for room for long.

        Raises EngineUnreachable, EngineRefused.
        """
        request = PinRequest(adapter_digest=adapter_digest, fingerprint=fingerprint)
        return await self._order("/v1/pin", request, AdapterPlace, timeout_s=_WARM_S)

    async def unpin(self, adapter_digest: str) -> AdapterPlace:
        """Raises EngineUnreachable, EngineRefused."""
        return await self._order(
            "/v1/unpin", UnpinRequest(adapter_digest=adapter_digest), AdapterPlace
        )

    async def forget(self, adapter_digest: str) -> ForgetReport:
        """Raises EngineUnreachable, EngineRefused."""
        request = ForgetRequest(adapter_digest=adapter_digest)
        return await self._order("/v1/forget", request, ForgetReport)

    async def _order(
        self, path: str, request: msgspec.Struct, kind: type[T], *, timeout_s: float = _CALL_S
    ) -> T:
        body = msgspec.msgpack.encode(request)
        return _decode(await self._call("POST", path, body=body, timeout_s=timeout_s), kind)

    async def _call(
        self, method: str, path: str, *, body: bytes | None = None, timeout_s: float = _CALL_S
    ) -> bytes:
        headers = {"content-type": MSGPACK} if body is not None else None
        if self._http.is_closed:
            raise EngineUnreachable("The link to the engine was closed")
        try:
            response = await self._http.request(
                method, path, content=body, headers=headers, timeout=timeout_s
            )
        except httpx.HTTPError as error:
            raise _not_there(error) from error
        if response.is_error:
            raise _refusal(path, response.status_code, response.content)
        return response.content

    # Frames in.

    async def _read_forever(self) -> None:
        while True:
            try:
                await self._read_connection(resume=self._can_resume)
                self._note_trouble("the response ended")
            except _FramesGone:
                self._lose()
                continue
            except _BrokenFrames as error:
                self._lose()
                self._note_trouble(f"broken frames: {error}")
            except EngineRefused as error:
                # Replaced by a later start of this worker, or no longer known: nothing to wait for.
                self._lose()
                self._note_trouble(str(error))
            except EngineUnreachable as error:
                self._note_trouble(str(error))
            finally:
                self._disconnect()
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)

    def _note_trouble(self, reason: str) -> None:
        """Log each new reason once: retries go on for as long as an engine is away."""
        if reason != self._trouble:
            logger.warning("engine_link_down", extra={"reason": reason})
        self._trouble = reason

    async def _read_connection(self, *, resume: bool) -> None:
        feed = await self._open_feed(resume=resume)
        try:
            if feed.status_code == httpx.codes.GONE:
                raise _FramesGone
            if feed.status_code >= httpx.codes.BAD_REQUEST:
                raise _refusal("/v1/frames", feed.status_code, feed.body)
            if resume and not self._can_resume:
                # The window closed while the engine thought about it.
                return
            self._connect()
            await self._read_frames(feed)
        finally:
            feed.close()

    async def _open_feed(self, *, resume: bool) -> Feed:
        query = urlencode(
            {
                "worker": self._worker_id,
                "epoch": self._worker_epoch,
                "after": self._last_frame,
                "resume": int(resume),
            }
        )
        try:
            return await Feed.open(
                self.address,
                f"/v1/frames?{query}",
                secret=self._secret,
                connect_s=RESUME_WINDOW_S,
                silence_s=_SILENCE_S,
            )
        except OSError as error:
            raise _not_there(error) from error

    async def _read_frames(self, feed: Feed) -> None:
        arriving = _FrameBuffer()
        while True:
            try:
                data = await feed.read()
            except OSError as error:
                raise _not_there(error) from error
            if not data:
                return
            for number, frame in enumerate(arriving.feed(data), start=1):
                self._take(frame)
                # After a resume many come at once: the streams' readers get their turns. What
                # they find there together they may pass on together.
                if number % _FRAMES_PER_TURN == 0:
                    await asyncio.sleep(0)

    def _take(self, frame: Frame) -> None:
        if frame.number <= self._last_frame:
            return
        if frame.number != self._last_frame + 1:
            raise _BrokenFrames(f"frame {frame.number} came after frame {self._last_frame}")
        self._on_frame(frame)
        self._last_frame = frame.number
        for event in frame.events:
            self._deliver(event)
        self._acknowledge_soon()

    def _deliver(self, event: SequenceEvent) -> None:
        stream = self._streams.get(event.sequence_id)
        if stream is not None:
            stream._push(event)
            if event.state.is_final:
                del self._streams[event.sequence_id]
        elif not event.state.is_final:
            # A submit that reached the engine after its stream had been given up.
            self._send(Abort(event.sequence_id))

    def _connect(self) -> None:
        if self._loss_timer is not None:
            self._loss_timer.cancel()
            self._loss_timer = None
        is_new_session = not self._can_resume
        self._can_resume = True
        self._pause_s = _SHORTEST_PAUSE_S
        self._trouble = ""
        self._connected.set()
        logger.info("engine_link_up", extra={"after": self._last_frame})
        if is_new_session:
            self._on_session()

    def _disconnect(self) -> None:
        self._connected.clear()
        if self._can_resume and self._loss_timer is None:
            loop = asyncio.get_running_loop()
            self._loss_timer = loop.call_later(RESUME_WINDOW_S, self._lose)

    def _lose(self) -> None:
        """Give up what the engine had of us; each stream learns of it."""
        self._connected.clear()
        self._can_resume = False
        self._times_lost += 1
        for timer in (self._loss_timer, self._acknowledgement_timer):
            if timer is not None:
                timer.cancel()
        self._loss_timer = self._acknowledgement_timer = None
        self._outgoing.clear()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream._fail(EngineLost())

    # Commands and acknowledgements out.

    def _send(self, command: Command) -> None:
        self._outgoing.append(command)
        self._sender_has_work.set()

    def _abort(self, sequence_id: int) -> None:
        if sequence_id in self._streams:
            self._send(Abort(sequence_id))

    def _acknowledge_soon(self) -> None:
        if self._last_frame - self._acknowledged >= _FRAMES_PER_ACKNOWLEDGEMENT:
            self._acknowledge_now()
        elif self._acknowledgement_timer is None:
            self._acknowledgement_timer = asyncio.get_running_loop().call_later(
                _ACKNOWLEDGEMENT_DELAY_S, self._acknowledge_now
            )

    def _acknowledge_now(self) -> None:
        if self._acknowledgement_timer is not None:
            self._acknowledgement_timer.cancel()
            self._acknowledgement_timer = None
        if self._last_frame > self._acknowledged:
            self._is_acknowledgement_due = True
            self._sender_has_work.set()

    async def _send_forever(self) -> None:
        while True:
            await self._sender_has_work.wait()
            await self._connected.wait()
            self._sender_has_work.clear()
            while self._outgoing or self._is_acknowledgement_due:
                if not await self._send_batch():
                    self._sender_has_work.set()
                    await asyncio.sleep(_SHORTEST_PAUSE_S)
                    break

    async def _send_batch(self) -> bool:
        """Whether the engine has answered; what it has not taken is put back, in order."""
        times_lost, last_frame = self._times_lost, self._last_frame
        commands = self._next_commands()
        self._is_acknowledgement_due = False
        batch = CommandBatch(self._worker_id, self._worker_epoch, last_frame, commands)
        try:
            body = msgspec.msgpack.encode(batch)
        except _NOT_ENCODABLE:
            self._sort_out(commands)
            return True
        try:
            await self._post_commands(body)
        except EngineUnreachable:
            if times_lost == self._times_lost:
                self._outgoing.extendleft(reversed(commands))
                self._is_acknowledgement_due = True
            return False
        except EngineRefused as error:
            logger.error("engine_refused_commands", extra={"reason": str(error)})
            self._give_up(commands, error)
            return False
        self._acknowledged = max(self._acknowledged, last_frame)
        return True

    def _sort_out(self, commands: list[Command]) -> None:
        """One that no message can say must not hold up the others: its stream fails alone."""
        self._is_acknowledgement_due = True
        for command in reversed(commands):
            try:
                msgspec.msgpack.encode(command)
            except _NOT_ENCODABLE as fault:
                self._give_up([command], EngineRefused(f"No engine can be told so: {fault}"))
            else:
                self._outgoing.appendleft(command)

    async def _post_commands(self, body: bytes) -> None:
        """Raises EngineUnreachable, EngineRefused."""
        path = "/v1/commands"
        try:
            status_code, content = await self._courier.post(path, body, timeout_s=_CALL_S)
        except OSError as error:
            raise _not_there(error) from error
        if status_code >= httpx.codes.BAD_REQUEST:
            raise _refusal(path, status_code, content)

    def _next_commands(self) -> list[Command]:
        commands: list[Command] = []
        num_tokens = 0
        while self._outgoing and num_tokens < _MAX_TOKENS_PER_BATCH:
            command = self._outgoing.popleft()
            commands.append(command)
            if isinstance(command, Submit):
                num_tokens += len(command.prompt_token_ids) + len(command.generated_token_ids)
        return commands

    def _give_up(self, commands: list[Command], error: EngineRefused) -> None:
        for command in commands:
            stream = self._streams.pop(command.sequence_id, None)
            if stream is not None:
                stream._fail(error)


class _FrameBuffer:
    """Cuts what arrives into frames."""

    def __init__(self) -> None:
        self._decoder = msgspec.msgpack.Decoder(Frame)
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> list[Frame]:
        """All frames that are whole now. Raises _BrokenFrames."""
        self._buffer += chunk
        frames = []
        start = 0
        while len(self._buffer) - start >= FRAME_LENGTH.size:
            (size_bytes,) = FRAME_LENGTH.unpack_from(self._buffer, start)
            if size_bytes > _MAX_FRAME_BYTES:
                raise _BrokenFrames(f"a frame of {size_bytes} bytes")
            end = start + FRAME_LENGTH.size + size_bytes
            if end > len(self._buffer):
                break
            frames.append(self._decode(self._buffer[start + FRAME_LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return frames

    def _decode(self, body: bytearray) -> Frame:
        try:
            return self._decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise _BrokenFrames(str(error)) from error


def _http_client(address: str, secret: str | None) -> httpx.AsyncClient:
    # For questions alone.
    limits = httpx.Limits(max_connections=16, keepalive_expiry=30)
    uds = address.removeprefix(UNIX_PREFIX) if address.startswith(UNIX_PREFIX) else None
    # Engines speak without TLS: to read what is trusted there would take 20 ms, for nothing.
    nobody_trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    transport = httpx.AsyncHTTPTransport(uds=uds, limits=limits, verify=nobody_trusted)
    return httpx.AsyncClient(
        base_url="http://engine" if address.startswith(UNIX_PREFIX) else address,
        headers={} if secret is None else {"authorization": bearer(secret)},
        timeout=httpx.Timeout(_SILENCE_S, connect=RESUME_WINDOW_S),
        transport=transport,
        trust_env=False,
    )


def _refusal(path: str, status_code: int, content: bytes) -> EngineRefused | EngineUnreachable:
    """What a status other than success means; calls that may succeed later are unreachable."""
    try:
        problem = msgspec.msgpack.decode(content, type=EngineProblem)
    except msgspec.MsgspecError:
        problem = EngineProblem("http", f"status {status_code}")
    message = f"{path}: {problem.message}"
    if status_code >= 500 or problem.code == "not_connected":
        return EngineUnreachable(message)
    return EngineRefused(message, code=problem.code)


def _not_there(error: Exception) -> EngineUnreachable:
    return EngineUnreachable(f"The engine does not answer: {error!r}")


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise EngineRefused(f"The engine's {kind.__name__} cannot be read: {error}") from error
