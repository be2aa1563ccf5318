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

_encode = msgspec.json.Encoder().encode
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

    def of_text(self, choice: msgspec.Struct, *, field: str) -> "TextMould":
        """A mould for choices that are like this one, but for the text that is empty in it."""
        return TextMould(self.cast(choice), field=field)


class TextMould:
    """Events that are alike but for one text."""

    def __init__(self, event: bytes, *, field: str) -> None:
        """In `event` the field is an empty string."""
        named = f'"{field}":'.encode()
        # As above, no other string holds it.
        before, found, after = event.partition(named + b'""')
        assert found, f"the mould has an empty {field}"
        self._before = before + named
        self._after = after

    def cast(self, text: str) -> bytes:
        return self._before + _encode(text) + self._after


class EventStream(Stream):
    """An answer of events, sent as they come."""

    def __init__(
        self,
        first: "asyncio.Future[bytes | None]",
        rest: AsyncIterator[bytes],
        *,
        gone: "asyncio.Future[None]",
        is_over: Callable[[], bool],
        headers: dict[str, str],
        leave: Callable[[], None],
        failed: Callable[[GatewayError], bytes],
    ) -> None:
        super().__init__(rest, headers={**HEADERS, **headers}, status_code=200)
        self._first = first
        self._rest = rest
        self._gone = gone
        self._is_over = is_over
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
        try:
            while not self._first.done():
                await send(_body(KEEP_ALIVE))
                await asyncio.wait({self._first}, timeout=KEEP_ALIVE_INTERVAL_S)
            piece = self._first.result()
            while piece is not None and not self._is_over():
                if piece:
                    await send(_body(piece))
                piece = await anext(self._rest, None)
            # Nothing waits behind the last piece, and one way through all layers less is worth it.
            await anext(self._rest, None)
            last = piece or b""
        except GatewayError as error:
            last = self._failed(error)
        except Exception:
            logger.exception("stream_failed")
            last = self._failed(GatewayError("Something went wrong on our side."))
        await send({"type": "http.response.body", "body": last, "more_body": False})


def _body(content: bytes) -> Any:
    return {"type": "http.response.body", "body": content, "more_body": True}


async def event_stream(
    request: Request[Any, Any, Any],
    events: AsyncIterator[bytes],
    *,
    is_over: Callable[[], bool],
    headers: dict[str, str],
    leave: Callable[[], None],
    failed: Callable[[GatewayError], bytes] = error_event,
) -> Stream:
    """Answer with events as they come; `leave` is called at the end, however that comes about.

    `is_over` says whether the event that came last is the last; `failed` spells what goes wrong
    once the answer has begun.
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
        gone=gone,
        is_over=is_over,
        headers=headers,
        leave=leave,
        failed=failed,
    )
