"""Gateways and PostgreSQL are killed in the middle of a batch.

Each line has one result, and one bill for it.
"""

import asyncio
import contextlib
import random
from pathlib import Path
from typing import Any

from sqlalchemy import text

from gateway.billing.verify import prove
from gateway.database import DATABASE_TROUBLE
from gateway.settings import Settings
from tests.crash.test_tokens_survive import nobody_logged_a_fault
from tests.crash.town import SECRET, Town, town
from tests.engine.echo_engine import INFO
from tests.gateway.batch_lab import counts, create, ended, line, read, speaker
from tests.gateway.whole_gateway import chat

NUM_LINES = 400
NUM_KILLS = 4
PATIENCE_S = 240
EVENTS = text("SELECT id, completion_tokens, cost_nano FROM usage_events")
OPEN_HOLDS = text("SELECT count(*) FROM holds WHERE state = 'open'")
NUM_RESULTS = text("SELECT count(*) FROM batch_results")


def flags(settings: Settings) -> list[str]:
    return [settings.engine_addresses[0], SECRET, settings.store_url]


async def test_every_line_has_one_result_and_one_bill_whoever_is_killed(
    tmp_path: Path, seed: int
) -> None:
    async with town(tmp_path, engine="words", flags=flags) as place:
        await place.during(survive(place, random.Random(seed)))
        await place.during(place.end_gateways())
        nobody_logged_a_fault(place)


async def survive(place: Town, dice: random.Random) -> None:
    key = await open_shop(place)
    asked = [
        line(f"{n}", chat(f"w{n:03}", model=INFO.base_model, max_tokens=length(n)))
        for n in range(NUM_LINES)
    ]
    async with speaker(place.urls[0], key) as client:
        made = await create(client, asked)
    for turn in range(NUM_KILLS):
        await more_is_done(place)
        await asyncio.sleep(dice.uniform(0, 0.2))
        # One of them, which may work at the batch, or all, of which one does.
        whom = place.gateways if turn % 2 else [dice.choice(place.gateways)]
        place.kills["gateway"] += sum([gateway.kill() for gateway in whom])
        if turn == 2:
            # Whatever is being written then: nobody hears whether it was.
            await more_is_done(place)
            place.kill("backend", dice)
    assert place.kills["gateway"] > NUM_KILLS // 2
    await place.are_ready()
    async with speaker(place.urls[0], key) as client:
        batch = await ended(client, made, patience_s=PATIENCE_S)
        assert (batch.status, counts(batch)) == ("completed", (NUM_LINES, NUM_LINES, 0))
        answers = await read(client, batch.output_file_id)
    await reckon(place, answers)


async def more_is_done(place: Town) -> None:
    """In the middle: some lines have their results, and others are under way."""
    enough = await number(place, NUM_RESULTS) + 20
    async with asyncio.timeout(PATIENCE_S):
        while await number(place, NUM_RESULTS) < enough:  # noqa: ASYNC110 - a database
            await asyncio.sleep(0.01)


async def reckon(place: Town, answers: dict[str, Any]) -> None:
    """Every answer is the line's own, and is billed what it says, and nothing else is billed."""
    told = {}
    for n in range(NUM_LINES):
        response = answers[f"{n}"]["response"]
        usage = response["body"]["usage"]
        assert usage["completion_tokens"] == length(n)
        told[response["request_id"]] = (usage["completion_tokens"], usage["cost_nano"])
    async with asyncio.timeout(PATIENCE_S):
        while await number(place, OPEN_HOLDS):  # noqa: ASYNC110 - rows of another process
            await asyncio.sleep(0.1)
    async with place.database.as_worker() as session:
        rows = (await session.execute(EVENTS)).all()
    assert {str(row.id): (row.completion_tokens, row.cost_nano) for row in rows} == told
    assert (await prove(place.database)).mismatches == []


def length(n: int) -> int:
    """Tokens of a line's answer: up to a second or so."""
    return 1 + n % 80


async def open_shop(place: Town) -> str:
    rates = {"input_nano_per_million": 3_000_001, "output_nano_per_million": 10_500_007}
    async with place.operator() as operator:
        for path, body in (
            (
                "/admin/v1/prices",
                {"base_model": INFO.base_model, **rates, "batch_discount_bp": 3333},
            ),
            ("/admin/v1/tenants", {"slug": "acme"}),
            ("/admin/v1/tenants/acme/keys", {"name": "first", "role": "owner"}),
        ):
            answer = await operator.post(path, json=body)
            assert answer.is_success, answer.text
    key: str = answer.json()["key"]
    return key


async def number(place: Town, query: Any) -> int:
    """Waits for the database, where that was killed."""
    while True:
        with contextlib.suppress(*DATABASE_TROUBLE):
            async with place.database.as_worker() as session:
                return int(await session.scalar(query))
        await asyncio.sleep(0.1)
