"""Put an adapter's examples to the base model, to the version now served, and to the new one.

Asks engines directly: nothing here is a tenant's request, and nothing is billed. Knows nothing of
uploads or of what follows from a score.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from adapters.errors import AdapterError
from adapters.examples import MAX_ANSWER_TOKENS, Example
from engine.errors import LinkError
from engine.protocol import SamplingParams, SequenceState
from gateway.aliases import ExampleResults, Score
from gateway.errors import GatewayError
from gateway.routing import Router
from gateway.text import TextCodec, TextCodecs

logger = logging.getLogger(__name__)

# Whose turn it is, on engines and where templates are rendered.
CALLER = "examples"
# Tenants' requests go first.
PRIORITY = 1
MAX_CONCURRENT = 4
# An upload waits for it; what has not been asked by then is left out for all alike.
MAX_SECONDS = 300.0
# An answer may be so much longer than what is expected before it is cut off.
EXTRA_TOKENS = 32
MAX_FAILED_LINES = 20


@dataclass(frozen=True, slots=True)
class Contender:
    """A version, or the base model alone."""

    base_model_id: uuid.UUID
    # None for the base model.
    weights_digest: str | None
    text_bundle_digest: str
    # Of the base model's own.
    base_text_bundle_digest: str


class ExampleRunner:
    """Asks every contender the same examples, greedily."""

    def __init__(
        self,
        texts: TextCodecs,
        router: Router,
        *,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        self._texts = texts
        self._router = router
        self._max_seconds = max_seconds

    async def run(
        self,
        examples: Sequence[Example],
        *,
        base: Contender,
        current: Contender | None,
        this: Contender,
        current_version: int | None,
        cache_salt: bytes,
    ) -> ExampleResults:
        """What no engine or template answers counts as not met."""
        contenders = {"base": base, "this": this}
        if current is not None:
            contenders["current"] = current
        rows = await self._ask_all(examples, contenders, cache_salt=cache_salt)
        failed = [number for number, row in enumerate(rows, start=1) if not row["this"]]
        return ExampleResults(
            base=_score(rows, "base"),
            current=_score(rows, "current") if current is not None else None,
            current_version=current_version if current is not None else None,
            this_version=_score(rows, "this"),
            failed=failed[:MAX_FAILED_LINES],
            num_left_out=len(examples) - len(rows),
        )

    async def _ask_all(
        self,
        examples: Sequence[Example],
        contenders: Mapping[str, Contender],
        *,
        cache_salt: bytes,
    ) -> list[dict[str, bool]]:
        """Whether each contender met each example, in order, as far as the time went."""
        deadline_s = time.monotonic() + self._max_seconds
        rows: list[dict[str, bool]] = []
        for start in range(0, len(examples), MAX_CONCURRENT):
            if time.monotonic() > deadline_s:
                break
            some = examples[start : start + MAX_CONCURRENT]
            rows += await asyncio.gather(
                *(self._ask_each(e, contenders, cache_salt=cache_salt) for e in some)
            )
        return rows

    async def _ask_each(
        self, example: Example, contenders: Mapping[str, Contender], *, cache_salt: bytes
    ) -> dict[str, bool]:
        met = await asyncio.gather(
            *(self._is_met(example, c, cache_salt=cache_salt) for c in contenders.values())
        )
        return dict(zip(contenders, met, strict=True))

    async def _is_met(self, example: Example, contender: Contender, *, cache_salt: bytes) -> bool:
        try:
            answer = await self._answer(example, contender, cache_salt=cache_salt)
        except (GatewayError, AdapterError, LinkError) as error:
            # A template that refuses the conversation, a prompt that is too long: no right answer.
            logger.info("example_not_answered", extra={"reason": type(error).__name__})
            return False
        return example.is_met_by(answer)

    async def _answer(self, example: Example, contender: Contender, *, cache_salt: bytes) -> str:
        """The greedy answer; an empty one where the engine refuses."""
        codec = await self._texts.get(
            contender.text_bundle_digest, base=contender.base_text_bundle_digest
        )
        prompt_ids = await _encode(codec, example)
        link = self._router.pick(contender.base_model_id, adapter_digest=contender.weights_digest)
        stream = link.submit(
            prompt_ids,
            sampling=SamplingParams(
                max_tokens=await _max_tokens(codec, example),
                temperature=0.0,
                seed=0,
                stop_token_ids=tuple(codec.eos_token_ids),
            ),
            adapter_digest=contender.weights_digest,
            cache_salt=cache_salt,
            fairness_key=CALLER,
            priority=PRIORITY,
        )
        token_ids: list[int] = []
        try:
            async for event in stream:
                token_ids += event.token_ids
                if event.state in (SequenceState.FAILED, SequenceState.ABORTED):
                    return ""
        finally:
            # Whoever waits for the upload may leave; once it has ended this changes nothing.
            stream.abort()
        return codec.decode(token_ids)


async def _encode(codec: TextCodec, example: Example) -> list[int]:
    if isinstance(example.question, str):
        return await codec.encode_text(example.question)
    messages: list[dict[str, Any]] = [msgspec.to_builtins(m) for m in example.question]
    return await codec.encode_chat(messages, caller=CALLER)


async def _max_tokens(codec: TextCodec, example: Example) -> int:
    if example.max_tokens is not None:
        return example.max_tokens
    expected = await codec.encode_text(example.expected or "")
    return min(len(expected) + EXTRA_TOKENS, MAX_ANSWER_TOKENS)


def _score(rows: Iterable[Mapping[str, bool]], name: str) -> Score:
    met = [row[name] for row in rows]
    return Score(passed=sum(met), total=len(met))
