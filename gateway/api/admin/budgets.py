"""Budgets of tenants and of their keys, for operators. Money is nano-USD."""

import uuid

import msgspec
from litestar import delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from sqlalchemy.ext.asyncio import AsyncSession

from gateway import audit, auth, budgets, tenants
from gateway.auth import Principal
from gateway.budgets import (
    DEFAULT_ALERT_PERCENTS,
    AlertPercents,
    BudgetPeriod,
    CapNano,
    Kind,
    Standing,
)
from gateway.database import Database

TAGS = ["admin: budgets"]


class NewBudget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `hard` budget is never passed, a `soft` one only alerts."""

    cap_nano: CapNano
    kind: Kind = "hard"
    period: BudgetPeriod = "month"
    # Whose calendar it is.
    time_zone: str = "UTC"
    # Of one key; of all keys together where it is left out.
    key_id: uuid.UUID | None = None
    # Percents of the cap at which webhooks are told.
    alert_percents: AlertPercents = msgspec.field(
        default_factory=lambda: list(DEFAULT_ALERT_PERCENTS)
    )


class BudgetChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is left out stays. A cap below what is spent refuses until the period ends."""

    cap_nano: CapNano | None = None
    alert_percents: AlertPercents | None = None


class BudgetList(msgspec.Struct, frozen=True):
    """A tenant's budgets and where each stands, oldest first."""

    data: list[Standing]


@get(
    "/tenants/{tenant:str}/budgets",
    scope="operator",
    tags=TAGS,
    summary="List a tenant's budgets",
)
async def list_budgets(tenant: FromPath[str], database: NamedDependency[Database]) -> BudgetList:
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant)
        return BudgetList(await budgets.standings(session, owner.id))


@post(
    "/tenants/{tenant:str}/budgets",
    scope="operator",
    tags=TAGS,
    summary="Create a budget",
)
async def create_budget(
    tenant: FromPath[str],
    data: JSONBody[NewBudget],
    database: NamedDependency[Database],
    principal: NamedDependency[Principal],
) -> Standing:
    """What was spent in its running period counts from the start."""
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant)
        if data.key_id is not None:
            await auth.get_key(session, tenant_id=owner.id, key_id=data.key_id)
        budget = await budgets.create_budget(
            session,
            tenant_id=owner.id,
            api_key_id=data.key_id,
            kind=data.kind,
            period=data.period,
            time_zone=data.time_zone,
            cap_nano=data.cap_nano,
            alert_percents=data.alert_percents,
        )
        await audit.record(
            session,
            tenant_id=owner.id,
            actor_key_id=principal.key_id,
            action="budget.create",
            subject=str(budget.id),
            details=msgspec.to_builtins(data),
        )
        return await _standing(session, owner.id, budget.id)


@patch(
    "/tenants/{tenant:str}/budgets/{budget_id:uuid}",
    scope="operator",
    tags=TAGS,
    summary="Change a budget's cap or alerts",
)
async def change_budget(
    tenant: FromPath[str],
    budget_id: FromPath[uuid.UUID],
    data: JSONBody[BudgetChange],
    database: NamedDependency[Database],
    principal: NamedDependency[Principal],
) -> Standing:
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant)
        budget = await budgets.get_budget(session, tenant_id=owner.id, budget_id=budget_id)
        before = {"cap_nano": budget.cap_nano, "alert_percents": list(budget.alert_percents)}
        if data.cap_nano is not None:
            budget.cap_nano = data.cap_nano
        if data.alert_percents is not None:
            budget.alert_percents = sorted(set(data.alert_percents))
        await session.flush()
        after = {"cap_nano": budget.cap_nano, "alert_percents": list(budget.alert_percents)}
        await audit.record(
            session,
            tenant_id=owner.id,
            actor_key_id=principal.key_id,
            action="budget.change",
            subject=str(budget.id),
            details={"before": before, "after": after},
        )
        return await _standing(session, owner.id, budget.id)


@delete(
    "/tenants/{tenant:str}/budgets/{budget_id:uuid}",
    scope="operator",
    tags=TAGS,
    summary="Remove a budget",
)
async def delete_budget(
    tenant: FromPath[str],
    budget_id: FromPath[uuid.UUID],
    database: NamedDependency[Database],
    principal: NamedDependency[Principal],
) -> None:
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant)
        budget = await budgets.get_budget(session, tenant_id=owner.id, budget_id=budget_id)
        await audit.record(
            session,
            tenant_id=owner.id,
            actor_key_id=principal.key_id,
            action="budget.delete",
            subject=str(budget.id),
            details={"kind": budget.kind, "period": budget.period, "cap_nano": budget.cap_nano},
        )
        await session.delete(budget)


async def _standing(session: AsyncSession, tenant_id: uuid.UUID, budget_id: uuid.UUID) -> Standing:
    found = await budgets.standings(session, tenant_id)
    return next(each for each in found if each.id == budget_id)
