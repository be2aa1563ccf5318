"""What a request must reserve before it begins, and at which price."""

import asyncio
import dataclasses
import math
import uuid
from fractions import Fraction
from typing import Any

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text

from gateway.ceilings import Ceilings, Subject, levels_of, set_ceilings
from gateway.database import Database
from gateway.embedded import EmbeddedPostgres
from gateway.errors import InvalidRequest, LimitReached, Unavailable
from gateway.journal import Settlement
from gateway.ledger import settle
from gateway.limits import (
    Admission,
    Ask,
    Refund,
    admit,
    refund,
    rehearse,
    spell_duration,
    want,
)
from gateway.prices import PriceScope, Rates, bill, ceiling, set_price
from gateway.tables import GatewayInstance, Hold, new_id
from tests.conftest import Cluster, Home
from tests.gateway.money import PRICE, Shop, a_base_model, a_shop

INSTANCE = uuid.UUID(int=99)


@pytest.fixture
async def shop(database: Database) -> Shop:
    async with database.as_worker() as session:
        session.add(GatewayInstance(id=INSTANCE, host="here", epoch=1))
    return await a_shop(database, "acme", await a_base_model(database))


async def admitted(database: Database, shop: Shop, **changes: Any) -> Admission:
    facts = {
        "request_id": new_id(),
        "endpoint": "completions",
        "prompt_tokens": 11,
        "max_tokens": 20,
        "gateway_instance_id": INSTANCE,
    }
    return await admit(database, shop.principal, shop.target, **{**facts, **changes})


async def holds(database: Database) -> list[Hold]:
    async with database.as_worker() as session:
        return list((await session.scalars(select(Hold))).all())


async def test_a_hold_pays_for_the_prompt_and_all_of_a_short_answer(
    database: Database, shop: Shop
) -> None:
    admission = await admitted(database, shop)
    [hold] = await holds(database)
    assert (hold.id, hold.state, hold.endpoint) == (admission.request_id, "open", "completions")
    assert hold.gateway_instance_id == INSTANCE
    assert (hold.prompt_tokens, hold.funded_output_tokens) == (11, 20)
    assert hold.amount_nano == admission.amount_nano
    # The statement and Python agree on what tokens can cost at most.
    assert hold.amount_nano == ceiling(admission.price, prompt_tokens=11, output_tokens=20)
    assert hold.created_at == admission.admitted_at


async def test_a_hold_pays_for_the_first_tranche_of_each_sequence(
    database: Database, shop: Shop
) -> None:
    admission = await admitted(database, shop, max_tokens=2000, num_sequences=3)
    assert (admission.funded_output_tokens, admission.max_output_tokens) == (768, 6000)


async def test_the_narrowest_price_wins(database: Database, shop: Shop) -> None:
    assert (await admitted(database, shop)).price.output_nano_per_million == (
        PRICE.output_nano_per_million
    )
    scopes = [
        PriceScope(shop.base_model.id, shop.tenant.id),
        PriceScope(shop.base_model.id, None, shop.adapter.id),
    ]
    for rate, scope in enumerate(scopes, start=1):
        async with database.as_worker() as session:
            await set_price(session, scope, rates=Rates(output_nano_per_million=rate))
        assert (await admitted(database, shop)).price.output_nano_per_million == rate


async def test_another_tenants_price_is_not_ours(database: Database, shop: Shop) -> None:
    other = await a_shop(database, "globex", (shop.base_model, shop.price))
    async with database.as_worker() as session:
        await set_price(session, PriceScope(shop.base_model.id, other.tenant.id), rates=Rates())
    assert (await admitted(database, shop)).price.id == shop.price.id


async def test_nothing_is_held_where_there_is_no_price(database: Database, shop: Shop) -> None:
    nowhere = dataclasses.replace(
        shop.target, base_model_id=uuid.uuid4(), adapter_id=None, adapter_version_id=None
    )
    with pytest.raises(Unavailable, match="no price"):
        await admit(
            database,
            shop.principal,
            nowhere,
            request_id=new_id(),
            endpoint="completions",
            prompt_tokens=1,
            max_tokens=1,
            gateway_instance_id=INSTANCE,
        )
    assert await holds(database) == []


async def test_no_request_begins_while_the_database_is_away(
    database: Database, shop: Shop, cluster: Cluster, home: Home
) -> None:
    name = home.owner_url.rpartition("/")[2].partition("?")[0]
    await cluster.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    await database.close()
    with pytest.raises(Unavailable):
        await admitted(database, shop)
    await cluster.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    await admitted(database, shop)


@pytest.mark.parametrize(
    ("progress", "funded", "expected"),
    [(0, 256, 256), (128, 256, 256), (129, 256, 512), (500, 256, 768), (990, 768, 1000)],
)
def test_a_stream_is_funded_ahead_of_its_need_and_never_beyond_its_limit(
    progress: int, funded: int, expected: int
) -> None:
    assert want(progress=progress, funded=funded, max_output_tokens=1000) == expected


# Rates.


async def limit(database: Database, shop: Shop, *, on: str = "tenant", **ceilings: int) -> None:
    subject = {
        "tenant": Subject(shop.tenant.id),
        "key": Subject(shop.tenant.id, api_key_id=shop.key.id),
        "adapter": Subject(shop.tenant.id, adapter_id=shop.adapter.id),
    }[on]
    async with database.as_worker() as session:
        await set_ceilings(session, subject, Ceilings(**ceilings))


async def refusal(database: Database, shop: Shop, **changes: Any) -> LimitReached:
    with pytest.raises(LimitReached) as refused:
        await admitted(database, shop, **changes)
    return refused.value


async def close(database: Database, shop: Shop, admission: Admission, completion: int) -> None:
    """End a request as the settler does."""
    opened = shop.request(
        INSTANCE,
        request_id=admission.request_id,
        started_at=admission.admitted_at,
        funded_output_tokens=admission.funded_output_tokens,
    )
    charged = bill(admission.price, prompt_tokens=11, cached_tokens=0, completion_tokens=completion)
    settlement = Settlement(opened, "stop", admission.admitted_at, charged)
    async with database.as_worker() as session:
        await settle(session, [settlement])
    used = 11 + completion
    given = Refund(
        shop.tenant.id,
        shop.key.id,
        shop.adapter.id,
        11 + admission.funded_output_tokens - used,
        admission.admitted_at,
    )
    await refund(database, [given])


HISTORY = st.lists(
    st.tuples(st.integers(0, 200_000_000), st.integers(1, 3000)), min_size=1, max_size=20
)


def test_the_bucket_is_the_exact_one(cluster: Cluster, postgres: EmbeddedPostgres) -> None:
    url = postgres.url.replace("+asyncpg", "")
    step = "SELECT leaked($1, $2, $3) AS level, wait_us(leaked($1, $2, $3), $4, $3, $5) AS wait_us"

    with asyncio.Runner() as runner:
        connection = runner.run(asyncpg.connect(url))

        @settings(max_examples=60, deadline=None)
        @given(HISTORY, st.integers(1, 10**10), st.integers(1, 5000))
        def check(history: list[tuple[int, int]], per_minute: int, burst: int) -> None:
            level, exact = 0, Fraction(0)
            now_us, admitted_at = 0, []
            for elapsed_us, cost in history:
                now_us += elapsed_us
                row = runner.run(
                    connection.fetchrow(step, level, elapsed_us, per_minute, cost, burst)
                )
                exact = max(exact - Fraction(elapsed_us * per_minute, 60_000_000), Fraction(0))
                assert row["level"] == exact * 60_000_000
                over = (exact + cost - burst) * 60_000_000 / per_minute
                assert row["wait_us"] == math.ceil(over)
                level = row["level"]
                if row["wait_us"] <= 0:
                    level, exact = level + cost * 60_000_000, exact + cost
                    admitted_at.append((now_us, cost))
            for first, (since_us, _) in enumerate(admitted_at):
                taken = 0
                for until_us, cost in admitted_at[first:]:
                    taken += cost
                    allowed = burst + Fraction((until_us - since_us) * per_minute, 60_000_000)
                    assert taken <= allowed

        check()
        runner.run(connection.close())


@pytest.mark.parametrize("on", ["tenant", "key", "adapter"])
async def test_a_refusal_names_the_rule_where_it_stands_and_when_it_clears(
    database: Database, shop: Shop, on: str
) -> None:
    await limit(database, shop, on=on, requests_per_minute=6, request_burst=2)
    for remaining in (1, 0):
        admission = await admitted(database, shop)
        assert admission.levels.headers()["x-ratelimit-remaining-requests"] == str(remaining)
    error = await refusal(database, shop)
    assert error.rule is not None
    assert error.rule["clears_in_us"] <= 10_000_000
    assert error.rule | {"clears_in_us": 0} == {
        "rule": "requests_per_minute",
        "scope": on,
        "ceiling": 6,
        "current": 2,
        "clears_in_us": 0,
    }
    names = {"tenant": "acme", "key": "first", "adapter": "acme-sql"}
    assert f"{on} '{names[on]}'" in error.message
    assert int(error.headers["retry-after"]) == 10
    assert 9000 < int(error.headers["retry-after-ms"]) <= 10_000
    assert error.headers["x-ratelimit-limit-requests"] == "2"
    assert len(await holds(database)) == 2


async def test_a_refused_request_is_charged_nowhere(database: Database, shop: Shop) -> None:
    await limit(database, shop, requests_per_minute=100, tokens_per_minute=100_000)
    await limit(database, shop, on="adapter", concurrent_requests=1)
    first = await admitted(database, shop)
    error = await refusal(database, shop)
    assert error.rule is not None
    assert (error.rule["rule"], error.rule["scope"]) == ("concurrent_requests", "adapter")
    await close(database, shop, first, 20)
    second = await admitted(database, shop)
    assert second.levels.requests is not None
    assert second.levels.requests.remaining == 98


async def test_unused_tokens_are_given_back_and_more_is_charged(
    database: Database, shop: Shop
) -> None:
    # A ceiling so low that nothing drains meanwhile.
    await limit(database, shop, tokens_per_minute=1, token_burst=1000)
    first = await admitted(database, shop, max_tokens=200)
    assert first.levels.tokens is not None
    assert first.levels.tokens.remaining == 1000 - 211
    await close(database, shop, first, 5)
    second = await admitted(database, shop, max_tokens=200)
    assert second.levels.tokens is not None
    assert second.levels.tokens.remaining == 1000 - 16 - 211
    # More than was charged at admission: a long stream.
    await close(database, shop, second, 600)
    third = await admitted(database, shop, max_tokens=1)
    assert third.levels.tokens is not None
    assert third.levels.tokens.remaining == 1000 - 16 - 611 - 12


async def test_a_request_that_can_never_fit_is_not_to_be_tried_again(
    database: Database, shop: Shop
) -> None:
    await limit(database, shop, tokens_per_minute=20)
    error = await refusal(database, shop)
    assert "make it smaller" in error.message
    assert error.headers["x-should-retry"] == "false"
    assert "retry-after" not in error.headers
    await admitted(database, shop, max_tokens=9)


async def test_concurrency_heals_itself_when_a_gateway_is_gone(
    database: Database, shop: Shop
) -> None:
    await limit(database, shop, concurrent_requests=1)
    await admitted(database, shop)
    await refusal(database, shop)
    other = uuid.UUID(int=98)
    async with database.as_worker() as session:
        await session.execute(
            text("UPDATE gateway_instances SET heartbeat_at = now() - interval '11 seconds'")
        )
        session.add(GatewayInstance(id=other, host="there", epoch=1))
    # The one that asks is not gone, whatever became of its heartbeats.
    await refusal(database, shop)
    await admitted(database, shop, gateway_instance_id=other)


async def test_another_tenants_requests_leave_ours_alone(database: Database, shop: Shop) -> None:
    other = await a_shop(database, "globex", (shop.base_model, shop.price))
    await limit(database, other, requests_per_minute=1, concurrent_requests=1)
    await admitted(database, other)
    await refusal(database, other)
    for _ in range(3):
        await admitted(database, shop)


async def test_requests_that_wait_for_their_tenants_rows_leave_connections_to_others(
    database: Database, shop: Shop
) -> None:
    other = await a_shop(database, "globex", (shop.base_model, shop.price))
    await limit(database, shop, requests_per_minute=100)
    async with asyncio.TaskGroup() as tasks, database.as_worker() as session:
        await session.execute(text("SELECT FROM limits FOR UPDATE"))
        for _ in range(20):
            tasks.create_task(admitted(database, shop))
        await asyncio.sleep(0.1)
        async with asyncio.timeout(5):
            await admitted(database, other)
        assert len(await holds(database)) == 1
    assert len(await holds(database)) == 21


async def test_many_at_once_never_pass_a_limit_and_none_is_refused_in_vain(
    database: Database, shop: Shop, home: Home
) -> None:
    await limit(database, shop, requests_per_minute=60, request_burst=25)
    await limit(database, shop, on="key", concurrent_requests=20)
    pools = [Database(app_url=home.app_url, worker_url=home.worker_url) for _ in range(3)]
    answers = await asyncio.gather(
        *(admitted(pools[number % 3], shop) for number in range(60)), return_exceptions=True
    )
    for pool in pools:
        await pool.close()
    assert sum(isinstance(answer, Admission) for answer in answers) == 20
    rules = {answer.rule["rule"] for answer in answers if isinstance(answer, LimitReached)}
    assert rules == {"concurrent_requests"}
    assert len(await holds(database)) == 20


async def test_a_rehearsal_changes_nothing(database: Database, shop: Shop) -> None:
    await limit(database, shop, requests_per_minute=1)
    ask = Ask(new_id(), "estimate", 11, 20, INSTANCE)
    for _ in range(3):
        assert (await rehearse(database, shop.principal, shop.target, ask)).refusal is None
    await admitted(database, shop)
    answer = await rehearse(database, shop.principal, shop.target, ask)
    assert answer.refusal is not None
    assert answer.refusal.rule == "requests_per_minute"
    assert len(await holds(database)) == 1


async def test_levels_are_shown_without_being_charged(database: Database, shop: Shop) -> None:
    await limit(database, shop, requests_per_minute=6, tokens_per_minute=600)
    await limit(database, shop, on="key", concurrent_requests=5, queue_time_ms=700)
    await admitted(database, shop)
    async with database.as_tenant(shop.tenant.id) as session:
        tenant, key = await levels_of(session, tenant_id=shop.tenant.id, api_key_id=shop.key.id)
    assert tenant.scope == "tenant"
    assert tenant.requests_per_minute is not None
    assert tenant.requests_per_minute.used == 1
    assert tenant.requests_per_minute.remaining == 5
    assert tenant.tokens_per_minute is not None
    assert 30 <= tenant.tokens_per_minute.used <= 31
    assert key.scope == "key"
    assert key.concurrent_requests is not None
    assert key.concurrent_requests.used == 1
    assert key.queue_time_ms == 700


@pytest.mark.parametrize(
    ("duration_us", "spelled"),
    [(0, "0ms"), (1, "1ms"), (250_000, "250ms"), (1_500_000, "1.5s"), (360_000_000, "6m0s")],
)
def test_durations_are_spelled_as_clients_of_openai_read_them(
    duration_us: int, spelled: str
) -> None:
    assert spell_duration(duration_us) == spelled


# What a client will pay at most.


async def test_max_cost_lowers_what_may_come(database: Database, shop: Shop) -> None:
    most = ceiling(shop.price, prompt_tokens=11, output_tokens=7)
    admission = await admitted(database, shop, max_cost_nano=most)
    assert (admission.max_output_tokens, admission.funded_output_tokens) == (7, 7)
    assert admission.is_cut_by_max_cost
    assert admission.amount_nano <= most


async def test_a_max_cost_that_pays_for_no_token_is_refused(database: Database, shop: Shop) -> None:
    too_little = ceiling(shop.price, prompt_tokens=11, output_tokens=1) - 1
    with pytest.raises(InvalidRequest) as refused:
        await admitted(database, shop, max_cost_nano=too_little)
    assert refused.value.param == "max_cost"
    assert await holds(database) == []
