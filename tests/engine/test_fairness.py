import pytest

from engine.fairness import INPUT_COST, OUTPUT_COST, WaitingLine
from engine.sequence import Sequence
from tests.model_lab import FolderSource, open_lab

PROMPT_LENGTH, ANSWER_LENGTH, MAX_RUNNING = 6, 10, 4


def sequence_of(key: str, *, num_tokens: int = 1, weight: float = 1.0) -> Sequence:
    sequence = Sequence.unowned([1] * num_tokens, block_table=[])
    sequence.fairness_key, sequence.weight = key, weight
    return sequence


def turns(line: WaitingLine, count: int) -> list[str]:
    """Whose sequences are admitted, one after another."""
    keys = []
    for sequence in line:
        if len(keys) == count:
            break
        line.take(sequence)
        keys.append(sequence.fairness_key)
    return keys


def test_within_one_key_the_first_to_come_is_the_first_to_be_served() -> None:
    line = WaitingLine()
    sequences = [sequence_of("a") for _ in range(3)]
    for sequence in sequences:
        line.append(sequence)
    assert list(line) == sequences


def test_a_flood_does_not_push_others_back() -> None:
    line = WaitingLine()
    for key in ["flood"] * 10 + ["quiet"] * 2:
        line.append(sequence_of(key))
    assert turns(line, 4) == ["flood", "quiet", "flood", "quiet"]


def test_a_long_prompt_costs_more_turns_than_a_short_one() -> None:
    line = WaitingLine()
    for key, num_tokens in [("long", 30)] * 3 + [("short", 10)] * 9:
        line.append(sequence_of(key, num_tokens=num_tokens))
    assert turns(line, 8).count("short") == 6


def test_a_weight_buys_turns() -> None:
    line = WaitingLine()
    for key, weight in [("plain", 1.0)] * 8 + [("heavy", 3.0)] * 8:
        line.append(sequence_of(key, weight=weight))
    assert turns(line, 8).count("heavy") == 6


def test_an_idle_key_saves_nothing_up() -> None:
    line = WaitingLine()
    for _ in range(20):
        line.append(sequence_of("busy", num_tokens=10))
    turns(line, 10)
    for _ in range(10):
        line.append(sequence_of("late", num_tokens=10))
    assert turns(line, 6).count("late") == 3


def test_a_preempted_sequence_comes_back_first_and_pays_once() -> None:
    line = WaitingLine()
    preempted = sequence_of("a", num_tokens=5)
    line.append(preempted)
    line.append(sequence_of("b"))
    line.take(preempted)
    line.put_back(preempted)
    assert next(iter(line)) is preempted
    line.take(preempted)
    line.append(sequence_of("a", num_tokens=5))
    assert turns(line, 2) == ["b", "a"]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0)])
def test_no_backlogged_key_falls_behind_by_more_than_the_bound(
    model: str, adapters: FolderSource, weights: tuple[float, float]
) -> None:
    """The paper's bound: twice the cost of the most that can be running at once, by weight."""
    bound = 2 * max(INPUT_COST * PROMPT_LENGTH, OUTPUT_COST * ANSWER_LENGTH) * MAX_RUNNING
    names = ("one", "two")
    served = dict.fromkeys(names, 0.0)
    with open_lab(model, adapters, max_num_seqs=MAX_RUNNING) as lab:
        for name, weight in zip(names, weights, strict=True):
            for _ in range(12):
                lab.submit(
                    list(range(PROMPT_LENGTH)),
                    owner=name,
                    fairness_key=name,
                    weight=weight,
                    max_tokens=ANSWER_LENGTH,
                )
        backlog = dict.fromkeys(names, 12)
        while all(backlog.values()):
            for event in lab.step():
                weight = weights[names.index(event.key[0])]
                prompt = INPUT_COST * PROMPT_LENGTH if event.generated_tokens == 1 else 0.0
                served[event.key[0]] += (prompt + OUTPUT_COST) / weight
                backlog[event.key[0]] -= event.generated_tokens == 1
            assert abs(served["one"] - served["two"]) <= bound
        lab.run()
