"""What tenants ask of batches: create, show, list, cancel. Works at none."""

import datetime
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.auth import Principal
from gateway.database import Database
from gateway.errors import Conflict, InvalidRequest, LimitReached, NotFound
from gateway.files import find_file
from gateway.object_ids import Page
from gateway.tables import Batch, BatchResult, new_id

WINDOW = datetime.timedelta(hours=24)
# They wait in a row, one of a tenant at a time in each gateway.
MAX_OPEN = 100

# Batches of one tenant are counted one after the other.
LOCK_TENANT = text("SELECT FROM tenants WHERE id = :tenant_id FOR NO KEY UPDATE")


@dataclass(frozen=True, slots=True)
class Order:
    """A batch and how far it has come."""

    batch: Batch
    num_completed: int
    num_failed: int


class Orders:
    """Batches as their tenants see them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self,
        principal: Principal,
        *,
        endpoint: str,
        input_file_id: uuid.UUID | None,
        metadata: Mapping[str, str] | None,
        output_expires_after_s: int | None,
    ) -> Order:
        """Put a batch in the row. Raises NotFound, InvalidRequest or LimitReached."""
        assert principal.tenant_id is not None, "the guard lets tenants' keys in alone"
        async with self._database.as_worker() as session:
            await session.execute(LOCK_TENANT, {"tenant_id": principal.tenant_id})
            try:
                # Locked, so that it is not deleted meanwhile.
                file = await find_file(session, principal.tenant_id, input_file_id, for_update=True)
            except NotFound as error:
                raise NotFound(error.message, param="input_file_id") from error
            if file.purpose != "batch":
                raise InvalidRequest(
                    "This file came out of a batch: upload one with the purpose 'batch'.",
                    param="input_file_id",
                )
            await _check_number(session, principal.tenant_id)
            batch = Batch(
                id=new_id(),
                tenant_id=principal.tenant_id,
                api_key_id=principal.key_id,
                endpoint=endpoint,
                input_file_id=file.id,
                metadata_=None if metadata is None else dict(metadata),
                output_expires_after_s=output_expires_after_s,
                expires_at=func.now() + WINDOW,
            )
            session.add(batch)
            await session.flush()
            await session.refresh(batch)
        return Order(batch, 0, 0)

    async def get(self, tenant_id: uuid.UUID, batch_id: uuid.UUID | None) -> Order:
        """Raises NotFound, also for another tenant's."""
        async with self._database.as_tenant(tenant_id) as session:
            batch = await session.scalar(
                select(Batch).where(Batch.id == batch_id, Batch.tenant_id == tenant_id)
            )
            if batch is None:
                raise _no_batch()
            [order] = await _counted(session, [batch])
        return order

    async def list_page(self, tenant_id: uuid.UUID, page: Page) -> tuple[list[Order], bool]:
        """A page of a tenant's batches, and whether there are more."""
        async with self._database.as_tenant(tenant_id) as session:
            query = page.of(select(Batch).where(Batch.tenant_id == tenant_id), Batch.id)
            rows, has_more = page.cut((await session.scalars(query)).all())
            return await _counted(session, rows), has_more

    async def cancel(self, tenant_id: uuid.UUID, batch_id: uuid.UUID | None) -> Order:
        """Have a batch end where it is; once more changes nothing. Raises NotFound or Conflict."""
        async with self._database.as_worker() as session:
            query = select(Batch).where(Batch.id == batch_id, Batch.tenant_id == tenant_id)
            batch = await session.scalar(query.with_for_update())
            if batch is None:
                raise _no_batch()
            if batch.status not in ("validating", "in_progress", "cancelling", "cancelled"):
                raise Conflict(
                    f"This batch is {batch.status}: it cannot be cancelled any more.",
                    param="batch_id",
                )
            if batch.ended_at is None and batch.status != "cancelling":
                batch.status, batch.cancelling_at = "cancelling", func.now()
        return await self.get(tenant_id, batch_id)


async def _check_number(session: AsyncSession, tenant_id: uuid.UUID) -> None:
    is_open = (Batch.tenant_id == tenant_id) & Batch.ended_at.is_(None)
    number = await session.scalar(select(func.count()).where(is_open))
    if number is not None and number >= MAX_OPEN:
        raise LimitReached(
            f"This tenant has {number} batches that have not ended, as many as it may: cancel one,"
            " or wait until one has."
        )


async def _counted(session: AsyncSession, batches: Sequence[Batch]) -> list[Order]:
    """Each with the results that it has by now."""
    going_on = [batch.id for batch in batches if batch.ended_at is None]
    counts: dict[tuple[uuid.UUID, bool], int] = {}
    if going_on:
        found = await session.execute(
            select(BatchResult.batch_id, BatchResult.is_error, func.count())
            .where(BatchResult.batch_id.in_(going_on))
            .group_by(BatchResult.batch_id, BatchResult.is_error)
        )
        counts = {(batch_id, is_error): number for batch_id, is_error, number in found}
    return [
        Order(
            batch,
            counts.get((batch.id, False), batch.num_completed),
            counts.get((batch.id, True), batch.num_failed),
        )
        for batch in batches
    ]


def _no_batch() -> NotFound:
    return NotFound("There is no such batch.", param="batch_id")
