"""How adapters and versions go away: deleted, for a while to be restored, then purged.

Deleted is not offered any more, and nothing is lost. Purged has no way back: an operator asked for
it, or the delay since the deletion is over. Nothing is purged while a request runs on it or an
alias stands for it. What stays for ever is a row without contents, a tombstone: names and numbers
are never used again, and a usage event's digest can still be explained.

Bytes in the store lie under their digest alone, because engines know no tenants; they are shared by
all who uploaded the same. So they are erased when *no* tenant's version that is not purged refers
to them. So are files as they were uploaded, under their SHA-256; which of several spellings of the
same weights lies beside the adapter is nobody's concern, and stays with the last of them. That
somebody else has the same must not show: purging answers alike whether bytes were erased or kept.
"""

import asyncio
import datetime
import logging
import uuid

from sqlalchemy import ColumnElement, delete, exists, func, null, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.errors import StoreUnavailable
from gateway import audit
from gateway.adapter_rows import any_adapter, any_version, living_adapter
from gateway.aliases import leave_version
from gateway.background import Background
from gateway.blobs import Blobs
from gateway.database import Database
from gateway.errors import Conflict, NotFound
from gateway.quotas import NO_QUOTAS, Quotas
from gateway.tables import (
    Adapter,
    AdapterAlias,
    AdapterGrant,
    AdapterVersion,
    Hold,
)

logger = logging.getLogger(__name__)

SWEEP_S = 600.0


class Retention(Background):
    """Mutable: the task that purges what was deleted long enough ago, while used as a context.

    Every change is one transaction with its audit row.
    """

    def __init__(
        self,
        database: Database,
        blobs: Blobs,
        *,
        purge_after: datetime.timedelta,
        quotas: Quotas = NO_QUOTAS,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._quotas = quotas
        self.purge_after = purge_after

    # Adapters.

    async def delete_adapter(self, tenant: str, adapter: str, *, actor_key_id: uuid.UUID) -> None:
        """Stop offering an adapter, to anybody. Raises NotFound."""
        async with self._database.as_worker() as session:
            row = await living_adapter(session, tenant, adapter, for_update=True)
            row.deleted_at = func.now()
            await _record(session, row, "adapter.delete", actor_key_id=actor_key_id)

    async def restore_adapter(self, tenant: str, adapter: str, *, actor_key_id: uuid.UUID) -> None:
        """Offer a deleted adapter again, as it was.

        Raises NotFound, Conflict, or QuotaExceeded where others took its place.
        """
        async with self._database.as_worker() as session:
            row = await any_adapter(session, tenant, adapter, for_update=True)
            _check_restorable(row, row.public_name)
            await self._quotas.check_restored(session, row)
            row.deleted_at = None
            await _record(session, row, "adapter.restore", actor_key_id=actor_key_id)

    async def purge_adapter(self, tenant: str, adapter: str, *, actor_key_id: uuid.UUID) -> None:
        """Purge a deleted adapter with all its versions now. Raises NotFound or Conflict."""
        async with self._database.as_worker() as session:
            row = await any_adapter(session, tenant, adapter, for_update=True)
            _check_purgeable(row, row.public_name)
            if await _is_held(session, Hold.adapter_id == row.id):
                raise _in_use(row.public_name)
            await _purge_adapter(session, row, actor_key_id=actor_key_id)
        await self.erase()

    # Versions.

    async def delete_version(
        self, tenant: str, adapter: str, number: int, *, actor_key_id: uuid.UUID
    ) -> None:
        """Stop offering one version. `latest` falls back to the newest that is left.

        Raises NotFound, or Conflict where another alias stands for it or no other is ready.
        """
        async with self._database.as_worker() as session:
            row = await living_adapter(session, tenant, adapter, for_update=True)
            version = await any_version(session, row, number)
            if version.deleted_at is not None:
                raise NotFound(f"{_name(row, version)!r} is deleted already.", param="version")
            await leave_version(session, row, version, actor_key_id=actor_key_id)
            version.deleted_at = func.now()
            await _record(
                session, row, "adapter.version.delete", version=version, actor_key_id=actor_key_id
            )

    async def restore_version(
        self, tenant: str, adapter: str, number: int, *, actor_key_id: uuid.UUID
    ) -> None:
        """Offer a deleted version again, by its number; aliases stay where they are.

        Raises NotFound or Conflict.
        """
        async with self._database.as_worker() as session:
            row = await living_adapter(session, tenant, adapter, for_update=True)
            version = await any_version(session, row, number)
            _check_restorable(version, _name(row, version))
            version.deleted_at = None
            await _record(
                session, row, "adapter.version.restore", version=version, actor_key_id=actor_key_id
            )

    async def purge_version(
        self, tenant: str, adapter: str, number: int, *, actor_key_id: uuid.UUID
    ) -> None:
        """Purge a deleted version now. Raises NotFound or Conflict."""
        async with self._database.as_worker() as session:
            row = await living_adapter(session, tenant, adapter, for_update=True)
            version = await any_version(session, row, number)
            _check_purgeable(version, _name(row, version))
            if await _is_referenced(session, version):
                raise _in_use(_name(row, version))
            await _purge_version(session, row, version, actor_key_id=actor_key_id)
        await self.erase()

    # What nobody asks for by name.

    async def sweep(self) -> int:
        """Purge what was deleted long enough ago and erase what nobody refers to.

        Returns how many adapters and versions were purged; what is in use waits for another time.
        """
        num_purged = 0
        for adapter_id in await self._overdue_adapters():
            num_purged += await self._purge_overdue(adapter_id)
        await self.erase()
        if num_purged:
            logger.info("purged", extra={"num_purged": num_purged})
        return num_purged

    async def erase(self) -> None:
        """Remove the bytes of purged versions from the store, where no other version needs them.

        What the store refuses is tried again at the next sweep.
        """
        async with self._database.as_worker() as session:
            pending = AdapterVersion.purged_at.is_not(None) & AdapterVersion.erased_at.is_(None)
            query = select(AdapterVersion).where(pending).order_by(AdapterVersion.purged_at)
            versions = (await session.scalars(query)).all()
        for version in versions:
            try:
                await self._erase(version)
            except StoreUnavailable as error:
                logger.warning(
                    "erasing_failed", extra={"version_id": str(version.id), "reason": str(error)}
                )

    async def _erase(self, version: AdapterVersion) -> None:
        files = (version.source_files or {}).values()
        if await self._blobs.discard(version.weights_digest, version.text_bundle_digest, files):
            async with self._database.as_worker() as session:
                row = await session.get_one(AdapterVersion, version.id)
                row.erased_at = func.now()
                row.source_files = None

    async def _overdue_adapters(self) -> list[uuid.UUID]:
        """Adapters that are overdue themselves, or have versions that are."""
        adapters = select(Adapter.id).where(
            Adapter.purged_at.is_(None), Adapter.deleted_at < func.now() - self.purge_after
        )
        versions = select(AdapterVersion.adapter_id).where(
            AdapterVersion.purged_at.is_(None),
            AdapterVersion.deleted_at < func.now() - self.purge_after,
        )
        async with self._database.as_worker() as session:
            return list((await session.scalars(adapters.union(versions))).all())

    async def _purge_overdue(self, adapter_id: uuid.UUID) -> int:
        """Purge an adapter, or those of its versions, whose time has come and that are not used."""
        moment = func.now() - self.purge_after
        num_purged = 0
        async with self._database.as_worker() as session:
            adapter = await session.get_one(Adapter, adapter_id, with_for_update=True)
            is_overdue = select(Adapter.id).where(
                Adapter.id == adapter_id, Adapter.purged_at.is_(None), Adapter.deleted_at < moment
            )
            if await session.scalar(is_overdue) is not None:
                if await _is_held(session, Hold.adapter_id == adapter_id):
                    return 0
                await _purge_adapter(session, adapter, actor_key_id=None)
                return 1
            versions = select(AdapterVersion).where(
                AdapterVersion.adapter_id == adapter_id,
                AdapterVersion.purged_at.is_(None),
                AdapterVersion.deleted_at < moment,
            )
            for version in (await session.scalars(versions)).all():
                if not await _is_referenced(session, version):
                    await _purge_version(session, adapter, version, actor_key_id=None)
                    num_purged += 1
        return num_purged

    async def _run_forever(self) -> None:
        while True:
            try:
                await self.sweep()
            except Exception:
                logger.warning("sweep_failed", exc_info=True)
            await asyncio.sleep(SWEEP_S)


async def _purge_adapter(
    session: AsyncSession, adapter: Adapter, *, actor_key_id: uuid.UUID | None
) -> None:
    """The adapter's row is locked."""
    adapter.purged_at = func.now()
    for table in (AdapterAlias, AdapterGrant):
        await session.execute(delete(table).where(table.adapter_id == adapter.id))
    await _empty(session, AdapterVersion.adapter_id == adapter.id)
    await _record(session, adapter, "adapter.purge", actor_key_id=actor_key_id)


async def _purge_version(
    session: AsyncSession,
    adapter: Adapter,
    version: AdapterVersion,
    *,
    actor_key_id: uuid.UUID | None,
) -> None:
    await _empty(session, AdapterVersion.id == version.id)
    await _record(
        session, adapter, "adapter.version.purge", version=version, actor_key_id=actor_key_id
    )


async def _empty(session: AsyncSession, which: ColumnElement[bool]) -> None:
    """Turn versions into tombstones: what their uploads told of themselves goes, identity stays."""
    await session.execute(
        update(AdapterVersion)
        .where(which, AdapterVersion.purged_at.is_(None))
        .values(
            deleted_at=func.coalesce(AdapterVersion.deleted_at, func.now()),
            purged_at=func.now(),
            # SQL's null, not JSON's.
            certificate=null(),
            findings=[],
            example_results=null(),
        )
        .execution_options(synchronize_session=False)
    )


async def _is_held(session: AsyncSession, which: ColumnElement[bool]) -> bool:
    found = select(exists().where(Hold.state == "open", which))
    return bool(await session.scalar(found))


async def _is_referenced(session: AsyncSession, version: AdapterVersion) -> bool:
    """Whether a request runs on a version, or an alias stands for it."""
    is_named = or_(
        AdapterAlias.version_id == version.id, AdapterAlias.canary_version_id == version.id
    )
    aliased = select(exists().where(AdapterAlias.adapter_id == version.adapter_id, is_named))
    return bool(await session.scalar(aliased)) or await _is_held(
        session, Hold.adapter_version_id == version.id
    )


async def _record(
    session: AsyncSession,
    adapter: Adapter,
    action: str,
    *,
    actor_key_id: uuid.UUID | None,
    version: AdapterVersion | None = None,
) -> None:
    await audit.record(
        session,
        tenant_id=adapter.tenant_id,
        actor_key_id=actor_key_id,
        action=action,
        subject=adapter.public_name if version is None else _name(adapter, version),
        details={} if version is None else {"version_digest": version.version_digest},
    )


def _name(adapter: Adapter, version: AdapterVersion) -> str:
    return f"{adapter.public_name}@{version.number}"


def _check_restorable(row: Adapter | AdapterVersion, name: str) -> None:
    if row.purged_at is not None:
        raise Conflict(f"{name!r} was purged: there is nothing left to restore.")
    if row.deleted_at is None:
        raise Conflict(f"{name!r} is not deleted.")


def _check_purgeable(row: Adapter | AdapterVersion, name: str) -> None:
    if row.purged_at is not None:
        raise Conflict(f"{name!r} was purged already.")
    if row.deleted_at is None:
        raise Conflict(f"{name!r} is not deleted: delete it first.")


def _in_use(name: str) -> Conflict:
    return Conflict(f"{name!r} is in use by a running request or an alias: try again later.")
