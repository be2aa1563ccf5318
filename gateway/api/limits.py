"""GET /v1/limits and /v1/budgets: what the caller may do, and how much of it is left."""

import msgspec
from litestar import get
from litestar.di import NamedDependency

from gateway.auth import ANY_TENANT, Principal
from gateway.budgets import Standing, standings
from gateway.ceilings import ScopeLevels, levels_of
from gateway.database import Database


class LimitsView(msgspec.Struct, frozen=True):
    """A call must pass the ceilings of the tenant, of its key, and of the adapter it names."""

    data: list[ScopeLevels]


class BudgetsView(msgspec.Struct, frozen=True):
    """The tenant's budgets and those of its keys. Money is nano-USD."""

    data: list[Standing]


@get(
    "/v1/limits",
    scope=ANY_TENANT,
    tags=["limits"],
    summary="Show your ceilings and how full they are",
)
async def limits(
    principal: NamedDependency[Principal], database: NamedDependency[Database]
) -> LimitsView:
    assert principal.tenant_id is not None, "the guard lets tenants' keys in alone"
    async with database.as_tenant(principal.tenant_id) as session:
        levels = await levels_of(
            session, tenant_id=principal.tenant_id, api_key_id=principal.key_id
        )
    return LimitsView([each for each in levels if _may_see(principal, each)])


@get("/v1/budgets", scope="billing", tags=["limits"], summary="Show your budgets")
async def list_budgets(
    principal: NamedDependency[Principal], database: NamedDependency[Database]
) -> BudgetsView:
    assert principal.tenant_id is not None, "the guard lets tenants' keys in alone"
    async with database.as_tenant(principal.tenant_id) as session:
        return BudgetsView(await standings(session, principal.tenant_id))


def _may_see(principal: Principal, levels: ScopeLevels) -> bool:
    return levels.adapter is None or principal.may_call(levels.adapter)
