"""POST /v1/completions."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, Response, post
from litestar.di import NamedDependency
from litestar.params import JSONBody
from litestar.response import Stream

from gateway.api.answer import WholeAnswer, answer_headers, collect
from gateway.api.attempts import Answering, Desk, finish_whole, replay
from gateway.api.fields import (
    LogitBias,
    MaxCost,
    MinP,
    MinTokens,
    NumTokens,
    Penalty,
    RepetitionPenalty,
    Seed,
    StopString,
    StopStrings,
    StreamOptions,
    Temperature,
    TokenIds,
    TopK,
    TopP,
    Usage,
    User,
    end_user,
    given_fields,
    refuse_unserved,
    stop_strings,
)
from gateway.api.sse import DONE, EventMould, event, event_stream
from gateway.api.structured import (
    Choices,
    Json,
    ResponseFormat,
    StructuredOutputs,
    asked_grammar,
)
from gateway.auth import caller_of
from gateway.errors import InvalidRequest
from gateway.idempotency import KeptAnswer
from gateway.inference import (
    Delta,
    FinishReason,
    Generation,
    GenerationRequest,
    StoppedBy,
    TokenPrompt,
)
from gateway.text import TextCodec

# OpenAI's own default for this endpoint.
DEFAULT_MAX_TOKENS = 16


class CompletionRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's completion request for one prompt, as text or as token ids."""

    model: str
    prompt: str | TokenIds
    max_tokens: NumTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | None = None
    min_tokens: MinTokens | None = None
    seed: Seed | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    # What the answer has to look like; at most one of these. It goes before `min_tokens`.
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Json | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    # Ours: the most that the answer may cost, in nano-USD.
    max_cost: MaxCost | None = None
    # Whom the client asks for: reports can be grouped by it, and a canary keeps each on one side.
    user: User | None = None
    # Known, and refused unless the value changes nothing: see `fields.NEUTRAL_VALUES`.
    best_of: int | None = None
    echo: bool | None = None
    n: int | None = None
    suffix: str | None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel lists, one entry a token, as this endpoint has always had them."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    # Where each token's text begins, counted in characters from the answer's first.
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    text: str
    finish_reason: FinishReason | None
    logprobs: CompletionLogprobs | None = None
    index: int = 0
    # Ours: what ended the answer, where that was money.
    stopped_by: StoppedBy | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, frozen=True):
    """OpenAI's completion answer, whole or one event of a stream; `usage` also says the cost."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    object: Literal["text_completion"] = "text_completion"


@post(
    "/v1/completions",
    scope="inference",
    status_code=200,
    tags=["inference"],
    summary="Continue a prompt",
    request_max_body_size=16 << 20,
)
async def completions(
    data: JSONBody[CompletionRequest],
    request: Request[Any, Any, Any],
    desk: NamedDependency[Desk],
) -> Response[Completion] | Stream:
    """Continue a prompt with a base model or one of the caller's adapters."""
    principal, asked = caller_of(request), _read(data)
    answering = await desk.attempts.begin(request, principal, is_streamed=asked.is_streamed)
    if isinstance(answering, KeptAnswer):
        return replay(answering)
    try:
        generation = await desk.inference.start(principal, asked, answering.facts)
        if not data.stream:
            return await _whole(generation, data, await collect(request, generation), answering)
    except BaseException:
        answering.leave()
        raise

    def leave() -> None:
        generation.leave()
        answering.leave()

    headers = answer_headers(generation)
    events = answering.keep_stream(_events(generation, data), headers=headers)
    return await event_stream(
        request, events, headers=headers, leave=leave, has_more=generation.has_next
    )


def _read(data: CompletionRequest) -> GenerationRequest:
    refuse_unserved(data)
    if not data.prompt:
        raise InvalidRequest("'prompt' is empty: give at least one token.", param="prompt")
    if data.stream_options is not None and not data.stream:
        raise InvalidRequest("'stream_options' needs 'stream': true.", param="stream_options")
    return GenerationRequest(
        endpoint="completions",
        model=data.model,
        user=end_user(data.user),
        prompt=data.prompt if isinstance(data.prompt, str) else TokenPrompt(data.prompt),
        is_streamed=bool(data.stream),
        max_tokens=data.max_tokens or DEFAULT_MAX_TOKENS,
        temperature=data.temperature,
        top_p=data.top_p,
        top_k=None if data.top_k is None else max(data.top_k, 0),
        min_p=data.min_p or 0.0,
        presence_penalty=data.presence_penalty or 0.0,
        frequency_penalty=data.frequency_penalty or 0.0,
        repetition_penalty=data.repetition_penalty or 1.0,
        logit_bias=data.logit_bias or {},
        min_tokens=data.min_tokens or 0,
        seed=data.seed,
        stops=stop_strings(data.stop),
        stop_token_ids=tuple(data.stop_token_ids or ()),
        ignore_eos=bool(data.ignore_eos),
        logprobs=data.logprobs,
        max_cost_nano=data.max_cost,
        fields=partial(given_fields, data),
        grammar=asked_grammar(data),
    )


def _completion(
    generation: Generation,
    data: CompletionRequest,
    *choices: CompletionChoice,
    usage: Usage | None = None,
) -> Completion:
    return Completion(
        id=f"cmpl-{generation.request_id.hex}",
        created=int(generation.created.timestamp()),
        model=data.model,
        choices=list(choices),
        usage=usage,
    )


async def _whole(
    generation: Generation, data: CompletionRequest, answer: WholeAnswer, answering: Answering
) -> Response[Completion]:
    bill = generation.bill()
    logprobs = None if data.logprobs is None else _logprobs(generation.codec, answer, offset=0)
    choice = CompletionChoice(
        answer.text,
        answer.finish_reason,
        logprobs,
        stopped_by=answer.stopped_by or msgspec.UNSET,
    )
    completion = _completion(generation, data, choice, usage=Usage.of(bill))
    return await finish_whole(generation, completion, answering)


async def _events(generation: Generation, data: CompletionRequest) -> AsyncIterator[bytes]:
    """The chunks of each delta, in one piece."""
    bare = _completion(generation, data)
    mould = EventMould(bare)
    offset = 0
    async for delta in generation.deltas():
        if not (delta.text or delta.finish_reason or delta.logprobs):
            yield b""
            continue
        bill = generation.finish() if delta.finish_reason else None
        logprobs = (
            None if data.logprobs is None else _logprobs(generation.codec, delta, offset=offset)
        )
        offset += len(delta.text)
        chunks = mould.cast(
            CompletionChoice(
                delta.text,
                delta.finish_reason,
                logprobs,
                stopped_by=generation.stopped_by or msgspec.UNSET,
            )
        )
        if bill:
            if data.stream_options and data.stream_options.include_usage:
                chunks += event(msgspec.structs.replace(bare, usage=Usage.of(bill)))
            chunks += DONE
        yield chunks


def _logprobs(codec: TextCodec, answer: Delta | WholeAnswer, *, offset: int) -> CompletionLogprobs:
    tokens = [codec.token_text(token_id) for token_id in answer.token_ids]
    offsets = [offset + sum(map(len, tokens[:place])) for place in range(len(tokens))]
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[found.logprob for found in answer.logprobs],
        top_logprobs=[
            {codec.token_text(other): logprob for other, logprob in found.top}
            for found in answer.logprobs
        ],
        text_offset=offsets,
    )
