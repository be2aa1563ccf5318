"""What an owner expects is read from lines, and judged as it says."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapters import demo, examples
from adapters.examples import Example, Message

ASK = [{"role": "user", "content": "2 + 2?"}]


def lines(*values: dict[str, Any]) -> bytes:
    return "\n".join(json.dumps(value) for value in values).encode()


def test_a_line_is_a_conversation_and_what_should_come_of_it() -> None:
    found, findings = examples.parse(lines({"messages": ASK, "expected": "4"}))
    assert findings == []
    assert found == [Example(messages=(Message("user", "2 + 2?"),), expected="4")]


def test_training_data_expects_what_the_assistant_says_last() -> None:
    turns = [*ASK, {"role": "assistant", "content": "4"}]
    (example,), findings = examples.parse(lines({"messages": turns}))
    assert findings == []
    assert example.expected == "4"
    assert example.question == (Message("user", "2 + 2?"),)


def test_the_demos_own_questions_are_examples() -> None:
    for path in Path(demo.__file__).parent.glob("*/held_out.jsonl"):
        found, findings = examples.parse(path.read_bytes())
        assert len(found) == 100, path
        assert findings == [], path


@pytest.mark.parametrize(
    ("check", "expected", "right", "wrong"),
    [
        ("exact", "4", " 4\n", "4."),
        ("contains", "4", "It is 4.", "It is four."),
        ("regex", r"^(4|four)\b", "four, I think", "I think four"),
        ("json", '{"a": 1, "b": [2]}', '{"b": [2], "a": 1.0}', '{"a": 1}'),
        ("json", "1", "1", "one"),
    ],
)
def test_an_answer_is_judged_as_the_line_says(
    check: examples.Check, expected: str, right: str, wrong: str
) -> None:
    line = {"prompt": "?", "expected": expected, "check": check}
    (example,), _ = examples.parse(lines(line))
    assert example.is_met_by(right)
    assert not example.is_met_by(wrong)


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (b"{", "trunc"),
        (b'{"expected": "4"}', "messages"),
        (
            b'{"prompt": "?", "messages": [{"role": "user", "content": ""}], "expected": "4"}',
            "eith",
        ),
        (b'{"prompt": "?"}', "expected"),
        (b'{"prompt": "?", "expected": "4", "chekc": "exact"}', "chekc"),
        (b'{"prompt": "?", "expected": "4", "check": "vibes"}', "vibes"),
        (b'{"prompt": "?", "expected": "(", "check": "regex"}', "regular expression"),
        (b'{"prompt": "?", "expected": "{", "check": "json"}', "JSON"),
        (b'{"prompt": "?", "expected": "4", "max_tokens": 100000}', "max_tokens"),
        (b"[" * 100_000, ""),
    ],
)
def test_a_line_that_makes_no_sense_is_named(line: bytes, hint: str) -> None:
    found, (finding,) = examples.parse(b'{"prompt": "?", "expected": "4"}\n\n' + line)
    assert len(found) == 1
    assert (finding.code, finding.where) == ("example_invalid", "examples.jsonl:3")
    assert hint in finding.message.lower() or hint in finding.message


def test_there_is_an_end_to_examples() -> None:
    many = lines(*[{"prompt": "?", "expected": "4"}] * (examples.MAX_EXAMPLES + 1))
    for data in (many, b" " * (examples.MAX_SIZE_BYTES + 1)):
        found, (finding,) = examples.parse(data)
        assert found == []
        assert finding.where == examples.FILE_NAME
