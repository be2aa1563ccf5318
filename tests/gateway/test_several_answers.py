"""Several answers in one request: to one prompt, to a list of prompts, whole and streamed."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from gateway.database import Database
from gateway.tables import Hold
from tests.conftest import Home
from tests.engine.echo_engine import until
from tests.gateway.whole_gateway import (
    MODEL,
    PATIENCE_S,
    TOKEN_NANO,
    Gateway,
    chat,
    whole_gateway,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPTS = ["w1 w2 w3", "w4 w5"]


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with whole_gateway(home, database, tmp_path) as gateway:
        yield gateway


async def complete(gateway: Gateway, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 6, **fields}
    return await gateway.client.post(COMPLETIONS, json=body)


def events_of(answer: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    return [json.loads(line) for line in lines if line.startswith("{")]


def words(text: str) -> str:
    return " ".join(text.split())


async def test_n_answers_come_in_order_and_the_prompt_is_paid_for_once(gateway: Gateway) -> None:
    answer = (await gateway.client.post(CHAT, json=chat("w1 w2 w3", n=3))).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for choice in answer["choices"]:
        assert words(choice["message"]["content"]) == "w1 w2 w3 w1 w2 w3 w1 w2"
        assert choice["finish_reason"] == "length"
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 24)
    [event] = await gateway.events(1)
    assert (event.prompt_tokens, event.completion_tokens) == (3, 24)
    assert event.cost_nano == usage["cost_nano"] == 27 * TOKEN_NANO
    assert await gateway.differences() == []


async def test_each_answer_has_a_seed_of_its_own(gateway: Gateway) -> None:
    gateway.core.allow_steps(0)
    asking = asyncio.create_task(complete(gateway, n=3, seed=7))
    await until(lambda: len(gateway.core.running) == 3)
    seeds = [sequence.sampling.seed for sequence in gateway.core.running.values()]
    gateway.core.allow_steps(None)
    await asking
    assert seeds == [7, 8, 9]


async def test_the_hold_covers_the_tokens_of_all_answers(gateway: Gateway) -> None:
    gateway.core.allow_steps(0)
    asking = asyncio.create_task(complete(gateway, prompt=PROMPTS, n=2))
    await until(lambda: len(gateway.core.running) == 4)
    async with gateway.database.as_worker() as session:
        [hold] = (await session.scalars(select(Hold))).all()
    gateway.core.allow_steps(None)
    await asking
    assert (hold.prompt_tokens, hold.funded_output_tokens) == (5, 24)
    assert hold.amount_nano == 29 * TOKEN_NANO


async def test_chunks_of_a_stream_say_whose_they_are(gateway: Gateway) -> None:
    body = chat("w1 w2 w3", n=3, stream=True, stream_options={"include_usage": True})
    *chunks, last = events_of(await gateway.client.post(CHAT, json=body))
    said: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for chunk in chunks:
        [choice] = chunk["choices"]
        said[choice["index"]].append(choice)
    assert sorted(said) == [0, 1, 2]
    for choices in said.values():
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        assert words(text) == "w1 w2 w3 w1 w2 w3 w1 w2"
        reasons = [choice["finish_reason"] for choice in choices]
        assert reasons == [None] * (len(reasons) - 1) + ["length"]
    first_end = next(n for n, chunk in enumerate(chunks) if chunk["choices"][0]["finish_reason"])
    assert {chunk["choices"][0]["index"] for chunk in chunks[3:first_end]} == {0, 1, 2}
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 24
    assert (await gateway.events(1))[0].completion_tokens == 24


@pytest.mark.parametrize("prompts", [PROMPTS, [[1, 2, 3], [4, 5]]], ids=["texts", "token ids"])
async def test_a_list_of_prompts_is_answered_in_order(gateway: Gateway, prompts: Any) -> None:
    answer = (await complete(gateway, prompt=prompts, n=2)).json()
    texts = [words(choice["text"]) for choice in answer["choices"]]
    first, second = "w1 w2 w3 w1 w2 w3", "w4 w5 w4 w5 w4 w5"
    assert texts == [first, first, second, second]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 5
    [event] = await gateway.events(1)
    assert (event.prompt_tokens, event.completion_tokens) == (5, 24)
    assert await gateway.differences() == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_one_answer_and_no_other(gateway: Gateway, stream: bool) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = await complete(gateway, prompt=PROMPTS, stop="w2", **options)
    chunks = events_of(answer) if stream else [answer.json()]
    texts, reasons = ["", ""], ["", ""]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"] or ""
    assert [words(text) for text in texts] == ["w1", "w4 w5 w4 w5 w4 w5"]
    assert reasons == ["stop", "length"]
    # The token that completes a stop string is the last that is billed.
    assert chunks[-1]["usage"]["completion_tokens"] == 2 + 6
    [event] = await gateway.events(1)
    assert (event.completion_tokens, event.outcome) == (8, "length")
    assert await gateway.differences() == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_budget_ends_all_answers_at_their_last_funded_token(
    gateway: Gateway, stream: bool
) -> None:
    await gateway.budget(TOKEN_NANO * (3 + 701))
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = await complete(gateway, n=2, max_tokens=900, **options)
    chunks = events_of(answer) if stream else [answer.json()]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert sum(len(choice["text"].split()) for choice in choices) == 701
    ends = [choice for choice in choices if choice["finish_reason"]]
    assert [(each["finish_reason"], each["stopped_by"]) for each in ends] == [
        ("length", "budget")
    ] * 2
    assert chunks[-1]["usage"]["cost_nano"] == TOKEN_NANO * 704
    assert (await gateway.events(1))[0].completion_tokens == 701
    assert await gateway.differences() == []


async def test_what_max_cost_pays_for_is_shared_out(gateway: Gateway) -> None:
    answer = (await complete(gateway, n=2, max_cost=TOKEN_NANO * (3 + 5))).json()
    assert [len(choice["text"].split()) for choice in answer["choices"]] == [2, 2]
    assert {choice["stopped_by"] for choice in answer["choices"]} == {"max_cost"}
    refused = await complete(gateway, n=6, max_cost=TOKEN_NANO * (3 + 5))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "max_cost"
    async with asyncio.timeout(PATIENCE_S):
        while True:
            async with gateway.database.as_worker() as session:
                states = set(await session.scalars(select(Hold.state)))
            if "open" not in states:
                break
            await asyncio.sleep(0.02)
    assert await gateway.differences() == []


async def test_who_leaves_pays_for_what_all_answers_had_said(gateway: Gateway) -> None:
    gateway.core.allow_steps(5)
    body = chat("w1 w2 w3", n=2, max_tokens=100, stream=True)
    seen = 0
    async with gateway.client.stream("POST", CHAT, json=body) as answer:
        async for line in answer.aiter_lines():
            seen += '"content":"' in line and '"content":""' not in line
            if seen == 10:
                break
    await until(lambda: not gateway.core.running)
    gateway.core.allow_steps(None)
    [event] = await gateway.events(1)
    assert (event.outcome, event.prompt_tokens) == ("abort", 3)
    assert event.completion_tokens == 10
    assert await gateway.differences() == []


async def test_more_answers_than_a_request_may_have_are_refused(gateway: Gateway) -> None:
    for fields, param in (
        ({"prompt": PROMPTS, "n": 65}, "n"),
        ({"prompt": ["w1"] * 129}, "prompt"),
        ({"n": 129}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": ["w1", ""]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": ["w1", 1]}, "prompt"),
    ):
        answer = await complete(gateway, **fields)
        assert answer.status_code == 400, fields
        assert answer.json()["error"]["param"] == param, fields
    assert (await complete(gateway, prompt=PROMPTS, n=64, max_tokens=1)).status_code == 200


async def test_an_output_rule_ends_the_answer_that_it_matches_alone(gateway: Gateway) -> None:
    rule = {"name": "five", "pattern": "w5"}
    answer = await gateway.operator.put(
        "/admin/v1/tenants/acme/policy", json={"deny_output": [rule]}
    )
    assert answer.status_code == 200, answer.text
    async with await gateway.key(role="owner") as client:
        gateway.client.headers["authorization"] = client.headers["authorization"]
    choices = (await complete(gateway, prompt=PROMPTS)).json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["length", "content_filter"]
    assert [words(choice["text"]) for choice in choices] == [
        "w1 w2 w3 w1 w2 w3",
        "w4",
    ]


async def test_an_estimate_counts_all_answers(gateway: Gateway) -> None:
    body = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 6, "n": 4}
    found = (await gateway.client.post("/v1/estimate", json=body)).json()
    assert (found["prompt_tokens"], found["max_output_tokens"]) == (3, 24)
    assert found["max_cost_nano"] == 27 * TOKEN_NANO
