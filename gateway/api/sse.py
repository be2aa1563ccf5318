"""Server-sent events: how a stream is framed, kept alive, and left.

Knows bytes and timing. Knows nothing of what the events say.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from litestar import Request
from litestar.background_tasks import BackgroundTask
from litestar.response import Stream

from gateway.api.answer import wait_unless_gone
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


async def event_stream(
    request: Request[Any, Any, Any],
    events: AsyncIterator[bytes],
    *,
    headers: dict[str, str],
    leave: Callable[[], None],
) -> Stream:
    """Answer with events as they come; `leave` is called at the end, however that comes about.

    The answer begins with its first event, so that what fails at once is told by the status; where
    that takes long, it begins without. Raises what the first event raises, and ClientGone.
    """
    first = asyncio.ensure_future(anext(events, None))
    try:
        await wait_unless_gone(request, first, timeout_s=KEEP_ALIVE_INTERVAL_S)
        if first.done():
            first.result()
    except BaseException:
        leave()
        raise

    async def left() -> None:
        first.cancel()
        leave()

    return Stream(
        _guarded(first, events),
        media_type="text/event-stream",
        status_code=200,
        headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers},
        background=BackgroundTask(left),
    )


async def _guarded(
    first: asyncio.Future[bytes | None], rest: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    try:
        while not first.done():
            yield KEEP_ALIVE
            await asyncio.wait({first}, timeout=KEEP_ALIVE_INTERVAL_S)
        if (chunk := first.result()) is not None:
            yield chunk
            async for chunk in rest:
                yield chunk
    except GatewayError as error:
        # The status line is long gone: the error travels as an event, and no DONE follows.
        yield event(openai_error(error))
    except Exception:
        logger.exception("stream_failed")
        yield event(openai_error(GatewayError("Something went wrong on our side.")))
