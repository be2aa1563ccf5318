"""Answers have the form that clients ask for, from every adapter, through the whole server."""

import asyncio
import itertools
import json
import re
import time
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

from adapters.demo.tasks import TASKS
from tests.schemas import SCHEMAS, Schema

CONCURRENCY = 32
QUESTION = [{"role": "user", "content": "Make something up."}]
PERSON = SCHEMAS["person"]


def models(server: Any) -> list[tuple[str, str]]:
    """Tenant and model: every adapter, and the base model."""
    adapters = [(task.tenant, task.public_name) for task in TASKS.values()]
    return [*adapters, ("acme", server.facts["base_model"])]


def assert_valid(text: str, schema: Schema) -> None:
    kind = validator_for(schema, default=Draft202012Validator)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))


def json_schema(schema: Schema) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
async def test_a_hundred_schemas_are_followed_at_temperature_one(server, every):
    gate, started_s = asyncio.Semaphore(CONCURRENCY), time.monotonic()
    # A busy machine may take minutes for the longest.
    clients = {
        tenant: server.client(tenant).with_options(timeout=1800) for tenant, _ in models(server)
    }

    async def ask(schema: Schema, tenant: str, model: str) -> int:
        async with gate:
            answer = await clients[tenant].chat.completions.create(
                model=model,
                messages=QUESTION,
                temperature=1,
                max_tokens=400,
                response_format=json_schema(schema),
            )
        assert answer.choices[0].finish_reason == "stop", schema
        assert_valid(answer.choices[0].message.content, schema)
        return answer.usage.completion_tokens

    schemas = list(SCHEMAS.values())[::every]
    pairs = zip(schemas, itertools.cycle(models(server)), strict=False)
    counts = await asyncio.gather(*(ask(schema, *where) for schema, where in pairs))
    for client in clients.values():
        await client.close()
    print(
        f"{len(counts)} valid answers, {sum(counts)} tokens, {time.monotonic() - started_s:.1f} s"
    )
    assert len(counts) * every >= 100


async def test_a_stream_of_json_comes_piece_by_piece_and_ends_with_stop(server):
    async with server.client("acme") as client:
        stream = await client.chat.completions.create(
            model="acme-sql",
            messages=QUESTION,
            max_tokens=100,
            stream=True,
            response_format=json_schema(PERSON),
        )
        choices = [chunk.choices[0] async for chunk in stream]
    pieces = [choice.delta.content or "" for choice in choices]
    assert len([piece for piece in pieces if piece]) > 5
    assert_valid("".join(pieces), PERSON)
    assert choices[-1].finish_reason == "stop"


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_object"}}, r"\{[\s\S]*"),
    ({"response_format": {"type": "text"}, "guided_regex": "[a-f]{4}"}, "[a-f]{4}"),
    ({"guided_choice": ["left", "right", "a|b", "größer"]}, r"left|right|a\|b|größer"),
    ({"guided_json": {"type": "integer", "minimum": 3, "maximum": 5}}, "[345]"),
    ({"guided_json": '{"const": null}'}, "null"),
    ({"guided_grammar": 'root ::= ("ab" | "cd") end\nend ::= "!"'}, "(ab|cd)!"),
    ({"guided_grammar": 'start: "x" NUMBER\nNUMBER: /[0-9]{2}/'}, "x[0-9]{2}"),
    ({"structured_outputs": {"regex": "[0-9]+th"}, "max_tokens": 9, "stop": ["th"]}, "[0-9]+"),
    ({"structured_outputs": {"choice": ["one"]}}, "one"),
    ({"structured_outputs": {"json": {"enum": ["e"]}}}, '"e"'),
    ({"structured_outputs": {"grammar": 'start: "g"'}}, "g"),
    ({"structured_outputs": {"json_object": True}}, r"\{[\s\S]*"),
    ({"guided_regex": "a{1,9}", "min_tokens": 40}, "a{1,9}"),
]


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
async def test_every_field_that_asks_for_a_form_gives_it(server, endpoint):
    async def ask(client: Any, fields: dict[str, Any]) -> str:
        body = {"max_tokens": 60, "temperature": 1, **fields}
        if endpoint == "completions":
            made = await client.completions.create(model="acme-sql", prompt="Hi", extra_body=body)
            return made.choices[0].text
        made = await client.chat.completions.create(
            model="acme-sql", messages=QUESTION, extra_body=body
        )
        return made.choices[0].message.content

    async with server.client("acme") as client:
        answers = await asyncio.gather(*(ask(client, fields) for fields, _ in FORMS))
    for answer, (fields, pattern) in zip(answers, FORMS, strict=True):
        assert re.fullmatch(pattern, answer), (fields, answer)


async def test_an_answer_that_is_cut_says_so(server):
    async with server.client("acme") as client:
        answer = await client.chat.completions.create(
            model="acme-sql",
            messages=QUESTION,
            max_tokens=3,
            response_format=json_schema(PERSON),
        )
    assert answer.choices[0].finish_reason == "length"


REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type", ""),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
    ({"response_format": json_schema({"not": {}})}, "response_format", "'not'"),
    ({"guided_json": {"type": "object", "uniqueItems": True}}, "guided_json", "uniqueItems"),
    ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "guided_regex"),
    (
        {"structured_outputs": {"regex": "a", "json": {}}},
        "structured_outputs.regex",
        "structured_outputs.json",
    ),
    (
        {"response_format": {"type": "json_object"}, "guided_json": {}},
        "guided_json",
        "response_format",
    ),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", ""),
    ({"guided_choice": []}, "guided_choice", ""),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "guided_regex"),
    ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend", ""),
]


async def test_forms_that_cannot_be_followed_are_refused_by_name(server):
    async with server.client("acme") as client:
        for fields, param, word in REFUSALS:
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(
                    model="acme-sql", messages=QUESTION, extra_body=fields
                )
            assert caught.value.param == param, fields
            assert word in caught.value.message, fields
