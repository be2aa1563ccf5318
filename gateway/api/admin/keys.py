"""A tenant's API keys, for operators. The key itself is told once, to whoever makes it."""

import uuid

import msgspec
from litestar import delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from gateway import audit, auth, tenants
from gateway.api.keys import KeyList, KeyMade, KeyView, NewKey, Rotation, describe, renew
from gateway.auth import Authenticator, Principal
from gateway.database import Database

TAGS = ["admin: keys"]


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
            session, tenant_id=owner.id, **msgspec.structs.asdict(data)
        )
        await audit.record(
            session,
            tenant_id=owner.id,
            actor_key_id=principal.key_id,
            action="key.create",
            subject=row.public_id,
            details=describe(row),
        )
    return KeyMade.with_secret(row, plain)


@get("/tenants/{tenant:str}/keys", scope="operator", tags=TAGS, summary="List a tenant's keys")
async def list_keys(tenant: FromPath[str], database: NamedDependency[Database]) -> KeyList:
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant)
        rows = await auth.list_keys(session, tenant_id=owner.id)
    return KeyList([KeyView.of(row) for row in rows])


@post(
    "/tenants/{tenant:str}/keys/{key_id:uuid}/rotate",
    scope="operator",
    tags=TAGS,
    summary="Give a key a new secret",
)
async def rotate_key(
    tenant: FromPath[str],
    key_id: FromPath[uuid.UUID],
    data: JSONBody[Rotation],
    database: NamedDependency[Database],
    authenticator: NamedDependency[Authenticator],
    principal: NamedDependency[Principal],
) -> KeyMade:
    """It stays the same key, with its limits and budgets; its old secret ends after the overlap."""
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant)
        row = await auth.get_key(session, tenant_id=owner.id, key_id=key_id)
        plain = await renew(authenticator, session, row, data, actor_key_id=principal.key_id)
    return KeyMade.with_secret(row, plain)


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
