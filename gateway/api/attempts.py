"""`Idempotency-Key` and retries, in front of what a model answers.

Reads the headers, and hands out an attempt: it says whether the request came before, keeps the
answer in the moment before its last byte goes out, and lets go of the name where there is none.
A generation that has begun for an attempt is answered whole or as a stream. Spells neither.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from litestar import Request, Response
from litestar.response import Stream

from gateway.api.answer import WholeAnswer, answer_headers, collect
from gateway.api.sse import error_event, event_stream
from gateway.auth import Principal
from gateway.embeddings import Embedding
from gateway.errors import GatewayError
from gateway.generation import Generation
from gateway.generation_request import GenerationRequest
from gateway.idempotency import Answers, Claim, KeptAnswer, fingerprint
from gateway.inference import Attempt, Inference

Body = TypeVar("Body", bound=msgspec.Struct)

NAME_HEADER = "idempotency-key"
# The count of the OpenAI clients' own retries.
RETRY_HEADER = "x-stainless-retry-count"
REPLAYED = {"idempotent-replayed": "true"}


class Answering:
    """Mutable: one attempt at a request, until its answer is kept or let go of."""

    def __init__(self, facts: Attempt, answers: Answers, claim: Claim | None) -> None:
        self.facts = facts
        self._answers = answers
        # None where the client gave the request no name, and once that is settled.
        self._claim = claim

    @property
    def is_named(self) -> bool:
        return self._claim is not None

    async def keep(self, body: bytes, *, media_type: str, headers: dict[str, str]) -> None:
        """Call it before the last byte is sent and, where nothing was sent before, billed."""
        claim, self._claim = self._claim, None
        if claim is not None:
            await self._answers.keep(claim, KeptAnswer(media_type, headers, body))

    def leave(self) -> None:
        """There is no answer, or none that is whole. Does nothing once it is kept."""
        claim, self._claim = self._claim, None
        if claim is not None:
            self._answers.release(claim)

    def keep_stream(
        self, events: AsyncIterator[bytes], generation: Generation, *, headers: dict[str, str]
    ) -> AsyncIterator[bytes]:
        """The events as they come, kept before those of the last delta go out."""
        return self._kept(events, generation, headers=headers) if self.is_named else events

    async def _kept(
        self, events: AsyncIterator[bytes], generation: Generation, *, headers: dict[str, str]
    ) -> AsyncIterator[bytes]:
        chunks = []
        async for chunk in events:
            chunks.append(chunk)
            if generation.is_over:
                await self.keep(b"".join(chunks), media_type="text/event-stream", headers=headers)
            yield chunk


class Attempts:
    """What tells attempts apart. `compares_streams` where a retry may take one off the bill."""

    def __init__(self, answers: Answers, *, compares_streams: bool) -> None:
        self.answers = answers
        self._compares_streams = compares_streams

    async def begin(
        self, request: Request[Any, Any, Any], principal: Principal, *, is_streamed: bool
    ) -> Answering | KeptAnswer:
        """An attempt, or the answer that there is. Raises what `Answers.claim` raises."""
        name = request.headers.get(NAME_HEADER)
        is_compared = self._compares_streams and is_streamed
        if name is None and not is_compared:
            return Answering(Attempt(), self.answers, None)
        secret = request.headers["authorization"].rpartition(" ")[2]
        body = request.url.path.encode() + b"\x00" + await request.body()
        is_retry = request.headers.get(RETRY_HEADER, "0") != "0"
        claim = None
        if name is not None:
            found = await self.answers.claim(principal, secret=secret, name=name, body=body)
            if isinstance(found, KeptAnswer):
                return found
            claim, is_retry = found, is_retry or found.attempt > 1
        digest = fingerprint(secret, b"attempt", body) if is_compared else None
        return Answering(Attempt(digest, is_retry), self.answers, claim)


@dataclass(frozen=True, slots=True)
class Desk:
    """What the routes of generations work with.

    One dependency, because the framework makes a task for each where there are several.
    """

    inference: Inference
    attempts: Attempts

    async def begin(
        self, request: Request[Any, Any, Any], principal: Principal, asked: GenerationRequest
    ) -> "Begun | KeptAnswer":
        """A generation for it, or the answer that there is.

        Raises what `Answers.claim` and `Inference.start` raise.
        """
        is_streamed = asked.settings.is_streamed
        answering = await self.attempts.begin(request, principal, is_streamed=is_streamed)
        if isinstance(answering, KeptAnswer):
            return answering
        try:
            generation = await self.inference.start(principal, asked, answering.facts)
        except BaseException:
            answering.leave()
            raise
        return Begun(generation, answering, request)


class Begun:
    """A generation under way for an attempt: answer it `whole` or as a `stream`, once."""

    def __init__(
        self, generation: Generation, answering: Answering, request: Request[Any, Any, Any]
    ) -> None:
        self.generation = generation
        self._answering = answering
        self._request = request

    async def whole(
        self, spell: Callable[[Sequence[WholeAnswer]], Awaitable[Body]]
    ) -> Response[Body]:
        """Wait for all of it. Raises what `collect` raises."""
        try:
            answers = await collect(self._request, self.generation)
            return await finish_whole(self.generation, await spell(answers), self._answering)
        except BaseException:
            self.leave()
            raise

    async def stream(
        self,
        events: AsyncIterator[bytes],
        *,
        failed: Callable[[GatewayError], bytes] = error_event,
    ) -> Stream:
        """The events of its deltas, as they come. Raises what the first of them raises."""
        headers = answer_headers(self.generation)
        return await event_stream(
            self._request,
            self._answering.keep_stream(events, self.generation, headers=headers),
            is_over=lambda: self.generation.is_over,
            headers=headers,
            leave=self.leave,
            failed=failed,
        )

    def leave(self) -> None:
        """Nobody wants the rest. Does nothing once all of it is answered."""
        self.generation.leave()
        self._answering.leave()


async def finish_whole(
    generation: Generation | Embedding, completion: Body, answering: Answering
) -> Response[Body]:
    """Keep an answer, close it, and write it: kept before it is billed, billed before it is sent.

    A gateway that dies in between bills nothing for what can be had again.
    """
    cost_nano = generation.bill().cost_nano
    headers = {**answer_headers(generation), "x-cost-nano": str(cost_nano)}
    if answering.is_named:
        body = msgspec.json.encode(completion)
        await answering.keep(body, media_type="application/json", headers=headers)
    billed = generation.finish()
    assert billed.cost_nano == cost_nano, "the client is shown what is billed"
    return Response(completion, headers=headers)


def replay(answer: KeptAnswer) -> Response[Any]:
    """The answer once more, a stream as a stream."""
    return Response(
        answer.body,
        status_code=200,
        media_type=answer.media_type,
        headers={**answer.headers, **REPLAYED},
    )
