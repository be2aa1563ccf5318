"""Give back what an abandoned attempt cost, once a retry stands for it.

Clients that lose a stream ask again by themselves, and would pay for both. A retry of the same key
with the same body, begun within ten minutes of an attempt that its client left, takes that attempt
off the bill: the smaller of the two, so that the larger is always paid. An operator says how much
a tenant may get back in a day. Knows nothing of how two requests are found to be the same.
"""

import datetime
import uuid
from collections.abc import Mapping

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.budgets import Spending
from gateway.tables import UsageCredit

# Attempts and retries that found each other with these events; a retry stands for one attempt.
FIND_SUPERSEDED = text("""
    SELECT a.id, a.tenant_id, a.api_key_id, r.id AS retry_id, a.base_model_id, a.adapter_id,
           a.price_version_id, r.finished_at AS at, least(a.cost_nano, r.cost_nano) AS amount_nano
    FROM usage_events f
    JOIN usage_events a ON a.attempt_digest = f.attempt_digest AND a.api_key_id = f.api_key_id
    JOIN usage_events r ON r.attempt_digest = f.attempt_digest AND r.api_key_id = f.api_key_id
    WHERE f.id = ANY (CAST(:ids AS uuid[])) AND (f.id = a.id OR f.id = r.id)
      AND a.outcome = 'abort' AND r.is_retry AND a.id <> r.id
      AND a.started_at < r.started_at AND r.started_at <= a.finished_at + interval '10 minutes'
      AND least(a.cost_nano, r.cost_nano) > 0
      AND NOT EXISTS (SELECT FROM usage_credits c WHERE c.id = a.id OR c.retry_id = r.id)
    ORDER BY a.tenant_id, a.started_at DESC, r.started_at
""")

# One writer of a tenant's credits at a time. Nothing is read here: a statement that waits for a
# lock does not see what was committed meanwhile.
LOCK_CREDITS = text("SELECT pg_advisory_xact_lock(hashtextextended('credits ' || :tenant_id, 0))")

CREDITED_ON_DAY = text("""
    SELECT CAST(coalesce(sum(amount_nano), 0) AS bigint) FROM usage_credits
    WHERE tenant_id = :tenant_id AND (at AT TIME ZONE 'UTC')::date = CAST(:day AS date)
""")


async def credit_retries(
    session: AsyncSession, tenants: Mapping[uuid.UUID, uuid.UUID], *, max_a_day_nano: int
) -> list[Spending]:
    """Credit what new events supersede or are superseded by. `tenants`: of each event's id.

    Returns what that takes from budgets: costs below zero.
    """
    # Always in one order, so that two settlers wait for each other instead of deadlocking.
    for tenant_id in sorted(set(tenants.values())):
        await session.execute(LOCK_CREDITS, {"tenant_id": str(tenant_id)})
    pairs = (await session.execute(FIND_SUPERSEDED, {"ids": list(tenants)})).all()
    given_back: list[Spending] = []
    attempts: set[uuid.UUID] = set()
    retries: set[uuid.UUID] = set()
    for pair in pairs:
        day = pair.at.astimezone(datetime.UTC).date()
        if pair.id in attempts or pair.retry_id in retries:
            continue
        asked = {"tenant_id": pair.tenant_id, "day": day}
        credited_nano = (await session.execute(CREDITED_ON_DAY, asked)).scalar_one()
        if credited_nano + pair.amount_nano > max_a_day_nano:
            continue
        facts = dict(pair._mapping)
        api_key_id = facts.pop("api_key_id")
        session.add(UsageCredit(**facts))
        await session.flush()
        given_back.append(Spending(pair.tenant_id, api_key_id, -pair.amount_nano, pair.at))
        attempts.add(pair.id)
        retries.add(pair.retry_id)
    return given_back
