"""One request inside the engine: its tokens, how far they are computed, and where its state lives.

Mutable on purpose: the scheduler owns every change after construction. Knows nothing of tensors.
"""

import time
from dataclasses import dataclass, field
from typing import Self

import msgspec

from engine.grammar import GrammarWalk
from engine.pool import Pool
from engine.protocol import (
    Grammar,
    SamplingParams,
    SequenceFault,
    SequenceState,
    Submit,
    TokenLogprob,
)

# Worker id, worker epoch, the worker's own sequence id.
SequenceKey = tuple[str, int, int]
# Slot of a sequence that the base model answers alone.
NO_ADAPTER = -1


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and answer of one submit, compared by identity."""

    key: SequenceKey
    sampling: SamplingParams
    adapter_digest: str | None
    cache_salt: bytes
    fairness_key: str
    weight: float
    num_prompt_tokens: int
    # Prompt, then all that was generated, earlier attempts included.
    token_ids: list[int]
    # The class: the least goes first.
    priority: int = 0
    # What the adapter's probe found; None where none told.
    adapter_fingerprint: str | None = None
    # What the answer has to look like; None where it is free.
    grammar: Grammar | None = None
    # How far the answer has come in its grammar. Filled by the core once that is compiled.
    walk: GrammarWalk | None = None
    # How many of token_ids have their keys and values in the cache.
    num_computed_tokens: int = 0
    # Prompt tokens that were found in the prefix cache. Filled by the scheduler at first admission.
    num_cached_tokens: int | None = None
    # How many of token_ids cost their fairness key nothing more. Filled by the turns.
    num_paid_tokens: int = 0
    # Filled by the block manager, in order of position; not contiguous in general.
    block_table: list[int] = field(default_factory=list)
    # Names of the first full blocks. Filled by the prefix cache when it is asked for them.
    block_hashes: list[bytes] = field(default_factory=list)
    # How many of these were found when the block manager last looked for a missing one.
    num_found_blocks: int = 0
    # Filled by the scheduler when the slot is pinned; kept until the sequence ends.
    slot: int = NO_ADAPTER
    is_pinned: bool = False
    # Of the prompt tokens but the first, as far as they are computed; None where nobody asked, or
    # once they are reported. Filled by the sampler, taken by the scheduler with the first token.
    prompt_logprobs: list[TokenLogprob] | None = None
    # What the prompt's hidden states have come to; None of one that generates. Filled by the
    # pooling, taken by the scheduler when it is whole.
    pool: Pool | None = None
    # Whether the scheduler asked for the slot and it was not to be had.
    awaits_adapter: bool = False
    state: SequenceState = SequenceState.RUNNING
    engine_ns: int = 0
    submitted_ns: int = field(default_factory=time.perf_counter_ns)
    # Filled by the scheduler when the slot is pinned: how long the adapter was not resident.
    adapter_wait_ns: int = 0

    @classmethod
    def from_submit(cls, submit: Submit, *, worker_id: str, worker_epoch: int) -> Self:
        return cls(
            key=(worker_id, worker_epoch, submit.sequence_id),
            sampling=submit.sampling,
            adapter_digest=submit.adapter_digest,
            adapter_fingerprint=submit.adapter_fingerprint,
            cache_salt=submit.cache_salt,
            fairness_key=submit.fairness_key,
            weight=submit.weight,
            priority=submit.priority,
            grammar=submit.grammar,
            num_prompt_tokens=len(submit.prompt_token_ids),
            token_ids=[*submit.prompt_token_ids, *submit.generated_token_ids],
            # Whoever has generated tokens was told of the prompt together with the first of them.
            prompt_logprobs=(
                None
                if submit.sampling.prompt_logprobs is None or submit.generated_token_ids
                else []
            ),
            pool=None if submit.pooling is None else Pool(submit.pooling),
        )

    @classmethod
    def unowned(
        cls, token_ids: list[int], *, block_table: list[int], slot: int = NO_ADAPTER
    ) -> Self:
        """One that no worker submitted and no scheduler sees: for checks and probes."""
        return cls(
            key=("", 0, 0),
            sampling=SamplingParams(max_tokens=1),
            adapter_digest=None,
            cache_salt=b"",
            fairness_key="",
            weight=1.0,
            num_prompt_tokens=len(token_ids),
            token_ids=token_ids,
            block_table=block_table,
            slot=slot,
        )

    @property
    def owner(self) -> str:
        """The worker that submitted it."""
        return self.key[0]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_skippable_tokens(self) -> int:
        """How many of the first tokens need no computing where their keys and values are at hand.

        The last token's logits are always wanted, those before a prompt token that is asked about,
        and the hidden states of which a mean is made.
        """
        if self.prompt_logprobs is not None:
            return len(self.prompt_logprobs)
        if self.pool is not None:
            return self.pool.num_skippable_tokens(len(self.token_ids))
        return len(self.token_ids) - 1

    def ending(self) -> SequenceState:
        """How the last generated token leaves the sequence: finished, or RUNNING."""
        num_generated_tokens = self.num_generated_tokens
        if not num_generated_tokens:
            return SequenceState.RUNNING
        if self.token_ids[-1] in self.sampling.stop_token_ids:
            return SequenceState.STOPPED
        if num_generated_tokens >= self.sampling.max_tokens:
            return SequenceState.LENGTH
        return SequenceState.RUNNING


class StepEvent(msgspec.Struct, frozen=True):
    """What one step did to one sequence; the fields of `protocol.SequenceEvent` under its key.

    A struct, because there is one of each token: it is made in a seventh of the time.
    """

    key: SequenceKey
    state: SequenceState
    token_ids: list[int]
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    engine_ns: int
    logprobs: list[TokenLogprob] | None = None
    fault: SequenceFault | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    adapter_wait_ns: int = 0
    vector: bytes | None = None
    # For the breaker; stays in the engine.
    adapter_digest: str | None = None
