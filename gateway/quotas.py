"""How much of the store a tenant may fill: so many adapters, so many bytes of their versions.

Bytes that several versions of one tenant share count once, as they are kept once; those that other
tenants share count for each. Checks; books nothing itself.
"""

import uuid
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.errors import QuotaExceeded
from gateway.tables import Adapter, AdapterVersion

# Uploads of one tenant are booked one after the other from here on; keys and calls go on.
LIMITS = text("""
    SELECT max_adapters, max_adapter_bytes FROM tenants WHERE id = :tenant_id FOR NO KEY UPDATE
""")

COUNT_ADAPTERS = text("""
    SELECT count(*) FROM adapters
    WHERE tenant_id = :tenant_id AND deleted_at IS NULL AND id <> :adapter_id
""")

# Without the version that is being booked.
COUNT_BYTES = text("""
    SELECT coalesce(sum(size_bytes), 0)::bigint AS used,
           coalesce(bool_or(weights_digest = :weights_digest), false) AS is_there
    FROM (
        SELECT DISTINCT ON (weights_digest) weights_digest, size_bytes FROM adapter_versions
        WHERE tenant_id = :tenant_id AND state <> 'rejected' AND purged_at IS NULL
              AND id <> :version_id
    ) AS kept
""")


@dataclass(frozen=True, slots=True)
class Quotas:
    """The operator's limits for tenants that have none of their own; None for no limit."""

    max_adapters: int | None = None
    max_adapter_bytes: int | None = None

    async def check(self, session: AsyncSession, version: AdapterVersion) -> None:
        """Refuse the version that this transaction has just added where it is too much.

        Exact however many are added at once: the others wait until this transaction ends. Raises
        QuotaExceeded.
        """
        limits = await self._limits(session, version.tenant_id)
        if version.number == 1:
            await _check_number(session, version.tenant_id, version.adapter_id, limits)
        if limits.max_adapter_bytes is not None:
            await self._check_bytes(session, version, limits.max_adapter_bytes)

    async def check_restored(self, session: AsyncSession, adapter: Adapter) -> None:
        """Refuse to bring a deleted adapter back where it would be one too many.

        Its bytes were never given back: what is deleted counts until it is purged. Raises
        QuotaExceeded.
        """
        limits = await self._limits(session, adapter.tenant_id)
        await _check_number(session, adapter.tenant_id, adapter.id, limits)

    async def _limits(self, session: AsyncSession, tenant_id: uuid.UUID) -> "Quotas":
        """A tenant's own where it has any; the tenant's row is locked."""
        own = (await session.execute(LIMITS, {"tenant_id": tenant_id})).one()
        return Quotas(
            max_adapters=_first(own.max_adapters, self.max_adapters),
            max_adapter_bytes=_first(own.max_adapter_bytes, self.max_adapter_bytes),
        )

    async def _check_bytes(
        self, session: AsyncSession, version: AdapterVersion, max_bytes: int
    ) -> None:
        which: dict[str, uuid.UUID | str] = {
            "tenant_id": version.tenant_id,
            "version_id": version.id,
            "weights_digest": version.weights_digest,
        }
        kept = (await session.execute(COUNT_BYTES, which)).one()
        needed = 0 if kept.is_there else version.size_bytes
        _check("bytes of adapters", limit=max_bytes, used=kept.used, needed=needed)


NO_QUOTAS = Quotas()


async def _check_number(
    session: AsyncSession, tenant_id: uuid.UUID, adapter_id: uuid.UUID, limits: Quotas
) -> None:
    if limits.max_adapters is None:
        return
    which = {"tenant_id": tenant_id, "adapter_id": adapter_id}
    used = (await session.execute(COUNT_ADAPTERS, which)).scalar_one()
    _check("adapters", limit=limits.max_adapters, used=used, needed=1)


def _first(own: int | None, default: int | None) -> int | None:
    return default if own is None else own


def _check(what: str, *, limit: int, used: int, needed: int) -> None:
    """A limit that was lowered below what is there already refuses only more of it."""
    if needed and used + needed > limit:
        raise QuotaExceeded(what, limit=limit, used=used, needed=needed)
