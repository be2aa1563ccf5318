"""Facts about sharing: who may call another's adapter, who pays, and what nobody else finds."""

import datetime
import uuid

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from gateway import tenants
from gateway.aliases import Aliases, Belief, Canary, Meaning
from gateway.auth import Principal
from gateway.billing.usage import Dimension, Period, Question, UsageRow, usage_rows
from gateway.database import Database
from gateway.errors import InvalidRequest, ModelNotFound, NotFound
from gateway.grants import EVERYBODY, Grants
from gateway.limits import admit
from gateway.prices import PriceScope, Rates, set_price
from gateway.registry import Registry
from gateway.tables import GatewayInstance, Tenant, UsageEvent, UsageRollup, new_id
from gateway.tenants import Access
from tests.gateway.admin_plane import ADDRESS, INFO
from tests.gateway.published import make_tenant, publish

INSTANCE = uuid.UUID(int=99)
# Every table that tells of an adapter.
TABLES = ("adapters", "adapter_versions", "adapter_aliases")


@pytest.fixture
async def registry(database: Database) -> Registry:
    registry = Registry(database)
    await registry.register_base_model(INFO, ADDRESS)
    return registry


@pytest.fixture
async def acme(database: Database, registry: Registry) -> Principal:
    """A tenant with two adapters, `sql` and `secret`."""
    acme = await make_tenant(database, "acme")
    await publish(registry, acme, "sql")
    await publish(registry, acme, "secret", digest="e")
    return acme


@pytest.fixture
async def globex(database: Database) -> Principal:
    return await make_tenant(database, "globex")


@pytest.fixture
def grants(database: Database) -> Grants:
    return Grants(database)


async def names(registry: Registry, principal: Principal) -> list[str]:
    return [entry.id for entry in await registry.list_models(principal)]


async def seen(database: Database, principal: Principal) -> dict[str, int]:
    """How many rows of each table the app role sees for a tenant, without any WHERE."""
    assert principal.tenant_id is not None
    async with database.as_tenant(principal.tenant_id) as session:
        return {
            table: (await session.execute(text(f"SELECT count(*) FROM {table}"))).scalar_one()  # noqa: S608 (constants)
            for table in TABLES
        }


async def withhold(database: Database, principal: Principal, access: Access = "withheld") -> None:
    async with database.as_worker() as session:
        tenant = await session.get_one(Tenant, principal.tenant_id)
        await tenants.set_base_model_access(session, tenant, {"Tiny-Base": access})


async def test_a_grantee_calls_by_the_owners_name_and_nobody_else_does(
    registry: Registry, grants: Grants, database: Database, acme: Principal, globex: Principal
) -> None:
    initech = await make_tenant(database, "initech")
    await grants.grant("acme", "sql", "globex", actor_key_id=acme.key_id)
    for name in ("acme-sql", "acme-sql@latest", "acme-sql@1"):
        target = await registry.resolve(globex, name)
        assert (target.public_name, target.weights_digest) == ("acme-sql", "d" * 64)
        with pytest.raises(ModelNotFound):
            await registry.resolve(initech, name)
    entries = await registry.list_models(globex)
    assert [(entry.id, entry.owned_by) for entry in entries] == [
        ("Tiny-Base", "manylora"),
        ("acme-sql", "acme"),
    ]
    assert await names(registry, initech) == ["Tiny-Base"]


async def test_what_is_not_shared_is_refused_in_the_words_for_what_does_not_exist(
    registry: Registry, grants: Grants, acme: Principal, globex: Principal
) -> None:
    await grants.grant("acme", "sql", "globex", actor_key_id=acme.key_id)
    told = set()
    for name in ("acme-secret", "acme-secret@1", "acme-sql@2", "acme-sql@prod", "acme-nothing"):
        with pytest.raises(ModelNotFound) as caught:
            await registry.resolve(globex, name)
        error = caught.value
        told.add((error.status, error.code, error.param, error.message.replace(name, "NAME")))
    assert len(told) == 1


async def test_row_level_security_alone_keeps_what_is_not_shared(
    registry: Registry, grants: Grants, database: Database, acme: Principal, globex: Principal
) -> None:
    nothing, one, two = (dict.fromkeys(TABLES, count) for count in (0, 1, 2))
    assert await seen(database, globex) == nothing
    await grants.grant("acme", "sql", "globex", actor_key_id=acme.key_id)
    assert await seen(database, globex) == one
    assert await seen(database, acme) == two
    assert globex.tenant_id is not None
    async with database.as_tenant(globex.tenant_id) as session:
        for statement in (
            "SELECT 1 FROM adapters WHERE public_name = 'acme-secret'",
            "SELECT 1 FROM public_names WHERE name = 'acme-secret'",
            "SELECT 1 FROM alias_moves",
            "SELECT 1 FROM tenants WHERE slug = 'acme'",
            "SELECT 1 FROM audit_log",
        ):
            assert (await session.execute(text(statement))).all() == [], statement
    async with database.as_app() as session:
        assert (await session.execute(text("SELECT 1 FROM adapter_grants"))).all() == []
    await grants.revoke("acme", "sql", "globex", actor_key_id=acme.key_id)
    assert await seen(database, globex) == nothing


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO adapter_grants SELECT gen_random_uuid(), id, tenant_id, :me FROM adapters",
        "DELETE FROM adapter_grants",
        "UPDATE adapter_grants SET grantee_id = :me",
        "DELETE FROM withheld_base_models",
        "UPDATE adapters SET tenant_id = :me",
        "UPDATE adapter_aliases SET version_id = version_id",
        "INSERT INTO alias_moves (adapter_id, alias, revision, tenant_id)"
        " SELECT id, 'x', 1, :me FROM adapters",
    ],
)
async def test_a_hostile_tenant_cannot_help_itself(
    grants: Grants, database: Database, acme: Principal, globex: Principal, statement: str
) -> None:
    await grants.grant("acme", "sql", "globex", actor_key_id=acme.key_id)
    parameters = {"me": globex.tenant_id} if ":me" in statement else {}
    assert globex.tenant_id is not None
    with pytest.raises(Exception, match="permission denied"):
        async with database.as_tenant(globex.tenant_id) as session:
            await session.execute(text(statement), parameters)


async def test_everybody_means_tenants_that_come_later_too(
    registry: Registry, grants: Grants, database: Database, acme: Principal, globex: Principal
) -> None:
    await grants.grant("acme", "sql", EVERYBODY, actor_key_id=acme.key_id)
    await grants.grant("acme", "sql", "globex", actor_key_id=acme.key_id)
    later = await make_tenant(database, "later")
    for principal in (globex, later):
        assert await names(registry, principal) == ["Tiny-Base", "acme-sql"]
        await registry.resolve(principal, "acme-sql")
    assert await names(registry, acme) == ["Tiny-Base", "acme-secret", "acme-sql"]
    await grants.revoke("acme", "sql", EVERYBODY, actor_key_id=acme.key_id)
    await registry.resolve(globex, "acme-sql")
    with pytest.raises(ModelNotFound):
        await registry.resolve(later, "acme-sql")


async def test_a_grant_taken_back_ends_with_the_next_call(
    registry: Registry, grants: Grants, acme: Principal, globex: Principal
) -> None:
    await grants.grant("acme", "sql", "globex", actor_key_id=acme.key_id)
    await registry.resolve(globex, "acme-sql")
    await grants.revoke("acme", "sql", "globex", actor_key_id=acme.key_id)
    with pytest.raises(ModelNotFound):
        await registry.resolve(globex, "acme-sql")
    assert await names(registry, globex) == ["Tiny-Base"]
    await registry.resolve(acme, "acme-sql")


async def test_a_grantee_follows_the_owners_aliases_and_canary(
    registry: Registry, grants: Grants, database: Database, acme: Principal, globex: Principal
) -> None:
    await publish(registry, acme, "sql", digest="f")
    await grants.grant("acme", "sql", "globex", actor_key_id=acme.key_id)
    await Aliases(database).move(
        "acme",
        "sql",
        "prod",
        to=Meaning(1, Canary(2, 50)),
        believed=Belief(),
        is_forced=False,
        reason=None,
        actor_key_id=acme.key_id,
    )
    found = {
        (await registry.resolve(globex, "acme-sql@prod", user=str(number))).version_number
        for number in range(30)
    }
    assert found == {1, 2}


async def test_grants_are_given_once_listed_and_audited(
    grants: Grants, database: Database, acme: Principal, globex: Principal
) -> None:
    for grantee in ("globex", "globex", EVERYBODY):
        await grants.grant("acme", "sql", grantee, actor_key_id=acme.key_id)
    assert [each.grantee for each in await grants.list_grants("acme", "sql")] == ["globex", "all"]
    await grants.revoke("acme", "sql", "globex", actor_key_id=acme.key_id)
    with pytest.raises(NotFound, match="not shared with 'globex'"):
        await grants.revoke("acme", "sql", "globex", actor_key_id=acme.key_id)
    async with database.as_worker() as session:
        rows = await session.execute(
            text(
                "SELECT action, details ->> 'grantee' FROM audit_log"
                " WHERE action IN ('adapter.grant', 'adapter.revoke') ORDER BY number"
            )
        )
        assert [tuple(row) for row in rows] == [
            ("adapter.grant", "globex"),
            ("adapter.grant", "all"),
            ("adapter.revoke", "globex"),
        ]


async def test_a_grant_to_nobody_or_to_its_owner_is_refused(
    grants: Grants, acme: Principal
) -> None:
    with pytest.raises(NotFound, match="nobody"):
        await grants.grant("acme", "sql", "nobody", actor_key_id=acme.key_id)
    with pytest.raises(InvalidRequest, match="own"):
        await grants.grant("acme", "sql", "acme", actor_key_id=acme.key_id)
    with pytest.raises(NotFound):
        await grants.grant("acme", "nothing", EVERYBODY, actor_key_id=acme.key_id)


# Who pays.


async def test_the_caller_pays_the_adapters_price_and_reads_its_name_on_the_bill_for_ever(
    registry: Registry, grants: Grants, database: Database, acme: Principal, globex: Principal
) -> None:
    await grants.grant("acme", "sql", "globex", actor_key_id=acme.key_id)
    target = await registry.resolve(globex, "acme-sql")
    async with database.as_worker() as session:
        session.add(GatewayInstance(id=INSTANCE, host="here", epoch=1))
        scope = PriceScope(target.base_model_id, None, target.adapter_id)
        await set_price(session, scope, rates=Rates(output_nano_per_million=7))
    admission = await admit(
        database,
        globex,
        target,
        request_id=new_id(),
        endpoint="completions",
        prompt_tokens=1,
        max_tokens=1,
        gateway_instance_id=INSTANCE,
    )
    assert admission.price.output_nano_per_million == 7
    now = datetime.datetime.now(datetime.UTC)
    paid = {
        "tenant_id": globex.tenant_id,
        "api_key_id": globex.key_id,
        "base_model_id": target.base_model_id,
        "adapter_id": target.adapter_id,
        "prompt_tokens": 1,
        "cached_tokens": 0,
        "completion_tokens": 1,
        "cost_nano": 5,
    }
    async with database.as_worker() as session:
        session.add(
            UsageEvent(
                id=admission.request_id,
                adapter_version_id=target.adapter_version_id,
                version_digest=target.version_digest,
                price_version_id=admission.price.id,
                endpoint="completions",
                outcome="stop",
                engine_ns=1,
                started_at=now,
                finished_at=now,
                **paid,
            )
        )
        session.add(UsageRollup(id=new_id(), day=now.date(), requests=1, **paid))
    await grants.revoke("acme", "sql", "globex", actor_key_id=acme.key_id)
    period = Period(now - datetime.timedelta(days=1), now + datetime.timedelta(days=1))
    for payer, bills in ((globex, [("acme-sql", 5)]), (acme, [])):
        assert payer.tenant_id is not None
        async with database.as_tenant(payer.tenant_id) as session:
            rows = await report(session, Question(period, (Dimension.ADAPTER,)))
        assert [(row.adapter, row.cost_nano) for row in rows] == bills
    async with database.as_worker() as session:
        rows = await report(session, Question(period, (Dimension.TENANT, Dimension.ADAPTER)))
    assert [(row.tenant, row.adapter) for row in rows] == [("globex", "acme-sql")]


async def report(session: AsyncSession, question: Question) -> list[UsageRow]:
    return [row async for batch in usage_rows(session, question) for row in batch]


# The base model.


async def test_a_withheld_base_model_is_not_found_and_its_adapters_answer(
    registry: Registry, database: Database, acme: Principal, globex: Principal
) -> None:
    await withhold(database, acme)
    with pytest.raises(ModelNotFound):
        await registry.resolve(acme, "tiny-base")
    assert (await registry.resolve(acme, "acme-sql")).base_model == "Tiny-Base"
    assert await names(registry, acme) == ["acme-secret", "acme-sql"]
    # Others are not concerned.
    await registry.resolve(globex, "tiny-base")
    await withhold(database, acme)
    await withhold(database, acme, "allowed")
    await registry.resolve(acme, "tiny-base")
    assert "Tiny-Base" in await names(registry, acme)


async def test_a_tenant_whose_base_model_is_withheld_calls_what_is_shared_with_it(
    registry: Registry, grants: Grants, database: Database, acme: Principal, globex: Principal
) -> None:
    await withhold(database, globex)
    await grants.grant("acme", "sql", "globex", actor_key_id=acme.key_id)
    assert await names(registry, globex) == ["acme-sql"]
    await registry.resolve(globex, "acme-sql")


async def test_a_base_model_that_is_none_cannot_be_withheld(
    database: Database, acme: Principal
) -> None:
    for name in ("other", "nul\x00"):
        async with database.as_worker() as session:
            tenant = await session.get_one(Tenant, acme.tenant_id)
            with pytest.raises(NotFound) as caught:
                await tenants.set_base_model_access(session, tenant, {name: "withheld"})
        assert caught.value.param == "base_model_access"
