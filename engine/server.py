"""The engine over HTTP: a Unix socket on one host, TCP with a shared secret between hosts.

Decodes, checks who asks, and hands over to the sessions and to the engine's thread. Knows nothing
of what a sequence is.
"""

import asyncio
import hmac
import logging
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
import uvicorn
from litestar import Litestar, MediaType, Request, Response, asgi, get, post
from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException, MethodNotAllowedException
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.handlers import BaseRouteHandler
from litestar.types import Receive, Scope, Send

from engine.errors import (
    ConfigurationError,
    EngineError,
    EngineStopped,
    LinkRefused,
    MalformedCall,
    SecretMismatch,
    SequenceError,
)
from engine.metrics import Metrics, render
from engine.protocol import (
    MAX_BODY_BYTES,
    MSGPACK,
    UNIX_PREFIX,
    CommandBatch,
    EngineInfo,
    EngineProblem,
    EngineStatus,
    ForgetRequest,
    PinRequest,
    ProbeRequest,
    UnpinRequest,
    WarmRequest,
    bearer,
)
from engine.sequence import StepEvent
from engine.sessions import FrameReader, LinkLimits, Sessions
from engine.worker import Core, EngineWorker

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=msgspec.Struct)
Call = Request[Any, Any, Any]
Connection = ASGIConnection[Any, Any, Any, Any]

# A worker's idle connections live longer here than there, so that none closes under a call.
_KEEP_ALIVE_S = 75
_SHUTDOWN_S = 3
_SWEEP_S = 0.5


@dataclass(frozen=True, slots=True)
class Desk:
    """What the routes work with."""

    engine: EngineWorker
    sessions: Sessions
    info: EngineInfo
    metrics: Metrics


@get("/health", media_type=MediaType.TEXT, opt={"is_open": True})
async def health(request: Call) -> str:
    if not _desk(request).engine.is_alive:
        raise EngineStopped
    return "ok"


@get("/metrics", media_type=MediaType.TEXT)
async def metrics(request: Call) -> str:
    desk = _desk(request)
    return render(desk.metrics, await _status(desk))


@get("/v1/info")
async def info(request: Call) -> Response[bytes]:
    return _packed(_desk(request).info)


@get("/v1/status")
async def status(request: Call) -> Response[bytes]:
    return _packed(await _status(_desk(request)))


@post("/v1/probe", status_code=200)
async def probe(request: Call) -> Response[bytes]:
    wanted = _decode(await request.body(), ProbeRequest)
    return _packed(await _desk(request).engine.probe(wanted.adapter_digest))


@post("/v1/warm", status_code=200)
async def warm(request: Call) -> Response[bytes]:
    wanted = _decode(await request.body(), WarmRequest)
    return _packed(await _desk(request).engine.warm(wanted))


@post("/v1/pin", status_code=200)
async def pin(request: Call) -> Response[bytes]:
    wanted = _decode(await request.body(), PinRequest)
    return _packed(await _desk(request).engine.pin(wanted))


@post("/v1/unpin", status_code=200)
async def unpin(request: Call) -> Response[bytes]:
    wanted = _decode(await request.body(), UnpinRequest)
    return _packed(await _desk(request).engine.unpin(wanted.adapter_digest))


@post("/v1/forget", status_code=200)
async def forget(request: Call) -> Response[bytes]:
    wanted = _decode(await request.body(), ForgetRequest)
    return _packed(await _desk(request).engine.forget(wanted.adapter_digest))


@asgi("/v1/commands", copy_scope=False)
async def commands(scope: Scope, receive: Receive, send: Send) -> None:
    """In the way of every request, so without what a handler's arguments and answer cost."""
    if scope.get("method") != "POST":
        raise MethodNotAllowedException
    batch = _decode(await _body(receive), CommandBatch)
    desk = _desk(Connection(scope))
    if not desk.engine.is_alive:
        raise EngineStopped
    desk.sessions.command(batch)
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _body(receive: Receive) -> bytes:
    """Raises RequestEntityTooLarge, and MalformedCall where it does not come to its end."""
    pieces: list[bytes] = []
    size_bytes = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise MalformedCall("The body ended early")
        pieces.append(message["body"])
        size_bytes += len(message["body"])
        if size_bytes > MAX_BODY_BYTES:
            raise RequestEntityTooLarge
        if not message["more_body"]:
            return b"".join(pieces)


@asgi("/v1/frames", copy_scope=False)
async def frames(scope: Scope, receive: Receive, send: Send) -> None:
    connection = Connection(scope, receive)
    desk = _desk(connection)
    if not desk.engine.is_alive:
        raise EngineStopped
    after = _number(connection, "after")
    session = desk.sessions.connect(
        _text(connection, "worker"),
        _number(connection, "epoch"),
        after=after,
        resume=_number(connection, "resume") != 0,
    )
    reader = session.attach(after=after, heartbeat_s=desk.sessions.limits.heartbeat_s)
    try:
        await _stream(reader, receive, send)
    finally:
        reader.close()


async def _stream(reader: FrameReader, receive: Receive, send: Send) -> None:
    headers = [(b"content-type", MSGPACK.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async with asyncio.TaskGroup() as tasks:
        watch = tasks.create_task(_close_on_disconnect(reader, receive))
        async for packets in reader:
            await send({"type": "http.response.body", "body": packets, "more_body": True})
        watch.cancel()
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _close_on_disconnect(reader: FrameReader, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    reader.close()


async def _status(desk: Desk) -> EngineStatus:
    core = await desk.engine.status()
    return EngineStatus(
        engine_epoch=desk.info.engine_epoch,
        is_healthy=desk.engine.is_alive,
        num_running=core.num_running,
        num_waiting=core.num_waiting,
        num_blocks=core.num_blocks,
        num_free_blocks=core.num_free_blocks,
        num_adapter_blocks=core.num_adapter_blocks,
        resident_adapters=list(core.resident_adapters),
        hosted_adapters=list(core.hosted_adapters),
        pinned_adapters=list(core.pinned_adapters),
        quarantined_adapters=list(core.quarantined_adapters),
        tiers=core.tiers,
        adapter_wait_ms=desk.metrics.adapter_wait_ns // 1_000_000,
    )


def create_app(desk: Desk, *, secret: str | None) -> Litestar:
    app = Litestar(
        route_handlers=[
            *(health, metrics, info, status, commands, frames),
            *(probe, warm, pin, unpin, forget),
        ],
        guards=[_guard(secret)],
        exception_handlers={
            EngineError: _refuse,
            SequenceError: _refuse_adapter,
            HTTPException: _refuse_http,
            Exception: _fail,
        },
        request_max_body_size=MAX_BODY_BYTES,
        openapi_config=None,
        logging_config=None,
    )
    app.state["desk"] = desk
    return app


def _guard(
    secret: str | None,
) -> Callable[[Connection, BaseRouteHandler], None]:
    expected = None if secret is None else bearer(secret).encode()

    def require_secret(connection: Connection, handler: BaseRouteHandler) -> None:
        if expected is None or handler.opt.get("is_open"):
            return
        shown = connection.headers.get("authorization", "").encode()
        if not hmac.compare_digest(shown, expected):
            raise SecretMismatch

    return require_secret


def _desk(connection: Connection) -> Desk:
    desk = connection.app.state["desk"]
    assert isinstance(desk, Desk)
    return desk


def _packed(content: msgspec.Struct, *, status_code: int = 200) -> Response[bytes]:
    return Response(msgspec.msgpack.encode(content), media_type=MSGPACK, status_code=status_code)


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedCall(f"The body is not a {kind.__name__}: {error}") from error


def _text(connection: Connection, name: str) -> str:
    value = connection.query_params.get(name)
    if not value:
        raise MalformedCall(f"The query parameter {name!r} is missing")
    return str(value)


def _number(connection: Connection, name: str) -> int:
    value = _text(connection, name)
    if not value.isascii() or not value.isdigit() or len(value) > 19:
        raise MalformedCall(f"The query parameter {name!r} is not a whole number: {value!r}")
    return int(value)


def _refuse(_: Call, error: EngineError) -> Response[bytes]:
    status_code = error.status if isinstance(error, LinkRefused) else 422
    code = error.code if isinstance(error, LinkRefused) else "engine_error"
    return _packed(EngineProblem(code=code, message=str(error)), status_code=status_code)


def _refuse_adapter(_: Call, error: SequenceError) -> Response[bytes]:
    """It cannot be loaded: now, or as it is."""
    problem = EngineProblem(code=error.code, message=str(error))
    return _packed(problem, status_code=503 if error.is_retryable else 422)


def _refuse_http(_: Call, error: HTTPException) -> Response[bytes]:
    return _packed(EngineProblem("http", error.detail), status_code=error.status_code)


def _fail(request: Call, error: Exception) -> Response[bytes]:
    logger.error("call_failed", exc_info=error, extra={"path": request.url.path})
    return _packed(EngineProblem("internal", "The engine failed to answer."), status_code=500)


@contextmanager
def bind(address: str) -> Iterator[socket.socket]:
    """Hold an address, for its owner alone where that is a path, without listening yet.

    Raises ConfigurationError.
    """
    listener = _bind_unix(address) if address.startswith(UNIX_PREFIX) else _bind_tcp(address)
    try:
        yield listener
    finally:
        listener.close()
        if address.startswith(UNIX_PREFIX):
            Path(address.removeprefix(UNIX_PREFIX)).unlink(missing_ok=True)


def _bind_tcp(address: str) -> socket.socket:
    try:
        url = urlsplit(address)
        host, port = url.hostname, url.port
    except ValueError as error:
        raise ConfigurationError(f"Cannot read the address {address!r}: {error}") from error
    if url.scheme != "http" or not host or port is None:
        raise ConfigurationError(
            f"The address must be {UNIX_PREFIX}<path> or http://<host>:<port>: {address!r}"
        )
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return _bound(listener, (host, port), address)


def _bind_unix(address: str) -> socket.socket:
    path = Path(address.removeprefix(UNIX_PREFIX))
    _remove_stale(path)
    listener = _bound(socket.socket(socket.AF_UNIX), str(path), address)
    # Nobody can connect before the socket listens, so nobody slips in before this.
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    return listener


def _bound(listener: socket.socket, at: str | tuple[str, int], address: str) -> socket.socket:
    try:
        listener.bind(at)
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"Cannot listen on {address}: {error}") from error
    return listener


def _remove_stale(path: Path) -> None:
    """Clear away the socket of an engine that was killed."""
    if not path.exists():
        return
    if not path.is_socket():
        raise ConfigurationError(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe_socket:
        try:
            probe_socket.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        except OSError as error:
            raise ConfigurationError(f"Cannot use {UNIX_PREFIX}{path}: {error}") from error
        else:
            raise ConfigurationError(f"Another process listens on {UNIX_PREFIX}{path}")


class EngineServer:
    """One core behind one listening socket, from `serve` until `stop` or the core's failure."""

    def __init__(
        self,
        core: Core,
        *,
        info: EngineInfo,
        listener: socket.socket,
        secret: str | None,
        limits: LinkLimits,
    ) -> None:
        self._listener = listener
        self._engine = EngineWorker(core)
        self._metrics = Metrics()
        self._sessions = Sessions(
            self._engine, engine_epoch=info.engine_epoch, limits=limits, metrics=self._metrics
        )
        desk = Desk(self._engine, self._sessions, info, self._metrics)
        self._http = _HttpServer(
            uvicorn.Config(
                create_app(desk, secret=secret),
                lifespan="off",
                access_log=False,
                log_config=None,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_SHUTDOWN_S,
            )
        )
        self._has_failed = False
        # What steps did that no frame tells of yet.
        self._untold: list[StepEvent] = []

    async def serve(self, on_listening: Callable[[], None]) -> bool:
        """Answer calls until told to stop; False when it ended because the core failed."""
        self._http.on_listening = on_listening
        self._engine.start(on_step=self._on_step, on_end=self._on_end)
        try:
            async with asyncio.TaskGroup() as tasks:
                sweep = tasks.create_task(self._give_up_absent_workers())
                await self._http.serve(sockets=[self._listener])
                sweep.cancel()
        finally:
            await self._engine.stop()
        return not self._has_failed

    def stop(self) -> None:
        self._sessions.close()
        self._http.should_exit = True

    def _on_step(self, events: Sequence[StepEvent]) -> None:
        """Steps that end faster than this loop has its turns share a frame."""
        self._metrics.count_step(events)
        if not self._untold:
            asyncio.get_running_loop().call_soon(self._tell)
        self._untold += events

    def _tell(self) -> None:
        events, self._untold = self._untold, []
        self._sessions.publish(events)

    def _on_end(self, has_failed: bool) -> None:
        self._has_failed = has_failed
        self._tell()
        self.stop()

    async def _give_up_absent_workers(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self._sessions.give_up_absent()


class _HttpServer(uvicorn.Server):
    # Filled by whoever serves.
    on_listening: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.on_listening()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process's entry point: it ends the endless responses first."""
        yield
