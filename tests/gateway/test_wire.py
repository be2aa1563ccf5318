"""Facts about how the gateway says no: in the form of the plane that was called, with an id."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gateway.database import Database
from tests.conftest import Home, execute
from tests.engine.echo_engine import until
from tests.gateway.batch_lab import speaker_of
from tests.gateway.whole_gateway import MODEL, Gateway, chat, whole_gateway

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
HUGE = b'{"model": "' + b"x" * (17 << 20) + b'"}'
LONG_ANSWER = {"model": MODEL, "input": "w1", "max_output_tokens": 10**6}
REFUSED = [
    ("GET", "/v1/nothing", {}, 404),
    ("GET", CHAT, {}, 405),
    ("POST", CHAT, {"content": b"{"}, 400),
    ("POST", CHAT, {"content": b"[" * 100_000}, 400),
    ("POST", CHAT, {"content": HUGE}, 413),
    ("POST", RESPONSES, {"content": HUGE}, 413),
    ("POST", CHAT, {"json": chat(frobnicate=1)}, 400),
    ("POST", CHAT, {"json": chat(model="nobody-here")}, 404),
    ("POST", RESPONSES, {"json": {"model": MODEL, "input": "w1", "store": True}}, 400),
    ("POST", CHAT, {"json": chat(), "headers": {"authorization": "Bearer ml_nobody"}}, 401),
    ("GET", "/v1/files/file-nothing", {}, 404),
    ("GET", "/nothing", {}, 404),
    ("GET", "/admin/v1/nothing", {}, 404),
    ("GET", "/admin/v1/tenants", {}, 403),
    ("PUT", "/admin/v1/tenants", {}, 405),
    ("GET", "/admin/v1/tenants", {"headers": {"authorization": ""}}, 401),
]


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with whole_gateway(home, database, tmp_path) as running:
        yield running


async def test_every_refusal_has_an_id_and_the_form_of_its_plane(gateway: Gateway) -> None:
    ids = set()
    for method, path, fields, status in REFUSED:
        answer = await gateway.client.request(method, path, **fields)
        assert answer.status_code == status, (path, answer.text)
        check_form(path, answer)
        ids.add(answer.headers["x-request-id"])
    large = await gateway.operator.post("/admin/v1/tenants", content=HUGE)
    assert large.status_code == 413
    check_form("/admin/v1/tenants", large)
    assert len({*ids, large.headers["x-request-id"]}) == len(REFUSED) + 1


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (CHAT, chat("w1 " * 5000), "messages"),
        ("/v1/completions", {"model": MODEL, "prompt": "w1 " * 5000}, "prompt"),
        (RESPONSES, {"model": MODEL, "input": "w1 " * 5000}, "input"),
        (CHAT, chat(max_tokens=10**6), "max_tokens"),
        (
            RESPONSES,
            {"model": MODEL, "input": "w1", "max_output_tokens": 10**6},
            "max_output_tokens",
        ),
    ],
)
async def test_what_is_too_long_is_named(
    gateway: Gateway, path: str, body: dict[str, Any], field: str
) -> None:
    error = (await gateway.client.post(path, json=body)).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", field)


def check_form(path: str, answer: httpx.Response) -> None:
    body = answer.json()
    if path.startswith("/v1/"):
        assert answer.headers["content-type"] == "application/json"
        assert set(body["error"]) == {"message", "type", "param", "code"}
    else:
        assert answer.headers["content-type"] == "application/problem+json"
        assert {"type", "title", "status", "detail"} <= set(body)
        assert body["status"] == answer.status_code


async def test_the_sdk_has_a_class_for_what_is_not_the_clients_fault(
    home: Home, gateway: Gateway
) -> None:
    async with speaker_of(gateway, gateway.client) as client:
        await execute(home.superuser_url, "ALTER TABLE tenant_files RENAME TO lost")
        with pytest.raises(openai.InternalServerError) as failed:
            await client.files.list()
        gateway.core.must_fail = True
        gateway.core.wake()
        with pytest.raises(openai.InternalServerError) as away:
            await ask(client)
    told: list[Any] = [each.value for each in (failed, away)]
    assert [each.status_code for each in told] == [500, 503]
    assert [each.code for each in told] == [None, "service_unavailable"]
    assert all(each.request_id for each in told)
    assert "lost" not in told[0].message


async def test_the_sdk_has_a_class_for_a_body_that_is_too_large_and_for_a_conflict(
    gateway: Gateway,
) -> None:
    gateway.core.allow_steps(0)
    named = {"Idempotency-Key": "once"}
    async with speaker_of(gateway, gateway.client) as client:
        first = asyncio.create_task(ask(client, extra_headers=named))
        await until(lambda: bool(gateway.core.running))
        with pytest.raises(openai.ConflictError) as running:
            await ask(client, extra_headers=named)
        gateway.core.allow_steps(None)
        await first
        with pytest.raises(openai.APIStatusError) as large:
            await ask(client, user="x" * (17 << 20))
    assert (running.value.status_code, running.value.code) == (409, "request_in_progress")
    assert (large.value.status_code, large.value.code) == (413, "request_too_large")


async def ask(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    return await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "w1"}], max_tokens=3, **fields
    )
