"""Asking again: the same answer for the same name, and one price for a stream that was lost."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

from gateway.database import Database
from gateway.tables import UsageCredit
from tests.conftest import Home
from tests.engine.echo_engine import until
from tests.gateway.whole_gateway import Gateway, chat, whole_gateway

NAMED = {"idempotency-key": "order-7"}
CHAT = "/v1/chat/completions"


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with whole_gateway(home, database, tmp_path) as running:
        yield running


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat()),
        (CHAT, chat(stream=True, stream_options={"include_usage": True})),
        ("/v1/completions", {"model": "echo", "prompt": "Hello", "stream": True}),
        ("/v1/completions", {"model": "echo", "prompt": "Hello", "logprobs": None}),
        ("/v1/responses", {"model": "echo", "input": "Hello"}),
        ("/v1/responses", {"model": "echo", "input": "Hello", "stream": True}),
    ],
)
async def test_a_named_request_is_answered_and_billed_once(
    gateway: Gateway, path: str, body: dict[str, Any]
) -> None:
    first = await gateway.client.post(path, json=body, headers=NAMED)
    assert first.status_code == 200, first.text
    again = await gateway.client.post(path, json=body, headers=NAMED)
    assert again.content == first.content
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.headers["x-request-id"] == first.headers["x-request-id"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"

    unnamed = await gateway.client.post(path, json=body)
    assert unnamed.headers["x-request-id"] != first.headers["x-request-id"]
    assert len(await gateway.events(2)) == 2
    assert await gateway.differences() == []


async def test_another_body_or_a_request_that_runs_is_told_so(gateway: Gateway) -> None:
    gateway.core.allow_steps(0)
    running = asyncio.create_task(gateway.client.post(CHAT, json=chat(), headers=NAMED))
    await until(lambda: bool(gateway.core.seen))
    waiting = await gateway.client.post(CHAT, json=chat(), headers=NAMED)
    assert (waiting.status_code, waiting.headers["retry-after"]) == (409, "1")
    other = await gateway.client.post(CHAT, json=chat("Other"), headers=NAMED)
    assert other.status_code == 422
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    gateway.core.allow_steps(None)
    first = await running
    assert (await gateway.client.post(CHAT, json=chat(), headers=NAMED)).content == first.content
    assert len(await gateway.events(1)) == 1


async def test_a_request_that_failed_may_be_asked_again(gateway: Gateway) -> None:
    body = chat(max_tokens=5000)
    for _ in range(2):
        refused = await gateway.client.post(CHAT, json=body, headers=NAMED)
        assert refused.status_code == 400
        assert "idempotent-replayed" not in refused.headers


async def leave_after(gateway: Gateway, num_steps: int, **headers: str) -> None:
    """Ask for a stream, let it go so far, and hang up."""
    gateway.core.allow_steps(num_steps)
    body = chat(stream=True, max_tokens=50)
    async with gateway.client.stream("POST", CHAT, json=body, headers=headers) as stream:
        num_seen = 0
        async for line in stream.aiter_lines():
            num_seen += '"content":' in line
            if num_seen == 2:
                break
    await until(lambda: not gateway.core.running)
    gateway.core.allow_steps(None)


async def ask_again(gateway: Gateway, **headers: str) -> httpx.Response:
    async with asyncio.timeout(30):
        while True:
            body = chat(stream=True, max_tokens=50)
            answer = await gateway.client.post(
                CHAT, json=body, headers={"x-stainless-retry-count": "1", **headers}
            )
            if answer.status_code != httpx.codes.CONFLICT:
                return answer
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("headers", [{}, NAMED])
@pytest.mark.parametrize(("cap_nano", "num_credits"), [(0, 0), (10**9, 1), (1, 0)])
async def test_a_retry_takes_the_stream_that_was_left_off_the_bill(
    home: Home,
    database: Database,
    tmp_path: Path,
    headers: dict[str, str],
    cap_nano: int,
    num_credits: int,
) -> None:
    limits = {"max_retry_credit_nano": cap_nano}
    async with whole_gateway(home, database, tmp_path, **limits) as gateway:
        await leave_after(gateway, 10, **headers)
        [left] = await gateway.events(1)
        assert left.outcome == "abort"
        assert (await ask_again(gateway, **headers)).status_code == 200
        await gateway.events(2)
        async with database.as_worker() as session:
            credited = (await session.scalars(select(UsageCredit))).all()
        assert len(credited) == num_credits
        assert all(each.id == left.id for each in credited)
        assert all(each.amount_nano == left.cost_nano for each in credited)
        assert await gateway.differences() == []


async def test_budgets_see_what_a_retry_gives_back(
    home: Home, database: Database, tmp_path: Path
) -> None:
    async with whole_gateway(home, database, tmp_path, max_retry_credit_nano=10**9) as gateway:
        await gateway.budget(10**9)
        await leave_after(gateway, 10)
        await gateway.events(1)
        await ask_again(gateway)
        left, retry = await gateway.events(2)
        # One that begins later counts the same.
        await gateway.budget(10**9, kind="soft")
        budgets = (await gateway.client.get("/v1/budgets")).json()["data"]
        assert 0 < left.cost_nano < retry.cost_nano
        assert [each["spent_nano"] for each in budgets] == [retry.cost_nano] * 2


async def test_what_is_no_retry_takes_nothing_off_the_bill(
    home: Home, database: Database, tmp_path: Path
) -> None:
    async with whole_gateway(home, database, tmp_path, max_retry_credit_nano=10**9) as gateway:
        await leave_after(gateway, 10)
        await gateway.events(1)
        await ask_again(gateway, **{"x-stainless-retry-count": "0"})
        other = {"x-stainless-retry-count": "1"}
        await gateway.client.post(CHAT, json=chat("Other", stream=True), headers=other)
        await gateway.events(3)
        async with database.as_worker() as session:
            assert await session.scalar(select(func.count()).select_from(UsageCredit)) == 0


async def test_a_stream_that_its_engine_cut_is_billed_what_came_and_nothing_if_nothing_came(
    gateway: Gateway,
) -> None:
    gateway.core.allow_steps(5)
    asking = asyncio.create_task(
        gateway.client.post(CHAT, json=chat(stream=True, max_tokens=50), headers=NAMED)
    )
    await until(lambda: any(s.num_generated_tokens == 5 for s in gateway.core.running.values()))
    gateway.core.must_fail = True
    gateway.core.wake()
    cut = await asking
    assert "data: [DONE]" not in cut.text
    assert '"error"' in cut.text
    [event] = await gateway.events(1)
    assert (event.outcome, event.completion_tokens) == ("error", 5)
    assert await gateway.differences() == []
