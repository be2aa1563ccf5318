"""What chat and completions do alike with a generation: headers, waiting, leaving."""

import asyncio
from dataclasses import dataclass
from typing import Any

from litestar import Request

from engine.protocol import TokenLogprob
from gateway.errors import GatewayError
from gateway.inference import Delta, FinishReason, Generation, StoppedBy
from gateway.tools.pieces import Piece


class ClientGone(GatewayError):
    """The client closed the connection before the answer was whole."""

    status = 499


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """All deltas of a generation put together."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason
    # Where money ended it.
    stopped_by: StoppedBy | None
    # What the text was read as; None where it is only text.
    pieces: list[Piece] | None


def answer_headers(generation: Generation) -> dict[str, str]:
    """What really served the call, and how much of its limits is left."""
    headers = {"x-request-id": str(generation.request_id), **generation.levels.headers()}
    target = generation.target
    if target.version_digest is not None:
        headers["x-adapter-version"] = str(target.version_number)
        headers["x-adapter-digest"] = target.version_digest
    return headers


async def collect(request: Request[Any, Any, Any], generation: Generation) -> WholeAnswer:
    """Wait for the whole answer, or leave it as soon as the client hangs up.

    Raises ClientGone then, and what `Generation.deltas` raises.
    """
    answer = asyncio.ensure_future(_put_together(generation))
    try:
        await wait_unless_gone(request, answer)
        return answer.result()
    except BaseException:
        generation.leave()
        raise


async def wait_unless_gone(
    request: Request[Any, Any, Any], work: asyncio.Future[Any], *, timeout_s: float | None = None
) -> None:
    """Wait until the work is done or the time is up, while the client stays on the line.

    Raises ClientGone when it hangs up; the work is cancelled then.
    """
    gone = asyncio.ensure_future(hang_up(request))
    try:
        await asyncio.wait({work, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not work.done():
            raise ClientGone
    except BaseException:
        work.cancel()
        await asyncio.wait({work})
        raise
    finally:
        gone.cancel()
        await asyncio.wait({gone})


async def _put_together(generation: Generation) -> WholeAnswer:
    deltas: list[Delta] = [delta async for delta in generation.deltas()]
    finish_reason = deltas[-1].finish_reason
    assert finish_reason is not None, "the last delta has a finish reason"
    return WholeAnswer(
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=[logprob for delta in deltas for logprob in delta.logprobs],
        finish_reason=finish_reason,
        stopped_by=generation.stopped_by,
        pieces=[piece for delta in deltas for piece in delta.pieces or ()]
        if generation.is_read
        else None,
    )


async def hang_up(request: Request[Any, Any, Any]) -> None:
    """Wait until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
