"""The routes that batches may name, asked without HTTP: a body in, the body of an answer out.

What a route reads, refuses and answers is its own; here is only what a batch changes of it.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import msgspec

from gateway.api import chat, completions, embeddings, responses
from gateway.api.answer import WholeAnswer, put_together
from gateway.api.unknown_fields import take_out
from gateway.auth import Principal
from gateway.batches.job import Answered
from gateway.batches.lines import invalid_field
from gateway.errors import InvalidRequest, NotAllowed
from gateway.generation import Generation
from gateway.generation_request import GenerationRequest
from gateway.inference import Inference
from gateway.prices import BATCH

# Behind every tier of the routes themselves: see `fields.served_tier`.
PRIORITY = 20
SCOPE = "inference"

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
Body = TypeVar("Body", bound=msgspec.Struct)
# Makes the body of whole answers to a request.
Compose = Callable[[Generation, Body, Sequence[WholeAnswer]], Awaitable[msgspec.Struct]]


class LineAnswerer:
    """Answers lines as the routes would, each to its end."""

    def __init__(self, inference: Inference, *, takes_out_unknown: bool) -> None:
        self._inference = inference
        self._takes_out_unknown = takes_out_unknown
        self._answers: Mapping[str, Callable[[Principal, Any], Awaitable[Answered]]] = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._complete,
            "/v1/embeddings": self._embed,
            "/v1/responses": self._respond,
        }

    async def answer(self, principal: Principal, endpoint: str, body: bytes) -> Answered:
        """Raises what the route would answer."""
        if SCOPE not in principal.scopes:
            raise NotAllowed(f"The batch's key has not the scope {SCOPE!r} any more.")
        try:
            asked = msgspec.json.decode(body)
        except RecursionError as error:
            raise InvalidRequest("The JSON is nested too deeply.") from error
        if asked.get("stream"):
            raise InvalidRequest(
                "'stream' is not for batches: their answers come whole.", param="stream"
            )
        if asked.get("service_tier") in ("priority", "fast"):
            raise InvalidRequest(
                "'service_tier' is not for batches: they go behind everything else.",
                param="service_tier",
            )
        return await self._answers[endpoint](principal, asked)

    async def _chat(self, principal: Principal, asked: Any) -> Answered:
        data, ignored = self._decode(asked, chat.ChatCompletionRequest)
        request = chat.read_request(data, principal)
        answered = await self._generate(principal, request, data, chat.compose)
        return replace(answered, ignored_fields=ignored)

    async def _complete(self, principal: Principal, asked: Any) -> Answered:
        data, ignored = self._decode(asked, completions.CompletionRequest)
        request = completions.read_request(data)
        answered = await self._generate(principal, request, data, completions.compose)
        return replace(answered, ignored_fields=ignored)

    async def _respond(self, principal: Principal, asked: Any) -> Answered:
        data, ignored = self._decode(asked, responses.ResponseRequest)
        request = responses.read_request(data, principal)
        with responses.in_own_words():
            answered = await self._generate(principal, request, data, responses.compose)
        return replace(answered, ignored_fields=ignored)

    async def _generate(
        self, principal: Principal, request: GenerationRequest, data: Body, compose: Compose[Body]
    ) -> Answered:
        request = replace(request, endpoint=BATCH + request.endpoint, priority=PRIORITY)
        generation = await self._inference.start(principal, request)
        try:
            body = await compose(generation, data, await put_together(generation))
            return Answered(msgspec.json.encode(body), generation)
        except BaseException:
            generation.leave()
            raise

    async def _embed(self, principal: Principal, asked: Any) -> Answered:
        data, ignored = self._decode(asked, embeddings.EmbeddingsRequest)
        request = embeddings.read_request(data)
        request = replace(request, endpoint=BATCH + request.endpoint, priority=PRIORITY)
        embedding = await self._inference.embed(principal, request)
        try:
            answer = await embeddings.compose(embedding, data, await embedding.vectors())
            return Answered(msgspec.json.encode(answer), embedding, ignored)
        except BaseException:
            embedding.leave()
            raise

    def _decode(self, asked: Any, kind: type[Body]) -> tuple[Body, list[str]]:
        """The body, and the names of what was taken out of it."""
        ignored = take_out(asked, kind) if self._takes_out_unknown else []
        try:
            # As the framework decodes the bodies of routes.
            return msgspec.convert(asked, kind, strict=False, str_keys=True), ignored
        except msgspec.ValidationError as error:
            raise invalid_field(error) from error
