"""Decide which sequences run in the next step, and take over what came of it.

One budget of tokens per step: those that decode have one each, prompts share the rest by turn, by
the chunk. A sequence first pins its adapter's slot, then gets blocks. It never waits for a slot
while it holds blocks, so neither few slots nor few blocks can lock the engine up. What another is
just computing, it waits for instead of computing it again.

Knows budgets, blocks, slots and whose turn it is. Knows nothing of tensors or text.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.block_manager import BlockManager
from engine.errors import InvalidLogits, InvalidStates, SequenceError
from engine.fairness import INPUT_COST, Account, Turns
from engine.pool import Pool
from engine.preemption import Preemption, SeatClaims
from engine.protocol import SequenceState, TokenLogprob
from engine.sequence import NO_ADAPTER, Sequence, SequenceKey, StepEvent
from engine.slots import SlotPool

# Those who will be admitted within the next few steps. More would only fill the way to the device.
NUM_PREFETCHES = 8
# A tenant that asks for little has its prompts computed at once, up to so many steps of them.
NUM_BURST_STEPS = 8
# So many prompts are computed in parts that those who decode hardly feel. Where more come at once,
# what counts is when the last of them begins, and larger parts take half the time.
FEW_PROMPTS = 2
# After a step that ran out of memory the budget is whole again in at most so many steps.
NUM_RECOVERY_STEPS = 32


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence and how many of its uncomputed tokens this step computes."""

    sequence: Sequence
    num_tokens: int
    # Whether the step reaches the last token, so that the next one can be sampled. Never of a
    # prompt that is pooled.
    is_sampled: bool

    @property
    def scored_positions(self) -> range:
        """Positions of this step whose logits tell of a prompt token that is asked about."""
        found, first = self.sequence.prompt_logprobs, self.sequence.num_computed_tokens
        if found is None:
            return range(0)
        last = min(first + self.num_tokens, self.sequence.num_prompt_tokens - 1)
        return range(max(first, len(found)), last)

    @property
    def pooled_positions(self) -> range:
        """Positions of this step whose hidden states the sequence's vector lacks."""
        sequence, first = self.sequence, self.sequence.num_computed_tokens
        if sequence.pool is None:
            return range(0)
        chunk = range(first, first + self.num_tokens)
        return sequence.pool.wanted(chunk, num_tokens=sequence.num_tokens)


# A struct, because many are made in every step and a dataclass runs Python for each.
class SampledToken(msgspec.Struct, frozen=True):
    token_id: int
    # Why there is none; token_id then means nothing.
    error: SequenceError | None = None
    logprob: TokenLogprob | None = None


@dataclass(slots=True)
class _Plan:
    """The step that is being put together."""

    # Tokens left.
    budget: int
    # Most sequences, and how many of the running ones may take part.
    num_seats: int
    num_ready: int
    # The class of the least urgent of these.
    least_urgent: int
    chosen: dict[Sequence, ScheduledSequence] = field(default_factory=dict)
    # They don't come back in the step that sent them away.
    preempted: set[Sequence] = field(default_factory=set)
    # By name: who computes a block that others may want.
    under_way: dict[bytes, Sequence] = field(default_factory=dict)
    # Asked for in this step, and not to be had.
    absent_adapters: set[str | None] = field(default_factory=set)
    # No seat is free, and these may not claim one.
    refused: set[Account] = field(default_factory=set)
    # Of each class; forgotten when somebody comes or goes.
    seat_claims: dict[int, SeatClaims] = field(default_factory=dict)
    is_short_of_blocks: bool = False
    is_short_of_seats: bool = False

    def admits(self, account: Account) -> bool:
        return not self.is_closed and account not in self.refused

    @property
    def is_closed(self) -> bool:
        return self.is_short_of_blocks or self.is_short_of_seats or not self.budget


class Scheduler:
    """Owns every change of every sequence. Mutable; one thread."""

    def __init__(
        self,
        blocks: BlockManager,
        slots: SlotPool[Any, Any],
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        max_tokens_beside_decodes: int | None = None,
    ) -> None:
        """`max_tokens_beside_decodes`: of few prompts, in steps that others wait for; None for as
        many as in any."""
        self._blocks = blocks
        self._slots = slots
        self._max_num_seqs = max_num_seqs
        self._max_num_tokens = max_num_tokens
        self._max_tokens_beside_decodes = max_tokens_beside_decodes or max_num_tokens
        # The budget of a step: less than the most after one that ran out of memory.
        self._num_tokens = max_num_tokens
        self._sequences: dict[SequenceKey, Sequence] = {}
        # In order of admission; these hold blocks.
        self._running: dict[Sequence, None] = {}
        self._held_owners: set[str] = set()
        self._turns = Turns(burst=NUM_BURST_STEPS * max_num_tokens * INPUT_COST)
        self._preemption = Preemption(blocks, self._turns, held_owners=self._held_owners)
        self._prefers_short = False
        self._events: list[StepEvent] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._sequences) - len(self._running)

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    def __contains__(self, key: SequenceKey) -> bool:
        return key in self._sequences

    def add(self, sequence: Sequence) -> None:
        state = sequence.ending()
        if state.is_final:
            self._report(sequence, state)
        else:
            self._sequences[sequence.key] = sequence
            self._turns.add(sequence)

    def abort(self, key: SequenceKey) -> None:
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._finish(sequence, SequenceState.ABORTED)

    def fail(self, key: SequenceKey, error: SequenceError) -> None:
        self._finish(self._sequences[key], SequenceState.FAILED, error=error)

    def fail_waiting_for(self, digest: str, error: SequenceError) -> None:
        """End the sequences that wait for an adapter which does not come."""
        for sequence in [s for s in self._turns.waiting() if s.adapter_digest == digest]:
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
        ready = self._ready()
        plan = _Plan(
            budget=self._num_tokens,
            # Whoever is admitted will decode, and each that decodes needs a token of the budget.
            num_seats=min(self._max_num_seqs, self._num_tokens),
            num_ready=len(ready),
            least_urgent=max((s.priority for s in ready), default=0),
        )
        self._choose_decodes(plan)
        num_others = len(self._sequences) - len(plan.chosen)
        if plan.chosen and num_others <= FEW_PROMPTS:
            plan.budget = min(plan.budget, self._max_tokens_beside_decodes)
        self._choose_prompts(plan)
        if plan.is_closed or plan.refused:
            # Some were not even looked at.
            self._prefetch(plan)
        return sorted(plan.chosen.values(), key=_batch_order)

    def commit(
        self, scheduled: list[ScheduledSequence], sampled: list[SampledToken], *, elapsed_ns: int
    ) -> None:
        """Take over a step: `sampled` has one entry per `is_sampled`, in order."""
        self._share_time(scheduled, elapsed_ns)
        recovered = self._num_tokens + -(-self._max_num_tokens // NUM_RECOVERY_STEPS)
        self._num_tokens = min(recovered, self._max_num_tokens)
        samples = iter(sampled)
        for item in scheduled:
            num_before = item.sequence.num_computed_tokens
            item.sequence.num_computed_tokens += item.num_tokens
            self._blocks.name_full_blocks(item.sequence, num_computed_before=num_before)
            if item.is_sampled:
                self._turns.catch_up(item.sequence)
                self._take_token(item.sequence, next(samples))
            elif item.sequence.pool is not None and not item.sequence.num_uncomputed_tokens:
                self._take_vector(item.sequence, item.sequence.pool)

    def retreat(self, scheduled: list[ScheduledSequence]) -> bool:
        """A step ran out of memory: nothing of it counts, and the next ones are smaller.

        About half of its sequences wait again, the least urgent and the latest admitted; a single
        one goes on in smaller chunks. False where it was one token of one sequence already: then
        the caller has to `fail` it.
        """
        num_tokens = sum(item.num_tokens for item in scheduled)
        self._num_tokens = max(1, num_tokens // 2)
        places = {sequence: place for place, sequence in enumerate(self._running)}
        order = sorted((i.sequence for i in scheduled), key=lambda s: (s.priority, places[s]))
        for sequence in reversed(order[(len(order) + 1) // 2 :]):
            self._send_back(sequence)
        return num_tokens > 1

    def check_integrity(self) -> None:
        holders = self._sequences.values()
        waiting = set(self._turns.waiting())
        self._blocks.check_integrity(holders)
        self._slots.check_integrity(
            Counter(s.adapter_digest for s in holders if s.is_pinned and s.adapter_digest)
        )
        self._turns.check_integrity(holders)
        assert waiting.isdisjoint(self._running)
        assert waiting | self._running.keys() == set(holders)
        assert not any(s.block_table for s in waiting), "a waiting sequence holds blocks"
        assert all(s.block_table for s in self._running), "a running sequence holds no block"
        prefilling = set(self._turns.prefilling())
        assert prefilling <= self._running.keys()
        assert {s for s in self._running if s.num_uncomputed_tokens > 1} <= prefilling

    # One token each

    def _ready(self) -> list[Sequence]:
        """Running and not held back: those of a slow worker take nobody's turn."""
        return [s for s in self._running if s.owner not in self._held_owners]

    def _choose_decodes(self, plan: _Plan) -> None:
        """Decoding sequences go first: they need one token each and someone reads along."""
        decoding = [s for s in self._ready() if s.num_uncomputed_tokens == 1]
        decoding = decoding[: min(plan.num_seats, plan.budget)]
        for sequence in self._let_grow(decoding, plan):
            has_grown = self._blocks.grow(sequence)
            assert has_grown, "there were blocks enough"
            self._take(sequence, plan)

    def _let_grow(self, decoding: list[Sequence], plan: _Plan) -> list[Sequence]:
        """Those who stay when all of them have their next block."""
        num_missing = {s: self._blocks.num_missing_blocks(s) for s in decoding}
        num_short = sum(num_missing.values()) - self._blocks.num_free_blocks
        if num_short > 0:
            self._slots.make_room(num_short)
        while sum(num_missing.values()) > self._blocks.num_free_blocks:
            victim = self._preemption.victim_of_growth(self._running)
            self._preempt(victim, plan)
            num_missing.pop(victim, None)
        return list(num_missing)

    # Prompts

    def _choose_prompts(self, plan: _Plan) -> None:
        self._slots.begin_pass()
        self._note_under_way(plan)
        turns = self._turns.in_turn(admits=plan.admits, shortest_first=self._prefers_short)
        for sequence in turns:
            if not plan.budget:
                break
            if self._is_set_aside(sequence, plan):
                continue
            has_blocks = bool(sequence.block_table) or self._admit(sequence, plan)
            if has_blocks and len(plan.chosen) < plan.num_seats:
                self._take(sequence, plan)
        # Where blocks are short nobody overtakes: a long prompt would never find enough.
        self._prefers_short = not self._prefers_short and not plan.is_short_of_blocks

    def _is_set_aside(self, sequence: Sequence, plan: _Plan) -> bool:
        is_held = sequence.owner in self._held_owners
        is_absent = not sequence.is_pinned and sequence.adapter_digest in plan.absent_adapters
        return is_held or is_absent or sequence in plan.chosen or sequence in plan.preempted

    def _note_under_way(self, plan: _Plan) -> None:
        for sequence in self._turns.prefilling():
            if sequence.owner not in self._held_owners:
                self._offer(sequence, plan)

    def _offer(self, sequence: Sequence, plan: _Plan) -> None:
        name = self._blocks.name_under_way(sequence)
        if name is not None:
            plan.under_way.setdefault(name, sequence)

    def _take(self, sequence: Sequence, plan: _Plan) -> None:
        num_tokens = min(sequence.num_uncomputed_tokens, plan.budget)
        is_sampled = num_tokens == sequence.num_uncomputed_tokens and sequence.pool is None
        self._turns.charge_input(sequence, num_tokens)
        plan.chosen[sequence] = ScheduledSequence(sequence, num_tokens, is_sampled=is_sampled)
        plan.budget -= num_tokens

    # Waiting sequences

    def _admit(self, sequence: Sequence, plan: _Plan) -> bool:
        """Whether `sequence` has a seat, its slot and its blocks now."""
        if not self._may_have_seat(sequence, plan):
            return False
        if self._is_under_way(sequence, plan) or not self._pin(sequence, plan):
            return False
        if not self._make_room(sequence, plan):
            return False
        if sequence.num_cached_tokens is None:
            found = sequence.num_computed_tokens
            sequence.num_cached_tokens = min(found, sequence.num_prompt_tokens)
        self._turns.admit(sequence)
        self._running[sequence] = None
        plan.num_ready += 1
        plan.seat_claims.clear()
        self._offer(sequence, plan)
        return True

    def _may_have_seat(self, sequence: Sequence, plan: _Plan) -> bool:
        if plan.num_ready < plan.num_seats or plan.least_urgent > sequence.priority:
            return True
        claims = plan.seat_claims.get(sequence.priority)
        if claims is None:
            claims = self._preemption.seat_claims(
                sequence.priority, self._running, num_seats=plan.num_seats
            )
            plan.seat_claims[sequence.priority] = claims
        account = self._turns.account_of(sequence)
        may_claim = claims.allow(account, is_newcomer=self._turns.is_newcomer(account))
        if not claims.are_any:
            plan.is_short_of_seats = True
        elif not may_claim:
            plan.refused.add(account)
        return may_claim

    def _is_under_way(self, sequence: Sequence, plan: _Plan) -> bool:
        """Whether one that is no less urgent computes what `sequence` lacks first.

        It runs and is not held back, so its turn comes; when it is preempted, nobody waits for it.
        """
        name = self._blocks.first_missing_name(sequence)
        other = plan.under_way.get(name) if name is not None else None
        return other is not None and bool(other.block_table) and other.priority <= sequence.priority

    def _pin(self, sequence: Sequence, plan: _Plan) -> bool:
        digest = sequence.adapter_digest
        if digest is None or sequence.is_pinned:
            return True
        slot = self._slots.acquire(digest)
        sequence.awaits_adapter = slot is None
        if slot is None:
            plan.absent_adapters.add(digest)
            return False
        sequence.slot, sequence.is_pinned = slot, True
        sequence.adapter_wait_ns = self._slots.wait_ns(digest, since_ns=sequence.submitted_ns)
        return True

    def _make_room(self, sequence: Sequence, plan: _Plan) -> bool:
        """Give it blocks, and one to spare for each that runs already.

        Without the spare ones the newcomer would be preempted by the next token of an old one.
        """
        num_wanted = self._blocks.num_missing_blocks(sequence) + plan.num_ready
        # An adapter whose turn came before has its blocks first.
        num_wanted += self._slots.num_reserved_blocks
        num_short = num_wanted - self._blocks.num_free_blocks
        if num_short > 0:
            num_short -= self._slots.make_room(num_short)
        victims = self._preemption.victims_for(
            sequence,
            self._running,
            num_seats=plan.num_seats,
            needs_seat=plan.num_ready >= plan.num_seats,
            num_blocks_short=num_short,
        )
        for victim in victims or ():
            self._preempt(victim, plan)
        if victims is not None and self._blocks.admit(sequence):
            return True
        plan.is_short_of_blocks = True
        return False

    def _prefetch(self, plan: _Plan) -> None:
        for sequence in self._turns.next_waiting(NUM_PREFETCHES):
            digest = sequence.adapter_digest
            is_wanted = not sequence.is_pinned and sequence.owner not in self._held_owners
            if digest is not None and is_wanted and digest not in plan.absent_adapters:
                self._slots.prefetch(digest)

    # Preemption

    def _preempt(self, sequence: Sequence, plan: _Plan) -> None:
        item = plan.chosen.pop(sequence, None)
        if item is not None:
            plan.budget += item.num_tokens
        if sequence.owner not in self._held_owners:
            plan.num_ready -= 1
        plan.preempted.add(sequence)
        plan.seat_claims.clear()
        self._send_back(sequence)

    def _send_back(self, sequence: Sequence) -> None:
        """Forget what was computed; the slot stays pinned, for a preempted sequence comes back."""
        del self._running[sequence]
        self._blocks.release(sequence)
        self._turns.put_back(sequence)

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
        self._turns.charge_output(sequence)
        state = sequence.ending()
        if state.is_final:
            self._finish(sequence, state, sample=sample)
        else:
            self._report(sequence, state, sample=sample)

    def _take_vector(self, sequence: Sequence, pool: Pool) -> None:
        vector = pool.vector()
        if vector is None:
            self._blocks.disown(sequence)
            self._finish(sequence, SequenceState.FAILED, error=InvalidStates())
        else:
            self._finish(sequence, SequenceState.STOPPED, vector=vector)

    def _finish(
        self,
        sequence: Sequence,
        state: SequenceState,
        *,
        sample: SampledToken | None = None,
        error: SequenceError | None = None,
        vector: bytes | None = None,
    ) -> None:
        self._blocks.release(sequence)
        if sequence.is_pinned and sequence.adapter_digest is not None:
            self._slots.release(sequence.adapter_digest)
            sequence.slot, sequence.is_pinned = NO_ADAPTER, False
        self._turns.remove(sequence)
        self._running.pop(sequence, None)
        del self._sequences[sequence.key]
        self._report(sequence, state, sample=sample, error=error, vector=vector)

    def _report(
        self,
        sequence: Sequence,
        state: SequenceState,
        *,
        sample: SampledToken | None = None,
        error: SequenceError | None = None,
        vector: bytes | None = None,
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
                vector=vector,
                adapter_digest=sequence.adapter_digest,
            )
        )


def _batch_order(item: ScheduledSequence) -> tuple[bool, int, int]:
    """Single tokens first. Neighbours use one slot, and pad each other's context little."""
    if item.num_tokens > 1:
        return True, item.sequence.slot, 0
    return False, item.sequence.slot, item.sequence.num_computed_tokens
