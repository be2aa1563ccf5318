"""Gateways, engine and PostgreSQL are killed under load, and every token is billed exactly once.

`witness` says what is compared and why that is a proof. The moments and victims come from a seed,
which the run's summary tells; `--crash-seed` runs the same plan again, as far as a machine's timing
allows it.
"""

import asyncio
import dataclasses
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import TextClause, select, text

from adapters.demo.base_model import default_folder
from gateway.auth import Principal
from gateway.billing.verify import prove
from gateway.journal import survey
from gateway.registry import Registry
from gateway.settings import Settings
from gateway.tables import ApiKey, Tenant
from tests.crash.clients import PATIENCE_S, TOLERATED, Attempt, Crowd
from tests.crash.journals import Counts
from tests.crash.town import SECRET, START_S, Town, town
from tests.crash.trace import read_trace
from tests.crash.witness import Court, Event
from tests.engine.echo_engine import INFO
from tests.gateway.published import publish

TENANTS = ("acme", "bolt", "coda")
# What a crowd of four may have open: its own, and as many that it has left a moment ago.
CONCURRENT = 8
VICTIMS = {"gateway": 5, "engine": 3, "postgres": 1, "backend": 2}
# How often a kill waits until there is something to be cut off, and what is a sign of that.
WAITS = 0.8
ANSWERING = 30
# A hold that no journal knows is given up after a minute, by a sweep that comes every ten seconds.
DRAIN_S = 120

EVENTS = text("""
    SELECT e.id, t.slug, u.name, e.outcome, e.prompt_tokens, e.cached_tokens, e.completion_tokens,
           e.cost_nano
    FROM usage_events e JOIN tenants t ON t.id = e.tenant_id
    LEFT JOIN end_users u ON u.id = e.end_user_id
""")
OPEN_HOLDS = text("SELECT count(*) FROM holds WHERE state = 'open'")
WRONG_BUDGETS = text("""
    SELECT t.slug, w.spent_nano, w.starts_at
    FROM budget_windows w JOIN budgets b ON b.id = w.budget_id JOIN tenants t ON t.id = b.tenant_id
    WHERE w.spent_nano <> (
        SELECT coalesce(sum(e.cost_nano), 0) FROM usage_events e
        WHERE e.tenant_id = b.tenant_id AND e.finished_at >= w.starts_at
    ) - (
        SELECT coalesce(sum(c.amount_nano), 0) FROM usage_credits c
        WHERE c.tenant_id = b.tenant_id AND c.at >= w.starts_at
    )
""")
CREDITS = text("""
    SELECT a.end_user_id = r.end_user_id AS same_user, a.outcome, r.is_retry, c.amount_nano,
           least(a.cost_nano, r.cost_nano) AS smaller_nano
    FROM usage_credits c JOIN usage_events a ON a.id = c.id JOIN usage_events r ON r.id = c.retry_id
""")
# What is logged where something went wrong that no kill excuses.
FAULTS = re.compile(
    r" (ERROR|CRITICAL) (?!uvicorn)|request_failed|stream_failed|settlement_refused|journal_failed"
)
# Where an entry of a log begins; tracebacks go on below it.
ENTRY = re.compile(r"^(?=\d{4}-\d\d-\d\d )", re.MULTILINE)


@dataclass(frozen=True)
class Shops:
    """Of each tenant: its key, and what it may call."""

    keys: dict[str, str]
    models: dict[str, list[str]]


@dataclass(frozen=True)
class Plan:
    """Which engine, how often somebody is killed, and at most how long all live in peace."""

    engine: str
    num_kills: int
    max_peace_s: float
    clients_per_tenant: int = 4

    @property
    def model(self) -> str:
        return INFO.base_model if self.engine == "words" else default_folder().name

    def flags(self, settings: Settings) -> list[str]:
        """What the engine is started with, after the path of its trace."""
        if self.engine == "words":
            return [settings.engine_addresses[0], SECRET, settings.store_url]
        return [
            *("--model", str(default_folder()), "--listen", settings.engine_addresses[0]),
            *("--store-url", settings.store_url),
            *("--cache-dir", str(settings.data_dir / "adapter-cache")),
            *("--num-threads", "1", "--memory-mib", "160"),
        ]


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(Plan("words", sum(VICTIMS.values()), 0.8), id="words"),
        pytest.param(Plan("words", 150, 0.8), id="words at length", marks=pytest.mark.slow),
        pytest.param(Plan("model", 16, 4.0, 2), id="a real model", marks=pytest.mark.slow),
    ],
)
async def test_every_token_is_billed_once_whoever_is_killed(
    tmp_path: Path, announce: Callable[[str], None], seed: int, plan: Plan
) -> None:
    announce(f"crash seed {seed}")
    async with town(tmp_path, engine=plan.engine, flags=plan.flags) as place:
        shops = await place.during(open_shops(place, model=plan.model))
        if plan.engine == "words":
            shops.models["acme"].append(await place.during(add_adapter(place, "acme")))
        crowd = Crowd(
            place.urls,
            keys=shops.keys,
            models=shops.models,
            seed=seed,
            asks_words=plan.engine == "words",
        )
        await place.during(suffer(place, crowd, plan, dice=random.Random(seed)))
        counts = await place.during(reckon(place, crowd.attempts))
        await place.during(the_engine_has_nothing_left(place))
        await place.during(every_tenant_may_ask_as_if_nothing_had_been(place, crowd))
        await place.during(place.end_gateways())
        assert list(place.journals.glob("*/*.journal")) == []
        nobody_logged_a_fault(place)
    announce(f"killed {dict(place.kills)}")
    announce(f"asked {dict(crowd.counts)}")
    announce(f"found {dict(counts)}")


async def open_shops(place: Town, *, model: str) -> Shops:
    rates = {
        "input_nano_per_million": 3_000_001,
        "cached_input_nano_per_million": 1_000_003,
        "output_nano_per_million": 10_500_007,
    }
    ceilings = {
        "requests_per_minute": 100_000,
        "tokens_per_minute": 10_000_000,
        "concurrent_requests": CONCURRENT,
    }
    shops = Shops({}, {})
    async with place.operator() as operator:

        async def call(method: str, path: str, **body: Any) -> Any:
            answer = await operator.request(method, f"/admin/v1{path}", json=body)
            assert answer.is_success, answer.text
            return answer.json()

        await call("POST", "/prices", base_model=model, **rates)
        for tenant in TENANTS:
            await call("POST", "/tenants", slug=tenant)
            made = await call("POST", f"/tenants/{tenant}/keys", name="first", role="owner")
            await call("PUT", f"/tenants/{tenant}/limits", **ceilings)
            await call("POST", f"/tenants/{tenant}/budgets", cap_nano=10**15)
            shops.keys[tenant], shops.models[tenant] = made["key"], [model]
    return shops


async def add_adapter(place: Town, slug: str) -> str:
    """A tenant's own model, besides the base model."""
    async with place.database.as_worker() as session:
        tenant = (await session.scalars(select(Tenant).where(Tenant.slug == slug))).one()
        key = (await session.scalars(select(ApiKey).where(ApiKey.tenant_id == tenant.id))).one()
    owner = Principal(key.id, key.name, tenant.id, slug, tenant.cache_salt, frozenset())
    await publish(Registry(place.database), owner, "sql")
    return f"{slug}-sql"


async def suffer(place: Town, crowd: Crowd, plan: Plan, *, dice: random.Random) -> None:
    """Kill somebody again and again while everybody asks.

    Mostly once answers come again, in their middle; now and then while things are still coming up.
    """
    crowding = asyncio.create_task(crowd.run(clients_per_tenant=plan.clients_per_tenant))
    deck: list[str] = []
    while place.kills.total() < plan.num_kills:
        if dice.random() < WAITS:
            await _more_is_shown(crowd)
        await asyncio.sleep(dice.uniform(0, plan.max_peace_s))
        # Dealt out, so that nobody is spared for long.
        deck = deck or dice.sample(
            list(VICTIMS), sum(VICTIMS.values()), counts=list(VICTIMS.values())
        )
        place.kill(deck.pop(), dice)
        if crowding.done():
            break
    crowd.is_over = True
    await crowding
    await place.are_ready()


async def _more_is_shown(crowd: Crowd) -> None:
    before = crowd.num_shown
    async with asyncio.timeout(START_S):
        while crowd.num_shown < before + ANSWERING:  # noqa: ASYNC110 - many clients
            await asyncio.sleep(0.01)


async def reckon(place: Town, attempts: list[Attempt]) -> Counter[str]:
    """Wait until everything is settled, and compare all accounts of it."""
    entries = {entry.request_id: entry for entry in place.archive.entries()}
    num_owed = sum(entry.owed is not None for entry in entries.values())
    async with asyncio.timeout(DRAIN_S):
        while (  # noqa: ASYNC110 - rows of another process
            await _count(place, OPEN_HOLDS) or len(await _events(place)) < num_owed
        ):
            await asyncio.sleep(0.1)
    trace, num_torn = read_trace(place.trace)
    assert num_torn <= place.kills["engine"]
    court = Court(entries, trace, attempts, await _events(place))
    problems = court.judge()
    assert problems == [], "\n".join([f"{len(problems)} of {court.counts}", *problems[:5]])
    assert court.counts["requests cut off by a kill"], "the kills came between the requests"

    proof = await prove(place.database, survey(place.journals))
    assert proof.mismatches == []
    assert (proof.num_pending, proof.sums["open_holds"], proof.sums["held_nano"]) == (0, 0, 0)
    assert proof.sums["events"] == court.counts["bills"]
    async with place.database.as_worker() as session:
        assert (await session.execute(WRONG_BUDGETS)).all() == []
        given_back = (await session.execute(CREDITS)).all()
    for each in given_back:
        assert (each.same_user, each.outcome, each.is_retry) == (True, "abort", True)
        assert each.amount_nano == each.smaller_nano
    refused = {a.status for a in attempts} - {None, *TOLERATED}
    told = [f"{a.request_id}: {a.status} {a.error}" for a in attempts if a.status in refused]
    assert refused == set(), "\n".join([*told[:3], *logged_faults(place)[:3]])
    return court.counts + Counter({"credits": len(given_back)})


async def the_engine_has_nothing_left(place: Town) -> None:
    """What belonged to gateways that are gone was given up."""
    async with asyncio.timeout(START_S), place.operator() as operator:
        while True:
            [engine] = (await operator.get("/admin/v1/engines")).json()["data"]
            if (engine["load"]["num_running"], engine["load"]["num_waiting"]) == (0, 0):
                return
            await asyncio.sleep(0.1)


async def every_tenant_may_ask_as_if_nothing_had_been(place: Town, crowd: Crowd) -> None:
    """All ceilings are free: as many requests at once as may be are answered."""
    async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False) as http:
        for tenant in TENANTS:
            asks = [
                dataclasses.replace(
                    crowd.think_of(tenant),
                    max_tokens=60,
                    is_streamed=True,
                    leaves_after=None,
                    stop_at=None,
                )
                for _ in range(CONCURRENT)
            ]
            found = await asyncio.gather(
                *(
                    crowd.attempt(http, ask, url=url)
                    for ask, url in zip(asks, itertools.cycle(place.urls), strict=False)
                )
            )
            assert [(each.status, each.is_done) for each in found] == [(200, True)] * CONCURRENT


def nobody_logged_a_fault(place: Town) -> None:
    faults = logged_faults(place)
    assert faults == [], "\n".join(faults[:3])


def logged_faults(place: Town) -> list[str]:
    """Each with its traceback."""
    return [
        f"{log.name}: {entry}"
        for log in place.logs
        for entry in ENTRY.split(log.read_text())
        if FAULTS.search(entry)
    ]


async def _count(place: Town, query: TextClause) -> int:
    async with place.database.as_worker() as session:
        return int((await session.execute(query)).scalar_one())


async def _events(place: Town) -> dict[str, Event]:
    async with place.database.as_worker() as session:
        rows = (await session.execute(EVENTS)).all()
    return {
        str(row.id): Event(
            request_id=str(row.id),
            tenant=row.slug,
            end_user=row.name or "",
            outcome=row.outcome,
            counts=Counts(row.prompt_tokens, row.cached_tokens, row.completion_tokens),
            cost_nano=row.cost_nano,
        )
        for row in rows
    }
