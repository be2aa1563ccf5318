"""The route: a generation begun by a request, and written as a response."""

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import Any

from litestar import Request, Response, post
from litestar.di import NamedDependency
from litestar.params import JSONBody
from litestar.response import Stream

from gateway.api.answer import WholeAnswer
from gateway.api.attempts import Desk, replay
from gateway.api.responses.answer import ResponseObject
from gateway.api.responses.events import AnyEvent, spelled
from gateway.api.responses.request import ResponseRequest, read_request
from gateway.api.responses.writer import Writer
from gateway.auth import caller_of
from gateway.errors import GatewayError
from gateway.generation import Generation
from gateway.idempotency import KeptAnswer

# What the path of a generation calls these fields.
NAMES = {"messages": "input", "prompt": "input", "max_tokens": "max_output_tokens"}


@post(
    "/v1/responses",
    scope="inference",
    events=AnyEvent,
    status_code=200,
    tags=["inference"],
    summary="Answer a conversation, in items",
    request_max_body_size=16 << 20,
)
async def responses(
    data: JSONBody[ResponseRequest],
    request: Request[Any, Any, Any],
    desk: NamedDependency[Desk],
) -> Response[ResponseObject] | Stream:
    """Answer a conversation with a base model or one of the caller's adapters; store nothing."""
    principal = caller_of(request)
    asked = read_request(data, principal)
    with in_own_words():
        begun = await desk.begin(request, principal, asked)
        if isinstance(begun, KeptAnswer):
            return replay(begun)
        if data.stream:
            writer = Writer(begun.generation, data)
            return await begun.stream(
                _events(begun.generation, writer),
                failed=lambda error: _together(writer.fail(error)),
            )
        return await begun.whole(partial(compose, begun.generation, data))


@contextlib.contextmanager
def in_own_words() -> Iterator[None]:
    """Errors name the fields that this route has."""
    try:
        yield
    except GatewayError as error:
        error.param = NAMES.get(error.param or "", error.param)
        raise


async def compose(
    generation: Generation, data: ResponseRequest, answers: Sequence[WholeAnswer]
) -> ResponseObject:
    """The body of a whole answer."""
    [answer], writer = answers, Writer(generation, data)
    for delta in answer.deltas:
        writer.take(delta)
    response, _ = writer.end(answer.deltas[-1], generation.bill())
    return response


async def _events(generation: Generation, writer: Writer) -> AsyncIterator[bytes]:
    """The events of the deltas that come together, in one piece."""
    async for deltas in generation.deltas():
        events: list[AnyEvent] = []
        for delta in deltas:
            events += writer.take(delta)
            if delta.finish_reason:
                _, rest = writer.end(delta, generation.finish())
                events += rest
        yield _together(events)


def _together(events: Sequence[AnyEvent]) -> bytes:
    return b"".join(map(spelled, events))
