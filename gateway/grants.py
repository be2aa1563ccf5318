"""Who besides its owner may call an adapter.

A grant is for one tenant or for everybody, and holds for every version and alias. The caller pays;
the name keeps its owner's prefix; prefixes are cached apart, as all tenants' are. Whether a call
finds the adapter is decided by row-level security over these rows, at each call, so taking a grant
back works at once. Answers that were begun before go on.
"""

import datetime
import uuid
from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from gateway import audit, tenants
from gateway.adapter_rows import living_adapter
from gateway.database import Database
from gateway.errors import InvalidRequest, NotFound
from gateway.tables import Adapter, AdapterGrant, Tenant, new_id

# Stands where a tenant's slug can stand, and is no tenant's.
EVERYBODY = "all"


@dataclass(frozen=True, slots=True)
class GrantEntry:
    """One grant of an adapter."""

    # A tenant's slug, or EVERYBODY.
    grantee: str
    created_at: datetime.datetime


class Grants:
    """Shares adapters for operators. Every change is one transaction with its audit row."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def list_grants(self, tenant: str, adapter: str) -> list[GrantEntry]:
        """Return the grants of an adapter, the oldest first. Raises NotFound."""
        async with self._database.as_worker() as session:
            row = await living_adapter(session, tenant, adapter)
            query = (
                select(AdapterGrant, Tenant.slug)
                .outerjoin(Tenant, Tenant.id == AdapterGrant.grantee_id)
                .where(AdapterGrant.adapter_id == row.id)
                .order_by(AdapterGrant.id)
            )
            return [
                GrantEntry(slug or EVERYBODY, grant.created_at)
                for grant, slug in await session.execute(query)
            ]

    async def grant(
        self, tenant: str, adapter: str, grantee: str, *, actor_key_id: uuid.UUID
    ) -> GrantEntry:
        """Let a tenant, or EVERYBODY, call an adapter; once more changes nothing.

        Raises NotFound, or InvalidRequest where it is the tenant's own.
        """
        async with self._database.as_worker() as session:
            row = await living_adapter(session, tenant, adapter, for_update=True)
            grantee_id = await _grantee_id(session, grantee)
            if grantee_id == row.tenant_id:
                raise InvalidRequest(
                    f"The adapter {row.public_name!r} is {grantee!r}'s own.", param="grantee"
                )
            found = await _find(session, row, grantee_id)
            if found is None:
                found = AdapterGrant(
                    id=new_id(), adapter_id=row.id, tenant_id=row.tenant_id, grantee_id=grantee_id
                )
                session.add(found)
                await session.flush()
                await session.refresh(found)
                await _record(session, row, "adapter.grant", grantee, actor_key_id=actor_key_id)
            return GrantEntry(grantee, found.created_at)

    async def revoke(
        self, tenant: str, adapter: str, grantee: str, *, actor_key_id: uuid.UUID
    ) -> None:
        """Take a grant back: the next call is refused. Raises NotFound where there is none."""
        async with self._database.as_worker() as session:
            row = await living_adapter(session, tenant, adapter, for_update=True)
            found = await _find(session, row, await _grantee_id(session, grantee))
            if found is None:
                raise NotFound(
                    f"The adapter {row.public_name!r} is not shared with {grantee!r}.",
                    param="grantee",
                )
            await session.execute(delete(AdapterGrant).where(AdapterGrant.id == found.id))
            await _record(session, row, "adapter.revoke", grantee, actor_key_id=actor_key_id)


async def _grantee_id(session: AsyncSession, grantee: str) -> uuid.UUID | None:
    if grantee == EVERYBODY:
        return None
    return (await tenants.get_tenant(session, grantee)).id


async def _find(
    session: AsyncSession, adapter: Adapter, grantee_id: uuid.UUID | None
) -> AdapterGrant | None:
    query = select(AdapterGrant).where(
        AdapterGrant.adapter_id == adapter.id,
        AdapterGrant.grantee_id.is_not_distinct_from(grantee_id),
    )
    return (await session.scalars(query)).one_or_none()


async def _record(
    session: AsyncSession, adapter: Adapter, action: str, grantee: str, *, actor_key_id: uuid.UUID
) -> None:
    await audit.record(
        session,
        tenant_id=adapter.tenant_id,
        actor_key_id=actor_key_id,
        action=action,
        subject=adapter.public_name,
        details={"grantee": grantee},
    )
