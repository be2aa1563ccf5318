"""Meter what adapters weigh, hour by hour, where storage has a price.

A version that is there when an hour begins pays for that hour. Hours are caught up with from the
rows' own dates, so none is lost while nobody runs; each is written once. Knows nothing of where
the bytes lie.
"""

import datetime
from collections.abc import Iterable
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.database import Database
from gateway.prices import storage_cost
from gateway.tables import StorageHour

HOUR = datetime.timedelta(hours=1)
# Hours in one transaction: a day of a thousand adapters is 24,000 rows.
MAX_HOURS = 24
# Seven columns each: well below the 32,767 parameters that a statement may have.
MAX_ROWS = 2_000

# One meter at a time; the others find its work done.
LOCK_METER = text("SELECT done_until FROM chores WHERE name = 'storage' FOR UPDATE")

MOVE_METER = text("UPDATE chores SET done_until = :until WHERE name = 'storage'")

# What each adapter weighed when each hour began, at the price that held then: the adapter's before
# the tenant's before the base model's, as at admission.
WEIGH = text("""
    SELECT a.id AS adapter_id, h.hour, a.tenant_id, a.base_model_id, price.id AS price_version_id,
           price.storage_nano_per_gib_hour AS rate_nano,
           CAST(sum(v.size_bytes) AS bigint) AS size_bytes
    FROM generate_series(
        CAST(:since AS timestamptz), CAST(:until AS timestamptz) - interval '1 hour',
        interval '1 hour'
    ) AS h (hour)
    JOIN adapters a ON a.created_at <= h.hour AND (a.deleted_at IS NULL OR a.deleted_at > h.hour)
    JOIN adapter_versions v
        ON v.adapter_id = a.id AND v.state = 'ready' AND v.created_at <= h.hour
            AND (v.deleted_at IS NULL OR v.deleted_at > h.hour)
    CROSS JOIN LATERAL (
        SELECT p.id, p.storage_nano_per_gib_hour FROM price_versions p
        WHERE p.base_model_id = a.base_model_id AND p.effective @> h.hour
          AND (p.tenant_id IS NULL OR p.tenant_id = a.tenant_id)
          AND (p.adapter_id IS NULL OR p.adapter_id = a.id)
        ORDER BY p.adapter_id IS NULL, p.tenant_id IS NULL
        LIMIT 1
    ) AS price
    WHERE price.storage_nano_per_gib_hour > 0
    GROUP BY a.id, h.hour, a.tenant_id, a.base_model_id, price.id, rate_nano
""")


async def meter_storage(database: Database, *, until: datetime.datetime) -> None:
    """Write the hours that began before `until` and are not written yet."""
    until = until.replace(minute=0, second=0, microsecond=0)
    while True:
        async with database.as_worker() as session:
            since: datetime.datetime = (await session.execute(LOCK_METER)).scalar_one()
            if since >= until:
                return
            reached = min(until, since + MAX_HOURS * HOUR)
            rows = (await session.execute(WEIGH, {"since": since, "until": reached})).all()
            await _write(session, rows)
            await session.execute(MOVE_METER, {"until": reached})


async def _write(session: AsyncSession, rows: Iterable[Row[Any]]) -> None:
    hours = [
        {
            "adapter_id": row.adapter_id,
            "hour": row.hour,
            "tenant_id": row.tenant_id,
            "base_model_id": row.base_model_id,
            "price_version_id": row.price_version_id,
            "size_bytes": row.size_bytes,
            "cost_nano": storage_cost(row.size_bytes, rate_nano=row.rate_nano),
        }
        for row in rows
    ]
    for begin in range(0, len(hours), MAX_ROWS):
        statement = insert(StorageHour).values(hours[begin : begin + MAX_ROWS])
        await session.execute(statement.on_conflict_do_nothing())
