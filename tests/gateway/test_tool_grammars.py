"""Facts about enforced calls: what a grammar lets an answer say, letter by letter."""

import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from llguidance import LLTokenizer

from engine import grammar
from gateway.grammars import AskedGrammar, Grammars, InvalidSchema
from gateway.tools import syntaxes
from gateway.tools.grammar import grammar_of
from gateway.tools.notation import CallableTool, CallForm
from gateway.tools.reader import Reader

PLACE = {
    "type": "object",
    "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["place"],
    "additionalProperties": False,
}
NAMES = frozenset({"get_weather", "add"})
BYTES = LLTokenizer("byte")
CALLS = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": ARGS}\n</tool_call>',
    "llama3_json": '{"name": "get_weather", "parameters": ARGS}',
    "mistral": '[TOOL_CALLS] [{"name": "get_weather", "arguments": ARGS}]',
    "json": '{"name": "get_weather", "arguments": ARGS}',
}
TWO = {
    "hermes": '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>\n' + CALLS["hermes"],
    "llama3_json": '{"name": "add", "parameters": {}}; ' + CALLS["llama3_json"],
    "mistral": '[TOOL_CALLS][{"name": "add", "arguments": {}}, '
    '{"name": "get_weather", "arguments": ARGS}]',
    "json": '[{"name": "add", "arguments": {}}, {"name": "get_weather", "arguments": ARGS}]',
}
GOOD, BAD = '{"place": "Paris", "days": 3}', '{"days": 3}'


def form(family: str, **fields: Any) -> CallForm:
    tools = [CallableTool("get_weather", PLACE), CallableTool("add", None)]
    values = {"must_call": True, "is_parallel": True, "thinking": "never", **fields}
    return CallForm(family, tools, **values)


def allows(asked: CallForm, text: str) -> bool:
    """Whether an answer may be this, and end there."""
    matcher = grammar.compiled("lark", grammar_of(asked, has_tokens=False), BYTES)
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


@pytest.mark.parametrize("family", syntaxes.NAMES)
def test_a_call_that_must_be_is_the_familys_own_with_arguments_of_the_schema(family):
    asked = form(family)
    assert allows(asked, CALLS[family].replace("ARGS", GOOD))
    assert allows(asked, TWO[family].replace("ARGS", GOOD))
    for text in (CALLS[family].replace("ARGS", BAD), "", "Hello", "{}"):
        assert not allows(asked, text), text


@pytest.mark.parametrize("family", syntaxes.NAMES)
def test_what_a_grammar_allows_is_read_as_calls(family):
    for text, number in ((CALLS[family], 1), (TWO[family], 2)):
        reader = Reader(syntaxes.named(family), NAMES)
        reader.feed(text.replace("ARGS", GOOD))
        reader.finish(is_cut=False)
        assert reader._source.num_calls == number


@pytest.mark.parametrize("family", syntaxes.NAMES)
def test_where_one_call_is_asked_for_there_are_not_two(family):
    asked = form(family, is_parallel=False)
    assert allows(asked, CALLS[family].replace("ARGS", GOOD))
    assert not allows(asked, TWO[family].replace("ARGS", GOOD))


@pytest.mark.parametrize("family", syntaxes.NAMES)
def test_an_answer_may_be_words_and_what_begins_as_a_call_goes_on_as_one(family):
    asked = form(family, must_call=False)
    assert allows(asked, "Hello, world < 3. ")
    assert allows(asked, "")
    assert allows(asked, CALLS[family].replace("ARGS", GOOD))
    assert not allows(asked, CALLS[family].replace("ARGS", BAD))


@pytest.mark.parametrize("family", ["hermes", "mistral"])
def test_a_mark_among_words_begins_a_call(family):
    asked = form(family, must_call=False)
    assert allows(asked, "Let me see. " + CALLS[family].replace("ARGS", GOOD) + " Well.")
    assert not allows(asked, "Let me see. " + CALLS[family].replace("ARGS", BAD))
    once = form(family, must_call=False, is_parallel=False)
    assert allows(once, "Let me see. " + CALLS[family].replace("ARGS", GOOD))
    assert not allows(once, (CALLS[family] + CALLS[family]).replace("ARGS", GOOD))


@pytest.mark.parametrize("family", syntaxes.NAMES)
def test_thoughts_before_calls_are_free(family):
    call = CALLS[family].replace("ARGS", GOOD)
    assert allows(form(family, thinking="begun"), f'So {{"a"}} it is.\n</think>\n\n{call}')
    assert not allows(form(family, thinking="begun"), call)
    for before in ("", "<think>Hm.</think>\n\n"):
        assert allows(form(family, thinking="may"), before + call)
    assert allows(form(family, thinking="begun", must_call=False), "Hm.</think>\nParis.")


@pytest.mark.parametrize("family", syntaxes.NAMES)
def test_an_answer_without_a_call_may_have_a_schema_of_its_own(family):
    asked = form(family, must_call=False, otherwise={"type": "integer"})
    assert allows(asked, "42")
    assert allows(asked, CALLS[family].replace("ARGS", GOOD))
    assert not allows(asked, "Hello")


def test_json_may_have_thoughts_before_it():
    asked = form("json", must_call=False, otherwise=PLACE, thinking="begun")
    asked = msgspec.structs.replace(asked, tools=[])
    assert allows(asked, f"Paris it is.</think>\n\n{GOOD}")
    assert not allows(asked, f"Paris it is.</think>{BAD}")
    assert not allows(asked, GOOD)


def test_marks_that_are_tokens_may_come_as_such():
    asked = form("mistral", token_ids={"[TOOL_CALLS]": 7})
    assert "<[7]>" in grammar_of(asked, has_tokens=True)
    assert "<[7]>" not in grammar_of(asked, has_tokens=False)


# On the way of every grammar of a client's


@pytest.fixture
async def grammars() -> AsyncIterator[Grammars]:
    grammars = Grammars()
    yield grammars
    await grammars.close()


def asked_of(asked: CallForm) -> AskedGrammar:
    return AskedGrammar("calls", msgspec.json.encode(asked).decode(), "tools")


async def test_calls_are_tried_before_they_are_taken(grammars):
    for family in syntaxes.NAMES:
        asked = form(family, thinking="may", token_ids={"<think>": 100_000})
        found = await grammars.examine(asked_of(asked), caller="we")
        assert found.kind == "lark"
        assert json.dumps(PLACE["required"]) in found.text


async def test_a_schema_that_cannot_be_followed_is_refused_with_its_function(grammars):
    tools = [CallableTool("add", {"type": "object", "not": {}})]
    asked = msgspec.structs.replace(form("hermes"), tools=tools)
    with pytest.raises(InvalidSchema, match="'add', at #: the keyword 'not'") as caught:
        await grammars.examine(asked_of(asked), caller="we")
    assert caught.value.param == "tools"
