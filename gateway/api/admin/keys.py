"""A tenant's API keys, for operators. The key itself is told once, to whoever makes it."""

import datetime
import uuid

import msgspec
from litestar import delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from gateway import audit, auth, tenants
from gateway.auth import Authenticator, Principal
from gateway.database import Database
from gateway.tables import ApiKey

TAGS = ["admin: keys"]


class NewKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key to be. `scopes` are all that a tenant's key can have, unless fewer are named."""

    name: str
    scopes: list[str] | None = None
    expires_at: datetime.datetime | None = None


class KeyView(msgspec.Struct, frozen=True):
    """A key, without its secret. `prefix` is how the key begins."""

    id: uuid.UUID
    prefix: str
    name: str
    scopes: list[str]
    created_at: datetime.datetime
    expires_at: datetime.datetime | None
    revoked_at: datetime.datetime | None
    last_used_at: datetime.datetime | None


class KeyMade(KeyView, frozen=True):
    """A new key. `key` is told here and never again."""

    key: str


class KeyList(msgspec.Struct, frozen=True):
    """A tenant's keys, revoked ones too, oldest first."""

    data: list[KeyView]


@post(
    "/tenants/{tenant:str}/keys",
    scope="operator",
    tags=TAGS,
    summary="Create a key for a tenant",
    description="The answer holds the key itself; nobody can read it again.",
)
async def create_key(
    tenant: FromPath[str],
    data: JSONBody[NewKey],
    database: NamedDependency[Database],
    authenticator: NamedDependency[Authenticator],
    principal: NamedDependency[Principal],
) -> KeyMade:
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant)
        row, plain = await authenticator.issue_key(
            session,
            tenant_id=owner.id,
            name=data.name,
            scopes=data.scopes,
            expires_at=data.expires_at,
        )
        await audit.record(
            session,
            tenant_id=owner.id,
            actor_key_id=principal.key_id,
            action="key.create",
            subject=row.public_id,
            details={"name": row.name, "scopes": row.scopes, "expires_at": row.expires_at},
        )
    return KeyMade(**msgspec.structs.asdict(_view(row)), key=plain)


@get("/tenants/{tenant:str}/keys", scope="operator", tags=TAGS, summary="List a tenant's keys")
async def list_keys(tenant: FromPath[str], database: NamedDependency[Database]) -> KeyList:
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant)
        return KeyList([_view(row) for row in await auth.list_keys(session, tenant_id=owner.id)])


@delete(
    "/tenants/{tenant:str}/keys/{key_id:uuid}",
    scope="operator",
    tags=TAGS,
    summary="Revoke a key",
    description="The key stops working within two seconds. Once more changes nothing.",
)
async def revoke_key(
    tenant: FromPath[str],
    key_id: FromPath[uuid.UUID],
    database: NamedDependency[Database],
    principal: NamedDependency[Principal],
) -> None:
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant)
        row = await auth.revoke_key(session, tenant_id=owner.id, key_id=key_id)
        await audit.record(
            session,
            tenant_id=owner.id,
            actor_key_id=principal.key_id,
            action="key.revoke",
            subject=row.public_id,
            details={"name": row.name},
        )


def _view(row: ApiKey) -> KeyView:
    return KeyView(
        id=row.id,
        prefix=f"ml_{row.public_id}",
        name=row.name,
        scopes=row.scopes,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )
