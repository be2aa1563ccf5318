"""The path of every generation: who, which adapter, what it may cost, which engine, what came out.

`Inference.start` reads from top to bottom as the life of a request; `Generation` is its answer as
it grows. Knows nothing of HTTP or of how an answer is spelled on the wire.
"""

import asyncio
import datetime
import logging
import secrets
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from engine.client import EngineLink, SequenceStream
from engine.errors import LinkError
from engine.protocol import (
    Grammar,
    SamplingParams,
    SequenceEvent,
    SequenceFault,
    SequenceState,
    TokenLogprob,
)
from gateway.answer_forms import whole_form
from gateway.auth import Principal
from gateway.database import DATABASE_TROUBLE, Database
from gateway.errors import (
    ContextLengthExceeded,
    EngineFailed,
    GatewayError,
    InvalidRequest,
    JournalFailed,
    LimitReached,
    PolicyViolation,
    Unavailable,
)
from gateway.grammars import AskedGrammar, Grammars, InvalidGrammar
from gateway.journal import Journal, Meter, Opened
from gateway.ledger import Ledger
from gateway.limits import Admission, Ask, admit, refused, rehearse, waited_too_long
from gateway.overload import Place, WaitingRoom
from gateway.policies.moderation import Judge
from gateway.policies.rules import Asked
from gateway.policies.screen import Screen
from gateway.policies.store import Policies
from gateway.policies.watch import Watch
from gateway.prices import Bill, ceiling
from gateway.privacy import Contents
from gateway.registry import Registry, Target, model_not_found
from gateway.routing import Router
from gateway.tables import new_id
from gateway.text import TextCodec, TextCodecs, TextStream
from gateway.tools.json_calls import strings_in
from gateway.tools.pieces import Piece
from gateway.tools.reader import Reader
from gateway.tools.reasoning import Thinking, ThoughtCount
from gateway.tools.toolbox import Toolbox

logger = logging.getLogger(__name__)

# Tokens of which one character may consist: each may be one of its bytes.
MAX_TOKENS_OF_CHARACTER = 4

FinishReason = Literal["stop", "length", "content_filter", "tool_calls"]
# Why an answer is shorter than was asked for, where money is the reason.
StoppedBy = Literal["budget", "max_cost"]

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt that its client has encoded."""

    token_ids: list[int]


Prompt = Messages | str | TokenPrompt


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What a client asked for, checked and freed of its spelling."""

    # e.g. "chat.completions"; reports are grouped by it
    endpoint: str
    model: str
    # Whom the client asks for, in its own words: reports can be grouped by it, and one user always
    # gets the same side of a canary.
    user: str | None
    prompt: Prompt
    is_streamed: bool
    # None where the client named none.
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    # By token id.
    logit_bias: Mapping[int, float]
    min_tokens: int
    seed: int | None
    stops: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    # How many alternatives beside each token's own log-probability; None for neither.
    logprobs: int | None
    # Nano-USD that the client will pay at most.
    max_cost_nano: int | None = None
    # Names the fields that the client gave, where a policy asks.
    fields: Callable[[], frozenset[str]] = frozenset
    # None leaves the answer free.
    grammar: AskedGrammar | None = None
    # What the answer may call; None for nothing.
    tools: Toolbox | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """What is known of other attempts at the same request."""

    # The same for all of them; None where nobody wants to compare.
    digest: bytes | None = None
    is_retry: bool = False


FIRST = Attempt()


@dataclass(frozen=True, slots=True)
class Keeping:
    """A tenant's wish that the texts of a request be kept, and what is known of them so far."""

    contents: Contents
    tenant_id: uuid.UUID
    days: int
    prompt: str
    end_user: str | None
    # Pieces of the completion, filled as they come.
    pieces: list[str]

    def keep(self, request_id: uuid.UUID) -> None:
        self.contents.keep(
            self.tenant_id,
            request_id,
            prompt=self.prompt,
            completion="".join(self.pieces),
            end_user=self.end_user,
            days=self.days,
        )


class Delta(msgspec.Struct, frozen=True):
    """What one engine step added to an answer. The last one has a finish reason.

    A struct, because there is one of each token: it is made in a seventh of the time.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None
    # What the text was read as, of an answer with calls or thoughts in it; None of any other.
    pieces: list[Piece] | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a request would take and cost at most, in nano-USD."""

    prompt_tokens: int
    max_output_tokens: int
    prompt_cost_nano: int
    max_cost_nano: int
    # Why it would not be admitted now.
    refusal: GatewayError | None
    # Whether its adapter sits in a slot; None where no engine could be asked.
    is_resident: bool | None


class Generation:
    """One answer while it grows; whoever iterates it must `finish` or `leave` it.

    Every way out ends in the ledger exactly once.
    """

    def __init__(
        self,
        *,
        request_id: uuid.UUID,
        target: Target,
        codec: TextCodec,
        stream: SequenceStream,
        meter: Meter,
        ledger: Ledger,
        admission: Admission,
        place: Place,
        stops: Sequence[str],
        after: Sequence[int] = (),
        keeping: Keeping | None = None,
        watch: Watch | None = None,
        is_streamed: bool = False,
        tools: Toolbox | None = None,
        thinking: Thinking = "never",
    ) -> None:
        self.request_id = request_id
        self.target = target
        self.levels = admission.levels
        # Filled with the last delta.
        self.stopped_by: StoppedBy | None = None
        self.codec = codec
        self.created = datetime.datetime.now(datetime.UTC)
        self._stream = stream
        self._meter = meter
        self._ledger = ledger
        self._admission = admission
        # Held until the first token.
        self._place = place
        self._deadline_s = _deadline_s(admission)
        self._text: TextStream | ThoughtCount | Screen = codec.stream(stops, after=after)
        # None where the answer is only text, as it is of most requests.
        self._reader: Reader | None = None
        self._thoughts: ThoughtCount | None = None
        if tools is not None or thinking != "never":
            self._reader = _reader(codec, tools, thinking, watch)
            self._text = codec.marked_stream(stops)
        if thinking != "never":
            self._text = self._thoughts = ThoughtCount(self._text, thinking)
        # What a policy puts between the text and its client; None where there is none.
        self._screen: Screen | None = None
        self._judge: Judge | None = None
        if watch is not None:
            self._screen = watch.screen(self._text)
            self._text = self._screen or self._text
            self._judge = watch.judge(is_streamed=is_streamed)
        # Whether the answer may end before the last token that the engine made for it.
        self._is_searched = bool(stops) or watch is not None
        self._num_tokens = 0
        self._adapter_wait_ns = 0
        self._outcome: FinishReason | None = None
        self._is_closed = False
        # None where nothing of what is said is kept.
        self._keeping = keeping

    async def deltas(self) -> AsyncIterator[Delta]:
        """The answer, step by step. An empty one says that all before it may go out now.

        Raises EngineFailed or Unavailable where the engine could not finish it, LimitReached where
        it waited longer for its first token than it may.
        """
        try:
            while (event := await self._next()) is not None:
                if self._is_short_of_money(event):
                    await self._fund(event)
                delta = self._apply(event)
                if self._judge is not None:
                    delta = await self._judged(self._judge, delta)
                if self._keeping is not None:
                    self._keeping.pieces.append(delta.text)
                if self._reader is not None:
                    delta = self._read(self._reader, delta)
                if delta.text or delta.finish_reason or delta.logprobs or not self.has_next():
                    yield delta
                if delta.finish_reason:
                    return
        except LinkError as fault:
            self._close("error")
            raise self._with_levels(
                Unavailable(f"The answer was cut off; ask again: {fault}")
            ) from fault
        except GatewayError as error:
            self._close("error")
            self._with_levels(error)
            raise

    @property
    def is_read(self) -> bool:
        """Whether its deltas have pieces."""
        return self._reader is not None

    @property
    def reasoning_tokens(self) -> int | None:
        """How many it thought with so far; None of a model that does not."""
        return None if self._thoughts is None else self._thoughts.num_tokens

    def has_next(self) -> bool:
        """Whether the next delta is there already: asking for it waits for nothing."""
        if self._judge is not None:
            return False
        event = self._stream.next_event
        return event is not None and not self._is_short_of_money(event)

    def _with_levels(self, error: GatewayError) -> GatewayError:
        error.headers = self.levels.headers() | error.headers
        return error

    async def _next(self) -> SequenceEvent | None:
        if self._deadline_s is None:
            event = await anext(self._stream, None)
        else:
            try:
                async with asyncio.timeout_at(self._deadline_s):
                    event = await anext(self._stream, None)
            except TimeoutError:
                raise waited_too_long(self._admission) from None
        if event is not None and event.token_ids:
            self._deadline_s = None
            self._place.leave()
        return event

    async def _judged(self, judge: Judge, delta: Delta) -> Delta:
        """What of the answer its moderation allows by now."""
        allowed = await judge.hear(delta.text, is_last=delta.finish_reason is not None)
        if allowed is not None:
            return msgspec.structs.replace(delta, text=allowed)
        if self._outcome is None:
            self._stream.abort()
        self._outcome, self.stopped_by = "content_filter", None
        return msgspec.structs.replace(delta, text="", finish_reason="content_filter")

    def _read(self, reader: Reader, delta: Delta) -> Delta:
        """The same with what its text was read as."""
        pieces, reason = reader.feed(delta.text), delta.finish_reason
        if reason is not None:
            pieces += reader.finish(is_cut=reason != "stop")
        if reader.is_refused:
            if self._outcome is None:
                self._stream.abort()
            self._outcome, self.stopped_by, reason = "content_filter", None, "content_filter"
        elif reason == "stop" and reader.has_calls:
            reason = "tool_calls"
        return msgspec.structs.replace(delta, pieces=pieces, finish_reason=reason)

    async def _fund(self, event: SequenceEvent) -> None:
        """Ask for more money now, where a step outran the heartbeat."""
        while self._is_short_of_money(event):
            funded = self._meter.funded_output_tokens
            await self._ledger.fund(self._meter)
            if self._meter.funded_output_tokens == funded:
                return

    def _is_short_of_money(self, event: SequenceEvent) -> bool:
        meter = self._meter
        return meter.is_budgeted and event.generated_tokens > meter.funded_output_tokens

    def bill(self) -> Bill:
        """What `finish` is going to say, once the last delta is there."""
        return self._meter.usage()

    def finish(self) -> Bill:
        """Close a whole answer; call it just before its last byte is written."""
        assert self._outcome is not None, "an answer is finished after its last delta"
        self._is_closed = True
        self._place.leave()
        self._end(self._outcome)
        return self._ledger.close(self.request_id, self._outcome)

    def leave(self) -> None:
        """The client is gone, or nobody wants the rest. Does nothing once the answer is closed."""
        self._close("abort")

    def _close(self, outcome: str) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._place.leave()
        self._meter.disconnect()
        self._stream.abort()
        self._end(outcome)
        self._ledger.close(self.request_id, outcome, sent=False)

    def _end(self, outcome: str) -> None:
        if self._keeping is not None:
            self._keeping.keep(self.request_id)
        logger.info(
            "generation_ended",
            extra={
                "request_id": str(self.request_id),
                "outcome": outcome,
                "completion_tokens": self._num_tokens,
                "engine_ms": self._meter.engine_ns // 1_000_000,
                "adapter_wait_ms": self._adapter_wait_ns // 1_000_000,
            },
        )

    def _apply(self, event: SequenceEvent) -> Delta:
        self._adapter_wait_ns = event.adapter_wait_ns
        if event.state in (SequenceState.FAILED, SequenceState.ABORTED):
            raise _translate(event.fault)
        text, token_ids = "", self._paid(event.token_ids)
        is_cut = len(token_ids) < len(event.token_ids)
        for num_used, token_id in enumerate(token_ids, start=1):
            text += self._text.feed(token_id)
            if self._text.is_stopped:
                # Tokens that the engine made since are its own affair.
                self._stream.abort()
                self._outcome = "stop"
                token_ids = token_ids[:num_used]
                break
        self._num_tokens += len(token_ids)
        if self._is_searched:
            self._meter.cap(self._stream.sequence_id, self._num_tokens)
        if self._outcome is None and is_cut:
            self._stream.abort()
            self._outcome, self.stopped_by = "length", "budget"
            text += self._text.finish()
        elif self._outcome is None and event.state.is_final:
            self._outcome = "length" if event.state is SequenceState.LENGTH else "stop"
            if self._outcome == "length" and self._admission.is_cut_by_max_cost:
                self.stopped_by = "max_cost"
            text += self._text.finish()
            # The token that ended the answer is counted, not shown.
            token_ids = token_ids[:-1] if self._outcome == "stop" else token_ids
        if self._screen is not None and self._screen.is_refused:
            self._outcome, self.stopped_by = "content_filter", None
        return Delta(
            text=text,
            token_ids=token_ids,
            logprobs=(event.logprobs or [])[: len(token_ids)],
            finish_reason=self._outcome,
        )

    def _paid(self, token_ids: list[int]) -> list[int]:
        """Those that the hold pays for; the others are the engine's own affair."""
        if not self._meter.is_budgeted:
            return token_ids
        return token_ids[: max(self._meter.funded_output_tokens - self._num_tokens, 0)]


class Inference:
    """Everything that a generation passes through."""

    def __init__(
        self,
        *,
        database: Database,
        registry: Registry,
        texts: TextCodecs,
        router: Router,
        journal: Journal,
        ledger: Ledger,
        contents: Contents,
        policies: Policies,
        grammars: Grammars,
    ) -> None:
        self._contents = contents
        self._policies = policies
        self._grammars = grammars
        self._database = database
        self._registry = registry
        self._texts = texts
        self._router = router
        self._journal = journal
        self._ledger = ledger
        # By engine; they live as long as this process.
        self._rooms: defaultdict[EngineLink, WaitingRoom] = defaultdict(WaitingRoom)

    async def start(
        self, principal: Principal, request: GenerationRequest, attempt: Attempt = FIRST
    ) -> Generation:
        """Admit a request and hand it to an engine.

        Raises ModelNotFound, TemplateFault, InvalidRequest, InvalidGrammar, PolicyViolation,
        LimitReached or Unavailable; nothing is held or billed then.
        """
        target = await self.resolve(principal, request.model, user=request.user)
        codec = await self._texts.get(
            target.text_bundle_digest, base=target.base_text_bundle_digest
        )
        prompt_ids = await _encode(
            codec, request.prompt, caller=str(principal.tenant_id), tools=request.tools
        )
        thinking = _thinking(codec, request.prompt, prompt_ids)
        max_tokens = _fit(request.max_tokens, len(prompt_ids), target.context_length)
        request_id, watch = new_id(), None
        if principal.policy_id is not None:
            watch = await self._policies.watch(
                principal, model=target.public_name, request_id=request_id
            )
        if watch is not None:
            max_tokens = await watch.admit(
                _asked(
                    request.prompt,
                    codec,
                    prompt_ids,
                    request.fields(),
                    max_tokens=max_tokens,
                    tools=request.tools,
                )
            )
        _check_tokens(request, max_tokens=max_tokens, vocab_size=codec.vocab_size)
        asked, thinking = whole_form(request.grammar, request.tools, codec=codec, thinking=thinking)
        grammar = await self._grammar(principal, asked, target, codec)
        keeping = await self._keeping(principal, request)
        # Before money is held, so that there is nothing to give back when no engine is there.
        link = self._router.pick()
        assert principal.tenant_id is not None, "only tenants are billed"
        place = self._rooms[link].enter(principal.tenant_id)
        try:
            admission = await self._admit(
                principal,
                target,
                request_id=request_id,
                endpoint=request.endpoint,
                prompt_tokens=len(prompt_ids),
                max_tokens=max_tokens,
                gateway_instance_id=self._journal.instance_id,
                max_cost_nano=request.max_cost_nano,
            )
        except BaseException:
            place.leave()
            raise
        # No await from here on: the journal knows the sequence before its first frame can come.
        stream = link.submit(
            prompt_ids,
            sampling=_sampling(request, codec, admission.max_output_tokens),
            adapter_digest=target.weights_digest,
            adapter_fingerprint=target.fingerprint,
            cache_salt=principal.cache_salt,
            fairness_key=str(principal.tenant_id),
            grammar=grammar,
        )
        try:
            meter = self._journal.opened(
                Opened.of(
                    principal,
                    target,
                    admission,
                    endpoint=request.endpoint,
                    is_streamed=request.is_streamed,
                    prompt_tokens=len(prompt_ids),
                    sequence_ids=[stream.sequence_id],
                    end_user=request.user,
                    attempt_digest=attempt.digest,
                    is_retry=attempt.is_retry,
                )
            )
        except JournalFailed:
            # What cannot be billed is not served; the sweeper releases the hold.
            stream.abort()
            place.leave()
            raise
        meter.is_budgeted = admission.is_budgeted
        if request.stops or watch is not None:
            meter.await_caps()
        return Generation(
            request_id=request_id,
            target=target,
            codec=codec,
            stream=stream,
            meter=meter,
            ledger=self._ledger,
            admission=admission,
            place=place,
            stops=request.stops,
            after=_continued(request.prompt, prompt_ids),
            keeping=keeping,
            watch=watch,
            is_streamed=request.is_streamed,
            tools=request.tools,
            thinking=thinking,
        )

    async def _admit(self, principal: Principal, target: Target, **asked: Any) -> Admission:
        """What ended and is not settled yet stands in nobody's way: then it is asked again."""
        try:
            return await admit(self._database, principal, target, **asked)
        except LimitReached as refusal:
            is_helpless = (refusal.rule or {}).get("rule") == "requests_per_minute"
            assert principal.tenant_id is not None, "only tenants are billed"
            if is_helpless or not await self._ledger.settle_ended_of(principal.tenant_id):
                raise
        return await admit(self._database, principal, target, **asked)

    async def _grammar(
        self, principal: Principal, asked: AskedGrammar | None, target: Target, codec: TextCodec
    ) -> Grammar | None:
        if asked is None:
            return None
        if not codec.eos_token_ids:
            raise InvalidGrammar(
                "This model has no token that ends an answer, so none can be held to a form.",
                param=asked.param,
            )
        found = await self._grammars.examine(asked, caller=str(principal.tenant_id))
        return Grammar(found.kind, found.text, target.text_bundle_digest)

    async def _keeping(self, principal: Principal, request: GenerationRequest) -> Keeping | None:
        assert principal.tenant_id is not None, "only tenants ask for answers"
        try:
            days = await self._contents.keep_days(principal.tenant_id)
        except DATABASE_TROUBLE as fault:
            raise Unavailable("The database does not answer. Try again shortly.") from fault
        if days is None:
            return None
        prompt = _spelled(request.prompt)
        return Keeping(self._contents, principal.tenant_id, days, prompt, request.user, [])

    async def estimate(
        self,
        principal: Principal,
        *,
        model: str,
        prompt: Prompt,
        max_tokens: int | None,
        max_cost_nano: int | None,
        tools: Toolbox | None = None,
    ) -> Estimate:
        """What a request would take; nothing is charged or held.

        Raises ModelNotFound, TemplateFault, ContextLengthExceeded or Unavailable.
        """
        target = await self.resolve(principal, model)
        codec = await self._texts.get(
            target.text_bundle_digest, base=target.base_text_bundle_digest
        )
        prompt_ids = await _encode(codec, prompt, caller=str(principal.tenant_id), tools=tools)
        most = _fit(max_tokens, len(prompt_ids), target.context_length)
        violation: PolicyViolation | None = None
        if principal.policy_id is not None:
            given = {"max_tokens": max_tokens, "max_cost": max_cost_nano}
            fields = frozenset(name for name, value in given.items() if value is not None)
            try:
                most = await self._policies.check(
                    principal,
                    _asked(prompt, codec, prompt_ids, fields, max_tokens=most, tools=tools),
                )
            except PolicyViolation as error:
                violation = error
        ask = Ask(
            request_id=new_id(),
            endpoint="estimate",
            prompt_tokens=len(prompt_ids),
            max_tokens=most,
            gateway_instance_id=self._journal.instance_id,
            max_cost_nano=max_cost_nano,
        )
        answer = await rehearse(self._database, principal, target, ask)

        def cost_nano(output_tokens: int) -> int:
            return ceiling(answer.price, prompt_tokens=len(prompt_ids), output_tokens=output_tokens)

        return Estimate(
            prompt_tokens=len(prompt_ids),
            max_output_tokens=answer.max_output_tokens,
            prompt_cost_nano=cost_nano(0),
            max_cost_nano=cost_nano(answer.max_output_tokens),
            refusal=violation
            or (refused(answer.refusal, principal, target) if answer.refusal else None),
            is_resident=await self._is_resident(target),
        )

    async def _is_resident(self, target: Target) -> bool | None:
        if target.weights_digest is None:
            return True
        try:
            return target.weights_digest in (await self._router.pick().status()).resident_adapters
        except (LinkError, Unavailable):
            return None

    async def resolve(self, principal: Principal, model: str, *, user: str | None = None) -> Target:
        """What a name means for this caller. Raises ModelNotFound, also where the key may not."""
        target = await self._registry.resolve(principal, model, user=user)
        if not principal.may_call(target.public_name):
            raise model_not_found(model)
        return target


def _spelled(prompt: Prompt) -> str:
    """A prompt as its client sent it: text, or JSON."""
    match prompt:
        case TokenPrompt():
            return msgspec.json.encode(prompt.token_ids).decode()
        case str():
            return prompt
        case _:
            return msgspec.json.encode(list(prompt)).decode()


def _asked(
    prompt: Prompt,
    codec: TextCodec,
    prompt_ids: Sequence[int],
    fields: frozenset[str],
    *,
    max_tokens: int,
    tools: Toolbox | None,
) -> Asked:
    """A request as its policy sees it: every message by itself, token ids as their text.

    The calls in a message are a text of their own, and so is what is said of each tool.
    """

    def texts() -> list[str]:
        match prompt:
            case TokenPrompt():
                return [codec.decode(prompt_ids)]
            case str():
                return [prompt]
            case _:
                said = [message["content"] for message in prompt]
                thought = [
                    message["reasoning_content"]
                    for message in prompt
                    if "reasoning_content" in message
                ]
                called = [message["tool_calls"] for message in prompt if "tool_calls" in message]
                told = tools.definitions if tools is not None else []
                return [
                    *said,
                    *thought,
                    *("\n".join(strings_in(value)) for value in (*called, *told)),
                ]

    return Asked(
        fields=fields,
        prompt_field="prompt" if isinstance(prompt, str | TokenPrompt) else "messages",
        num_prompt_tokens=len(prompt_ids),
        max_tokens=max_tokens,
        texts=texts,
    )


def _deadline_s(admission: Admission) -> float | None:
    """Until when the first token must be there, by the event loop's clock."""
    if admission.queue_time_ms is None:
        return None
    return asyncio.get_running_loop().time() + admission.queue_time_ms / 1000


async def _encode(
    codec: TextCodec, prompt: Prompt, *, caller: str, tools: Toolbox | None
) -> list[int]:
    match prompt:
        case TokenPrompt():
            return prompt.token_ids
        case str():
            return await codec.encode_text(prompt)
        case _:
            definitions = tools.definitions if tools is not None else ()
            return await codec.encode_chat(prompt, caller=caller, tools=definitions)


def _thinking(codec: TextCodec, prompt: Prompt, prompt_ids: Sequence[int]) -> Thinking:
    """Thoughts are told from the answer in conversations alone."""
    is_text = isinstance(prompt, str | TokenPrompt)
    return "never" if is_text else codec.thinking_after(prompt_ids)


def _reader(
    codec: TextCodec, tools: Toolbox | None, thinking: Thinking, watch: Watch | None
) -> Reader:
    return Reader(
        codec.syntax if tools is not None else None,
        tools.names if tools is not None else frozenset(),
        thinking=thinking,
        allows=watch.allows if watch is not None and watch.reads_answers else None,
    )


def _continued(prompt: Prompt, prompt_ids: list[int]) -> list[int]:
    """The last tokens of a text that an answer goes on with; in a chat it begins anew."""
    is_text = isinstance(prompt, str | TokenPrompt)
    return prompt_ids[-MAX_TOKENS_OF_CHARACTER:] if is_text else []


def _fit(max_tokens: int | None, num_prompt_tokens: int, context_length: int) -> int:
    """Most tokens to generate: what is asked for, or the rest of the context."""
    room = context_length - num_prompt_tokens
    wanted = max_tokens or 1
    if wanted > room:
        raise ContextLengthExceeded(
            f"This model's context is {context_length} tokens; the prompt has {num_prompt_tokens}"
            f" and at least {wanted} are asked for. Shorten the prompt or lower max_tokens.",
            param="max_tokens" if max_tokens else None,
        )
    return max_tokens or room


def _check_tokens(request: GenerationRequest, *, max_tokens: int, vocab_size: int) -> None:
    if request.min_tokens > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' is {request.min_tokens}, above the {max_tokens} that may come at most:"
            " lower it, or raise max_tokens.",
            param="min_tokens",
        )
    if max(request.logit_bias, default=0) >= vocab_size:
        raise InvalidRequest(
            f"'logit_bias' names a token that the model does not have: ids go to {vocab_size - 1}.",
            param="logit_bias",
        )


def _sampling(request: GenerationRequest, codec: TextCodec, max_tokens: int) -> SamplingParams:
    defaults = codec.generation_defaults
    eos = () if request.ignore_eos else codec.eos_token_ids

    def choose(asked: float | None, name: str, otherwise: float) -> float:
        return asked if asked is not None else defaults.get(name, otherwise)

    return SamplingParams(
        max_tokens=max_tokens,
        seed=request.seed % 2**64 if request.seed is not None else secrets.randbits(64),
        temperature=choose(request.temperature, "temperature", 1.0),
        top_p=choose(request.top_p, "top_p", 1.0),
        top_k=int(choose(request.top_k, "top_k", 0)),
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=dict(request.logit_bias),
        # `max_cost` may have lowered the other.
        min_tokens=min(request.min_tokens, max_tokens),
        stop_token_ids=(*eos, *request.stop_token_ids),
        logprobs=request.logprobs,
    )


def _translate(fault: SequenceFault | None) -> GatewayError:
    if fault is None or fault.is_retryable:
        reason = fault.message if fault else "the engine let go of it"
        return Unavailable(f"The answer was cut off; ask again: {reason}")
    if fault.code == ContextLengthExceeded.code:
        return ContextLengthExceeded(fault.message)
    if fault.code in ("invalid_grammar", "grammar_too_complex"):
        return InvalidGrammar(f"The form of the answer cannot be followed: {fault.message}")
    if fault.code == "no_token_left":
        return InvalidRequest(fault.message)
    if fault.code == "invalid_sequence":
        return InvalidRequest(fault.message, param="prompt")
    return EngineFailed(fault.message)
