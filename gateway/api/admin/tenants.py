"""Tenants, for operators."""

import datetime
from typing import Annotated, Any

import msgspec
from litestar import get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from sqlalchemy.ext.asyncio import AsyncSession

from gateway import audit, tenants
from gateway.auth import Principal
from gateway.database import Database
from gateway.errors import InvalidRequest
from gateway.tables import Tenant
from gateway.tenants import Access, Status

TAGS = ["admin: tenants"]


class NewTenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A customer to be. The slug begins its models' names and never changes."""

    slug: str
    # What people call it; the slug where nothing is said.
    name: str | None = None


MaxAdapters = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
MaxBytes = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class TenantChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to be different; what is left out stays.

    `suspended` refuses all its keys until it is `active` again; `closed` is for good. A null quota
    is none. `base_model_access` says of base models, by name, whether the tenant may call them
    without an adapter: `allowed` unless they are `withheld`.
    """

    status: Status | msgspec.UnsetType = msgspec.UNSET
    max_adapters: MaxAdapters | msgspec.UnsetType | None = msgspec.UNSET
    max_adapter_bytes: MaxBytes | msgspec.UnsetType | None = msgspec.UNSET
    # Of its own files; null for what the operator gives everybody.
    max_file_bytes: MaxBytes | msgspec.UnsetType | None = msgspec.UNSET
    base_model_access: dict[str, Access] | msgspec.UnsetType = msgspec.UNSET


class TenantView(msgspec.Struct, frozen=True):
    """A customer."""

    tenant: str
    name: str
    status: str
    # Null for no limit.
    max_adapters: int | None
    max_adapter_bytes: int | None
    max_file_bytes: int | None
    # The base models that are withheld; all others are allowed.
    base_model_access: dict[str, Access]
    created_at: datetime.datetime

    @classmethod
    def of(cls, tenant: Tenant, *, withheld: list[str]) -> "TenantView":
        return cls(
            tenant=tenant.slug,
            name=tenant.name,
            status=tenant.status,
            max_adapters=tenant.max_adapters,
            max_adapter_bytes=tenant.max_adapter_bytes,
            max_file_bytes=tenant.max_file_bytes,
            base_model_access=dict.fromkeys(withheld, "withheld"),
            created_at=tenant.created_at,
        )


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
    return TenantView.of(tenant, withheld=[])


@get("/tenants", scope="operator", tags=TAGS, summary="List the tenants")
async def list_tenants(database: NamedDependency[Database]) -> TenantList:
    async with database.as_worker() as session:
        withheld = await tenants.withheld_base_models(session)
        return TenantList(
            [
                TenantView.of(tenant, withheld=withheld.get(tenant.id, []))
                for tenant in await tenants.list_tenants(session)
            ]
        )


@get("/tenants/{tenant:str}", scope="operator", tags=TAGS, summary="Show a tenant")
async def get_tenant(tenant: FromPath[str], database: NamedDependency[Database]) -> TenantView:
    async with database.as_worker() as session:
        found = await tenants.get_tenant(session, tenant)
        withheld = await tenants.withheld_base_models(session)
    return TenantView.of(found, withheld=withheld.get(found.id, []))


@patch(
    "/tenants/{tenant:str}",
    scope="operator",
    tags=TAGS,
    summary="Suspend, reopen, close or limit a tenant",
)
async def change_tenant(
    tenant: FromPath[str],
    data: JSONBody[TenantChange],
    database: NamedDependency[Database],
    principal: NamedDependency[Principal],
) -> TenantView:
    if not msgspec.to_builtins(data):
        raise InvalidRequest(f"Nothing to change: send {', '.join(data.__struct_fields__)}.")
    async with database.as_worker() as session:
        changed = await tenants.get_tenant(session, tenant, for_update=True)
        for action, details in await _apply(session, changed, data):
            await audit.record(
                session,
                tenant_id=changed.id,
                actor_key_id=principal.key_id,
                action=action,
                subject=changed.slug,
                details=details,
            )
        withheld = await tenants.withheld_base_models(session)
    return TenantView.of(changed, withheld=withheld.get(changed.id, []))


async def _apply(
    session: AsyncSession, tenant: Tenant, change: TenantChange
) -> list[tuple[str, dict[str, Any]]]:
    """Make the changes; return the action and the details of each, for the audit log."""
    actions: list[tuple[str, dict[str, Any]]] = []
    if change.status is not msgspec.UNSET:
        before = tenant.status
        await tenants.set_status(session, tenant.slug, status=change.status)
        details = audit.change({"status": before}, {"status": change.status})
        actions.append((f"tenant.{change.status}", details))
    quotas = {
        name: value
        for name, value in (
            ("max_adapters", change.max_adapters),
            ("max_adapter_bytes", change.max_adapter_bytes),
            ("max_file_bytes", change.max_file_bytes),
        )
        if value is not msgspec.UNSET
    }
    if quotas:
        details = audit.change({name: getattr(tenant, name) for name in quotas}, quotas)
        for name, value in quotas.items():
            setattr(tenant, name, value)
        actions.append(("tenant.quotas", details))
    if change.base_model_access is not msgspec.UNSET:
        withheld = (await tenants.withheld_base_models(session)).get(tenant.id, [])
        await tenants.set_base_model_access(session, tenant, change.base_model_access)
        were = {n: "withheld" if n in withheld else "allowed" for n in change.base_model_access}
        actions.append(("tenant.base_model_access", audit.change(were, change.base_model_access)))
    return actions
