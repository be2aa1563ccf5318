"""The answers to one request while they grow, up to their end in the ledger.

Knows which engine events came, what of them is paid for, and when a request is over. Knows nothing
of HTTP or of how an answer is spelled on the wire.
"""

import asyncio
import datetime
import logging
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from engine.client import MergedStreams, SequenceStream
from engine.errors import LinkError
from engine.protocol import SequenceEvent, SequenceFault, SequenceState
from gateway.choices import Choice, Delta, FinishReason
from gateway.errors import (
    ContextLengthExceeded,
    EngineFailed,
    GatewayError,
    InvalidRequest,
    Unavailable,
)
from gateway.grammars import InvalidGrammar
from gateway.journal import Meter, Settlement
from gateway.ledger import Ledger
from gateway.limits import Admission, waited_too_long
from gateway.overload import Place
from gateway.prices import Bill
from gateway.privacy import Contents
from gateway.registry import Target
from gateway.text import TextCodec

logger = logging.getLogger(__name__)

# What is told of a request with several answers is the first of these that one of them came to.
WORST_FIRST: Sequence[FinishReason] = ("content_filter", "length", "stop")


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
            completion=msgspec.json.encode(completions).decode()
            if several
            else "".join(completions),
            end_user=self.end_user,
            days=self.days,
        )


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
        self._stream = merged([choice.stream for choice in choices])
        self._meter = meter
        self._ledger = ledger
        self._admission = admission
        # Held until the first token.
        self._place = place
        self._deadline_s = deadline_s(admission)
        self._is_waiting = True
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

    async def deltas(self) -> AsyncIterator[Sequence[Delta]]:
        """The answers as they grow: what can go out together comes together.

        Raises EngineFailed or Unavailable where the engine could not finish one, LimitReached where
        the first token was waited for longer than it may.
        """
        error: GatewayError | None = None
        while self._num_open and error is None:
            found: list[Delta] = []
            try:
                await self._gather(found)
            except LinkError as fault:
                error = Unavailable(f"The answer was cut off; ask again: {fault}")
                error.__cause__ = fault
            except GatewayError as fault:
                error = fault
            if error is not None:
                self._close("error")
            if found:
                yield found
        if error is not None:
            raise self._with_levels(error)

    async def _gather(self, found: list[Delta]) -> None:
        """Wait for the next delta, and add it and all that are there by then."""
        while self._num_open and not (found and self._must_wait()):
            event = self._stream.pop() or await self._wait()
            if self._is_waiting and event.token_ids:
                self._begin()
            choice = self._choices[event.sequence_id]
            if choice.outcome is not None:
                # What its sequence did before it learnt that it had ended.
                continue
            max_tokens: int | None = None
            if self._is_short_of_money(event):
                await self._fund(event)
                max_tokens = self._num_paid(event)
            delta = self._apply(choice, event, max_tokens=max_tokens)
            if self._is_judged:
                delta = await choice.judge(delta)
            if self._keeping is not None:
                choice.said.append(delta.text)
            delta = choice.read(delta)
            if delta.finish_reason:
                self._num_open -= 1
            if self._is_news(delta):
                found.append(delta)

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
            or delta.prompt_logprobs is not None
        )

    def _must_wait(self) -> bool:
        """Whether the next delta takes a while, so that what is there may go out before."""
        if self._is_judged:
            return True
        event = self._stream.next_event
        return event is None or self._is_short_of_money(event)

    def _with_levels(self, error: GatewayError) -> GatewayError:
        error.headers = self.levels.headers() | error.headers
        return error

    async def _wait(self) -> SequenceEvent:
        if self._deadline_s is None:
            return await anext(self._stream)
        try:
            async with asyncio.timeout_at(self._deadline_s):
                return await anext(self._stream)
        except TimeoutError:
            raise waited_too_long(self._admission) from None

    def _begin(self) -> None:
        """The first token is there."""
        self._is_waiting = False
        self._deadline_s = None
        self._place.leave()

    async def _fund(self, event: SequenceEvent) -> None:
        """Ask for more money now, where a step outran the heartbeat."""
        while self._is_short_of_money(event):
            funded = self._meter.funded_output_tokens
            await self._ledger.fund(self._meter)
            if self._meter.funded_output_tokens == funded:
                return

    def _is_short_of_money(self, event: SequenceEvent) -> bool:
        meter = self._meter
        num_tokens = self._num_tokens + len(event.token_ids)
        return num_tokens > meter.funded_output_tokens and meter.is_budgeted

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

    def _apply(self, choice: Choice, event: SequenceEvent, *, max_tokens: int | None) -> Delta:
        """What an event adds, where at most so many of its tokens are paid for, or all of them."""
        if event.adapter_wait_ns > self._adapter_wait_ns:
            self._adapter_wait_ns = event.adapter_wait_ns
        if event.state is SequenceState.FAILED or event.state is SequenceState.ABORTED:
            raise _translate(event.fault)
        num_before = choice.num_tokens
        delta = choice.take(event, max_tokens=max_tokens)
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


def merged(streams: Sequence[SequenceStream]) -> SequenceStream | MergedStreams:
    """Almost always there is but one."""
    return streams[0] if len(streams) == 1 else MergedStreams(streams)


def deadline_s(admission: Admission) -> float | None:
    """Until when the first token must be there, by the event loop's clock."""
    if admission.queue_time_ms is None:
        return None
    return asyncio.get_running_loop().time() + admission.queue_time_ms / 1000


def _worst(outcomes: Iterable[FinishReason | None]) -> FinishReason:
    found = set(outcomes)
    return next(each for each in WORST_FIRST if each in found)


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
