"""Facts about tools as clients meet them, on a whole gateway whose model says what it is told to.

The engine echoes, the template is the last message alone: so the answer is that message.
"""

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.database import Database
from tests.conftest import Home
from tests.gateway.whole_gateway import MODEL, Gateway, whole_gateway
from tests.tool_lab import bundle, echo

CHAT = "/v1/chat/completions"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
PARIS = '{"place": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'


@contextlib.asynccontextmanager
async def speaking(
    home: Home, database: Database, folder: Path, template: str
) -> AsyncIterator[Gateway]:
    async with whole_gateway(home, database, folder, bundle=bundle(template)) as gateway:
        yield gateway


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with speaking(home, database, tmp_path, echo("<tool_call> </think>")) as gateway:
        yield gateway


def body(text: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "tools": [TOOL], "max_tokens": 400, **fields}


async def ask(gateway: Gateway, text: str, **fields: Any) -> dict[str, Any]:
    answer = await gateway.client.post(CHAT, json=body(text, **fields))
    assert answer.status_code == httpx.codes.OK, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def stream(gateway: Gateway, text: str, **fields: Any) -> list[dict[str, Any]]:
    fields = {"stream": True, "stream_options": {"include_usage": True}, **fields}
    answer = await gateway.client.post(CHAT, json=body(text, **fields))
    assert answer.status_code == httpx.codes.OK, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


async def refusal(gateway: Gateway, **fields: Any) -> tuple[int, str, str]:
    answer = await gateway.client.post(CHAT, json=body("Hello", **fields))
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["message"]


async def test_a_whole_answer_has_its_call_beside_its_words(gateway: Gateway) -> None:
    answer = await ask(gateway, f"Let me see.\n{CALL}")
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": "Let me see.", "refusal": None}
    assert call["id"].startswith("call_")
    assert call["type"] == "function"
    assert call["function"] == {"name": "get_weather", "arguments": PARIS}


async def test_a_stream_begins_a_call_with_its_name_and_goes_on_with_arguments(
    gateway: Gateway,
) -> None:
    *chunks, usage = await stream(gateway, f"{CALL}\n{CALL}")
    choices = [chunk["choices"][0] for chunk in chunks]
    deltas = [choice["delta"] for choice in choices]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [choice["finish_reason"] for choice in choices[-2:]] == [None, "tool_calls"]
    calls = [delta["tool_calls"][0] for delta in deltas[1:-1]]
    begun = [call for call in calls if "id" in call]
    assert [call["index"] for call in begun] == [0, 1]
    for call in begun:
        assert call["type"] == "function"
        assert call["function"] == {"name": "get_weather", "arguments": ""}
    for index in (0, 1):
        pieces = [call["function"] for call in calls if call["index"] == index][1:]
        assert all(set(piece) == {"arguments"} for piece in pieces)
        assert "".join(piece["arguments"] for piece in pieces) == PARIS
        assert len(pieces) > 5
    assert usage["usage"]["completion_tokens"] > 0


async def test_without_tools_or_with_none_of_them_wanted_a_call_is_text(gateway: Gateway) -> None:
    for fields in ({"tools": None}, {"tools": []}, {"tool_choice": "none"}):
        [choice] = (await ask(gateway, CALL, **fields))["choices"]
        assert choice["message"]["content"] == CALL
        assert choice["finish_reason"] == "stop"


async def test_what_is_no_call_is_plain_content_and_ends_with_stop(gateway: Gateway) -> None:
    for text in ("<tool_call>{]}</tool_call>", CALL.replace("get_weather", "get_wether")):
        [choice] = (await ask(gateway, text))["choices"]
        assert choice["message"]["content"] == text
        assert "tool_calls" not in choice["message"]
        assert choice["finish_reason"] == "stop"
        chunks = await stream(gateway, text)
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        assert "".join(delta.get("content") or "" for delta in deltas) == text


async def test_an_answer_that_is_cut_in_a_call_says_length(gateway: Gateway) -> None:
    [choice] = (await ask(gateway, CALL, max_tokens=len(CALL) - 20))["choices"]
    assert choice["finish_reason"] == "length"
    [call] = choice["message"]["tool_calls"]
    assert PARIS.startswith(call["function"]["arguments"])


async def test_thoughts_are_told_apart_and_counted(gateway: Gateway) -> None:
    thought = "<think>\nHm.\n</think>"
    for fields in ({}, {"tools": None}):
        answer = await ask(gateway, f"{thought}\n\nParis.", **fields)
        message = answer["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "Paris.")
        details = answer["usage"]["completion_tokens_details"]
        assert details == {"reasoning_tokens": len(thought)}
    *chunks, usage = await stream(gateway, f"{thought}\n{CALL}")
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "Hm."
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert usage["usage"]["completion_tokens_details"] == {"reasoning_tokens": len(thought)}


async def test_thoughts_come_before_json_that_was_asked_for(gateway: Gateway) -> None:
    answer = await ask(
        gateway, '<think>Hm.</think>{"a": 1}', tools=None, response_format={"type": "json_object"}
    )
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", '{"a": 1}')


async def test_a_special_token_is_a_mark_where_tools_are(
    home: Home, database: Database, tmp_path: Path
) -> None:
    async with speaking(home, database, tmp_path, echo("[TOOL_CALLS]")) as gateway:
        [choice] = (await ask(gateway, f"[TOOL_CALLS]get_weather[ARGS]{PARIS}"))["choices"]
        assert choice["message"]["content"] is None
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == PARIS
        assert choice["finish_reason"] == "tool_calls"


async def test_a_conversation_goes_on_with_what_the_tool_answered(gateway: Gateway) -> None:
    first = (await ask(gateway, CALL))["choices"][0]["message"]
    call_id = first["tool_calls"][0]["id"]
    answered = {"role": "tool", "tool_call_id": call_id, "content": "sunny"}
    messages = [{"role": "user", "content": "Weather?"}, first, answered]
    answer = await ask(gateway, "", messages=messages)
    assert answer["choices"][0]["message"]["content"] == "sunny"


async def test_what_does_not_fit_together_is_refused_by_name(gateway: Gateway) -> None:
    user = {"role": "user", "content": "Hi"}
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assistant = {"role": "assistant", "tool_calls": [call]}
    broken = {**call, "function": {"name": "f", "arguments": "{"}}
    named = {"type": "function", "function": {"name": "other"}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": named}, "tool_choice.function.name"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{**user, "tool_calls": [call]}]}, "messages[0].tool_calls"),
        ({"messages": [{**user, "tool_call_id": "a"}]}, "messages[0].tool_call_id"),
        (
            {"messages": [user, {"role": "tool", "content": "x", "tool_call_id": "a"}]},
            "messages[1].tool_call_id",
        ),
        ({"messages": [assistant, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [broken]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
        ),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"tools": [with_parameters({"type": "array"})]}, "tools[0].function.parameters"),
        (
            {
                "tool_choice": "required",
                "tools": [with_parameters({"type": "object", "not": {}})],
            },
            "tools",
        ),
    ]
    for fields, param in cases:
        assert (await refusal(gateway, **fields))[:2] == (400, param), fields
    assert await gateway.differences() == []


def with_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


# Under a policy


async def put(gateway: Gateway, **policy: Any) -> None:
    answer = await gateway.operator.put("/admin/v1/tenants/acme/policy", json=policy)
    assert answer.status_code == httpx.codes.OK, answer.text
    async with await gateway.key(role="owner") as client:
        gateway.client.headers["authorization"] = client.headers["authorization"]


FALCON = {"name": "codename", "pattern": r"(?i)project\s+falcon"}


@pytest.mark.parametrize("spelled", ["Project Falcon", r"Project\nFalcon", r"Pro\u006aect Falcon"])
async def test_what_may_not_be_said_is_not_said_in_arguments_however_it_is_spelled(
    gateway: Gateway, spelled: str
) -> None:
    await put(gateway, deny_output=[FALCON])
    text = CALL.replace("Paris", spelled)
    [choice] = (await ask(gateway, text))["choices"]
    assert choice["finish_reason"] == "content_filter"
    assert "tool_calls" not in choice["message"]
    chunks = await stream(gateway, text)
    assert "alcon" not in json.dumps(chunks)
    assert chunks[-2]["choices"][0]["finish_reason"] == "content_filter"
    assert (await ask(gateway, CALL))["choices"][0]["finish_reason"] == "tool_calls"


async def test_deny_rules_read_what_tools_are_said_to_do_and_what_was_called(
    gateway: Gateway,
) -> None:
    await put(gateway, deny_input=[FALCON])
    told = json.loads(json.dumps(TOOL).replace("The weather", "For Project Falcon, the weather"))
    arguments = json.dumps({"place": "Project\nFalcon"})
    call = {"id": "a", "function": {"name": "get_weather", "arguments": arguments}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "Hi"}]
    for fields in ({"tools": [told]}, {"messages": turns}):
        answer = await gateway.client.post(CHAT, json=body("Hello", **fields))
        assert answer.json()["error"]["code"] == "content_policy", fields
