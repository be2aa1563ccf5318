"""Server-sent events: how a stream is framed, kept alive, and left.

Knows bytes and timing. Knows nothing of what the events say.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import msgspec
from litestar.background_tasks import BackgroundTask
from litestar.response import Stream

from gateway.api.wire import openai_error
from gateway.errors import GatewayError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": waiting for the first token\n\n"
# Proxies cut connections that are silent for longer, often after 30 or 60 seconds.
KEEP_ALIVE_INTERVAL_S = 15.0


def event(body: msgspec.Struct) -> bytes:
    """One event carrying a JSON body."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def event_stream(
    events: AsyncIterator[bytes], *, headers: dict[str, str], leave: Callable[[], None]
) -> Stream:
    """Answer with events as they come; `leave` is called at the end, however that comes about."""

    async def left() -> None:
        leave()

    return Stream(
        _guarded(events),
        media_type="text/event-stream",
        status_code=200,
        headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers},
        background=BackgroundTask(left),
    )


async def _guarded(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        async for chunk in _kept_alive(events):
            yield chunk
    except GatewayError as error:
        # The status line is long gone: the error travels as an event, and no DONE follows.
        yield event(openai_error(error))
    except Exception:
        logger.exception("stream_failed")
        yield event(openai_error(GatewayError("Something went wrong on our side.")))


async def _kept_alive(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Comments while the first event is awaited; later ones come at the engine's pace."""
    first = asyncio.ensure_future(anext(events, None))
    try:
        while not (await asyncio.wait({first}, timeout=KEEP_ALIVE_INTERVAL_S))[0]:
            yield KEEP_ALIVE
        if (chunk := first.result()) is not None:
            yield chunk
            async for chunk in events:
                yield chunk
    finally:
        first.cancel()
