"""Policies of tenants, for operators."""

import datetime
import uuid
from typing import Annotated, Any

import msgspec
from litestar import delete, get, put
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from gateway import audit, tenants
from gateway.api.chat import ChatCompletionRequest
from gateway.api.completions import CompletionRequest
from gateway.api.embeddings import EmbeddingsRequest
from gateway.api.responses.request import ResponseRequest
from gateway.auth import Principal
from gateway.database import Database
from gateway.errors import InvalidPolicy, NotFound
from gateway.policies import store
from gateway.policies.decisions import Verdict
from gateway.policies.document import Policy
from gateway.policies.store import Policies
from gateway.tables import TenantPolicy

TAGS = ["admin: policies"]
PATH = "/tenants/{tenant:str}/policy"
PARAMETERS = frozenset(
    {
        *ChatCompletionRequest.__struct_fields__,
        *CompletionRequest.__struct_fields__,
        *EmbeddingsRequest.__struct_fields__,
        *ResponseRequest.__struct_fields__,
    }
)


class PolicyView(msgspec.Struct, frozen=True):
    """A tenant's policy, as it was put."""

    # Another one after each change.
    id: uuid.UUID
    policy: Policy
    # What HMAC-SHA256 of `<unix seconds>.<body>` of its moderation's questions is made with; null
    # where it asks nobody.
    moderation_secret: str | None
    updated_at: datetime.datetime


class DecisionView(msgspec.Struct, frozen=True):
    """How often a rule decided so on a day of UTC."""

    day: datetime.date
    # `request` for those that passed all; else the field, and in it the name.
    rule: str
    verdict: Verdict
    num_decisions: int


class DecisionList(msgspec.Struct, frozen=True):
    """The newest day first. Counts of other gateways follow within a minute."""

    data: list[DecisionView]


@get(PATH, scope="operator", tags=TAGS, summary="Show a tenant's policy")
async def get_policy(
    tenant: FromPath[str],
    database: NamedDependency[Database],
    policies: NamedDependency[Policies],
) -> PolicyView:
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant)
        row = await store.get_policy(session, owner.id)
    if row is None:
        raise _no_policy(tenant)
    return _view(row, policies)


@put(
    PATH,
    scope="operator",
    tags=TAGS,
    summary="Set a tenant's policy",
    refuses=(InvalidPolicy,),
)
async def put_policy(
    tenant: FromPath[str],
    data: JSONBody[Policy],
    database: NamedDependency[Database],
    policies: NamedDependency[Policies],
    principal: NamedDependency[Principal],
) -> PolicyView:
    """All of it at once: what is left out is not restricted from now on. Every gateway follows
    within two seconds; requests that have begun go on under the policy before.
    """
    await store.check(data, known_parameters=PARAMETERS)
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant, for_update=True)
        before = _told(await store.get_policy(session, owner.id))
        row = await store.set_policy(
            session, owner.id, data, pepper_version=policies.newest_pepper_version
        )
        await audit.record(
            session,
            tenant_id=owner.id,
            actor_key_id=principal.key_id,
            action="policy.set",
            subject=owner.slug,
            details=audit.change(before, _told(row)),
        )
    return _view(row, policies)


@delete(PATH, scope="operator", tags=TAGS, summary="Remove a tenant's policy")
async def delete_policy(
    tenant: FromPath[str],
    database: NamedDependency[Database],
    principal: NamedDependency[Principal],
) -> None:
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant, for_update=True)
        row = await store.get_policy(session, owner.id)
        if row is None:
            raise _no_policy(tenant)
        await store.delete_policy(session, owner.id)
        await audit.record(
            session,
            tenant_id=owner.id,
            actor_key_id=principal.key_id,
            action="policy.delete",
            subject=owner.slug,
            details=audit.change(_told(row), {}),
        )


@get(
    f"{PATH}/decisions",
    scope="operator",
    tags=TAGS,
    summary="Show how often each rule of a tenant's policy decided what",
)
async def list_decisions(
    tenant: FromPath[str],
    database: NamedDependency[Database],
    policies: NamedDependency[Policies],
    days: FromQuery[
        Annotated[int, QueryParameter(ge=1, le=366, description="So many, today's too.")]
    ] = 31,
) -> DecisionList:
    """No text is kept with them, nor whose request it was."""
    await policies.decisions.flush()
    since = datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=days - 1)
    async with database.as_worker() as session:
        owner = await tenants.get_tenant(session, tenant)
        rows = await store.list_decisions(session, owner.id, since=since)
    fields = DecisionView.__struct_fields__
    return DecisionList(
        [
            msgspec.convert({name: getattr(row, name) for name in fields}, DecisionView)
            for row in rows
        ]
    )


def _view(row: TenantPolicy, policies: Policies) -> PolicyView:
    policy = store.read(row)
    return PolicyView(
        id=row.id,
        policy=policy,
        moderation_secret=None if policy.moderation is None else policies.secret_of(row),
        updated_at=row.updated_at,
    )


def _told(row: TenantPolicy | None) -> dict[str, Any]:
    return {} if row is None else dict(row.document)


def _no_policy(tenant: str) -> NotFound:
    return NotFound(f"The tenant {tenant!r} has no policy.")
