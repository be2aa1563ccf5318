"""Who besides its owner may call an adapter, for operators."""

import datetime

import msgspec
from litestar import delete, get, put
from litestar.di import NamedDependency
from litestar.params import FromPath

from gateway.auth import Principal
from gateway.grants import Grants

TAGS = ["admin: grants"]


class GrantView(msgspec.Struct, frozen=True):
    """A grant. `grantee` is a tenant, or `all`."""

    grantee: str
    created_at: datetime.datetime


class GrantList(msgspec.Struct, frozen=True):
    """The grants of one adapter, the oldest first."""

    data: list[GrantView]


@get(
    "/tenants/{tenant:str}/adapters/{adapter:str}/grants",
    scope="operator",
    tags=TAGS,
    summary="List whom an adapter is shared with",
)
async def list_grants(
    tenant: FromPath[str], adapter: FromPath[str], grants: NamedDependency[Grants]
) -> GrantList:
    found = await grants.list_grants(tenant, adapter)
    return GrantList([GrantView(each.grantee, each.created_at) for each in found])


@put(
    "/tenants/{tenant:str}/adapters/{adapter:str}/grants/{grantee:str}",
    scope="operator",
    tags=TAGS,
    summary="Share an adapter",
    description=(
        "With a tenant, by its slug, or with `all`. They call it by its owner's name for it and pay"
        " for what they use."
    ),
)
async def grant_adapter(
    tenant: FromPath[str],
    adapter: FromPath[str],
    grantee: FromPath[str],
    grants: NamedDependency[Grants],
    principal: NamedDependency[Principal],
) -> GrantView:
    made = await grants.grant(tenant, adapter, grantee, actor_key_id=principal.key_id)
    return GrantView(made.grantee, made.created_at)


@delete(
    "/tenants/{tenant:str}/adapters/{adapter:str}/grants/{grantee:str}",
    scope="operator",
    tags=TAGS,
    summary="Stop sharing an adapter",
    description="The next call is refused; answers that have begun go on.",
)
async def revoke_grant(
    tenant: FromPath[str],
    adapter: FromPath[str],
    grantee: FromPath[str],
    grants: NamedDependency[Grants],
    principal: NamedDependency[Principal],
) -> None:
    await grants.revoke(tenant, adapter, grantee, actor_key_id=principal.key_id)
