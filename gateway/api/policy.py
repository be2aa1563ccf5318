"""GET /v1/policy: what the caller's requests may ask for and say, for its owners."""

import httpx
import msgspec
from litestar import get
from litestar.di import NamedDependency

from gateway.auth import Principal
from gateway.database import Database
from gateway.policies import store
from gateway.policies.document import Policy

REDACTED = "[redacted]"


class OwnPolicyView(msgspec.Struct, frozen=True):
    """The tenant's policy; null where there is none. Of a webhook's URL the host alone is told."""

    policy: Policy | None


# What only owners have.
@get("/v1/policy", scope="keys", tags=["limits"], summary="Show your policy")
async def show_policy(
    principal: NamedDependency[Principal], database: NamedDependency[Database]
) -> OwnPolicyView:
    """Operators set it."""
    assert principal.tenant_id is not None, "the guard lets tenants' keys in alone"
    async with database.as_tenant(principal.tenant_id) as session:
        row = await store.get_policy(session, principal.tenant_id)
    return OwnPolicyView(None if row is None else _redacted(store.read(row)))


def _redacted(policy: Policy) -> Policy:
    """Without the path and query of the webhook, which may be its password."""
    if policy.moderation is None:
        return policy
    url = httpx.URL(policy.moderation.url)
    hook = msgspec.structs.replace(policy.moderation, url=f"{url.scheme}://{url.host}/{REDACTED}")
    return msgspec.structs.replace(policy, moderation=hook)
