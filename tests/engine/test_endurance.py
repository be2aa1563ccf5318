"""Whatever comes, in whatever order: nothing leaks, nothing waits for ever, no token differs."""

import random
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from engine.errors import AdapterQuarantined, OutOfMemory, TooManyPins
from engine.protocol import SequenceState
from engine.sequence import Sequence, SequenceKey
from engine.wishes import Wish
from tests.engine.conftest import ADAPTERS
from tests.engine.steps_lab import StepsLab
from tests.model_lab import FolderSource, Lab, open_lab

NUM_ACTIONS = 150
OWNERS = ("one", "two", "three")


def random_job(dice: random.Random) -> dict[str, Any]:
    return {
        "prompt": [dice.randrange(257) for _ in range(dice.choice((1, 4, 9, 30)))],
        "adapter": dice.choice((None, "broken", *ADAPTERS)),
        "max_tokens": dice.choice((1, 3, 15)),
        "temperature": dice.choice((0.0, 1.0)),
        "seed": dice.randrange(1000),
        "top_k": dice.choice((0, 5)),
    }


def act(lab: Lab, dice: random.Random, jobs: dict[SequenceKey, dict[str, Any]]) -> None:
    """One thing that workers do, then a step."""
    action = dice.choice(("submit", "submit", "abort", "hold", "release", "operate", "step"))
    if action == "submit":
        job = random_job(dice)
        try:
            jobs[lab.submit(owner=dice.choice(OWNERS), **job)] = job
        except AdapterQuarantined:
            assert job["adapter"] == "broken"
    elif action == "abort" and jobs:
        lab.core.abort(dice.choice(list(jobs)))
    elif action in ("hold", "release"):
        lab.core.hold_back(dice.choice(OWNERS), held=action == "hold")
    elif action == "operate":
        operate(lab, dice)
    lab.step()


def operate(lab: Lab, dice: random.Random) -> None:
    """One thing that operators do."""
    name, action = (
        dice.choice(("broken", *ADAPTERS)),
        dice.choice(("warm", "pin", "unpin", "forget")),
    )
    if action == "warm":
        wish = Wish(name, dice.choice(("host", "device")), on_end=lambda fault: None)
        with suppress(AdapterQuarantined):
            lab.core.warm(wish, fingerprint=None)
    elif action == "pin":
        with suppress(TooManyPins):
            lab.core.pin(name)
    elif action == "unpin":
        lab.core.unpin(name)
    else:
        lab.core.forget(name)


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_events_ends_well(model: str, adapters: FolderSource, seed: int) -> None:
    source = FolderSource(adapters.root, failures={"broken": OSError("connection reset")})
    dice = random.Random(seed)
    jobs: dict[SequenceKey, dict[str, Any]] = {}
    with open_lab(
        model,
        source,
        num_blocks=37,
        max_model_len=48,
        max_num_seqs=4,
        max_num_batched_tokens=10,
        max_loras=4,
    ) as lab:
        for _ in range(NUM_ACTIONS):
            act(lab, dice, jobs)
        for owner in OWNERS:
            lab.core.hold_back(owner, held=False)
        lab.run()
        lab.assert_nothing_is_left()
    with open_lab(model, source) as alone:
        for key, job in jobs.items():
            answer = lab.answers[key]
            if answer.state is SequenceState.LENGTH:
                assert answer.token_ids == alone.generate(**job)
            elif answer.state is SequenceState.ABORTED:
                assert len(answer.token_ids) == answer.last.generated_tokens
            else:
                assert job["adapter"] == "broken"


# Without a model, thousands of steps

ADAPTER_BLOCKS = {"a": 1, "b": 3, "c": 5, "d": 8}
MAX_ADAPTER_BLOCKS = 9
DIGESTS = tuple(ADAPTER_BLOCKS)
# More steps than all that can wait at once would take one after another.
MANY_STEPS = 3000


class SchedulerMachine(RuleBasedStateMachine):
    """Few seats, few blocks, fewer slots than adapters; any order of all that can happen.

    The lab checks the integrity of scheduler, blocks, slots and turns after each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lab = StepsLab(
            # Beside all adapters that fit there is room for the longest sequence.
            num_blocks=13 + MAX_ADAPTER_BLOCKS,
            block_size=4,
            num_slots=3,
            max_num_seqs=4,
            max_num_tokens=10,
            adapter_blocks=ADAPTER_BLOCKS,
            max_adapter_blocks=MAX_ADAPTER_BLOCKS,
        )
        self.lab.slow = set(DIGESTS)
        self.sequences: list[Sequence] = []

    def living(self) -> list[Sequence]:
        return [s for s in self.sequences if not self.lab.story(s).has_ended]

    @rule(
        beginning=st.integers(0, 2),
        length=st.integers(1, 30),
        num_generated=st.sampled_from((0, 0, 0, 2)),
        max_tokens=st.integers(2, 20),
        key=st.sampled_from("xyz"),
        owner=st.sampled_from(OWNERS),
        digest=st.sampled_from((None, None, *DIGESTS)),
        salt=st.sampled_from((b"", b"salt")),
        weight=st.sampled_from((0.5, 1.0, 4.0)),
        priority=st.sampled_from((-1, 0, 0, 0, 1)),
    )
    def submit(
        self,
        beginning: int,
        length: int,
        num_generated: int,
        max_tokens: int,
        key: str,
        owner: str,
        digest: str | None,
        salt: bytes,
        weight: float,
        priority: int,
    ) -> None:
        sequence = self.lab.submit(
            [beginning + place // 8 for place in range(length)],
            max_tokens=max_tokens,
            key=key,
            owner=owner,
            adapter_digest=digest,
            cache_salt=salt,
            weight=weight,
            priority=priority,
            generated_token_ids=[7] * num_generated,
        )
        self.sequences.append(sequence)
        self.lab.scheduler.check_integrity()

    @rule(which=st.integers(0, 99))
    def abort(self, which: int) -> None:
        if living := self.living():
            self.lab.scheduler.abort(living[which % len(living)].key)
            self.lab.scheduler.check_integrity()

    @rule(num_steps=st.integers(1, 20))
    def step(self, num_steps: int) -> None:
        self.lab.run(num_steps)

    @rule(which=st.integers(0, 99))
    def step_with_invalid_logits(self, which: int) -> None:
        scheduled = self.lab.schedule()
        chosen = [item.sequence for item in scheduled][which % 4 :][:1]
        self.lab.commit(scheduled, invalid=frozenset(chosen))

    @rule(num_failures=st.integers(1, 6))
    def run_out_of_memory(self, num_failures: int) -> None:
        for _ in range(num_failures):
            scheduled = self.lab.schedule()
            if scheduled and not self.lab.scheduler.retreat(scheduled):
                self.lab.scheduler.fail(scheduled[0].sequence.key, OutOfMemory())
            self.lab.collect()

    @precondition(lambda self: self.lab.loading)
    @rule(which=st.integers(0, 99), succeeds=st.sampled_from((True, True, False)))
    def end_a_load(self, which: int, succeeds: bool) -> None:
        self.lab.finish_load(self.lab.loading[which % len(self.lab.loading)], succeeds=succeeds)
        self.lab.scheduler.check_integrity()

    @rule(
        digest=st.sampled_from(DIGESTS),
        action=st.sampled_from(("host", "device", "pin", "unpin", "forget")),
    )
    def operate(self, digest: str, action: str) -> None:
        if action == "pin":
            with suppress(TooManyPins):
                self.lab.slots.pin(digest)
        elif action == "unpin":
            self.lab.slots.unpin(digest)
        elif action == "forget":
            self.lab.slots.forget(digest)
        else:
            wish = Wish(digest, "host" if action == "host" else "device", on_end=lambda fault: None)
            self.lab.wishes.add(wish)
        self.lab.scheduler.check_integrity()

    @rule(owner=st.sampled_from(OWNERS), held=st.booleans())
    def hold_or_release(self, owner: str, held: bool) -> None:
        self.lab.scheduler.hold_back(owner, held=held)

    def teardown(self) -> None:
        for owner in OWNERS:
            self.lab.scheduler.hold_back(owner, held=False)
        self.lab.slow.clear()
        for _ in range(MANY_STEPS):
            if not self.living():
                break
            assert self.lab.step() or self.lab.loading or not self.living(), "nothing can run"
        assert self.living() == [], "a sequence is stuck"
        self.lab.assert_nothing_is_left()
        for sequence in self.sequences:
            ends = [event.state.is_final for event in self.lab.story(sequence).events]
            assert ends.index(True) == len(ends) - 1, "it was told of after its end"


class TestNoOrderOfEventsLeaksOrSticks(SchedulerMachine.TestCase):
    settings = settings(max_examples=150, stateful_step_count=80, deadline=None)


@pytest.mark.slow
class TestNoOrderOfEventsLeaksOrSticksForLong(SchedulerMachine.TestCase):
    settings = settings(max_examples=2000, stateful_step_count=80, deadline=None)
