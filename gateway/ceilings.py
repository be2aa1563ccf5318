"""The ceilings that operators set for tenants, keys and adapters, and how full each is now.

Sets and shows; whether a request may begin is for `limits` to say. Records nothing in the audit
log: whoever knows the actor does.
"""

import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from sqlalchemy import and_, delete, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.errors import InvalidRequest
from gateway.tables import Limit, new_id

# A level of so many tokens in sixty-millionths is still far below where BIGINT would overflow.
Ceiling = Annotated[int, msgspec.Meta(ge=1, le=10**10)]
# A day: longer than any client waits.
QueueTime = Annotated[int, msgspec.Meta(ge=1, le=86_400_000)]

LevelScope = Literal["tenant", "key", "adapter"]

LEVELS = text("""
    SELECT l.*, a.public_name AS adapter, now.us AS now_us,
           leaked(l.requests_level, now.us - l.measured_at_us,
                  coalesce(l.requests_per_minute, 1)) AS requests_now,
           leaked(l.tokens_level, now.us - l.measured_at_us,
                  coalesce(l.tokens_per_minute, 1)) AS tokens_now,
           (SELECT count(*) FROM holds h
            WHERE h.tenant_id = l.tenant_id AND h.state = 'open'
              AND (l.api_key_id IS NULL OR h.api_key_id = l.api_key_id)
              AND (l.adapter_id IS NULL OR h.adapter_id = l.adapter_id)) AS num_open
    FROM limits l
    LEFT JOIN adapters a ON a.id = l.adapter_id
    CROSS JOIN LATERAL (
        SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint) AS us
    ) AS now
    WHERE l.tenant_id = :tenant_id AND (l.api_key_id IS NULL OR l.api_key_id = :api_key_id)
    ORDER BY l.adapter_id IS NOT NULL, l.api_key_id IS NOT NULL, a.public_name
""")
# A request or a token, in the unit of levels.
UNIT = 60_000_000


class Ceilings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Null, or left out, means no ceiling. A burst is what may come at once: a minute's worth where
    nothing is said.
    """

    requests_per_minute: Ceiling | None = None
    request_burst: Ceiling | None = None
    tokens_per_minute: Ceiling | None = None
    token_burst: Ceiling | None = None
    concurrent_requests: Ceiling | None = None
    # How long a request may wait for its first token before it is withdrawn.
    queue_time_ms: QueueTime | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose ceilings: a tenant's, or those of one of its keys or adapters."""

    tenant_id: uuid.UUID
    api_key_id: uuid.UUID | None = None
    adapter_id: uuid.UUID | None = None


class RuleLevel(msgspec.Struct, frozen=True):
    """One ceiling and what of it is used now, in requests or tokens."""

    ceiling: int
    used: int
    remaining: int
    # What may come at once; the ceiling itself where requests run side by side.
    burst: int
    resets_in_ms: int


class ScopeLevels(msgspec.Struct, frozen=True):
    """The ceilings of one scope; null where it has none of that kind."""

    scope: LevelScope
    # Public name of the adapter; null for the other scopes.
    adapter: str | None
    requests_per_minute: RuleLevel | None
    tokens_per_minute: RuleLevel | None
    concurrent_requests: RuleLevel | None
    queue_time_ms: int | None


async def get_ceilings(session: AsyncSession, subject: Subject) -> Ceilings:
    """None of them, where nobody set any."""
    row = (await session.scalars(select(Limit).where(_is_of(subject)))).one_or_none()
    if row is None:
        return Ceilings()
    return Ceilings(**{name: getattr(row, name) for name in Ceilings.__struct_fields__})


async def set_ceilings(session: AsyncSession, subject: Subject, ceilings: Ceilings) -> None:
    """Replace all ceilings of a subject, as the worker; what is used of them stays used.

    Raises InvalidRequest.
    """
    _check_bursts(ceilings)
    values = msgspec.structs.asdict(ceilings)
    if not any(values.values()):
        await session.execute(delete(Limit).where(_is_of(subject)))
        return
    await session.execute(
        insert(Limit)
        .values(
            id=new_id(),
            tenant_id=subject.tenant_id,
            api_key_id=subject.api_key_id,
            adapter_id=subject.adapter_id,
            **values,
        )
        .on_conflict_do_update(
            index_elements=[Limit.tenant_id, Limit.api_key_id, Limit.adapter_id], set_=values
        )
    )


async def levels_of(
    session: AsyncSession, *, tenant_id: uuid.UUID, api_key_id: uuid.UUID
) -> list[ScopeLevels]:
    """Every ceiling that a call of this key may meet: tenant's, key's, then the adapters'."""
    rows = await session.execute(LEVELS, {"tenant_id": tenant_id, "api_key_id": api_key_id})
    return [_scope_levels(row) for row in rows]


def _scope_levels(row: Any) -> ScopeLevels:
    scope: LevelScope = (
        "adapter" if row.adapter_id else "key" if row.api_key_id is not None else "tenant"
    )
    side_by_side = row.concurrent_requests
    return ScopeLevels(
        scope=scope,
        adapter=row.adapter,
        requests_per_minute=_rate_level(
            row.requests_per_minute, row.request_burst, level=row.requests_now
        ),
        tokens_per_minute=_rate_level(row.tokens_per_minute, row.token_burst, level=row.tokens_now),
        concurrent_requests=side_by_side
        and RuleLevel(
            side_by_side, row.num_open, max(side_by_side - row.num_open, 0), side_by_side, 0
        ),
        queue_time_ms=row.queue_time_ms,
    )


def _rate_level(ceiling: int | None, burst: int | None, *, level: int) -> RuleLevel | None:
    if ceiling is None:
        return None
    room = burst or ceiling
    return RuleLevel(
        ceiling=ceiling,
        used=-(-level // UNIT),
        remaining=max((room * UNIT - level) // UNIT, 0),
        burst=room,
        resets_in_ms=-(-level // (ceiling * 1000)),
    )


def _is_of(subject: Subject) -> Any:
    return and_(
        Limit.tenant_id == subject.tenant_id,
        Limit.api_key_id.is_not_distinct_from(subject.api_key_id),
        Limit.adapter_id.is_not_distinct_from(subject.adapter_id),
    )


def _check_bursts(ceilings: Ceilings) -> None:
    for burst, rate in (
        ("request_burst", "requests_per_minute"),
        ("token_burst", "tokens_per_minute"),
    ):
        if getattr(ceilings, burst) is not None and getattr(ceilings, rate) is None:
            raise InvalidRequest(f"{burst} needs {rate}: set both or neither.", param=burst)
