"""What operators did, in rows that nobody can change unseen.

Each row's hash covers the row before it, one chain a tenant and one for what concerns no tenant.
Whoever can write the whole table can also forge it whole: compare its last hash with one kept
elsewhere. Never stores a key or a secret.
"""

import datetime
import hashlib
import json
import re
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import msgspec
from sqlalchemy import Select, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.tables import AuditEntry, new_id

# What the first row of a chain covers.
NO_HASH = bytes(32)
REDACTED = "[redacted]"
SECRET_NAMES = re.compile(
    r"secret|password|pepper|authorization|token$|hmac|salt|^(api_?)?key$", re.IGNORECASE
)
KEYS = re.compile(r"ml_[0-9A-Za-z]+_[0-9A-Za-z]+")

# One writer a chain until the end of its transaction; and the time, as the database sees it.
LOCK_CHAIN = text(
    "SELECT pg_advisory_xact_lock(hashtextextended('audit ' || :chain, 0)), clock_timestamp() AS at"
)


class ExportedEntry(msgspec.Struct, frozen=True):
    """A row of the log as it leaves the house: all that its hash covers, and the hash."""

    id: uuid.UUID
    tenant_id: uuid.UUID | None
    number: int
    actor_key_id: uuid.UUID | None
    action: str
    subject: str
    details: dict[str, Any]
    at: datetime.datetime
    # 64 hexadecimal digits.
    hash: str


class BrokenChain(Exception):
    """A line of an exported log is missing, was changed, or is no line of one."""


async def record(
    session: AsyncSession,
    *,
    tenant_id: uuid.UUID | None,
    actor_key_id: uuid.UUID | None,
    action: str,
    subject: str,
    details: Mapping[str, Any],
) -> AuditEntry:
    """Append one row in the caller's transaction: it stands if, and only if, what it tells does."""
    at = (await session.execute(LOCK_CHAIN, {"chain": str(tenant_id)})).one().at
    last = (
        await session.scalars(_chain(tenant_id).order_by(AuditEntry.number.desc()).limit(1))
    ).one_or_none()
    entry = AuditEntry(
        id=new_id(),
        tenant_id=tenant_id,
        number=last.number + 1 if last is not None else 1,
        actor_key_id=actor_key_id,
        action=action,
        subject=redact(subject),
        details=redact(dict(details)),
        at=at,
    )
    entry.hash = _hash_of(entry, previous=last.hash if last is not None else NO_HASH)
    session.add(entry)
    await session.flush()
    return entry


async def verify_chain(session: AsyncSession, tenant_id: uuid.UUID | None) -> int | None:
    """Return the number of the first row that is missing or was changed; None where all fit."""
    previous, number = NO_HASH, 0
    rows = await session.stream_scalars(_chain(tenant_id).order_by(AuditEntry.number))
    async for entry in rows:
        number += 1
        if entry.number != number or entry.hash != _hash_of(entry, previous=previous):
            return number
        previous = entry.hash
    return None


async def export_chain(
    session: AsyncSession, tenant_id: uuid.UUID | None
) -> AsyncIterator[ExportedEntry]:
    """A chain from its first row to its last."""
    rows = await session.stream_scalars(_chain(tenant_id).order_by(AuditEntry.number))
    async for entry in rows:
        yield ExportedEntry(
            id=entry.id,
            tenant_id=entry.tenant_id,
            number=entry.number,
            actor_key_id=entry.actor_key_id,
            action=entry.action,
            subject=entry.subject,
            details=entry.details,
            at=entry.at.astimezone(datetime.UTC),
            hash=entry.hash.hex(),
        )


def verify_export(lines: Iterable[bytes]) -> dict[uuid.UUID | None, tuple[int, str]]:
    """Check exported chains, with nothing but their lines; return each one's length and last hash.

    Compare the hash with one kept elsewhere: a log that was cut short fits too. Raises BrokenChain.
    """
    ends: dict[uuid.UUID | None, tuple[int, str]] = {}
    for place, line in enumerate(lines, start=1):
        try:
            entry = msgspec.json.decode(line, type=ExportedEntry)
            digest = bytes.fromhex(entry.hash)
        except ValueError as fault:
            raise BrokenChain(f"line {place} is no line of an audit log: {fault}") from fault
        number, last = ends.get(entry.tenant_id, (0, NO_HASH.hex()))
        if entry.number != number + 1:
            raise BrokenChain(f"line {place} is row {entry.number}; row {number + 1} is missing")
        if digest != _hash_of(entry, previous=bytes.fromhex(last)):
            raise BrokenChain(f"line {place}, row {entry.number}, does not have its hash")
        ends[entry.tenant_id] = entry.number, entry.hash
    return ends


def change(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Details of an action that changed something: the fields that differ, as they were and are."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return {
        "before": {name: before[name] for name in names if name in before},
        "after": {name: after[name] for name in names if name in after},
    }


def redact(value: Any) -> Any:
    """The value without API keys and without anything that is called a secret."""
    if isinstance(value, str):
        return KEYS.sub(REDACTED, value)
    if isinstance(value, Mapping):
        return {
            str(name): REDACTED if SECRET_NAMES.search(str(name)) else redact(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(inner) for inner in value]
    if isinstance(value, uuid.UUID | datetime.date):
        return str(value)
    return value


def _chain(tenant_id: uuid.UUID | None) -> Select[AuditEntry]:
    # Rows as they are now, not as this session remembers them.
    return (
        select(AuditEntry)
        .where(AuditEntry.tenant_id.is_not_distinct_from(tenant_id))
        .execution_options(populate_existing=True)
    )


def _hash_of(entry: AuditEntry | ExportedEntry, *, previous: bytes) -> bytes:
    told = [
        str(entry.id),
        str(entry.tenant_id),
        entry.number,
        str(entry.actor_key_id),
        entry.action,
        entry.subject,
        entry.details,
        entry.at.astimezone(datetime.UTC).isoformat(timespec="microseconds"),
    ]
    canonical = json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(previous + canonical.encode()).digest()
