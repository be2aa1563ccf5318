"""Responses through the whole server, on the real model, with OpenAI's own client."""

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

QUESTION = "How many open orders are there?"
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a place.",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string", "maxLength": 12}},
        "required": ["place"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Person(BaseModel):
    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=99)


async def test_a_response_is_what_a_chat_answers(server):
    async with server.client("acme") as client:
        response = await client.responses.create(
            model="acme-sql", input=QUESTION, temperature=0, max_output_tokens=40
        )
        chat = await client.chat.completions.create(
            model="acme-sql",
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=40,
        )
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens


async def test_a_stream_adds_up_to_its_response(server):
    async with (
        server.client("acme") as client,
        client.responses.stream(
            model="acme-sql",
            input=[{"role": "user", "content": QUESTION}],
            instructions="Answer in SQL.",
            temperature=0,
            max_output_tokens=40,
        ) as events,
    ):
        deltas = [event.delta async for event in events if event.type.endswith("text.delta")]
        final = await events.get_final_response()
    assert len(deltas) > 3
    assert "".join(deltas) == final.output_text
    assert final.usage.output_tokens > 3


async def test_a_call_is_made_and_its_answer_taken(server):
    question = {"role": "user", "content": "What is the weather in Paris?"}
    async with server.client("acme") as client:
        first = await client.responses.create(
            model="acme-sql",
            input=[question],
            tools=[WEATHER],
            tool_choice="required",
            parallel_tool_calls=False,
            max_output_tokens=200,
        )
        [call] = first.output
        assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
        assert list(json.loads(call.arguments)) == ["place"]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        after = await client.responses.create(
            model="acme-sql",
            input=[question, *first.output, result],
            tools=[WEATHER],
            tool_choice="none",
            max_output_tokens=10,
        )
    assert after.output_text
    assert [item.type for item in after.output] == ["message"]


async def test_a_form_is_followed_and_parsed(server):
    async with server.client("acme") as client:
        made = await client.responses.parse(
            model=server.facts["base_model"],
            input="Make somebody up.",
            text_format=Person,
            temperature=1,
            max_output_tokens=200,
        )
        assert isinstance(made.output_parsed, Person)
        with pytest.raises(openai.BadRequestError, match="store") as caught:
            await client.responses.create(model="acme-sql", input=QUESTION, store=True)
    assert caught.value.param == "store"
