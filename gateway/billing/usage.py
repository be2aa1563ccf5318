"""What was used and what it costs: reports from the usage events, to the token and the nano-USD.

Every report, in whatever form and for whomever, is the rows of one query; nothing here multiplies
or rounds. Knows nothing of how requests end or of HTTP.
"""

import datetime
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec
from sqlalchemy import Date, Select, Text, Uuid, cast, column, func, literal_column, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.elements import ColumnElement

from gateway.tables import Adapter, ApiKey, BaseModel, EndUser, Tenant, UsageEvent


class Dimension(StrEnum):
    """What a report can be grouped by."""

    DAY = "day"
    HOUR = "hour"
    TENANT = "tenant"
    ADAPTER = "adapter"
    VERSION = "version"
    KEY = "key"
    MODEL = "model"
    USER = "user"
    ENDPOINT = "endpoint"


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of one group, named by what the report is grouped by and nothing else."""

    # The day on which the requests ended, in the report's time zone, and the hour's first moment.
    day: datetime.date | msgspec.UnsetType = msgspec.UNSET
    hour: datetime.datetime | msgspec.UnsetType = msgspec.UNSET
    # Slug of the tenant.
    tenant: str | msgspec.UnsetType = msgspec.UNSET
    # Public name of the adapter; null where the base model answered alone.
    adapter: str | msgspec.UnsetType | None = msgspec.UNSET
    # Digest of the adapter's version, which `x-adapter-digest` names too.
    version: str | msgspec.UnsetType | None = msgspec.UNSET
    key_id: uuid.UUID | msgspec.UnsetType = msgspec.UNSET
    key_name: str | msgspec.UnsetType = msgspec.UNSET
    # Name of the base model.
    model: str | msgspec.UnsetType = msgspec.UNSET
    # What the requests' `user` field said; null for nobody, and for who was erased.
    user: str | msgspec.UnsetType | None = msgspec.UNSET
    # e.g. "chat.completions"; of a batch "batch.chat.completions"
    endpoint: str | msgspec.UnsetType = msgspec.UNSET
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_nano: int
    # Engine time: each step's is shared by the requests in it.
    engine_ns: int


class UsageTotals(msgspec.Struct, frozen=True):
    """All rows of a report together."""

    requests: int
    prompt_tokens: int
    # Part of the prompt tokens.
    cached_tokens: int
    completion_tokens: int
    # Nano-USD: a billion is one USD.
    cost_nano: int
    engine_ns: int


class UsageReport(msgspec.Struct, frozen=True):
    """Who used what in a span of time."""

    since: datetime.datetime = msgspec.field(name="from")
    # Not part of the span any more.
    until: datetime.datetime = msgspec.field(name="to")
    time_zone: str
    # With this moment asked for again, the report is the same for ever; null where none was.
    as_of: datetime.datetime | None
    group_by: list[str]
    rows: list[UsageRow]
    totals: UsageTotals


@dataclass(frozen=True, slots=True)
class Period:
    """A span of time; `until` is not part of it."""

    since: datetime.datetime
    until: datetime.datetime


@dataclass(frozen=True, slots=True)
class Question:
    """What a report is to tell."""

    period: Period
    group_by: tuple[Dimension, ...]
    # One tenant, or all that the session may see.
    tenant_id: uuid.UUID | None = None
    # An IANA name; days and hours are its.
    time_zone: str = "UTC"
    # Only what was settled by then. See `gateway.billing.periods.settled_now`.
    as_of: datetime.datetime | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of a row's columns that are not counts."""
        return tuple(name for dimension in self.group_by for name in _FIELDS[dimension])


COUNTS = (
    *("requests", "prompt_tokens", "cached_tokens", "completion_tokens"),
    *("cost_nano", "engine_ns"),
)
# Columns of a row, by what it is grouped by.
_FIELDS = {
    Dimension.DAY: ("day",),
    Dimension.HOUR: ("hour",),
    Dimension.TENANT: ("tenant",),
    Dimension.ADAPTER: ("adapter",),
    Dimension.VERSION: ("version",),
    Dimension.KEY: ("key_id", "key_name"),
    Dimension.MODEL: ("model",),
    Dimension.USER: ("user",),
    Dimension.ENDPOINT: ("endpoint",),
}
# The names that a tenant's bills need and that it sees no row of: of adapters that were shared with
# it once. Nothing for the worker, who sees every row.
BILLED_ADAPTERS = func.billed_adapters().table_valued(
    column("id", Uuid), column("public_name", Text), name="billed_adapters"
)
BILLED_NAME = func.coalesce(Adapter.public_name, BILLED_ADAPTERS.c.public_name)

# Rows fetched at once: reports may have more of them than memory holds.
BATCH = 1000


async def usage_rows(session: AsyncSession, question: Question) -> AsyncIterator[list[UsageRow]]:
    """The sums of the usage events, in batches and in the order of the groups."""
    found = await session.stream(_query(question).execution_options(yield_per=BATCH))
    async for batch in found.mappings().partitions(BATCH):
        yield [UsageRow(**row) for row in batch]


def _query(question: Question) -> Select[Any]:
    groups, period = question.group_by, question.period
    names = [column for each in groups for column in _columns(each, time_zone=question.time_zone)]
    query = (
        select(*names, *_sums())
        .select_from(UsageEvent)
        .where(UsageEvent.finished_at >= period.since, UsageEvent.finished_at < period.until)
        # Without anything to group by, no usage is no row, as it is with.
        .having(func.count() > 0)
        # By position: a time zone is a parameter, and the same one twice is not one expression.
        .group_by(*(literal_column(str(place + 1)) for place in range(len(names))))
        .order_by(*(column.nulls_first() for column in names))
    )
    if question.tenant_id is not None:
        query = query.where(UsageEvent.tenant_id == question.tenant_id)
    if question.as_of is not None:
        query = query.where(UsageEvent.settled_at <= question.as_of)
    if Dimension.TENANT in groups:
        query = query.join(Tenant, Tenant.id == UsageEvent.tenant_id)
    if Dimension.ADAPTER in groups:
        query = query.outerjoin(Adapter, Adapter.id == UsageEvent.adapter_id).outerjoin(
            BILLED_ADAPTERS, BILLED_ADAPTERS.c.id == UsageEvent.adapter_id
        )
    if Dimension.KEY in groups:
        query = query.join(ApiKey, ApiKey.id == UsageEvent.api_key_id)
    if Dimension.MODEL in groups:
        query = query.join(BaseModel, BaseModel.id == UsageEvent.base_model_id)
    if Dimension.USER in groups:
        query = query.outerjoin(EndUser, EndUser.id == UsageEvent.end_user_id)
    return query


def _columns(dimension: Dimension, *, time_zone: str) -> list[ColumnElement[Any]]:
    match dimension:
        case Dimension.DAY:
            return [cast(func.timezone(time_zone, UsageEvent.finished_at), Date).label("day")]
        case Dimension.HOUR:
            return [func.date_trunc("hour", UsageEvent.finished_at, time_zone).label("hour")]
        case Dimension.TENANT:
            return [Tenant.slug.label("tenant")]
        case Dimension.ADAPTER:
            return [BILLED_NAME.label("adapter")]
        case Dimension.VERSION:
            return [UsageEvent.version_digest.label("version")]
        case Dimension.KEY:
            return [ApiKey.id.label("key_id"), ApiKey.name.label("key_name")]
        case Dimension.MODEL:
            return [BaseModel.name.label("model")]
        case Dimension.USER:
            return [EndUser.name.label("user")]
        case Dimension.ENDPOINT:
            return [UsageEvent.endpoint.label("endpoint")]


def _sums() -> list[ColumnElement[Any]]:
    counted = [
        UsageEvent.prompt_tokens,
        UsageEvent.cached_tokens,
        UsageEvent.completion_tokens,
        UsageEvent.cost_nano,
        UsageEvent.engine_ns,
    ]
    # sum() of BIGINT is NUMERIC, which would come out as Decimal.
    sums = [cast(func.sum(column), column.type).label(column.key) for column in counted]
    return [func.count().label("requests"), *sums]


# What spreadsheets take for the beginning of a formula, full-width forms included.
_FORMULA_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


def cell(value: object) -> str:
    """A name as text that no spreadsheet runs."""
    if value is None:
        return ""
    written = str(value)
    return f"'{written}" if written.startswith(_FORMULA_STARTS) else written
