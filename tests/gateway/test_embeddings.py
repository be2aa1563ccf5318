"""Facts about embeddings as a client meets them: their forms, their bill, and what is refused."""

import asyncio
import base64
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import select

from gateway.database import Database
from gateway.tables import Hold, StoredContent
from tests.conftest import Home
from tests.engine.echo_engine import EchoCore, until
from tests.gateway.whole_gateway import MODEL, TOKEN_NANO, Gateway, chat, speaking, whole_gateway

EMBEDDINGS = "/v1/embeddings"
# What an echo makes of texts: whether the mean is asked for, the length, and the first token.
THREE, ONE = [1.0, 3.0, 5.0], [1.0, 1.0, 9.0]


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with whole_gateway(home, database, tmp_path) as running:
        yield running


async def ask(gateway: Gateway, given: Any = "w5 w6 w7", **fields: Any) -> httpx.Response:
    headers = fields.pop("headers", {})
    body = {"model": MODEL, "input": given, **fields}
    return await gateway.client.post(EMBEDDINGS, json=body, headers=headers)


def vectors_of(answer: httpx.Response) -> list[Any]:
    assert answer.status_code == httpx.codes.OK, answer.text
    data = answer.json()["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    return [item["embedding"] for item in data]


def error_of(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


async def holds(gateway: Gateway) -> list[Hold]:
    async with gateway.database.as_worker() as session:
        return list((await session.scalars(select(Hold).order_by(Hold.id))).all())


INPUTS: list[tuple[Any, list[list[float]]]] = [
    ("w5 w6 w7", [THREE]),
    (["w5 w6 w7", "w9"], [THREE, ONE]),
    ([5, 6, 7], [THREE]),
    ([[5, 6, 7], [9]], [THREE, ONE]),
]


async def test_each_input_gets_its_vector_in_order(
    gateway: Gateway, subtests: pytest.Subtests
) -> None:
    for given, expected in INPUTS:
        with subtests.test(f"{given}"):
            answer = await ask(gateway, given)
            assert vectors_of(answer) == expected
            assert (answer.json()["object"], answer.json()["model"]) == ("list", MODEL)


async def test_base64_says_the_same_numbers(gateway: Gateway) -> None:
    [said] = vectors_of(await ask(gateway, encoding_format="base64"))
    assert list(struct.unpack("<3f", base64.b64decode(said))) == THREE


async def test_the_clients_own_library_reads_them_strictly(gateway: Gateway) -> None:
    key = gateway.client.headers["authorization"].removeprefix("Bearer ")
    async with openai.AsyncOpenAI(
        base_url=f"{gateway.url}/v1", api_key=key, max_retries=0
    ) as client:
        made = await client.embeddings.create(model=MODEL, input=["w5 w6 w7", "w9"])
        assert [item.embedding for item in made.data] == [THREE, ONE]
        assert (made.usage.prompt_tokens, made.usage.total_tokens) == (4, 4)
        plain = await client.embeddings.create(
            model=MODEL, input="w5 w6 w7", encoding_format="float", user="somebody"
        )
        assert plain.data[0].embedding == THREE


async def test_the_request_says_how_to_pool_and_the_mean_is_the_default(gateway: Gateway) -> None:
    for pooling, is_mean in ((None, 1), ("mean", 1), ("last", 0)):
        [vector] = vectors_of(await ask(gateway, pooling=pooling))
        assert vector[0] == is_mean


async def test_many_inputs_are_one_request_that_is_billed_its_prompt_tokens_once(
    gateway: Gateway,
) -> None:
    answer = await ask(gateway, [f"w{number} w1" for number in range(100)], user="somebody")
    assert len(vectors_of(answer)) == 100
    usage = answer.json()["usage"]
    assert usage == {
        "prompt_tokens": 200,
        "total_tokens": 200,
        "prompt_tokens_details": {"cached_tokens": 0},
        "cost_nano": 200 * TOKEN_NANO,
    }
    assert answer.headers["x-cost-nano"] == str(200 * TOKEN_NANO)
    [event] = await gateway.events(1)
    assert str(event.id) == answer.headers["x-request-id"]
    assert (event.endpoint, event.outcome) == ("embeddings", "stop")
    assert (event.prompt_tokens, event.completion_tokens) == (200, 0)
    assert event.cost_nano == usage["cost_nano"]
    [hold] = await holds(gateway)
    assert (hold.state, hold.amount_nano) == ("settled", event.cost_nano)
    assert await gateway.differences() == []


async def test_a_named_request_is_answered_and_billed_once(gateway: Gateway) -> None:
    named = {"idempotency-key": "order-7"}
    first = await ask(gateway, headers=named)
    again = await ask(gateway, headers=named)
    assert again.content == first.content
    assert again.headers["idempotent-replayed"] == "true"
    assert (await ask(gateway)).headers["x-request-id"] != first.headers["x-request-id"]
    assert len(await gateway.events(2)) == 2


NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": ["w1", ""]}, "input"),
    ({"input": [[]]}, "input"),
    ({"input": ["w1", 2]}, "input"),
    ({"input": [1, [2]]}, "input"),
    ({"input": [-1]}, "input"),
    ({"input": ["w1"] * 2049}, "input"),
    ({"input": "w1 " * 1001}, "input"),
    ({"dimensions": 3}, "dimensions"),
    ({"encoding_format": "hex"}, "encoding_format"),
    ({"pooling": "max"}, "pooling"),
    ({"user": "a\u0000b"}, "user"),
    ({"max_tokens": 1}, "max_tokens"),
]


async def test_what_makes_no_sense_is_refused_by_name_and_nothing_is_held(
    gateway: Gateway, subtests: pytest.Subtests
) -> None:
    for body, param in NONSENSE:
        with subtests.test(f"{body}"[:40]):
            answer = await ask(gateway, **{"given": "w1", **_renamed(body)})
            status, _, told = error_of(answer)
            assert (status, (told or "").partition("[")[0]) == (400, param), answer.text
            assert await holds(gateway) == []
            assert not gateway.core.seen


def _renamed(body: dict[str, Any]) -> dict[str, Any]:
    return {"given" if name == "input" else name: value for name, value in body.items()}


async def test_another_tenants_model_is_not_found(gateway: Gateway) -> None:
    assert error_of(await ask(gateway, model="globex-sql"))[:2] == (404, "model_not_found")


async def test_limits_and_budgets_count_them_as_every_request(gateway: Gateway) -> None:
    await gateway.limit(requests_per_minute=2, tokens_per_minute=10)
    answer = await ask(gateway)
    assert answer.headers["x-ratelimit-remaining-tokens"] == "7"
    refused = await ask(gateway, "w1 " * 8)
    assert (refused.status_code, refused.json()["error"]["rule"]["rule"]) == (
        429,
        "tokens_per_minute",
    )
    await gateway.limit()
    await gateway.budget(2 * TOKEN_NANO)
    assert error_of(await ask(gateway))[:2] == (429, "insufficient_quota")


async def test_one_input_that_the_engine_refuses_fails_the_request_and_nothing_is_billed(
    home: Home, database: Database, tmp_path: Path
) -> None:
    class Picky(EchoCore):
        def submit(self, sequence: Any) -> None:
            if sequence.token_ids == [9]:
                sequence.token_ids.clear()
            super().submit(sequence)

    async with whole_gateway(home, database, tmp_path, core=Picky()) as gateway:
        assert error_of(await ask(gateway, ["w5 w6", "w9"])) == (400, "invalid_request", "input")
        await until_released(gateway)
        assert await gateway.differences() == []


async def until_released(gateway: Gateway) -> None:
    async with asyncio.timeout(30):
        while True:
            if {hold.state for hold in await holds(gateway)} == {"released"}:
                break
            await asyncio.sleep(0.02)
    assert await gateway.events(0) == []


async def test_a_client_that_leaves_pays_nothing_and_its_sequences_end(gateway: Gateway) -> None:
    gateway.core.allow_steps(0)
    key = gateway.client.headers["authorization"].removeprefix("Bearer ")
    async with speaking(gateway.url, key) as client:
        body = {"model": MODEL, "input": ["w1", "w2"]}
        waiting = asyncio.create_task(client.post(EMBEDDINGS, json=body))
        await until(lambda: len(gateway.core.running) == 2)
        waiting.cancel()
        await asyncio.wait({waiting})
    await until(lambda: not gateway.core.running)
    gateway.core.allow_steps(None)
    await until_released(gateway)


async def test_who_waits_too_long_is_told_so(gateway: Gateway) -> None:
    await gateway.limit(queue_time_ms=50)
    gateway.core.allow_steps(0)
    answer = await ask(gateway)
    assert answer.json()["error"]["rule"]["rule"] == "queue_time_ms"
    assert answer.status_code == 429
    gateway.core.allow_steps(None)
    await until_released(gateway)


async def test_they_share_an_engine_with_generations(gateway: Gateway) -> None:
    answers = await asyncio.gather(
        ask(gateway, [f"w{number}" for number in range(50)]),
        gateway.client.post("/v1/chat/completions", json=chat("w1 w2")),
        ask(gateway, "w5 w6 w7", pooling="last"),
    )
    assert [answer.status_code for answer in answers] == [200] * 3
    assert vectors_of(answers[2]) == [[0.0, 3.0, 5.0]]
    assert len(await gateway.events(3)) == 3
    assert await gateway.differences() == []


async def test_a_policy_reads_every_input_and_names_the_field(gateway: Gateway) -> None:
    policy = {
        "max_prompt_tokens": 3,
        "max_output_tokens": 1,
        "denied_parameters": ["dimensions", "pooling"],
        "deny_input": [{"name": "nine", "pattern": "w9"}],
    }
    put = await gateway.operator.put("/admin/v1/tenants/acme/policy", json=policy)
    assert put.status_code == httpx.codes.OK, put.text
    async with await gateway.key(role="owner") as client:
        gateway.client.headers["authorization"] = client.headers["authorization"]
    assert (await ask(gateway, ["w1 w2 w3", "w4"])).status_code == 200
    for given in ("w9", ["w1", "w9"], [[1], [9]]):
        assert error_of(await ask(gateway, given)) == (400, "content_policy", "input")
    assert error_of(await ask(gateway, ["w1", "w1 w2 w3 w4"])) == (400, "policy_violation", "input")
    assert error_of(await ask(gateway, pooling="last")) == (400, "policy_violation", "pooling")


async def test_texts_are_kept_where_the_tenant_wants_that(gateway: Gateway) -> None:
    await gateway.operator.put("/admin/v1/tenants/acme/retention", json={"keep_days": 1})
    await ask(gateway, ["w5 w6", "w7"], user="somebody")
    async with asyncio.timeout(30):
        while True:
            async with gateway.database.as_worker() as session:
                kept = (await session.scalars(select(StoredContent))).all()
            if kept:
                break
            await asyncio.sleep(0.02)
    assert [(row.prompt, row.completion) for row in kept] == [('["w5 w6","w7"]', "")]
