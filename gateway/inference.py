"""The path of every generation: who, which adapter, what it may cost, which engine, what came out.

`Inference.start` reads from top to bottom as the life of a request; `Generation` is its answer as
it grows. Knows nothing of HTTP or of how an answer is spelled on the wire.
"""

import asyncio
import datetime
import logging
import secrets
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec

from adapters.text_bundle import PoolingKind
from engine.client import EngineLink, MergedStreams, SequenceStream
from engine.errors import LinkError
from engine.protocol import (
    Grammar,
    SamplingParams,
    SequenceEvent,
    SequenceFault,
    SequenceState,
)
from gateway.answer_forms import whole_form
from gateway.auth import Principal
from gateway.choices import Choice, Delta, FinishReason
from gateway.database import DATABASE_TROUBLE, Database
from gateway.embeddings import (
    DEFAULT_POOLING,
    NO_TOKENS,
    Embedding,
    EmbeddingRequest,
)
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
from gateway.journal import Journal, Meter, Opened, Settlement
from gateway.ledger import Ledger
from gateway.limits import Admission, Ask, admit, refused, rehearse, waited_too_long
from gateway.overload import Place
from gateway.policies.rules import Asked
from gateway.policies.screen import Text
from gateway.policies.store import Policies
from gateway.policies.watch import Watch
from gateway.prices import BATCH, Bill, ceiling
from gateway.privacy import Contents
from gateway.registry import Registry, Target, model_not_found
from gateway.routing import Router
from gateway.tables import new_id
from gateway.text import NO_VARIABLES, Ending, TextCodec, TextCodecs
from gateway.tools.json_calls import strings_in
from gateway.tools.reader import Reader
from gateway.tools.reasoning import Thinking, ThoughtCount
from gateway.tools.toolbox import Toolbox

logger = logging.getLogger(__name__)

# Tokens of which one character may consist: each may be one of its bytes.
MAX_TOKENS_OF_CHARACTER = 4

# Says that what came before may go out now.
NOTHING_NEW = Delta("", [], [], None)
# What is told of a request with several answers is the first of these that one of them came to.
WORST_FIRST: Sequence[FinishReason] = ("content_filter", "length", "stop")

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
    # Usually one; each is answered `num_choices` times.
    prompts: Sequence[Prompt]
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
    # How many alternatives beside the log-probability of each prompt token; None for neither.
    prompt_logprobs: int | None = None
    num_choices: int = 1
    # How a chat template ends the prompt, and what else it is told.
    ending: Ending = Ending.ASKING
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    shows_special_tokens: bool = False
    # Whether the client is told token ids, so that no delta without a text may be passed over.
    tells_token_ids: bool = False
    # The engine's class: of what waits, the least goes first.
    priority: int = 0
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

    def keep(self, request_id: uuid.UUID, completions: Sequence[str]) -> None:
        """Several are kept as a list in JSON."""
        several = len(completions) > 1
        self.contents.keep(
            self.tenant_id,
            request_id,
            prompt=self.prompt,
            completion=_json(completions) if several else "".join(completions),
            end_user=self.end_user,
            days=self.days,
        )


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
    """The answers to one request while they grow; whoever iterates it must `finish` or `leave` it.

    Every way out ends in the ledger exactly once.
    """

    def __init__(
        self,
        *,
        request_id: uuid.UUID,
        target: Target,
        codec: TextCodec,
        prompts: Sequence[Sequence[int]],
        choices: Sequence[Choice],
        meter: Meter,
        ledger: Ledger,
        admission: Admission,
        place: Place,
        is_searched: bool,
        tells_token_ids: bool,
        keeping: Keeping | None = None,
    ) -> None:
        self.request_id = request_id
        self.target = target
        self.levels = admission.levels
        self.codec = codec
        # Their token ids; the choices answer them in order, as many each.
        self.prompts = prompts
        self.num_choices = len(choices)
        self.created = datetime.datetime.now(datetime.UTC)
        self._choices = {choice.sequence_id: choice for choice in choices}
        self._num_open = len(choices)
        self._stream = _merged([choice.stream for choice in choices])
        self._meter = meter
        self._ledger = ledger
        self._admission = admission
        # Held until the first token.
        self._place = place
        self._deadline_s = _deadline_s(admission)
        # Whether an answer may end before the last token that the engine made for it.
        self._is_searched = is_searched
        self._is_judged = any(choice.is_judged for choice in choices)
        self._tells_token_ids = tells_token_ids
        # Of all answers.
        self._num_tokens = 0
        self._adapter_wait_ns = 0
        self._is_closed = False
        # None where nothing of what is said is kept.
        self._keeping = keeping

    @property
    def is_over(self) -> bool:
        """Whether every answer has had its last delta."""
        return not self._num_open

    def prompt_of(self, index: int) -> Sequence[int]:
        """The prompt that a choice answers."""
        return self.prompts[index * len(self.prompts) // self.num_choices]

    async def deltas(self) -> AsyncIterator[Delta]:
        """The answers, step by step. An empty delta says that all before it may go out now.

        Raises EngineFailed or Unavailable where the engine could not finish one, LimitReached where
        the first token was waited for longer than it may.
        """
        try:
            while self._num_open and (event := await self._next()) is not None:
                choice = self._choices[event.sequence_id]
                if choice.outcome is not None:
                    # What its sequence did before it learnt that it had ended.
                    if not self.has_next():
                        yield NOTHING_NEW
                    continue
                if self._is_short_of_money(event):
                    await self._fund(event)
                delta = self._apply(choice, event)
                if self._is_judged:
                    delta = await choice.judge(delta)
                if self._keeping is not None:
                    choice.said.append(delta.text)
                delta = choice.read(delta)
                if delta.finish_reason:
                    self._num_open -= 1
                if self._is_news(delta) or not self.has_next():
                    yield delta
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
    def reasoning_tokens(self) -> int | None:
        """How many the answers thought with so far; None of a model that does not."""
        told = [choice.reasoning_tokens for choice in self._choices.values()]
        return sum(filter(None, told)) if any(each is not None for each in told) else None

    def _is_news(self, delta: Delta) -> bool:
        return bool(
            delta.text
            or delta.finish_reason
            or delta.logprobs
            or (self._tells_token_ids and delta.token_ids)
        )

    def has_next(self) -> bool:
        """Whether the next delta is there already: asking for it waits for nothing."""
        if self._is_judged:
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

    async def _fund(self, event: SequenceEvent) -> None:
        """Ask for more money now, where a step outran the heartbeat."""
        while self._is_short_of_money(event):
            funded = self._meter.funded_output_tokens
            await self._ledger.fund(self._meter)
            if self._meter.funded_output_tokens == funded:
                return

    def _is_short_of_money(self, event: SequenceEvent) -> bool:
        meter = self._meter
        return (
            meter.is_budgeted
            and self._num_tokens + len(event.token_ids) > meter.funded_output_tokens
        )

    def bill(self) -> Bill:
        """What `finish` is going to say, once the last delta is there."""
        return self._meter.usage()

    def settlement(self) -> Settlement:
        """What `finish` is going to have settled, once the last delta is there."""
        return self._ledger.ending(self.request_id, self._outcome())

    def _outcome(self) -> FinishReason:
        return _worst(choice.outcome for choice in self._choices.values())

    def finish(self) -> Bill:
        """Close whole answers; call it just before their last byte is written."""
        assert self.is_over, "answers are finished after their last deltas"
        outcome = self._outcome()
        self._is_closed = True
        self._place.leave()
        self._end(outcome)
        return self._ledger.close(self.request_id, outcome)

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
            completions = ["".join(choice.said) for choice in self._choices.values()]
            self._keeping.keep(self.request_id, completions)
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

    def _apply(self, choice: Choice, event: SequenceEvent) -> Delta:
        self._adapter_wait_ns = max(self._adapter_wait_ns, event.adapter_wait_ns)
        if event.state in (SequenceState.FAILED, SequenceState.ABORTED):
            raise _translate(event.fault)
        num_before = choice.num_tokens
        delta = choice.take(event, max_tokens=self._num_paid(event))
        self._num_tokens += choice.num_tokens - num_before
        # Of what is cut for want of money nothing may be billed that a later tranche would pay for.
        if self._is_searched or delta.stopped_by == "budget":
            self._meter.cap(choice.sequence_id, choice.num_tokens)
        return delta

    def _num_paid(self, event: SequenceEvent) -> int | None:
        """How many more tokens the hold pays for; the others are the engine's own affair."""
        if not self._is_short_of_money(event):
            return None
        return max(self._meter.funded_output_tokens - self._num_tokens, 0)


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
        prompts = await _encode_all(codec, request, caller=str(principal.tenant_id))
        thinking = _thinking(codec, request, prompts)
        num_answers = len(prompts) * request.num_choices
        max_tokens = _fit(request.max_tokens, max(map(len, prompts)), target.context_length)
        request_id, watch = new_id(), None
        if principal.policy_id is not None:
            watch = await self._policies.watch(
                principal, model=target.public_name, request_id=request_id
            )
        if watch is not None:
            max_tokens = await watch.admit(
                _asked(
                    request.prompts,
                    codec,
                    prompts,
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
        link = self._pick(target)
        assert principal.tenant_id is not None, "only tenants are billed"
        place = self._router.room(link).enter(principal.tenant_id, num_answers=num_answers)
        try:
            admission = await self._admit(
                principal,
                target,
                request_id=request_id,
                endpoint=request.endpoint,
                prompt_tokens=sum(map(len, prompts)),
                max_tokens=max_tokens,
                num_sequences=num_answers,
                gateway_instance_id=self._journal.instance_id,
                max_cost_nano=request.max_cost_nano,
            )
        except BaseException:
            place.leave()
            raise

        record = partial(
            Opened.of,
            principal,
            target,
            admission,
            endpoint=request.endpoint,
            is_streamed=request.is_streamed,
            prompt_tokens=sum(map(len, prompts)),
            prompt_lengths=[len(each) for each in prompts] if len(prompts) > 1 else (),
            end_user=request.user,
            attempt_digest=attempt.digest,
            is_retry=attempt.is_retry,
        )
        if admission.max_output_tokens < num_answers:
            place.leave()
            self._journal.opened(record(sequence_ids=()))
            self._ledger.close(request_id, "error", sent=False)
            raise _too_little(request, num_answers)
        # No await from here on: the journal knows the sequences before their first frame can come.
        streams = [
            link.submit(
                prompt_ids,
                sampling=_sampling(
                    request, codec, admission.max_output_tokens // num_answers, number=number
                ),
                adapter_digest=target.weights_digest,
                adapter_fingerprint=target.fingerprint,
                cache_salt=principal.cache_salt,
                fairness_key=str(principal.tenant_id),
                priority=request.priority,
                grammar=grammar,
            )
            for prompt_ids in prompts
            for number in range(request.num_choices)
        ]
        try:
            meter = self._journal.opened(
                record(sequence_ids=[stream.sequence_id for stream in streams])
            )
        except JournalFailed:
            # What cannot be billed is not served; the sweeper releases the hold.
            _merged(streams).abort()
            place.leave()
            raise
        meter.is_budgeted = admission.is_budgeted
        is_searched = bool(request.stops) or watch is not None
        if is_searched:
            meter.await_caps()
        choices = [
            _choice(
                request,
                codec,
                stream=stream,
                prompts=prompts,
                index=index,
                watch=watch,
                thinking=thinking,
                is_cut_by_max_cost=admission.is_cut_by_max_cost,
            )
            for index, stream in enumerate(streams)
        ]
        return Generation(
            request_id=request_id,
            target=target,
            codec=codec,
            prompts=prompts,
            choices=choices,
            meter=meter,
            ledger=self._ledger,
            admission=admission,
            place=place,
            is_searched=is_searched,
            tells_token_ids=request.tells_token_ids,
            keeping=keeping,
        )

    def _pick(self, target: Target) -> EngineLink:
        """Raises Unavailable where no engine that serves the target can be reached."""
        return self._router.pick(
            target.base_model_id,
            revision=target.base_revision,
            adapter_digest=target.weights_digest,
        )

    async def _admit(self, principal: Principal, target: Target, **asked: Any) -> Admission:
        """A request of a batch may wait for its first token for as long as that takes."""
        admission = await self._admit_soon(principal, target, **asked)
        if asked["endpoint"].startswith(BATCH):
            return replace(admission, queue_time_ms=None)
        return admission

    async def _admit_soon(self, principal: Principal, target: Target, **asked: Any) -> Admission:
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
        spelled = [_spelled(prompt) for prompt in request.prompts]
        prompt = spelled[0] if len(spelled) == 1 else _json(spelled)
        return Keeping(self._contents, principal.tenant_id, days, prompt, request.user)

    async def estimate(
        self,
        principal: Principal,
        *,
        model: str,
        prompt: Prompt,
        max_tokens: int | None,
        max_cost_nano: int | None,
        num_choices: int = 1,
        tools: Toolbox | None = None,
    ) -> Estimate:
        """What a request would take; nothing is charged or held.

        Raises ModelNotFound, TemplateFault, ContextLengthExceeded or Unavailable.
        """
        target = await self.resolve(principal, model)
        codec = await self._texts.get(
            target.text_bundle_digest, base=target.base_text_bundle_digest
        )
        [prompt_ids] = prompts = [
            await _encode(
                codec,
                prompt,
                caller=str(principal.tenant_id),
                ending=Ending.ASKING,
                tools=tools,
            )
        ]
        most = _fit(max_tokens, len(prompt_ids), target.context_length)
        violation: PolicyViolation | None = None
        if principal.policy_id is not None:
            several = num_choices if num_choices > 1 else None
            given = {"max_tokens": max_tokens, "max_cost": max_cost_nano, "n": several}
            fields = frozenset(name for name, value in given.items() if value is not None)
            try:
                most = await self._policies.check(
                    principal,
                    _asked([prompt], codec, prompts, fields, max_tokens=most, tools=tools),
                )
            except PolicyViolation as error:
                violation = error
        ask = Ask(
            request_id=new_id(),
            endpoint="estimate",
            prompt_tokens=len(prompt_ids),
            max_tokens=most,
            gateway_instance_id=self._journal.instance_id,
            num_sequences=num_choices,
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
            link = self._pick(target)
            return target.weights_digest in (await link.status()).resident_adapters
        except (LinkError, Unavailable):
            return None

    async def embed(
        self, principal: Principal, request: EmbeddingRequest, attempt: Attempt = FIRST
    ) -> Embedding:
        """Admit a request for vectors and hand its inputs to an engine.

        Raises ModelNotFound, InvalidRequest, PolicyViolation, LimitReached or Unavailable; nothing
        is held or billed then.
        """
        target, codec = await self.codec_of(principal, request.model, user=request.user)
        prompts = await request.encode(codec, context_length=target.context_length)
        request_id, watch = new_id(), None
        if principal.policy_id is not None:
            watch = await self._policies.watch(
                principal, model=target.public_name, request_id=request_id
            )
        if watch is not None:
            await watch.admit(request.asked(codec, prompts))
        assert principal.tenant_id is not None, "only tenants are billed"
        keep = await self._keep_inputs(principal.tenant_id, request_id, request)
        link = self._pick(target)
        place = self._router.room(link).enter(principal.tenant_id)
        num_tokens = sum(map(len, prompts))
        try:
            admission = await self._admit(
                principal,
                target,
                request_id=request_id,
                endpoint=request.endpoint,
                prompt_tokens=num_tokens,
                max_tokens=0,
                gateway_instance_id=self._journal.instance_id,
            )
        except BaseException:
            place.leave()
            raise
        # No await from here on: the journal knows the sequences before their first frame can come.
        pooling = request.pooling or codec.pooling or DEFAULT_POOLING
        streams = _submit_prompts(
            link, principal, target, prompts, pooling=pooling, priority=request.priority
        )
        try:
            meter = self._journal.opened(
                Opened.of(
                    principal,
                    target,
                    admission,
                    endpoint=request.endpoint,
                    is_streamed=False,
                    prompt_tokens=num_tokens,
                    sequence_ids=[stream.sequence_id for stream in streams],
                    end_user=request.user,
                    attempt_digest=attempt.digest,
                    is_retry=attempt.is_retry,
                )
            )
        except JournalFailed:
            for stream in streams:
                stream.abort()
            place.leave()
            raise
        return Embedding(
            request_id=request_id,
            target=target,
            streams=streams,
            meter=meter,
            ledger=self._ledger,
            admission=admission,
            place=place,
            deadline_s=_deadline_s(admission),
            keep=keep,
        )

    async def _keep_inputs(
        self, tenant_id: uuid.UUID, request_id: uuid.UUID, request: EmbeddingRequest
    ) -> Callable[[], None]:
        """What keeps the texts of a request, where its tenant wants that."""
        try:
            days = await self._contents.keep_days(tenant_id)
        except DATABASE_TROUBLE as fault:
            raise Unavailable("The database does not answer. Try again shortly.") from fault

        def keep() -> None:
            if days is not None:
                self._contents.keep(
                    tenant_id,
                    request_id,
                    prompt=request.spelled(),
                    completion="",
                    end_user=request.user,
                    days=days,
                )

        return keep

    async def tokenize(
        self,
        principal: Principal,
        *,
        model: str,
        prompt: Messages | str,
        add_special_tokens: bool,
        ending: Ending,
        template_variables: Mapping[str, Any],
        tools: Toolbox | None,
    ) -> tuple[list[int], TextCodec, Target]:
        """The token ids of a prompt; nothing is charged, held or billed, and no engine is asked.

        Only conversations have endings, variables, and tools that the model is told of.

        Raises ModelNotFound, TemplateFault or InvalidRequest.
        """
        target, codec = await self.codec_of(principal, model)
        if isinstance(prompt, str):
            [ids] = await codec.encode_texts([prompt], add_special_tokens=add_special_tokens)
        else:
            ids = await _encode(
                codec,
                prompt,
                caller=str(principal.tenant_id),
                ending=ending,
                variables=template_variables,
                tools=tools,
            )
        return ids, codec, target

    async def codec_of(
        self, principal: Principal, model: str, *, user: str | None = None
    ) -> tuple[Target, TextCodec]:
        """A model, and what turns its text into tokens and back. Raises ModelNotFound."""
        target = await self.resolve(principal, model, user=user)
        codec = await self._texts.get(
            target.text_bundle_digest, base=target.base_text_bundle_digest
        )
        return target, codec

    async def resolve(self, principal: Principal, model: str, *, user: str | None = None) -> Target:
        """What a name means for this caller. Raises ModelNotFound, also where the key may not."""
        target = await self._registry.resolve(principal, model, user=user)
        if not principal.may_call(target.public_name):
            raise model_not_found(model)
        return target


def _submit_prompts(
    link: EngineLink,
    principal: Principal,
    target: Target,
    prompts: Sequence[Sequence[int]],
    *,
    pooling: PoolingKind,
    priority: int,
) -> list[SequenceStream]:
    return [
        link.submit(
            token_ids,
            sampling=NO_TOKENS,
            adapter_digest=target.weights_digest,
            adapter_fingerprint=target.fingerprint,
            cache_salt=principal.cache_salt,
            fairness_key=str(principal.tenant_id),
            priority=priority,
            pooling=pooling,
        )
        for token_ids in prompts
    ]


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _spelled(prompt: Prompt) -> str:
    """A prompt as its client sent it: text, or JSON."""
    match prompt:
        case TokenPrompt():
            return _json(prompt.token_ids)
        case str():
            return prompt
        case _:
            return _json(list(prompt))


def _said_in(messages: Messages) -> list[str]:
    said = [message["content"] for message in messages]
    thought = [each["reasoning_content"] for each in messages if "reasoning_content" in each]
    called = [each["tool_calls"] for each in messages if "tool_calls" in each]
    return [*said, *thought, *("\n".join(strings_in(each)) for each in called)]


def _asked(
    prompts: Sequence[Prompt],
    codec: TextCodec,
    encoded: Sequence[Sequence[int]],
    fields: frozenset[str],
    *,
    max_tokens: int,
    tools: Toolbox | None,
) -> Asked:
    """A request as its policy sees it: every message by itself, token ids as their text.

    The calls in a message are a text of their own, and so is what is said of each tool.
    """

    def texts() -> list[str]:
        found: list[str] = []
        for prompt, prompt_ids in zip(prompts, encoded, strict=True):
            match prompt:
                case TokenPrompt():
                    found.append(codec.decode(prompt_ids))
                case str():
                    found.append(prompt)
                case _:
                    found += _said_in(prompt)
        told = tools.definitions if tools is not None else ()
        return found + ["\n".join(strings_in(each)) for each in told]

    return Asked(
        fields=fields,
        prompt_field="prompt" if isinstance(prompts[0], str | TokenPrompt) else "messages",
        num_prompt_tokens=max(map(len, encoded)),
        max_tokens=max_tokens,
        texts=texts,
    )


def _deadline_s(admission: Admission) -> float | None:
    """Until when the first token must be there, by the event loop's clock."""
    if admission.queue_time_ms is None:
        return None
    return asyncio.get_running_loop().time() + admission.queue_time_ms / 1000


async def _encode_all(
    codec: TextCodec, request: GenerationRequest, *, caller: str
) -> list[list[int]]:
    return [
        await _encode(
            codec,
            prompt,
            caller=caller,
            ending=request.ending,
            variables=request.template_variables,
            tools=request.tools,
        )
        for prompt in request.prompts
    ]


async def _encode(
    codec: TextCodec,
    prompt: Prompt,
    *,
    caller: str,
    ending: Ending,
    variables: Mapping[str, Any] = NO_VARIABLES,
    tools: Toolbox | None = None,
) -> list[int]:
    match prompt:
        case TokenPrompt():
            return prompt.token_ids
        case str():
            return await codec.encode_text(prompt)
        case _:
            return await codec.encode_chat(
                prompt,
                caller=caller,
                ending=ending,
                variables=variables,
                tools=tools.definitions if tools is not None else (),
            )


def _thinking(
    codec: TextCodec, request: GenerationRequest, prompts: Sequence[Sequence[int]]
) -> Thinking:
    """Thoughts are told from answers that a conversation's assistant begins, and from no others."""
    is_text = any(isinstance(prompt, str | TokenPrompt) for prompt in request.prompts)
    if is_text or request.ending is Ending.CONTINUING:
        return "never"
    return codec.thinking_after(prompts[0])


def _merged(streams: Sequence[SequenceStream]) -> SequenceStream | MergedStreams:
    """Almost always there is but one."""
    return streams[0] if len(streams) == 1 else MergedStreams(streams)


def _choice(
    request: GenerationRequest,
    codec: TextCodec,
    *,
    stream: SequenceStream,
    prompts: Sequence[Sequence[int]],
    index: int,
    watch: Watch | None,
    thinking: Thinking,
    is_cut_by_max_cost: bool,
) -> Choice:
    place = index // request.num_choices
    is_read = request.tools is not None or thinking != "never"
    text: Text = codec.stream(
        request.stops,
        after=_continued(request, place, prompts[place]),
        shows_special_tokens=request.shows_special_tokens,
        shows_marks=is_read,
    )
    thoughts = None
    if thinking != "never":
        text = thoughts = ThoughtCount(text, thinking)
    return Choice(
        stream,
        text if watch is None else watch.screen(text) or text,
        index=index,
        judge=None if watch is None else watch.judge(is_streamed=request.is_streamed),
        reader=_reader(codec, request.tools, thinking, watch) if is_read else None,
        thoughts=thoughts,
        is_cut_by_max_cost=is_cut_by_max_cost,
        shows_special_tokens=request.shows_special_tokens,
    )


def _reader(
    codec: TextCodec, tools: Toolbox | None, thinking: Thinking, watch: Watch | None
) -> Reader:
    return Reader(
        codec.syntax if tools is not None else None,
        tools.names if tools is not None else frozenset(),
        thinking=thinking,
        allows=watch.allows if watch is not None and watch.reads_answers else None,
    )


def _continued(request: GenerationRequest, place: int, prompt_ids: Sequence[int]) -> Sequence[int]:
    """The last tokens of a text that an answer goes on with; in a chat it mostly begins anew."""
    is_text = isinstance(request.prompts[place], str | TokenPrompt)
    if is_text or request.ending is Ending.CONTINUING:
        return prompt_ids[-MAX_TOKENS_OF_CHARACTER:]
    return ()


def _worst(outcomes: Iterable[FinishReason | None]) -> FinishReason:
    found = set(outcomes)
    return next(each for each in WORST_FIRST if each in found)


def _too_little(request: GenerationRequest, num_answers: int) -> InvalidRequest:
    return InvalidRequest(
        f"'max_cost' is {request.max_cost_nano} nano-USD, which does not pay for the prompt and one"
        f" token of each of {num_answers} answers: raise it or ask for fewer.",
        param="max_cost",
    )


def _fit(max_tokens: int | None, num_prompt_tokens: int, context_length: int) -> int:
    """Most tokens to generate: what is asked for, or the rest of the context."""
    room = context_length - num_prompt_tokens
    wanted = max_tokens or 1
    if wanted > room:
        raise ContextLengthExceeded(
            f"This model's context is {context_length} tokens; the prompt has {num_prompt_tokens}"
            f" and at least {wanted} are asked for. Shorten the prompt or ask for fewer.",
            param="max_tokens" if max_tokens else None,
        )
    return max_tokens or room


def _check_tokens(request: GenerationRequest, *, max_tokens: int, vocab_size: int) -> None:
    if request.min_tokens > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' is {request.min_tokens}, above the {max_tokens} that may come at most:"
            " lower it, or let more come.",
            param="min_tokens",
        )
    if max(request.logit_bias, default=0) >= vocab_size:
        raise InvalidRequest(
            f"'logit_bias' names a token that the model does not have: ids go to {vocab_size - 1}.",
            param="logit_bias",
        )


def _sampling(
    request: GenerationRequest, codec: TextCodec, max_tokens: int, *, number: int
) -> SamplingParams:
    """Of one answer: its number among those to the same prompt is added to the seed."""
    defaults = codec.generation_defaults
    eos = () if request.ignore_eos else codec.eos_token_ids

    def choose(asked: float | None, name: str, otherwise: float) -> float:
        return asked if asked is not None else defaults.get(name, otherwise)

    return SamplingParams(
        max_tokens=max_tokens,
        seed=secrets.randbits(64) if request.seed is None else (request.seed + number) % 2**64,
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
        # Computing them passes over the cache, so one answer does it for all that can wait for it.
        prompt_logprobs=request.prompt_logprobs if request.is_streamed or not number else None,
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
