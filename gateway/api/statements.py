"""Statements: a tenant's own and an operator's of all, closing months, and who pays."""

import datetime
import re
from typing import Any, Literal

import msgspec
from litestar import Request, Response, Router, get, post, put
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody

from gateway import audit, tenants
from gateway.api.usage import refuse_unknown
from gateway.auth import Principal
from gateway.billing import periods
from gateway.billing.documents import (
    StatementEntry,
    StatementView,
    get_statement,
    list_statements,
    to_csv,
    to_html,
)
from gateway.database import Database
from gateway.errors import InvalidRequest
from gateway.tables import BillingAccount

StatementFormat = Literal["json", "csv", "html"]
PRINTED = ("text/csv", "text/html")
TAGS = ["billing"]
_MONTH = re.compile(r"\d{4}-(0[1-9]|1[0-2])")


class StatementList(msgspec.Struct, frozen=True):
    """Statements, newest first."""

    data: list[StatementEntry]


class MonthToClose(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A month that is over, such as 2026-09; those before it close with it."""

    month: str
    # Slug of the one tenant; all where nothing is said.
    tenant: str | None = None


class MonthsClosed(msgspec.Struct, frozen=True):
    """Numbers of the statements that were made just now."""

    statements: list[str]


class BillingAccountView(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who pays for a tenant. New statements are addressed so; old ones stay as they are."""

    # Name and address, lines of text.
    bill_to: str = ""
    stripe_customer_id: str | None = None


def parse_month(value: str) -> datetime.date:
    """Raises InvalidRequest."""
    if _MONTH.fullmatch(value) is None or value.startswith("0000"):
        raise InvalidRequest(f"'month' is written as 2026-09: {value!r}", param="month")
    return datetime.date.fromisoformat(f"{value}-01")


@get(
    "/billing/statements",
    scope="operator",
    tags=TAGS,
    summary="List the statements of all tenants",
)
async def list_all(
    request: Request[Any, Any, Any],
    database: NamedDependency[Database],
    tenant: FromQuery[str | None] = None,
    month: FromQuery[str | None] = None,
) -> StatementList:
    """Of one tenant or of one month where these are named."""
    refuse_unknown(request.query_params, known=("tenant", "month"))
    asked = parse_month(month) if month is not None else None
    async with database.as_worker() as session:
        tenant_id = (await tenants.get_tenant(session, tenant)).id if tenant else None
        return StatementList(await list_statements(session, tenant_id=tenant_id, month=asked))


@get(
    "/billing/statements/{number:str}",
    scope="operator",
    tags=TAGS,
    summary="Show a statement, or print it as an invoice",
    also_as=PRINTED,
)
async def show(
    number: FromPath[str],
    database: NamedDependency[Database],
    format: FromQuery[StatementFormat] = "json",  # noqa: A002 - its name in the URL
) -> Response[StatementView | str]:
    async with database.as_worker() as session:
        statement = await get_statement(session, number)
    return _write(statement, format)


@post(
    "/billing/close",
    scope="operator",
    status_code=200,
    tags=TAGS,
    summary="Close a month without waiting for its grace",
)
async def close_month(
    data: JSONBody[MonthToClose],
    database: NamedDependency[Database],
    principal: NamedDependency[Principal],
) -> MonthsClosed:
    """What is closed stays closed: asking again closes nothing more."""
    month = parse_month(data.month)
    async with database.as_worker() as session:
        tenant_id = (await tenants.get_tenant(session, data.tenant)).id if data.tenant else None
    now = datetime.datetime.now(datetime.UTC)
    closed = await periods.close(
        database, month, now=now, tenant_id=tenant_id, actor_key_id=principal.key_id
    )
    return MonthsClosed([each.number for each in closed])


@get(
    "/tenants/{tenant:str}/billing-account",
    scope="operator",
    tags=TAGS,
    summary="Show who pays for a tenant",
)
async def get_account(
    tenant: FromPath[str], database: NamedDependency[Database]
) -> BillingAccountView:
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant)
        return _account(await session.get(BillingAccount, owner.id))


@put(
    "/tenants/{tenant:str}/billing-account",
    scope="operator",
    tags=TAGS,
    summary="Say who pays for a tenant",
)
async def put_account(
    tenant: FromPath[str],
    data: JSONBody[BillingAccountView],
    database: NamedDependency[Database],
    principal: NamedDependency[Principal],
) -> BillingAccountView:
    if "\x00" in data.bill_to or "\x00" in (data.stripe_customer_id or ""):
        raise InvalidRequest("Neither field may have a NUL in it.", param="bill_to")
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant, for_update=True)
        row = await session.get(BillingAccount, owner.id)
        before = _account(row)
        if row is None:
            row = BillingAccount(tenant_id=owner.id)
            session.add(row)
        row.bill_to, row.stripe_customer_id = data.bill_to, data.stripe_customer_id
        await session.flush()
        await audit.record(
            session,
            tenant_id=owner.id,
            actor_key_id=principal.key_id,
            action="billing_account.set",
            subject=owner.slug,
            details=audit.change(msgspec.to_builtins(before), msgspec.to_builtins(data)),
        )
    return data


@get("/v1/statements", scope="usage", tags=["usage"], summary="List your own statements")
async def list_own(
    principal: NamedDependency[Principal], database: NamedDependency[Database]
) -> StatementList:
    assert principal.tenant_id is not None, "the guard lets tenants' keys in alone"
    async with database.as_tenant(principal.tenant_id) as session:
        return StatementList(await list_statements(session))


@get(
    "/v1/statements/{number:str}",
    scope="usage",
    tags=["usage"],
    summary="Show one of your statements, or print it as an invoice",
    also_as=PRINTED,
)
async def show_own(
    number: FromPath[str],
    principal: NamedDependency[Principal],
    database: NamedDependency[Database],
    format: FromQuery[StatementFormat] = "json",  # noqa: A002 - its name in the URL
) -> Response[StatementView | str]:
    """Another tenant's statement is not there."""
    assert principal.tenant_id is not None, "the guard lets tenants' keys in alone"
    async with database.as_tenant(principal.tenant_id) as session:
        statement = await get_statement(session, number)
    return _write(statement, format)


def _account(row: BillingAccount | None) -> BillingAccountView:
    if row is None:
        return BillingAccountView()
    return BillingAccountView(bill_to=row.bill_to, stripe_customer_id=row.stripe_customer_id)


def _write(
    statement: StatementView, statement_format: StatementFormat
) -> Response[StatementView | str]:
    match statement_format:
        case "json":
            return Response(statement)
        case "csv":
            name = f'attachment; filename="{statement.number}.csv"'
            return Response(
                to_csv(statement), media_type="text/csv", headers={"content-disposition": name}
            )
        case "html":
            # The page has styles of its own and nothing else.
            policy = "default-src 'none'; style-src 'unsafe-inline'"
            return Response(
                to_html(statement),
                media_type="text/html",
                headers={"content-security-policy": policy},
            )


statements_router = Router(
    "/admin/v1", route_handlers=[list_all, show, close_month, get_account, put_account]
)
