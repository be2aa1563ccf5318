"""Facts about items: what those of a conversation become, and which an answer is made of.

The engine echoes, and most templates here are the last message alone, so that is the answer.
"""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from gateway.api.responses.conversation import Items, conversation
from gateway.database import Database
from tests.conftest import Home
from tests.gateway.test_responses import body, events_in
from tests.gateway.whole_gateway import MODEL, Gateway, whole_gateway
from tests.tool_lab import HERMES, bundle, echo

PARIS = '{"place": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    "strict": None,
}
OTHER = {**TOOL, "name": "get_time"}
THOUGHT = "<think>\nHm.\n</think>"


def turns(*items: dict[str, Any], instructions: str | None = None) -> list[dict[str, Any]]:
    return conversation(msgspec.convert(list(items), Items), instructions=instructions)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    fields = {"id": "msg_1", "status": "completed", "type": "message"}
    return {**fields, "role": "assistant", "content": [part]}


def thought(text: str) -> dict[str, Any]:
    part = {"type": "reasoning_text", "text": text}
    return {"type": "reasoning", "summary": [], "content": [part]}


def called(call_id: str, arguments: str = "{}") -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": arguments}


def gave(call_id: str, output: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def call_of(call_id: str, **arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}


# Conversations


def test_a_text_is_what_the_user_says_and_instructions_come_before_it() -> None:
    asked = {"role": "user", "content": "Hi"}
    assert conversation("Hi", instructions=None) == [asked]
    assert conversation("Hi", instructions="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        asked,
    ]


def test_instructions_and_a_system_message_at_the_beginning_are_one() -> None:
    first = {"role": "developer", "content": [{"type": "input_text", "text": "In French."}]}
    assert turns(first, user("Hi"), instructions="Be brief.") == [
        {"role": "system", "content": "Be brief.\n\nIn French."},
        {"role": "user", "content": "Hi"},
    ]


def test_what_an_assistant_thought_said_and_called_is_one_turn() -> None:
    made = turns(
        user("Hi"),
        thought("Hm."),
        said("Let me see."),
        called("a", '{"x": 1}'),
        called("b"),
        gave("a", "1"),
        gave("b", [{"type": "input_text", "text": "2"}]),
        said("Both."),
    )
    assert made == [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Hm.",
            "tool_calls": [call_of("a", x=1), call_of("b")],
        },
        {"role": "tool", "content": "1", "tool_call_id": "a", "name": "f"},
        {"role": "tool", "content": "2", "tool_call_id": "b", "name": "f"},
        {"role": "assistant", "content": "Both."},
    ]


def test_two_messages_in_a_row_are_two_turns_and_words_behind_a_call_are_of_its_turn() -> None:
    assert [turn["content"] for turn in turns(said("One."), said("Two."))] == ["One.", "Two."]
    [turn] = turns(said("One."), called("a"), said("Two."))
    assert turn == {"role": "assistant", "content": "One.Two.", "tool_calls": [call_of("a")]}


def test_thoughts_begin_a_turn_and_their_summary_stands_in_for_them() -> None:
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Well."}]}
    made = turns(said("One."), thought("Hm."), summary, said("Two."))
    assert made == [
        {"role": "assistant", "content": "One."},
        {"role": "assistant", "content": "Two.", "reasoning_content": "Hm.\nWell."},
    ]


# Answers


@contextlib.asynccontextmanager
async def speaking(
    home: Home, database: Database, folder: Path, template: str
) -> AsyncIterator[tuple[Gateway, openai.AsyncOpenAI]]:
    """A gateway, and OpenAI's own client of it."""
    async with whole_gateway(home, database, folder, bundle=bundle(template)) as gateway:
        key = gateway.client.headers["authorization"].removeprefix("Bearer ")
        url = f"{gateway.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
            yield gateway, client


@pytest.fixture
async def clients(
    home: Home, database: Database, tmp_path: Path
) -> AsyncIterator[tuple[Gateway, openai.AsyncOpenAI]]:
    async with speaking(home, database, tmp_path, echo("<tool_call> </think>")) as clients:
        yield clients


async def ask(client: openai.AsyncOpenAI, text: Any, **fields: Any) -> Any:
    made = {"model": MODEL, "input": text, "tools": [TOOL], "max_output_tokens": 400, **fields}
    return await client.responses.create(**made)


async def stream(gateway: Gateway, text: str, **fields: Any) -> list[Any]:
    """The events, each read strictly."""
    fields = {"tools": [TOOL], "max_output_tokens": 400, "ignore_eos": None, **fields}
    answer = await gateway.client.post("/v1/responses", json=body(text, stream=True, **fields))
    return events_in(answer.text)


async def test_thoughts_words_and_calls_are_items_in_their_order(
    clients: tuple[Gateway, openai.AsyncOpenAI],
) -> None:
    gateway, client = clients
    text = f"{THOUGHT}Let me see.\n{CALL}\n{CALL}"
    answer = await ask(client, text)
    assert answer.status == "completed"
    thoughts, words, call, again = answer.output
    assert [item.status for item in answer.output] == ["completed"] * 4
    assert [item.id.split("_")[0] for item in answer.output] == ["rs", "msg", "fc", "fc"]
    assert (thoughts.type, thoughts.content[0].text, thoughts.summary) == ("reasoning", "Hm.", [])
    assert (words.type, answer.output_text) == ("message", "Let me see.")
    assert (call.type, call.name, call.arguments) == ("function_call", "get_weather", PARIS)
    assert call.call_id.startswith("call_")
    assert call.call_id != again.call_id
    assert answer.usage.output_tokens_details.reasoning_tokens == len(THOUGHT)
    assert [tool.name for tool in answer.tools] == ["get_weather"]

    *events, last = await stream(gateway, text)
    assert [item.type for item in last.response.output] == [item.type for item in answer.output]
    done = [each.item for each in events if each.type == "response.output_item.done"]
    assert done == last.response.output


async def test_a_stream_tells_thoughts_and_arguments_piece_by_piece(
    clients: tuple[Gateway, openai.AsyncOpenAI],
) -> None:
    gateway, _ = clients
    events = await stream(gateway, f"{THOUGHT}{CALL}")
    of_thoughts, of_call = (
        [each for each in events if getattr(each, "output_index", None) == index]
        for index in (0, 1)
    )
    kinds = [each.type.removeprefix("response.") for each in of_thoughts]
    assert kinds[:2] == ["output_item.added", "content_part.added"]
    assert set(kinds[2:-3]) == {"reasoning_text.delta"}
    assert kinds[-3:] == ["reasoning_text.done", "content_part.done", "output_item.done"]
    assert "".join(each.delta for each in of_thoughts[2:-3]) == of_thoughts[-3].text == "Hm."

    added, *deltas, arguments, done = of_call
    assert (added.type, added.item.name) == ("response.output_item.added", "get_weather")
    assert (added.item.arguments, added.item.status) == ("", "in_progress")
    assert {each.type for each in deltas} == {"response.function_call_arguments.delta"}
    assert len(deltas) > 5
    assert "".join(each.delta for each in deltas) == arguments.arguments == PARIS
    assert done.item.call_id == added.item.call_id
    assert {each.item_id for each in (*deltas, arguments)} == {done.item.id}


async def test_the_sdks_own_stream_adds_up_to_the_response(
    clients: tuple[Gateway, openai.AsyncOpenAI],
) -> None:
    _, client = clients
    fields = {"model": MODEL, "tools": [TOOL], "max_output_tokens": 400}
    async with client.responses.stream(input=f"{THOUGHT}Yes. {CALL}", **fields) as events:
        deltas = [event async for event in events if event.type == "response.output_text.delta"]
        final = await events.get_final_response()
    assert "".join(event.delta for event in deltas) == final.output_text == "Yes."
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]


async def test_a_conversation_goes_on_with_the_items_of_an_answer(
    home: Home, database: Database, tmp_path: Path
) -> None:
    async with speaking(home, database, tmp_path, echo("<tool_call> </think>")) as (_, client):
        first = await ask(client, f"{THOUGHT}Let me see.\n{CALL}")
        output = {"type": "function_call_output", "output": "sunny"}
        result = {**output, "call_id": first.output[-1].call_id}
        after = await ask(client, [user("Weather?"), *first.output, result])
        assert after.output_text == "sunny"


async def test_the_model_is_told_of_tools_and_calls_as_in_a_chat(
    home: Home, database: Database, tmp_path: Path
) -> None:
    async with speaking(home, database, tmp_path, HERMES) as (gateway, client):
        items = [user("Weather?"), said("Let me see."), called("a", PARIS), gave("a", "sunny")]
        answer = await ask(client, items, instructions="Be brief.", max_output_tokens=1)
        call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": PARIS}}
        messages = [
            {"role": "system", "content": "Be brief."},
            user("Weather?"),
            {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "sunny"},
        ]
        function = {name: TOOL[name] for name in ("name", "description", "parameters")}
        tools = [{"type": "function", "function": function}]
        asked = {"model": MODEL, "messages": messages, "tools": tools, "max_tokens": 1}
        chatted = (await gateway.client.post("/v1/chat/completions", json=asked)).json()
        assert answer.usage.input_tokens == chatted["usage"]["prompt_tokens"]
        assert answer.output_text == chatted["choices"][0]["message"]["content"]


async def test_without_tools_or_with_none_of_them_wanted_a_call_is_text(
    clients: tuple[Gateway, openai.AsyncOpenAI],
) -> None:
    _, client = clients
    other = {"type": "function", "name": "get_time"}
    one = {"type": "allowed_tools", "mode": "auto", "tools": [other]}
    for fields in ({"tools": []}, {"tool_choice": "none"}):
        answer = await ask(client, CALL, **fields)
        assert answer.output_text == CALL
    answer = await ask(client, CALL, tools=[TOOL, OTHER], tool_choice=one)
    assert answer.output_text == CALL
    assert answer.tool_choice.tools == [other]


async def test_a_call_that_is_none_after_all_ends_incomplete_and_is_no_item(
    clients: tuple[Gateway, openai.AsyncOpenAI],
) -> None:
    gateway, client = clients
    text = CALL.replace("}}", "}]")
    answer = await ask(client, text)
    assert [item.type for item in answer.output] == ["message"]
    assert answer.output_text == text
    *events, last = await stream(gateway, text)
    begun, _ = (each.item for each in events if each.type == "response.output_item.added")
    ended, _ = (each.item for each in events if each.type == "response.output_item.done")
    assert (begun.type, begun.id, ended.status) == ("function_call", ended.id, "incomplete")
    assert [item.type for item in last.response.output] == ["message"]
    assert last.response.output_text == text
    fields = {"model": MODEL, "tools": [TOOL], "max_output_tokens": 400}
    async with client.responses.stream(input=text, **fields) as told:
        final = await told.get_final_response()
    assert final.output_text == text


async def test_what_is_cut_in_a_call_is_incomplete(
    clients: tuple[Gateway, openai.AsyncOpenAI],
) -> None:
    _, client = clients
    answer = await ask(client, f"Yes. {CALL}", max_output_tokens=len(CALL) - 15)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    words, call = answer.output
    assert (words.status, call.status) == ("completed", "incomplete")
    assert PARIS.startswith(call.arguments)


async def test_only_words_are_told_with_log_probabilities(
    clients: tuple[Gateway, openai.AsyncOpenAI],
) -> None:
    _, client = clients
    include = ["message.output_text.logprobs"]
    answer = await ask(client, f"{THOUGHT}Yes. {CALL}", include=include)
    _, words, _ = answer.output
    told = "".join(each.token for each in words.content[0].logprobs)
    assert told.strip() == "Yes."
