"""A scheduler with its blocks and slots, and made-up tokens: what is scheduled, without a model."""

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from engine.adapter_loader import CopyResult, ReadResult
from engine.block_manager import BlockManager
from engine.errors import AdapterUnavailable, InvalidLogits
from engine.host_tier import HostTier
from engine.protocol import SamplingParams, Submit
from engine.scheduler import SampledToken, ScheduledSequence, Scheduler
from engine.sequence import Sequence, SequenceKey, StepEvent
from engine.slots import SlotPool
from engine.wishes import Wishes
from tests.engine.tier_lab import BLOCK_BYTES, Device, Loads, Weights

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


class Bank:
    """Computes with nothing."""

    def install(self, slot: int, adapter: Weights, window: Any) -> None: ...
    def move(self, slot: int, window: Any) -> None: ...
    def clear(self, slot: int) -> None: ...


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
        max_tokens_beside_decodes: int | None = None,
        adapter_blocks: dict[str, int] | None = None,
        max_adapter_blocks: int = 0,
    ) -> None:
        """`adapter_blocks`: what adapters take of the sequences' memory.

        None where they lie elsewhere, in a block each.
        """
        self.slow: set[str] = set()
        self.blocks = BlockManager(
            num_blocks, block_size=block_size, block_bytes=1, move_blocks=lambda moves: None
        )
        self._adapter_blocks = adapter_blocks
        elsewhere = Device(num_slots)
        self.loads = Loads()
        self.slots: SlotPool[Weights, Any] = SlotPool(
            num_slots,
            memory=elsewhere if adapter_blocks is None else self.blocks,
            max_blocks=num_slots if adapter_blocks is None else max_adapter_blocks,
            host=HostTier(1000),
            loads=self.loads,
            bank=Bank(),
        )
        self.scheduler = Scheduler(
            self.blocks,
            self.slots,
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            max_tokens_beside_decodes=max_tokens_beside_decodes,
        )
        self.wishes = Wishes(self.slots)
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
        self._finish_loads()
        before = dict(self.scheduler._running)
        scheduled = self.scheduler.schedule()
        self.wishes.pursue()
        self._count_preemptions(before)
        return scheduled

    @property
    def loading(self) -> list[str]:
        return [*self.loads.reads, *self.loads.copies]

    def finish_load(self, digest: str, *, succeeds: bool = True) -> None:
        """The next part of the way: to the host, or from there to the device."""
        fault = None if succeeds else AdapterUnavailable()
        result: ReadResult[Weights] | CopyResult
        if digest in self.loads.reads:
            self.loads.reads.remove(digest)
            result = ReadResult(digest, fault or Weights(digest, self._size_bytes(digest)))
        else:
            self.loads.copies.remove(digest)
            result = CopyResult(digest, fault)
        if self.slots.take(result) is not None:
            self.slots.unpin(digest)
            self.wishes.fail(digest, AdapterUnavailable())
            self.scheduler.fail_waiting_for(digest, AdapterUnavailable())

    def _size_bytes(self, digest: str) -> int:
        return BLOCK_BYTES if self._adapter_blocks is None else self._adapter_blocks[digest]

    def _finish_loads(self) -> None:
        for digest in self.loading:
            if digest not in self.slow:
                self.finish_load(digest)

    def commit(
        self, scheduled: list[ScheduledSequence], *, invalid: frozenset[Sequence] = frozenset()
    ) -> list[StepEvent]:
        sampled = [
            SampledToken(next(self._tokens), InvalidLogits() if item.sequence in invalid else None)
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
        num_left = self.blocks.num_blocks - self.blocks.num_window_blocks
        assert self.blocks.num_free_blocks == num_left

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
