"""Facts about budgets: what is held and spent together never passes a hard one."""

import asyncio
import datetime
import random
import uuid
from typing import Any

import pytest
from sqlalchemy import select, text

from gateway.budgets import BudgetPeriod, Kind, Standing, create_budget, standings
from gateway.database import Database
from gateway.errors import BudgetSpent, Conflict, InvalidRequest
from gateway.journal import Settlement
from gateway.ledger import settle
from gateway.limits import Admission, Stream, admit, extend
from gateway.prices import bill, ceiling
from gateway.tables import GatewayInstance, Webhook, WebhookDelivery, new_id
from tests.conftest import Home, connected
from tests.gateway.money import Shop, a_base_model, a_shop

INSTANCE = uuid.UUID(int=99)
PROMPT = 10
PATIENCE_S = 60


@pytest.fixture
async def shop(database: Database) -> Shop:
    async with database.as_worker() as session:
        session.add(GatewayInstance(id=INSTANCE, host="here", epoch=1))
    return await a_shop(database, "acme", await a_base_model(database))


def price_of(shop: Shop, output_tokens: int) -> int:
    """Nano-USD of one request that answers with so many tokens."""
    return ceiling(shop.price, prompt_tokens=PROMPT, output_tokens=output_tokens)


async def budget(
    database: Database,
    shop: Shop,
    cap_nano: int,
    *,
    kind: Kind = "hard",
    period: BudgetPeriod = "month",
    of_key: bool = False,
    time_zone: str = "UTC",
) -> None:
    async with database.as_worker() as session:
        await create_budget(
            session,
            tenant_id=shop.tenant.id,
            api_key_id=shop.key.id if of_key else None,
            kind=kind,
            period=period,
            time_zone=time_zone,
            cap_nano=cap_nano,
            alert_percents=[50, 100],
        )


async def ask(database: Database, shop: Shop, *, max_tokens: int = 2000) -> Admission:
    return await admit(
        database,
        shop.principal,
        shop.target,
        request_id=new_id(),
        endpoint="completions",
        prompt_tokens=PROMPT,
        max_tokens=max_tokens,
        gateway_instance_id=INSTANCE,
    )


async def grow(database: Database, admission: Admission, *, progress: int, wanted: int) -> int:
    stream = Stream(admission.request_id, progress, 0, wanted)
    async with database.as_worker() as session:
        [funding] = await extend(session, gateway_instance_id=INSTANCE, streams=[stream])
    return funding.funded_output_tokens


async def close(
    database: Database,
    shop: Shop,
    admission: Admission,
    completion: int | None,
    *,
    at: datetime.datetime | None = None,
) -> None:
    """Settle a request; None lets it go for free."""
    opened = shop.request(
        INSTANCE, request_id=admission.request_id, started_at=admission.admitted_at
    )
    charged = completion and bill(
        admission.price, prompt_tokens=PROMPT, cached_tokens=0, completion_tokens=completion
    )
    ended_at = at or datetime.datetime.now(datetime.UTC)
    async with database.as_worker() as session:
        await settle(session, [Settlement(opened, "stop", ended_at, charged or None)])


async def standing(database: Database, shop: Shop) -> Standing:
    async with database.as_tenant(shop.tenant.id) as session:
        return (await standings(session, shop.tenant.id))[0]


async def test_a_small_budget_funds_what_it_can_and_then_refuses(
    database: Database, shop: Shop
) -> None:
    await budget(database, shop, price_of(shop, 40))
    first = await ask(database, shop)
    # Not all of the tranche, but as far as the money goes; no max_tokens is no obstacle.
    assert (first.funded_output_tokens, first.is_budgeted) == (40, True)
    with pytest.raises(BudgetSpent) as refused:
        await ask(database, shop)
    error = refused.value
    assert (error.status, error.code) == (429, "insufficient_quota")
    assert error.headers["x-should-retry"] == "false"
    assert int(error.headers["retry-after"]) > 0
    assert error.rule is not None
    assert error.rule["current"] == price_of(shop, 40)


async def test_what_a_request_did_not_use_is_free_again(database: Database, shop: Shop) -> None:
    await budget(database, shop, price_of(shop, 40))
    await close(database, shop, await ask(database, shop), None)
    await close(database, shop, await ask(database, shop), 3)
    found = await standing(database, shop)
    assert found.held_nano == 0
    assert 0 < found.spent_nano <= price_of(shop, 3)
    again = await ask(database, shop)
    found = await standing(database, shop)
    assert found.held_nano == again.amount_nano
    assert found.held_nano + found.spent_nano <= found.cap_nano


async def test_a_stream_is_funded_up_to_the_budget_and_no_further(
    database: Database, shop: Shop
) -> None:
    await budget(database, shop, price_of(shop, 300))
    stream = await ask(database, shop)
    assert stream.funded_output_tokens == 256
    assert await grow(database, stream, progress=200, wanted=512) == 300
    assert await grow(database, stream, progress=290, wanted=512) == 300
    found = await standing(database, shop)
    assert found.held_nano == found.cap_nano


async def test_without_a_budget_a_stream_gets_all_that_it_wants(
    database: Database, shop: Shop
) -> None:
    stream = await ask(database, shop)
    assert await grow(database, stream, progress=200, wanted=512) == 512


async def test_a_budget_made_while_a_stream_runs_binds_it(database: Database, shop: Shop) -> None:
    stream = await ask(database, shop)
    await budget(database, shop, price_of(shop, 300))
    assert await grow(database, stream, progress=200, wanted=512) == 300


async def test_the_budget_of_a_key_is_for_that_key_alone(database: Database, shop: Shop) -> None:
    await budget(database, shop, 0, of_key=True)
    with pytest.raises(BudgetSpent, match="key 'first'"):
        await ask(database, shop)
    other = await a_shop(database, "globex", (shop.base_model, shop.price))
    await ask(database, other)


async def test_a_soft_budget_refuses_nothing(database: Database, shop: Shop) -> None:
    await budget(database, shop, 1, kind="soft")
    assert not (await ask(database, shop)).is_budgeted


async def test_a_new_budget_counts_what_its_period_has_seen(database: Database, shop: Shop) -> None:
    await close(database, shop, await ask(database, shop), 7)
    await budget(database, shop, 10**12)
    found = await standing(database, shop)
    assert found.spent_nano > 0
    await close(database, shop, await ask(database, shop), 7)
    assert (await standing(database, shop)).spent_nano == 2 * found.spent_nano


async def test_usage_of_an_earlier_period_is_not_held_against_this_one(
    database: Database, shop: Shop
) -> None:
    await budget(database, shop, 10**12, period="day", time_zone="Pacific/Auckland")
    found = await standing(database, shop)
    assert found.starts_at <= datetime.datetime.now(datetime.UTC) < found.ends_at
    before = found.starts_at - datetime.timedelta(microseconds=1)
    await close(database, shop, await ask(database, shop), 7, at=before)
    assert (await standing(database, shop)).spent_nano == 0
    await close(database, shop, await ask(database, shop), 7, at=found.starts_at)
    assert (await standing(database, shop)).spent_nano > 0


async def test_periods_follow_the_calendar_of_their_time_zone(database: Database) -> None:
    window = text("""
        SELECT starts_at, budget_window_end(:period, :zone, starts_at) AS ends_at
        FROM (SELECT budget_window_start(:period, :zone, :moment) AS starts_at) AS w
    """)
    # The day on which Berlin's clocks go forward has 23 hours.
    moment = datetime.datetime(2026, 3, 29, 12, tzinfo=datetime.UTC)
    lengths = {}
    async with database.as_app() as session:
        for period in ("day", "week", "month"):
            row = (
                await session.execute(
                    window, {"period": period, "zone": "Europe/Berlin", "moment": moment}
                )
            ).one()
            assert row.starts_at <= moment < row.ends_at
            lengths[period] = (row.ends_at - row.starts_at) / datetime.timedelta(hours=1)
    assert lengths == {"day": 23, "week": 7 * 24 - 1, "month": 31 * 24 - 1}


@pytest.mark.parametrize(
    ("zone", "fault"), [("Mars/Olympus", InvalidRequest), ("a\x00", InvalidRequest)]
)
async def test_a_time_zone_that_does_not_exist_is_refused(
    database: Database, shop: Shop, zone: str, fault: type[Exception]
) -> None:
    with pytest.raises(fault, match="time_zone"):
        await budget(database, shop, 1, time_zone=zone)


async def test_there_is_one_budget_of_each_kind_and_period(database: Database, shop: Shop) -> None:
    await budget(database, shop, 1)
    with pytest.raises(Conflict):
        await budget(database, shop, 2)
    await budget(database, shop, 2, kind="soft")
    await budget(database, shop, 2, of_key=True)


async def test_each_threshold_is_told_once_to_each_webhook(database: Database, shop: Shop) -> None:
    async with database.as_worker() as session:
        for tenant_id in (None, shop.tenant.id):
            session.add(
                Webhook(id=new_id(), tenant_id=tenant_id, url="https://a.example", pepper_version=1)
            )
    await budget(database, shop, price_of(shop, 40), kind="soft")

    async def percents() -> list[int]:
        async with database.as_worker() as session:
            rows = (await session.scalars(select(WebhookDelivery))).all()
        return sorted(row.event["percent"] for row in rows)

    for completion, expected in ((10, []), (20, [50, 50]), (1, [50, 50]), (40, [50, 50, 100, 100])):
        await close(database, shop, await ask(database, shop), completion)
        assert await percents() == expected


async def test_a_hard_budget_that_refuses_is_told_as_spent(database: Database, shop: Shop) -> None:
    async with database.as_worker() as session:
        session.add(Webhook(id=new_id(), url="https://a.example", pepper_version=1))
    await budget(database, shop, price_of(shop, 40))
    await close(database, shop, await ask(database, shop, max_tokens=39), 39)
    for _ in range(3):
        with pytest.raises(BudgetSpent):
            await admit_a_long_prompt(database, shop)
    async with database.as_worker() as session:
        rows = (await session.scalars(select(WebhookDelivery))).all()
    assert sorted(row.event["percent"] for row in rows) == [50, 100]


async def admit_a_long_prompt(database: Database, shop: Shop) -> None:
    await admit(
        database,
        shop.principal,
        shop.target,
        request_id=new_id(),
        endpoint="completions",
        prompt_tokens=1000,
        max_tokens=1,
        gateway_instance_id=INSTANCE,
    )


async def test_whatever_happens_at_once_held_and_spent_stay_below_the_cap(
    database: Database, shop: Shop, home: Home
) -> None:
    """Many clients of several gateways: they ask, grow and end as they like."""
    cap = price_of(shop, 40) * 12
    await budget(database, shop, cap)
    await budget(database, shop, cap // 2, period="day", of_key=True)
    pools = [Database(app_url=home.app_url, worker_url=home.worker_url) for _ in range(3)]
    seen: list[tuple[int, int]] = []

    async def watch() -> None:
        async with database.as_tenant(shop.tenant.id) as session:
            seen.extend(
                (each.held_nano + each.spent_nano, each.cap_nano)
                for each in await standings(session, shop.tenant.id)
            )

    async def client(number: int) -> int:
        dice, pool, num_admitted = random.Random(number), pools[number % 3], 0
        for _ in range(6):
            try:
                admission = await ask(pool, shop, max_tokens=dice.choice([1, 30, 600]))
            except BudgetSpent:
                continue
            num_admitted += 1
            funded = await grow(pool, admission, progress=1, wanted=admission.max_output_tokens)
            assert funded <= admission.max_output_tokens
            await watch()
            await close(pool, shop, admission, dice.choice([None, 1, funded]))
        return num_admitted

    admitted = await asyncio.gather(*(client(number) for number in range(12)))
    await watch()
    for pool in pools:
        await pool.close()
    assert sum(admitted) > 0
    assert all(used <= cap for used, cap in seen)
    async with database.as_worker() as session:
        found = await standings(session, shop.tenant.id)
        spent = (await session.execute(text("SELECT sum(cost_nano) FROM usage_events"))).scalar()
    assert {each.spent_nano for each in found} == {int(spent or 0)}
    assert {each.held_nano for each in found} == {0}


# Whoever grows looks at the budget until the lock is free again.
LONG_LOOK = """
    CREATE OR REPLACE FUNCTION budget_window_start(
        period text, time_zone text, moment timestamptz
    ) RETURNS timestamptz LANGUAGE plpgsql STABLE AS $$
    BEGIN
        IF current_query() LIKE '%extend_holds%' THEN
            PERFORM pg_advisory_xact_lock_shared(42);
        END IF;
        RETURN date_trunc(period, moment, time_zone);
    END
    $$
"""
NUM_LOOKING = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


async def test_what_is_settled_while_another_grows_is_not_overlooked(
    database: Database, shop: Shop, home: Home
) -> None:
    await budget(database, shop, price_of(shop, 40))
    ending = await ask(database, shop, max_tokens=20)
    growing = await ask(database, shop, max_tokens=1)
    async with connected(home.superuser_url) as connection:
        await connection.execute(LONG_LOOK)
        await connection.execute("SELECT pg_advisory_lock(42)")
        grown = asyncio.create_task(grow(database, growing, progress=1, wanted=2000))
        async with asyncio.timeout(PATIENCE_S):
            while not await connection.fetchval(NUM_LOOKING):  # noqa: ASYNC110 - a server
                await asyncio.sleep(0.01)
        await close(database, shop, ending, 20)
        await connection.execute("SELECT pg_advisory_unlock(42)")
        assert await grown > 1
    found = await standing(database, shop)
    assert 0 < found.spent_nano < found.held_nano + found.spent_nano <= found.cap_nano


async def test_every_amount_is_an_integer(database: Database, shop: Shop) -> None:
    await budget(database, shop, price_of(shop, 33))
    await close(database, shop, await ask(database, shop), 13)
    found: Any = await standing(database, shop)
    for name in ("cap_nano", "spent_nano", "held_nano"):
        assert type(getattr(found, name)) is int
