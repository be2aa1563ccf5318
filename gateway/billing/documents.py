"""A statement as people and programs read it: JSON, CSV, and an invoice to print.

Every form is the same rows; nothing here adds or rounds. Knows nothing of how they came about.
"""

import csv
import datetime
import io
import uuid
from importlib import resources
from typing import Any

import jinja2
import msgspec
from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.billing.usage import BILLED_ADAPTERS, BILLED_NAME, cell
from gateway.errors import NotFound
from gateway.tables import Adapter, BaseModel, BillingPeriod, Statement, StatementLine, Tenant

NANO_PER_USD = 1_000_000_000


class StatementEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant owes for a month. Money is in nano-USD where the name says so."""

    # "<tenant>-<year>-<month>"
    number: str
    tenant: str
    # First day of the month, in UTC.
    month: datetime.date
    # What was settled up to this moment is in this statement or in one before.
    as_of: datetime.datetime
    # The sum of the lines.
    total_nano: int
    # Less than a cent that the statement before left over, and that this one leaves:
    # carried_in_nano + total_nano = payable_cents * 10,000,000 + carried_out_nano.
    carried_in_nano: int
    payable_cents: int
    carried_out_nano: int


class LineView(msgspec.Struct, frozen=True, kw_only=True):
    """One quantity at one rate; `roundings` is what rounding its requests one by one came to."""

    kind: str
    # First day of the month of the usage.
    usage_month: datetime.date
    # Used in an earlier month than the statement's, and settled after that was closed.
    is_adjustment: bool
    model: str
    adapter: str | None
    unit: str
    quantity: int
    # Nano-USD per million tokens or per GiB-hour.
    rate_nano: int | None
    amount_nano: int


class StatementView(StatementEntry, frozen=True, kw_only=True):
    """A statement with its lines, named as on the day when it was closed."""

    tenant_name: str
    bill_to: str
    lines: list[LineView]


async def list_statements(
    session: AsyncSession,
    *,
    tenant_id: uuid.UUID | None = None,
    month: datetime.date | None = None,
) -> list[StatementEntry]:
    """Statements that the session may see, newest first."""
    query = _entries().order_by(BillingPeriod.month.desc(), Statement.number)
    if tenant_id is not None:
        query = query.where(Statement.tenant_id == tenant_id)
    if month is not None:
        query = query.where(BillingPeriod.month == month)
    return [StatementEntry(**row) for row in (await session.execute(query)).mappings()]


async def get_statement(session: AsyncSession, number: str) -> StatementView:
    """Raises NotFound."""
    query = _entries().add_columns(Statement.id, Statement.tenant_name, Statement.bill_to)
    # PostgreSQL takes no NUL, and no number has one.
    found = await session.execute(query.where(Statement.number == number.replace("\x00", "")))
    row = found.mappings().one_or_none()
    if row is None:
        raise NotFound(f"There is no statement {number!r}.", param="number")
    facts = dict(row)
    statement_id = facts.pop("id")
    return StatementView(**facts, lines=await _lines(session, statement_id, month=facts["month"]))


async def _lines(
    session: AsyncSession, statement_id: uuid.UUID, *, month: datetime.date
) -> list[LineView]:
    query = (
        select(
            StatementLine.kind,
            StatementLine.usage_month,
            (StatementLine.usage_month < month).label("is_adjustment"),
            BaseModel.name.label("model"),
            BILLED_NAME.label("adapter"),
            StatementLine.unit,
            StatementLine.quantity,
            StatementLine.rate_nano,
            StatementLine.amount_nano,
        )
        .join(BaseModel, BaseModel.id == StatementLine.base_model_id)
        .outerjoin(Adapter, Adapter.id == StatementLine.adapter_id)
        .outerjoin(BILLED_ADAPTERS, BILLED_ADAPTERS.c.id == StatementLine.adapter_id)
        .where(StatementLine.statement_id == statement_id)
        .order_by(StatementLine.number)
    )
    return [LineView(**row) for row in (await session.execute(query)).mappings()]


def _entries() -> Select[*tuple[Any, ...]]:
    return (
        select(
            Statement.number,
            Tenant.slug.label("tenant"),
            BillingPeriod.month,
            Statement.as_of,
            Statement.total_nano,
            Statement.carried_in_nano,
            Statement.payable_cents,
            Statement.carried_out_nano,
        )
        .join(BillingPeriod, BillingPeriod.id == Statement.period_id)
        .join(Tenant, Tenant.id == Statement.tenant_id)
    )


def to_csv(statement: StatementView) -> str:
    """The lines under a header; `amount_nano` may be summed."""
    file = io.StringIO()
    writer = csv.writer(file)
    fields = LineView.__struct_fields__
    writer.writerow(["statement", *fields])
    for line in statement.lines:
        writer.writerow(
            [cell(statement.number), *(_plain(getattr(line, field)) for field in fields)]
        )
    return file.getvalue()


def _plain(value: object) -> object:
    """Numbers stay what they are: a minus in front of one is no formula."""
    return value if isinstance(value, int) else cell(value)


def to_html(statement: StatementView) -> str:
    """An invoice of one page that needs nothing else, to be printed."""
    return _template().render(statement=statement)


def usd(amount_nano: int) -> str:
    """All nine decimals, so that a column adds up on paper too."""
    whole, rest = divmod(abs(amount_nano), NANO_PER_USD)
    return f"{'-' if amount_nano < 0 else ''}{whole:,}.{rest:09d}"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["usd"] = usd
    source = resources.files("gateway.billing").joinpath("invoice.html").read_text()
    return environment.from_string(source)
