"""What the scheduler does, in steps; the tokens are made up."""

import gc
import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from engine.errors import OutOfMemory
from engine.protocol import SequenceState
from engine.scheduler import NUM_PREFETCHES, NUM_RECOVERY_STEPS
from engine.sequence import Sequence
from tests.engine.steps_lab import STEP_NS, StepsLab

ANY_PROMPT = list(range(40))


def num_calls(act: Callable[[], object]) -> int:
    """How many Python and C functions `act` calls."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    # A collection that happens to come now would call whoever asked to be told.
    gc.disable()
    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


# One budget


def test_a_long_prompt_takes_no_token_from_those_who_decode() -> None:
    lab = StepsLab(max_num_seqs=8, max_num_tokens=16)
    streams = [lab.submit(3, max_tokens=60, key=f"{i}") for i in range(6)]
    lab.run(4)
    lab.submit(400, key="long")
    lab.run(40)
    assert all(lab.story(stream).num_stalls == 0 for stream in streams)
    assert lab.num_computed["long"] == 40 * (16 - 6)


def test_a_prompt_gets_the_whole_budget_alone_and_a_part_beside_those_who_decode() -> None:
    lab = StepsLab(max_num_tokens=32, max_tokens_beside_decodes=8)
    lab.submit(64, max_tokens=2)
    sizes = [[item.num_tokens for item in lab.step()] for _ in range(2)]
    lab.submit(20)
    sizes += [[item.num_tokens for item in lab.step()] for _ in range(2)]
    assert sizes == [[32], [32], [1, 8], [12]]


def test_many_prompts_at_once_get_the_whole_budget_beside_those_who_decode() -> None:
    lab = StepsLab(max_num_tokens=32, max_tokens_beside_decodes=8)
    lab.submit(8, max_tokens=9)
    lab.run(2)
    for _ in range(3):
        lab.submit(14)
    sizes = [sum(item.num_tokens for item in lab.step()) for _ in range(3)]
    # The last one is alone with those who decode.
    assert sizes == [1 + 31, 3 + 8, 3 + 3]


@pytest.mark.parametrize("key", ["another", "same"])
def test_a_short_prompt_behind_long_ones_starts_within_two_steps(key: str) -> None:
    lab = StepsLab()
    for _ in range(5):
        lab.submit(2000, key="same")
    lab.run(7)
    short = lab.submit(20, key=key)
    lab.run(4)
    assert lab.story(short).num_steps_to_start <= 2
    assert lab.story(short).num_steps_to_first_token <= 3


def test_a_long_prompt_gets_half_however_many_short_ones_come() -> None:
    lab = StepsLab(max_num_tokens=32)
    long = lab.submit(3000, max_tokens=1)
    for _ in range(60):
        lab.submit(40, max_tokens=1)
        lab.step()
    assert lab.story(long).num_computed >= 60 * 32 / 2


def test_prompts_of_equal_length_are_computed_one_after_the_other() -> None:
    lab = StepsLab(max_num_tokens=32)
    first, second = lab.submit(320), lab.submit(320)
    lab.run(30)
    assert lab.story(first).num_steps_to_first_token == 10
    assert lab.story(second).num_steps_to_first_token <= 21


def test_the_long_prompts_of_two_tenants_advance_side_by_side() -> None:
    lab = StepsLab(max_num_tokens=32)
    early, late = lab.submit(2000, key="early"), lab.submit(2000, key="late")
    lab.run(40)
    assert abs(lab.story(early).num_computed - lab.story(late).num_computed) <= 32


def test_the_rows_of_a_batch_lie_by_slot_with_single_tokens_first() -> None:
    lab = StepsLab(max_num_seqs=8, max_num_tokens=64)
    for adapter in ("a", "b", None, "a", "b"):
        lab.submit(9, max_tokens=20, adapter_digest=adapter)
    lab.run(6)
    for adapter in ("b", "a"):
        lab.submit(12, adapter_digest=adapter)
    scheduled = lab.step()
    is_chunk = [item.num_tokens > 1 for item in scheduled]
    assert is_chunk == [False] * 5 + [True] * 2
    for rows in (scheduled[:5], scheduled[5:]):
        slots = [item.sequence.slot for item in rows]
        assert slots == sorted(slots)


def test_a_thousand_that_wait_do_not_slow_a_step() -> None:
    def calls_beside(num_waiting: int, **fields: Any) -> int:
        lab = StepsLab(max_num_seqs=4)
        for _ in range(4):
            lab.submit(8, max_tokens=200)
        lab.run(10)
        for _ in range(num_waiting):
            lab.submit(8, **fields)
        lab.step()
        return num_calls(lab.scheduler.schedule)

    assert calls_beside(1000) <= calls_beside(20)
    assert calls_beside(1000, adapter_digest="a") <= calls_beside(20, adapter_digest="a")


# Seats and blocks


def test_a_newcomer_gets_a_seat_at_once_from_the_one_who_has_most() -> None:
    lab = StepsLab(max_num_seqs=4)
    flood = [lab.submit(5, max_tokens=500, key="flood") for _ in range(20)]
    lab.run(10)
    quiet = lab.submit(5, key="quiet")
    lab.step()
    assert lab.story(quiet).num_steps_to_first_token == 1
    assert lab.num_preemptions == 1
    assert all(sequence.block_table for sequence in flood[:3]), "the latest admitted goes"


def test_each_newcomer_sends_at_most_one_away() -> None:
    lab = StepsLab(max_num_seqs=8)
    for _ in range(50):
        lab.submit(5, max_tokens=2000, key="flood")
    lab.run(10)
    for number in range(30):
        lab.submit(5, max_tokens=10, key=f"quiet {number}")
        lab.run(3)
    assert lab.num_seats_of("flood") >= 1
    assert 5 <= lab.num_preemptions <= 30


def test_a_weight_buys_the_right_to_seats() -> None:
    def seats_of_heavy(weight: float) -> int:
        lab = StepsLab(max_num_seqs=8)
        for _ in range(20):
            lab.submit(5, max_tokens=2000, key="flood")
        lab.run(10)
        for _ in range(20):
            lab.submit(5, max_tokens=2000, key="heavy", weight=weight)
        lab.run(10)
        return lab.num_seats_of("heavy")

    assert (seats_of_heavy(1.0), seats_of_heavy(3.0)) == (4, 6)


@pytest.mark.parametrize("lengths", [(30,), (1, 10, 60)], ids=["equal answers", "mixed answers"])
@pytest.mark.parametrize("num_keys", [2, 3, 8, 12])
def test_a_steady_backlog_of_equals_sends_nobody_away(
    num_keys: int, lengths: tuple[int, ...]
) -> None:
    lab = StepsLab(max_num_seqs=8)
    dice = random.Random(num_keys)
    for _ in range(150):
        for number in range(num_keys):
            lab.submit(dice.randint(3, 12), max_tokens=dice.choice(lengths), key=f"{number}")
    lab.run(100)
    level = lab.num_preemptions
    lab.run(600)
    assert all(lab.scheduler._turns.account_of(s).waiting for s in lab.scheduler._running)
    assert lab.num_preemptions == level
    # All come at once and are served alike before their counters say so.
    assert level <= 16


def test_a_small_newcomer_gets_blocks_from_the_one_who_has_most() -> None:
    lab = StepsLab(num_blocks=64, max_num_seqs=16, max_num_tokens=64)
    for _ in range(20):
        lab.submit(16, max_tokens=40, key="flood")
    lab.run(12)
    assert lab.blocks.num_free_blocks < 20
    before = lab.num_preemptions
    quiet = lab.submit(12, key="quiet", max_tokens=8)
    lab.step()
    assert lab.story(quiet).num_steps_to_first_token == 1
    assert lab.num_preemptions - before <= 8
    lab.run_dry()


def test_who_grows_without_measure_makes_room_itself() -> None:
    lab = StepsLab(num_blocks=40, max_num_seqs=8)
    for _ in range(6):
        lab.submit(6, max_tokens=80, key="flood")
    lab.run(3)
    quiet = lab.submit(6, max_tokens=12, key="quiet")
    for _ in range(12):
        lab.step()
        assert quiet.block_table or lab.story(quiet).has_ended
    assert lab.story(quiet).has_ended
    lab.run_dry()
    assert lab.num_preemptions


def test_a_long_prompt_finds_its_blocks_however_many_short_ones_come() -> None:
    lab = StepsLab(num_blocks=40, max_num_seqs=8)
    for _ in range(8):
        lab.submit(8, max_tokens=20)
    lab.run(3)
    long = lab.submit(120, max_tokens=1)
    for _ in range(80):
        lab.submit(8, max_tokens=20)
        lab.step()
    assert lab.story(long).has_ended


# Classes


def test_what_is_more_urgent_goes_first_whoever_was_served_more() -> None:
    lab = StepsLab(max_num_seqs=2)
    lab.submit(100, key="a", priority=-1)
    lab.run(3)
    later = lab.submit(200, key="b", priority=5)
    urgent = lab.submit(60, key="a", priority=-1)
    lab.run(1)
    assert lab.story(later).num_computed == 0
    lab.run(10)
    assert lab.story(urgent).num_steps_to_first_token < lab.story(later).num_steps_to_first_token


def test_the_least_urgent_makes_room_for_the_most_urgent() -> None:
    lab = StepsLab(max_num_seqs=3)
    batch = lab.submit(5, max_tokens=50, priority=2)
    plain = lab.submit(5, max_tokens=50)
    lab.submit(5, max_tokens=50, priority=1)
    lab.run(3)
    urgent = lab.submit(5, priority=-1, max_tokens=50)
    lab.step()
    assert urgent.block_table
    assert plain.block_table
    assert not batch.block_table
    assert lab.num_preemptions == 1


def test_the_least_urgent_is_first_to_lose_its_blocks() -> None:
    lab = StepsLab(num_blocks=16, max_num_seqs=2)
    batch = lab.submit(8, max_tokens=30, priority=1)
    lab.run(3)
    urgent = lab.submit(8, max_tokens=40)
    while not lab.story(urgent).has_ended:
        lab.step()
        assert urgent.block_table or lab.story(urgent).has_ended
    assert not lab.story(batch).has_ended
    lab.run_dry()


def test_what_was_served_as_urgent_is_no_debt_in_another_class() -> None:
    lab = StepsLab(max_num_seqs=4)
    lab.submit(600, max_tokens=1, key="a", priority=-1)
    lab.run(30)
    first, second = (lab.submit(300, key=key) for key in "ab")
    lab.run(8)
    assert lab.story(first).num_computed == lab.story(second).num_computed


# Beginnings that another computes


def test_samples_of_one_prompt_compute_it_once() -> None:
    lab = StepsLab(max_num_tokens=16)
    samples = [lab.submit(ANY_PROMPT, max_tokens=1) for _ in range(4)]
    lab.run_dry()
    # The last block is not shared: its last token's logits are wanted.
    assert lab.num_computed[""] == len(ANY_PROMPT) + 3 * lab.blocks.block_size
    assert [s.num_cached_tokens for s in samples] == [0, 36, 36, 36]


def test_a_burst_with_one_beginning_computes_it_once() -> None:
    lab = StepsLab(max_num_tokens=16)
    for number in range(6):
        lab.submit([*ANY_PROMPT, *range(100 * number, 100 * number + 10)], max_tokens=1)
    lab.run_dry()
    assert lab.num_computed[""] == len(ANY_PROMPT) + 6 * 10


@pytest.mark.parametrize(
    "others", [{"cache_salt": b"another"}, {"adapter_digest": "a"}], ids=["salt", "adapter"]
)
def test_nobody_waits_for_what_it_could_not_use(others: dict[str, Any]) -> None:
    lab = StepsLab(max_num_tokens=16)
    lab.submit(ANY_PROMPT, max_tokens=1)
    other = lab.submit(ANY_PROMPT, max_tokens=1, **others)
    lab.run_dry()
    assert other.num_cached_tokens == 0
    assert lab.num_computed[""] == 2 * len(ANY_PROMPT)


def test_others_overtake_one_that_waits_for_its_beginning() -> None:
    lab = StepsLab(max_num_tokens=64)
    lab.submit(list(range(500)))
    follower, other = lab.submit(list(range(500))), lab.submit(5)
    lab.run(2)
    assert lab.story(follower).num_computed == 0
    assert lab.story(other).first_token_in is not None


def leave(lab: StepsLab, sequence: Sequence, how: str) -> None:
    if how == "abort":
        lab.scheduler.abort(sequence.key)
    elif how == "hold":
        lab.scheduler.hold_back("first", held=True)
    else:
        lab.scheduler.fail(sequence.key, OutOfMemory())


@pytest.mark.parametrize("how", ["abort", "hold", "fail"])
def test_nobody_waits_for_one_that_does_not_go_on(how: str) -> None:
    lab = StepsLab(max_num_tokens=8)
    first = lab.submit(ANY_PROMPT, owner="first")
    second = lab.submit(ANY_PROMPT)
    lab.run(2)
    assert not second.block_table
    leave(lab, first, how)
    lab.run(2)
    assert second.num_computed_tokens > 16
    lab.scheduler.hold_back("first", held=False)
    lab.run_dry()


def test_the_urgent_does_not_wait_for_the_beginning_of_what_is_not() -> None:
    lab = StepsLab(max_num_tokens=8)
    lab.submit(ANY_PROMPT, priority=1)
    lab.step()
    urgent = lab.submit(ANY_PROMPT)
    lab.step()
    assert urgent.block_table


@pytest.mark.parametrize("num_steps_before", [0, 1, 2, 3, 30])
@pytest.mark.parametrize("has_other_work", [False, True])
def test_nobody_learns_from_the_clock_what_another_tenant_asked(
    num_steps_before: int, has_other_work: bool
) -> None:
    """What one tenant sees of its prompt, where another asked the same, and where something else.

    It sees in which steps its tokens come, how many were found, and its share of the steps' time.
    """

    def observed(asked_by_the_other: list[int]) -> list[object]:
        lab = StepsLab(max_num_tokens=16, max_num_seqs=4)
        if has_other_work:
            lab.submit(200, key="third", max_tokens=20)
        lab.submit(asked_by_the_other, key="a", cache_salt=b"a", max_tokens=3)
        lab.run(num_steps_before)
        seen: list[object] = []
        for _ in range(2):
            sequence = lab.submit(ANY_PROMPT, key="b", cache_salt=b"b", max_tokens=5)
            while not lab.story(sequence).has_ended:
                lab.step()
            story = lab.story(sequence)
            seen.append([(e.cached_tokens, e.engine_ns, e.generated_tokens) for e in story.events])
            seen.append([(story.num_steps_to_start, story.num_steps_to_first_token)])
        return [*seen, lab.num_steps]

    assert observed(ANY_PROMPT) == observed([token + 50 for token in ANY_PROMPT])


# Adapters


def test_who_waits_for_an_adapter_blocks_nobody_and_is_not_forgotten() -> None:
    lab = StepsLab(num_slots=1, max_num_seqs=4)
    lab.submit(5, max_tokens=12, adapter_digest="hot")
    lab.run(3)
    cold = lab.submit(5, adapter_digest="cold", key="patient")
    base = lab.submit(5)
    for _ in range(30):
        lab.submit(5, max_tokens=12, adapter_digest="hot")
        lab.step()
    assert lab.story(base).num_steps_to_first_token == 1
    # The one that ran ends, its slot is drained, and the adapter comes.
    assert lab.story(cold).num_steps_to_first_token <= 16


def test_the_next_ones_adapters_are_brought_near_while_no_seat_is_free() -> None:
    lab = StepsLab(num_slots=40, max_num_seqs=1)
    lab.submit(5, max_tokens=40)
    lab.run(2)
    for number in range(30):
        lab.submit(5, adapter_digest=f"{number}")
    lab.run(20)
    assert lab.scheduler.num_running == 1
    assert set(lab.slots.resident) == {f"{number}" for number in range(NUM_PREFETCHES)}


# Out of memory


def test_a_step_that_ran_out_of_memory_counts_for_nothing_and_the_next_is_half() -> None:
    lab = StepsLab(max_num_seqs=8, max_num_tokens=64)
    streams = [lab.submit(4, max_tokens=40) for _ in range(8)]
    lab.run(3)
    scheduled = lab.schedule()
    before = [list(s.token_ids) for s in streams]
    assert lab.scheduler.retreat(scheduled)
    assert [s.token_ids for s in streams] == before
    assert [bool(s.block_table) for s in streams] == [True] * 4 + [False] * 4
    assert sum(item.num_tokens for item in lab.step()) <= 4
    lab.run(NUM_RECOVERY_STEPS)
    assert len(lab.step()) == 8
    lab.run_dry()
    assert [len(lab.story(s).events) for s in streams] == [40] * 8


def test_one_sequence_goes_on_in_smaller_chunks_until_there_is_nothing_smaller() -> None:
    lab = StepsLab(max_num_tokens=64)
    lab.submit(200)
    sizes = []
    while True:
        scheduled = lab.schedule()
        sizes.append(scheduled[0].num_tokens)
        if not lab.scheduler.retreat(scheduled):
            break
    assert sizes == [64, 32, 16, 8, 4, 2, 1]
    lab.scheduler.fail(scheduled[0].sequence.key, OutOfMemory())
    (event,) = lab.collect()
    assert event.state is SequenceState.FAILED
    assert event.fault is not None
    assert (event.fault.code, event.fault.is_retryable) == ("engine_out_of_memory", True)
    lab.assert_nothing_is_left()


def test_the_shares_of_a_step_add_up_to_its_time() -> None:
    lab = StepsLab(max_num_tokens=7)
    sequences = [lab.submit(length, max_tokens=3) for length in (3, 17, 8)]
    lab.run_dry()
    total = sum(lab.story(s).events[-1].engine_ns for s in sequences)
    assert total == STEP_NS * lab.num_steps
