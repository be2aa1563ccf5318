"""The operator's view of money: usage of all tenants, and the prices that tokens have."""

import datetime
import uuid
from dataclasses import replace
from typing import Annotated, Any

import msgspec
from litestar import Request, Router, get, post
from litestar.di import NamedDependency
from litestar.params import FromQuery, JSONBody, QueryParameter
from litestar.response import Stream
from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from gateway import audit, tenants
from gateway.api.usage import (
    DEFAULT_GROUPS,
    PARAMETERS,
    REPORT,
    WRITTEN,
    read_question,
    refuse_unknown,
    write_report,
)
from gateway.auth import Principal
from gateway.billing.usage import Dimension
from gateway.billing.writers import Format
from gateway.database import Database
from gateway.errors import InvalidRequest, NotFound
from gateway.prices import Discount, PriceScope, Rate, Rates, price_at, set_price
from gateway.tables import Adapter, BaseModel, PriceVersion, Tenant


class PriceChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """New rates: nano-USD per million tokens, and per GiB and hour of storage."""

    # Name of the base model whose tokens these are.
    base_model: str
    input_nano_per_million: Rate
    output_nano_per_million: Rate
    # The input rate, where it is left out.
    cached_input_nano_per_million: Rate | None = None
    # For each GiB of adapters' versions and each hour that they are kept.
    storage_nano_per_gib_hour: Rate = 0
    # Ten-thousandths that tokens of batches cost less: 5000 is half price.
    batch_discount_bp: Discount = 0
    # For one tenant alone, by slug, or for one adapter alone, by public name.
    tenant: str | None = None
    adapter: str | None = None
    # A moment to come, with its offset from UTC; now, where it is left out.
    since: Annotated[datetime.datetime, msgspec.Meta(tz=True)] | None = msgspec.field(
        default=None, name="from"
    )


class PriceEntry(msgspec.Struct, frozen=True):
    """Rates, whom they are for and when. The narrowest wins: adapter, tenant, base model."""

    id: uuid.UUID
    base_model: str
    tenant: str | None
    adapter: str | None
    input_nano_per_million: int
    cached_input_nano_per_million: int
    output_nano_per_million: int
    storage_nano_per_gib_hour: int
    batch_discount_bp: int
    since: datetime.datetime = msgspec.field(name="from")
    # Null while it holds.
    until: datetime.datetime | None = msgspec.field(name="to")


class PriceList(msgspec.Struct, frozen=True):
    """All prices, the running one of each kind first."""

    prices: list[PriceEntry]


@get(
    "/billing/usage",
    scope="operator",
    tags=["billing"],
    summary="Report who used what, and what it costs",
    responses=REPORT,
    also_as=WRITTEN,
)
async def report_usage(
    request: Request[Any, Any, Any],
    database: NamedDependency[Database],
    tenant: FromQuery[str | None] = None,
    since: Annotated[str | None, QueryParameter(name="from")] = None,
    until: Annotated[str | None, QueryParameter(name="to")] = None,
    group_by: FromQuery[str] = DEFAULT_GROUPS,
    format: FromQuery[Format] = "json",  # noqa: A002 - its name in the URL
    time_zone: FromQuery[str] = "UTC",
    as_of: FromQuery[str | None] = None,
) -> Stream:
    """Dates of the time zone, or RFC 3339 times; `to` is not included. Else: the current month.

    `group_by` takes any of day, hour, tenant, adapter, version, key, model, user and endpoint. With
    `as_of`, a moment of the past, the report is what it was then, to the nano-USD.
    """
    refuse_unknown(request.query_params, known=("tenant", *PARAMETERS))
    question = await read_question(request, database, allowed=tuple(Dimension))
    async with database.as_worker() as session:
        tenant_id = (await tenants.get_tenant(session, tenant)).id if tenant else None
        return await write_report(session, replace(question, tenant_id=tenant_id), format)


@get("/prices", scope="operator", tags=["billing"], summary="List all prices, past ones too")
async def list_prices(database: NamedDependency[Database]) -> PriceList:
    async with database.as_worker() as session:
        found = await session.execute(
            _select_prices().order_by(
                BaseModel.name,
                Tenant.slug.nulls_first(),
                Adapter.public_name.nulls_first(),
                func.lower(PriceVersion.effective).desc(),
            )
        )
    return PriceList([PriceEntry(**row) for row in found.mappings()])


@post(
    "/prices",
    scope="operator",
    tags=["billing"],
    summary="Set a price from now on, or from a day to come",
)
async def change_price(
    data: JSONBody[PriceChange],
    principal: NamedDependency[Principal],
    database: NamedDependency[Database],
) -> PriceEntry:
    """Requests that were admitted before keep the price that they were admitted at."""
    rates = Rates(
        input_nano_per_million=data.input_nano_per_million,
        cached_input_nano_per_million=(
            data.input_nano_per_million
            if data.cached_input_nano_per_million is None
            else data.cached_input_nano_per_million
        ),
        output_nano_per_million=data.output_nano_per_million,
        storage_nano_per_gib_hour=data.storage_nano_per_gib_hour,
        batch_discount_bp=data.batch_discount_bp,
    )
    async with database.as_worker() as session:
        scope = await _find_scope(session, data)
        before = await price_at(session, scope, data.since)
        was = {} if before is None else msgspec.to_builtins(Rates.of(before))
        row = await set_price(session, scope, rates=rates, since=data.since)
        await audit.record(
            session,
            tenant_id=scope.tenant_id,
            actor_key_id=principal.key_id,
            action="price.set",
            subject=data.adapter or data.tenant or data.base_model,
            details={
                "base_model": data.base_model,
                "from": row.effective.lower,
                **audit.change(was, msgspec.to_builtins(rates)),
            },
        )
        entry = (await session.execute(_select_prices().where(PriceVersion.id == row.id))).one()
    return PriceEntry(**entry._mapping)


async def _find_scope(session: AsyncSession, change: PriceChange) -> PriceScope:
    """Raises NotFound or InvalidRequest naming the field."""
    base_model_id = await session.scalar(
        select(BaseModel.id).where(BaseModel.name == change.base_model)
    )
    if base_model_id is None:
        raise NotFound(f"There is no base model {change.base_model!r}.", param="base_model")
    if change.adapter is not None and change.tenant is not None:
        raise InvalidRequest(
            "Name a tenant or an adapter, not both: an adapter has one tenant.", param="tenant"
        )
    if change.adapter is not None:
        return await _adapter_scope(session, base_model_id, change.adapter)
    if change.tenant is not None:
        return PriceScope(base_model_id, (await tenants.get_tenant(session, change.tenant)).id)
    return PriceScope(base_model_id)


async def _adapter_scope(session: AsyncSession, base_model_id: uuid.UUID, name: str) -> PriceScope:
    adapter = await session.scalar(
        select(Adapter).where(
            Adapter.public_name == name.lower(),
            Adapter.base_model_id == base_model_id,
            Adapter.deleted_at.is_(None),
        )
    )
    if adapter is None:
        raise NotFound(f"There is no adapter {name!r} of this base model.", param="adapter")
    return PriceScope(base_model_id, adapter.tenant_id, adapter.id)


def _select_prices() -> Select[Any]:
    return (
        select(
            PriceVersion.id,
            BaseModel.name.label("base_model"),
            Tenant.slug.label("tenant"),
            Adapter.public_name.label("adapter"),
            PriceVersion.input_nano_per_million,
            PriceVersion.cached_input_nano_per_million,
            PriceVersion.output_nano_per_million,
            PriceVersion.storage_nano_per_gib_hour,
            PriceVersion.batch_discount_bp,
            func.lower(PriceVersion.effective).label("since"),
            func.upper(PriceVersion.effective).label("until"),
        )
        .join(BaseModel, BaseModel.id == PriceVersion.base_model_id)
        .outerjoin(Tenant, Tenant.id == PriceVersion.tenant_id)
        .outerjoin(Adapter, Adapter.id == PriceVersion.adapter_id)
    )


billing_router = Router("/admin/v1", route_handlers=[report_usage, list_prices, change_price])
