"""POST /v1/completions."""

from collections.abc import AsyncIterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Annotated, Any, Literal, cast

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
    MAX_ANSWERS,
    NumAnswers,
    NumLogprobs,
    TokenId,
    TokenIds,
    Usage,
    end_user,
    given_fields,
    refuse_unserved,
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
from gateway.auth import caller_of
from gateway.choices import Delta, FinishReason, StoppedBy
from gateway.errors import InvalidRequest
from gateway.generation import Generation
from gateway.generation_request import GenerationRequest
from gateway.idempotency import KeptAnswer
from gateway.prompts import Prompt, TokenPrompt

# OpenAI's own default for this endpoint.
DEFAULT_MAX_TOKENS = 16


class CompletionRequest(AskingForChoices, frozen=True, forbid_unknown_fields=True):
    """OpenAI's completion request, for one prompt or several, as text or as token ids."""

    model: str
    # One text or its token ids, or a list of one kind: a list within a list is a prompt's ids.
    prompt: str | Annotated[list[str | TokenId | TokenIds], msgspec.Meta(max_length=1_000_000)]
    logprobs: NumLogprobs | None = None
    # All answers come back, so the best of more cannot be chosen.
    best_of: NumAnswers | None = None
    # Begin each answer with its prompt, and its log-probabilities with those of the prompt.
    echo: bool | None = None
    # Known, and refused unless the value changes nothing: see `fields.NEUTRAL_VALUES`.
    suffix: str | None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel lists, one entry a token, as this endpoint has always had them."""

    tokens: list[str]
    # Null for the first token of a prompt, of which nothing can be said.
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]]
    # Where each token's text begins, counted in characters from the choice's first.
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    text: str
    finish_reason: FinishReason | None
    logprobs: CompletionLogprobs | None = None
    index: int = 0
    # Ours: what ended the answer, where that was money.
    stopped_by: StoppedBy | msgspec.UnsetType = msgspec.UNSET
    # vLLM's; of a stream, the prompt's are in the first chunk of the choice. The answer's are with
    # the one that ended it.
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


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
    events=Completion,
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
    begun = await desk.begin(request, caller_of(request), read_request(data))
    if isinstance(begun, KeptAnswer):
        return replay(begun)
    if data.stream:
        return await begun.stream(_events(begun.generation, data))
    return await begun.whole(partial(compose, begun.generation, data))


def read_request(data: CompletionRequest) -> GenerationRequest:
    """What is asked for, freed of its spelling. Raises InvalidRequest."""
    refuse_unserved(data)
    prompts = _prompts(data.prompt)
    check_stream_options(data.stream_options, is_streamed=data.stream)
    if data.best_of is not None and data.best_of != (data.n or 1):
        raise InvalidRequest(
            "'best_of' is supported where it equals 'n': all answers come back.", param="best_of"
        )
    if len(prompts) * (data.n or 1) > MAX_ANSWERS:
        raise InvalidRequest(
            f"{len(prompts)} prompts with {data.n or 1} answers each are more than the"
            f" {MAX_ANSWERS} answers that a request may have: ask for fewer.",
            param="n" if len(prompts) <= MAX_ANSWERS else "prompt",
        )
    check_prompt_logprobs(data.prompt_logprobs, is_streamed=bool(data.stream))
    return GenerationRequest(
        endpoint="completions",
        model=data.model,
        user=end_user(data.user),
        prompts=prompts,
        max_tokens=data.max_tokens or DEFAULT_MAX_TOKENS,
        logprobs=data.logprobs,
        prompt_logprobs=_num_of_prompt(data),
        num_choices=data.n or 1,
        tells_token_ids=bool(data.return_token_ids),
        settings=data.settings(),
        fields=partial(given_fields, data),
        grammar=asked_grammar(data),
    )


def _prompts(prompt: str | list[str | int | list[int]]) -> list[Prompt]:
    """Raises InvalidRequest for what is empty, and for a list of several kinds."""
    if not prompt or (isinstance(prompt, list) and not all(each or each == 0 for each in prompt)):
        raise InvalidRequest("'prompt' is empty: give at least one token.", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(each) for each in prompt}
    if kinds == {int}:
        return [TokenPrompt(cast(list[int], prompt))]
    if kinds == {str}:
        return cast(list[Prompt], prompt)
    if kinds == {list}:
        return [TokenPrompt(each) for each in cast(list[list[int]], prompt)]
    raise InvalidRequest(
        "'prompt' must be a text, token ids, or a list of one of these kinds.", param="prompt"
    )


def _num_of_prompt(data: CompletionRequest) -> int | None:
    """How many alternatives to ask for beside each prompt token."""
    asked = [data.prompt_logprobs, data.logprobs if data.echo else None]
    return max((each for each in asked if each is not None), default=None)


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


async def compose(
    generation: Generation, data: CompletionRequest, answers: Sequence[WholeAnswer]
) -> Completion:
    """The body of a whole answer."""
    choices = [await _spell_whole(generation, data, answers, n) for n in range(len(answers))]
    return _completion(generation, data, *choices, usage=Usage.of(generation.bill()))


async def _spell_whole(
    generation: Generation, data: CompletionRequest, answers: Sequence[WholeAnswer], index: int
) -> CompletionChoice:
    # The first of those to one prompt was asked about it for all of them.
    told = answers[index - index % (data.n or 1)].prompt_logprobs
    speller = _Speller(generation, data, index)
    return await spelled(partial(speller.spell, answers[index], told=told), told)


async def _events(generation: Generation, data: CompletionRequest) -> AsyncIterator[bytes]:
    """The chunks of the deltas that come together, in one piece."""
    bare = _completion(generation, data)
    mould = EventMould(bare)
    spellers = [_Speller(generation, data, index) for index in range(generation.num_choices)]
    async for deltas in generation.deltas():
        chunks = []
        for delta in deltas:
            has_ids = data.return_token_ids and delta.token_ids
            if not (delta.text or delta.finish_reason or delta.logprobs or has_ids):
                continue
            choice = await spelled(
                partial(spellers[delta.index].spell, delta, told=delta.prompt_logprobs),
                delta.prompt_logprobs,
            )
            chunks.append(mould.cast(choice))
        if generation.is_over:
            bill = generation.finish()
            if data.stream_options and data.stream_options.include_usage:
                chunks.append(event(msgspec.structs.replace(bare, usage=Usage.of(bill))))
            chunks.append(DONE)
        yield b"".join(chunks)


class _Speller:
    """Mutable: spells one choice, whole or in pieces, of which the first has the prompt's part."""

    def __init__(self, generation: Generation, data: CompletionRequest, index: int) -> None:
        self._codec = generation.codec
        self._data = data
        self._index = index
        self._prompt = generation.prompt_of(index)
        self._is_first = True
        # Characters of the text before the next piece.
        self._offset = 0

    def spell(
        self, piece: Delta | WholeAnswer, *, told: Sequence[TokenLogprob] | None
    ) -> CompletionChoice:
        """`told` is what was told of the prompt."""
        data, is_first, self._is_first = self._data, self._is_first, False
        echo = self._echo() if is_first and data.echo else ""
        logprobs = None
        if data.logprobs is not None:
            logprobs = self._logprobs(piece, echo, told=(told if is_first and data.echo else None))
        self._offset += len(echo) + len(piece.text)
        return CompletionChoice(
            echo + piece.text,
            piece.finish_reason,
            logprobs,
            index=self._index,
            stopped_by=piece.stopped_by or msgspec.UNSET,
            prompt_token_ids=(
                list(self._prompt) if is_first and data.return_token_ids else msgspec.UNSET
            ),
            token_ids=told_token_ids(piece) if data.return_token_ids else msgspec.UNSET,
            prompt_logprobs=(
                msgspec.UNSET
                if told is None or data.prompt_logprobs is None
                else prompt_logprobs(self._codec, self._prompt, told, num_top=data.prompt_logprobs)
            ),
        )

    def _echo(self) -> str:
        """The prompt as it came, where it came as a text."""
        prompt = self._data.prompt
        if isinstance(prompt, str):
            return prompt
        one = prompt[self._index // (self._data.n or 1)] if isinstance(prompt[0], str) else None
        if isinstance(one, str):
            return one
        shows_special_tokens = self._data.skip_special_tokens is False
        return self._codec.decode(self._prompt, shows_special_tokens=shows_special_tokens)

    def _logprobs(
        self, piece: Delta | WholeAnswer, echo: str, *, told: Sequence[TokenLogprob] | None
    ) -> CompletionLogprobs:
        answered = self._listed(piece.token_ids, piece.logprobs, offset=self._offset + len(echo))
        if told is None:
            return answered
        asked = self._listed(self._prompt, [None, *told], offset=self._offset)
        return CompletionLogprobs(
            *(getattr(asked, name) + getattr(answered, name) for name in asked.__struct_fields__)
        )

    def _listed(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob | None],
        *,
        offset: int,
    ) -> CompletionLogprobs:
        codec, num_top = self._codec, self._data.logprobs
        tokens = [codec.token_text(token_id) for token_id in token_ids]
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[None if found is None else found.logprob for found in logprobs],
            top_logprobs=[
                {codec.token_text(other): logprob for other, logprob in found.top[:num_top]}
                if found
                else {}
                for found in logprobs
            ],
            text_offset=list(accumulate(map(len, tokens[:-1]), initial=offset)) if tokens else [],
        )
