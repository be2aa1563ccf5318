"""A hostile tenant in the database itself: whatever SQL it could get run, as `app` and as itself.

Tables and functions are those of the server's catalogue, so that a new one is asked about unasked.
"""

# ruff: noqa: S608 - tables and columns are put into statements by their names in the catalogue

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from tests.isolation.catalogue import (
    Rows,
    at_rest,
    plain_url,
    rows_by_owner,
    secrets_of,
    tables,
)
from tests.isolation.conftest import Town

pytestmark = pytest.mark.asyncio(loop_scope="session")

# What shows the same to everybody, and why it may.
OF_NO_TENANT = {
    "alembic_version": "the schema's own step",
    "base_models": "what engines serve; who may call it is decided by name",
    "public_names": "has no tenant but an owner: rows are shown with their adapters",
    "gateway_instances": "the operator's processes; closed to app altogether",
    "engine_replicas": "the operator's engines; no word of a tenant in them",
    "chores": "how far the operator's own work is; closed to app altogether",
}
# What app may call and that sees more than app itself.
POWERFUL = {"find_api_key", "touch_api_key", "billed_adapters", "admit_request"}


@dataclass(frozen=True)
class Rogue:
    """A connection of app's own, with the attacker for its tenant, and what it must not see."""

    connection: asyncpg.Connection
    attacker_id: uuid.UUID
    victim_id: uuid.UUID
    victim: Rows
    attacker: Rows
    secrets: frozenset[str]

    @asynccontextmanager
    async def as_tenant(self, tenant: object) -> AsyncIterator[asyncpg.Connection]:
        """A transaction that is taken back."""
        transaction = self.connection.transaction()
        await transaction.start()
        try:
            await self.connection.execute("SELECT set_config('app.tenant', $1, true)", str(tenant))
            yield self.connection
        finally:
            await transaction.rollback()

    async def try_out(self, statement: str, *values: Any) -> list[str]:
        """What the statement gives the attacker, row by row; nothing where it is refused."""
        async with self.as_tenant(self.attacker_id) as connection:
            try:
                return [str(tuple(row)) for row in await connection.fetch(statement, *values)]
            except REFUSALS:
                return []

    def leaked(self, told: object) -> set[str]:
        said = str(told)
        return {each for each in self.secrets if each in said}


REFUSALS = (
    asyncpg.InsufficientPrivilegeError,
    asyncpg.FeatureNotSupportedError,
    asyncpg.UndefinedFunctionError,
)


@pytest_asyncio.fixture(loop_scope="session")
async def rogue(town: Town) -> AsyncIterator[Rogue]:
    """Afterwards the victim has what it had, to the row."""
    before = await rows_by_owner(town.home.superuser_url)
    victim_id, attacker_id = town.victim.tenant_id, town.attacker.tenant_id
    connection = await asyncpg.connect(plain_url(town.home.app_url))
    try:
        yield Rogue(
            connection,
            attacker_id,
            victim_id,
            before[victim_id],
            before[attacker_id],
            frozenset(secrets_of(victim_id, before)),
        )
    finally:
        await connection.close()
    after = await rows_by_owner(town.home.superuser_url)
    assert at_rest(after[victim_id]) == at_rest(before[victim_id])


async def test_every_table_with_a_tenant_has_row_level_security_forced(town: Town) -> None:
    found = await tables(town.home.superuser_url)
    assert {table["name"] for table in found if not table["is_of_tenants"]} == set(OF_NO_TENANT)
    of_tenants = [table for table in found if table["is_of_tenants"]]
    assert of_tenants
    assert all(table["is_protected"] and table["is_forced"] for table in of_tenants)


async def test_both_tenants_have_a_row_in_every_table_that_is_asked_about(
    town: Town, rogue: Rogue
) -> None:
    names = {
        table["name"]
        for table in await tables(town.home.superuser_url)
        if table["is_of_tenants"] and not table["is_partition"]
    }
    assert set(rogue.victim) - {"public_names"} == names
    assert set(rogue.attacker) - {"public_names"} == names


async def test_no_row_of_another_is_read(
    town: Town, rogue: Rogue, subtests: pytest.Subtests
) -> None:
    for table in await tables(town.home.superuser_url):
        name = table["name"]
        with subtests.test(name):
            columns = await readable_columns(rogue.connection, name)
            if not columns:
                assert await rogue.try_out(f'SELECT 1 FROM "{name}"') == []
                continue
            async with rogue.as_tenant(rogue.attacker_id) as connection:
                seen = await read(connection, name, columns)
            assert seen or name not in rogue.attacker
            assert rogue.leaked(seen) == set()
            assert not any(each.get("tenant_id") == str(rogue.victim_id) for each in seen)


@pytest.mark.parametrize("tenant", ["", "00000000-0000-0000-0000-000000000000"])
async def test_without_a_tenant_nothing_of_anybody_is_read(
    town: Town, rogue: Rogue, tenant: str
) -> None:
    everybody = await rows_by_owner(town.home.superuser_url)
    for table in await tables(town.home.superuser_url):
        name = table["name"]
        columns = await readable_columns(rogue.connection, name)
        if not columns:
            continue
        async with rogue.as_tenant(tenant) as connection:
            seen = await read(connection, name, columns)
        whose = {key for key, rows in everybody.items() if key is not None and rows.get(name)}
        mine = [only(row, columns) for owner in whose for row in everybody[owner][name]]
        assert [row for row in seen if row in mine] == [], name


async def test_a_connection_that_never_had_a_tenant_reads_nothing_either(town: Town) -> None:
    connection = await asyncpg.connect(plain_url(town.home.app_url))
    try:
        for table in await tables(town.home.superuser_url):
            columns = await readable_columns(connection, table["name"])
            if table["is_of_tenants"] and columns:
                seen = await read(connection, table["name"], columns)
                assert [row for row in seen if row.get("tenant_id")] == [], table["name"]
    finally:
        await connection.close()


async def readable_columns(connection: asyncpg.Connection, table: str) -> list[str]:
    rows = await connection.fetch(
        """
        SELECT attname FROM pg_attribute
        WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped
          AND has_column_privilege(attrelid, attnum, 'SELECT')
        ORDER BY attnum
        """,
        table,
    )
    return [row["attname"] for row in rows]


async def read(
    connection: asyncpg.Connection, table: str, columns: list[str]
) -> list[dict[str, Any]]:
    listed = ", ".join(f'"{column}"' for column in columns)
    rows = await connection.fetch(f'SELECT to_jsonb(t) FROM (SELECT {listed} FROM "{table}") AS t')
    return [json.loads(row[0]) for row in rows]


def only(row: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    return {column: row[column] for column in columns}


async def test_no_row_of_another_is_changed_or_taken_away(
    town: Town, rogue: Rogue, subtests: pytest.Subtests
) -> None:
    for name, rows in rogue.victim.items():
        owner = {"tenants": "id", "public_names": "adapter_id"}.get(name, "tenant_id")
        value = rows[0][owner]
        with subtests.test(name):
            changed = await rogue.try_out(
                f'DELETE FROM "{name}" WHERE {owner} = $1 RETURNING 1', value
            )
            assert changed == []
            for column in rows[0]:
                changed = await rogue.try_out(
                    f'UPDATE "{name}" SET "{column}" = "{column}" WHERE {owner} = $1 RETURNING 1',
                    value,
                )
                assert changed == [], column
            assert (
                await rogue.try_out(f'SELECT 1 FROM "{name}" WHERE {owner} = $1 FOR UPDATE', value)
                == []
            )
            assert await rogue.try_out(f'TRUNCATE "{name}" CASCADE') == []


async def test_no_row_is_added_to_anothers(
    town: Town, rogue: Rogue, subtests: pytest.Subtests
) -> None:
    for name, rows in rogue.victim.items():
        with subtests.test(name):
            for row in (rows[0], {**rows[0], "id": str(uuid.uuid4())}):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await add(rogue, name, row)


async def test_a_row_of_ones_own_refers_to_nothing_of_another(
    rogue: Rogue, subtests: pytest.Subtests
) -> None:
    """Foreign keys look past the policies, and would be content."""
    for name, column in await references(rogue.connection):
        if name not in rogue.attacker:
            continue
        [mine, *_], [theirs, *_] = rogue.attacker[name], rogue.victim[name]
        with subtests.test(f"{name}.{column}"), pytest.raises(asyncpg.InsufficientPrivilegeError):
            await add(rogue, name, {**mine, column: theirs[column]})


async def references(connection: asyncpg.Connection) -> list[tuple[str, str]]:
    """Every column that refers to a row of a table, but for those that say whose a row is."""
    rows = await connection.fetch(
        """
        SELECT DISTINCT c.relname, a.attname
        FROM pg_constraint k
        JOIN pg_class c ON c.oid = k.conrelid AND NOT c.relispartition
        JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey)
        WHERE k.contype = 'f' AND a.attname <> 'tenant_id'
          AND c.relnamespace = 'public'::regnamespace
        ORDER BY 1, 2
        """
    )
    return [(row["relname"], row["attname"]) for row in rows]


async def test_no_row_of_ones_own_is_given_to_another(rogue: Rogue) -> None:
    """Or taken from another in the guise of an update."""
    for name in rogue.victim:
        if name in ("tenants", "public_names"):
            continue
        given = await rogue.try_out(
            f'UPDATE "{name}" SET tenant_id = $1 RETURNING 1', rogue.victim_id
        )
        assert given == [], name


async def add(rogue: Rogue, table: str, row: dict[str, Any]) -> None:
    async with rogue.as_tenant(rogue.attacker_id) as connection:
        await connection.execute(
            f'INSERT INTO "{table}" SELECT * FROM jsonb_populate_record(NULL::"{table}", $1)',
            json.dumps(row),
        )


async def test_what_app_may_call_with_more_power_is_known_and_looks_nowhere_else(
    town: Town, rogue: Rogue
) -> None:
    found = await rogue.connection.fetch(
        """
        SELECT proname, proconfig FROM pg_proc
        WHERE pronamespace = 'public'::regnamespace AND prosecdef
          AND has_function_privilege(oid, 'EXECUTE')
        """
    )
    assert {row["proname"] for row in found} == POWERFUL
    assert all("search_path=pg_catalog, pg_temp" in row["proconfig"] for row in found)


async def test_a_key_is_not_looked_up_by_a_tenant(town: Town, rogue: Rogue) -> None:
    for key in rogue.victim["api_keys"]:
        assert await rogue.try_out("SELECT * FROM find_api_key($1)", key["public_id"]) == []
        await rogue.try_out("SELECT touch_api_key($1)", uuid.UUID(key["id"]))
        # As it would be called where it is meant to be, but for the tenant.
        async with rogue.as_tenant(rogue.attacker_id) as connection:
            await connection.execute("SELECT touch_api_key($1)", uuid.UUID(key["id"]))


async def test_a_tenant_admits_no_request_of_another(rogue: Rogue) -> None:
    hold = rogue.victim["holds"][0]
    admit = "SELECT * FROM admit_request($1,$2,$3,$4,$5,$6,$7,'chat',1,1,1,NULL,$8)"
    names = ("tenant_id", "api_key_id", "base_model_id", "adapter_id", "adapter_version_id")
    ids = [hold[name] for name in (*names, "gateway_instance_id")]
    for is_rehearsal in (True, False):
        assert await rogue.try_out(admit, uuid.uuid4(), *ids, is_rehearsal) == []


async def test_bills_name_no_adapter_that_was_not_used(rogue: Rogue) -> None:
    assert rogue.leaked(await rogue.try_out("SELECT * FROM billed_adapters()")) == set()


@pytest.mark.parametrize(
    "statement",
    [
        "SET ROLE manylora_worker",
        "SET ROLE manylora_owner",
        "SET ROLE postgres",
        "SET SESSION AUTHORIZATION manylora_worker",
        "SET row_security = off; TABLE holds",
        "ALTER ROLE CURRENT_USER BYPASSRLS",
        "ALTER TABLE holds DISABLE ROW LEVEL SECURITY",
        "CREATE POLICY mine ON holds USING (true)",
        "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE TABLE mine (id int)",
        "CREATE SCHEMA mine",
        "CREATE EXTENSION dblink",
        "CREATE EXTENSION postgres_fdw",
        "CREATE EXTENSION file_fdw",
        "COPY holds TO '/tmp/holds'",
        "COPY holds FROM '/etc/passwd'",
        "COPY holds TO PROGRAM 'cat'",
        "COPY (SELECT 1) TO PROGRAM 'id'",
        "SELECT pg_read_file('/etc/passwd')",
        "SELECT pg_read_binary_file('/etc/passwd')",
        "SELECT pg_ls_dir('.')",
        "SELECT pg_stat_file('/etc/passwd')",
        "SELECT lo_import('/etc/passwd')",
        "SELECT lo_export(1, '/tmp/out')",
        "SELECT * FROM pg_largeobject",
        "SELECT * FROM pg_authid",
        "SELECT * FROM pg_shadow",
        "SELECT * FROM pg_statistic",
        "SELECT * FROM pg_hba_file_rules",
        "SELECT pg_reload_conf()",
        "SELECT pg_switch_wal()",
        "SELECT pg_logical_slot_get_changes('s', NULL, NULL)",
        "SELECT pg_create_logical_replication_slot('mine', 'pgoutput')",
        "SET log_statement = 'all'",
        "CREATE PUBLICATION mine FOR ALL TABLES",
        "CREATE EVENT TRIGGER mine ON ddl_command_end EXECUTE FUNCTION notify_api_keys()",
        "DO LANGUAGE plpython3u 'pass'",
    ],
)
async def test_the_server_itself_is_closed(rogue: Rogue, statement: str) -> None:
    with pytest.raises((*REFUSALS, asyncpg.UndefinedObjectError)):
        async with rogue.as_tenant(rogue.attacker_id) as connection:
            await connection.execute(statement)


async def test_copying_out_gives_ones_own_rows_alone(rogue: Rogue) -> None:
    for name in rogue.victim:
        chunks: list[bytes] = []

        async def keep(chunk: bytes, chunks: list[bytes] = chunks) -> None:
            chunks.append(chunk)

        async with rogue.as_tenant(rogue.attacker_id) as connection:
            try:
                await connection.copy_from_query(f'SELECT * FROM "{name}"', output=keep)
            except asyncpg.InsufficientPrivilegeError:
                continue
        assert rogue.leaked(b"".join(chunks).decode(errors="replace")) == set(), name


async def test_what_others_run_and_what_the_planner_knows_tells_nothing(
    town: Town, rogue: Rogue
) -> None:
    superuser = await asyncpg.connect(plain_url(town.home.superuser_url))
    try:
        await superuser.execute("ANALYZE")
    finally:
        await superuser.close()
    for view in (
        "pg_stat_activity",
        "pg_prepared_statements",
        "pg_cursors",
        "pg_stats",
        "pg_stats_ext",
        "pg_locks",
        "pg_largeobject_metadata",
        "pg_stat_ssl",
        "pg_settings",
        "pg_seclabels",
        "pg_description",
    ):
        told = await rogue.try_out(f"SELECT to_jsonb(t) FROM {view} AS t")
        assert rogue.leaked(told) == set(), view
    others = await rogue.try_out(
        "SELECT query FROM pg_stat_activity WHERE usename IS DISTINCT FROM current_user"
        " AND query NOT IN ('', '<insufficient privilege>')"
    )
    assert others == []


async def test_a_function_of_ones_own_is_shown_no_row_that_the_policy_hides(rogue: Rogue) -> None:
    """Not even a cheap one, which the planner would rather ask first."""
    spy = """
        CREATE TEMP TABLE seen (what text) ON COMMIT DROP;
        CREATE FUNCTION pg_temp.spy(what text) RETURNS boolean LANGUAGE plpgsql COST 0.0001 AS $$
        BEGIN INSERT INTO pg_temp.seen VALUES (what); RETURN true; END $$
    """
    for name in rogue.victim:
        async with rogue.as_tenant(rogue.attacker_id) as connection:
            columns = await readable_columns(connection, name)
            if not columns:
                continue
            await connection.execute(spy)
            listed = ", ".join(f'"{column}"' for column in columns)
            await connection.fetch(
                f"SELECT 1 FROM \"{name}\" WHERE pg_temp.spy(concat_ws(' ', {listed}))"
            )
            seen = await connection.fetch("SELECT what FROM pg_temp.seen")
        assert rogue.leaked([row["what"] for row in seen]) == set(), name


async def test_a_notice_of_a_changed_key_does_not_say_whose(town: Town, rogue: Rogue) -> None:
    heard: list[object] = []
    await rogue.connection.add_listener("api_keys", lambda *said: heard.append(said[-1]))
    key = await town.gateway.operator.post(
        f"/admin/v1/tenants/{town.attacker.names.tenant}/keys", json={"name": "short-lived"}
    )
    made = key.json()
    await town.gateway.operator.delete(
        f"/admin/v1/tenants/{town.attacker.names.tenant}/keys/{made['id']}"
    )
    for _ in range(100):
        await rogue.connection.execute("SELECT pg_sleep(0.02)")
        if heard:
            break
    assert set(heard) == {""}
