"""Calls of functions through the whole server, on the real model, with OpenAI's own client."""

import asyncio
import json
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator
from openai.types.chat import ChatCompletion

QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "maxLength": 12},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["place", "unit", "days"],
    "additionalProperties": False,
}
PARAMETERS = {
    "get_weather": WEATHER,
    "say": {
        "type": "object",
        "properties": {"word": {"type": "string", "maxLength": 8}},
        "required": ["word"],
        "additionalProperties": False,
    },
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in PARAMETERS.items()
]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def assert_valid(name: str, arguments: str) -> None:
    Draft202012Validator(PARAMETERS[name]).validate(json.loads(arguments))


async def ask(client: openai.AsyncOpenAI, **fields: Any) -> ChatCompletion:
    # One call at a time: a small model would make a list of a hundred.
    settings = {"max_tokens": 200, "temperature": 1, "parallel_tool_calls": False, **fields}
    made: ChatCompletion = await client.chat.completions.create(
        messages=QUESTION, tools=TOOLS, **settings
    )
    return made


async def test_a_required_call_has_arguments_of_its_schema(server):
    async with server.client("acme") as client:
        answers = await asyncio.gather(
            *(
                ask(client, model=model, tool_choice="required", seed=seed)
                for seed, model in enumerate(("acme-sql", server.facts["base_model"]))
            )
        )
    for answer in answers:
        [choice] = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        [call] = choice.message.tool_calls
        assert call.id.startswith("call_")
        assert_valid(call.function.name, call.function.arguments)


async def test_a_named_function_is_the_one_that_is_called(server):
    async with server.client("acme") as client:
        answers = await asyncio.gather(
            *(ask(client, model="acme-sql", tool_choice=named(name)) for name in PARAMETERS)
        )
    for name, answer in zip(PARAMETERS, answers, strict=True):
        [choice] = answer.choices
        [call] = choice.message.tool_calls
        assert call.function.name == name
        assert_valid(name, call.function.arguments)


async def test_a_stream_of_a_required_call_comes_piece_by_piece(server):
    async with server.client("acme") as client:
        stream = await client.chat.completions.create(
            model="acme-sql",
            messages=QUESTION,
            tools=TOOLS,
            tool_choice=named("get_weather"),
            max_tokens=200,
            stream=True,
        )
        choices = [chunk.choices[0] async for chunk in stream]
    [first, *rest] = [call for choice in choices for call in choice.delta.tool_calls or ()]
    assert (first.index, first.type, first.function.name) == (0, "function", "get_weather")
    assert first.function.arguments == ""
    assert all(call.id is None and call.function.name is None for call in rest)
    assert len(rest) > 5
    assert_valid("get_weather", "".join(call.function.arguments for call in rest))
    assert choices[-1].finish_reason == "tool_calls"


async def test_a_conversation_with_a_call_goes_on(server):
    async with server.client("acme") as client:
        answer = await ask(client, model="acme-sql", tool_choice="required")
        message = answer.choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
        after = await client.chat.completions.create(
            model="acme-sql", messages=[*QUESTION, message, result], tools=TOOLS, max_tokens=20
        )
    assert after.usage.prompt_tokens > answer.usage.prompt_tokens


async def test_a_schema_that_cannot_be_followed_is_refused_by_its_function(server):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
    async with server.client("acme") as client:
        with pytest.raises(openai.BadRequestError, match="'f'") as caught:
            await client.chat.completions.create(
                model="acme-sql", messages=QUESTION, tools=[tool], tool_choice="required"
            )
    assert caught.value.param == "tools"
