"""What routes do alike with a generation: headers, waiting, leaving."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from litestar import Request

from engine.protocol import TokenLogprob
from gateway.choices import Delta, FinishReason, StoppedBy
from gateway.embeddings import Embedding
from gateway.errors import GatewayError
from gateway.generation import Generation
from gateway.tools.pieces import Piece


class ClientGone(GatewayError):
    """The client closed the connection before the answer was whole."""

    status = 499


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """All deltas of one choice put together."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason
    # Where money ended it.
    stopped_by: StoppedBy | None
    # The token that ended it, which `token_ids` leave out.
    end_token_id: int | None
    # Of its prompt's tokens but the first, where it was asked for them.
    prompt_logprobs: list[TokenLogprob] | None
    # What the text was read as; None where it is only text.
    pieces: list[Piece] | None
    # What it was put together from.
    deltas: Sequence[Delta]


def answer_headers(generation: Generation | Embedding) -> dict[str, str]:
    """What really served the call, and how much of its limits is left."""
    headers = {"x-request-id": str(generation.request_id), **generation.levels.headers()}
    target = generation.target
    if target.version_digest is not None:
        headers["x-adapter-version"] = str(target.version_number)
        headers["x-adapter-digest"] = target.version_digest
    return headers


async def collect(request: Request[Any, Any, Any], generation: Generation) -> list[WholeAnswer]:
    """Wait for all choices to be whole, or leave them as soon as the client hangs up.

    Raises ClientGone then, and what `Generation.deltas` raises.
    """
    answer = asyncio.ensure_future(put_together(generation))
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


async def put_together(generation: Generation) -> list[WholeAnswer]:
    """Wait for all choices to be whole. Raises what `Generation.deltas` raises."""
    parts: list[list[Delta]] = [[] for _ in range(generation.num_choices)]
    async for deltas in generation.deltas():
        for delta in deltas:
            parts[delta.index].append(delta)
    return [_whole(deltas) for deltas in parts]


def _whole(deltas: Sequence[Delta]) -> WholeAnswer:
    last = next(delta for delta in reversed(deltas) if delta.finish_reason is not None)
    assert last.finish_reason is not None
    told = (delta.prompt_logprobs for delta in deltas)
    return WholeAnswer(
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=[logprob for delta in deltas for logprob in delta.logprobs],
        finish_reason=last.finish_reason,
        stopped_by=last.stopped_by,
        end_token_id=last.end_token_id,
        prompt_logprobs=next((each for each in told if each is not None), None),
        pieces=_pieces(deltas),
        deltas=deltas,
    )


def _pieces(deltas: Sequence[Delta]) -> list[Piece] | None:
    told = [delta.pieces for delta in deltas if delta.pieces is not None]
    return [piece for pieces in told for piece in pieces] if told else None


async def hang_up(request: Request[Any, Any, Any]) -> None:
    """Wait until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
