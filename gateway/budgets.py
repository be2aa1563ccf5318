"""How much may be spent until when: caps of calendar periods, and what stands against each.

What is spent moves with the usage events, in their transaction; what is held is the sum of open
holds. `limits` asks both before it holds more. Knows no prices and sends no alerts: those are rows
of `webhook_deliveries`.
"""

import datetime
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.errors import Conflict, InvalidRequest, NotFound
from gateway.tables import Budget, UsageCredit, UsageEvent, new_id

Kind = Literal["hard", "soft"]
BudgetPeriod = Literal["day", "week", "month"]
# A billion USD; far below where BIGINT would overflow.
CapNano = Annotated[int, msgspec.Meta(ge=0, le=10**18)]
AlertPercent = Annotated[int, msgspec.Meta(ge=1, le=1000)]
AlertPercents = Annotated[list[AlertPercent], msgspec.Meta(max_length=10)]
DEFAULT_ALERT_PERCENTS = (50, 80, 100)

SPEND = text("SELECT spend_budgets(:tenants, :keys, :costs, :moments)")

# Settlers hold it shared: see `spend_budgets` in migration 0005.
LOCK_BUDGETS = text("SELECT pg_advisory_xact_lock(hashtextextended('manylora budgets', 0))")

# One statement, so that money that moves from held to spent meanwhile is seen once.
STANDINGS = text("""
    SELECT b.id, b.api_key_id, b.kind, b.period, b.time_zone, b.cap_nano, b.alert_percents,
           starts.at AS starts_at, budget_window_end(b.period, b.time_zone, starts.at) AS ends_at,
           coalesce(w.spent_nano, 0) AS spent_nano,
           CAST(coalesce((
               SELECT sum(h.amount_nano) FROM holds h
               WHERE h.tenant_id = b.tenant_id AND h.state = 'open'
                 AND (b.api_key_id IS NULL OR h.api_key_id = b.api_key_id)
           ), 0) AS bigint) AS held_nano
    FROM budgets b
    CROSS JOIN LATERAL (
        SELECT budget_window_start(b.period, b.time_zone, clock_timestamp()) AS at
    ) AS starts
    LEFT JOIN budget_windows w ON w.budget_id = b.id AND w.starts_at = starts.at
    WHERE b.tenant_id = :tenant_id
    ORDER BY b.id
""")


@dataclass(frozen=True, slots=True)
class Spending:
    """What one new usage event cost, or, below zero, what a credit gives back."""

    tenant_id: uuid.UUID
    api_key_id: uuid.UUID
    cost_nano: int
    finished_at: datetime.datetime


class Standing(msgspec.Struct, frozen=True):
    """A budget and where it stands in the period that runs now. Money is nano-USD."""

    id: uuid.UUID
    # Null for all of the tenant's keys together.
    api_key_id: uuid.UUID | None
    kind: Kind
    period: BudgetPeriod
    time_zone: str
    cap_nano: int
    alert_percents: list[int]
    starts_at: datetime.datetime
    ends_at: datetime.datetime
    spent_nano: int
    # What running requests may still come to cost.
    held_nano: int


async def spend(session: AsyncSession, spendings: Sequence[Spending]) -> None:
    """Add what new usage events cost to the budgets they fall into, as the worker.

    Belongs in the transaction that inserts the events and credits, before it touches a hold.
    """
    if spendings:
        await session.execute(
            SPEND,
            {
                "tenants": [each.tenant_id for each in spendings],
                "keys": [each.api_key_id for each in spendings],
                "costs": [each.cost_nano for each in spendings],
                "moments": [each.finished_at for each in spendings],
            },
        )


async def standings(session: AsyncSession, tenant_id: uuid.UUID) -> list[Standing]:
    """All budgets of a tenant, oldest first."""
    rows = await session.execute(STANDINGS, {"tenant_id": tenant_id})
    return [Standing(**row) for row in rows.mappings()]


async def create_budget(
    session: AsyncSession,
    *,
    tenant_id: uuid.UUID,
    api_key_id: uuid.UUID | None,
    kind: Kind,
    period: BudgetPeriod,
    time_zone: str,
    cap_nano: int,
    alert_percents: Sequence[int],
) -> Budget:
    """Add a budget, as the worker; what was spent in its running period counts from the start.

    Raises InvalidRequest or Conflict.
    """
    await _check_time_zone(session, time_zone)
    # Every event is settled by now and counted here, or is counted by its settler.
    await session.execute(LOCK_BUDGETS)
    budget = Budget(
        id=new_id(),
        tenant_id=tenant_id,
        api_key_id=api_key_id,
        kind=kind,
        period=period,
        time_zone=time_zone,
        cap_nano=cap_nano,
        alert_percents=sorted(set(alert_percents)),
    )
    try:
        async with session.begin_nested():
            session.add(budget)
    except IntegrityError as error:
        raise Conflict(
            f"There is a {kind} budget of the {period} already: change that one.", param="period"
        ) from error
    await _count_past(session, budget)
    return budget


async def get_budget(
    session: AsyncSession, *, tenant_id: uuid.UUID, budget_id: uuid.UUID
) -> Budget:
    """A tenant's budget, locked for a change. Raises NotFound."""
    query = select(Budget).where(Budget.id == budget_id, Budget.tenant_id == tenant_id)
    budget = (await session.scalars(query.with_for_update())).one_or_none()
    if budget is None:
        raise NotFound("There is no such budget.")
    return budget


async def _count_past(session: AsyncSession, budget: Budget) -> None:
    starts_at = await session.scalar(
        select(func.budget_window_start(budget.period, budget.time_zone, func.clock_timestamp()))
    )
    costs = select(func.coalesce(func.sum(UsageEvent.cost_nano), 0)).where(
        UsageEvent.tenant_id == budget.tenant_id, UsageEvent.finished_at >= starts_at
    )
    # A credit falls into the period of its retry, which is never the smaller of the two.
    given_back = (
        select(func.coalesce(func.sum(UsageCredit.amount_nano), 0))
        .join(UsageEvent, UsageEvent.id == UsageCredit.id)
        .where(UsageCredit.tenant_id == budget.tenant_id, UsageCredit.at >= starts_at)
    )
    if budget.api_key_id is not None:
        costs = costs.where(UsageEvent.api_key_id == budget.api_key_id)
        given_back = given_back.where(UsageEvent.api_key_id == budget.api_key_id)
    await session.execute(
        text(
            "INSERT INTO budget_windows (budget_id, starts_at, tenant_id, spent_nano)"
            " VALUES (:budget_id, :starts_at, :tenant_id, :spent_nano)"
        ),
        {
            "budget_id": budget.id,
            "starts_at": starts_at,
            "tenant_id": budget.tenant_id,
            "spent_nano": int(
                (await session.scalar(costs) or 0) - (await session.scalar(given_back) or 0)
            ),
        },
    )


async def _check_time_zone(session: AsyncSession, time_zone: str) -> None:
    known = text("SELECT EXISTS (SELECT FROM pg_timezone_names WHERE name = :name)")
    is_name = time_zone.isprintable() and len(time_zone) < 64
    if not is_name or not (await session.execute(known, {"name": time_zone})).scalar_one():
        raise InvalidRequest(
            "time_zone must be a name of the IANA time zone database, such as Europe/Berlin.",
            param="time_zone",
        )
