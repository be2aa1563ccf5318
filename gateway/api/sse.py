"""Server-sent events: how a stream is framed, kept alive, and left.

Knows bytes and timing. Knows nothing of what the events say.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from litestar import Request
from litestar.response import Stream
from litestar.types import ASGIApp, Receive, Scope, Send

from gateway.api.answer import ClientGone, hang_up
from gateway.api.wire import openai_error
from gateway.errors import GatewayError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": waiting for the first token\n\n"
# Proxies cut connections that are silent for longer, often after 30 or 60 seconds.
KEEP_ALIVE_INTERVAL_S = 15.0
EVENTS = "text/event-stream"
HEADERS = {
    "content-type": f"{EVENTS}; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


def event(body: msgspec.Struct) -> bytes:
    """One event carrying a JSON body."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def named_event(name: str, body: msgspec.Struct) -> bytes:
    """The same under a name."""
    return f"event: {name}\n".encode() + event(body)


def error_event(error: GatewayError) -> bytes:
    """The error that ends a stream whose status line is long gone; no DONE follows."""
    return event(openai_error(error))


class EventMould:
    """Events that are alike but for the one object in their list of choices.

    Encoding all of each would take a multiple of the time.
    """

    _CHOICES = b'"choices":['

    def __init__(self, body: msgspec.Struct) -> None:
        """`body` is one such event, without a choice."""
        # No string holds it before the list: in JSON the quotes of a string are escaped.
        before, _, after = event(body).partition(self._CHOICES)
        self._before = before + self._CHOICES
        self._after = after

    def cast(self, choice: msgspec.Struct) -> bytes:
        return self._before + msgspec.json.encode(choice) + self._after


class EventStream(Stream):
    """An answer of events, each sent as soon as no other is there to go with it."""

    def __init__(
        self,
        first: "asyncio.Future[bytes | None]",
        rest: AsyncIterator[bytes],
        *,
        has_more: Callable[[], bool],
        gone: "asyncio.Future[None]",
        headers: dict[str, str],
        leave: Callable[[], None],
        failed: Callable[[GatewayError], bytes],
    ) -> None:
        super().__init__(rest, headers={**HEADERS, **headers}, status_code=200)
        self._first = first
        self._rest = rest
        self._has_more = has_more
        self._gone = gone
        self._leave = leave
        self._failed = failed

    def to_asgi_response(  # type: ignore[override]  # any ASGI application does
        self, app: Any, request: Request[Any, Any, Any], **_: Any
    ) -> ASGIApp:
        return self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in self.headers.items()]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send_until_gone(send)
        finally:
            self._first.cancel()
            self._gone.cancel()
            self._leave()

    async def _send_until_gone(self, send: Send) -> None:
        try:
            async with asyncio.timeout(None) as patience:

                def lose_patience(_: object) -> None:
                    # It may be told of a client that left just when the last byte was sent.
                    with contextlib.suppress(RuntimeError):
                        patience.reschedule(0.0)

                self._gone.add_done_callback(lose_patience)
                try:
                    await self._send_all(send)
                finally:
                    self._gone.remove_done_callback(lose_patience)
        except TimeoutError:
            if not self._gone.done():
                raise

    async def _send_all(self, send: Send) -> None:
        pieces: list[bytes] = []
        try:
            while not self._first.done():
                await send(_body(KEEP_ALIVE))
                await asyncio.wait({self._first}, timeout=KEEP_ALIVE_INTERVAL_S)
            if (piece := self._first.result()) is not None:
                pieces.append(piece)
                if not self._has_more():
                    await _flush(pieces, send)
                async for piece in self._rest:
                    pieces.append(piece)
                    if not self._has_more():
                        await _flush(pieces, send)
        except GatewayError as error:
            pieces.append(self._failed(error))
        except Exception:
            logger.exception("stream_failed")
            pieces.append(self._failed(GatewayError("Something went wrong on our side.")))
        await _flush(pieces, send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _flush(pieces: list[bytes], send: Send) -> None:
    body = b"".join(pieces)
    pieces.clear()
    if body:
        await send(_body(body))


def _body(content: bytes) -> Any:
    return {"type": "http.response.body", "body": content, "more_body": True}


async def event_stream(
    request: Request[Any, Any, Any],
    events: AsyncIterator[bytes],
    *,
    headers: dict[str, str],
    leave: Callable[[], None],
    has_more: Callable[[], bool],
    failed: Callable[[GatewayError], bytes] = error_event,
) -> Stream:
    """Answer with events as they come; `leave` is called at the end, however that comes about.

    `has_more` says whether the next event is there already: those that are go out in one piece.
    `failed` spells what goes wrong once the answer has begun.
    The answer begins with its first event, so that what fails at once is told by the status; where
    that takes long, it begins without. Raises what the first event raises, and ClientGone.
    """
    first = asyncio.ensure_future(anext(events, None))
    gone = asyncio.ensure_future(hang_up(request))
    try:
        await asyncio.wait(
            {first, gone}, timeout=KEEP_ALIVE_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED
        )
        if first.done():
            first.result()
        elif gone.done():
            raise ClientGone
    except BaseException:
        first.cancel()
        gone.cancel()
        await asyncio.wait({first, gone})
        leave()
        raise
    return EventStream(
        first,
        events,
        has_more=has_more,
        gone=gone,
        headers=headers,
        leave=leave,
        failed=failed,
    )
