"""How policies are set, and remembered while in use.

A principal comes with the id of its tenant's policy, and each change gives it another: a tenant
without a policy costs nothing here, one with a policy a look into memory, and a change holds as
soon as the change of a key would. Where a policy cannot be read, nothing is served. Records nothing
in the audit log: whoever knows the actor does.
"""

import asyncio
import datetime
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import msgspec
from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.addresses import Network
from gateway.auth import Principal
from gateway.database import DATABASE_TROUBLE, Database
from gateway.errors import InvalidPolicy, InvalidRequest, Unavailable
from gateway.policies.decisions import Decisions
from gateway.policies.document import Policy
from gateway.policies.moderation import CheckedAddresses, Moderation, Subject, secret_of
from gateway.policies.rules import ALWAYS_ALLOWED, Asked, Rules
from gateway.policies.watch import Enforced, Watch
from gateway.tables import PolicyDecision, TenantPolicy, new_id
from gateway.webhooks import check_url

MAX_REMEMBERED = 1000


class Policies:
    """Mutable: the policies in use, compiled; the least used leave memory first."""

    def __init__(
        self,
        database: Database,
        decisions: Decisions,
        peppers: Mapping[int, bytes],
        *,
        allowed_networks: Sequence[Network] = (),
    ) -> None:
        self.decisions = decisions
        self._database = database
        self._peppers = dict(peppers)
        self._addresses = CheckedAddresses(allowed_networks)
        # By the policy's id; None where the tenant had none any more.
        self._enforced: OrderedDict[uuid.UUID, asyncio.Task[Enforced | None]] = OrderedDict()

    async def watch(
        self, principal: Principal, *, model: str, request_id: uuid.UUID
    ) -> Watch | None:
        """For a principal whose tenant has a policy. Raises Unavailable."""
        enforced = await self._find(principal)
        if enforced is None:
            return None
        assert principal.tenant_id is not None, "only tenants have policies"
        assert principal.tenant_slug is not None, "only tenants have policies"
        subject = Subject(principal.tenant_id, principal.tenant_slug, model, request_id)
        return Watch(enforced, subject, self.decisions)

    async def check(self, principal: Principal, asked: Asked) -> int:
        """What the rules would say to a request; nothing is counted and nobody asked.

        Raises PolicyViolation, ContentRefused or Unavailable.
        """
        enforced = await self._find(principal)
        return asked.max_tokens if enforced is None else await enforced.rules.check(asked)

    @property
    def newest_pepper_version(self) -> int:
        return max(self._peppers)

    def secret_of(self, row: TenantPolicy) -> str:
        """What the questions to a tenant's moderation are signed with."""
        return secret_of(row.tenant_id, peppers=self._peppers, pepper_version=row.pepper_version)

    async def _find(self, principal: Principal) -> Enforced | None:
        assert principal.policy_id is not None, "asked only for tenants that have one"
        assert principal.tenant_id is not None, "only tenants have policies"
        task = self._enforced.get(principal.policy_id)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(self._load(principal.tenant_id))
            self._enforced[principal.policy_id] = task
            while len(self._enforced) > MAX_REMEMBERED:
                self._enforced.popitem(last=False)
        self._enforced.move_to_end(principal.policy_id)
        try:
            return await asyncio.shield(task)
        except DATABASE_TROUBLE as fault:
            raise Unavailable("The database does not answer. Try again shortly.") from fault

    async def _load(self, tenant_id: uuid.UUID) -> Enforced | None:
        async with self._database.as_tenant(tenant_id) as session:
            row = (await session.scalars(select(TenantPolicy))).one_or_none()
        if row is None:
            return None
        policy = read(row)
        rules = await asyncio.to_thread(Rules, policy)
        if policy.moderation is None:
            return Enforced(rules, None)
        moderation = Moderation(
            policy.moderation, secret=self.secret_of(row), addresses=self._addresses
        )
        return Enforced(rules, moderation)


def read(row: TenantPolicy) -> Policy:
    return msgspec.convert(row.document, Policy)


async def get_policy(session: AsyncSession, tenant_id: uuid.UUID) -> TenantPolicy | None:
    query = select(TenantPolicy).where(TenantPolicy.tenant_id == tenant_id)
    return (await session.scalars(query.execution_options(populate_existing=True))).one_or_none()


async def set_policy(
    session: AsyncSession, tenant_id: uuid.UUID, policy: Policy, *, pepper_version: int
) -> TenantPolicy:
    """Give a tenant this policy from now on, as the worker. `check` it before."""
    values = {
        "id": new_id(),
        "document": msgspec.to_builtins(policy),
        "pepper_version": pepper_version,
        "updated_at": datetime.datetime.now(datetime.UTC),
    }
    await session.execute(
        insert(TenantPolicy)
        .values(tenant_id=tenant_id, **values)
        .on_conflict_do_update(index_elements=["tenant_id"], set_=values)
    )
    row = await get_policy(session, tenant_id)
    assert row is not None, "it was written in this transaction"
    return row


async def delete_policy(session: AsyncSession, tenant_id: uuid.UUID) -> None:
    await session.execute(delete(TenantPolicy).where(TenantPolicy.tenant_id == tenant_id))


async def check(policy: Policy, *, known_parameters: frozenset[str]) -> None:
    """Raises InvalidPolicy, naming the field and the place in it."""
    for field in ("allowed_parameters", "denied_parameters"):
        for number, name in enumerate(getattr(policy, field) or ()):
            if name not in known_parameters or name in ALWAYS_ALLOWED:
                raise InvalidPolicy(
                    f"{name!r} is no field of a request that a policy could allow or deny.",
                    param=f"{field}[{number}]",
                )
    if policy.moderation is not None:
        try:
            check_url(policy.moderation.url, param="moderation.url")
        except InvalidRequest as error:
            raise InvalidPolicy(error.message, param=error.param) from error
    # Long repetitions take some milliseconds each.
    await asyncio.to_thread(Rules, policy)


async def list_decisions(
    session: AsyncSession, tenant_id: uuid.UUID, *, since: datetime.date
) -> list[PolicyDecision]:
    """By day, the newest first."""
    query = (
        select(PolicyDecision)
        .where(PolicyDecision.tenant_id == tenant_id, PolicyDecision.day >= since)
        .order_by(PolicyDecision.day.desc(), PolicyDecision.rule, PolicyDecision.verdict)
    )
    return list((await session.scalars(query)).all())
