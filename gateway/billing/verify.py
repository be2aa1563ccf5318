"""Prove that the books are right: journals, events, rollups, holds, statements, audit chains.

Each comparison is between two things that were written by different code, row by row where they
differ. Reads alone, in one snapshot. Changes nothing and repairs nothing.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from gateway import audit
from gateway.database import Database
from gateway.journal import Told
from gateway.tables import Tenant, UsageEvent

# Requests looked up at once.
BATCH = 1000
LOST = "lost"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A place where two books do not say the same."""

    kind: str
    # The request, the statement or the key of the rollup.
    subject: str
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class Proof:
    """What was compared, in sums, and where it differs."""

    # Name of a sum -> its value; money is in nano-USD.
    sums: dict[str, int]
    mismatches: list[Mismatch]
    # Requests that a journal knows and the database does not have yet.
    num_pending: int


# Usage events against the rollups that were written beside them, by the rollup's key.
FIND_ROLLUP_MISMATCHES = text("""
    WITH both_sides AS (
        SELECT tenant_id, (finished_at AT TIME ZONE 'UTC')::date AS day, base_model_id, adapter_id,
               api_key_id, 1 AS events, 1 AS requests, prompt_tokens, cached_tokens,
               completion_tokens, cost_nano
        FROM usage_events
        UNION ALL
        SELECT tenant_id, day, base_model_id, adapter_id, api_key_id, 0, -requests,
               -prompt_tokens, -cached_tokens, -completion_tokens, -cost_nano
        FROM usage_rollups
    )
    SELECT tenant_id, day, base_model_id, adapter_id, api_key_id,
           sum(events) AS events, sum(requests) AS requests, sum(prompt_tokens) AS prompt_tokens,
           sum(cached_tokens) AS cached_tokens, sum(completion_tokens) AS completion_tokens,
           sum(cost_nano) AS cost_nano
    FROM both_sides
    GROUP BY tenant_id, day, base_model_id, adapter_id, api_key_id
    HAVING (sum(requests), sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens),
            sum(cost_nano)) <> (0, 0, 0, 0, 0)
    ORDER BY tenant_id, day
""")

# Settled holds without an event, and events whose hold is not settled.
FIND_HOLD_MISMATCHES = text("""
    SELECT coalesce(h.id, e.id) AS id, h.state, e.id IS NOT NULL AS has_event
    FROM holds h FULL JOIN usage_events e ON e.id = h.id
    WHERE (h.state = 'settled') IS DISTINCT FROM (e.id IS NOT NULL)
      AND (h.state = 'settled' OR e.id IS NOT NULL)
    ORDER BY 1
""")

# Events whose cost is not their counts at their price, computed here once more: half to even.
FIND_COST_MISMATCHES = text("""
    SELECT id, cost_nano, CAST(whole + CASE
        WHEN rest > 500000 OR (rest = 500000 AND whole % 2 = 1) THEN 1 ELSE 0
    END AS bigint) AS expected
    FROM (
        SELECT e.id, e.cost_nano, div(total, 1000000) AS whole, total % 1000000 AS rest
        FROM usage_events e
        JOIN price_versions p ON p.id = e.price_version_id
        CROSS JOIN LATERAL (
            SELECT CASE WHEN e.endpoint LIKE 'batch.%' THEN p.batch_discount_bp ELSE 0 END AS bp
        ) AS off
        CROSS JOIN LATERAL (
            SELECT CAST(e.prompt_tokens - e.cached_tokens AS numeric)
                    * discounted(p.input_nano_per_million, off.bp)
                + CAST(e.cached_tokens AS numeric)
                    * discounted(p.cached_input_nano_per_million, off.bp)
                + CAST(e.completion_tokens AS numeric)
                    * discounted(p.output_nano_per_million, off.bp) AS total
        ) AS priced
    ) AS events
    WHERE cost_nano <> whole + CASE
        WHEN rest > 500000 OR (rest = 500000 AND whole % 2 = 1) THEN 1 ELSE 0
    END
    ORDER BY id LIMIT 100
""")

# Of each tenant, everything that its statements must say (what was settled by the moment of the
# last one, of the months up to it) against all of its statements' lines.
FIND_STATEMENT_MISMATCHES = text("""
    WITH latest AS (
        SELECT DISTINCT ON (s.tenant_id) s.tenant_id, s.as_of,
               (p.month + interval '1 month') AT TIME ZONE 'UTC' AS until
        FROM statements s JOIN billing_periods p ON p.id = s.period_id
        ORDER BY s.tenant_id, p.month DESC
    ), sides AS (
        SELECT e.tenant_id, 'usage' AS kind, e.finished_at AS at, e.base_model_id, e.adapter_id,
               e.price_version_id, 1 AS facts, e.prompt_tokens - e.cached_tokens AS input_tokens,
               e.cached_tokens AS cached_input_tokens, e.completion_tokens AS output_tokens,
               0 AS byte_hours, e.cost_nano
        FROM usage_events e JOIN latest l ON l.tenant_id = e.tenant_id
        WHERE e.settled_at <= l.as_of AND e.finished_at < l.until
        UNION ALL
        SELECT h.tenant_id, 'storage', h.hour, h.base_model_id, h.adapter_id, h.price_version_id,
               1, 0, 0, 0, h.size_bytes, h.cost_nano
        FROM storage_hours h JOIN latest l ON l.tenant_id = h.tenant_id
        WHERE h.settled_at <= l.as_of AND h.hour < l.until
        UNION ALL
        SELECT c.tenant_id, 'credit', c.at, c.base_model_id, c.adapter_id, c.price_version_id,
               1, 0, 0, 0, 0, -c.amount_nano
        FROM usage_credits c JOIN latest l ON l.tenant_id = c.tenant_id
        WHERE c.settled_at <= l.as_of AND c.at < l.until
        UNION ALL
        SELECT tenant_id, kind, usage_month::timestamp AT TIME ZONE 'UTC', base_model_id,
               adapter_id, price_version_id,
               CASE WHEN unit IN ('roundings', 'retries') THEN -quantity ELSE 0 END,
               CASE WHEN unit IN ('input_tokens', 'batch_input_tokens')
                   THEN -quantity ELSE 0 END,
               CASE WHEN unit IN ('cached_input_tokens', 'batch_cached_input_tokens')
                   THEN -quantity ELSE 0 END,
               CASE WHEN unit IN ('output_tokens', 'batch_output_tokens')
                   THEN -quantity ELSE 0 END,
               CASE WHEN unit = 'byte_hours' THEN -quantity ELSE 0 END, -amount_nano
        FROM statement_lines
    )
    SELECT tenant_id, kind, date_trunc('month', at AT TIME ZONE 'UTC')::date AS month,
           base_model_id, adapter_id, price_version_id, sum(facts) AS facts,
           sum(input_tokens) AS input_tokens, sum(cached_input_tokens) AS cached_input_tokens,
           sum(output_tokens) AS output_tokens, sum(byte_hours) AS byte_hours,
           sum(cost_nano) AS cost_nano
    FROM sides
    GROUP BY 1, 2, 3, 4, 5, 6
    HAVING (sum(facts), sum(input_tokens), sum(cached_input_tokens), sum(output_tokens),
            sum(byte_hours), sum(cost_nano)) <> (0, 0, 0, 0, 0, 0)
    ORDER BY 1, 3, 2
""")

# Statements whose total is not their lines', or that do not go on where the last one stopped.
FIND_BROKEN_STATEMENTS = text("""
    SELECT number, total_nano, lines_nano, carried_in_nano, carried_before_nano, state
    FROM (
        SELECT s.number, s.total_nano, s.carried_in_nano, p.state, p.month, s.tenant_id,
               (SELECT coalesce(sum(amount_nano), 0) FROM statement_lines l
                WHERE l.statement_id = s.id) AS lines_nano,
               coalesce(lag(s.carried_out_nano) OVER (PARTITION BY s.tenant_id ORDER BY p.month), 0)
                   AS carried_before_nano
        FROM statements s JOIN billing_periods p ON p.id = s.period_id
    ) AS found
    WHERE total_nano <> lines_nano OR carried_in_nano <> carried_before_nano OR state <> 'closed'
    ORDER BY tenant_id, month
""")

# Credits for more than the attempt cost, or for no attempt of that tenant.
FIND_CREDIT_MISMATCHES = text("""
    SELECT c.id, c.amount_nano, e.cost_nano
    FROM usage_credits c
    LEFT JOIN usage_events e ON e.id = c.id AND e.tenant_id = c.tenant_id
    WHERE e.id IS NULL OR c.amount_nano > e.cost_nano
    ORDER BY c.id
""")

SUM_UP = text("""
    SELECT
        (SELECT count(*) FROM usage_events) AS events,
        (SELECT coalesce(sum(cost_nano), 0) FROM usage_events) AS events_nano,
        (SELECT coalesce(sum(cost_nano), 0) FROM usage_rollups) AS rollups_nano,
        (SELECT count(*) FROM holds WHERE state = 'open') AS open_holds,
        (SELECT coalesce(sum(amount_nano), 0) FROM holds WHERE state = 'open') AS held_nano,
        (SELECT coalesce(sum(cost_nano), 0) FROM storage_hours) AS storage_nano,
        (SELECT coalesce(sum(amount_nano), 0) FROM usage_credits) AS credits_nano,
        (SELECT count(*) FROM statements) AS statements,
        (SELECT coalesce(sum(amount_nano), 0) FROM statement_lines) AS statement_lines_nano,
        (SELECT count(*) FROM audit_log) AS audit_entries
""")

_COUNTS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_nano")
_STATED = (
    *("facts", "input_tokens", "cached_input_tokens", "output_tokens", "byte_hours"),
    "cost_nano",
)


async def prove(database: Database, journals: Sequence[Told] = ()) -> Proof:
    """Compare everything.

    Read the journals before: what they call settled is in the database then.
    """
    async with database.as_worker() as session:
        await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        told, num_pending = await _check_journals(session, journals)
        mismatches = [*told, *await verify(session), *await _check_audit(session)]
        sums = (await session.execute(SUM_UP)).mappings().one()
    return Proof({name: int(value) for name, value in sums.items()}, mismatches, num_pending)


async def verify(session: AsyncSession) -> list[Mismatch]:
    """Compare events, rollups, holds and statements, as the worker; nothing to say is all well.

    Requests that end meanwhile are seen by all or by none where the session's transaction is
    REPEATABLE READ; at READ COMMITTED a mismatch is worth a second look.
    """
    rollups = (await session.execute(FIND_ROLLUP_MISMATCHES)).mappings().all()
    holds = (await session.execute(FIND_HOLD_MISMATCHES)).all()
    costs = (await session.execute(FIND_COST_MISMATCHES)).all()
    stated = (await session.execute(FIND_STATEMENT_MISMATCHES)).mappings().all()
    broken = (await session.execute(FIND_BROKEN_STATEMENTS)).all()
    credited = (await session.execute(FIND_CREDIT_MISMATCHES)).all()
    return [
        *(_sum_mismatch("rollup", dict(row), _COUNTS) for row in rollups),
        *(
            Mismatch(
                kind="event_without_settled_hold"
                if row.has_event
                else "settled_hold_without_event",
                subject=str(row.id),
                expected="settled" if row.has_event else "an event",
                found=str(row.state) if row.has_event else "none",
            )
            for row in holds
        ),
        *(
            Mismatch("event_cost", str(row.id), str(row.expected), str(row.cost_nano))
            for row in costs
        ),
        *(_sum_mismatch("statement_lines", dict(row), _STATED) for row in stated),
        *(
            Mismatch(
                kind="statement",
                subject=row.number,
                expected=f"total {row.lines_nano}, carried in {row.carried_before_nano}, closed",
                found=f"total {row.total_nano}, carried in {row.carried_in_nano}, {row.state}",
            )
            for row in broken
        ),
        *(
            Mismatch("credit", str(row.id), f"at most {row.cost_nano or 0}", str(row.amount_nano))
            for row in credited
        ),
    ]


def _sum_mismatch(kind: str, row: dict[str, Any], counted: Sequence[str]) -> Mismatch:
    excess = {name: int(row[name]) for name in counted if row[name]}
    key = {name: value for name, value in row.items() if name not in (*counted, "events")}
    return Mismatch(
        kind=kind,
        subject=" ".join(f"{name}={value}" for name, value in key.items()),
        expected="the sum of the usage",
        found=f"a sum that lacks {excess}",
    )


async def _check_journals(
    session: AsyncSession, journals: Sequence[Told]
) -> tuple[list[Mismatch], int]:
    """Each request that ended is an event with the journal's numbers, is free, or is to come."""
    mismatches: list[Mismatch] = []
    num_pending = 0
    for begin in range(0, len(journals), BATCH):
        batch = journals[begin : begin + BATCH]
        ids = [told.settlement.request_id for told in batch]
        found = await session.scalars(select(UsageEvent).where(UsageEvent.id.in_(ids)))
        events = {event.id: event for event in found}
        for told in batch:
            event = events.get(told.settlement.request_id)
            if event is None and not told.is_settled:
                num_pending += 1
            elif mismatch := _compare(told, event):
                mismatches.append(mismatch)
    return mismatches, num_pending


def _compare(told: Told, event: UsageEvent | None) -> Mismatch | None:
    # One that was given up at its last heartbeat keeps what it was given up with.
    if event is not None and event.outcome == LOST:
        return None
    bill = told.settlement.bill
    expected = (
        None
        if bill is None
        else (bill.prompt_tokens, bill.cached_tokens, bill.completion_tokens, bill.cost_nano)
    )
    found = (
        None
        if event is None
        else (event.prompt_tokens, event.cached_tokens, event.completion_tokens, event.cost_nano)
    )
    if expected == found:
        return None
    subject = str(told.settlement.request_id)
    return Mismatch("journal", subject, str(expected or "no event"), str(found or "no event"))


async def _check_audit(session: AsyncSession) -> list[Mismatch]:
    chains: list[tuple[uuid.UUID | None, str]] = [(None, "the operators' chain")]
    tenants = await session.execute(select(Tenant.id, Tenant.slug).order_by(Tenant.slug))
    chains += [(row.id, f"the chain of {row.slug}") for row in tenants]
    mismatches = []
    for tenant_id, name in chains:
        number = await audit.verify_chain(session, tenant_id)
        if number is not None:
            mismatches.append(Mismatch("audit", f"{name}, row {number}", "its hash", "another"))
    return mismatches
