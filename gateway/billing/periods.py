"""A tenant's months: open while they run, in grace for what comes late, then closed for good.

Months are those of UTC, for every tenant, so that the days of rollups make up whole months. They
close in order. Closing takes everything that was settled by one moment and that no statement has
yet, whatever month it was used in; what is settled later is for the next statement. Knows nothing
of how a statement looks.
"""

import datetime
import logging
import uuid
from dataclasses import asdict, dataclass

from sqlalchemy import Row, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from gateway import audit
from gateway.billing.lines import Line, unstated_lines
from gateway.billing.storage import meter_storage
from gateway.database import Database
from gateway.errors import InvalidRequest
from gateway.prices import amount
from gateway.tables import BillingAccount, BillingPeriod, Statement, StatementLine, Tenant, new_id

logger = logging.getLogger(__name__)

# Time for the journals of hosts that were down to be replayed.
GRACE = datetime.timedelta(hours=48)
NANO_PER_CENT = 10_000_000

# See the trigger `join_settlement`: whoever settles holds the lock shared until it commits.
SETTLED_NOW = text(
    "SELECT pg_advisory_xact_lock(hashtextextended('settlement', 0)), clock_timestamp() AS moment"
)

# Months that a tenant has no period for: from its first usage on, and none before a month that it
# has. A closed tenant gets one more month after its last usage, for what comes late.
MISSING_PERIODS = text("""
    WITH used AS (
        SELECT tenant_id, min(day) AS first, max(day) AS last FROM (
            SELECT tenant_id, day FROM usage_rollups
            UNION ALL
            SELECT tenant_id, (hour AT TIME ZONE 'UTC')::date FROM storage_hours
        ) AS days GROUP BY tenant_id
    ), begun AS (
        SELECT t.id AS tenant_id, coalesce(
            (SELECT min(p.month) FROM billing_periods p WHERE p.tenant_id = t.id), used.first
        ) AS first, CASE WHEN t.status = 'closed'
            THEN least(CAST(:today AS date), (used.last + interval '1 month')::date)
            ELSE CAST(:today AS date)
        END AS last
        FROM tenants t JOIN used ON used.tenant_id = t.id
    )
    SELECT begun.tenant_id, m::date AS month
    FROM begun
    CROSS JOIN generate_series(
        date_trunc('month', begun.first::timestamp), begun.last::timestamp, interval '1 month'
    ) AS m
    WHERE NOT EXISTS (
        SELECT FROM billing_periods p WHERE p.tenant_id = begun.tenant_id AND p.month = m::date
    )
    ORDER BY month, tenant_id
""")


@dataclass(frozen=True, slots=True)
class Closed:
    """A month of a tenant that was closed just now."""

    number: str
    tenant_id: uuid.UUID
    month: datetime.date
    total_nano: int
    num_lines: int


def month_of(moment: datetime.datetime) -> datetime.date:
    return moment.astimezone(datetime.UTC).date().replace(day=1)


def month_end(month: datetime.date) -> datetime.datetime:
    """The first moment that is not part of the month."""
    after = (month.replace(day=1) + datetime.timedelta(days=32)).replace(day=1)
    return datetime.datetime.combine(after, datetime.time(), datetime.UTC)


async def settled_now(database: Database) -> datetime.datetime:
    """A moment such that what was settled up to it is visible, and nothing comes before it later.

    Waits for the settlements that are being written.
    """
    async with database.as_app() as session:
        moment: datetime.datetime = (await session.execute(SETTLED_NOW)).one().moment
    return moment


async def advance(database: Database, *, now: datetime.datetime) -> list[Closed]:
    """Open the months that tenants use, and close those whose grace is over."""
    await open_periods(database, now=now)
    due = [row for row in await _unclosed(database) if month_end(row.month) + GRACE <= now]
    return await _close_all(database, due)


async def close(
    database: Database,
    month: datetime.date,
    *,
    now: datetime.datetime,
    tenant_id: uuid.UUID | None = None,
    actor_key_id: uuid.UUID | None = None,
) -> list[Closed]:
    """Close a month that is over without waiting for its grace, and all months before it.

    Of one tenant or of all; what is closed already stays as it is. Raises InvalidRequest for a
    month that still runs.
    """
    if month_end(month) > now:
        raise InvalidRequest(
            f"The month {month:%Y-%m} ends at {month_end(month).isoformat()}: close it then.",
            param="month",
        )
    await open_periods(database, now=now)
    due = [
        row
        for row in await _unclosed(database)
        if row.month <= month and tenant_id in (None, row.tenant_id)
    ]
    return await _close_all(database, due, actor_key_id=actor_key_id)


async def open_periods(database: Database, *, now: datetime.datetime) -> None:
    """Make the periods that are missing, and put those into grace whose month is over."""
    await meter_storage(database, until=now)
    today = now.astimezone(datetime.UTC).date()
    async with database.as_worker() as session:
        missing = (await session.execute(MISSING_PERIODS, {"today": today})).all()
        if missing:
            await session.execute(
                insert(BillingPeriod)
                .values([{"id": new_id(), "tenant_id": t, "month": m} for t, m in missing])
                .on_conflict_do_nothing()
            )
        await session.execute(
            update(BillingPeriod)
            .where(BillingPeriod.state == "open", BillingPeriod.month < month_of(now))
            .values(state="grace")
            .execution_options(synchronize_session=False)
        )


async def _unclosed(database: Database) -> list[Row[uuid.UUID, uuid.UUID, datetime.date]]:
    """Periods that are not closed, each tenant's oldest first."""
    query = (
        select(BillingPeriod.id, BillingPeriod.tenant_id, BillingPeriod.month)
        .where(BillingPeriod.state != "closed")
        .order_by(BillingPeriod.month, BillingPeriod.tenant_id)
    )
    async with database.as_worker() as session:
        return list((await session.execute(query)).all())


async def _close_all(
    database: Database,
    due: list[Row[uuid.UUID, uuid.UUID, datetime.date]],
    *,
    actor_key_id: uuid.UUID | None = None,
) -> list[Closed]:
    closed = []
    for row in due:
        as_of = await settled_now(database)
        async with database.as_worker() as session:
            made = await close_period(session, row.id, as_of=as_of)
            if made is not None:
                await audit.record(
                    session,
                    tenant_id=made.tenant_id,
                    actor_key_id=actor_key_id,
                    action="billing.close",
                    subject=made.number,
                    details={"as_of": as_of, "total_nano": made.total_nano},
                )
        if made is not None:
            logger.info("period_closed", extra={"statement": made.number})
            closed.append(made)
    return closed


async def close_period(
    session: AsyncSession, period_id: uuid.UUID, *, as_of: datetime.datetime
) -> Closed | None:
    """Write one period's statement and close it, in the caller's transaction.

    None where it is closed already.
    """
    period = (
        await session.scalars(
            select(BillingPeriod)
            .where(BillingPeriod.id == period_id)
            .with_for_update()
            .execution_options(populate_existing=True)
        )
    ).one()
    if period.state == "closed":
        return None
    tenant = await session.get_one(Tenant, period.tenant_id)
    lines = await unstated_lines(session, tenant.id, month=period.month, as_of=as_of)
    total_nano = sum(line.amount_nano for line in lines)
    statement = await _make_statement(session, tenant, period, as_of=as_of, total_nano=total_nano)
    session.add_all(
        _line_of(statement, line, number=number) for number, line in enumerate(lines, start=1)
    )
    await session.flush()
    closed_at = (await session.execute(select(func.clock_timestamp()))).scalar_one()
    period.state, period.closed_at = "closed", closed_at
    await session.flush()
    return Closed(statement.number, tenant.id, period.month, total_nano, len(lines))


async def _make_statement(
    session: AsyncSession,
    tenant: Tenant,
    period: BillingPeriod,
    *,
    as_of: datetime.datetime,
    total_nano: int,
) -> Statement:
    account = await session.get(BillingAccount, tenant.id)
    carried_nano = await _carried(session, tenant.id)
    payable_cents = amount(carried_nano + total_nano, rate_nano=1, per=NANO_PER_CENT)
    statement = Statement(
        id=new_id(),
        tenant_id=tenant.id,
        period_id=period.id,
        number=f"{tenant.slug}-{period.month:%Y-%m}",
        tenant_name=tenant.name,
        bill_to=account.bill_to if account is not None else "",
        as_of=as_of,
        total_nano=total_nano,
        carried_in_nano=carried_nano,
        payable_cents=payable_cents,
        carried_out_nano=carried_nano + total_nano - payable_cents * NANO_PER_CENT,
    )
    session.add(statement)
    await session.flush()
    return statement


def _line_of(statement: Statement, line: Line, *, number: int) -> StatementLine:
    return StatementLine(
        id=new_id(),
        tenant_id=statement.tenant_id,
        statement_id=statement.id,
        number=number,
        **asdict(line),
    )


async def _carried(session: AsyncSession, tenant_id: uuid.UUID) -> int:
    """What the last statement left over."""
    carried_nano: int | None = await session.scalar(
        select(Statement.carried_out_nano)
        .join(BillingPeriod, BillingPeriod.id == Statement.period_id)
        .where(Statement.tenant_id == tenant_id)
        .order_by(BillingPeriod.month.desc())
        .limit(1)
    )
    return carried_nano or 0
