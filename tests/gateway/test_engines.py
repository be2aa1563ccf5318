"""Facts about several base models behind one gateway: they come, take each other's place, and go.

Over real links and a real database, on engines that echo.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.validate import BaseShape
from gateway.database import Database
from tests.conftest import Home
from tests.engine.echo_engine import INFO, Engine, Wire, short_folder, until, wire_between
from tests.gateway.admin_plane import adapter_files
from tests.gateway.whole_gateway import (
    MODEL,
    PATIENCE_S,
    TOKEN_NANO,
    Gateway,
    another_engine,
    chat,
    whole_gateway,
)
from tests.isolation.estate import TrustingCore

OTHER = "other-base"
BASE_MODELS = "/admin/v1/base-models"
MODULES = dict(INFO.base_shape.modules)
ANOTHER_DIGEST = "22" * 32


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with whole_gateway(home, database, tmp_path, core=TrustingCore()) as gateway:
        yield gateway


async def test_two_base_models_are_called_and_billed_side_by_side(gateway: Gateway) -> None:
    async with another_engine(gateway, base_model=OTHER, base_digest=ANOTHER_DIGEST) as other:
        assert await attached(gateway, other) == {
            "address": other.address,
            "base_model": OTHER,
            "revision": 1,
            "state": "serving",
        }
        await set_price(gateway, OTHER, token_nano=5 * TOKEN_NANO)
        assert models_of(await gateway.client.get("/v1/models")) == [MODEL, OTHER]
        for model in (MODEL, OTHER):
            answer = await ask(gateway, model)
            assert answer.status_code == 200, answer.text
        assert (len(gateway.core.seen), len(other.core.seen)) == (1, 1)
        events = await gateway.events(2)
        assert len({event.base_model_id for event in events}) == 2
        costs = sorted(event.cost_nano for event in events)
        assert costs[1] == 5 * costs[0] > 0
        assert await gateway.differences() == []


async def test_sequences_of_two_engines_are_never_taken_for_each_other(gateway: Gateway) -> None:
    async with another_engine(gateway, base_model=OTHER) as other:
        await attached(gateway, other)
        lengths = [3, 5, 7, 9, 11, 13]
        answers = await asyncio.gather(
            *(
                ask(gateway, model, max_tokens=length)
                for length, model in zip(lengths, [MODEL, OTHER] * 3, strict=True)
            )
        )
        told = [answer.json()["usage"]["completion_tokens"] for answer in answers]
        assert told == lengths
        events = await gateway.events(len(lengths))
        assert sorted(event.completion_tokens for event in events) == lengths


async def test_an_adapter_runs_on_an_engine_of_its_own_base_model(gateway: Gateway) -> None:
    async with another_engine(gateway, core=TrustingCore(), base_model=OTHER) as other:
        await attached(gateway, other)
        await publish(gateway, "sql", base_model=OTHER)
        assert (await ask(gateway, "acme-sql")).status_code == 200
        assert (len(gateway.core.seen), len(other.core.seen)) == (0, 1)


async def test_an_upload_says_which_base_model_it_is_for(gateway: Gateway) -> None:
    """By a field, or by what its configuration was trained on."""
    async with another_engine(gateway, core=TrustingCore(), base_model=OTHER) as other:
        await attached(gateway, other)
        answer = await upload(gateway, "nameless")
        assert answer.status_code == 400
        assert f"base_model must be one of: {MODEL}, {OTHER}" in answer.json()["detail"]
        for trained_on in (OTHER, f"someone/{OTHER.title()}", f"/models/{OTHER}/"):
            adapter = f"a{len(trained_on)}"
            answer = await upload(gateway, adapter, base_model_name_or_path=trained_on)
            assert answer.status_code == 201, answer.text
            shown = await gateway.operator.get(f"/admin/v1/tenants/acme/adapters/{adapter}")
            assert shown.json()["base_model"] == OTHER
        answer = await upload(gateway, "lost", base_model_name_or_path="someone/else")
        assert answer.status_code == 400


async def test_what_is_retired_finishes_its_streams_and_is_gone_then(gateway: Gateway) -> None:
    async with another_engine(gateway, core=TrustingCore(), base_model=OTHER) as other:
        await attached(gateway, other)
        await publish(gateway, "sql", base_model=OTHER)
        other.core.allow_steps(2)
        async with streaming(gateway, "acme-sql") as lines:
            await anext(lines)
            retired = await gateway.operator.post(f"{BASE_MODELS}/{OTHER}/retire")
            assert retired.status_code == 200, retired.text
            assert retired.json()["retired_at"]
            for model in (OTHER, "acme-sql", "acme-sql@1"):
                answer = await ask(gateway, model)
                assert answer.status_code == 404
                assert f"its base model '{OTHER}' was retired" in answer.json()["error"]["message"]
            assert models_of(await gateway.client.get("/v1/models")) == [MODEL]
            assert (await shown(gateway, OTHER))["draining"] == [other.address]
            other.core.allow_steps(None)
            assert [line async for line in lines][-1] == "data: [DONE]"
        await drained(gateway, OTHER)
        assert [each["base_model"] for each in await engines(gateway)] == [MODEL]
        assert (await ask(gateway, MODEL)).status_code == 200
        # Nothing was deleted: it can be served again.
        await attached(gateway, other)
        assert (await ask(gateway, "acme-sql")).status_code == 200
    assert [each.completion_tokens for each in await gateway.events(3)] == [8, 8, 8]


async def test_a_swap_sends_new_requests_on_while_streams_end_where_they_began(
    gateway: Gateway,
) -> None:
    [before] = await engines(gateway)
    await publish(gateway, "sql")
    gateway.core.allow_steps(2)
    async with another_engine(gateway, base_digest=ANOTHER_DIGEST) as new:
        async with streaming(gateway, MODEL) as lines:
            await anext(lines)
            answer = await swap(gateway, new)
            assert answer.status_code == 200, answer.text
            assert answer.json()["revision"] == 2
            for model in (MODEL, "acme-sql"):
                assert (await ask(gateway, model)).status_code == 200
            assert len(new.core.seen) == 2
            now = await shown(gateway, MODEL)
            assert (now["digest"], now["revision"]) == (ANOTHER_DIGEST, 2)
            assert (now["replicas"], now["draining"]) == ([new.address], [before["address"]])
            gateway.core.allow_steps(None)
            assert [line async for line in lines][-1] == "data: [DONE]"
        await drained(gateway, MODEL)
        [after] = await engines(gateway)
        assert (after["address"], after["revision"]) == (new.address, 2)
        assert (await ask(gateway)).status_code == 200
    assert len({event.base_model_id for event in await gateway.events(4)}) == 1
    assert await gateway.differences() == []


async def test_an_engine_that_was_swapped_away_comes_back_by_a_swap_alone(
    gateway: Gateway,
) -> None:
    [old] = await engines(gateway)
    async with another_engine(gateway) as new:
        assert (await swap(gateway, new)).status_code == 200
        await drained(gateway, MODEL)
        again = await gateway.operator.post(
            f"{BASE_MODELS}/{MODEL}/swap", json={"address": old["address"]}
        )
        assert again.status_code == 200, again.text
        assert again.json()["revision"] == 3
        assert (await ask(gateway)).status_code == 200
        assert (len(gateway.core.seen), len(new.core.seen)) == (1, 0)


async def test_a_swap_that_adapters_would_not_fit_is_refused(gateway: Gateway) -> None:
    await publish(gateway, "sql")
    [module] = MODULES
    wider = BaseShape(base_model=MODEL, modules={module: (16, 8)})
    for change, reason in (
        ({"base_shape": wider}, f"{module} as"),
        ({"vocab_size": 999}, "999 tokens, not 1000"),
        ({"max_lora_rank": 1}, "adapters up to rank 1"),
    ):
        async with another_engine(gateway, base_digest=ANOTHER_DIGEST, **change) as new:
            answer = await swap(gateway, new)
            assert answer.status_code == 409
            assert reason in answer.json()["detail"]
    assert (await shown(gateway, MODEL))["revision"] == 1
    assert (await ask(gateway, "acme-sql")).status_code == 200
    # Without adapters there is nothing to lose.
    await gateway.operator.delete("/admin/v1/tenants/acme/adapters/sql")
    async with another_engine(gateway, base_digest=ANOTHER_DIGEST, base_shape=wider) as new:
        assert (await swap(gateway, new)).status_code == 200


async def test_several_engines_share_a_base_model_and_one_of_them_can_go(
    gateway: Gateway,
) -> None:
    [first] = await engines(gateway)
    async with another_engine(gateway) as second:
        await attached(gateway, second)
        for core in (gateway.core, second.core):
            core.allow_steps(0)
        asked = [asyncio.create_task(ask(gateway)) for _ in range(4)]
        await until(lambda: len(gateway.core.running) == len(second.core.running) == 2)
        answer = await retire(gateway, address=first["address"])
        assert answer.status_code == 200, answer.text
        assert answer.json()["retired_at"] is None
        last = await retire(gateway, address=second.address)
        assert last.status_code == 409
        assert "leave out the address" in last.json()["detail"]
        for core in (gateway.core, second.core):
            core.allow_steps(None)
        assert {each.status_code for each in await asyncio.gather(*asked)} == {200}
        await drained(gateway, MODEL)
        assert (await ask(gateway)).status_code == 200
        assert (len(gateway.core.seen), len(second.core.seen)) == (2, 3)


async def test_an_engine_that_was_started_again_answers_from_its_first_request_on(
    gateway: Gateway,
) -> None:
    async with (
        short_folder() as folder,
        another_engine(gateway, base_model=OTHER) as before,
        another_engine(gateway, base_model=OTHER) as after,
    ):
        async with wire_between(folder / "wire", before.path) as wire:
            await attached(gateway, wire)
            assert (await ask(gateway, OTHER)).status_code == 200
        async with wire_between(folder / "wire", after.path):
            async with asyncio.timeout(PATIENCE_S):
                while not (await ask(gateway, OTHER)).is_success:
                    pass
            answers = [await ask(gateway, OTHER) for _ in range(20)]
            assert {answer.status_code for answer in answers} == {200}


async def test_what_took_an_engines_place_is_asked_for_nothing_before_it_tells_what_it_is(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        short_folder() as folder,
        another_engine(gateway, base_model=OTHER) as before,
        another_engine(gateway, base_model=OTHER, base_digest=ANOTHER_DIGEST) as after,
    ):
        async with wire_between(folder / "wire", before.path) as wire:
            await attached(gateway, wire)
            assert (await ask(gateway, OTHER)).status_code == 200
        async with wire_between(folder / "wire", after.path):
            async with asyncio.timeout(PATIENCE_S):
                while "engine_not_attached" not in caplog.messages:
                    assert not (await ask(gateway, OTHER)).is_success
    assert after.core.seen == []


UNSERVED: list[tuple[dict[str, Any], int, str]] = [
    ({}, 400, "Send the address"),
    ({"address": "ftp://x"}, 400, "address must be unix:/path or http://host:port"),
    ({"address": "http://user@host:1"}, 400, "address must be"),
    ({"address": "unix:/a", "model": "b", "base_model": "c"}, 400, "or an address"),
    ({"address": "unix:/a", "base_model": "c"}, 400, "tells its name itself"),
    ({"model": "small"}, 400, "Send a model with its base_model"),
    ({"model": "small", "base_model": "small"}, 403, "starts no engines"),
    ({"speed": 9}, 400, "speed"),
]


async def test_what_cannot_be_served_is_refused_by_name(
    gateway: Gateway, subtests: pytest.Subtests
) -> None:
    for body, status, reason in UNSERVED:
        with subtests.test(f"{body}"):
            answer = await gateway.operator.post(BASE_MODELS, json=body)
            assert answer.status_code == status, answer.text
            assert reason in answer.text


async def test_an_engine_that_is_no_other_or_unknown_changes_nothing(gateway: Gateway) -> None:
    [known] = await engines(gateway)
    answer = await gateway.operator.post(
        f"{BASE_MODELS}/{MODEL}/swap", json={"address": known["address"]}
    )
    assert answer.status_code == 409
    for path in ("swap", "retire"):
        answer = await gateway.operator.post(
            f"{BASE_MODELS}/nothing/{path}", json={"address": known["address"]}
        )
        assert answer.status_code == 404
    async with another_engine(gateway, base_model=OTHER) as other:
        answer = await swap(gateway, other)
        assert answer.status_code == 400
        assert f"--served-name '{MODEL}'" in answer.json()["detail"]
    async with another_engine(gateway, base_digest=ANOTHER_DIGEST) as other:
        answer = await gateway.operator.post(BASE_MODELS, json={"address": other.address})
        assert answer.status_code == 409
        assert "swap" in answer.json()["detail"]
    assert [each["address"] for each in await engines(gateway)] == [known["address"]]
    assert (await ask(gateway)).status_code == 200


async def test_what_operators_do_with_base_models_is_recorded(gateway: Gateway) -> None:
    async with another_engine(gateway) as new:
        await swap(gateway, new)
        await retire(gateway)
        await retire(gateway)
        entries = (await gateway.operator.get("/admin/v1/audit")).text
        assert entries.count("base_model.swap") == entries.count("base_model.retire") == 1


# How it is asked.


async def ask(gateway: Gateway, model: str = MODEL, **fields: Any) -> httpx.Response:
    body = chat("w7", model=model, **fields)
    return await gateway.client.post("/v1/chat/completions", json=body)


@contextlib.asynccontextmanager
async def streaming(gateway: Gateway, model: str) -> AsyncIterator[AsyncIterator[str]]:
    """The lines of a stream that has begun."""
    body = chat("w7", model=model, stream=True)
    async with gateway.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        yield (line async for line in answer.aiter_lines() if line)


async def attached(gateway: Gateway, engine: Engine | Wire) -> dict[str, Any]:
    answer = await gateway.operator.post(BASE_MODELS, json={"address": engine.address})
    assert answer.status_code == 201, answer.text
    served: dict[str, Any] = answer.json()
    return served


async def swap(gateway: Gateway, engine: Engine) -> httpx.Response:
    return await gateway.operator.post(
        f"{BASE_MODELS}/{MODEL}/swap", json={"address": engine.address}
    )


async def retire(gateway: Gateway, **body: str) -> httpx.Response:
    return await gateway.operator.post(f"{BASE_MODELS}/{MODEL}/retire", json=body)


async def upload(
    gateway: Gateway, adapter: str, *, base_model: str | None = None, **config: Any
) -> httpx.Response:
    files = adapter_files(modules=MODULES, target_modules=["up_proj"], **config)
    return await gateway.operator.post(
        f"/admin/v1/tenants/acme/adapters/{adapter}/versions",
        files=[("files", (name, data)) for name, data in files.items()],
        data={} if base_model is None else {"base_model": base_model},
    )


async def publish(gateway: Gateway, adapter: str, *, base_model: str | None = None) -> None:
    answer = await upload(gateway, adapter, base_model=base_model)
    assert answer.status_code == 201, answer.text


async def set_price(gateway: Gateway, base_model: str, *, token_nano: int) -> None:
    rate = token_nano * 1_000_000
    answer = await gateway.operator.post(
        "/admin/v1/prices",
        json={
            "base_model": base_model,
            "input_nano_per_million": rate,
            "output_nano_per_million": rate,
        },
    )
    assert answer.status_code == 201, answer.text


async def shown(gateway: Gateway, base_model: str) -> dict[str, Any]:
    listed = (await gateway.operator.get(BASE_MODELS)).json()["data"]
    [found] = [each for each in listed if each["base_model"] == base_model]
    return dict(found)


async def engines(gateway: Gateway) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = (await gateway.operator.get("/admin/v1/engines")).json()["data"]
    return listed


def models_of(answer: httpx.Response) -> list[str]:
    return [each["id"] for each in answer.json()["data"] if each["adapter_version"] is None]


async def drained(gateway: Gateway, base_model: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await shown(gateway, base_model))["draining"]:  # noqa: ASYNC110 - a server
            await asyncio.sleep(0.05)
        # The gateway has let it go as well.
        while any(each["is_draining"] for each in await engines(gateway)):  # noqa: ASYNC110 - ditto
            await asyncio.sleep(0.05)
