"""Fixtures that every level shares: a real PostgreSQL, and a migrated database of each test's own.

postgres   the server, once a session
cluster    on it, and once a session too: what makes databases like a migrated one
home       a migrated database for one test: the URLs of its roles
database   the same, opened as `gateway.database.Database`
announce   say something in the run's summary
"""

import asyncio
import contextlib
import gc
import itertools
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from gateway.database import Database, migrate, role_urls
from gateway.embedded import EmbeddedPostgres

# Read when Triton is imported: kernels for GPUs are interpreted here, on a CPU's tensors.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Hundreds of processes are started, and each would compile our modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# A shell starts what runs in the background deaf to Ctrl-C, and so would be all that we start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Where a test's report keeps what it has announced.
ANNOUNCED = "announced"
# Groups of tests that take longest.
LONGEST = (
    "tests/end_to_end",
    "tests/crash/test_tokens_survive.py",
    "tests/hostile/test_corpus.py",
    "tests/hostile/test_neighbours.py",
    "tests/isolation",
    "tests/engine/test_main.py",
    "tests/crash/test_uploads_survive.py",
    "tests/engine/test_fairness.py",
    "tests/engine/test_endurance.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-results",
        action="store_true",
        help="let tests that measure something write it to benchmarks/results",
    )
    parser.addoption(
        "--write-readme",
        action="store_true",
        help="let the tests of README's tables write them",
    )
    parser.addoption("--crash-seed", type=int, help="kill by this plan instead of a new one")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first, so that at the end no process is alone with it."""
    items.sort(key=lambda item: _rank(_group(item.nodeid)))


def pytest_collection_finish() -> None:
    """What was imported stays: nobody has to look through it for garbage, a thousand times over."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure() -> None:
    """Libraries that count what is left at the end find nothing."""
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have announced: processes that share the tests have no terminal of their own."""
    told = [
        (report.nodeid, words)
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for name, words in report.user_properties
        if name == ANNOUNCED
    ]
    if told:
        terminalreporter.section("announced")
    for test, words in told:
        terminalreporter.write_line(f"{test}: {words}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """Where several processes share the tests, each takes one group after the other, in order."""
    config.option.loadscopereorder = False
    return Groups(config, log)


class Groups(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid)


def _group(nodeid: str) -> str:
    """What shares a server or a model is run by one process, without a pause: a file, mostly."""
    path = nodeid.partition("::")[0]
    folder = path.rpartition("/")[0]
    return folder if folder in ("tests/end_to_end", "tests/isolation") else path


def _rank(group: str) -> int:
    return LONGEST.index(group) if group in LONGEST else len(LONGEST)


@pytest.fixture
def announce(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Say something in the run's summary, whatever comes of the test."""
    return partial(record_property, ANNOUNCED)


# Nobody needs these data after a power cut, and copies of databases are in no journal.
CARELESS = (
    *("fsync = off", "full_page_writes = off", "wal_level = minimal", "max_wal_senders = 0"),
    *("checkpoint_timeout = '1d'", "autovacuum = off"),
)
APP_PASSWORD, WORKER_PASSWORD = "app's own", "worker's own"


@dataclass(frozen=True, slots=True)
class Home:
    """The URLs of one database."""

    owner_url: str
    app_url: str
    worker_url: str
    superuser_url: str


END_OTHERS = """
    SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
# Whatever changes a schema writes into these.
CATALOGS = (
    *("pg_attrdef", "pg_attribute", "pg_class", "pg_constraint", "pg_index", "pg_namespace"),
    *("pg_policy", "pg_proc", "pg_trigger", "pg_type"),
)
# Tables that have, or had, rows.
WRITTEN_TABLES = """
    SELECT relname::text FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND pg_relation_size(oid) > 0
"""


class Cluster:
    """Makes databases: copies of the migrated one.

    Each copy is twelve megabytes of catalogs, so those of which only rows were written are emptied
    and used again: that takes a third to a tenth of the time.
    """

    def __init__(self, postgres: EmbeddedPostgres) -> None:
        self._postgres = postgres
        self._numbers = itertools.count(1)
        self._emptied: list[Home] = []
        # What is in the copied database: its tables that have rows, and the state of its schema.
        self._filled: set[str] = set()
        self._schema: list[Any] = []
        # Copies keep the roles of what they are copied from.
        self._app_url, self._worker_url = role_urls(
            postgres.url, app_password=APP_PASSWORD, worker_password=WORKER_PASSWORD
        )

    async def look(self) -> None:
        """Remember what copies look like."""
        async with connected(self.home("manylora").superuser_url) as connection:
            self._filled = {row[0] for row in await connection.fetch(WRITTEN_TABLES)}
            self._schema = await self._describe(connection)

    async def make_migrated(self) -> Home:
        if self._emptied:
            return self._emptied.pop()
        name = f"test_{next(self._numbers)}"
        await self.execute(
            f"CREATE DATABASE {name} TEMPLATE manylora STRATEGY FILE_COPY OWNER manylora_owner"
        )
        return self.home(name)

    async def make_empty(self, name: str) -> Home:
        await self.execute(f"CREATE DATABASE {name} OWNER manylora_owner")
        return self.home(name)

    async def drop(self, home: Home) -> None:
        await self.execute(f"DROP DATABASE {make_url(home.owner_url).database} WITH (FORCE)")

    async def give_back(self, home: Home) -> None:
        """Empty the database for whoever comes next, or drop it where more than rows changed."""
        if await self._is_emptied(home):
            self._emptied.append(home)
        else:
            await self.drop(home)

    async def _is_emptied(self, home: Home) -> bool:
        async with connected(home.superuser_url) as connection:
            await connection.execute(END_OTHERS)
            if await self._describe(connection) != self._schema:
                return False
            rows = await connection.fetch(WRITTEN_TABLES)
            written = sorted({row[0] for row in rows} - self._filled)
            if written:
                deletes = "; ".join(f"DELETE FROM {table}" for table in written)  # noqa: S608 - ours
                # No trigger may object.
                await connection.execute(f"SET session_replication_role = replica; {deletes}")
                await connection.execute(f"VACUUM (INDEX_CLEANUP ON) {', '.join(written)}")
            return True

    async def _describe(self, connection: Any) -> list[Any]:
        """Another one after every change to the schema, or to the rows that it came with."""
        queries = [
            f"SELECT count(*), max(xmin::text::bigint) FROM {table}"  # noqa: S608 - ours
            for table in (*CATALOGS, *sorted(self._filled))
        ]
        return [tuple(row) for row in await connection.fetch(" UNION ALL ".join(queries))]

    async def drop_if_there(self, name: str) -> None:
        """Drop a database and the two roles that its migration made."""
        await self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await self.execute(f"DROP ROLE IF EXISTS {name}_app, {name}_worker")

    async def execute(self, statement: str) -> None:
        await execute(self._postgres.superuser_url, statement)

    def home(self, name: str) -> Home:
        owner, app, worker, superuser = (
            make_url(url).set(database=name).render_as_string(hide_password=False)
            for url in (
                self._postgres.url,
                self._app_url,
                self._worker_url,
                self._postgres.superuser_url,
            )
        )
        return Home(owner, app, worker, superuser)


async def execute(url: str, statement: str) -> None:
    """Run one statement outside of any transaction."""
    async with connected(url) as connection:
        await connection.execute(statement)


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    postgres = EmbeddedPostgres(tmp_path_factory.mktemp("postgres"))
    try:
        with postgres:
            yield postgres
    finally:
        # Root's is outside the temporary directory.
        shutil.rmtree(postgres.home)


@pytest.fixture(scope="session")
def cluster(postgres: EmbeddedPostgres) -> Cluster:
    for setting in CARELESS:
        asyncio.run(execute(postgres.superuser_url, f"ALTER SYSTEM SET {setting}"))
    postgres.stop()
    postgres.start()
    asyncio.run(migrate(postgres.url, app_password=APP_PASSWORD, worker_password=WORKER_PASSWORD))
    cluster = Cluster(postgres)
    asyncio.run(cluster.look())
    return cluster


@pytest.fixture
async def home(cluster: Cluster) -> AsyncIterator[Home]:
    home = await cluster.make_migrated()
    yield home
    await cluster.give_back(home)


@pytest.fixture
async def database(home: Home) -> AsyncIterator[Database]:
    database = Database(app_url=home.app_url, worker_url=home.worker_url, pool_size=5)
    yield database
    await database.close()
