"""Facts about how streams are framed and kept alive, on a whole gateway whose engine echoes."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.api import sse
from gateway.database import Database
from tests.conftest import Home
from tests.engine.echo_engine import until
from tests.gateway.whole_gateway import MODEL, Gateway, chat, whole_gateway

ROUTES = {
    "/v1/chat/completions": chat("w1", stream=True),
    "/v1/completions": {"model": MODEL, "prompt": "w1", "stream": True},
    "/v1/responses": {"model": MODEL, "input": "w1", "stream": True},
}


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with whole_gateway(home, database, tmp_path) as running:
        yield running


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_INTERVAL_S", 0.02)


@pytest.mark.usefixtures("short_patience")
@pytest.mark.parametrize("path", ROUTES)
async def test_a_stream_that_waits_for_its_turn_is_kept_alive_by_comments(
    gateway: Gateway, path: str
) -> None:
    gateway.core.allow_steps(0)
    async with gateway.client.stream("POST", path, json=ROUTES[path]) as answer:
        assert answer.headers["x-request-id"]
        lines = aiter(answer.aiter_lines())
        waiting = [await anext(lines) for _ in range(6)]
        gateway.core.allow_steps(None)
        rest = [line async for line in lines]
    assert waiting == [": waiting for the first token", ""] * 3
    told = [line for line in rest if line.startswith("data: {")]
    assert len(told) > 1
    assert all("error" not in json.loads(line.removeprefix("data: ")) for line in told)


@pytest.mark.usefixtures("short_patience")
@pytest.mark.parametrize("path", ROUTES)
async def test_what_fails_after_the_wait_was_told_is_an_event(gateway: Gateway, path: str) -> None:
    gateway.core.allow_steps(0)
    asking = asyncio.create_task(gateway.client.post(path, json=ROUTES[path]))
    await until(lambda: bool(gateway.core.running))
    await asyncio.sleep(0.1)
    gateway.core.must_fail = True
    gateway.core.wake()
    answer: httpx.Response = await asking
    assert (answer.status_code, answer.text[0]) == (200, ":")
    events = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    bodies: list[Any] = [json.loads(line.removeprefix("data: ")) for line in events]
    [error] = [body["error"] for body in bodies if body.get("error")]
    assert (error["type"], error["code"]) == ("server_error", "service_unavailable")
    assert "[DONE]" not in answer.text


async def test_a_stream_is_answered_with_the_headers_that_proxies_need(gateway: Gateway) -> None:
    for path, body in ROUTES.items():
        answer = await gateway.client.post(path, json=body)
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.text.endswith("\n\n")
        blocks = answer.text.removesuffix("\n\n").split("\n\n")
        for block in blocks:
            fields = [line.partition(": ")[0] for line in block.split("\n")]
            assert fields == (["event", "data"] if path == "/v1/responses" else ["data"])
