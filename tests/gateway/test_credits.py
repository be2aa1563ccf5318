"""Facts about credits for retries where several gateways settle at once."""

import asyncio
import datetime
import uuid
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import select

from gateway.database import Database
from gateway.journal import Settlement
from gateway.ledger import settle
from gateway.prices import bill
from gateway.tables import GatewayInstance, UsageCredit
from tests.conftest import Home, connected
from tests.gateway.money import Shop, a_base_model, a_shop

INSTANCE = uuid.UUID(int=99)
# Another day's rows of the roll-up, on which settlers wait for each other, before the next minute.
EVENING = datetime.datetime(2026, 11, 1, 23, 59, tzinfo=datetime.UTC)
PATIENCE_S = 60
WAITING = "SELECT count(*) FROM pg_locks WHERE NOT granted"


@pytest.fixture
async def shop(database: Database) -> Shop:
    async with database.as_worker() as session:
        session.add(GatewayInstance(id=INSTANCE, host="here", epoch=1))
    return await a_shop(database, "acme", await a_base_model(database))


def an_attempt(shop: Shop, *, after_s: int = 0, is_retry: bool = False, **facts: Any) -> Settlement:
    """One that its client left after ten tokens, or a retry that was answered; for ten seconds."""
    began_at = EVENING + datetime.timedelta(seconds=after_s)
    facts = {"attempt_digest": bytes(32), **facts}
    opened = shop.request(INSTANCE, started_at=began_at, is_retry=is_retry, **facts)
    charged = bill(shop.price, prompt_tokens=10, cached_tokens=0, completion_tokens=10)
    ended_at = began_at + datetime.timedelta(seconds=10)
    return Settlement(opened, "stop" if is_retry else "abort", ended_at, charged)


def cost_of(settlement: Settlement) -> int:
    assert settlement.bill is not None
    return settlement.bill.cost_nano


async def settled(database: Database, *settlements: Settlement, cap_nano: int) -> None:
    async with database.as_worker() as session:
        await settle(session, settlements, max_credit_nano=cap_nano)


async def settled_at_once(
    database: Database, home: Home, first: Settlement, second: Settlement, *, cap_nano: int
) -> None:
    """The second begins when the first has been written, and is not committed yet."""
    async with connected(home.superuser_url) as connection:
        async with database.as_worker() as session:
            await settle(session, [first], max_credit_nano=cap_nano)
            other = asyncio.create_task(settled(database, second, cap_nano=cap_nano))
            async with asyncio.timeout(PATIENCE_S):
                while not (  # noqa: ASYNC110 - a server
                    other.done() or await connection.fetchval(WAITING)
                ):
                    await asyncio.sleep(0.01)
        await other


async def credits_of(database: Database) -> Sequence[UsageCredit]:
    async with database.as_worker() as session:
        return (await session.scalars(select(UsageCredit))).all()


async def test_two_settlers_give_back_no_more_than_a_day_allows(
    database: Database, shop: Shop, home: Home
) -> None:
    others: list[dict[str, Any]] = [
        {},
        {"attempt_digest": b"\x01" * 32, "adapter_id": None, "adapter_version_id": None},
    ]
    left = [an_attempt(shop, **facts) for facts in others]
    cap_nano = cost_of(left[0])
    await settled(database, *left, cap_nano=cap_nano)
    retries = [an_attempt(shop, after_s=20, is_retry=True, **facts) for facts in others]
    await settled_at_once(database, home, *retries, cap_nano=cap_nano)
    assert [each.amount_nano for each in await credits_of(database)] == [cap_nano]


async def test_an_attempt_and_its_retry_find_each_other_when_settled_at_once(
    database: Database, shop: Shop, home: Home
) -> None:
    left, retry = an_attempt(shop), an_attempt(shop, after_s=60, is_retry=True)
    await settled_at_once(database, home, left, retry, cap_nano=10**9)
    assert [each.id for each in await credits_of(database)] == [left.request_id]


async def test_a_retry_stands_for_one_of_two_attempts_settled_at_once(
    database: Database, shop: Shop, home: Home
) -> None:
    retry = an_attempt(shop, after_s=90, is_retry=True)
    await settled(database, retry, cap_nano=10**9)
    left = [an_attempt(shop, after_s=seconds) for seconds in (0, 60)]
    await settled_at_once(database, home, *left, cap_nano=10**9)
    assert [each.retry_id for each in await credits_of(database)] == [retry.request_id]
