"""How long a tenant's texts are kept, reading them, and erasing somebody."""

import datetime
import uuid
from typing import Annotated

import msgspec
from litestar import Router, get, post, put
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from gateway import audit, privacy, tenants
from gateway.auth import Principal
from gateway.database import Database
from gateway.files import Files
from gateway.privacy import Erased
from gateway.tables import ContentPolicy

TAGS = ["privacy"]
Days = Annotated[int, msgspec.Meta(ge=1, le=3650)]


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Days for which prompts and completions are kept; null, and at first, for not at all."""

    keep_days: Days | None


class Erasure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whom to erase: what requests said in `user`; null for the whole of a closed tenant."""

    user: str | None


class ContentView(msgspec.Struct, frozen=True):
    """What was said in one request."""

    request_id: uuid.UUID
    user: str | None
    # Text, or JSON of messages or token ids, as the client sent it.
    prompt: str
    completion: str
    created_at: datetime.datetime
    expires_at: datetime.datetime


@get(
    "/tenants/{tenant:str}/retention",
    scope="operator",
    tags=TAGS,
    summary="Show how long a tenant's texts are kept",
)
async def get_policy(tenant: FromPath[str], database: NamedDependency[Database]) -> Policy:
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant)
        row = await session.get(ContentPolicy, owner.id)
    return Policy(None if row is None else row.keep_days)


@put(
    "/tenants/{tenant:str}/retention",
    scope="operator",
    tags=TAGS,
    summary="Keep a tenant's texts for a time, or no more",
)
async def put_policy(
    tenant: FromPath[str],
    data: JSONBody[Policy],
    database: NamedDependency[Database],
    principal: NamedDependency[Principal],
) -> Policy:
    """Null deletes at once what is kept. Gateways follow within five seconds."""
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant, for_update=True)
        before = await privacy.set_policy(session, owner.id, keep_days=data.keep_days)
        await audit.record(
            session,
            tenant_id=owner.id,
            actor_key_id=principal.key_id,
            action="retention.set",
            subject=owner.slug,
            details=audit.change({"keep_days": before}, {"keep_days": data.keep_days}),
        )
    return data


@post(
    "/tenants/{tenant:str}/erase",
    scope="operator",
    status_code=200,
    tags=TAGS,
    summary="Erase an end user, or a closed tenant",
)
async def erase(
    tenant: FromPath[str],
    data: JSONBody[Erasure],
    database: NamedDependency[Database],
    principal: NamedDependency[Principal],
    tenant_files: NamedDependency[Files],
) -> Erased:
    """Names and texts go; numbers, and statements that are closed, stay as they are."""
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant)
        if data.user is None:
            erased = await privacy.erase_tenant(session, tenant)
        else:
            erased = await privacy.erase_user(session, owner.id, user=data.user)
        await audit.record(
            session,
            tenant_id=owner.id,
            actor_key_id=principal.key_id,
            action="tenant.erase" if data.user is None else "end_user.erase",
            # Never who it was.
            subject=owner.slug,
            details=msgspec.to_builtins(erased),
        )
    if erased.num_files:
        await tenant_files.sweep()
    return erased


@get(
    "/v1/contents/{request_id:uuid}",
    scope="inference",
    tags=TAGS,
    summary="Show what is kept of one of your requests",
)
async def show_content(
    request_id: FromPath[uuid.UUID],
    principal: NamedDependency[Principal],
    database: NamedDependency[Database],
) -> ContentView:
    """By the `x-request-id` of its answer."""
    assert principal.tenant_id is not None, "the guard lets tenants' keys in alone"
    async with database.as_tenant(principal.tenant_id) as session:
        row = await privacy.get_content(session, request_id)
    return ContentView(
        request_id=row.id,
        user=row.end_user,
        prompt=row.prompt,
        completion=row.completion,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )


privacy_router = Router("/admin/v1", route_handlers=[get_policy, put_policy, erase])
