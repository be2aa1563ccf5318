"""Facts about the audit log: it holds no secret, and a changed row shows."""

import asyncio
import uuid
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import ProgrammingError

from gateway import audit, auth, tenants
from gateway.database import Database
from gateway.tables import AuditEntry
from tests.conftest import Home, execute


async def record(
    database: Database, tenant_id: uuid.UUID | None, *, subject: str = "s", **details: Any
) -> None:
    async with database.as_worker() as session:
        await audit.record(
            session,
            tenant_id=tenant_id,
            actor_key_id=None,
            action="test",
            subject=subject,
            details=details,
        )


async def first_wrong(database: Database, tenant_id: uuid.UUID | None) -> int | None:
    async with database.as_worker() as session:
        return await audit.verify_chain(session, tenant_id)


@pytest.fixture
async def tenant_id(database: Database) -> uuid.UUID:
    async with database.as_worker() as session:
        return (await tenants.create_tenant(session, slug="acme", name="Acme")).id


async def test_each_tenant_has_a_chain_of_its_own(database: Database, tenant_id: uuid.UUID) -> None:
    for owner in (tenant_id, None, tenant_id):
        await record(database, owner, nested={"b": [1, 2.5, None, "ü"], "a": True})
    async with database.as_worker() as session:
        rows = (await session.scalars(select(AuditEntry).order_by(AuditEntry.id))).all()
    assert [(row.tenant_id, row.number) for row in rows] == [
        (tenant_id, 1),
        (None, 1),
        (tenant_id, 2),
    ]
    assert len({row.hash for row in rows}) == 3
    assert await first_wrong(database, tenant_id) is None
    assert await first_wrong(database, None) is None


async def test_writers_at_once_make_one_chain(database: Database, tenant_id: uuid.UUID) -> None:
    await asyncio.gather(*(record(database, tenant_id, writer=writer) for writer in range(20)))
    async with database.as_worker() as session:
        numbers = (await session.scalars(select(AuditEntry.number))).all()
    assert sorted(numbers) == list(range(1, 21))
    assert await first_wrong(database, tenant_id) is None


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE audit_log SET details = '{\"price\": 7}' WHERE number = 2",
        "UPDATE audit_log SET subject = 'another' WHERE number = 2",
        "UPDATE audit_log SET at = at + interval '1 microsecond' WHERE number = 2",
        "UPDATE audit_log SET hash = decode(repeat('00', 32), 'hex') WHERE number = 2",
        "DELETE FROM audit_log WHERE number = 2",
    ],
)
async def test_a_row_that_was_changed_behind_our_back_shows(
    database: Database, tenant_id: uuid.UUID, home: Home, tampering: str
) -> None:
    for price in range(4):
        await record(database, tenant_id, price=price)
    await execute(home.superuser_url, tampering)
    assert await first_wrong(database, tenant_id) == 2


async def test_a_row_of_an_undone_action_is_undone_too(
    database: Database, tenant_id: uuid.UUID
) -> None:
    async def act() -> None:
        async with database.as_worker() as session:
            await audit.record(
                session,
                tenant_id=tenant_id,
                actor_key_id=None,
                action="test",
                subject="s",
                details={},
            )
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await act()
    await record(database, tenant_id)
    assert await first_wrong(database, tenant_id) is None


async def test_no_key_and_no_secret_is_written(database: Database, tenant_id: uuid.UUID) -> None:
    plain = auth.new_key().plain
    await record(
        database,
        tenant_id,
        subject=f"key {plain}",
        name="kept",
        tokens=7,
        key_id=tenant_id,
        key=plain,
        pepper="p",
        nested=[{"Password": "p", "note": f"was {plain}, is gone"}],
    )
    async with database.as_worker() as session:
        row = (await session.scalars(select(AuditEntry))).one()
    assert plain not in f"{row.subject} {row.details}"
    assert row.details == {
        "name": "kept",
        "tokens": 7,
        "key_id": str(tenant_id),
        "key": "[redacted]",
        "pepper": "[redacted]",
        "nested": [{"Password": "[redacted]", "note": "was [redacted], is gone"}],
    }


@pytest.mark.parametrize(
    "statement", ["UPDATE audit_log SET subject = ''", "DELETE FROM audit_log"]
)
async def test_not_even_the_worker_may_change_a_row(database: Database, statement: str) -> None:
    with pytest.raises(ProgrammingError, match="permission denied"):
        async with database.as_worker() as session:
            await session.execute(text(statement))
