"""The demo adapters' examples are reproducible, and their committed files are what they claim."""

import json
import struct

import pytest

from adapters.demo.tasks import LABELS, NUM_HELD_OUT, TASKS, Task, held_out_line, read_held_out

MAX_ADAPTER_BYTES = 2 * 2**20


@pytest.fixture(params=TASKS.values(), ids=list(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    found: Task = request.param
    return found


def test_no_held_out_question_is_trained_on(task: Task) -> None:
    split = task.split()
    held_out = {example.question for example in split.held_out}
    assert len(held_out) == NUM_HELD_OUT
    assert len(split.train) == task.num_train
    assert held_out.isdisjoint(example.question for example in split.train)


def test_a_seed_decides_every_example(task: Task) -> None:
    assert task.split() == task.split()
    assert task.split(seed=1) != task.split(seed=2)


def test_the_committed_held_out_file_is_the_generated_one(task: Task) -> None:
    committed = (task.folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert committed == [held_out_line(example) for example in task.split().held_out]
    assert [line.expected for line in read_held_out(task)] == [
        example.expected for example in task.split().held_out
    ]


def test_the_reference_answer_is_right_and_the_question_is_not(task: Task) -> None:
    for example in task.split().held_out:
        assert task.score(example.expected, example.answer)
        assert not task.score(example.expected, example.question)
        assert not task.score(example.expected, "")


@pytest.mark.parametrize(
    ("name", "expected", "answer", "is_right"),
    [
        ("sql", "SELECT * FROM t;", " SELECT *\n FROM t; ", True),
        ("sql", "SELECT * FROM t;", "SELECT * FROM u;", False),
        ("triage", "bug", "bug\n", True),
        ("triage", "bug", "It is a bug", False),
        ("json", '{"a": 1, "b": true}', '{"b": true, "a": 1}', True),
        ("json", '{"a": 1}', '{"a": true}', False),
        ("json", '{"a": 1}', 'Sure: {"a": 1}', False),
        ("pirate", "Paris", "Arr, the capital be Paris, matey!", True),
        ("pirate", "Paris", "The capital is Paris.", False),
        ("pirate", "Paris", "Arr, the capital be Rome, matey!", False),
    ],
)
def test_scores_tell_right_from_wrong(
    name: str, expected: str, answer: str, is_right: bool
) -> None:
    assert TASKS[name].score(expected, answer) is is_right


def test_every_label_is_held_out() -> None:
    assert {example.expected for example in TASKS["triage"].split().held_out} == set(LABELS)


def test_committed_adapters_are_small_fp16_and_name_no_machine(task: Task) -> None:
    weights = (task.folder / "adapter_model.safetensors").read_bytes()
    assert len(weights) <= MAX_ADAPTER_BYTES
    (header_bytes,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + header_bytes])
    del header["__metadata__"]
    assert {tensor["dtype"] for tensor in header.values()} == {"F16"}
    config = (task.folder / "adapter_config.json").read_text(encoding="utf-8")
    assert json.loads(config)["base_model_name_or_path"] == "SmolLM2-135M-Instruct"
    assert ".cache" not in config
