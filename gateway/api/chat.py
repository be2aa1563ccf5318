"""POST /v1/chat/completions."""

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, Response, post
from litestar.di import NamedDependency
from litestar.params import JSONBody
from litestar.response import Stream

from engine.protocol import TokenLogprob
from gateway.api.answer import WholeAnswer
from gateway.api.asking import AskingForChoices, check_stream_options
from gateway.api.attempts import Desk, replay
from gateway.api.fields import (
    Metadata,
    NumLogprobs,
    NumTokens,
    ServedTier,
    ServiceTier,
    TemplateVariables,
    Usage,
    User,
    end_user,
    given_fields,
    priority_of,
    refuse_unserved,
    served_tier,
)
from gateway.api.prompts import (
    PromptLogprobs,
    check_prompt_logprobs,
    prompt_logprobs,
    spelled,
    told_token_ids,
)
from gateway.api.sse import DONE, EventMould, event
from gateway.api.structured import (
    asked_grammar,
)
from gateway.api.tools import (
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    Tools,
    asked_toolbox,
    calls_for_template,
    check_form,
    check_turns,
)
from gateway.auth import Principal, caller_of
from gateway.choices import Delta, FinishReason, StoppedBy
from gateway.errors import InvalidRequest
from gateway.generation import Generation
from gateway.generation_request import GenerationRequest
from gateway.idempotency import KeptAnswer
from gateway.text import Ending, TextCodec
from gateway.tools.pieces import Arguments, CallBegins, Piece, Thought, Withdrawn, Words, add_up


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a message; text is the only type."""

    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    # Null only beside calls.
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    # Of a tool's message: the call that it answers.
    tool_call_id: str | None = None
    # What the assistant thought; some templates show it to the model again.
    reasoning_content: str | None = None
    function_call: Any | None = None
    audio: Any | None = None
    refusal: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: `developer` is the newer word for `system`."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


def conversation(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as chat templates expect them.

    Raises InvalidRequest naming the first that cannot be, or would have to change the answer.
    """
    for number, message in enumerate(messages):
        refuse_unserved(message, place=f"messages[{number}].")
    check_turns(messages)
    turns = [message.for_template() for message in messages]
    names: dict[str, str] = {}
    for number, (message, turn) in enumerate(zip(messages, turns, strict=True)):
        if message.reasoning_content is not None:
            turn["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            place = f"messages[{number}].tool_calls"
            turn["tool_calls"] = calls_for_template(message.tool_calls, place=place)
            names |= {call.id: call.function.name for call in message.tool_calls}
        if message.tool_call_id is not None:
            turn |= {"tool_call_id": message.tool_call_id, "name": names[message.tool_call_id]}
    return turns


class ChatCompletionRequest(AskingForChoices, frozen=True, forbid_unknown_fields=True):
    """OpenAI's chat request; known fields that are not served are refused by name."""

    model: str
    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    max_completion_tokens: NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    # What the answer may call, and whether it must.
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # The newer word for `user`.
    safety_identifier: User | None = None
    # Comes back with a whole answer.
    metadata: Metadata | None = None
    # A hint where to look for the prompt's beginning. There is one place to look.
    prompt_cache_key: Annotated[str, msgspec.Meta(max_length=512)] | None = None
    # Who may wait, and who may not be kept waiting.
    service_tier: ServiceTier | None = None
    # What the chat template is told, and how it ends the prompt.
    chat_template_kwargs: TemplateVariables | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    # Known, and refused unless the value changes nothing: see `fields.NEUTRAL_VALUES`.
    audio: Any | None = None
    function_call: Any | None = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    moderation: Any | None = None
    prediction: Any | None = None
    prompt_cache_options: Any | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    store: bool | None = None
    verbosity: str | None = None
    web_search_options: Any | None = None
    chat_template: str | None = None
    documents: list[Any] | None = None


class ChatTopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatTokenLogprob]


class AssistantMessage(msgspec.Struct, frozen=True):
    # Null where there are only calls or thoughts.
    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    # What the model thought before its answer, of models that do.
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None
    index: int = 0
    # Ours: what ended the answer, where that was money.
    stopped_by: StoppedBy | msgspec.UnsetType = msgspec.UNSET
    # vLLM's, with the one that ended the answer.
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct, frozen=True):
    """OpenAI's chat answer; `usage` also says what it cost."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    service_tier: ServedTier | msgspec.UnsetType = msgspec.UNSET
    metadata: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    # vLLM's.
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    content: str | None = None
    role: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    delta: ChatDelta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None
    index: int = 0
    stopped_by: StoppedBy | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletionChunk(msgspec.Struct, frozen=True):
    """One event of a streamed chat answer."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    service_tier: ServedTier | msgspec.UnsetType = msgspec.UNSET
    # vLLM's, in the first chunk.
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


@post(
    "/v1/chat/completions",
    scope="inference",
    events=ChatCompletionChunk,
    status_code=200,
    tags=["inference"],
    summary="Answer a conversation",
    request_max_body_size=16 << 20,
)
async def chat_completions(
    data: JSONBody[ChatCompletionRequest],
    request: Request[Any, Any, Any],
    desk: NamedDependency[Desk],
) -> Response[ChatCompletion] | Stream:
    """Answer a conversation with a base model or one of the caller's adapters."""
    principal = caller_of(request)
    begun = await desk.begin(request, principal, read_request(data, principal))
    if isinstance(begun, KeptAnswer):
        return replay(begun)
    if data.stream:
        return await begun.stream(_events(begun.generation, data))
    return await begun.whole(partial(compose, begun.generation, data))


def read_request(data: ChatCompletionRequest, principal: Principal) -> GenerationRequest:
    """What is asked for, freed of its spelling. Raises InvalidRequest and NotAllowed."""
    refuse_unserved(data)
    check_stream_options(data.stream_options, is_streamed=data.stream)
    if data.top_logprobs is not None and not data.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    check_prompt_logprobs(data.prompt_logprobs, is_streamed=bool(data.stream))
    is_parallel = data.parallel_tool_calls is not False
    toolbox = asked_toolbox(data.tools, data.tool_choice, is_parallel=is_parallel)
    grammar = asked_grammar(data)
    if toolbox is not None:
        check_form(toolbox, grammar, ignore_eos=bool(data.ignore_eos))
    return GenerationRequest(
        endpoint="chat.completions",
        model=data.model,
        user=end_user(data.user or data.safety_identifier),
        prompts=[conversation(data.messages)],
        max_tokens=data.max_completion_tokens or data.max_tokens,
        logprobs=(data.top_logprobs or 0) if data.logprobs else None,
        prompt_logprobs=data.prompt_logprobs,
        num_choices=data.n or 1,
        ending=ending_of(
            data.messages, continues=data.continue_final_message, asks=data.add_generation_prompt
        ),
        template_variables=data.chat_template_kwargs or {},
        tells_token_ids=bool(data.return_token_ids),
        priority=priority_of(data.service_tier, principal),
        settings=data.settings(),
        fields=partial(given_fields, data),
        grammar=grammar,
        tools=toolbox,
    )


def ending_of(
    messages: Sequence[ChatMessage], *, continues: bool | None, asks: bool | None
) -> Ending:
    """How the prompt ends: null means the default. Raises InvalidRequest."""
    if not continues:
        return Ending.PLAIN if asks is False else Ending.ASKING
    if asks:
        raise InvalidRequest(
            "'continue_final_message' and 'add_generation_prompt' exclude each other: the answer"
            " goes on with a message, or begins one.",
            param="add_generation_prompt",
        )
    if messages[-1].role != "assistant":
        raise InvalidRequest(
            "'continue_final_message' needs a last message with the role assistant.",
            param="continue_final_message",
        )
    return Ending.CONTINUING


def _id(generation: Generation) -> str:
    return f"chatcmpl-{generation.request_id.hex}"


async def compose(
    generation: Generation, data: ChatCompletionRequest, answers: Sequence[WholeAnswer]
) -> ChatCompletion:
    """The body of a whole answer."""
    [prompt], told = generation.prompts, answers[0].prompt_logprobs
    of_prompt = await _of_prompt(generation.codec, data, prompt, told)
    return ChatCompletion(
        id=_id(generation),
        created=int(generation.created.timestamp()),
        model=data.model,
        choices=[
            _choice(generation.codec, data, answer, index=index)
            for index, answer in enumerate(answers)
        ],
        usage=Usage.of(generation.bill(), reasoning_tokens=generation.reasoning_tokens),
        service_tier=served_tier(data.service_tier) or msgspec.UNSET,
        metadata=msgspec.UNSET if data.metadata is None else data.metadata,
        prompt_token_ids=list(prompt) if data.return_token_ids else msgspec.UNSET,
        prompt_logprobs=of_prompt,
    )


def _message(answer: WholeAnswer) -> AssistantMessage:
    if answer.pieces is None:
        return AssistantMessage(answer.text)
    found = add_up(answer.pieces)
    return AssistantMessage(
        found.words or (None if found.calls or found.thoughts else ""),
        reasoning_content=found.thoughts or msgspec.UNSET,
        tool_calls=[ToolCall.of(call) for call in found.calls] or msgspec.UNSET,
    )


async def _of_prompt(
    codec: TextCodec,
    data: ChatCompletionRequest,
    prompt: Sequence[int],
    told: Sequence[TokenLogprob] | None,
) -> PromptLogprobs | msgspec.UnsetType:
    if told is None or data.prompt_logprobs is None:
        return msgspec.UNSET
    make = partial(prompt_logprobs, codec, prompt, told, num_top=data.prompt_logprobs)
    return await spelled(make, told)


def _choice(
    codec: TextCodec, data: ChatCompletionRequest, answer: WholeAnswer, *, index: int
) -> ChatChoice:
    return ChatChoice(
        _message(answer),
        answer.finish_reason,
        _logprobs(codec, answer) if data.logprobs else None,
        index=index,
        stopped_by=answer.stopped_by or msgspec.UNSET,
        token_ids=told_token_ids(answer) if data.return_token_ids else msgspec.UNSET,
    )


async def _events(generation: Generation, data: ChatCompletionRequest) -> AsyncIterator[bytes]:
    """The chunks of the deltas that come together, in one piece."""
    bare = ChatCompletionChunk(
        id=_id(generation),
        created=int(generation.created.timestamp()),
        model=data.model,
        choices=[],
        service_tier=served_tier(data.service_tier) or msgspec.UNSET,
    )
    scribe = _Scribe(generation, data, bare)
    opening = _opening(generation, data, bare)
    async for deltas in generation.deltas():
        chunks, opening = [opening], b""
        for delta in deltas:
            scribe.write(delta, chunks)
        if generation.is_over:
            bill = generation.finish()
            if data.stream_options and data.stream_options.include_usage:
                usage = Usage.of(bill, reasoning_tokens=generation.reasoning_tokens)
                chunks.append(event(msgspec.structs.replace(bare, usage=usage)))
            chunks.append(DONE)
        yield b"".join(chunks)


class _Scribe:
    """Spells the chunks of each delta."""

    def __init__(
        self, generation: Generation, data: ChatCompletionRequest, bare: ChatCompletionChunk
    ) -> None:
        self._codec = generation.codec
        self._tells_logprobs = bool(data.logprobs)
        self._tells_token_ids = bool(data.return_token_ids)
        self._mould = EventMould(bare)
        # Of each choice: almost all chunks of an answer are a text and no more.
        self._words = [
            self._mould.of_text(
                ChatChunkChoice(ChatDelta(content=""), index=index), field="content"
            )
            for index in range(generation.num_choices)
        ]

    def write(self, delta: Delta, chunks: list[bytes]) -> None:
        """Add its chunks to those."""
        if delta.pieces is not None:
            chunks += self._read(delta)
        elif not (self._tells_logprobs or self._tells_token_ids):
            if delta.text:
                chunks.append(self._words[delta.index].cast(delta.text))
        elif delta.text or self._tells_more(delta):
            chunks.append(self._cast(ChatDelta(content=delta.text), delta))
        if delta.finish_reason:
            end = ChatChunkChoice(
                ChatDelta(),
                finish_reason=delta.finish_reason,
                index=delta.index,
                stopped_by=delta.stopped_by or msgspec.UNSET,
            )
            chunks.append(self._mould.cast(end))

    def _read(self, delta: Delta) -> list[bytes]:
        """A chunk for each piece; the first has the log-probabilities and token ids."""
        parts = [_part(piece) for piece in delta.pieces or ()]
        if not parts and self._tells_more(delta):
            parts = [ChatDelta()]
        return [
            self._mould.cast(ChatChunkChoice(part, index=delta.index))
            if number
            else self._cast(part, delta)
            for number, part in enumerate(parts)
        ]

    def _tells_more(self, delta: Delta) -> bool:
        """Whether there is something to tell beside its text."""
        return bool(delta.logprobs or (self._tells_token_ids and told_token_ids(delta)))

    def _cast(self, part: ChatDelta, delta: Delta) -> bytes:
        """With all that is told of its tokens."""
        is_told = self._tells_logprobs and (delta.logprobs or delta.pieces is None)
        choice = ChatChunkChoice(
            part,
            logprobs=_logprobs(self._codec, delta) if is_told else None,
            index=delta.index,
            token_ids=told_token_ids(delta) if self._tells_token_ids else msgspec.UNSET,
        )
        return self._mould.cast(choice)


def _opening(
    generation: Generation, data: ChatCompletionRequest, bare: ChatCompletionChunk
) -> bytes:
    """Says who speaks, in each of the choices."""
    first = bare
    if data.return_token_ids:
        [prompt] = generation.prompts
        first = msgspec.structs.replace(bare, prompt_token_ids=list(prompt))
    return b"".join(
        EventMould(bare if index else first).cast(
            ChatChunkChoice(ChatDelta(role="assistant", content=""), index=index)
        )
        for index in range(generation.num_choices)
    )


def _part(piece: Piece) -> ChatDelta:
    match piece:
        case Words(text) | Withdrawn(text=text):
            return ChatDelta(content=text)
        case Thought(text):
            return ChatDelta(reasoning_content=text)
        case CallBegins() | Arguments():
            return ChatDelta(tool_calls=[ToolCallDelta.of(piece)])


def _logprobs(codec: TextCodec, answer: Delta | WholeAnswer) -> ChatLogprobs:
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                token=codec.token_text(token_id),
                logprob=found.logprob,
                bytes=codec.token_bytes(token_id),
                top_logprobs=[
                    ChatTopLogprob(codec.token_text(other), logprob, codec.token_bytes(other))
                    for other, logprob in found.top
                ],
            )
            for token_id, found in zip(answer.token_ids, answer.logprobs, strict=True)
        ]
    )
