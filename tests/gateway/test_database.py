"""Facts about the database: who sees what, what can never change, when it is refused."""

import asyncio
import datetime
import json
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import asyncpg
import pytest
from alembic import command
from sqlalchemy import CheckConstraint, ColumnElement, Connection, make_url, select, text
from sqlalchemy import Table as SqlTable
from sqlalchemy.dialects.postgresql import Range
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import make_transient

from gateway.database import (
    DATABASE_TROUBLE,
    Database,
    alembic_config,
    asyncpg_url,
    is_away,
    migrate,
    refuse_clock_skew,
    role_urls,
    scram_verifier,
)
from gateway.errors import DatabaseRefused
from gateway.tables import (
    Adapter,
    AdapterAlias,
    AdapterGrant,
    AdapterPin,
    AdapterVersion,
    AliasMove,
    ApiKey,
    AuditEntry,
    BaseModel,
    Batch,
    BatchResult,
    BillingAccount,
    BillingPeriod,
    Budget,
    BudgetWindow,
    ContentPolicy,
    EndUser,
    GatewayInstance,
    Hold,
    IdempotencyKey,
    Limit,
    PolicyDecision,
    PriceVersion,
    PublicName,
    Statement,
    StatementLine,
    StorageHour,
    StoredContent,
    Table,
    Tenant,
    TenantFile,
    TenantPolicy,
    Upload,
    UploadPart,
    UsageCredit,
    UsageEvent,
    UsageRollup,
    Webhook,
    WebhookDelivery,
    WithheldBaseModel,
    new_id,
)
from tests.conftest import APP_PASSWORD, Cluster, Home, execute

TENANT_TABLES = [
    table
    for table in Table.metadata.sorted_tables
    if "tenant_id" in table.c or table.name == "tenants"
]
SLUGS = ("acme", "globex")
NOW = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)
RATE = {
    "input_nano_per_million": 1,
    "cached_input_nano_per_million": 1,
    "output_nano_per_million": 1,
}


async def migrated(home: Home, *, password: str = APP_PASSWORD) -> Home:
    """Migrate; return the database with the URLs of its own roles."""
    await migrate(home.owner_url, app_password=password, worker_password=password)
    app_url, worker_url = role_urls(home.owner_url, app_password=password, worker_password=password)
    return replace(home, app_url=app_url, worker_url=worker_url)


@asynccontextmanager
async def opened(home: Home) -> AsyncIterator[Database]:
    database = Database(app_url=home.app_url, worker_url=home.worker_url)
    yield database
    await database.close()


@dataclass(frozen=True, slots=True)
class Town:
    """Two tenants that have one row in every table, and the base model of both."""

    acme: uuid.UUID
    globex: uuid.UUID
    base_model: uuid.UUID


def rows_of_a_tenant(slug: str, *, base_model_id: uuid.UUID, withheld_id: uuid.UUID) -> list[Table]:
    """One row of each table that a tenant can have rows in; the tenant first."""
    tenant = Tenant(id=new_id(), slug=slug, name=slug, cache_salt=bytes(32))
    ours = {"tenant_id": tenant.id}
    based = {**ours, "base_model_id": base_model_id}
    key = ApiKey(
        id=new_id(), public_id=slug, name="k", secret_hmac=bytes(32), scopes=["usage"], **ours
    )
    adapter = Adapter(id=new_id(), slug="x", public_name=f"{slug}-x", **based)
    version = AdapterVersion(
        id=new_id(),
        adapter_id=adapter.id,
        number=1,
        state="ready",
        weights_digest="w",
        version_digest="v",
        rank=1,
        num_modules=1,
        size_bytes=1,
        **based,
    )
    price = PriceVersion(id=new_id(), effective=Range(NOW, None), **RATE, **based)
    instance = GatewayInstance(id=new_id(), host="h", epoch=1)
    paid = {**based, "api_key_id": key.id, "price_version_id": price.id, "endpoint": "e"}
    tokens = {"prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 1, "cost_nano": 1}
    hold = Hold(
        id=new_id(),
        gateway_instance_id=instance.id,
        prompt_tokens=1,
        funded_output_tokens=1,
        amount_nano=1,
        **paid,
    )
    now = datetime.datetime.now(datetime.UTC)
    upload = Upload(id=new_id(), adapter="x", files=[], expires_at=now, **ours)
    event = UsageEvent(
        id=hold.id, outcome="stop", engine_ns=1, started_at=now, finished_at=now, **tokens, **paid
    )
    rollup = UsageRollup(
        id=new_id(), day=now.date(), api_key_id=key.id, requests=1, **tokens, **based
    )
    budget = Budget(
        id=new_id(),
        kind="hard",
        period="month",
        time_zone="UTC",
        cap_nano=1,
        alert_percents=[100],
        **ours,
    )
    webhook = Webhook(id=new_id(), url="https://alerts.example", pepper_version=1, **ours)
    end_user = EndUser(id=new_id(), name="somebody", **ours)
    kept = {"expires_at": now, **ours}
    file = TenantFile(id=new_id(), filename="f", purpose="batch", size_bytes=1, **kept)
    batch = Batch(id=new_id(), api_key_id=key.id, endpoint="/v1/e", input_file_id=file.id, **kept)
    return [
        tenant,
        Limit(id=new_id(), requests_per_minute=1, **ours),
        budget,
        BudgetWindow(budget_id=budget.id, starts_at=NOW, spent_nano=0, **ours),
        webhook,
        WebhookDelivery(id=new_id(), webhook_id=webhook.id, event={}, **ours),
        key,
        end_user,
        adapter,
        PublicName(name=adapter.public_name, adapter_id=adapter.id),
        version,
        AdapterPin(version_id=version.id, **ours),
        AdapterAlias(adapter_id=adapter.id, alias="latest", version_id=version.id, **ours),
        AliasMove(adapter_id=adapter.id, alias="latest", revision=1, **ours),
        AdapterGrant(id=new_id(), adapter_id=adapter.id, grantee_id=tenant.id, **ours),
        WithheldBaseModel(base_model_id=withheld_id, **ours),
        upload,
        UploadPart(upload_id=upload.id, file="f", begin_bytes=0, size_bytes=1, part="p", **ours),
        price,
        instance,
        hold,
        event,
        rollup,
        AuditEntry(
            id=new_id(), number=1, action="a", subject="s", details={}, hash=bytes(32), **ours
        ),
        UsageCredit(
            id=event.id,
            retry_id=new_id(),
            price_version_id=price.id,
            at=now,
            amount_nano=1,
            **based,
        ),
        StorageHour(
            adapter_id=adapter.id,
            hour=now,
            price_version_id=price.id,
            size_bytes=1,
            cost_nano=1,
            **based,
        ),
        BillingAccount(**ours),
        ContentPolicy(keep_days=1, **ours),
        TenantPolicy(id=new_id(), document={}, pepper_version=1, **ours),
        PolicyDecision(day=now.date(), rule="r", verdict="refused", num_decisions=1, **ours),
        StoredContent(id=event.id, prompt="p", completion="c", **kept),
        file,
        batch,
        BatchResult(
            batch_id=batch.id, number=1, request_id=event.id, is_error=False, line=b"{}", **ours
        ),
        IdempotencyKey(
            api_key_id=key.id, key_digest=b"k", body_digest=b"b", claim_id=new_id(), **kept
        ),
    ]


def a_closed_month(tenant_id: uuid.UUID, slug: str) -> tuple[BillingPeriod, Statement]:
    """A period, to be closed once its statement is there."""
    period = BillingPeriod(id=new_id(), tenant_id=tenant_id, month=datetime.date(2026, 1, 1))
    statement = Statement(
        id=new_id(),
        tenant_id=tenant_id,
        period_id=period.id,
        number=slug,
        tenant_name=slug,
        bill_to="",
        as_of=NOW,
        total_nano=1,
        carried_in_nano=0,
        payable_cents=0,
        carried_out_nano=1,
    )
    return period, statement


@pytest.fixture
async def town(database: Database) -> Town:
    base_model, withheld = (
        BaseModel(
            id=new_id(),
            name=name,
            digest="d",
            text_bundle_digest="t",
            shape={},
            context_length=1,
            vocab_size=1,
            max_lora_rank=1,
        )
        for name in ("smol", "withheld")
    )
    acme, globex = (
        rows_of_a_tenant(slug, base_model_id=base_model.id, withheld_id=withheld.id)
        for slug in SLUGS
    )
    async with database.as_worker() as session:
        for row in (base_model, withheld, *acme, *globex):
            session.add(row)
            await session.flush()
        for rows in (acme, globex):
            await add_statement(session, rows)
    first, second = (row.id for row in (acme[0], globex[0]) if isinstance(row, Tenant))
    return Town(first, second, base_model.id)


async def add_statement(session: AsyncSession, rows: list[Table]) -> None:
    [tenant] = [row for row in rows if isinstance(row, Tenant)]
    [price] = [row for row in rows if isinstance(row, PriceVersion)]
    period, statement = a_closed_month(tenant.id, tenant.slug)
    line = StatementLine(
        id=new_id(),
        tenant_id=tenant.id,
        statement_id=statement.id,
        number=1,
        kind="usage",
        usage_month=period.month,
        base_model_id=price.base_model_id,
        price_version_id=price.id,
        unit="input_tokens",
        quantity=1,
        rate_nano=1,
        amount_nano=1,
    )
    for row in (period, statement, line):
        session.add(row)
        await session.flush()
    period.state, period.closed_at = "closed", NOW


def owner_column(table: SqlTable) -> ColumnElement[uuid.UUID]:
    return table.c["id" if table.name == "tenants" else "tenant_id"]


async def owners_seen(session: AsyncSession) -> dict[str, set[uuid.UUID]]:
    """Whose rows are there: table name -> tenants."""
    return {
        table.name: set((await session.execute(select(owner_column(table)))).scalars())
        for table in TENANT_TABLES
    }


async def test_a_tenant_sees_its_own_rows_alone_in_every_table(
    database: Database, town: Town
) -> None:
    for tenant_id in (town.acme, town.globex):
        async with database.as_tenant(tenant_id) as session:
            seen = await owners_seen(session)
        assert seen == {table.name: {tenant_id} for table in TENANT_TABLES}
    async with database.as_worker() as session:
        seen = await owners_seen(session)
    assert seen == {table.name: {town.acme, town.globex} for table in TENANT_TABLES}


async def test_without_a_tenant_no_row_is_seen_in_any_table(database: Database, town: Town) -> None:
    nothing: dict[str, set[uuid.UUID]] = {table.name: set() for table in TENANT_TABLES}
    async with database.as_tenant(town.acme) as session:
        assert await owners_seen(session) != nothing
    # On the connection that knew a tenant a moment ago.
    async with database.as_app() as session:
        assert await owners_seen(session) == nothing
    async with database.as_tenant(uuid.uuid4()) as session:
        assert await owners_seen(session) == nothing


async def test_the_owner_is_subject_to_row_level_security_too(home: Home, town: Town) -> None:
    engine = create_async_engine(home.owner_url)
    async with AsyncSession(engine) as session:
        assert set().union(*(await owners_seen(session)).values()) == set()
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
    async with database.as_worker() as session:
        theirs = (
            await session.scalars(select(Adapter.id).filter_by(slug="x", tenant_id=town.globex))
        ).one()
        for adapter_id, rate in ((None, 5), (theirs, 6)):
            session.add(
                PriceVersion(
                    id=new_id(),
                    base_model_id=town.base_model,
                    adapter_id=adapter_id,
                    effective=Range(NOW, None),
                    **{**RATE, "input_nano_per_million": rate},
                )
            )
    rates = text("SELECT input_nano_per_million FROM price_versions")
    async with database.as_tenant(town.acme) as session:
        assert set((await session.execute(rates)).scalars()) == {1, 5}
    async with database.as_tenant(town.globex) as session:
        assert set((await session.execute(rates)).scalars()) == {1, 5, 6}


async def test_a_tenant_cannot_add_a_row_for_another(database: Database, town: Town) -> None:
    copy = text("""
        INSERT INTO idempotency_keys (
            api_key_id, key_digest, tenant_id, body_digest, claim_id, expires_at
        )
        SELECT api_key_id, 'other', :tenant_id, body_digest, claim_id, now() FROM idempotency_keys
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
        "INSERT INTO holds SELECT * FROM holds",
        "SELECT count(*) FROM usage_events_default",
        "SELECT make_usage_partitions(1)",
        "UPDATE holds SET amount_nano = 0",
        "DELETE FROM holds",
        "UPDATE usage_rollups SET cost_nano = 0",
        "DELETE FROM audit_log",
        "INSERT INTO statements SELECT * FROM statements",
        "UPDATE billing_accounts SET bill_to = ''",
        "INSERT INTO usage_credits SELECT * FROM usage_credits",
        "DELETE FROM stored_contents",
        "UPDATE batches SET status = 'in_progress'",
        "DELETE FROM tenant_files",
        "INSERT INTO batch_results SELECT * FROM batch_results",
        "UPDATE price_versions SET input_nano_per_million = 0",
        "UPDATE tenants SET status = 'active'",
        "UPDATE api_keys SET revoked_at = NULL",
        "SELECT secret_hmac FROM api_keys",
        "UPDATE limits SET requests_per_minute = NULL",
        "UPDATE budgets SET cap_nano = 9",
        "UPDATE budget_windows SET spent_nano = 0",
        "SELECT extend_holds(gen_random_uuid(), '{}', '{}', '{}', '{}')",
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
        "UPDATE statements SET total_nano = 0",
        "DELETE FROM statement_lines",
        "UPDATE usage_credits SET amount_nano = 2",
        "DELETE FROM storage_hours",
        'SET ROLE "manylora_owner"',
    ],
)
async def test_not_even_the_worker_may(database: Database, statement: str) -> None:
    with pytest.raises(DBAPIError, match="permission denied"):
        async with database.as_worker() as session:
            await session.execute(text(statement))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE usage_events SET cost_nano = 0",
        "DELETE FROM usage_events",
        "DELETE FROM usage_credits",
        "UPDATE storage_hours SET size_bytes = 0",
        "UPDATE statements SET payable_cents = 1, carried_out_nano = -9999999",
        "DELETE FROM statement_lines",
        "UPDATE billing_periods SET state = 'open', closed_at = NULL",
        "DELETE FROM billing_periods",
        """INSERT INTO statement_lines SELECT gen_random_uuid(), tenant_id, statement_id, 2, kind,
           usage_month, base_model_id, adapter_id, price_version_id, unit, quantity, rate_nano, 0
           FROM statement_lines""",
    ],
)
async def test_not_even_a_superuser_may_by_mistake(home: Home, town: Town, statement: str) -> None:
    with pytest.raises(asyncpg.RestrictViolationError):
        await execute(home.superuser_url, statement)


async def test_a_statement_stands_with_its_lines_and_a_closed_period_or_not_at_all(
    database: Database, town: Town
) -> None:
    period, statement = a_closed_month(town.acme, "another")
    period.month = datetime.date(2026, 2, 1)
    with pytest.raises(IntegrityError, match="sum of its lines"):
        await add_and_close(database, period, statement)
    period.id, period.state, period.closed_at = new_id(), "open", None
    with pytest.raises(IntegrityError, match="no statement to close with"):
        await add_and_close(database, period)


async def add_and_close(database: Database, period: BillingPeriod, *rows: Table) -> None:
    async with database.as_worker() as session:
        for row in (period, *rows):
            make_transient(row)
            session.add(row)
            await session.flush()
        period.state, period.closed_at = "closed", NOW


@pytest.mark.parametrize(
    ("state", "is_worth_asking_again"),
    [
        # It starts or stops, was told to, has no connection left, chose us to end a deadlock.
        *((state, True) for state in ("57P03", "57P01", "57P02", "53300", "40P01")),
        # A division by zero, a row that is there already, a privilege that is not.
        *((state, False) for state in ("22012", "23505", "42501")),
    ],
)
async def test_a_server_that_cannot_serve_now_is_told_from_one_that_refuses(
    database: Database, state: str, is_worth_asking_again: bool
) -> None:
    with pytest.raises(DBAPIError) as refused:
        async with database.as_app() as session:
            await session.execute(
                text(f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $$")
            )
    assert is_away(refused.value) == is_worth_asking_again


# What an ending server tells a connection that asks nothing: severity, SQLSTATE, message.
FAREWELL = b"SFATAL\0C57P01\0Mterminating connection due to administrator command\0\0"


@asynccontextmanager
async def server_that_is_ending(home: Home) -> AsyncIterator[tuple[Home, Callable[[], None]]]:
    """The database behind a relay, and what makes it say to all that it ends, before it does."""
    listening: list[asyncio.StreamWriter] = []
    socket_path = f"{make_url(home.app_url).query['host']}/.s.PGSQL.5432"

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, questions = await asyncio.open_unix_connection(socket_path)
        listening.append(writer)
        await asyncio.gather(pass_on(reader, questions), pass_on(answers, writer))

    def say_farewell() -> None:
        for writer in listening:
            writer.write(b"E" + (len(FAREWELL) + 4).to_bytes(4) + FAREWELL)

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        app_url, worker_url = (
            make_url(url).set(host=host, port=port, query={}).render_as_string(hide_password=False)
            for url in (home.app_url, home.worker_url)
        )
        yield replace(home, app_url=app_url, worker_url=worker_url), say_farewell


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while words := await reader.read(1 << 16):
        writer.write(words)
    writer.close()


async def test_a_connection_that_is_taken_while_its_server_ends_says_that_it_is_away(
    home: Home,
) -> None:
    query = text("SELECT 1")
    async with server_that_is_ending(home) as (ending, say_farewell), opened(ending) as database:
        await database.call(query, {})
        async with database.as_app() as session:
            await session.execute(query)
        say_farewell()
        await asyncio.sleep(0.05)
        with pytest.raises(DATABASE_TROUBLE) as told:
            await database.call(query, {})
        assert is_away(told.value)
        with pytest.raises(DATABASE_TROUBLE) as told:
            async with database.as_app() as session:
                await session.execute(query)
        assert is_away(told.value)
        # The connection is not used again.
        assert [dict(row) for row in await database.call(query, {})] == [{"?column?": 1}]


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
    async def add(first: int, last: int | None, **whose: uuid.UUID) -> None:
        """Add a price from one month of 2025 up to another."""
        start, end = (
            month and datetime.datetime(2025, month, 1, tzinfo=datetime.UTC)
            for month in (first, last)
        )
        async with database.as_worker() as session:
            session.add(
                PriceVersion(
                    id=new_id(),
                    base_model_id=town.base_model,
                    effective=Range(start, end),
                    **RATE,
                    **whose,
                )
            )

    await add(1, 12)
    await add(12, None)
    with pytest.raises(IntegrityError, match="ex_price_versions_overlap"):
        await add(6, 8)
    with pytest.raises(IntegrityError, match="ck_price_versions_effective"):
        await add(6, 6)
    # Another kind may cover the same time, each once.
    async with database.as_worker() as session:
        adapters = text("SELECT id FROM adapters ORDER BY public_name")
        first, second = (await session.execute(adapters)).scalars()
    await add(6, 8, adapter_id=first)
    await add(6, 8, adapter_id=second)
    await add(6, 8, adapter_id=first, tenant_id=town.acme)
    with pytest.raises(IntegrityError, match="ex_price_versions_overlap"):
        await add(7, None, adapter_id=first)
    with pytest.raises(IntegrityError, match="ex_price_versions_overlap"):
        await add(7, None, tenant_id=town.acme)


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


@pytest.fixture
async def own_home(cluster: Cluster) -> AsyncIterator[Home]:
    """An empty database with roles of its own; those of `home` are shared with all tests."""
    await cluster.drop_if_there("own")
    yield await cluster.make_empty("own")
    await cluster.drop_if_there("own")


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("ALTER ROLE own_app BYPASSRLS", "exempt from row-level security"),
        ("ALTER ROLE own_app SUPERUSER", "is a superuser"),
        ("ALTER ROLE own_worker SUPERUSER", "is a superuser"),
        ("ALTER TABLE holds OWNER TO own_app", "owner of holds"),
        ("ALTER TABLE holds NO FORCE ROW LEVEL SECURITY", "not forced on: holds"),
        ("ALTER TABLE tenants DISABLE ROW LEVEL SECURITY", "not forced on: tenants"),
        ("UPDATE alembic_version SET version_num = '9999'", "step 9999"),
        ("DROP TABLE alembic_version", "migrate it first"),
    ],
)
async def test_a_database_that_breaks_the_promises_is_refused(
    own_home: Home, statement: str, reason: str
) -> None:
    async with opened(await migrated(own_home)) as database:
        await database.check()
        await execute(own_home.superuser_url, statement)
        with pytest.raises(DatabaseRefused, match=reason):
            await database.check()


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


async def test_the_second_step_keeps_what_the_first_knew(own_home: Home) -> None:
    """Shapes are told with their base model's name, and the aliases' history begins."""

    def step(connection: Connection, *, to: str) -> None:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, to)

    ids = {name: new_id() for name in ("tenant", "base", "adapter", "version")}
    shape = {"model.layers.0.self_attn.q_proj": [16, 8]}
    written = (
        "INSERT INTO base_models VALUES (:base, 'smol', 'd', 't', CAST(:shape AS jsonb), 1, 1, 1)",
        "INSERT INTO tenants VALUES (:tenant, 'acme', 'acme', 'active', 'salt')",
        "INSERT INTO adapters VALUES (:adapter, :tenant, :base, 'x', 'acme-x')",
        "INSERT INTO adapter_versions VALUES"
        " (:version, :tenant, :adapter, :base, 1, 'ready', 'w', 'v', NULL, 1, 1, 1)",
        "INSERT INTO adapter_aliases VALUES (:adapter, 'latest', :tenant, :version, 3)",
    )
    everything = {**ids, "shape": json.dumps(shape)}
    owner, superuser = (
        create_async_engine(url) for url in (own_home.owner_url, own_home.superuser_url)
    )
    async with owner.begin() as connection:
        await connection.run_sync(step, to="0001")
    # Row-level security hides every tenant's rows from the owner.
    async with superuser.begin() as connection:
        for statement in written:
            names = [name for name in everything if f":{name}" in statement]
            await connection.execute(text(statement), {name: everything[name] for name in names})
    async with owner.begin() as connection:
        await connection.run_sync(step, to="0002")
    async with superuser.begin() as connection:
        found = await connection.execute(text("SELECT shape FROM base_models"))
        assert found.scalar_one() == {"base_model": "smol", "modules": shape}
        moves = text("SELECT alias, revision, version_id FROM alias_moves")
        assert (await connection.execute(moves)).all() == [("latest", 3, ids["version"])]
    for engine in (owner, superuser):
        await engine.dispose()
    async with opened(await migrated(own_home)) as database:
        await database.check()


async def test_the_owner_may_work_as_the_worker(own_home: Home) -> None:
    await migrated(own_home)
    database = Database.of_worker(own_home.owner_url)
    try:
        async with database.as_worker() as session:
            assert (await session.execute(text("SELECT current_user"))).scalar_one() == "own_worker"
    finally:
        await database.close()


async def test_migrating_again_changes_only_the_passwords(own_home: Home) -> None:
    before = await migrated(own_home, password="first")
    after = await migrated(own_home, password="sec'ond \\ %")
    async with opened(after) as database:
        await database.check()
    async with opened(before) as database:
        with pytest.raises(DATABASE_TROUBLE, match="password authentication failed"):
            await database.check()


async def test_several_may_migrate_at_once(own_home: Home) -> None:
    homes = await asyncio.gather(*(migrated(own_home) for _ in range(4)))
    async with opened(homes[0]) as database:
        await database.check()


def test_a_password_goes_over_as_its_verifier() -> None:
    one, other = scram_verifier("secret"), scram_verifier("secret")
    assert one != other
    assert "secret" not in one
    assert one.startswith("SCRAM-SHA-256$4096:")
