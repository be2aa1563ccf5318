"""The path of every request to an engine: who, which adapter, what it may cost, which engine.

`Inference.start` and its steps read from top to bottom as the life of a request; what comes of it
is a `Generation`. Knows nothing of HTTP or of how an answer is spelled on the wire.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from adapters.errors import AdapterError
from adapters.text_bundle import PoolingKind
from engine.client import EngineLink, SequenceStream
from engine.errors import LinkError
from engine.protocol import (
    Grammar,
)
from gateway.answer_forms import whole_form
from gateway.auth import Principal
from gateway.choices import Choice
from gateway.database import DATABASE_TROUBLE, Database
from gateway.embeddings import (
    DEFAULT_POOLING,
    NO_TOKENS,
    Embedding,
    EmbeddingRequest,
)
from gateway.errors import (
    GatewayError,
    JournalFailed,
    LimitReached,
    MeaningChanged,
    PolicyViolation,
    Unavailable,
)
from gateway.generation import Generation, Keeping, deadline_s, merged
from gateway.generation_request import GenerationRequest
from gateway.grammars import AskedGrammar, Grammars, InvalidGrammar
from gateway.journal import Journal, Opened
from gateway.ledger import Ledger
from gateway.limits import Admission, Ask, admit, refused, rehearse
from gateway.overload import Place
from gateway.policies.screen import Text
from gateway.policies.store import Policies
from gateway.policies.watch import Watch
from gateway.prices import BATCH, ceiling
from gateway.privacy import Contents
from gateway.prompts import Messages, Prompt, encode, field_of, fit, seen_by_policy, spelled
from gateway.registry import Recollection, Registry, Target, model_not_found
from gateway.routing import Router
from gateway.tables import new_id
from gateway.text import Ending, TextCodec, TextCodecs
from gateway.tools.reader import Reader
from gateway.tools.reasoning import Thinking, ThoughtCount
from gateway.tools.toolbox import Toolbox


@dataclass(frozen=True, slots=True)
class Attempt:
    """What is known of other attempts at the same request."""

    # The same for all of them; None where nobody wants to compare.
    digest: bytes | None = None
    is_retry: bool = False


FIRST = Attempt()


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


@dataclass(frozen=True, slots=True)
class _Ready:
    """A request that is admitted, and all that its engine is going to be told."""

    target: Target
    codec: TextCodec
    prompts: list[list[int]]
    thinking: Thinking
    # None where the tenant has no policy.
    watch: Watch | None
    # None where the answer is free.
    grammar: Grammar | None
    # None where its text is not kept.
    keeping: Keeping | None
    link: EngineLink
    place: Place
    admission: Admission


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
        ready = await self._ready_as_before(principal, request)
        if ready is None:
            target = await self.resolve(principal, request.model, user=request.user)
            ready = await self._make_ready(principal, request, target)
        return self._hand_over(principal, request, attempt, ready)

    async def _ready_as_before(
        self, principal: Principal, request: GenerationRequest
    ) -> _Ready | None:
        """For what the name meant last, which admission confirms: a round trip less.

        None where that is not known or holds no more; what is refused for it, is refused only where
        it holds.
        """
        assumed = self._registry.recall(principal, request.model)
        # A policy counts and asks others: not for something that may have to be done anew.
        if assumed is None or principal.policy_id is not None:
            return None
        try:
            self._check_allowed(principal, request.model, assumed.target)
            return await self._make_ready(principal, request, assumed.target, assumed=assumed)
        except MeaningChanged:
            return None
        except (GatewayError, AdapterError):
            target = await self.resolve(principal, request.model, user=request.user)
            if target == assumed.target:
                raise
            return None

    async def _make_ready(
        self,
        principal: Principal,
        request: GenerationRequest,
        target: Target,
        *,
        assumed: Recollection | None = None,
    ) -> _Ready:
        """All that may be refused, admission last. Raises what `start` does, and MeaningChanged."""
        codec = await self._texts.get(
            target.text_bundle_digest, base=target.base_text_bundle_digest
        )
        prompts = await request.encode(codec, caller=str(principal.tenant_id))
        thinking = request.thinking(codec, prompts)
        num_answers = len(prompts) * request.num_choices
        max_tokens = fit(
            request.max_tokens,
            max(map(len, prompts)),
            target.context_length,
            prompt_field=field_of(request.prompts[0]),
        )
        request_id, watch = new_id(), None
        if principal.policy_id is not None:
            watch = await self._policies.watch(
                principal, model=target.public_name, request_id=request_id
            )
        if watch is not None:
            max_tokens = await watch.admit(
                request.seen_by_policy(codec, prompts, max_tokens=max_tokens)
            )
        request.check_tokens(max_tokens=max_tokens, vocab_size=codec.vocab_size)
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
                max_cost_nano=request.settings.max_cost_nano,
                assumed=assumed,
            )
        except BaseException:
            place.leave()
            raise
        return _Ready(
            target, codec, prompts, thinking, watch, grammar, keeping, link, place, admission
        )

    def _hand_over(
        self, principal: Principal, request: GenerationRequest, attempt: Attempt, ready: _Ready
    ) -> Generation:
        """Give an admitted request to its engine. Raises JournalFailed, InvalidRequest."""
        target, codec, prompts = ready.target, ready.codec, ready.prompts
        admission, place, watch = ready.admission, ready.place, ready.watch
        num_answers = len(prompts) * request.num_choices
        record = partial(
            Opened.of,
            principal,
            target,
            admission,
            endpoint=request.endpoint,
            is_streamed=request.settings.is_streamed,
            prompt_tokens=sum(map(len, prompts)),
            prompt_lengths=[len(each) for each in prompts] if len(prompts) > 1 else (),
            end_user=request.user,
            attempt_digest=attempt.digest,
            is_retry=attempt.is_retry,
        )
        if admission.max_output_tokens < num_answers:
            place.leave()
            self._journal.opened(record(sequence_ids=()))
            self._ledger.close(admission.request_id, "error", sent=False)
            raise request.too_little_money(num_answers)
        # The journal knows the sequences before their first frame can come: nothing here waits.
        streams = [
            ready.link.submit(
                prompt_ids,
                sampling=request.sampling(
                    codec, admission.max_output_tokens // num_answers, number=number
                ),
                adapter_digest=target.weights_digest,
                adapter_fingerprint=target.fingerprint,
                cache_salt=principal.cache_salt,
                fairness_key=str(principal.tenant_id),
                priority=request.priority,
                grammar=ready.grammar,
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
            merged(streams).abort()
            place.leave()
            raise
        meter.is_budgeted = admission.is_budgeted
        is_searched = bool(request.settings.stops) or watch is not None
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
                thinking=ready.thinking,
                is_cut_by_max_cost=admission.is_cut_by_max_cost,
            )
            for index, stream in enumerate(streams)
        ]
        return Generation(
            request_id=admission.request_id,
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
            keeping=ready.keeping,
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
        prompt = spelled(request.prompts)
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
            await encode(
                codec,
                prompt,
                caller=str(principal.tenant_id),
                ending=Ending.ASKING,
                tools=tools,
            )
        ]
        most = fit(
            max_tokens, len(prompt_ids), target.context_length, prompt_field=field_of(prompt)
        )
        violation: PolicyViolation | None = None
        if principal.policy_id is not None:
            several = num_choices if num_choices > 1 else None
            given = {"max_tokens": max_tokens, "max_cost": max_cost_nano, "n": several}
            fields = frozenset(name for name, value in given.items() if value is not None)
            try:
                most = await self._policies.check(
                    principal,
                    seen_by_policy([prompt], codec, prompts, fields, max_tokens=most, tools=tools),
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
            deadline_s=deadline_s(admission),
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
            ids = await encode(
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
        self._check_allowed(principal, model, target)
        return target

    def _check_allowed(self, principal: Principal, model: str, target: Target) -> None:
        if not principal.may_call(target.public_name):
            raise model_not_found(model)


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
        request.settings.stops,
        after=request.continued(place, prompts[place]),
        shows_special_tokens=request.settings.shows_special_tokens,
        shows_marks=is_read,
    )
    thoughts = None
    if thinking != "never":
        text = thoughts = ThoughtCount(text, thinking)
    return Choice(
        stream,
        text if watch is None else watch.screen(text) or text,
        index=index,
        judge=None if watch is None else watch.judge(is_streamed=request.settings.is_streamed),
        reader=_reader(codec, request.tools, thinking, watch) if is_read else None,
        thoughts=thoughts,
        is_cut_by_max_cost=is_cut_by_max_cost,
        shows_special_tokens=request.settings.shows_special_tokens,
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
