"""Whatever happens to a tenant's requests, in any order, no nano-USD is lost, doubled or above a
cap: gateways die and come back, or never do, prices change, months close, money runs out."""

import asyncio
import datetime
import itertools
import random
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from gateway.billing.periods import close, month_end, month_of
from gateway.billing.verify import prove
from gateway.budgets import create_budget, standings
from gateway.database import Database
from gateway.errors import BudgetSpent
from gateway.journal import Journal, Meter, Opened
from gateway.ledger import Ledger, settle
from gateway.limits import Admission, admit
from gateway.prices import PriceScope, Rates, bill, set_price
from gateway.tables import Hold, StatementLine, UsageEvent, UsageRollup, new_id
from tests.conftest import Home, execute
from tests.gateway.money import Shop, a_base_model, a_shop, frame_of

PROMPT = 10
MAX_TOKENS = (1, 40, 700)
FORGET = """
    UPDATE gateway_instances SET heartbeat_at = heartbeat_at - interval '2 hours'
    WHERE id = '{name}';
    UPDATE holds SET created_at = created_at - interval '2 hours'
    WHERE gateway_instance_id = '{name}' AND state = 'open'
"""


@dataclass
class Asked:
    """One request, with what a witness beside its client has seen of it."""

    admission: Admission
    meter: Meter
    gateway: int
    sequence_id: int
    is_streamed: bool
    generated: int = 0
    # Paid for, and so allowed to be shown.
    shown: int = 0
    # Filled at its end: the exact cost. A gateway that never came back may have owed less.
    owed_nano: int | None = None
    may_owe_less: bool = False

    def look(self) -> None:
        self.shown = min(self.generated, self.meter.funded_output_tokens)

    def cost_nano(self) -> int:
        tokens = {"prompt_tokens": PROMPT, "cached_tokens": 0, "completion_tokens": self.shown}
        return bill(self.admission.price, **tokens).cost_nano if self.shown else 0


@dataclass
class Town:
    """A tenant with hard budgets, and the gateways of one host."""

    home: Home
    database: Database
    shop: Shop
    folder: Path
    journals: dict[int, Journal] = field(default_factory=dict)
    ledgers: dict[int, Ledger] = field(default_factory=dict)
    names: dict[int, uuid.UUID] = field(default_factory=dict)
    running: list[Asked] = field(default_factory=list)
    ended: list[Asked] = field(default_factory=list)
    month: datetime.date = field(
        default_factory=lambda: month_of(datetime.datetime.now(datetime.UTC))
    )
    sequence_ids: Any = field(default_factory=itertools.count)

    async def start(self, gateway: int) -> None:
        if gateway in self.ledgers:
            return
        name = self.names.setdefault(gateway, new_id())
        journal = self.journals[gateway] = Journal.open(self.folder, name)
        ledger = self.ledgers[gateway] = Ledger(self.database, journal)
        await ledger.start()

    async def kill(self, gateway: int, *, has_committed: bool, is_forgotten: bool) -> None:
        """As `kill -9` does, perhaps between a commit and the note of it in the journal.

        One that is forgotten was not heard of for longer than its lease.
        """
        if gateway not in self.ledgers:
            return
        ledger, journal = self.ledgers.pop(gateway), self.journals.pop(gateway)
        for task in ledger._tasks:
            task.cancel()
        await asyncio.gather(*ledger._tasks, return_exceptions=True)
        if has_committed:
            async with self.database.as_worker() as session:
                await settle(session, list(ledger._queue.values()))
        journal._segments.close(keep=True)
        journal._lock.release()
        for each in [each for each in self.running if each.gateway == gateway]:
            self.running.remove(each)
            self.ended.append(each)
            each.owed_nano = each.cost_nano() if each.is_streamed else 0
            each.may_owe_less = is_forgotten
        for each in self.ended:
            if is_forgotten and each.admission.request_id in ledger._queue:
                each.may_owe_less = True
        if is_forgotten:
            await self._forget(gateway)

    async def _forget(self, gateway: int) -> None:
        await execute(self.home.superuser_url, FORGET.format(name=self.names[gateway]))
        for ledger in list(self.ledgers.values())[:1]:
            await ledger.sweep(judges_others=True)

    async def ask(self, gateway: int, max_tokens: int, *, is_streamed: bool) -> None:
        if gateway not in self.ledgers:
            return
        journal = self.journals[gateway]
        try:
            admission = await admit(
                self.database,
                self.shop.principal,
                self.shop.target,
                request_id=new_id(),
                endpoint="completions",
                prompt_tokens=PROMPT,
                max_tokens=max_tokens,
                gateway_instance_id=journal.instance_id,
            )
        except BudgetSpent:
            return
        sequence_id = next(self.sequence_ids)
        meter = journal.opened(
            Opened.of(
                self.shop.principal,
                self.shop.target,
                admission,
                endpoint="completions",
                is_streamed=is_streamed,
                prompt_tokens=PROMPT,
                sequence_ids=[sequence_id],
            )
        )
        meter.is_budgeted = admission.is_budgeted
        self.running.append(Asked(admission, meter, gateway, sequence_id, is_streamed))

    def generate(self, which: int, num_tokens: int) -> None:
        if self.running:
            each = self.running[which % len(self.running)]
            most = each.admission.max_output_tokens
            each.generated = min(each.generated + num_tokens, most)
            self.journals[each.gateway].on_frame(frame_of((each.sequence_id, each.generated)))
            each.look()

    async def fund(self, which: int) -> None:
        if self.running:
            each = self.running[which % len(self.running)]
            await self.ledgers[each.gateway].fund(each.meter)
            each.look()

    def end(self, which: int, *, is_sent: bool) -> None:
        if self.running:
            each = self.running.pop(which % len(self.running))
            # A heartbeat may have paid for more since.
            each.look()
            outcome = "stop" if is_sent else "abort"
            shown = self.ledgers[each.gateway].close(
                each.admission.request_id, outcome, sent=is_sent
            )
            each.owed_nano = each.cost_nano() if each.is_streamed or is_sent else 0
            assert shown.cost_nano == each.owed_nano
            self.ended.append(each)

    async def change_price(self, input_nano: int, output_nano: int) -> None:
        rates = Rates(input_nano_per_million=input_nano, output_nano_per_million=output_nano)
        async with self.database.as_worker() as session:
            await set_price(session, PriceScope(self.shop.base_model.id), rates=rates)

    async def close_month(self) -> None:
        """What is settled from now on is late: it belongs to the next statement."""
        end = month_end(self.month)
        await close(self.database, self.month, now=end, tenant_id=self.shop.tenant.id)
        self.month = month_of(end)

    async def check_caps(self) -> None:
        async with self.database.as_tenant(self.shop.tenant.id) as session:
            for each in await standings(session, self.shop.tenant.id):
                assert type(each.held_nano) is type(each.spent_nano) is int
                assert each.held_nano + each.spent_nano <= each.cap_nano

    async def come_to_rest(self) -> None:
        while self.running:
            self.end(0, is_sent=True)
        for gateway in list(self.names):
            await self.start(gateway)
        for ledger in self.ledgers.values():
            await ledger.stop()
        for journal in self.journals.values():
            journal.close()

    async def check_sums(self) -> None:
        ours = self.shop.tenant.id
        async with self.database.as_worker() as session:
            billed = {
                row.id: row.cost_nano
                for row in await session.scalars(
                    select(UsageEvent).where(UsageEvent.tenant_id == ours)
                )
            }
            rolled, stated = [
                int(await session.scalar(select(func.sum(column)).where(of == ours)) or 0)
                for column, of in (
                    (UsageRollup.cost_nano, UsageRollup.tenant_id),
                    (StatementLine.amount_nano, StatementLine.tenant_id),
                )
            ]
            held = await session.scalar(
                select(func.count()).where(Hold.tenant_id == ours, Hold.state == "open")
            )
            spent = {each.spent_nano for each in await standings(session, ours)}
        for each in self.ended:
            assert each.owed_nano is not None
            cost_nano = billed.pop(each.admission.request_id, 0)
            assert cost_nano == each.owed_nano or (each.may_owe_less and cost_nano < each.owed_nano)
            assert bool(cost_nano) <= bool(each.shown)
        assert not billed
        assert held == 0
        assert rolled == stated
        assert spent == {rolled}


NUM_STEPS = 80
# How often each happens.
STEPS = {
    "ask": 20,
    "generate": 30,
    "fund": 8,
    "end": 12,
    "kill": 4,
    "start": 8,
    "drain": 4,
    "price": 4,
    "close": 2,
}
SLUGS = (f"h{number}" for number in itertools.count())


async def take_a_step(town: Town, dice: random.Random) -> None:
    gateway, which = dice.randrange(2), dice.randrange(100)
    [step] = dice.choices(list(STEPS), list(STEPS.values()))
    match step:
        case "ask":
            await town.ask(gateway, dice.choice(MAX_TOKENS), is_streamed=dice.random() < 0.7)
        case "generate":
            town.generate(which, dice.choice((1, 30, 400)))
        case "fund":
            await town.fund(which)
        case "end":
            town.end(which, is_sent=dice.random() < 0.7)
        case "kill":
            await town.kill(
                gateway, has_committed=dice.random() < 0.5, is_forgotten=dice.random() < 0.3
            )
        case "start":
            await town.start(gateway)
        case "drain" if gateway in town.ledgers:
            await town.ledgers[gateway].drain()
        case "price":
            await town.change_price(dice.randrange(10**7), dice.randrange(10**8))
        case "close":
            await town.close_month()


@settings(
    max_examples=12,
    deadline=None,
    # Making an example smaller takes minutes.
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(dice=st.randoms(use_true_random=True))
async def test_any_history_of_a_tenant_adds_up_and_stays_below_its_caps(
    home: Home, database: Database, tmp_path: Path, dice: random.Random
) -> None:
    slug = next(SLUGS)
    shop = await a_shop(database, slug, await a_base_model(database, f"base-of-{slug}"))
    async with database.as_worker() as session:
        for key_id in (None, shop.key.id):
            await create_budget(
                session,
                tenant_id=shop.tenant.id,
                api_key_id=key_id,
                kind="hard",
                period="month",
                time_zone="UTC",
                cap_nano=price_of_tokens(shop, dice.randrange(500, 20_000)),
                alert_percents=[],
            )
    town = Town(home, database, shop, tmp_path / slug)
    for gateway in (0, 1):
        await town.start(gateway)
    for _ in range(NUM_STEPS):
        await take_a_step(town, dice)
        await town.check_caps()
    await town.come_to_rest()
    await town.check_caps()
    await town.close_month()
    await town.check_sums()
    assert (await prove(database)).mismatches == []


def price_of_tokens(shop: Shop, num_tokens: int) -> int:
    price = bill(shop.price, prompt_tokens=PROMPT, cached_tokens=0, completion_tokens=num_tokens)
    return price.cost_nano
