"""Read `examples.jsonl`: what an adapter's owner wants it to answer, and how an answer is judged.

A line is a conversation and what should come of it, the shape in which trainers keep their data:

    {"messages": [{"role": "user", "content": "2 + 2?"}], "expected": "4"}
    {"prompt": "The capital of France is", "expected": "Paris", "check": "contains"}

Runs no model, and knows nothing of versions.
"""

import json
from typing import Any, Literal

import msgspec
import re2

from adapters.errors import Finding

FILE_NAME = "examples.jsonl"
MAX_SIZE_BYTES = 1 << 20
MAX_EXAMPLES = 200
MAX_ANSWER_TOKENS = 1024
# Of one regular expression, compiled.
MAX_PATTERN_BYTES = 256 << 10

Check = Literal["exact", "contains", "regex", "json"]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str


class Example(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing to ask, and what would be right."""

    # A conversation, or else a bare prompt to go on with. An assistant's turn at the end of the
    # conversation is what is expected.
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    expected: str | None = None
    # exact: the same but for white space around it. contains: somewhere in the answer. regex: RE2,
    # somewhere in the answer. json: the same value.
    check: Check = "exact"
    # Of the answer; None for as many as what is expected has, and some more.
    max_tokens: int | None = None

    @property
    def question(self) -> tuple[Message, ...] | str:
        return self.messages if self.prompt is None else self.prompt

    def is_met_by(self, answer: str) -> bool:
        expected = self.expected or ""
        match self.check:
            case "exact":
                return answer.strip() == expected.strip()
            case "contains":
                return expected in answer
            case "regex":
                return _compiled(expected).search(answer) is not None
            case "json":
                return _is_same_json(answer, expected)


_decoder = msgspec.json.Decoder(Example)


def parse(data: bytes) -> tuple[list[Example], list[Finding]]:
    """Return the examples of a file, and all that is wrong with it. Empty lines are left out."""
    if len(data) > MAX_SIZE_BYTES:
        return [], [_finding(FILE_NAME, f"is larger than {MAX_SIZE_BYTES} bytes")]
    examples: list[Example] = []
    findings: list[Finding] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            examples.append(_example(line))
        except (ValueError, RecursionError) as error:
            findings.append(_finding(f"{FILE_NAME}:{number}", str(error)))
    if len(examples) + len(findings) > MAX_EXAMPLES:
        return [], [_finding(FILE_NAME, f"has more than {MAX_EXAMPLES} examples")]
    return examples, findings


def _example(line: bytes) -> Example:
    """Raises ValueError with what is wrong."""
    example = _decoder.decode(line)
    if example.prompt is None:
        example = _with_last_turn_expected(example)
    if (example.prompt is None) == (not example.messages):
        raise ValueError("needs either `messages` or `prompt`")
    if not example.expected:
        raise ValueError("`expected` is missing: it says what the answer should be")
    if example.max_tokens is not None and not 1 <= example.max_tokens <= MAX_ANSWER_TOKENS:
        raise ValueError(f"`max_tokens` must be 1 to {MAX_ANSWER_TOKENS}")
    _check_expected(example.check, example.expected)
    return example


def _with_last_turn_expected(example: Example) -> Example:
    """A line of training data: what the assistant says last is what should come."""
    if example.expected is not None or not example.messages:
        return example
    *before, last = example.messages
    if last.role != "assistant":
        return example
    return msgspec.structs.replace(example, messages=tuple(before), expected=last.content)


def _check_expected(check: Check, expected: str) -> None:
    if check == "regex":
        try:
            _compiled(expected)
        except re2.error as error:
            why = error.args[0].decode()
            raise ValueError(f"`expected` is no regular expression of RE2: {why}") from error
    if check == "json":
        try:
            json.loads(expected)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`expected` is not JSON: {error}") from error


def _compiled(pattern: str) -> Any:
    options = re2.Options()
    options.max_mem = MAX_PATTERN_BYTES
    options.log_errors = False
    return re2.compile(pattern, options=options)


def _is_same_json(answer: str, expected: str) -> bool:
    try:
        return bool(json.loads(answer) == json.loads(expected))
    except (ValueError, RecursionError):
        return False


def _finding(where: str, problem: str) -> Finding:
    return Finding(
        code="example_invalid",
        where=where,
        message=problem,
        fix='write one {"messages": […], "expected": "…"} a line, or leave the file out',
    )
