"""Decide which sequences run in the next step, and take over what came of it.

Knows budgets, blocks, slots and whose turn it is. Knows nothing of tensors or text.

A sequence first pins its adapter's slot, then gets blocks. It never waits for a slot while it holds
blocks, so neither few slots nor few blocks can lock the engine up.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.block_manager import BlockManager
from engine.errors import InvalidLogits, SequenceError
from engine.fairness import WaitingLine
from engine.protocol import SequenceState, TokenLogprob
from engine.sequence import NO_ADAPTER, Sequence, SequenceKey, StepEvent
from engine.slots import SlotPool


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence and how many of its uncomputed tokens this step computes."""

    sequence: Sequence
    num_tokens: int
    # Whether the step reaches the last token, so that the next one can be sampled.
    is_sampled: bool

    @property
    def scored_positions(self) -> range:
        """Positions of this step whose logits tell of a prompt token that is asked about."""
        found, first = self.sequence.prompt_logprobs, self.sequence.num_computed_tokens
        if found is None:
            return range(0)
        last = min(first + self.num_tokens, self.sequence.num_prompt_tokens - 1)
        return range(max(first, len(found)), last)


# A struct, because many are made in every step and a dataclass runs Python for each.
class SampledToken(msgspec.Struct, frozen=True):
    token_id: int
    # Why there is none; token_id then means nothing.
    error: SequenceError | None = None
    logprob: TokenLogprob | None = None


class Scheduler:
    """Owns every change of every sequence. Mutable; one thread."""

    def __init__(
        self,
        blocks: BlockManager,
        slots: SlotPool[Any, Any],
        *,
        max_num_seqs: int,
        max_num_tokens: int,
    ) -> None:
        self._blocks = blocks
        self._slots = slots
        self._max_num_seqs = max_num_seqs
        self._max_num_tokens = max_num_tokens
        self._sequences: dict[SequenceKey, Sequence] = {}
        # In order of admission; these hold blocks.
        self._running: list[Sequence] = []
        self._waiting = WaitingLine()
        self._held_owners: set[str] = set()
        self._events: list[StepEvent] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    def __contains__(self, key: SequenceKey) -> bool:
        return key in self._sequences

    def add(self, sequence: Sequence) -> None:
        self._sequences[sequence.key] = sequence
        state = sequence.ending()
        if state.is_final:
            self._finish(sequence, state)
        else:
            self._waiting.append(sequence)

    def abort(self, key: SequenceKey) -> None:
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._finish(sequence, SequenceState.ABORTED)

    def fail_waiting_for(self, digest: str, error: SequenceError) -> None:
        """End the sequences that wait for an adapter which does not come."""
        for sequence in [s for s in self._waiting if s.adapter_digest == digest]:
            self._finish(sequence, SequenceState.FAILED, error=error)

    def hold_back(self, owner: str, *, held: bool) -> None:
        if held:
            self._held_owners.add(owner)
        else:
            self._held_owners.discard(owner)

    def take_events(self) -> list[StepEvent]:
        events, self._events = self._events, []
        return events

    def schedule(self) -> list[ScheduledSequence]:
        """The next step's sequences in batch order. Empty when none can run."""
        chosen = self._schedule_running()
        self._admit(chosen)
        return sorted(chosen, key=_batch_order)

    def commit(
        self, scheduled: list[ScheduledSequence], sampled: list[SampledToken], *, elapsed_ns: int
    ) -> None:
        """Take over a step: `sampled` has one entry per `is_sampled`, in order."""
        self._share_time(scheduled, elapsed_ns)
        samples = iter(sampled)
        for item in scheduled:
            num_before = item.sequence.num_computed_tokens
            item.sequence.num_computed_tokens += item.num_tokens
            self._blocks.name_full_blocks(item.sequence, num_computed_before=num_before)
            if item.is_sampled:
                self._take_token(item.sequence, next(samples))

    def check_integrity(self) -> None:
        holders = self._sequences.values()
        self._blocks.check_integrity(holders)
        self._slots.check_integrity(
            Counter(s.adapter_digest for s in holders if s.is_pinned and s.adapter_digest)
        )
        assert {id(s) for s in holders} == {id(s) for s in (*self._running, *self._waiting)}
        assert not any(s.block_table for s in self._waiting), "a waiting sequence holds blocks"

    # Running sequences

    def _ready(self) -> list[Sequence]:
        """Running and not held back: those of a slow worker take nobody's turn."""
        return [s for s in self._running if s.owner not in self._held_owners]

    def _schedule_running(self) -> list[ScheduledSequence]:
        """Decoding sequences go first: they need one token each and someone reads along."""
        budget = self._max_num_tokens
        chosen: list[ScheduledSequence] = []
        for sequence in sorted(self._ready(), key=lambda s: s.num_uncomputed_tokens > 1):
            if budget == 0 or len(chosen) == self._max_num_seqs:
                break
            if not self._grow(sequence, keep=chosen):
                continue
            chosen.append(_chunk(sequence, budget))
            budget -= chosen[-1].num_tokens
        return chosen

    def _grow(self, sequence: Sequence, *, keep: list[ScheduledSequence]) -> bool:
        """Blocks for all tokens, taken from the latest admitted of the others if need be."""
        if not sequence.block_table:
            return False  # preempted earlier in this pass
        while not self._blocks.grow(sequence):
            kept = {id(item.sequence) for item in keep}
            victim = self._victim(kept)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _victim(self, kept: set[int]) -> Sequence:
        """Whoever is held back goes first, then the latest admitted."""
        candidates = [s for s in self._running if id(s) not in kept]
        held = [s for s in candidates if s.owner in self._held_owners]
        return (held or candidates)[-1]

    def _preempt(self, sequence: Sequence) -> None:
        """Forget what was computed; the slot stays pinned, for a preempted sequence comes back."""
        self._running.remove(sequence)
        self._blocks.release(sequence)
        self._waiting.put_back(sequence)

    # Waiting sequences

    def _admit(self, chosen: list[ScheduledSequence]) -> None:
        budget = self._max_num_tokens - sum(item.num_tokens for item in chosen)
        self._slots.begin_pass()
        for sequence in self._in_turn():
            if budget == 0 or len(self._ready()) >= self._max_num_seqs:
                return
            if not self._pin(sequence):
                continue
            if not self._make_room(sequence) or not self._blocks.admit(sequence):
                return  # nobody overtakes: a long prompt would never find enough free blocks
            if sequence.num_cached_tokens is None:
                found = sequence.num_computed_tokens
                sequence.num_cached_tokens = min(found, sequence.num_prompt_tokens)
            self._waiting.take(sequence)
            self._running.append(sequence)
            chosen.append(_chunk(sequence, budget))
            budget -= chosen[-1].num_tokens

    def _in_turn(self) -> Iterator[Sequence]:
        """Waiting sequences that are not held back, whose turn it is first."""
        return (s for s in self._waiting if s.owner not in self._held_owners)

    def _pin(self, sequence: Sequence) -> bool:
        if sequence.adapter_digest is None or sequence.is_pinned:
            return True
        slot = self._slots.acquire(sequence.adapter_digest)
        if slot is None:
            return False
        sequence.slot, sequence.is_pinned = slot, True
        sequence.adapter_wait_ns = self._slots.wait_ns(
            sequence.adapter_digest, since_ns=sequence.submitted_ns
        )
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """Whether enough blocks are free, with one to spare for each that runs already.

        Without the spare ones the newcomer would be preempted by the next token of an old one.
        """
        missing = self._blocks.num_missing_blocks(sequence)
        wanted = missing + len(self._ready())
        held = [s for s in self._running if s.owner in self._held_owners]
        while self._blocks.num_free_blocks < wanted and held:
            self._preempt(held.pop())
        return self._blocks.num_free_blocks >= wanted

    # Ends

    def _share_time(self, scheduled: list[ScheduledSequence], elapsed_ns: int) -> None:
        """Share the step's time by tokens; the shares add up to the whole."""
        total = sum(item.num_tokens for item in scheduled)
        tokens_before = 0
        for item in scheduled:
            tokens_after = tokens_before + item.num_tokens
            share = elapsed_ns * tokens_after // total - elapsed_ns * tokens_before // total
            item.sequence.engine_ns += share
            tokens_before = tokens_after

    def _take_token(self, sequence: Sequence, sample: SampledToken) -> None:
        if sample.error is not None:
            if isinstance(sample.error, InvalidLogits):
                self._blocks.disown(sequence)
            self._finish(sequence, SequenceState.FAILED, error=sample.error)
            return
        sequence.token_ids.append(sample.token_id)
        self._waiting.charge_output(sequence)
        state = sequence.ending()
        if state.is_final:
            self._finish(sequence, state, sample=sample)
        else:
            self._report(sequence, state, sample=sample)

    def _finish(
        self,
        sequence: Sequence,
        state: SequenceState,
        *,
        sample: SampledToken | None = None,
        error: SequenceError | None = None,
    ) -> None:
        self._blocks.release(sequence)
        if sequence.is_pinned and sequence.adapter_digest is not None:
            self._slots.release(sequence.adapter_digest)
            sequence.slot, sequence.is_pinned = NO_ADAPTER, False
        self._waiting.discard(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        del self._sequences[sequence.key]
        self._report(sequence, state, sample=sample, error=error)

    def _report(
        self,
        sequence: Sequence,
        state: SequenceState,
        *,
        sample: SampledToken | None = None,
        error: SequenceError | None = None,
    ) -> None:
        logprobs = [sample.logprob] if sample is not None and sample.logprob is not None else None
        prompt_logprobs = None
        if sample is not None:
            prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        self._events.append(
            StepEvent(
                key=sequence.key,
                state=state,
                token_ids=[] if sample is None else [sample.token_id],
                prompt_tokens=sequence.num_prompt_tokens,
                cached_tokens=sequence.num_cached_tokens or 0,
                generated_tokens=sequence.num_generated_tokens,
                engine_ns=sequence.engine_ns,
                logprobs=logprobs,
                fault=None if error is None else error.fault(),
                prompt_logprobs=prompt_logprobs,
                adapter_wait_ns=sequence.adapter_wait_ns,
                adapter_digest=sequence.adapter_digest,
            )
        )


def _chunk(sequence: Sequence, budget: int) -> ScheduledSequence:
    num_tokens = min(sequence.num_uncomputed_tokens, budget)
    return ScheduledSequence(
        sequence, num_tokens, is_sampled=num_tokens == sequence.num_uncomputed_tokens
    )


def _batch_order(item: ScheduledSequence) -> tuple[bool, int]:
    """Single tokens first, by growing context: neighbours then pad each other little."""
    if item.num_tokens > 1:
        return True, 0
    return False, item.sequence.num_computed_tokens
