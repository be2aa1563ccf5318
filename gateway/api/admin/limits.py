"""Ceilings of tenants, keys and adapters, for operators."""

import uuid

import msgspec
from litestar import get, put
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from gateway import audit, auth, tenants
from gateway.auth import Principal
from gateway.ceilings import Ceilings, Subject, get_ceilings, set_ceilings
from gateway.database import Database
from gateway.errors import NotFound
from gateway.tables import Adapter

TAGS = ["admin: limits"]
OF_TENANT = "/tenants/{tenant:str}/limits"
OF_KEY = "/tenants/{tenant:str}/keys/{key_id:uuid}/limits"
OF_ADAPTER = "/tenants/{tenant:str}/adapters/{adapter:str}/limits"


@get(OF_TENANT, scope="operator", tags=TAGS, summary="Show a tenant's ceilings")
async def get_tenant_limits(tenant: FromPath[str], database: NamedDependency[Database]) -> Ceilings:
    async with database.as_worker() as session:
        return await get_ceilings(session, await _of_tenant(session, tenant))


@put(OF_TENANT, scope="operator", tags=TAGS, summary="Set a tenant's ceilings")
async def set_tenant_limits(
    tenant: FromPath[str],
    data: JSONBody[Ceilings],
    database: NamedDependency[Database],
    principal: NamedDependency[Principal],
) -> Ceilings:
    """All of them at once: what is left out has no ceiling from now on."""
    async with database.as_worker() as session:
        subject = await _of_tenant(session, tenant)
        return await _set(session, subject, data, principal=principal, name=tenant)


@get(OF_KEY, scope="operator", tags=TAGS, summary="Show a key's ceilings")
async def get_key_limits(
    tenant: FromPath[str], key_id: FromPath[uuid.UUID], database: NamedDependency[Database]
) -> Ceilings:
    async with database.as_worker() as session:
        return await get_ceilings(session, await _of_key(session, tenant, key_id))


@put(OF_KEY, scope="operator", tags=TAGS, summary="Set a key's ceilings")
async def set_key_limits(
    tenant: FromPath[str],
    key_id: FromPath[uuid.UUID],
    data: JSONBody[Ceilings],
    database: NamedDependency[Database],
    principal: NamedDependency[Principal],
) -> Ceilings:
    """All of them at once. They hold beside the tenant's: a call must pass both."""
    async with database.as_worker() as session:
        subject = await _of_key(session, tenant, key_id)
        return await _set(session, subject, data, principal=principal, name=str(key_id))


@get(OF_ADAPTER, scope="operator", tags=TAGS, summary="Show an adapter's ceilings")
async def get_adapter_limits(
    tenant: FromPath[str], adapter: FromPath[str], database: NamedDependency[Database]
) -> Ceilings:
    async with database.as_worker() as session:
        return await get_ceilings(session, await _of_adapter(session, tenant, adapter))


@put(OF_ADAPTER, scope="operator", tags=TAGS, summary="Set an adapter's ceilings")
async def set_adapter_limits(
    tenant: FromPath[str],
    adapter: FromPath[str],
    data: JSONBody[Ceilings],
    database: NamedDependency[Database],
    principal: NamedDependency[Principal],
) -> Ceilings:
    """All of them at once, for all that call the adapter together."""
    async with database.as_worker() as session:
        subject = await _of_adapter(session, tenant, adapter)
        return await _set(session, subject, data, principal=principal, name=adapter)


async def _set(
    session: AsyncSession, subject: Subject, ceilings: Ceilings, *, principal: Principal, name: str
) -> Ceilings:
    before = await get_ceilings(session, subject)
    await set_ceilings(session, subject, ceilings)
    await audit.record(
        session,
        tenant_id=subject.tenant_id,
        actor_key_id=principal.key_id,
        action="limits.set",
        subject=name,
        details={"before": _told(before), "after": _told(ceilings)},
    )
    return ceilings


def _told(ceilings: Ceilings) -> dict[str, int]:
    return {name: value for name, value in msgspec.structs.asdict(ceilings).items() if value}


async def _of_tenant(session: AsyncSession, tenant: str) -> Subject:
    return Subject((await tenants.get_tenant(session, tenant)).id)


async def _of_key(session: AsyncSession, tenant: str, key_id: uuid.UUID) -> Subject:
    owner = await tenants.get_tenant(session, tenant)
    key = await auth.get_key(session, tenant_id=owner.id, key_id=key_id)
    return Subject(owner.id, api_key_id=key.id)


async def _of_adapter(session: AsyncSession, tenant: str, slug: str) -> Subject:
    owner = await tenants.get_tenant(session, tenant)
    query = select(Adapter.id).where(
        Adapter.tenant_id == owner.id, Adapter.slug == slug, Adapter.deleted_at.is_(None)
    )
    # PostgreSQL takes no NUL.
    adapter_id = await session.scalar(query) if slug.isprintable() else None
    if adapter_id is None:
        raise NotFound(f"The tenant {tenant!r} has no adapter {slug!r}.")
    return Subject(owner.id, adapter_id=adapter_id)
