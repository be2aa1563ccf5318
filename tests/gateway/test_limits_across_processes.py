"""Four gateways over one database hammer one tenant: each limit holds exactly, and is reached."""

import asyncio
import dataclasses
import json
import sys
import time
import uuid
from collections import Counter
from typing import Any

import msgspec
import pytest
from sqlalchemy import select, text

from gateway.budgets import create_budget, standings
from gateway.ceilings import Ceilings, Subject, set_ceilings
from gateway.database import Database
from gateway.prices import ceiling
from gateway.tables import GatewayInstance, Hold
from tests.conftest import Home
from tests.gateway.money import Shop, a_base_model, a_shop

pytestmark = pytest.mark.slow

NUM_PROCESSES = 4
PROMPT, OUTPUT = 10, 20
START_S = 8.0


@pytest.fixture
async def shop(database: Database) -> Shop:
    async with database.as_worker() as session:
        for number in range(NUM_PROCESSES):
            session.add(GatewayInstance(id=uuid.UUID(int=number + 1), host="here", epoch=1))
    return await a_shop(database, "acme", await a_base_model(database))


async def hammered(home: Home, shop: Shop, *, for_s: float) -> Counter[str]:
    """What all processes together were answered."""
    begin_at = time.time() + START_S
    told = {
        "app_url": home.app_url,
        "worker_url": home.worker_url,
        "principal": msgspec.to_builtins(shop.principal),
        "target": msgspec.to_builtins(dataclasses.asdict(shop.target)),
        "prompt_tokens": PROMPT,
        "max_tokens": OUTPUT,
        "begin_at": begin_at,
        "end_at": begin_at + for_s,
        "pause_s": 0.01,
    }
    answers = await asyncio.gather(
        *(_run({**told, "instance_id": str(uuid.UUID(int=n + 1))}) for n in range(NUM_PROCESSES))
    )
    return sum(answers, Counter[str]())


async def _run(told: dict[str, Any]) -> Counter[str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.gateway.hammer",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate(json.dumps(told).encode())
    assert process.returncode == 0
    return Counter(json.loads(output))


async def admitted_at_us(database: Database) -> list[int]:
    async with database.as_worker() as session:
        moments = (await session.scalars(select(Hold.created_at).order_by(Hold.created_at))).all()
    return [int(moment.timestamp() * 1_000_000) for moment in moments]


@pytest.mark.parametrize(
    ("ceilings", "per_minute", "burst"),
    [
        (Ceilings(requests_per_minute=1500, request_burst=10), 1500, 10),
        # Each asks for thirty tokens.
        (Ceilings(tokens_per_minute=45_000, token_burst=300), 1500, 10),
    ],
)
async def test_a_rate_is_never_passed_and_is_used_to_95_percent(
    database: Database, shop: Shop, home: Home, ceilings: Ceilings, per_minute: int, burst: int
) -> None:
    async with database.as_worker() as session:
        await set_ceilings(session, Subject(shop.tenant.id), ceilings)
    answers = await hammered(home, shop, for_s=8)
    moments = await admitted_at_us(database)
    assert len(moments) == answers["admitted"]
    for first, since in enumerate(moments):
        for count, until in enumerate(moments[first:], start=1):
            assert (count - burst) * 60_000_000 <= (until - since) * per_minute
    span_us = moments[-1] - moments[0]
    assert len(moments) >= 0.95 * (burst + span_us * per_minute / 60_000_000)
    # The last came when the time was nearly up: nobody was refused for good.
    assert span_us > 0.95 * 8_000_000


async def test_what_is_scarce_is_given_out_exactly(
    database: Database, shop: Shop, home: Home
) -> None:
    price = ceiling(shop.price, prompt_tokens=PROMPT, output_tokens=OUTPUT)
    async with database.as_worker() as session:
        await set_ceilings(session, Subject(shop.tenant.id), Ceilings(concurrent_requests=137))
    answers = await hammered(home, shop, for_s=3)
    assert answers["admitted"] == 137
    assert set(answers) == {"admitted", "concurrent_requests"}

    async with database.as_worker() as session:
        await set_ceilings(session, Subject(shop.tenant.id), Ceilings())
        await session.execute(text("UPDATE holds SET state = 'released'"))
        await session.execute(text("UPDATE gateway_instances SET heartbeat_at = now()"))
        await create_budget(
            session,
            tenant_id=shop.tenant.id,
            api_key_id=None,
            kind="hard",
            period="month",
            time_zone="UTC",
            cap_nano=211 * price,
            alert_percents=[],
        )
    answers = await hammered(home, shop, for_s=3)
    assert answers["admitted"] == 211
    assert set(answers) == {"admitted", "budget"}
    async with database.as_worker() as session:
        [found] = await standings(session, shop.tenant.id)
    assert found.held_nano == found.cap_nano
