"""What is kept of what people say, for how long, and how it is forgotten.

Nothing is kept unless a tenant wants it. Then prompts and completions of its requests stay for as
many days as it said, and are deleted whoever asks. To erase somebody takes names and texts away
and no number: events, statements and sums stay as they are. Knows nothing of HTTP or of engines.
"""

import asyncio
import datetime
import logging
import time
import uuid

import msgspec
from sqlalchemy import ColumnElement, delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from gateway import tenants
from gateway.database import DATABASE_TROUBLE, Database
from gateway.errors import Conflict, NotFound
from gateway.tables import (
    ApiKey,
    Batch,
    BillingAccount,
    ContentPolicy,
    EndUser,
    IdempotencyKey,
    StoredContent,
    Tenant,
    TenantFile,
)

logger = logging.getLogger(__name__)

# How long a changed wish may go unnoticed.
POLICY_CACHE_S = 5.0
ERASED = "erased"

# One statement that sets the tenant itself, in the way of `registry.MEANING`.
KEEP_DAYS = text("""
    SELECT policy.keep_days FROM (
        SELECT set_config('app.tenant', CAST(:tenant AS text), true) AS tenant OFFSET 0
    ) AS caller
    CROSS JOIN LATERAL (
        SELECT keep_days FROM content_policies WHERE caller.tenant IS NOT NULL OFFSET 0
    ) AS policy
""")


class Erased(msgspec.Struct, frozen=True):
    """How many rows were made nameless, and how many texts and files were deleted."""

    num_end_users: int
    num_contents: int
    num_files: int = 0


class Contents:
    """Keeps the texts of tenants that want it. What a crash takes with it is not made up for."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # Tenant -> (monotonic moment until which it holds, days or None)
        self._policies: dict[uuid.UUID, tuple[float, int | None]] = {}
        self._writing: set[asyncio.Task[None]] = set()

    async def keep_days(self, tenant_id: uuid.UUID) -> int | None:
        """How long this tenant's texts are kept; None for not at all."""
        holds_until, days = self._policies.get(tenant_id, (0.0, None))
        if time.monotonic() < holds_until:
            return days
        rows = await self._database.call(KEEP_DAYS, {"tenant": str(tenant_id)})
        days = rows[0]["keep_days"] if rows else None
        self._policies[tenant_id] = time.monotonic() + POLICY_CACHE_S, days
        return days

    def keep(
        self,
        tenant_id: uuid.UUID,
        request_id: uuid.UUID,
        *,
        prompt: str,
        completion: str,
        end_user: str | None,
        days: int,
    ) -> None:
        """Write one request's texts, soon."""
        row = StoredContent(
            id=request_id,
            tenant_id=tenant_id,
            end_user=end_user,
            prompt=_storable(prompt),
            completion=_storable(completion),
            expires_at=datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days),
        )
        task = asyncio.create_task(self._write(row))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def drain(self) -> None:
        await asyncio.gather(*self._writing)

    async def _write(self, row: StoredContent) -> None:
        try:
            async with self._database.as_tenant(row.tenant_id) as session:
                session.add(row)
        except DATABASE_TROUBLE:
            logger.warning("content_not_kept", exc_info=True)


def _storable(text: str) -> str:
    """PostgreSQL takes no NUL and no half of a surrogate pair."""
    return text.encode(errors="replace").decode().replace("\x00", "\ufffd")


async def get_content(session: AsyncSession, request_id: uuid.UUID) -> StoredContent:
    """Raises NotFound."""
    alive = StoredContent.expires_at > func.now()
    row = (
        await session.scalars(select(StoredContent).where(StoredContent.id == request_id, alive))
    ).one_or_none()
    if row is None:
        raise NotFound("Nothing is kept of such a request.", param="request_id")
    return row


async def set_policy(
    session: AsyncSession, tenant_id: uuid.UUID, *, keep_days: int | None
) -> int | None:
    """Say how long a tenant's texts are kept; None deletes what there is. Return what held before.

    A shorter time holds for what is kept already, too.
    """
    before = await session.scalar(
        select(ContentPolicy.keep_days).where(ContentPolicy.tenant_id == tenant_id)
    )
    if keep_days is None:
        await session.execute(delete(ContentPolicy).where(ContentPolicy.tenant_id == tenant_id))
        await _delete_contents(session, StoredContent.tenant_id == tenant_id)
        return before
    await session.execute(
        insert(ContentPolicy)
        .values(tenant_id=tenant_id, keep_days=keep_days)
        .on_conflict_do_update(index_elements=["tenant_id"], set_={"keep_days": keep_days})
    )
    too_old = StoredContent.created_at < func.now() - datetime.timedelta(days=keep_days)
    await _delete_contents(session, StoredContent.tenant_id == tenant_id, too_old)
    return before


async def erase_user(session: AsyncSession, tenant_id: uuid.UUID, *, user: str) -> Erased:
    """Take an end user's name away, and all that is kept of what was said. Raises NotFound."""
    row = (
        await session.scalars(
            select(EndUser)
            .where(EndUser.tenant_id == tenant_id, EndUser.name == user)
            .with_for_update()
        )
    ).one_or_none()
    num_contents = await _delete_contents(
        session, StoredContent.tenant_id == tenant_id, StoredContent.end_user == user
    )
    if row is None and not num_contents:
        raise NotFound("This tenant's requests named no such user.", param="user")
    if row is not None:
        row.name, row.erased_at = None, datetime.datetime.now(datetime.UTC)
        await session.flush()
    await _forget_answers(session, tenant_id)
    return Erased(int(row is not None), num_contents)


async def erase_tenant(session: AsyncSession, slug: str) -> Erased:
    """Take every name and text of a closed tenant away; the slug stays, for it is in statements.

    Raises NotFound, or Conflict where the tenant is not closed.
    """
    tenant = await tenants.get_tenant(session, slug, for_update=True)
    if tenant.status != "closed":
        raise Conflict(f"The tenant {slug!r} is {tenant.status}: close it first.", param="tenant")
    nameless = await session.execute(
        update(EndUser)
        .where(EndUser.tenant_id == tenant.id, EndUser.name.is_not(None))
        .values(name=None, erased_at=func.now())
        .returning(EndUser.id),
        execution_options={"synchronize_session": False},
    )
    num_end_users = len(nameless.all())
    for change in (
        update(ApiKey).where(ApiKey.tenant_id == tenant.id).values(name=ERASED),
        update(Tenant).where(Tenant.id == tenant.id).values(name=ERASED),
        update(BillingAccount)
        .where(BillingAccount.tenant_id == tenant.id)
        .values(bill_to="", stripe_customer_id=None),
    ):
        await session.execute(change, execution_options={"synchronize_session": False})
    await session.execute(delete(ContentPolicy).where(ContentPolicy.tenant_id == tenant.id))
    num_contents = await _delete_contents(session, StoredContent.tenant_id == tenant.id)
    await _forget_answers(session, tenant.id)
    return Erased(num_end_users, num_contents, await _give_up_files(session, tenant.id))


async def _give_up_files(session: AsyncSession, tenant_id: uuid.UUID) -> int:
    """Batches go with what came of them; bytes of files go when expired ones are swept."""
    await session.execute(
        delete(Batch).where(Batch.tenant_id == tenant_id),
        execution_options={"synchronize_session": False},
    )
    given_up = await session.execute(
        update(TenantFile)
        .where(TenantFile.tenant_id == tenant_id)
        .values(filename=ERASED, expires_at=func.now())
        .returning(TenantFile.id),
        execution_options={"synchronize_session": False},
    )
    return len(given_up.all())


async def forget_contents(database: Database) -> None:
    """Delete what is past its time."""
    async with database.as_worker() as session:
        await _delete_contents(session, StoredContent.expires_at <= func.now())


async def _delete_contents(session: AsyncSession, *which: ColumnElement[bool]) -> int:
    gone = await session.execute(
        delete(StoredContent).where(*which).returning(StoredContent.id),
        execution_options={"synchronize_session": False},
    )
    return len(gone.all())


async def _forget_answers(session: AsyncSession, tenant_id: uuid.UUID) -> None:
    """Whose they are cannot be read, so all of the tenant's go."""
    await session.execute(
        delete(IdempotencyKey).where(
            IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.answer.is_not(None)
        ),
        execution_options={"synchronize_session": False},
    )
