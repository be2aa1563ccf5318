"""How many sequences run at once in a given KV memory, and how much of that memory is wasted.

    python -m benchmarks.kv_memory [--output benchmarks/results/kv-memory.json]

The engine's own scheduler, block manager and slot pool, with made-up tokens in place of a model:
what is counted does not depend on a machine, nor on how long a step takes. The queue is never
empty. Lengths of prompts and answers are log-normal, as those of chats are, and end at the longest
sequence; no two requests share a beginning, so nothing here is the prefix cache's merit. Nobody
tells the scheduler how long an answer will be: each may take all that is left, and ends with a stop
token. It is compared with a reservation of the longest sequence for each, in as much memory, of
which the queue keeps all in use. How far apart both are follows from the lengths: where requests
fill their reservations, paging gains nothing.

Counted after warm-up, at every step, when the scheduler has handed out all that the step needs:

- a slot of an allocated block holds a token if the token is computed before this step or in it;
- `empty` slots have no token yet: the rest of each last block;
- `promised` slots are for tokens that are there but computed later: a prompt has all its blocks at
  once, and is computed by the chunk. `waste` is the empty ones alone, `waste_with_promised` both;
- `idle` blocks belong to no sequence, and are not waste here: they may hold what preempted and
  ended sequences computed, and the scheduler keeps one to spare for each that runs;
- `filled` is the share of the whole memory, idle blocks included, that holds tokens of a running
  sequence: the strictest figure, and the one to compare with that of the reservation.

Not counted: the one block that padding reads, and memory that adapters take, for there are none.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.provenance import commit
from engine.block_manager import BlockManager
from engine.host_tier import HostTier
from engine.protocol import SamplingParams, Submit
from engine.scheduler import SampledToken, ScheduledSequence, Scheduler
from engine.sequence import Sequence
from engine.slots import SlotPool

MAX_MODEL_LEN = 2048
NUM_CONTIGUOUS = 32
NUM_SLOTS = NUM_CONTIGUOUS * MAX_MODEL_LEN
BLOCK_SIZES = (8, 16, 32)
MAX_NUM_TOKENS = 2048
# More than the budget of a step admits.
NUM_WAITING = 64
# Until the longest of those that began together has ended, and some more.
NUM_WARM_UP_STEPS = 3000
NUM_STEPS = 4000
# Any number: nothing that is counted depends on it.
STEP_NS = 1_000_000

STOP, OTHER = 0, 1


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal; the logarithms' standard deviation is `sigma`."""

    prompt_median: int = 150
    answer_median: int = 200
    sigma: float = 0.9

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """Of a prompt and its answer. What is longer than the longest sequence ends there."""
        prompt, answer = (
            max(1, round(median * rng.lognormvariate(0, self.sigma)))
            for median in (self.prompt_median, self.answer_median)
        )
        prompt = min(prompt, MAX_MODEL_LEN - 1)
        return prompt, min(answer, MAX_MODEL_LEN - prompt)


class NoAdapters:
    """Stands where adapters are read and computed with; nobody asks for one."""

    def read(self, digest: str) -> None:
        raise AssertionError(digest)

    def copy(self, digest: str, adapter: Any, window: Any) -> None:
        raise AssertionError(digest)

    def install(self, slot: int, adapter: Any, window: Any) -> None:
        raise AssertionError(slot)

    def move(self, slot: int, window: Any) -> None:
        raise AssertionError(slot)

    def clear(self, slot: int) -> None:
        raise AssertionError(slot)


@dataclass(frozen=True, slots=True)
class Use:
    """Of the KV memory, in one step. Counts of token slots, but for sequences and blocks."""

    running: int
    # Of these: they have a token or a chunk in this step.
    advancing: int
    idle_blocks: int
    allocated: int
    held: int
    promised: int


@dataclass(slots=True)
class Tally:
    """What is added up over the measured steps."""

    uses: list[Use] = field(default_factory=list)
    num_preemptions: int = 0
    num_computed: int = 0
    num_recomputed: int = 0
    # Of the requests that ended: prompt and answer.
    finished: list[tuple[int, int]] = field(default_factory=list)


class Queue:
    """A scheduler that always has some waiting."""

    def __init__(self, lengths: Lengths, *, block_size: int, seed: int) -> None:
        self._lengths = lengths
        self._rng = random.Random(seed)
        num_blocks = NUM_SLOTS // block_size
        self.blocks = BlockManager(
            num_blocks, block_size=block_size, block_bytes=1, move_blocks=lambda moves: None
        )
        slots: SlotPool[Any, Any] = SlotPool(
            0,
            memory=self.blocks,
            max_blocks=0,
            host=HostTier(0),
            loads=NoAdapters(),
            bank=NoAdapters(),
        )
        # A sequence has a block at least, so seats are never short.
        self.scheduler = Scheduler(
            self.blocks, slots, max_num_seqs=num_blocks, max_num_tokens=MAX_NUM_TOKENS
        )
        self.tally = Tally()
        self._ids = itertools.count(1)
        self._open: set[Sequence] = set()
        self._answer_lengths: dict[Sequence, int] = {}
        # How many tokens of each were computed at some time.
        self._reached: dict[Sequence, int] = {}

    def step(self) -> None:
        while self.scheduler.num_waiting < NUM_WAITING:
            self._submit()
        before = list(self._running())
        scheduled = self.scheduler.schedule()
        assert self.scheduler.num_waiting, "the queue ran dry"
        self.tally.num_preemptions += sum(not sequence.block_table for sequence in before)
        self.tally.uses.append(self._use(scheduled))
        self._note_work(scheduled)
        sampled = [SampledToken(self._next_token(i.sequence)) for i in scheduled if i.is_sampled]
        self.scheduler.commit(scheduled, sampled, elapsed_ns=STEP_NS)
        self.scheduler.take_events()
        self._forget_ended(scheduled)

    def _submit(self) -> None:
        num_prompt_tokens, num_answer_tokens = self._lengths.draw(self._rng)
        number = next(self._ids)
        submit = Submit(
            sequence_id=number,
            prompt_token_ids=[OTHER] * num_prompt_tokens,
            sampling=SamplingParams(
                max_tokens=MAX_MODEL_LEN - num_prompt_tokens, stop_token_ids=(STOP,)
            ),
            cache_salt=number.to_bytes(8, "little"),
        )
        sequence = Sequence.from_submit(submit, worker_id="bench", worker_epoch=1)
        self._open.add(sequence)
        self._answer_lengths[sequence] = num_answer_tokens
        self._reached[sequence] = 0
        self.scheduler.add(sequence)

    def _running(self) -> Iterator[Sequence]:
        return (sequence for sequence in self._open if sequence.block_table)

    def _use(self, scheduled: list[ScheduledSequence]) -> Use:
        coming = {item.sequence: item.num_tokens for item in scheduled}
        allocated = held = promised = 0
        for sequence in self._running():
            num_slots = len(sequence.block_table) * self.blocks.block_size
            num_held = sequence.num_computed_tokens + coming.get(sequence, 0)
            allocated += num_slots
            held += num_held
            promised += min(sequence.num_tokens, num_slots) - num_held
        idle_blocks = self.blocks.num_free_blocks
        # No block is counted twice, and none is missed.
        assert allocated + idle_blocks * self.blocks.block_size == NUM_SLOTS
        return Use(
            running=self.scheduler.num_running,
            advancing=len(scheduled),
            idle_blocks=idle_blocks,
            allocated=allocated,
            held=held,
            promised=promised,
        )

    def _note_work(self, scheduled: list[ScheduledSequence]) -> None:
        for item in scheduled:
            first, reached = item.sequence.num_computed_tokens, self._reached[item.sequence]
            end = first + item.num_tokens
            self.tally.num_computed += item.num_tokens
            self.tally.num_recomputed += max(0, min(end, reached) - first)
            self._reached[item.sequence] = max(end, reached)

    def _next_token(self, sequence: Sequence) -> int:
        is_last = sequence.num_generated_tokens + 1 == self._answer_lengths[sequence]
        return STOP if is_last else OTHER

    def _forget_ended(self, scheduled: list[ScheduledSequence]) -> None:
        for item in scheduled:
            sequence = item.sequence
            if sequence.key not in self.scheduler:
                self._open.remove(sequence)
                del self._answer_lengths[sequence], self._reached[sequence]
                lengths = sequence.num_prompt_tokens, sequence.num_generated_tokens
                self.tally.finished.append(lengths)


@dataclass(frozen=True, slots=True)
class Row:
    """Means over the measured steps; shares are of 1."""

    block_size: int
    num_blocks: int
    running: float
    advancing: float
    contiguous: int
    ratio: float
    # Of all allocated slots of all steps.
    waste: float
    waste_with_promised: float
    # Of any one step.
    worst_waste: float
    worst_waste_with_promised: float
    # Of the memory.
    idle: float
    filled: float
    contiguous_filled: float
    num_finished: int
    mean_prompt_tokens: float
    mean_answer_tokens: float
    num_preemptions: int
    # Of all computed tokens.
    recomputed: float


def measure(lengths: Lengths, *, block_size: int, seed: int) -> Row:
    queue = Queue(lengths, block_size=block_size, seed=seed)
    for _ in range(NUM_WARM_UP_STEPS):
        queue.step()
    queue.tally = Tally()
    for _ in range(NUM_STEPS):
        queue.step()
    queue.scheduler.check_integrity()
    return summarize(queue.tally, block_size=block_size)


def summarize(tally: Tally, *, block_size: int) -> Row:
    uses = tally.uses
    running = statistics.fmean(use.running for use in uses)
    allocated = sum(use.allocated for use in uses)
    held = sum(use.held for use in uses)
    promised = sum(use.promised for use in uses)
    return Row(
        block_size=block_size,
        num_blocks=NUM_SLOTS // block_size,
        running=running,
        advancing=statistics.fmean(use.advancing for use in uses),
        contiguous=NUM_CONTIGUOUS,
        ratio=running / NUM_CONTIGUOUS,
        waste=1 - (held + promised) / allocated,
        waste_with_promised=1 - held / allocated,
        worst_waste=max(1 - (use.held + use.promised) / use.allocated for use in uses),
        worst_waste_with_promised=max(1 - use.held / use.allocated for use in uses),
        idle=statistics.fmean(use.idle_blocks for use in uses) * block_size / NUM_SLOTS,
        filled=held / (len(uses) * NUM_SLOTS),
        contiguous_filled=reserved_and_filled(tally.finished),
        num_finished=len(tally.finished),
        mean_prompt_tokens=statistics.fmean(prompt for prompt, _ in tally.finished),
        mean_answer_tokens=statistics.fmean(answer for _, answer in tally.finished),
        num_preemptions=tally.num_preemptions,
        recomputed=tally.num_recomputed / tally.num_computed,
    )


def reserved_and_filled(finished: list[tuple[int, int]]) -> float:
    """Which share of their reservations the same requests fill, a step for each answer's token."""
    # Steps hold prompt, prompt + 1, ... tokens: the answer's last token is never computed.
    held = sum(answer * prompt + answer * (answer - 1) // 2 for prompt, answer in finished)
    return held / (MAX_MODEL_LEN * sum(answer for _, answer in finished))


# The command


def main() -> None:
    arguments = parse()
    lengths = Lengths()
    print(
        f"KV memory for {NUM_SLOTS} tokens: {NUM_CONTIGUOUS} reservations of {MAX_MODEL_LEN}\n"
        "block  running  advancing  ratio   waste  with promised   idle  filled (reserved)  "
        "preempted  recomputed"
    )
    rows = []
    for block_size in BLOCK_SIZES:
        row = measure(lengths, block_size=block_size, seed=arguments.seed)
        rows.append(row)
        print(
            f"{row.block_size:5}  {row.running:7.1f}  {row.advancing:9.1f}  {row.ratio:5.2f}  "
            f"{row.waste:6.2%}  {row.waste_with_promised:13.2%}  {row.idle:5.1%}  "
            f"{row.filled:6.1%} {row.contiguous_filled:10.1%}  "
            f"{row.num_preemptions:9}  {row.recomputed:10.2%}",
            flush=True,
        )
    if arguments.output is not None:
        report = {
            "command": " ".join(["python -m benchmarks.kv_memory", *sys.argv[1:]]),
            "commit": commit(),
            "seed": arguments.seed,
            "lengths": asdict(lengths),
            "max_model_len": MAX_MODEL_LEN,
            "kv_slots": NUM_SLOTS,
            "max_num_tokens": MAX_NUM_TOKENS,
            "waiting": NUM_WAITING,
            "warm_up_steps": NUM_WARM_UP_STEPS,
            "steps": NUM_STEPS,
            "rows": [asdict(row) for row in rows],
        }
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Count what fits into KV memory.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
