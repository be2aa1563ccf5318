"""Limits and budgets as a client meets them: headers, refusals, and streams that end early."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from gateway.database import Database
from gateway.tables import Hold
from tests.conftest import Home
from tests.gateway.whole_gateway import (
    MODEL,
    PATIENCE_S,
    TOKEN_NANO,
    Gateway,
    chat,
    whole_gateway,
)

PROMPT = "w1 w2 w3 w4"
SIX_HEADERS = {
    f"x-ratelimit-{what}-{kind}"
    for what in ("limit", "remaining", "reset")
    for kind in ("requests", "tokens")
}


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with whole_gateway(home, database, tmp_path) as gateway:
        yield gateway


async def ask(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post(
        "/v1/completions", json={"model": MODEL, "prompt": PROMPT, "max_tokens": 6, **fields}
    )


async def stream(client: httpx.AsyncClient, **fields: Any) -> tuple[httpx.Response, list[Any]]:
    answer = await ask(client, stream=True, stream_options={"include_usage": True}, **fields)
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    return answer, [json.loads(line) for line in lines if line.startswith("{")]


async def budget_of(gateway: Gateway) -> dict[str, Any]:
    """Where the first budget stands, when everything is settled."""
    while True:
        found: dict[str, Any] = (await gateway.client.get("/v1/budgets")).json()["data"][0]
        if not found["held_nano"]:
            return found


async def test_a_stream_ends_at_its_last_funded_token(gateway: Gateway) -> None:
    cap = TOKEN_NANO * (4 + 300)
    await gateway.budget(cap)
    answer, events = await stream(gateway.client, max_tokens=900)
    assert answer.status_code == 200
    *_, last, usage = events
    [choice] = last["choices"]
    assert (choice["finish_reason"], choice["stopped_by"]) == ("length", "budget")
    assert usage["usage"]["completion_tokens"] == 300
    words = "".join(each["choices"][0]["text"] for each in events[:-1]).split()
    assert len(words) == 300
    assert usage["usage"]["cost_nano"] == cap
    assert (await budget_of(gateway))["spent_nano"] == cap
    refused = await ask(gateway.client)
    assert refused.status_code == 429
    assert refused.headers["x-should-retry"] == "false"
    error = refused.json()["error"]
    assert (error["code"], error["rule"]["rule"]) == ("insufficient_quota", "budget")
    assert error["rule"]["current"] == cap


async def test_a_heartbeat_that_needs_no_money_does_not_lift_the_budget(gateway: Gateway) -> None:
    await gateway.budget(TOKEN_NANO * (4 + 300))
    gateway.core.allow_steps(10)
    answering = asyncio.create_task(stream(gateway.client, max_tokens=900))
    progress = select(Hold.progress_output_tokens)
    async with asyncio.timeout(PATIENCE_S):
        while True:
            async with gateway.database.as_worker() as session:
                if (await session.scalar(progress) or 0) >= 10:
                    break
            await asyncio.sleep(0.02)
    gateway.core.allow_steps(None)
    _, events = await answering
    assert events[-1]["usage"]["completion_tokens"] == 300
    assert events[-2]["choices"][0]["stopped_by"] == "budget"


async def test_a_whole_answer_ends_there_too(gateway: Gateway) -> None:
    await gateway.budget(TOKEN_NANO * (4 + 300))
    answer = await gateway.client.post(
        "/v1/chat/completions",
        json={"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]},
    )
    [choice] = answer.json()["choices"]
    assert (choice["finish_reason"], choice["stopped_by"]) == ("length", "budget")
    assert answer.json()["usage"]["completion_tokens"] == 300
    assert (await budget_of(gateway))["spent_nano"] == TOKEN_NANO * 304


async def test_an_answer_within_the_budget_says_nothing_of_it(gateway: Gateway) -> None:
    await gateway.budget(TOKEN_NANO * 100_000)
    answer = await ask(gateway.client, max_tokens=600)
    [choice] = answer.json()["choices"]
    assert choice["finish_reason"] == "length"
    assert "stopped_by" not in choice
    assert len(choice["text"].split()) == 600


async def test_max_cost_ends_an_answer(gateway: Gateway) -> None:
    answer = await ask(gateway.client, max_tokens=600, max_cost=TOKEN_NANO * (4 + 9) + 1)
    [choice] = answer.json()["choices"]
    assert (choice["finish_reason"], choice["stopped_by"]) == ("length", "max_cost")
    assert answer.json()["usage"]["cost_nano"] == TOKEN_NANO * 13
    refused = await ask(gateway.client, max_cost=TOKEN_NANO)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "max_cost"


async def test_every_answer_tells_what_is_left(gateway: Gateway) -> None:
    await gateway.limit(requests_per_minute=60, request_burst=2, tokens_per_minute=6000)
    whole = await ask(gateway.client)
    assert set(whole.headers) >= SIX_HEADERS
    assert whole.headers["x-ratelimit-limit-requests"] == "2"
    assert whole.headers["x-ratelimit-remaining-requests"] == "1"
    streamed, _ = await stream(gateway.client)
    assert set(streamed.headers) >= SIX_HEADERS
    while (refused := await ask(gateway.client)).status_code == 200:
        pass
    assert refused.status_code == 429
    assert set(refused.headers) >= SIX_HEADERS | {"retry-after", "retry-after-ms"}
    assert int(refused.headers["retry-after-ms"]) <= 1000
    error = refused.json()["error"]
    assert error["code"] == "rate_limit_exceeded"
    assert error["rule"]["rule"] == "requests_per_minute"
    assert error["rule"]["scope"] == "tenant"


async def test_one_after_another_never_meets_a_limit_of_one_at_a_time(gateway: Gateway) -> None:
    await gateway.limit(concurrent_requests=1)
    for _ in range(20):
        answer = await gateway.client.post("/v1/chat/completions", json=chat())
        assert answer.status_code == httpx.codes.OK, answer.text


async def test_without_limits_there_is_nothing_to_tell(gateway: Gateway) -> None:
    assert not SIX_HEADERS & set((await ask(gateway.client)).headers)


async def test_a_request_waits_no_longer_than_it_may(gateway: Gateway) -> None:
    await gateway.limit(queue_time_ms=50, requests_per_minute=100)
    gateway.core.allow_steps(0)
    refused = await ask(gateway.client)
    assert refused.status_code == 429
    assert refused.json()["error"]["rule"]["rule"] == "queue_time_ms"
    assert "x-ratelimit-remaining-requests" in refused.headers
    gateway.core.allow_steps(None)
    assert (await ask(gateway.client)).status_code == 200


async def test_limits_show_the_ceilings_and_levels_of_the_calling_key(gateway: Gateway) -> None:
    await gateway.limit(requests_per_minute=6, concurrent_requests=3)
    await ask(gateway.client)
    [tenant] = (await gateway.client.get("/v1/limits")).json()["data"]
    assert tenant["scope"] == "tenant"
    assert tenant["requests_per_minute"]["used"] == 1
    assert tenant["requests_per_minute"]["remaining"] == 5
    assert tenant["concurrent_requests"]["ceiling"] == 3
    assert (await gateway.operator.get("/v1/limits")).status_code == 403


async def test_an_estimate_is_exact_and_charges_nothing(gateway: Gateway) -> None:
    await gateway.limit(requests_per_minute=1)
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20}
    for _ in range(2):
        answer = await gateway.client.post("/v1/estimate", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json() == {
            "model": MODEL,
            "prompt_tokens": 4,
            "max_output_tokens": 20,
            "prompt_cost_nano": 4 * TOKEN_NANO,
            "max_cost_nano": 24 * TOKEN_NANO,
            "would_be_admitted": True,
            "why_not": None,
            "is_resident": True,
        }
    await ask(gateway.client)
    answer = (await gateway.client.post("/v1/estimate", json=body)).json()
    assert not answer["would_be_admitted"]
    assert answer["why_not"]["status"] == 429
    assert answer["why_not"]["rule"]["rule"] == "requests_per_minute"


async def test_a_key_for_some_models_sees_no_others(gateway: Gateway) -> None:
    async with await gateway.key(allowed_models=["acme-*"]) as client:
        assert (await ask(client)).status_code == 404
        assert (await client.get("/v1/models")).json()["data"] == []
        assert (await client.get(f"/v1/models/{MODEL}")).status_code == 404
    async with await gateway.key(allowed_models=["EC*"]) as client:
        assert (await ask(client)).status_code == 200


async def test_a_key_is_good_from_its_own_addresses_alone(gateway: Gateway) -> None:
    async with await gateway.key(ip_ranges=["192.0.2.0/24"]) as client:
        # No proxy is trusted here, so what it says of itself counts for nothing.
        headers = {"x-forwarded-for": "192.0.2.7"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 403
    async with await gateway.key(ip_ranges=["127.0.0.0/8"]) as client:
        assert (await client.get("/v1/models")).status_code == 200


# What owners do by themselves.


async def test_an_owner_makes_renews_and_ends_keys(gateway: Gateway) -> None:
    made = (await gateway.client.post("/v1/keys", json={"name": "ci", "role": "viewer"})).json()
    assert made["scopes"] == ["usage"]
    headers = {"authorization": f"Bearer {made['key']}"}
    assert (await gateway.client.get("/v1/limits", headers=headers)).status_code == 200
    assert (await gateway.client.get("/v1/models", headers=headers)).status_code == 403
    path = f"/v1/keys/{made['id']}"
    renewed = (await gateway.client.post(f"{path}/rotate", json={"overlap_s": 3600})).json()
    assert renewed["id"] == made["id"]
    for key in (made["key"], renewed["key"]):
        headers = {"authorization": f"Bearer {key}"}
        assert (await gateway.client.get("/v1/limits", headers=headers)).status_code == 200
    assert (await gateway.client.delete(path)).status_code == 204
    listed = (await gateway.client.get("/v1/keys")).json()["data"]
    assert [key["name"] for key in listed] == ["first", "ci"]
    assert listed[1]["revoked_at"] is not None
    assert all("key" not in key for key in listed)


WANTED: list[dict[str, Any]] = [
    {"role": "owner"},
    {"scopes": ["billing"]},
    {"allowed_models": ["*"]},
    {"ip_ranges": ["0.0.0.0/0"]},
    {"expires_at": "2100-01-01T00:00:00Z"},
]


async def test_nobody_makes_a_key_that_may_do_more_than_their_own(
    gateway: Gateway, subtests: pytest.Subtests
) -> None:
    for wanted in WANTED:
        with subtests.test(f"{wanted}"):
            narrow = {
                "scopes": ["keys", "usage", "inference"],
                "allowed_models": ["echo"],
                "ip_ranges": ["127.0.0.1/32"],
                "expires_at": "2090-01-01T00:00:00Z",
            }
            async with await gateway.key(**narrow) as client:
                answer = await client.post("/v1/keys", json={"name": "more", **wanted})
                assert answer.status_code == 403, answer.text
                assert answer.json()["error"]["param"] in {*wanted, "scopes"}
                as_narrow = await client.post("/v1/keys", json={"name": "same"})
                assert as_narrow.status_code == 201
                assert as_narrow.json()["allowed_models"] == ["echo"]
                # The owner's key is beyond its reach.
                owners = (await client.get("/v1/keys")).json()["data"][0]
                for method, path in (("DELETE", ""), ("POST", "/rotate")):
                    answer = await client.request(method, f"/v1/keys/{owners['id']}{path}", json={})
                    assert answer.status_code == 403


async def test_the_keys_of_other_tenants_are_not_there(gateway: Gateway) -> None:
    await gateway.operator.post("/admin/v1/tenants", json={"slug": "globex"})
    other = (
        await gateway.operator.post("/admin/v1/tenants/globex/keys", json={"name": "x"})
    ).json()
    assert (await gateway.client.delete(f"/v1/keys/{other['id']}")).status_code == 404
    assert len((await gateway.client.get("/v1/keys")).json()["data"]) == 1
