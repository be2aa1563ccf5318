"""What was used and what it costs: reports from the usage events, to the token and the nano-USD.

Every report, in whatever form and for whomever, is the rows of one query; nothing here multiplies
or rounds. Knows nothing of how requests end or of HTTP.
"""

import csv
import datetime
import io
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec
from sqlalchemy import Date, Select, cast, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.elements import ColumnElement

from gateway.tables import Adapter, ApiKey, BaseModel, Tenant, UsageEvent


class Dimension(StrEnum):
    """What a report can be grouped by."""

    DAY = "day"
    TENANT = "tenant"
    ADAPTER = "adapter"
    KEY = "key"
    MODEL = "model"


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of one group, named by what the report is grouped by and nothing else."""

    # The UTC day on which the requests ended.
    day: datetime.date | msgspec.UnsetType = msgspec.UNSET
    # Slug of the tenant.
    tenant: str | msgspec.UnsetType = msgspec.UNSET
    # Public name of the adapter; null where the base model answered alone.
    adapter: str | msgspec.UnsetType | None = msgspec.UNSET
    key_id: uuid.UUID | msgspec.UnsetType = msgspec.UNSET
    key_name: str | msgspec.UnsetType = msgspec.UNSET
    # Name of the base model.
    model: str | msgspec.UnsetType = msgspec.UNSET
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_nano: int


class UsageTotals(msgspec.Struct, frozen=True):
    """All rows of a report together."""

    requests: int
    prompt_tokens: int
    # Part of the prompt tokens.
    cached_tokens: int
    completion_tokens: int
    # Nano-USD: a billion is one USD.
    cost_nano: int


class UsageReport(msgspec.Struct, frozen=True):
    """Who used what in a span of time."""

    since: datetime.datetime = msgspec.field(name="from")
    # Not part of the span any more.
    until: datetime.datetime = msgspec.field(name="to")
    group_by: list[str]
    rows: list[UsageRow]
    totals: UsageTotals


@dataclass(frozen=True, slots=True)
class Period:
    """A span of time; `until` is not part of it."""

    since: datetime.datetime
    until: datetime.datetime


_COUNTS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_nano")
# Columns of a row, by what it is grouped by.
_FIELDS = {
    Dimension.DAY: ("day",),
    Dimension.TENANT: ("tenant",),
    Dimension.ADAPTER: ("adapter",),
    Dimension.KEY: ("key_id", "key_name"),
    Dimension.MODEL: ("model",),
}


async def usage_report(
    session: AsyncSession,
    period: Period,
    *,
    group_by: Sequence[Dimension],
    tenant_id: uuid.UUID | None = None,
) -> UsageReport:
    """Sum the usage events of a period, of one tenant or of all that the session may see."""
    found = await session.execute(_query(period, group_by=group_by, tenant_id=tenant_id))
    rows = [UsageRow(**row) for row in found.mappings()]
    return UsageReport(
        since=period.since,
        until=period.until,
        group_by=[str(each) for each in group_by],
        rows=rows,
        totals=UsageTotals(**{name: sum(getattr(row, name) for row in rows) for name in _COUNTS}),
    )


def _query(
    period: Period, *, group_by: Sequence[Dimension], tenant_id: uuid.UUID | None
) -> Select[Any]:
    names = [column for dimension in group_by for column in _columns(dimension)]
    query = (
        select(*names, *_sums())
        .select_from(UsageEvent)
        .where(UsageEvent.finished_at >= period.since, UsageEvent.finished_at < period.until)
        # Without anything to group by, no usage is no row, as it is with.
        .having(func.count() > 0)
        .group_by(*names)
        .order_by(*(column.nulls_first() for column in names))
    )
    if tenant_id is not None:
        query = query.where(UsageEvent.tenant_id == tenant_id)
    if Dimension.TENANT in group_by:
        query = query.join(Tenant, Tenant.id == UsageEvent.tenant_id)
    if Dimension.ADAPTER in group_by:
        query = query.outerjoin(Adapter, Adapter.id == UsageEvent.adapter_id)
    if Dimension.KEY in group_by:
        query = query.join(ApiKey, ApiKey.id == UsageEvent.api_key_id)
    if Dimension.MODEL in group_by:
        query = query.join(BaseModel, BaseModel.id == UsageEvent.base_model_id)
    return query


def _columns(dimension: Dimension) -> list[ColumnElement[Any]]:
    match dimension:
        case Dimension.DAY:
            return [cast(func.timezone("UTC", UsageEvent.finished_at), Date).label("day")]
        case Dimension.TENANT:
            return [Tenant.slug.label("tenant")]
        case Dimension.ADAPTER:
            return [Adapter.public_name.label("adapter")]
        case Dimension.KEY:
            return [ApiKey.id.label("key_id"), ApiKey.name.label("key_name")]
        case Dimension.MODEL:
            return [BaseModel.name.label("model")]


def _sums() -> list[ColumnElement[Any]]:
    counted = [
        UsageEvent.prompt_tokens,
        UsageEvent.cached_tokens,
        UsageEvent.completion_tokens,
        UsageEvent.cost_nano,
    ]
    # sum() of BIGINT is NUMERIC, which would come out as Decimal.
    sums = [cast(func.sum(column), column.type).label(column.key) for column in counted]
    return [func.count().label("requests"), *sums]


def to_csv(report: UsageReport) -> str:
    """The rows of a report under a header; no totals, so that a column may be summed."""
    fields = [name for each in report.group_by for name in _FIELDS[Dimension(each)]]
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow([*fields, *_COUNTS])
    for row in report.rows:
        names = [cell(getattr(row, field)) for field in fields]
        writer.writerow([*names, *(getattr(row, name) for name in _COUNTS)])
    return file.getvalue()


# What spreadsheets take for the beginning of a formula, full-width forms included.
_FORMULA_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


def cell(value: object) -> str:
    """A name as text that no spreadsheet runs."""
    if value is None:
        return ""
    written = str(value)
    return f"'{written}" if written.startswith(_FORMULA_STARTS) else written
