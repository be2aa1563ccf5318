"""Facts about the database: who sees what, what can never change, when it is refused."""

import asyncio
import datetime
import uuid
from collections.abc import AsyncIterator

import pytest
from alembic import command
from sqlalchemy import (
    CheckConstraint,
    Connection,
    func,
    insert,
    literal_column,
    make_url,
    select,
    text,
)
from sqlalchemy import Table as SqlTable
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.ext.asyncio import create_async_engine

from gateway.database import (
    Database,
    alembic_config,
    asyncpg_url,
    migrate,
    refuse_clock_skew,
    role_urls,
    scram_verifier,
)
from gateway.errors import DatabaseRefused
from gateway.tables import Table, new_id
from tests.conftest import APP_PASSWORD, WORKER_PASSWORD, Cluster, Home, execute

TENANT_TABLES = [table for table in Table.metadata.sorted_tables if "tenant_id" in table.c] + [
    Table.metadata.tables["tenants"]
]
NOW = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)


def tenant_rows(tenant_id: uuid.UUID, *, slug: str, base_model_id: uuid.UUID) -> list[str]:
    """One row of each table that a tenant can have rows in, as statements."""
    key, adapter, version, price, instance, hold = (uuid.uuid4() for _ in range(6))
    owner, base = f"'{tenant_id}'", f"'{base_model_id}'"
    hmac, digest = f"decode('{'ab' * 32}', 'hex')", f"'{'d' * 64}'"
    return [
        f"INSERT INTO tenants (id, slug, name, cache_salt) VALUES ({owner}, '{slug}', 'n', {hmac})",
        "INSERT INTO api_keys (id, public_id, tenant_id, name, secret_hmac, scopes)"
        f" VALUES ('{key}', '{slug}', {owner}, 'n', {hmac}, '{{usage}}')",
        "INSERT INTO adapters (id, tenant_id, base_model_id, slug, public_name)"
        f" VALUES ('{adapter}', {owner}, {base}, 'x', '{slug}-x')",
        f"INSERT INTO public_names (name, adapter_id) VALUES ('{slug}-x', '{adapter}')",
        "INSERT INTO adapter_versions (id, tenant_id, adapter_id, base_model_id, number, state,"
        " weights_digest, version_digest, rank, num_modules, size_bytes)"
        f" VALUES ('{version}', {owner}, '{adapter}', {base}, 1, 'ready', {digest}, {digest},"
        " 1, 1, 1)",
        "INSERT INTO adapter_aliases (adapter_id, alias, tenant_id, version_id)"
        f" VALUES ('{adapter}', 'latest', {owner}, '{version}')",
        "INSERT INTO price_versions (id, base_model_id, tenant_id, effective,"
        " input_nano_per_million, cached_input_nano_per_million, output_nano_per_million)"
        f" VALUES ('{price}', {base}, {owner}, '[2020-01-01,)', 1, 1, 1)",
        f"INSERT INTO gateway_instances (id, host, epoch) VALUES ('{instance}', 'h', 1)",
        "INSERT INTO holds (id, tenant_id, api_key_id, base_model_id, price_version_id,"
        " gateway_instance_id, endpoint, prompt_tokens, funded_output_tokens, amount_nano)"
        f" VALUES ('{hold}', {owner}, '{key}', {base}, '{price}', '{instance}', 'e', 1, 1, 1)",
        "INSERT INTO usage_events (id, tenant_id, api_key_id, base_model_id, price_version_id,"
        " endpoint, outcome, prompt_tokens, cached_tokens, completion_tokens, cost_nano,"
        " engine_ns, started_at, finished_at)"
        f" VALUES ('{new_id()}', {owner}, '{key}', {base}, '{price}', 'e', 'stop', 1, 0, 1, 1, 1,"
        " now(), now())",
        "INSERT INTO usage_rollups (id, tenant_id, day, base_model_id, api_key_id, requests,"
        " prompt_tokens, cached_tokens, completion_tokens, cost_nano)"
        f" VALUES ('{new_id()}', {owner}, '2026-01-01', {base}, '{key}', 1, 1, 0, 1, 1)",
        "INSERT INTO audit_log (id, tenant_id, number, action, subject, details, hash)"
        f" VALUES ('{new_id()}', {owner}, 1, 'a', 's', '{{}}', {hmac})",
    ]


class Town:
    """Two tenants that have one row in every table, and the base model of both."""

    def __init__(self) -> None:
        self.acme, self.globex, self.base_model = (uuid.uuid4() for _ in range(3))

    def rows(self) -> list[str]:
        base = (
            "INSERT INTO base_models (id, name, digest, text_bundle_digest, shape,"
            f" context_length, vocab_size, max_lora_rank) VALUES ('{self.base_model}', 'smol', 'd',"
            " 't', '{}', 1, 1, 1)"
        )
        acme = tenant_rows(self.acme, slug="acme", base_model_id=self.base_model)
        return [
            base,
            *acme,
            *tenant_rows(self.globex, slug="globex", base_model_id=self.base_model),
        ]


@pytest.fixture
async def town(database: Database) -> AsyncIterator[Town]:
    town = Town()
    async with database.as_worker() as session:
        for statement in town.rows():
            await session.execute(text(statement))
    yield town


def owner_column(table: SqlTable) -> str:
    return "id" if table.name == "tenants" else "tenant_id"


@pytest.mark.parametrize("table", TENANT_TABLES, ids=lambda table: table.name)
async def test_a_tenant_sees_its_own_rows_alone(
    database: Database, town: Town, table: SqlTable
) -> None:
    query = select(table.c[owner_column(table)])
    for tenant_id in (town.acme, town.globex):
        async with database.as_tenant(tenant_id) as session:
            assert set((await session.execute(query)).scalars()) == {tenant_id}
    async with database.as_worker() as session:
        assert {town.acme, town.globex} <= set((await session.execute(query)).scalars())


@pytest.mark.parametrize("table", TENANT_TABLES, ids=lambda table: table.name)
async def test_without_a_tenant_no_row_is_seen(
    database: Database, town: Town, table: SqlTable
) -> None:
    query = select(func.count()).select_from(table)
    # On a connection that knew a tenant a moment ago, and on a new one.
    async with database.as_tenant(town.acme) as session:
        assert (await session.execute(query)).scalar_one() == 1
    async with database.as_app() as session:
        assert (await session.execute(query)).scalar_one() == 0
    async with database.as_tenant(uuid.uuid4()) as session:
        assert (await session.execute(query)).scalar_one() == 0


@pytest.mark.parametrize("table", TENANT_TABLES, ids=lambda table: table.name)
async def test_the_owner_is_subject_to_row_level_security_too(
    database: Database, town: Town, home: Home, table: SqlTable
) -> None:
    engine = create_async_engine(home.owner_url)
    async with engine.connect() as connection:
        assert (await connection.execute(select(func.count()).select_from(table))).scalar_one() == 0
    await engine.dispose()


async def test_public_names_of_others_are_not_seen(database: Database, town: Town) -> None:
    async with database.as_worker() as session:
        await session.execute(
            text("INSERT INTO public_names (name, base_model_id) VALUES ('smol', :id)"),
            {"id": town.base_model},
        )
    async with database.as_tenant(town.acme) as session:
        names = (await session.execute(text("SELECT name FROM public_names"))).scalars()
        assert set(names) == {"smol", "acme-x"}


async def test_a_price_for_everybody_is_seen_but_not_one_for_anothers_adapter(
    database: Database, town: Town
) -> None:
    price = (
        "INSERT INTO price_versions (id, base_model_id, adapter_id, effective,"
        " input_nano_per_million, cached_input_nano_per_million, output_nano_per_million)"
        " SELECT gen_random_uuid(), '{base}', {adapter}, '[2020-01-01,)', {rate}, 0, 0"
    )
    other = "(SELECT id FROM adapters WHERE public_name = 'globex-x')"
    async with database.as_worker() as session:
        for adapter, rate in (("NULL", 5), (other, 6)):
            statement = price.format(base=town.base_model, adapter=adapter, rate=rate)
            await session.execute(text(statement))
    rates = text("SELECT input_nano_per_million FROM price_versions")
    async with database.as_tenant(town.acme) as session:
        assert set((await session.execute(rates)).scalars()) == {1, 5}
    async with database.as_tenant(town.globex) as session:
        assert set((await session.execute(rates)).scalars()) == {1, 5, 6}


async def test_a_tenant_cannot_add_a_row_for_another(database: Database, town: Town) -> None:
    copy = text("""
        INSERT INTO holds (id, tenant_id, api_key_id, base_model_id, price_version_id,
            gateway_instance_id, endpoint, prompt_tokens, funded_output_tokens, amount_nano)
        SELECT gen_random_uuid(), :tenant_id, api_key_id, base_model_id, price_version_id,
            gateway_instance_id, endpoint, 1, 1, 1 FROM holds
    """)
    with pytest.raises(ProgrammingError, match="row-level security"):
        async with database.as_tenant(town.acme) as session:
            await session.execute(copy, {"tenant_id": town.globex})
    async with database.as_tenant(town.acme) as session:
        await session.execute(copy, {"tenant_id": town.acme})


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE usage_events SET cost_nano = 0",
        "DELETE FROM usage_events",
        "TRUNCATE usage_events",
        "INSERT INTO usage_events SELECT * FROM usage_events",
        "SELECT count(*) FROM usage_events_default",
        "SELECT make_usage_partitions(1)",
        "UPDATE holds SET amount_nano = 0",
        "DELETE FROM holds",
        "UPDATE usage_rollups SET cost_nano = 0",
        "DELETE FROM audit_log",
        "UPDATE price_versions SET input_nano_per_million = 0",
        "UPDATE tenants SET status = 'active'",
        "UPDATE api_keys SET revoked_at = NULL",
        "SELECT secret_hmac FROM api_keys",
        "SELECT * FROM gateway_instances",
        "CREATE TABLE mine (id int)",
        "ALTER TABLE holds DISABLE ROW LEVEL SECURITY",
        'SET ROLE "manylora_worker"',
        'SET ROLE "manylora_owner"',
    ],
)
async def test_the_app_role_may_not(database: Database, town: Town, statement: str) -> None:
    with pytest.raises(DBAPIError, match=r"permission denied|must be owner"):
        async with database.as_tenant(town.acme) as session:
            await session.execute(text(statement))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE usage_events SET cost_nano = 0",
        "DELETE FROM usage_events",
        "UPDATE adapter_versions SET weights_digest = ''",
        "UPDATE price_versions SET input_nano_per_million = 0",
        "UPDATE public_names SET name = 'x'",
        "DELETE FROM public_names",
        "DELETE FROM tenants",
        "UPDATE tenants SET slug = 'x'",
        "UPDATE holds SET tenant_id = tenant_id",
        "DELETE FROM usage_rollups",
        'SET ROLE "manylora_owner"',
    ],
)
async def test_not_even_the_worker_may(database: Database, statement: str) -> None:
    with pytest.raises(DBAPIError, match="permission denied"):
        async with database.as_worker() as session:
            await session.execute(text(statement))


async def test_an_exception_undoes_the_transaction(database: Database) -> None:
    async def act() -> None:
        async with database.as_worker() as session:
            await session.execute(
                text("INSERT INTO gateway_instances (id, host, epoch) VALUES (:id, 'h', 1)"),
                {"id": new_id()},
            )
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await act()
    async with database.as_worker() as session:
        count = await session.execute(text("SELECT count(*) FROM gateway_instances"))
        assert count.scalar_one() == 0


async def test_prices_of_one_kind_never_overlap(database: Database, town: Town) -> None:
    prices = Table.metadata.tables["price_versions"]

    async def add(span: str, **whose: uuid.UUID) -> None:
        async with database.as_worker() as session:
            await session.execute(
                insert(prices).values(
                    id=new_id(),
                    base_model_id=town.base_model,
                    effective=literal_column(f"'{span}'::tstzrange"),
                    input_nano_per_million=1,
                    cached_input_nano_per_million=1,
                    output_nano_per_million=1,
                    **whose,
                )
            )

    await add("[2025-01-01,2026-01-01)")
    await add("[2026-01-01,)")
    with pytest.raises(IntegrityError, match="ex_price_versions_overlap"):
        await add("[2025-06-01,2025-07-01)")
    with pytest.raises(IntegrityError, match="ck_price_versions_effective"):
        await add("empty")
    # Another kind may cover the same time, each once.
    async with database.as_worker() as session:
        adapters = text("SELECT id FROM adapters ORDER BY public_name")
        first, second = (await session.execute(adapters)).scalars()
    await add("[2025-06-01,2025-07-01)", adapter_id=first)
    await add("[2025-06-01,2025-07-01)", adapter_id=second)
    await add("[2025-06-01,2025-07-01)", adapter_id=first, tenant_id=town.acme)
    with pytest.raises(IntegrityError, match="ex_price_versions_overlap"):
        await add("[2025-06-15,)", adapter_id=first)
    with pytest.raises(IntegrityError, match="ex_price_versions_overlap"):
        await add("[2025-06-15,)", tenant_id=town.acme)


async def test_usage_events_lie_in_the_partition_of_their_month(
    database: Database, town: Town
) -> None:
    async with database.as_worker() as session:
        where = text("SELECT DISTINCT tableoid::regclass::text FROM usage_events")
        month = datetime.datetime.now(datetime.UTC).strftime("%Y_%m")
        assert (await session.execute(where)).scalars().all() == [f"usage_events_{month}"]


async def test_partitions_are_made_ahead_once(database: Database) -> None:
    count = text("SELECT count(*) FROM pg_inherits WHERE inhparent = 'usage_events'::regclass")
    await database.prepare(months_ahead=12)
    async with database.as_worker() as session:
        # This month, twelve more and the default.
        assert (await session.execute(count)).scalar_one() == 14
    await asyncio.gather(*(database.prepare(months_ahead=14) for _ in range(3)))
    async with database.as_worker() as session:
        assert (await session.execute(count)).scalar_one() == 16
    await database.check()


def test_ids_are_uuids_of_version_7_in_the_order_of_time() -> None:
    ids = [new_id() for _ in range(1000)]
    assert {(made.version, made.variant) for made in ids} == {(7, uuid.RFC_4122)}
    assert [made.int >> 64 for made in ids] == sorted(made.int >> 64 for made in ids)
    assert len(set(ids)) == 1000


# What is refused at start.


async def test_a_migrated_database_passes_the_check(database: Database) -> None:
    await database.check()


@pytest.mark.parametrize(
    ("statements", "reason"),
    [
        (["ALTER ROLE {role} BYPASSRLS"], "exempt from row-level security"),
        (["ALTER ROLE {role} SUPERUSER"], "is a superuser"),
        (["ALTER TABLE holds OWNER TO {role}"], "owner of holds"),
        (["GRANT manylora_owner TO {role}"], "owner of adapter_aliases"),
        (["ALTER TABLE holds NO FORCE ROW LEVEL SECURITY"], "not forced on: holds"),
        (["ALTER TABLE tenants DISABLE ROW LEVEL SECURITY"], "not forced on: tenants"),
        (["UPDATE alembic_version SET version_num = '9999'"], "step 9999"),
        (["DROP TABLE alembic_version"], "migrate it first"),
    ],
)
async def test_a_database_that_breaks_the_promises_is_refused(
    cluster: Cluster, statements: list[str], reason: str
) -> None:
    # Roles are the cluster's, so these get a database whose roles nobody else has.
    home = await cluster.make_empty("spoiled")
    app_url, worker_url = role_urls(home.owner_url, app_password="a", worker_password="w")
    await migrate(home.owner_url, app_password="a", worker_password="w")
    database = Database(app_url=app_url, worker_url=worker_url)
    await database.check()
    for statement in statements:
        await execute(home.superuser_url, statement.format(role="spoiled_app"))
    try:
        with pytest.raises(DatabaseRefused, match=reason):
            await database.check()
    finally:
        await database.close()
        await cluster.drop(home)
        await cluster.execute("DROP ROLE spoiled_app, spoiled_worker")


@pytest.mark.parametrize("skew_s", [-2.5, 2.5])
def test_a_clock_that_is_off_is_refused(skew_s: float) -> None:
    there = NOW + datetime.timedelta(seconds=skew_s)
    with pytest.raises(DatabaseRefused, match=r"2\.5 s apart"):
        refuse_clock_skew(before=NOW, there=there, after=NOW)


def test_a_slow_answer_is_no_skew() -> None:
    later = NOW + datetime.timedelta(seconds=30)
    refuse_clock_skew(before=NOW, there=NOW + datetime.timedelta(seconds=15), after=later)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("mysql://u:p@h/d", "only PostgreSQL is spoken"),
        ("postgresql://u:p@h", "names no database"),
        (f"postgresql://u:p@h/{'d' * 60}", "too long"),
    ],
)
def test_a_url_that_cannot_be_is_refused(url: str, reason: str) -> None:
    with pytest.raises(DatabaseRefused, match=reason):
        role_urls(url, app_password="a", worker_password="w")


def test_every_spelling_of_a_postgresql_url_is_understood() -> None:
    for scheme in ("postgres", "postgresql", "postgresql+asyncpg", "postgresql+psycopg"):
        url = asyncpg_url(f"{scheme}://u:p@h:5433/d?sslmode=require")
        assert url.render_as_string(hide_password=False) == (
            "postgresql+asyncpg://u:p@h:5433/d?ssl=require"
        )


# Migrations.


async def test_the_migrations_make_what_the_tables_say(home: Home) -> None:
    def check(connection: Connection) -> None:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.check(config)

    engine = create_async_engine(home.owner_url)
    async with engine.connect() as connection:
        await connection.run_sync(check)
    await engine.dispose()


async def test_checks_in_the_database_are_those_of_the_tables(home: Home) -> None:
    declared = {
        constraint.name
        for table in Table.metadata.sorted_tables
        for constraint in table.constraints
        if isinstance(constraint, CheckConstraint)
    }
    engine = create_async_engine(home.owner_url)
    async with engine.connect() as connection:
        found = await connection.execute(
            text("SELECT conname FROM pg_constraint WHERE contype = 'c' AND conparentid = 0")
        )
        assert {name for name in found.scalars() if name.startswith("ck_")} == declared
    await engine.dispose()


async def test_migrating_again_changes_only_the_passwords(cluster: Cluster) -> None:
    home = await cluster.make_empty("twice")
    try:
        for password in ("first", "sec'ond \\ %"):
            await migrate(home.owner_url, app_password=password, worker_password=password)
        app_url, worker_url = role_urls(
            home.owner_url, app_password="sec'ond \\ %", worker_password="sec'ond \\ %"
        )
        database = Database(app_url=app_url, worker_url=worker_url)
        await database.check()
        await database.close()
        stale = Database(
            app_url=make_url(app_url).set(password="first").render_as_string(hide_password=False),
            worker_url=worker_url,
        )
        with pytest.raises(Exception, match="password authentication failed"):
            await stale.check()
        await stale.close()
    finally:
        await cluster.drop(home)
        await cluster.execute("DROP ROLE twice_app, twice_worker")


async def test_several_may_migrate_at_once(cluster: Cluster) -> None:
    home = await cluster.make_empty("crowded")
    passwords = {"app_password": APP_PASSWORD, "worker_password": WORKER_PASSWORD}
    try:
        await asyncio.gather(*(migrate(home.owner_url, **passwords) for _ in range(4)))
        app_url, worker_url = role_urls(home.owner_url, **passwords)
        database = Database(app_url=app_url, worker_url=worker_url)
        await database.check()
        await database.close()
    finally:
        await cluster.drop(home)
        await cluster.execute("DROP ROLE crowded_app, crowded_worker")


def test_a_password_goes_over_as_its_verifier() -> None:
    one, other = scram_verifier("secret"), scram_verifier("secret")
    assert one != other
    assert "secret" not in one
    assert one.startswith("SCRAM-SHA-256$4096:")
