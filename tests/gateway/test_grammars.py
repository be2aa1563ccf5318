"""What clients may ask answers to look like: read whole, tried within bounds, refused by name."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from gateway.errors import LimitReached
from gateway.grammars import AskedGrammar, Grammars, InvalidGrammar, InvalidSchema
from gateway.template_worker import GrammarForm
from tests.conftest import Home
from tests.gateway.whole_gateway import chat, whole_gateway
from tests.schemas import BOMBS, SCHEMAS, UNSUPPORTED


@pytest.fixture
async def grammars() -> AsyncIterator[Grammars]:
    grammars = Grammars()
    yield grammars
    await grammars.close()


def asked(text: str, form: GrammarForm = "json_schema") -> AskedGrammar:
    return AskedGrammar(form, text, "response_format")


def slow(number: int) -> AskedGrammar:
    """Each takes a minute and more to be read."""
    return asked(" \n" * (60_000 + number) + "x", "ebnf")


async def test_every_schema_of_the_hundred_is_taken(grammars):
    for schema in SCHEMAS.values():
        found = await grammars.examine(asked(json.dumps(schema)), caller="we")
        assert found.kind == "json_schema"


async def test_what_only_describes_is_left_out_and_names_and_values_stay(grammars):
    schema = {
        "title": "T",
        "properties": {"title": {"const": {"description": 1}}, "default": {"default": 7}},
        "uniqueItems": False,
    }
    found = await grammars.examine(asked(json.dumps(schema)), caller="we")
    assert json.loads(found.text) == {
        "properties": {"title": {"const": {"description": 1}}, "default": {}}
    }


async def test_a_keyword_that_is_not_enforced_is_refused_by_name_wherever_it_stands(grammars):
    for keyword, schema in UNSUPPORTED.items():
        within = {"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, schema]}}}
        for text, place in ((schema, "#"), (within, "#/properties/a/anyOf/1")):
            with pytest.raises(InvalidSchema) as caught:
                await grammars.examine(asked(json.dumps(text)), caller="we")
            assert caught.value.param == "response_format"
            assert f"at {place}: the keyword {keyword!r} is not supported" in caught.value.message


@pytest.mark.parametrize(
    ("form", "text", "word"),
    [
        ("json_schema", "{", "not JSON"),
        ("json_schema", "[]", "a schema is an object"),
        ("json_schema", '{"required": "a"}', "#/required"),
        ("json_schema", '{"items": {"minLength": -1}}', "#/items/minLength"),
        ("json_schema", '{"exclusiveMinimum": true}', "#/exclusiveMinimum"),
        ("json_schema", '{"$ref": "https://example.com/a.json"}', "leads out"),
        ("json_schema", '{"$ref": "#/$defs/a"}', "does not exist"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "greater"),
        ("json_schema", '{"format": "nonsense", "type": "string"}', "nonsense"),
        ("json_schema", '{"oneOf": [{"type": "integer"}, {"minimum": 2}]}', "may overlap"),
        ("json_schema", '{"pattern": "(?=a)", "type": "string"}', "look-around"),
        ("regex", "(a", "unclosed group"),
        ("ebnf", "root ::= missing", "missing"),
        ("ebnf", 'start: %json {"not": {}}', "%json"),
    ],
)
async def test_what_is_wrong_is_said(grammars, form: GrammarForm, text: str, word: str):
    with pytest.raises(InvalidGrammar) as caught:
        await grammars.examine(asked(text, form), caller="we")
    assert word in caught.value.message


async def test_both_notations_of_a_grammar_are_taken(grammars):
    lark = await grammars.examine(asked('start: "a" | "b"', "ebnf"), caller="we")
    llama = await grammars.examine(asked('root ::= "a" | "b"', "ebnf"), caller="we")
    assert (lark.kind, llama.kind) == ("lark", "lark")
    assert 'start: "a"' in llama.text


@pytest.mark.parametrize("name", BOMBS)
async def test_a_bomb_is_refused_before_long(grammars, name: str):
    with pytest.raises(InvalidSchema):
        await grammars.examine(asked(json.dumps(BOMBS[name])), caller="they")


async def test_a_text_that_takes_minutes_to_read_is_stopped(grammars):
    with pytest.raises(InvalidGrammar, match="took too long"):
        await grammars.examine(slow(0), caller="they")


async def test_whoever_had_three_stopped_waits_and_others_do_not(grammars):
    for number in range(3):
        with pytest.raises(InvalidGrammar, match="took too long"):
            await grammars.examine(slow(number), caller="they")
    with pytest.raises(LimitReached) as caught:
        await grammars.examine(asked('{"type": "null"}'), caller="they")
    assert int(caught.value.headers["retry-after"]) > 0
    assert await grammars.examine(asked('{"type": "null"}'), caller="we")
    # What somebody else has tried needs no trial.
    assert await grammars.examine(asked('{"type": "null"}'), caller="they")


async def test_a_bomb_keeps_nobody_else_waiting(grammars):
    await grammars.examine(asked('{"const": 0}'), caller="we")
    bombs = [
        asyncio.create_task(grammars.examine(slow(number), caller="they")) for number in range(3)
    ]
    await asyncio.sleep(0)
    ended = []
    for number in range(20):
        await grammars.examine(asked(json.dumps({"const": number})), caller="we")
        ended.append(sum(bomb.done() for bomb in bombs))
    await asyncio.gather(*bombs, return_exceptions=True)
    assert ended[-1] < len(bombs), "twenty schemas waited until all three bombs had ended"


async def test_what_is_known_is_not_tried_again(grammars):
    await grammars.examine(asked('{"type": "integer", "multipleOf": 1000}'), caller="we")
    await grammars.close()
    again = asked('{"type": "integer", "multipleOf": 1000}')
    assert (await grammars.examine(again, caller="others")).fault is None
    assert all(worker._process is None for worker in grammars._workers)


# On the whole gateway


async def test_a_form_that_cannot_be_followed_costs_and_holds_nothing(
    home: Home, database, tmp_path
):
    async with whole_gateway(home, database, tmp_path) as gateway:
        await gateway.limit(concurrent_requests=1)
        body = chat(ignore_eos=False, response_format={"type": "json_schema"})
        body["response_format"]["json_schema"] = {"name": "a", "schema": UNSUPPORTED["not"]}
        for _ in range(3):
            answer = await gateway.client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert (error["code"], error["param"]) == ("invalid_json_schema", "response_format")
        fine = await gateway.client.post("/v1/chat/completions", json=chat())
        assert fine.status_code == 200
        assert len(await gateway.events(1)) == 1
        assert await gateway.differences() == []
