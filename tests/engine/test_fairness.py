"""Turns, charges and shares; and what they promise over thousands of steps."""

import random
from collections import defaultdict

import pytest

from engine.fairness import INPUT_COST, MAX_REMEMBERED, OUTPUT_COST, Turns
from engine.sequence import Sequence
from tests.engine.steps_lab import StepsLab, Story

BURST = 30 * INPUT_COST


def sequence_of(
    key: str, *, num_tokens: int = 1, weight: float = 1.0, priority: int = 0
) -> Sequence:
    sequence = Sequence.unowned([1] * num_tokens, block_table=[])
    sequence.fairness_key, sequence.weight, sequence.priority = key, weight, priority
    return sequence


def line_up(turns: Turns, *sequences: Sequence) -> None:
    for sequence in sequences:
        turns.add(sequence)


def compute(turns: Turns, sequence: Sequence) -> None:
    """As steps do that compute all its tokens."""
    turns.admit(sequence)
    turns.charge_input(sequence, sequence.num_uncomputed_tokens)
    sequence.num_computed_tokens = sequence.num_tokens
    turns.catch_up(sequence)


def order(turns: Turns, count: int, *, shortest_first: bool = False) -> list[str]:
    """Whose prompts are computed, one after another."""
    keys: list[str] = []
    for sequence in turns.in_turn(admits=lambda account: True, shortest_first=shortest_first):
        if len(keys) == count:
            break
        compute(turns, sequence)
        keys.append(sequence.fairness_key)
    return keys


def lengths_in_turn(turns: Turns, *, shortest_first: bool) -> list[int]:
    members = turns.in_turn(admits=lambda account: True, shortest_first=shortest_first)
    return [sequence.num_tokens for sequence in members]


# Turns


def test_within_one_key_the_first_to_come_or_the_shortest_goes_first() -> None:
    turns = Turns(burst=BURST)
    line_up(turns, *(sequence_of("a", num_tokens=n) for n in (5, 9, 2)))
    assert lengths_in_turn(turns, shortest_first=False) == [5, 9, 2]
    assert lengths_in_turn(turns, shortest_first=True) == [2, 5, 9]


def test_a_flood_does_not_push_others_back() -> None:
    turns = Turns(burst=BURST)
    line_up(turns, *(sequence_of(key) for key in ["flood"] * 10 + ["quiet"] * 2))
    assert order(turns, 4) == ["flood", "quiet", "flood", "quiet"]


def test_a_long_prompt_costs_more_turns_than_a_short_one() -> None:
    turns = Turns(burst=BURST)
    for key, num_tokens in [("long", 30)] * 3 + [("short", 10)] * 9:
        turns.add(sequence_of(key, num_tokens=num_tokens))
    assert order(turns, 8).count("short") == 6


def test_a_weight_buys_turns() -> None:
    turns = Turns(burst=BURST)
    for key, weight in [("plain", 1.0)] * 8 + [("heavy", 3.0)] * 8:
        turns.add(sequence_of(key, weight=weight))
    assert order(turns, 8).count("heavy") == 6


def test_a_key_that_is_new_starts_level_with_the_least_served() -> None:
    turns = Turns(burst=BURST)
    line_up(turns, *(sequence_of("busy", num_tokens=10) for _ in range(20)))
    order(turns, 10)
    line_up(turns, *(sequence_of("late", num_tokens=10) for _ in range(10)))
    assert order(turns, 6).count("late") == 3


def test_a_key_that_comes_back_has_saved_up_a_burst_and_no_more() -> None:
    turns = Turns(burst=BURST)
    line_up(turns, *(sequence_of("busy", num_tokens=10) for _ in range(40)))
    come_and_go(turns, "quiet", 1)
    order(turns, 20)
    line_up(turns, *(sequence_of("quiet", num_tokens=10) for _ in range(10)))
    assert order(turns, 3) == ["quiet"] * 3
    assert order(turns, 6).count("quiet") == 3


def test_those_who_keep_coming_back_do_not_push_the_floor_down() -> None:
    turns = Turns(burst=BURST)
    line_up(turns, *(sequence_of("busy", num_tokens=100) for _ in range(5)))
    order(turns, 2)
    floor = turns.account_of(next(turns.waiting())).served
    for number in range(50):
        come_and_go(turns, f"quiet {number % 2}", 1)
    latest = sequence_of("new")
    turns.add(latest)
    assert turns.account_of(latest).served == floor


def test_a_preempted_sequence_comes_back_before_its_own_kind_and_pays_once() -> None:
    turns = Turns(burst=BURST)
    preempted, next_one = sequence_of("a", num_tokens=5), sequence_of("a", num_tokens=4)
    line_up(turns, preempted, next_one, sequence_of("b", num_tokens=5))
    compute(turns, preempted)
    preempted.num_computed_tokens = 0
    turns.put_back(preempted)
    paid = turns.account_of(preempted).served
    assert order(turns, 3) == ["b", "a", "a"]
    assert turns.account_of(preempted).served == paid + 4 * INPUT_COST
    assert list(turns.waiting()) == []


def test_what_the_prefix_cache_gives_costs_nothing() -> None:
    turns = Turns(burst=BURST)
    sequence = sequence_of("a", num_tokens=10)
    turns.add(sequence)
    sequence.num_computed_tokens = 8
    turns.admit(sequence)
    turns.charge_input(sequence, 2)
    assert turns.account_of(sequence).served == 2 * INPUT_COST


def test_more_urgent_classes_come_first_and_keep_their_own_count() -> None:
    turns = Turns(burst=BURST)
    line_up(turns, *(sequence_of("a", num_tokens=50, priority=-1) for _ in range(2)))
    line_up(turns, *(sequence_of(key) for key in "ab" * 2))
    assert order(turns, 6) == ["a", "a", "a", "b", "a", "b"]


def come_and_go(turns: Turns, key: str, num_tokens: int) -> None:
    sequence = sequence_of(key, num_tokens=num_tokens)
    turns.add(sequence)
    compute(turns, sequence)
    turns.remove(sequence)


def test_keys_that_come_and_go_are_not_remembered_for_ever() -> None:
    turns = Turns(burst=BURST)
    waiting = sequence_of("waits")
    turns.add(waiting)
    for number in range(3 * MAX_REMEMBERED):
        come_and_go(turns, f"{number}", 1 + number % 7)
    turns.check_integrity([waiting])
    assert turns.num_remembered <= MAX_REMEMBERED


def test_who_was_served_most_is_remembered_longest() -> None:
    turns = Turns(burst=BURST)
    turns.add(sequence_of("waits"))
    come_and_go(turns, "greedy", 1000)
    for number in range(2 * MAX_REMEMBERED):
        come_and_go(turns, f"{number}", 1)
    again = sequence_of("greedy")
    turns.add(again)
    assert turns.account_of(again).served == 1000 * INPUT_COST


def test_coming_under_one_class_after_another_lifts_to_that_class_alone() -> None:
    turns = Turns(burst=BURST)
    line_up(turns, sequence_of("a", num_tokens=500), sequence_of("a"))
    order(turns, 1)
    urgent, plain = sequence_of("b", priority=-1), sequence_of("b")
    line_up(turns, urgent, plain)
    assert turns.account_of(urgent).served == 0
    assert turns.account_of(plain).served == 500 * INPUT_COST


# The bound


@pytest.mark.parametrize("seed", range(12))
def test_no_backlogged_key_falls_behind_by_more_than_the_bound(seed: int) -> None:
    """The paper's bound for clients f, g that are backlogged all the time from t1 to t2:

        |W_f(t1, t2) / w_f - W_g(t1, t2) / w_g| <= 2 U

    where W counts w_p = INPUT_COST for each input and w_q = OUTPUT_COST for each output token, and
    w are the weights. In the paper U = max(w_p L, w_q M), M the most tokens in a batch. Here a
    batch has at most S sequences, of at most L input and A output tokens; inputs are charged by
    the chunk, thus after admission. When f is admitted while g waits, f's counter is not above
    g's, and what f is served after that with g waiting is at most what its seats still hold:
    U = S (w_p L + w_q A) / min(w). None of these keys comes back, so none has a burst to add.
    """
    dice = random.Random(seed)
    num_seats, longest_prompt, longest_answer = 4, dice.choice((6, 60)), dice.choice((1, 25))
    lab = StepsLab(max_num_seqs=num_seats, max_num_tokens=dice.choice((8, 40)), num_blocks=150)
    weights = {f"{i}": dice.choice((0.5, 1.0, 1.0, 3.0)) for i in range(dice.choice((2, 3, 9)))}
    most_of_a_seat = INPUT_COST * longest_prompt + OUTPUT_COST * longest_answer
    bound = 2 * num_seats * most_of_a_seat / min(weights.values())
    sequences: dict[str, list[Sequence]] = {key: [] for key in weights}
    lowest: dict[tuple[str, str], float] = defaultdict(lambda: float("inf"))
    for _ in range(600):
        for key, weight in weights.items():
            while num_waiting_of(lab, key) < 6:
                prompt, answer = dice.randint(1, longest_prompt), dice.randint(1, longest_answer)
                sequences[key].append(lab.submit(prompt, max_tokens=answer, key=key, weight=weight))
        lab.step()
        served = {key: served_by(lab, mine) / weights[key] for key, mine in sequences.items()}
        for f in weights:
            for g in weights:
                lowest[f, g] = min(lowest[f, g], served[f] - served[g])
                assert served[f] - served[g] - lowest[f, g] <= bound


def num_waiting_of(lab: StepsLab, key: str) -> int:
    return sum(s.fairness_key == key for s in lab.scheduler._turns.waiting())


def served_by(lab: StepsLab, sequences: list[Sequence]) -> float:
    """Cost of all that these were served, what was computed twice counted once."""
    outputs = sum(s.num_generated_tokens for s in sequences)
    return OUTPUT_COST * outputs + INPUT_COST * sum(
        min(s.num_prompt_tokens, lab.story(s).num_computed) for s in sequences
    )


# Noisy neighbours


def p99(numbers: list[int]) -> int:
    return sorted(numbers)[len(numbers) * 99 // 100]


def submit_any(lab: StepsLab, key: str, dice: random.Random) -> Sequence:
    return lab.submit(dice.randint(20, 400), max_tokens=dice.randint(5, 50), key=key)


def quiet_waits(*, num_steps: int, num_blocks: int, has_noise: bool, seed: int) -> list[int]:
    """Steps to first tokens of one tenant, beside one at ten times its load or alone.

    Arrivals are an open loop: they don't wait for answers, so the noisy tenant's backlog grows.
    """
    quiet_dice, noise_dice = random.Random(seed), random.Random(-seed)
    lab = StepsLab(num_blocks=num_blocks, block_size=16, max_num_seqs=16, max_num_tokens=128)
    stories: list[Story] = []
    for _ in range(num_steps):
        if quiet_dice.random() < 0.08:
            stories.append(lab.story(submit_any(lab, "quiet", quiet_dice)))
        if has_noise and noise_dice.random() < 0.8:
            submit_any(lab, "noisy", noise_dice)
        lab.step()
    return [s.num_steps_to_first_token for s in stories if s.came_in_step < num_steps - 200]


@pytest.mark.parametrize("num_blocks", [250, 1000], ids=["short of blocks", "short of seats"])
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_noisy_neighbour_does_not_double_a_quiet_tenants_wait(num_blocks: int, seed: int) -> None:
    alone, beside = (
        quiet_waits(num_steps=3000, num_blocks=num_blocks, has_noise=has_noise, seed=seed)
        for has_noise in (False, True)
    )
    assert len(alone) == len(beside) > 150
    assert p99(beside) <= 2 * p99(alone)
