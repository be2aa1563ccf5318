"""Tenants, for operators."""

import datetime

import msgspec
from litestar import get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from gateway import audit, tenants
from gateway.auth import Principal
from gateway.database import Database
from gateway.tables import Tenant
from gateway.tenants import Status

TAGS = ["admin: tenants"]


class NewTenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A customer to be. The slug begins its models' names and never changes."""

    slug: str
    # What people call it; the slug where nothing is said.
    name: str | None = None


class TenantChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`suspended` refuses all its keys until it is `active` again; `closed` is for good."""

    status: Status


class TenantView(msgspec.Struct, frozen=True):
    """A customer."""

    tenant: str
    name: str
    status: str
    created_at: datetime.datetime

    @classmethod
    def of(cls, tenant: Tenant) -> "TenantView":
        return cls(tenant.slug, tenant.name, tenant.status, tenant.created_at)


class TenantList(msgspec.Struct, frozen=True):
    """All tenants, closed ones too."""

    data: list[TenantView]


@post("/tenants", scope="operator", tags=TAGS, summary="Create a tenant")
async def create_tenant(
    data: JSONBody[NewTenant],
    database: NamedDependency[Database],
    principal: NamedDependency[Principal],
) -> TenantView:
    async with database.as_worker() as session:
        tenant = await tenants.create_tenant(
            session, slug=data.slug, name=data.slug if data.name is None else data.name
        )
        await audit.record(
            session,
            tenant_id=tenant.id,
            actor_key_id=principal.key_id,
            action="tenant.create",
            subject=tenant.slug,
            details={"name": tenant.name},
        )
    return TenantView.of(tenant)


@get("/tenants", scope="operator", tags=TAGS, summary="List the tenants")
async def list_tenants(database: NamedDependency[Database]) -> TenantList:
    async with database.as_worker() as session:
        return TenantList([TenantView.of(t) for t in await tenants.list_tenants(session)])


@get("/tenants/{tenant:str}", scope="operator", tags=TAGS, summary="Show a tenant")
async def get_tenant(tenant: FromPath[str], database: NamedDependency[Database]) -> TenantView:
    async with database.as_worker() as session:
        return TenantView.of(await tenants.get_tenant(session, tenant))


@patch(
    "/tenants/{tenant:str}",
    scope="operator",
    tags=TAGS,
    summary="Suspend, reopen or close a tenant",
)
async def set_status(
    tenant: FromPath[str],
    data: JSONBody[TenantChange],
    database: NamedDependency[Database],
    principal: NamedDependency[Principal],
) -> TenantView:
    async with database.as_worker() as session:
        before = (await tenants.get_tenant(session, tenant, for_update=True)).status
        changed = await tenants.set_status(session, tenant, status=data.status)
        await audit.record(
            session,
            tenant_id=changed.id,
            actor_key_id=principal.key_id,
            action=f"tenant.{data.status}",
            subject=changed.slug,
            details=audit.change({"status": before}, {"status": changed.status}),
        )
    return TenantView.of(changed)
