"""A month that is closed stays as it is, and every nano-USD is in exactly one statement."""

import asyncio
import datetime
import itertools
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select, update

from gateway import audit
from gateway.billing.documents import LineView, StatementView, get_statement, to_html
from gateway.billing.periods import GRACE, advance, close, month_end, open_periods
from gateway.billing.verify import Mismatch, prove
from gateway.cli import main
from gateway.database import Database
from gateway.errors import InvalidRequest
from gateway.journal import Journal, Opened, Settlement
from gateway.ledger import settle
from gateway.prices import Price, PriceScope, Rates, bill, set_price
from gateway.tables import (
    Adapter,
    AdapterVersion,
    BillingAccount,
    BillingPeriod,
    Chore,
    GatewayInstance,
    Statement,
    StatementLine,
    StorageHour,
    Tenant,
    UsageCredit,
    UsageEvent,
    UsageRollup,
    new_id,
)
from tests.conftest import Home, execute
from tests.gateway.money import Shop, a_base_model, a_shop, frame_of, price_of

INSTANCE = uuid.UUID(int=99)
JUNE, JULY, AUGUST = (datetime.date(2026, month, 1) for month in (6, 7, 8))
IN_JUNE = datetime.datetime(2026, 6, 30, 23, 59, 59, tzinfo=datetime.UTC)
IN_JULY = datetime.datetime(2026, 7, 14, tzinfo=datetime.UTC)
IN_SEPTEMBER = datetime.datetime(2026, 9, 15, tzinfo=datetime.UTC)


@pytest.fixture
async def shop(database: Database) -> Shop:
    async with database.as_worker() as session:
        session.add(GatewayInstance(id=INSTANCE, host="here", epoch=1))
    return await a_shop(database, "acme", await a_base_model(database))


async def use(
    database: Database,
    shop: Shop,
    at: datetime.datetime,
    *,
    tokens: int = 7,
    price: Price | None = None,
    **changes: Any,
) -> int:
    """One request that ended then; what it cost."""
    pinned = price or shop.price
    opened: Opened = shop.request(INSTANCE, started_at=at, price=pinned, **changes)
    charged = bill(pinned, prompt_tokens=10, cached_tokens=4, completion_tokens=tokens)
    async with database.as_worker() as session:
        await settle(session, [Settlement(opened, "stop", at, charged)])
    return charged.cost_nano


async def statements(database: Database) -> dict[str, Statement]:
    async with database.as_worker() as session:
        return {row.number: row for row in await session.scalars(select(Statement))}


async def lines(database: Database, number: str) -> list[StatementLine]:
    query = (
        select(StatementLine)
        .join(Statement, Statement.id == StatementLine.statement_id)
        .where(Statement.number == number)
        .order_by(StatementLine.number)
    )
    async with database.as_worker() as session:
        return list((await session.scalars(query)).all())


async def states(database: Database) -> dict[datetime.date, str]:
    async with database.as_worker() as session:
        rows = await session.execute(select(BillingPeriod.month, BillingPeriod.state))
        return {row.month: row.state for row in rows}


async def differences(database: Database) -> list[Mismatch]:
    return (await prove(database)).mismatches


async def test_a_months_lines_add_up_to_its_events_to_the_nano(
    database: Database, shop: Shop
) -> None:
    costs = [await use(database, shop, IN_JULY, tokens=n) for n in range(1, 30)]
    costs.append(await use(database, shop, IN_JULY, adapter_id=None, adapter_version_id=None))
    await close(database, JULY, now=IN_SEPTEMBER)

    made = await lines(database, "acme-2026-07")
    assert sum(line.amount_nano for line in made) == sum(costs)
    assert [(line.unit, line.quantity) for line in made if line.adapter_id] == [
        ("input_tokens", 29 * 6),
        ("cached_input_tokens", 29 * 4),
        ("output_tokens", sum(range(1, 30))),
        ("roundings", 29),
    ]
    for line in made:
        if line.rate_nano is not None:
            assert abs(line.amount_nano * 1_000_000 - line.quantity * line.rate_nano) <= 500_000
    statement = (await statements(database))["acme-2026-07"]
    assert statement.total_nano == sum(costs)
    assert statement.payable_cents * 10_000_000 + statement.carried_out_nano == sum(costs)
    assert await differences(database) == []


async def test_tokens_of_batches_are_lines_of_their_own_at_their_own_rate(
    database: Database, shop: Shop
) -> None:
    rates = Rates(
        input_nano_per_million=4_000_001,
        cached_input_nano_per_million=1_000_000,
        output_nano_per_million=9_000_000,
        batch_discount_bp=2_500,
    )
    async with database.as_worker() as session:
        full = price_of(await set_price(session, PriceScope(shop.base_model.id), rates=rates))
    # Three quarters of 4,000,001 are 3,000,000.75.
    less = Price(full.id, 3_000_001, 750_000, 6_750_000)
    costs = [await use(database, shop, IN_JULY, price=full)]
    for tokens in (5, 6):
        costs.append(
            await use(
                database,
                shop,
                IN_JULY,
                tokens=tokens,
                price=less,
                endpoint="batch.chat.completions",
            )
        )
    await close(database, JULY, now=IN_SEPTEMBER)
    made = await lines(database, "acme-2026-07")
    assert [(line.unit, line.quantity, line.rate_nano) for line in made] == [
        ("input_tokens", 6, 4_000_001),
        ("cached_input_tokens", 4, 1_000_000),
        ("output_tokens", 7, 9_000_000),
        ("batch_input_tokens", 12, 3_000_001),
        ("batch_cached_input_tokens", 8, 750_000),
        ("batch_output_tokens", 11, 6_750_000),
        ("roundings", 3, None),
    ]
    assert sum(line.amount_nano for line in made) == sum(costs)
    late = await use(database, shop, IN_JULY, price=less, endpoint="batch.completions", tokens=100)
    await close(database, AUGUST, now=IN_SEPTEMBER)
    adjustments = await lines(database, "acme-2026-08")
    assert sum(line.amount_nano for line in adjustments) == late
    assert ("batch_output_tokens", 100) in {(line.unit, line.quantity) for line in adjustments}
    assert await differences(database) == []


async def test_what_comes_late_is_an_adjustment_of_the_next_statement(
    database: Database, shop: Shop
) -> None:
    await use(database, shop, IN_JUNE)
    await close(database, JUNE, now=IN_SEPTEMBER)
    before = (await statements(database))["acme-2026-06"], await lines(database, "acme-2026-06")
    late = await use(database, shop, IN_JUNE, tokens=100)
    on_time = await use(database, shop, IN_JULY)
    assert await differences(database) == []
    await close(database, JULY, now=IN_SEPTEMBER)

    july = await lines(database, "acme-2026-07")
    adjustments = [line for line in july if line.usage_month == JUNE]
    assert sum(line.amount_nano for line in adjustments) == late
    assert ("output_tokens", 100) in {(line.unit, line.quantity) for line in adjustments}
    assert sum(line.amount_nano for line in july) == late + on_time
    after = (await statements(database))["acme-2026-06"], await lines(database, "acme-2026-06")
    assert [row.id for row in after[1]] == [row.id for row in before[1]]
    assert after[0].total_nano == before[0].total_nano
    assert await differences(database) == []


async def test_closing_twice_and_at_once_makes_one_statement(
    database: Database, shop: Shop
) -> None:
    await use(database, shop, IN_JULY)
    at_once = await asyncio.gather(*(close(database, JULY, now=IN_SEPTEMBER) for _ in range(4)))
    assert [each.number for closed in at_once for each in closed] == ["acme-2026-07"]
    assert await close(database, JULY, now=IN_SEPTEMBER) == []
    assert list(await statements(database)) == ["acme-2026-07"]


async def test_a_month_is_open_then_in_grace_then_closed_by_itself(
    database: Database, shop: Shop
) -> None:
    await use(database, shop, IN_JULY)
    assert await advance(database, now=IN_JULY) == []
    assert await states(database) == {JULY: "open"}
    over = month_end(JULY)
    assert await advance(database, now=over) == []
    assert await states(database) == {JULY: "grace", AUGUST: "open"}
    [closed] = await advance(database, now=over + GRACE)
    assert (closed.number, await states(database)) == (
        "acme-2026-07",
        {JULY: "closed", AUGUST: "open"},
    )


async def test_a_month_that_runs_cannot_be_closed(database: Database, shop: Shop) -> None:
    await use(database, shop, IN_JULY)
    with pytest.raises(InvalidRequest, match="ends at 2026-08-01"):
        await close(database, JULY, now=IN_JULY)


async def test_months_close_in_order_and_quiet_ones_say_nothing_to_pay(
    database: Database, shop: Shop
) -> None:
    await use(database, shop, IN_JUNE)
    closed = await close(database, AUGUST, now=IN_SEPTEMBER)
    assert [each.number for each in closed] == ["acme-2026-06", "acme-2026-07", "acme-2026-08"]
    assert [each.num_lines for each in closed] == [4, 0, 0]


async def test_less_than_a_cent_goes_to_the_next_statement(database: Database, shop: Shop) -> None:
    rates = Rates(output_nano_per_million=4_000_000 * 1_000_000)
    async with database.as_worker() as session:
        row = await set_price(session, PriceScope(shop.base_model.id), rates=rates)
    for at in (IN_JUNE, IN_JULY):
        await use(database, shop, at, tokens=1, price=price_of(row))
    await close(database, JULY, now=IN_SEPTEMBER)
    made = await statements(database)
    june, july = made["acme-2026-06"], made["acme-2026-07"]
    assert (june.payable_cents, june.carried_out_nano) == (0, 4_000_000)
    assert (july.carried_in_nano, july.payable_cents) == (4_000_000, 1)
    assert july.carried_out_nano == -2_000_000
    assert await differences(database) == []


async def test_a_credit_is_a_line_below_nothing(database: Database, shop: Shop) -> None:
    paid = await use(database, shop, IN_JULY)
    async with database.as_worker() as session:
        event = (await session.scalars(select(UsageEvent))).one()
        session.add(
            UsageCredit(
                id=event.id,
                tenant_id=event.tenant_id,
                retry_id=event.id,
                base_model_id=event.base_model_id,
                adapter_id=event.adapter_id,
                price_version_id=event.price_version_id,
                at=IN_JULY,
                amount_nano=paid - 1,
            )
        )
    await close(database, JULY, now=IN_SEPTEMBER)
    [*_, credit] = await lines(database, "acme-2026-07")
    assert (credit.unit, credit.quantity, credit.amount_nano) == ("retries", 1, 1 - paid)
    assert (await statements(database))["acme-2026-07"].total_nano == 1
    assert await differences(database) == []


async def test_a_statement_keeps_the_name_and_address_of_its_day(
    database: Database, shop: Shop
) -> None:
    await use(database, shop, IN_JULY)
    async with database.as_worker() as session:
        session.add(BillingAccount(tenant_id=shop.tenant.id, bill_to="Acme\nOne Street"))
    await close(database, JULY, now=IN_SEPTEMBER)
    async with database.as_worker() as session:
        await session.execute(update(Tenant).values(name="Other"))
        await session.execute(update(BillingAccount).values(bill_to="Elsewhere"))
    statement = (await statements(database))["acme-2026-07"]
    assert (statement.tenant_name, statement.bill_to) == ("acme", "Acme\nOne Street")


async def test_a_statement_names_an_adapter_that_is_shared_no_more(
    database: Database, shop: Shop
) -> None:
    owner = await a_shop(database, "globex", (shop.base_model, shop.price))
    theirs = {"adapter_id": owner.adapter.id, "adapter_version_id": owner.version.id}
    await use(database, shop, IN_JULY, **theirs)
    await close(database, JULY, now=IN_SEPTEMBER)
    async with database.as_tenant(shop.tenant.id) as session:
        statement = await get_statement(session, "acme-2026-07")
    assert {line.adapter for line in statement.lines} == {"globex-sql"}


def another_version(shop: Shop, *, deleted_at: datetime.datetime) -> AdapterVersion:
    return AdapterVersion(
        id=new_id(),
        tenant_id=shop.tenant.id,
        adapter_id=shop.adapter.id,
        base_model_id=shop.base_model.id,
        number=2,
        state="ready",
        weights_digest="e" * 64,
        version_digest="f" * 64,
        rank=8,
        num_modules=1,
        size_bytes=1,
        deleted_at=deleted_at,
    )


async def test_storage_is_metered_hour_by_hour_also_for_hours_when_nobody_ran(
    database: Database, shop: Shop, home: Home
) -> None:
    gib = 1 << 30
    begun = datetime.datetime(2026, 7, 1, 0, 30, tzinfo=datetime.UTC)
    ended = datetime.datetime(2026, 7, 3, 0, 30, tzinfo=datetime.UTC)
    rates = Rates(storage_nano_per_gib_hour=1001)
    async with database.as_worker() as session:
        await set_price(session, PriceScope(shop.base_model.id), rates=rates)
        await session.execute(update(Chore).values(done_until=begun.replace(minute=0)))
        await session.execute(update(Adapter).values(deleted_at=ended))
        session.add(another_version(shop, deleted_at=begun))
    for statement in (
        "UPDATE price_versions SET effective = '[2026-01-01,2026-01-02)'"
        " WHERE storage_nano_per_gib_hour = 0",
        "UPDATE price_versions SET effective = '[2026-01-02,)' WHERE storage_nano_per_gib_hour > 0",
        "UPDATE adapters SET created_at = '2026-07-01 00:30:00+00'",
        "UPDATE adapter_versions SET created_at = '2026-07-01 00:30:00+00', size_bytes = 1 << 29",
    ):
        await execute(home.superuser_url, statement)

    await open_periods(database, now=begun + datetime.timedelta(hours=5))
    await close(database, JULY, now=IN_SEPTEMBER)

    async with database.as_worker() as session:
        hours = (await session.scalars(select(StorageHour.hour).order_by(StorageHour.hour))).all()
    first = datetime.datetime(2026, 7, 1, 1, tzinfo=datetime.UTC)
    assert hours == [first + datetime.timedelta(hours=n) for n in range(48)]
    weight, rest = await lines(database, "acme-2026-07")
    assert (weight.kind, weight.unit, weight.quantity) == ("storage", "byte_hours", 24 * gib)
    assert (weight.amount_nano, rest.unit, rest.amount_nano) == (24 * 1001, "roundings", -24)
    assert await differences(database) == []


@pytest.mark.parametrize(
    ("tampering", "kind"),
    [
        ("UPDATE usage_events SET cost_nano = cost_nano + 1", "event_cost"),
        ("UPDATE usage_events SET completion_tokens = completion_tokens + 1", "rollup"),
        ("DELETE FROM usage_events", "settled_hold_without_event"),
        ("DELETE FROM holds", "event_without_settled_hold"),
        ("UPDATE usage_rollups SET requests = requests + 1", "rollup"),
        ("UPDATE statement_lines SET quantity = quantity + 1 WHERE number = 1", "statement_lines"),
        ("UPDATE statement_lines SET amount_nano = amount_nano + 1 WHERE number = 1", "statement"),
        ("UPDATE statements SET total_nano = 0, carried_out_nano = 0", "statement"),
        ("UPDATE audit_log SET subject = 'x'", "audit"),
        (
            "INSERT INTO usage_credits SELECT id, tenant_id, id, base_model_id, adapter_id,"
            " price_version_id, finished_at, cost_nano + 1 FROM usage_events",
            "credit",
        ),
    ],
)
async def test_whatever_is_changed_behind_the_triggers_shows(
    database: Database, shop: Shop, home: Home, tampering: str, kind: str
) -> None:
    await use(database, shop, IN_JULY)
    await close(database, JULY, now=IN_SEPTEMBER)
    async with database.as_worker() as session:
        await audit.record(
            session,
            tenant_id=shop.tenant.id,
            actor_key_id=None,
            action="test",
            subject="s",
            details={},
        )
    assert await differences(database) == []
    await execute(home.superuser_url, f"SET session_replication_role = replica; {tampering}")
    assert kind in {each.kind for each in await differences(database)}


MOMENTS = st.datetimes(
    datetime.datetime(2026, 6, 1),
    datetime.datetime(2026, 9, 14),
    timezones=st.just(datetime.UTC),
)
STEPS = st.one_of(
    st.tuples(st.just("use"), MOMENTS, st.integers(1, 5000)),
    st.tuples(st.just("price"), st.integers(0, 10**12), st.integers(0, 10**12)),
    st.tuples(st.just("close"), st.sampled_from([JUNE, JULY, AUGUST]), st.just(0)),
)
SLUGS = (f"t{number}" for number in itertools.count())


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(history=st.lists(STEPS, min_size=3, max_size=20))
async def test_any_history_of_use_prices_and_closings_adds_up(
    database: Database, history: list[tuple[str, Any, Any]]
) -> None:
    async with database.as_worker() as session:
        if await session.get(GatewayInstance, INSTANCE) is None:
            session.add(GatewayInstance(id=INSTANCE, host="here", epoch=1))
    slug = next(SLUGS)
    shop = await a_shop(database, slug, await a_base_model(database, f"base-of-{slug}"))
    price, spent_nano = shop.price, 0
    for step, first, second in history:
        match step:
            case "use":
                spent_nano += await use(database, shop, first, tokens=second, price=price)
            case "price":
                rates = Rates(input_nano_per_million=first, output_nano_per_million=second)
                async with database.as_worker() as session:
                    row = await set_price(session, PriceScope(shop.base_model.id), rates=rates)
                price = price_of(row)
            case "close":
                await close(database, first, now=IN_SEPTEMBER)
    await close(database, AUGUST, now=IN_SEPTEMBER)
    late = await close(
        database, datetime.date(2026, 10, 1), now=month_end(datetime.date(2026, 10, 1))
    )
    async with database.as_worker() as session:
        ours = StatementLine.tenant_id == shop.tenant.id
        stated = await session.scalar(select(func.sum(StatementLine.amount_nano)).where(ours))
        owed = await session.scalar(
            select(func.sum(UsageEvent.cost_nano)).where(UsageEvent.tenant_id == shop.tenant.id)
        )
        rolled = await session.scalar(
            select(func.sum(UsageRollup.cost_nano)).where(UsageRollup.tenant_id == shop.tenant.id)
        )
    assert int(stated or 0) == int(owed or 0) == int(rolled or 0) == spent_nano
    assert bool(late) == bool(spent_nano or owed is not None)
    assert await differences(database) == []


async def run_command(home: Home, *words: str, folder: Path) -> Result:
    """The command in a thread: it has an event loop of its own."""
    arguments = [*words, "--database-url", home.worker_url, "--data-dir", str(folder)]
    return await asyncio.to_thread(CliRunner().invoke, main, arguments)


async def test_the_commands_close_a_month_and_prove_it(
    database: Database, shop: Shop, home: Home, tmp_path: Path
) -> None:
    at = datetime.datetime(2026, 3, 3, tzinfo=datetime.UTC)
    journal = Journal.open(tmp_path / "journal")
    meter = journal.opened(shop.request(INSTANCE, started_at=at))
    journal.on_frame(frame_of((1, 5)))
    settlement = journal.closed(meter.opened.request_id, "stop")
    await use(database, shop, at)

    closed = await run_command(home, "billing", "close", "--month", "2026-03", folder=tmp_path)
    assert closed.exit_code == 0, closed.output
    assert "acme-2026-03" in closed.output
    proved = await run_command(home, "billing", "verify", folder=tmp_path)
    assert proved.exit_code == 0, proved.output
    assert "1, 1 still to be settled" in proved.output
    assert "all books agree" in proved.output

    charged = settlement.bill
    assert charged is not None
    cheaper = bill(shop.price, prompt_tokens=10, cached_tokens=0, completion_tokens=1)
    async with database.as_worker() as session:
        await settle(session, [replace(settlement, bill=cheaper)])
    denied = await run_command(home, "billing", "verify", folder=tmp_path)
    assert denied.exit_code == 1
    assert f"DIFFERENCE journal: {settlement.request_id}" in denied.output
    assert f"expected (10, 0, 5, {charged.cost_nano})" in denied.output
    journal.close()


async def test_a_month_that_is_none_is_refused_by_the_command(home: Home, tmp_path: Path) -> None:
    for month, words in (("2026-13", "not a month"), ("2100-01", "ends at 2100-02-01")):
        refused = await run_command(home, "billing", "close", "--month", month, folder=tmp_path)
        assert (refused.exit_code != 0, words in refused.output) == (True, True), refused.output


def test_an_invoice_shows_every_line_and_runs_nothing() -> None:
    line = LineView(
        kind="usage",
        usage_month=JUNE,
        is_adjustment=True,
        model="tiny",
        adapter="acme-sql",
        unit="output_tokens",
        quantity=1234567,
        rate_nano=10_500_001,
        amount_nano=-12_962_955,
    )
    statement = StatementView(
        number="acme-2026-07",
        tenant="acme",
        month=JULY,
        as_of=IN_SEPTEMBER,
        total_nano=-12_962_955,
        carried_in_nano=0,
        payable_cents=-1,
        carried_out_nano=-2_962_955,
        tenant_name="<script>alert(1)</script>",
        bill_to="One Street",
        lines=[line],
    )
    page = to_html(statement)
    assert "<script>" not in page
    for words in ("July 2026", "used in June 2026", "1,234,567", "-0.012962955", "-0.010000000"):
        assert words in page
