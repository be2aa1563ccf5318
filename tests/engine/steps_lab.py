"""A scheduler with its blocks and slots, and made-up tokens: what is scheduled, without a model."""

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from engine.block_manager import BlockManager
from engine.errors import AdapterUnavailable
from engine.protocol import SamplingParams, Submit
from engine.scheduler import SampledToken, ScheduledSequence, Scheduler
from engine.sequence import Sequence, SequenceKey, StepEvent
from engine.slots import SlotPool

STEP_NS = 1_000_000
# Prompts that are only a length are made of tokens from here on, each used once.
FIRST_FRESH_TOKEN = 1_000_000


@dataclass(slots=True)
class Story:
    """What became of one sequence; steps are counted from the one that is next when it comes."""

    came_in_step: int
    events: list[StepEvent] = field(default_factory=list)
    num_computed: int = 0
    first_scheduled_in: int | None = None
    first_token_in: int | None = None
    # Those at which it decoded, and had no token.
    num_stalls: int = 0

    @property
    def num_steps_to_start(self) -> int:
        assert self.first_scheduled_in is not None, "it was never scheduled"
        return self.first_scheduled_in - self.came_in_step + 1

    @property
    def num_steps_to_first_token(self) -> int:
        assert self.first_token_in is not None, "it never had a token"
        return self.first_token_in - self.came_in_step + 1

    @property
    def has_ended(self) -> bool:
        return bool(self.events) and self.events[-1].state.is_final


class StepsLab:
    """Adapters come as soon as they are asked for, but for those in `slow`."""

    def __init__(
        self,
        *,
        num_blocks: int = 1024,
        block_size: int = 4,
        num_slots: int = 4,
        max_num_seqs: int = 8,
        max_num_tokens: int = 32,
    ) -> None:
        self.loading: list[str] = []
        self.slow: set[str] = set()
        self.blocks = BlockManager(num_blocks, block_size=block_size)
        self.slots = SlotPool(num_slots, start_load=self.loading.append)
        self.scheduler = Scheduler(
            self.blocks, self.slots, max_num_seqs=max_num_seqs, max_num_tokens=max_num_tokens
        )
        self.stories: dict[SequenceKey, Story] = {}
        self.num_steps = 0
        # How often a sequence that ran was sent back to wait.
        self.num_preemptions = 0
        # Tokens that steps computed, by fairness key; what is computed again is counted again.
        self.num_computed: Counter[str] = Counter()
        self._tokens = itertools.count(FIRST_FRESH_TOKEN)
        self._ids = itertools.count(1)

    def submit(
        self,
        prompt: int | list[int],
        *,
        max_tokens: int = 4,
        key: str = "",
        owner: str = "worker",
        **fields: Any,
    ) -> Sequence:
        """`prompt`: tokens, or how many of its own."""
        ids = list(itertools.islice(self._tokens, prompt)) if isinstance(prompt, int) else prompt
        submit = Submit(
            sequence_id=next(self._ids),
            prompt_token_ids=ids,
            sampling=SamplingParams(max_tokens=max_tokens),
            fairness_key=key,
            **fields,
        )
        sequence = Sequence.from_submit(submit, worker_id=owner, worker_epoch=1)
        self.stories[sequence.key] = Story(came_in_step=self.num_steps)
        self.scheduler.add(sequence)
        return sequence

    def story(self, sequence: Sequence) -> Story:
        return self.stories[sequence.key]

    def schedule(self) -> list[ScheduledSequence]:
        for digest in [d for d in self.loading if d not in self.slow]:
            self.finish_load(digest)
        before = dict(self.scheduler._running)
        scheduled = self.scheduler.schedule()
        self._count_preemptions(before)
        return scheduled

    def finish_load(self, digest: str, *, succeeds: bool = True) -> None:
        self.loading.remove(digest)
        if succeeds:
            self.slots.set_resident(digest)
        else:
            self.slots.drop(digest)
            self.scheduler.fail_waiting_for(digest, AdapterUnavailable())

    def commit(
        self, scheduled: list[ScheduledSequence], *, invalid: frozenset[Sequence] = frozenset()
    ) -> list[StepEvent]:
        sampled = [
            SampledToken(next(self._tokens), is_valid=item.sequence not in invalid, logprob=None)
            for item in scheduled
            if item.is_sampled
        ]
        self._write_down(scheduled)
        if scheduled:
            self.scheduler.commit(scheduled, sampled, elapsed_ns=STEP_NS)
        return self.collect()

    def collect(self) -> list[StepEvent]:
        """What the scheduler has to tell; a step has ended."""
        events = self.scheduler.take_events()
        for event in events:
            story = self.stories[event.key]
            story.events.append(event)
            if story.first_token_in is None and event.token_ids:
                story.first_token_in = self.num_steps
        self.num_steps += 1
        self.scheduler.check_integrity()
        return events

    def step(self) -> list[ScheduledSequence]:
        scheduled = self.schedule()
        self.commit(scheduled)
        return scheduled

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()

    def run_dry(self) -> None:
        """Until everything has ended."""
        while self.scheduler.num_running or self.scheduler.num_waiting:
            assert self.step() or self.loading, "nothing can run, and nothing will come"
        self.assert_nothing_is_left()

    def assert_nothing_is_left(self) -> None:
        self.scheduler.check_integrity()
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        assert self.blocks.num_free_blocks == self.blocks.num_blocks

    def num_seats_of(self, key: str) -> int:
        return sum(s.fairness_key == key for s in self.scheduler._running)

    def _count_preemptions(self, before: dict[Sequence, None]) -> None:
        self.num_preemptions += sum(sequence not in self.scheduler._running for sequence in before)

    def _write_down(self, scheduled: list[ScheduledSequence]) -> None:
        for item in scheduled:
            story = self.stories[item.sequence.key]
            story.num_computed += item.num_tokens
            self.num_computed[item.sequence.fairness_key] += item.num_tokens
            if story.first_scheduled_in is None:
                story.first_scheduled_in = self.num_steps
        chosen = {item.sequence for item in scheduled}
        for sequence in self.scheduler._running:
            is_decoding = sequence.num_uncomputed_tokens == 1
            if is_decoding and sequence not in chosen:
                self.stories[sequence.key].num_stalls += 1
