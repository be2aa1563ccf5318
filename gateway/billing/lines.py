"""What no statement says yet, as lines of the next one.

A line is a quantity at a rate. Requests were rounded to the nano-USD one by one, so the lines of a
price end with one more, `roundings`: what those requests really cost, less what their quantities
cost together. Lines therefore add up to the events exactly. What was used in an earlier month is
the same kind of line, and an adjustment. Knows nothing of periods and of tenants' names.
"""

import datetime
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.prices import BYTE_HOURS_PER_RATE, TOKENS_PER_RATE, amount, discounted

# Months in which the rollups know more, or less, requests than the statements.
UNSTATED_MONTHS = text("""
    SELECT month FROM (
        SELECT date_trunc('month', day::timestamp)::date AS month, requests
        FROM usage_rollups
        WHERE tenant_id = :tenant_id AND day < CAST(:until AS date)
        UNION ALL
        SELECT usage_month, -quantity FROM statement_lines
        WHERE tenant_id = :tenant_id AND kind = 'usage' AND unit = 'roundings'
    ) AS sides
    GROUP BY month HAVING sum(requests) <> 0 ORDER BY month
""")

# Usage events of those months, less what statements say of them.
UNSTATED_USAGE = text("""
    WITH sides AS (
        SELECT m.month, e.base_model_id, e.adapter_id, e.price_version_id, count(*) AS roundings,
               sum(e.prompt_tokens - e.cached_tokens) FILTER (WHERE NOT b.is_batch) AS input_tokens,
               sum(e.cached_tokens) FILTER (WHERE NOT b.is_batch) AS cached_input_tokens,
               sum(e.completion_tokens) FILTER (WHERE NOT b.is_batch) AS output_tokens,
               sum(e.prompt_tokens - e.cached_tokens) FILTER (WHERE b.is_batch)
                   AS batch_input_tokens,
               sum(e.cached_tokens) FILTER (WHERE b.is_batch) AS batch_cached_input_tokens,
               sum(e.completion_tokens) FILTER (WHERE b.is_batch) AS batch_output_tokens,
               sum(e.cost_nano) AS cost_nano
        FROM unnest(CAST(:months AS date[])) AS m (month)
        JOIN usage_events e ON e.tenant_id = :tenant_id
            AND e.finished_at >= m.month::timestamp AT TIME ZONE 'UTC'
            AND e.finished_at < (m.month + interval '1 month') AT TIME ZONE 'UTC'
            AND e.settled_at <= :as_of
        CROSS JOIN LATERAL (SELECT e.endpoint LIKE 'batch.%' AS is_batch) AS b
        GROUP BY m.month, e.base_model_id, e.adapter_id, e.price_version_id
        UNION ALL
        SELECT usage_month, base_model_id, adapter_id, price_version_id,
               -sum(quantity) FILTER (WHERE unit = 'roundings'),
               -sum(quantity) FILTER (WHERE unit = 'input_tokens'),
               -sum(quantity) FILTER (WHERE unit = 'cached_input_tokens'),
               -sum(quantity) FILTER (WHERE unit = 'output_tokens'),
               -sum(quantity) FILTER (WHERE unit = 'batch_input_tokens'),
               -sum(quantity) FILTER (WHERE unit = 'batch_cached_input_tokens'),
               -sum(quantity) FILTER (WHERE unit = 'batch_output_tokens'), -sum(amount_nano)
        FROM statement_lines
        WHERE tenant_id = :tenant_id AND kind = 'usage'
            AND usage_month = ANY (CAST(:months AS date[]))
        GROUP BY usage_month, base_model_id, adapter_id, price_version_id
    )
    SELECT s.month, s.base_model_id, s.adapter_id, s.price_version_id,
           p.input_nano_per_million, p.cached_input_nano_per_million, p.output_nano_per_million,
           p.batch_discount_bp,
           CAST(sum(roundings) AS bigint) AS roundings,
           CAST(sum(input_tokens) AS bigint) AS input_tokens,
           CAST(sum(cached_input_tokens) AS bigint) AS cached_input_tokens,
           CAST(sum(output_tokens) AS bigint) AS output_tokens,
           CAST(sum(batch_input_tokens) AS bigint) AS batch_input_tokens,
           CAST(sum(batch_cached_input_tokens) AS bigint) AS batch_cached_input_tokens,
           CAST(sum(batch_output_tokens) AS bigint) AS batch_output_tokens,
           CAST(sum(cost_nano) AS bigint) AS cost_nano
    FROM sides s
    JOIN price_versions p ON p.id = s.price_version_id
    GROUP BY s.month, s.base_model_id, s.adapter_id, s.price_version_id, p.id
    HAVING sum(roundings) <> 0 OR sum(cost_nano) <> 0
    ORDER BY s.month, s.base_model_id, s.adapter_id NULLS FIRST, p.effective, p.id
""")

# Hours of storage, likewise.
UNSTATED_STORAGE = text("""
    WITH sides AS (
        SELECT m.month, h.base_model_id, h.adapter_id, h.price_version_id, count(*) AS roundings,
               sum(h.size_bytes) AS byte_hours, sum(h.cost_nano) AS cost_nano
        FROM unnest(CAST(:months AS date[])) AS m (month)
        JOIN storage_hours h ON h.tenant_id = :tenant_id
            AND h.hour >= m.month::timestamp AT TIME ZONE 'UTC'
            AND h.hour < (m.month + interval '1 month') AT TIME ZONE 'UTC'
            AND h.settled_at <= :as_of
        GROUP BY m.month, h.base_model_id, h.adapter_id, h.price_version_id
        UNION ALL
        SELECT usage_month, base_model_id, adapter_id, price_version_id,
               -sum(quantity) FILTER (WHERE unit = 'roundings'),
               -sum(quantity) FILTER (WHERE unit = 'byte_hours'), -sum(amount_nano)
        FROM statement_lines
        WHERE tenant_id = :tenant_id AND kind = 'storage'
            AND usage_month = ANY (CAST(:months AS date[]))
        GROUP BY usage_month, base_model_id, adapter_id, price_version_id
    )
    SELECT s.month, s.base_model_id, s.adapter_id, s.price_version_id,
           p.storage_nano_per_gib_hour,
           CAST(sum(roundings) AS bigint) AS roundings,
           CAST(sum(byte_hours) AS bigint) AS byte_hours,
           CAST(sum(cost_nano) AS bigint) AS cost_nano
    FROM sides s
    JOIN price_versions p ON p.id = s.price_version_id
    GROUP BY s.month, s.base_model_id, s.adapter_id, s.price_version_id, p.id
    HAVING sum(roundings) <> 0 OR sum(cost_nano) <> 0
    ORDER BY s.month, s.base_model_id, s.adapter_id NULLS FIRST, p.effective, p.id
""")

# Credits, likewise, of whatever month: there are few.
UNSTATED_CREDITS = text("""
    WITH sides AS (
        SELECT date_trunc('month', at AT TIME ZONE 'UTC')::date AS month, base_model_id,
               adapter_id, price_version_id, count(*) AS retries, -sum(amount_nano) AS cost_nano
        FROM usage_credits
        WHERE tenant_id = :tenant_id AND settled_at <= :as_of
            AND at < CAST(:until AS date)::timestamp AT TIME ZONE 'UTC'
        GROUP BY 1, base_model_id, adapter_id, price_version_id
        UNION ALL
        SELECT usage_month, base_model_id, adapter_id, price_version_id, -sum(quantity),
               -sum(amount_nano)
        FROM statement_lines WHERE tenant_id = :tenant_id AND kind = 'credit'
        GROUP BY usage_month, base_model_id, adapter_id, price_version_id
    )
    SELECT month, base_model_id, adapter_id, price_version_id,
           CAST(sum(retries) AS bigint) AS retries, CAST(sum(cost_nano) AS bigint) AS cost_nano
    FROM sides
    GROUP BY month, base_model_id, adapter_id, price_version_id
    HAVING sum(retries) <> 0 OR sum(cost_nano) <> 0
    ORDER BY month, base_model_id, adapter_id NULLS FIRST, price_version_id
""")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a statement to be. See `gateway.tables.StatementLine`."""

    kind: str
    usage_month: datetime.date
    base_model_id: uuid.UUID
    adapter_id: uuid.UUID | None
    price_version_id: uuid.UUID
    unit: str
    quantity: int
    rate_nano: int | None
    amount_nano: int


@dataclass(frozen=True, slots=True)
class _Priced:
    unit: str
    quantity: int
    rate_nano: int
    # How much of the quantity the rate is for.
    per: int


async def unstated_lines(
    session: AsyncSession, tenant_id: uuid.UUID, *, month: datetime.date, as_of: datetime.datetime
) -> list[Line]:
    """Everything up to the end of a month that was settled by `as_of` and that no statement has.

    Earlier months come first.
    """
    until = (month + datetime.timedelta(days=32)).replace(day=1)
    asked: dict[str, Any] = {"tenant_id": tenant_id, "until": until}
    late = (await session.execute(UNSTATED_MONTHS, asked)).scalars().all()
    asked |= {"as_of": as_of, "months": sorted({*late, month})}
    usage = (await session.execute(UNSTATED_USAGE, asked)).all()
    storage = (await session.execute(UNSTATED_STORAGE, asked)).all()
    credited = (await session.execute(UNSTATED_CREDITS, asked)).all()
    lines = [
        *(line for row in usage for line in _usage_lines(row)),
        *(line for row in storage for line in _storage_lines(row)),
        *(_credit_line(row) for row in credited),
    ]
    return sorted(lines, key=lambda line: line.usage_month)


def _usage_lines(row: Row[Any]) -> Iterator[Line]:
    rates = {
        "input_tokens": row.input_nano_per_million,
        "cached_input_tokens": row.cached_input_nano_per_million,
        "output_tokens": row.output_nano_per_million,
    }
    discount_bp: int = row.batch_discount_bp
    rates |= {
        f"batch_{unit}": discounted(rate_nano, discount_bp=discount_bp)
        for unit, rate_nano in rates.items()
    }
    priced = [
        _Priced(unit, getattr(row, unit), rate_nano, TOKENS_PER_RATE)
        for unit, rate_nano in rates.items()
    ]
    return _lines("usage", row, priced)


def _storage_lines(row: Row[Any]) -> Iterator[Line]:
    priced = _Priced(
        "byte_hours", row.byte_hours, row.storage_nano_per_gib_hour, BYTE_HOURS_PER_RATE
    )
    return _lines("storage", row, [priced])


def _lines(kind: str, row: Row[Any], priced: Sequence[_Priced]) -> Iterator[Line]:
    rest_nano: int = row.cost_nano
    for each in priced:
        if each.quantity:
            amount_nano = amount(each.quantity, rate_nano=each.rate_nano, per=each.per)
            rest_nano -= amount_nano
            yield _line(kind, row, each.unit, each.quantity, each.rate_nano, amount_nano)
    yield _line(kind, row, "roundings", row.roundings, None, rest_nano)


def _credit_line(row: Row[Any]) -> Line:
    return _line("credit", row, "retries", row.retries, None, row.cost_nano)


def _line(
    kind: str, row: Row[Any], unit: str, quantity: int, rate_nano: int | None, amount_nano: int
) -> Line:
    return Line(
        kind=kind,
        usage_month=row.month,
        base_model_id=row.base_model_id,
        adapter_id=row.adapter_id,
        price_version_id=row.price_version_id,
        unit=unit,
        quantity=quantity,
        rate_nano=rate_nano,
        amount_nano=amount_nano,
    )
