"""Facts about /v1/responses as clients meet it, on a whole gateway whose engine echoes.

Every answer and event is read strictly by the `openai` SDK's own models.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from gateway.database import Database
from tests.conftest import Home
from tests.engine.echo_engine import until
from tests.gateway.test_strict_answers import unknown
from tests.gateway.whole_gateway import MODEL, TOKEN_NANO, Gateway, chat, whole_gateway

RESPONSES, CHAT = "/v1/responses", "/v1/chat/completions"
LOGPROBS = "message.output_text.logprobs"
# `error` within an event is where the SDK looks for one.
OURS = {"cost_nano", "stopped_by", "error"}
READ_EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
EXTRAS: list[dict[str, Any]] = [
    {},
    {"instructions": "w9", "temperature": 0.5, "top_p": 0.5, "truncation": "disabled"},
    {"include": [LOGPROBS], "top_logprobs": 2},
    {"metadata": {"a": "b"}, "service_tier": "flex", "user": "ada", "prompt_cache_key": "k"},
    {"stop": "w2"},
    {"max_cost": 5000},
    {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "null"}}}}
    | {"ignore_eos": None},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "w1 w2"}]}]},
]


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with whole_gateway(home, database, tmp_path) as gateway:
        yield gateway


def body(said: str = "w1 w2 w3", /, **fields: Any) -> dict[str, Any]:
    """A request whose answer is as long as `max_output_tokens` says."""
    return {
        "model": MODEL,
        "input": said,
        "max_output_tokens": 8,
        "ignore_eos": True,
        **fields,
    }


async def ask(gateway: Gateway, *args: str, **fields: Any) -> Any:
    """A whole answer, by the SDK's model."""
    answer = await gateway.client.post(RESPONSES, json=body(*args, **fields))
    assert answer.status_code == httpx.codes.OK, answer.text
    found = Response.model_validate_json(answer.text, strict=True)
    assert set(unknown(found)) <= OURS, answer.text
    return found


def events_in(text: str) -> list[Any]:
    """The events of a stream, by the SDK's models."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = READ_EVENT.validate_json(data.removeprefix("data: "), strict=True)
        assert name == f"event: {event.type}"
        assert set(unknown(event)) <= OURS, data
        found.append(event)
    assert [event.sequence_number for event in found] == list(range(len(found)))
    return found


async def stream(gateway: Gateway, *args: str, **fields: Any) -> list[Any]:
    answer = await gateway.client.post(RESPONSES, json=body(*args, stream=True, **fields))
    assert answer.status_code == httpx.codes.OK, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events_in(answer.text)


async def refusal(gateway: Gateway, **fields: Any) -> tuple[int, str, str | None]:
    answer = await gateway.client.post(RESPONSES, json=body(**fields))
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


def same(response: Any) -> dict[str, Any]:
    """What does not change from one request to the next."""
    told: dict[str, Any] = response.model_dump(exclude={"id", "created_at", "completed_at"})
    for item in told["output"]:
        del item["id"]
    return told


# Spelling


async def test_a_response_is_one_of_the_sdks_and_its_stream_ends_with_it(
    gateway: Gateway, subtests: pytest.Subtests
) -> None:
    for fields in EXTRAS:
        with subtests.test(f"{fields}"):
            whole = await ask(gateway, **fields)
            *_, last = await stream(gateway, **fields)
            assert same(last.response) | {"usage": None} == same(whole) | {"usage": None}
            used, streamed = (
                each.usage.model_dump(exclude={"input_tokens_details"})
                for each in (whole, last.response)
            )
            assert used == streamed


async def test_a_whole_response_says_what_was_asked_and_what_came(gateway: Gateway) -> None:
    answer = await ask(gateway, instructions="w9", metadata={"a": "b"}, temperature=0.5)
    assert answer.id.startswith("resp_")
    assert (answer.object, answer.model, answer.status) == ("response", MODEL, "incomplete")
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert (answer.instructions, answer.metadata, answer.temperature) == ("w9", {"a": "b"}, 0.5)
    assert (answer.tools, answer.tool_choice, answer.text.format.type) == ([], "auto", "text")
    [message] = answer.output
    assert message.id.startswith("msg_")
    assert (message.role, message.status) == ("assistant", "incomplete")
    # The echo's template writes the turns one after the other.
    assert answer.output_text.split() == ["w9", "w1", "w2", "w3", "w9", "w1", "w2", "w3"]
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (4, 8)
    assert answer.usage.total_tokens == 12
    assert answer.usage.cost_nano == 12 * TOKEN_NANO


async def test_an_answer_that_its_model_ends_is_completed(gateway: Gateway) -> None:
    for stop, words in ((None, ["w1", "w2", "w999"]), ("w1", [])):
        answer = await ask(gateway, "w1 w2 w999", ignore_eos=None, stop=stop)
        assert (answer.status, answer.incomplete_details) == ("completed", None)
        assert answer.completed_at >= answer.created_at
        [message] = answer.output
        assert message.status == "completed"
        [part] = message.content
        assert part.text.split() == words


async def test_a_stream_has_openais_events_in_openais_order(gateway: Gateway) -> None:
    events = await stream(gateway, max_output_tokens=3)
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    created, begun, item, part, *deltas, text, _, done, last = events
    assert created.response.status == begun.response.status == "in_progress"
    assert created.response.output == []
    assert created.response.usage is None
    assert (item.item.content, item.item.status) == ([], "in_progress")
    assert {each.item_id for each in (part, *deltas, text)} == {item.item.id}
    assert "".join(each.delta for each in deltas) == text.text == last.response.output_text
    assert last.response.output == [done.item]
    assert last.response.id == created.response.id


async def test_log_probabilities_come_where_they_are_included(gateway: Gateway) -> None:
    fields = {"include": [LOGPROBS], "top_logprobs": 2, "max_output_tokens": 3}
    [message] = (await ask(gateway, **fields)).output
    told = message.content[0].logprobs
    assert [each.token for each in told] == [" w1", " w2", " w3"]
    assert all(len(each.top_logprobs) == 2 and each.bytes for each in told)
    events = await stream(gateway, **fields)
    deltas = [each for each in events if each.type == "response.output_text.delta"]
    assert [each.logprobs[0].token for each in deltas] == [" w1", " w2", " w3"]
    assert [each.token for each in events[-4].logprobs] == [" w1", " w2", " w3"]
    [message] = (await ask(gateway)).output
    assert message.content[0].logprobs == []


async def test_thoughts_may_be_asked_for_hidden_though_they_come_open(gateway: Gateway) -> None:
    answer = await ask(gateway, include=["reasoning.encrypted_content"])
    assert answer.output_text


# What it costs


async def test_the_bill_is_that_of_a_chat_with_the_same_words(gateway: Gateway) -> None:
    await ask(gateway, instructions="w9")
    await stream(gateway, instructions="w9")
    messages = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w1 w2 w3"}]
    answer = await gateway.client.post(CHAT, json=chat(messages=messages))
    assert answer.status_code == httpx.codes.OK, answer.text
    whole, streamed, chatted = await gateway.events(3)
    assert (whole.endpoint, chatted.endpoint) == ("responses", "chat.completions")
    for each in (whole, streamed):
        assert each.prompt_tokens == chatted.prompt_tokens == 4
        assert each.completion_tokens == chatted.completion_tokens
        assert each.cost_nano == chatted.cost_nano
        assert each.outcome == chatted.outcome == "length"
    assert await gateway.differences() == []


async def test_what_money_ends_says_so_and_limits_are_told_in_headers(gateway: Gateway) -> None:
    answer = await ask(gateway, max_cost=5 * TOKEN_NANO)
    assert answer.usage.output_tokens == 2
    assert (answer.status, answer.stopped_by) == ("incomplete", "max_cost")
    await gateway.limit(requests_per_minute=1)
    told = await gateway.client.post(RESPONSES, json=body())
    assert told.headers["x-cost-nano"] == str(11 * TOKEN_NANO)
    assert told.headers["x-request-id"]
    assert "x-ratelimit-limit-requests" in told.headers
    refused = await gateway.client.post(RESPONSES, json=body())
    assert refused.status_code == httpx.codes.TOO_MANY_REQUESTS
    assert refused.json()["error"]["rule"]["rule"] == "requests_per_minute"


# Refusals


async def test_what_does_not_fit_together_is_refused_by_name(gateway: Gateway) -> None:
    user = {"role": "user", "content": "w1"}
    hidden = {"type": "reasoning", "encrypted_content": "x"}
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    gives = {"type": "function_call_output", "call_id": "a", "output": "w1"}
    tool = {"type": "function", "name": "f"}
    form = {"format": {"type": "json_object"}}
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"content": "w1"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [user, {**user, "call_id": "a"}]}, "input[1].call_id"),
        ({"input": [{**call, "arguments": None}]}, "input[0].arguments"),
        ({"input": [{**call, "arguments": "{"}]}, "input[0].arguments"),
        ({"input": [user, gives]}, "input[1].call_id"),
        ({"input": [call, {**gives, "output": None}]}, "input[1].output"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [hidden]}, "input[0].encrypted_content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [tool, tool]}, "tools[1].name"),
        ({"tools": [{**tool, "parameters": {"type": "array"}}]}, "tools[0].parameters"),
        ({"tools": [{**tool, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
        ({"tools": [tool], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        (
            {
                "tools": [tool],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "g"}],
                },
            },
            "tool_choice.tools[0].name",
        ),
        ({"tools": [tool], "tool_choice": "required"}, "ignore_eos"),
        ({"text": form}, "ignore_eos"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": form, "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {}}, "stream_options"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"min_tokens": 9}, "min_tokens"),
    ]
    for fields, param in cases:
        answer = await gateway.client.post(RESPONSES, json=body(**fields))
        assert answer.status_code == httpx.codes.BAD_REQUEST, (fields, answer.text)
        assert answer.json()["error"]["param"] == param, (fields, answer.text)
    assert await gateway.differences() == []


async def test_a_policy_means_these_fields_by_the_names_that_a_chat_has(gateway: Gateway) -> None:
    async def put(**policy: Any) -> None:
        answer = await gateway.operator.put("/admin/v1/tenants/acme/policy", json=policy)
        assert answer.status_code == httpx.codes.OK, answer.text
        async with await gateway.key(role="owner") as client:
            gateway.client.headers["authorization"] = client.headers["authorization"]

    violated = (400, "policy_violation")
    form = {"format": {"type": "json_object"}}
    await put(denied_parameters=["logprobs", "response_format"], max_output_tokens=5)
    assert await refusal(gateway, include=[LOGPROBS]) == (*violated, "include")
    assert await refusal(gateway, text=form, ignore_eos=None) == (*violated, "text")
    assert await refusal(gateway) == (*violated, "max_output_tokens")
    assert (await ask(gateway, max_output_tokens=None)).usage.output_tokens == 5

    await put(allowed_parameters=["max_tokens", "ignore_eos"])
    await ask(gateway, instructions="w9", include=["reasoning.encrypted_content"], store=False)
    assert await refusal(gateway, seed=7) == (*violated, "seed")

    sevens = {"name": "sevens", "pattern": "w7"}
    await put(deny_input=[sevens], deny_output=[{"name": "twos", "pattern": r"w2\b"}])
    assert await refusal(gateway, input="w7") == (400, "content_policy", "input")
    assert await refusal(gateway, instructions="w7") == (400, "content_policy", "input")
    assert await refusal(gateway, include=[LOGPROBS]) == (*violated, "include")
    answer = await ask(gateway)
    assert answer.incomplete_details.reason == "content_filter"
    assert answer.output_text.split() == ["w1"]


# Streams that fail


async def fail_after(gateway: Gateway, num_tokens: int) -> None:
    await until(
        lambda: any(s.num_generated_tokens == num_tokens for s in gateway.core.running.values())
    )
    gateway.core.must_fail = True
    gateway.core.wake()


async def test_an_error_in_mid_stream_is_an_event_and_the_response_has_failed(
    gateway: Gateway,
) -> None:
    gateway.core.allow_steps(3)
    asking = asyncio.create_task(
        gateway.client.post(RESPONSES, json=body(stream=True, max_output_tokens=50))
    )
    await fail_after(gateway, 3)
    *_, error, last = events_in((await asking).text)
    assert error.type == "error"
    assert (error.code, error.error["code"]) == ("service_unavailable",) * 2
    assert error.message == error.error["message"] == last.response.error.message
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.code == "server_error"
    [event] = await gateway.events(1)
    assert (event.outcome, event.completion_tokens) == ("error", 3)
    assert await gateway.differences() == []


async def test_the_sdk_raises_what_went_wrong_in_mid_stream(gateway: Gateway) -> None:
    gateway.core.allow_steps(3)
    key = gateway.client.headers["authorization"].removeprefix("Bearer ")
    async with openai.AsyncOpenAI(
        base_url=f"{gateway.url}/v1", api_key=key, max_retries=0
    ) as client:
        events = await client.responses.create(model=MODEL, input="w1 w2", stream=True)
        failing = asyncio.create_task(fail_after(gateway, 3))
        with pytest.raises(openai.APIError, match="cut off"):
            async for _ in events:
                pass
        await failing


async def test_what_fails_at_once_is_told_by_the_status(gateway: Gateway) -> None:
    answer = await gateway.client.post(RESPONSES, json=body(stream=True, model="nobody-here"))
    assert answer.status_code == httpx.codes.NOT_FOUND
    assert answer.json()["error"]["code"] == "model_not_found"


async def test_who_hangs_up_pays_for_what_came(gateway: Gateway) -> None:
    gateway.core.allow_steps(4)
    request = body(stream=True, max_output_tokens=50)
    async with gateway.client.stream("POST", RESPONSES, json=request) as answer:
        seen = 0
        async for line in answer.aiter_lines():
            seen += line == "event: response.output_text.delta"
            if seen == 4:
                break
    await until(lambda: not gateway.core.running)
    [event] = await gateway.events(1)
    assert (event.outcome, event.completion_tokens) == ("abort", 4)
    assert await gateway.differences() == []


async def test_every_event_is_one_line_of_json(gateway: Gateway) -> None:
    answer = await gateway.client.post(RESPONSES, json=body("w1\nw2", stream=True))
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")


async def test_unknown_fields_are_told_of_where_the_operator_chose_so(
    home: Home, database: Database, tmp_path: Path
) -> None:
    settings = {"reports_unknown_fields": True}
    async with whole_gateway(home, database, tmp_path, **settings) as gateway:
        item = {"role": "user", "content": [{"type": "input_text", "text": "w1", "mood": "blue"}]}
        tool = {"type": "function", "name": "f", "async": True}
        asked = body(input=[item], tools=[tool], colour="red")
        answer = await gateway.client.post(RESPONSES, json=asked)
        assert answer.status_code == httpx.codes.OK, answer.text
        ignored = set(answer.headers["x-ignored-fields"].split(", "))
        assert ignored == {"input[0].content[0].mood", "tools[0].async", "colour"}
