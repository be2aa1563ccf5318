"""Texts as vectors: what a request for embeddings is, and its answer, up to the bill.

The same path as a generation's, under the same limits and out of the same money; but every input is
a sequence of its own that generates nothing, and the request owes its prompts alone, once all its
vectors are there. Knows nothing of HTTP or of how a vector is spelled on the wire.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from adapters.text_bundle import PoolingKind
from engine.client import SequenceStream
from engine.errors import LinkError
from engine.protocol import SamplingParams, SequenceEvent, SequenceFault
from gateway.errors import (
    ContextLengthExceeded,
    EngineFailed,
    GatewayError,
    InvalidRequest,
    Unavailable,
)
from gateway.journal import Meter, Settlement
from gateway.ledger import Ledger
from gateway.limits import Admission, waited_too_long
from gateway.overload import Place
from gateway.policies.rules import Asked
from gateway.prices import Bill
from gateway.registry import Target
from gateway.text import TextCodec

logger = logging.getLogger(__name__)

# Where neither the request nor the model's checkpoint says how. Models that were not trained for
# vectors say most in the mean; the last token's state is about what comes next.
DEFAULT_POOLING: PoolingKind = "mean"
ENDPOINT = "embeddings"
# What the engine is told of an answer's tokens: there are none.
NO_TOKENS = SamplingParams(max_tokens=0)

# A text, or what its client made of it.
EmbeddingInput = str | list[int]


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """What a client asked for, checked and freed of its spelling."""

    model: str
    inputs: Sequence[EmbeddingInput]
    # None where the client named none.
    pooling: PoolingKind | None = None
    # As in a generation's request.
    user: str | None = None
    # Names the fields that the client gave, where a policy asks.
    fields: Callable[[], frozenset[str]] = frozenset
    # As in a generation's request.
    endpoint: str = ENDPOINT
    priority: int = 0

    async def encode(self, codec: TextCodec, *, context_length: int) -> list[list[int]]:
        """The token ids of each input. Raises InvalidRequest, ContextLengthExceeded."""
        texts = [each for each in self.inputs if isinstance(each, str)]
        encoded = iter(await codec.encode_texts(texts))
        prompts = [next(encoded) if isinstance(each, str) else each for each in self.inputs]
        for number, token_ids in enumerate(prompts):
            _check_length(f"input[{number}]", len(token_ids), context_length=context_length)
        return prompts

    def asked(self, codec: TextCodec, prompts: Sequence[Sequence[int]]) -> Asked:
        """The request as its policy sees it: every input by itself, token ids as their text."""

        def texts() -> list[str]:
            return [each if isinstance(each, str) else codec.decode(each) for each in self.inputs]

        return Asked(
            fields=self.fields(),
            prompt_field="input",
            num_prompt_tokens=max(map(len, prompts)),
            max_tokens=0,
            texts=texts,
        )

    def spelled(self) -> str:
        """The inputs as they are kept, where a tenant wants its texts kept."""
        [first, *others] = self.inputs
        if isinstance(first, str) and not others:
            return first
        return msgspec.json.encode(self.inputs).decode()


def _check_length(place: str, num_tokens: int, *, context_length: int) -> None:
    if not num_tokens:
        raise InvalidRequest(f"'{place}' is empty: give at least one token.", param="input")
    if num_tokens > context_length:
        raise ContextLengthExceeded(
            f"This model's context is {context_length} tokens; '{place}' has {num_tokens}:"
            " shorten it.",
            param="input",
        )


class Embedding:
    """The vectors of one request while they come; whoever asks for them must `finish` or `leave`.

    Every way out ends in the ledger exactly once.
    """

    def __init__(
        self,
        *,
        request_id: uuid.UUID,
        target: Target,
        streams: Sequence[SequenceStream],
        meter: Meter,
        ledger: Ledger,
        admission: Admission,
        place: Place,
        deadline_s: float | None,
        keep: Callable[[], None],
    ) -> None:
        """`deadline_s`: until when the first vector must be there, by the event loop's clock;
        `keep` is called at the end."""
        self.request_id = request_id
        self.target = target
        self.levels = admission.levels
        self._streams = streams
        self._meter = meter
        self._ledger = ledger
        self._admission = admission
        # Held until the first vector.
        self._place = place
        self._deadline_s = deadline_s
        self._keep = keep
        self._adapter_wait_ns = 0
        self._is_closed = False

    async def vectors(self) -> list[bytes]:
        """One for each input, in order: float32, little endian, of length one.

        Raises EngineFailed or Unavailable where the engine could not make one, LimitReached where
        the first was waited for longer than it may.
        """
        try:
            return [await self._vector(stream) for stream in self._streams]
        except LinkError as fault:
            self._close("error")
            error = Unavailable(f"The vectors cannot be had now; ask again: {fault}")
            error.headers = self.levels.headers() | error.headers
            raise error from fault
        except GatewayError as error:
            self._close("error")
            error.headers = self.levels.headers() | error.headers
            raise

    async def _vector(self, stream: SequenceStream) -> bytes:
        event = await self._next(stream)
        self._deadline_s = None
        self._place.leave()
        if event is None or event.vector is None:
            raise _translate(event.fault if event else None)
        self._adapter_wait_ns = max(self._adapter_wait_ns, event.adapter_wait_ns)
        return event.vector

    async def _next(self, stream: SequenceStream) -> SequenceEvent | None:
        try:
            async with asyncio.timeout_at(self._deadline_s):
                return await anext(stream, None)
        except TimeoutError:
            raise waited_too_long(self._admission) from None

    def bill(self) -> Bill:
        """What `finish` is going to say, once all vectors are there."""
        return self._meter.usage()

    def settlement(self) -> Settlement:
        """What `finish` is going to have settled."""
        return self._ledger.ending(self.request_id, "stop")

    def finish(self) -> Bill:
        """Close a whole answer; call it just before its body is written."""
        self._is_closed = True
        self._end("stop")
        return self._ledger.close(self.request_id, "stop")

    def leave(self) -> None:
        """The client is gone. Does nothing once the answer is closed."""
        self._close("abort")

    def _close(self, outcome: str) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._meter.disconnect()
        for stream in self._streams:
            stream.abort()
        self._end(outcome)
        self._ledger.close(self.request_id, outcome, sent=False)

    def _end(self, outcome: str) -> None:
        self._place.leave()
        self._keep()
        logger.info(
            "embedding_ended",
            extra={
                "request_id": str(self.request_id),
                "outcome": outcome,
                "num_inputs": len(self._streams),
                "engine_ms": self._meter.engine_ns // 1_000_000,
                "adapter_wait_ms": self._adapter_wait_ns // 1_000_000,
            },
        )


def _translate(fault: SequenceFault | None) -> GatewayError:
    if fault is None or fault.is_retryable:
        reason = fault.message if fault else "the engine let go of it"
        return Unavailable(f"The vectors cannot be had now; ask again: {reason}")
    if fault.code == ContextLengthExceeded.code:
        return ContextLengthExceeded(fault.message, param="input")
    if fault.code == "invalid_sequence":
        return InvalidRequest(fault.message, param="input")
    return EngineFailed(fault.message)
