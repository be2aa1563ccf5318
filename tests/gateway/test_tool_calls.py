"""Facts about how answers are read: words, thoughts and calls, in every family's manner."""

import itertools
import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.tools import syntaxes
from gateway.tools.pieces import Arguments, Call, CallBegins, Piece, Sum, Withdrawn, Words, add_up
from gateway.tools.reader import Reader
from gateway.tools.reasoning import Thinking, ThoughtCount, at_end_of

NAMES = frozenset({"get_weather", "add"})
PARIS = '{"place": "Paris"}'
HERMES_PARIS = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
HERMES_ADD = '<tool_call>{"arguments": {"a": 1, "b": [2.5e3, null]}, "name": "add"}</tool_call>'


def read(
    family: str,
    chunks: Sequence[str],
    *,
    thinking: Thinking = "never",
    is_cut: bool = False,
) -> list[Piece]:
    numbers = itertools.count()
    reader = Reader(
        syntaxes.named(family), NAMES, thinking=thinking, make_id=lambda: f"call_{next(numbers)}"
    )
    pieces = [piece for chunk in chunks for piece in reader.feed(chunk)]
    return pieces + reader.finish(is_cut=is_cut)


def whole(family: str, text: str, *, thinking: Thinking = "never", is_cut: bool = False) -> Sum:
    """What a text adds up to, which is the same letter by letter."""
    found = add_up(read(family, [text], thinking=thinking, is_cut=is_cut))
    assert add_up(read(family, list(text), thinking=thinking, is_cut=is_cut)) == found
    return found


def called(found: Sum) -> list[tuple[str, object]]:
    return [(call.name, json.loads(call.arguments)) for call in found.calls]


WEATHER = ("get_weather", {"place": "Paris"})

CALLS: list[tuple[str, str, list[tuple[str, object]]]] = [
    ("hermes", HERMES_PARIS, [WEATHER]),
    (
        "hermes",
        f"{HERMES_PARIS}\n{HERMES_ADD}",
        [WEATHER, ("add", {"a": 1, "b": [2500.0, None]})],
    ),
    # The mark at the end was cut off by the end of the turn.
    ("hermes", HERMES_PARIS.removesuffix("</tool_call>"), [WEATHER]),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', [("add", {})]),
    ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', [("add", {})]),
    # Some write arguments twice over.
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}', [("add", {"a": 1})]),
    ("llama3_json", f'{{"name": "get_weather", "parameters": {PARIS}}}', [WEATHER]),
    (
        "llama3_json",
        f'<|python_tag|>{{"name": "get_weather", "parameters": {PARIS}}}; '
        '{"type": "function", "name": "add", "parameters": {}}',
        [WEATHER, ("add", {})],
    ),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}, "id": "a1b2c3d4e"}}, '
        '{"name": "add", "arguments": {}}]',
        [WEATHER, ("add", {})],
    ),
    (
        "mistral",
        f"[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]add[CALL_ID]a1b2c3d4e[ARGS]{{}}",
        [WEATHER, ("add", {})],
    ),
    ("json", f'{{"name": "get_weather", "arguments": {PARIS}}}', [WEATHER]),
    ("json", f'[{{"name": "get_weather", "parameters": {PARIS}}}]', [WEATHER]),
    ("json", f'```json\n{{"name": "get_weather", "arguments": {PARIS}}}\n```\n', [WEATHER]),
]


@pytest.mark.parametrize(("family", "text", "expected"), CALLS)
def test_calls_are_read_in_the_manner_of_each_family(family, text, expected):
    found = whole(family, text)
    assert called(found) == expected
    assert found.words == ""


@pytest.mark.parametrize("family", syntaxes.NAMES)
def test_words_stay_as_they_are_to_the_last_blank(family):
    for text in ("Hello, world. ", "  a < b <tool\n\n", "[1] says {this}", "", " ", "é 日本\n"):
        assert whole(family, text) == Sum(text, "", [])


def test_words_around_calls_are_kept_without_the_blanks_between():
    found = whole("hermes", f"Let me see.\n\n{HERMES_PARIS}\n{HERMES_PARIS}\n")
    assert found.words == "Let me see."
    assert called(found) == [WEATHER, WEATHER]
    assert whole("mistral", f"Yes. [TOOL_CALLS]add[ARGS]{PARIS} Done.").words == "Yes.  Done."


MALFORMED: list[tuple[str, str]] = [
    ("hermes", "<tool_call>"),
    ("hermes", "<tool_call>hello</tool_call>"),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": }}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 01}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "\n"}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "\\x"}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": "[1]"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "name": "add"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1'),
    ("hermes", '<tool_call>{"name": "add", "arguments": ' + '{"a":' * 500),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": ' + "[" * 5000),
    ("llama3_json", '{"name": "Ada", "age": 36}'),
    ("llama3_json", '<|python_tag|>brave_search.call(query="x")'),
    ("mistral", "[TOOL_CALLS] []"),
    ("mistral", "[TOOL_CALLS]" + "a" * 70),
    ("json", '{"answer": 42}'),
    ("json", "[1, 2, 3]"),
    ("json", "```python\nprint(1)\n```"),
]


@pytest.mark.parametrize(("family", "text"), MALFORMED)
def test_what_is_no_call_is_words(family, text):
    found = whole(family, text)
    assert found.calls == []
    assert found.words == text


def test_a_call_behind_one_that_is_none_is_read():
    bad = '<tool_call>{"name": "add", "arguments": {"a": <'
    found = whole("hermes", f"{bad}{HERMES_PARIS}")
    assert called(found) == [WEATHER]
    assert found.words.startswith('<tool_call>{"name": "add"')


def test_a_call_that_began_and_broke_is_taken_back_and_its_number_is_not_used_again():
    pieces = read("hermes", ['<tool_call>{"name": "add", "arguments": {"a": ?}}', HERMES_PARIS])
    begun = [piece for piece in pieces if isinstance(piece, CallBegins | Withdrawn)]
    assert [(type(piece), piece.index) for piece in begun] == [
        (CallBegins, 0),
        (Withdrawn, 0),
        (CallBegins, 1),
    ]


def test_a_call_that_was_cut_keeps_what_there_was_of_it():
    text = '<tool_call>{"name": "add", "arguments": {"a": 12'
    assert whole("hermes", text, is_cut=True).calls == [Call("call_0", "add", '{"a": 12')]
    assert whole("hermes", text[:30], is_cut=True) == Sum(text[:30], "", [])


def test_arguments_come_as_they_are_written_after_the_name():
    text = f'Hi\n<tool_call>{{"name": "get_weather", "arguments": {PARIS}}}</tool_call>'
    pieces = read("hermes", list(text))
    assert [piece for piece in pieces if not isinstance(piece, Arguments)] == [
        *map(Words, "Hi"),
        CallBegins(0, "call_0", "get_weather"),
    ]
    arguments = [piece.text for piece in pieces if isinstance(piece, Arguments)]
    assert "".join(arguments) == PARIS
    assert len(arguments) > 10


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"),
        *("<think>", "</think>", "```json", "```", " ", "\n", "; ", ", ", "[", "]", "{", "}"),
        *('{"name": "add", "arguments": ', '{"name": "get_weather", "parameters": ', '"name"'),
        *(PARIS, "{}", ": ", '"', "\\", "\\u00e9", "1", "-0.5e3", "true", "nul", "add", "Hello"),
        *('{"name": "add", "arguments": {}}', HERMES_PARIS, HERMES_ADD, "日本", "é"),
    ]
)


@given(
    family=st.sampled_from(syntaxes.NAMES),
    fragments=st.lists(FRAGMENTS | st.text(max_size=3), max_size=12),
    thinking=st.sampled_from(["never", "may", "begun"]),
    is_cut=st.booleans(),
    data=st.data(),
)
def test_however_a_text_falls_into_steps_it_adds_up_to_the_same(
    family, fragments, thinking, is_cut, data
):
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    found = whole(family, text, thinking=thinking, is_cut=is_cut)
    assert add_up(read(family, chunks, thinking=thinking, is_cut=is_cut)) == found
    for call in found.calls:
        assert call.name in NAMES
        if not is_cut:
            assert isinstance(json.loads(call.arguments), dict)


# Thoughts


def test_thoughts_are_told_apart_from_the_answer():
    for thinking, text in (
        ("may", "<think>\nHm, so.\n\n</think>\n\nParis."),
        ("begun", "\nHm, so.\n</think>\n\nParis."),
    ):
        assert whole("hermes", text, thinking=thinking) == Sum("Paris.", "Hm, so.", [])


def test_a_call_after_thoughts_is_one_and_a_call_in_thoughts_is_none():
    text = f"<think>I could {HERMES_PARIS}</think>\n{HERMES_ADD}"
    found = whole("hermes", text, thinking="may")
    assert [call.name for call in found.calls] == ["add"]
    assert HERMES_PARIS in found.thoughts
    assert whole("json", f'</think>[{"{"}"name": "add"}}]', thinking="begun").calls


def test_an_answer_that_is_cut_in_its_thoughts_is_all_thoughts():
    found = whole("hermes", "<think>Let me", thinking="may", is_cut=True)
    assert found == Sum("", "Let me", [])


def test_a_model_that_may_think_need_not():
    assert whole("hermes", "<thin air>", thinking="may") == Sum("<thin air>", "", [])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|im_start|>assistant\n", "may"),
        ("<|im_start|>assistant\n<think>\n", "begun"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "never"),
        ("what does <think> mean?<|im_end|>\n<|im_start|>assistant\n", "may"),
    ],
)
def test_the_prompt_tells_whether_an_answer_begins_with_thoughts(prompt, expected):
    assert at_end_of(prompt) == expected


class Spelled:
    """A text whose tokens are its characters."""

    is_stopped = False

    def feed(self, token_id: int) -> str:
        return chr(token_id)

    def finish(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("thinking", "text", "expected"),
    [
        ("may", "<think>ab</think>cd", len("<think>ab</think>")),
        ("begun", "ab</think>cd", len("ab</think>")),
        ("begun", "ab", 2),
        ("may", "abcd", 0),
        ("may", "\n<thin air", 0),
    ],
)
def test_the_tokens_of_thoughts_are_counted_with_their_marks(thinking, text, expected):
    count = ThoughtCount(Spelled(), thinking)
    assert "".join(count.feed(ord(character)) for character in text) == text
    assert count.num_tokens == expected
