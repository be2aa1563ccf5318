"""Fixtures that every level shares: a real PostgreSQL, and a migrated database of each test's own.

postgres   the server, once a session
cluster    on it, and once a session too: what makes databases by copying a migrated one
home       a migrated database for one test: the URLs of its roles
database   the same, opened as `gateway.database.Database`
"""

import asyncio
import itertools
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import asyncpg
import pytest
from sqlalchemy import make_url
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from gateway.database import Database, migrate, role_urls
from gateway.embedded import EmbeddedPostgres

# Read when Triton is imported: kernels for GPUs are interpreted here, on a CPU's tensors.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Groups of tests that take a minute or more.
LONGEST = ("tests/end_to_end", "tests/crash/test_tokens_survive.py")


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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """Where several processes share the tests, each takes one group after the other, in order."""
    config.option.loadscopereorder = False
    return Groups(config, log)


class Groups(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid)


def _group(nodeid: str) -> str:
    """What shares a server or a model is run by one process: a file, or a folder with one demo."""
    path = nodeid.partition("::")[0]
    return "tests/end_to_end" if path.startswith("tests/end_to_end/") else path


def _rank(group: str) -> int:
    return LONGEST.index(group) if group in LONGEST else len(LONGEST)


APP_PASSWORD, WORKER_PASSWORD = "app's own", "worker's own"


@dataclass(frozen=True, slots=True)
class Home:
    """The URLs of one database."""

    owner_url: str
    app_url: str
    worker_url: str
    superuser_url: str


class Cluster:
    """Makes databases; a copy of the migrated one costs some 30 ms."""

    def __init__(self, postgres: EmbeddedPostgres) -> None:
        self._postgres = postgres
        self._numbers = itertools.count(1)
        # Copies keep the roles of what they are copied from.
        self._app_url, self._worker_url = role_urls(
            postgres.url, app_password=APP_PASSWORD, worker_password=WORKER_PASSWORD
        )

    async def make_migrated(self) -> Home:
        name = f"test_{next(self._numbers)}"
        await self.execute(f"CREATE DATABASE {name} TEMPLATE manylora OWNER manylora_owner")
        return self.home(name)

    async def make_empty(self, name: str) -> Home:
        await self.execute(f"CREATE DATABASE {name} OWNER manylora_owner")
        return self.home(name)

    async def drop(self, home: Home) -> None:
        await self.execute(f"DROP DATABASE {make_url(home.owner_url).database} WITH (FORCE)")

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
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        await connection.execute(statement)
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
    # Nobody needs these data after a power cut.
    for setting in ("fsync = off", "full_page_writes = off"):
        asyncio.run(execute(postgres.superuser_url, f"ALTER SYSTEM SET {setting}"))
    asyncio.run(execute(postgres.superuser_url, "SELECT pg_reload_conf()"))
    asyncio.run(migrate(postgres.url, app_password=APP_PASSWORD, worker_password=WORKER_PASSWORD))
    return Cluster(postgres)


@pytest.fixture
async def home(cluster: Cluster) -> AsyncIterator[Home]:
    home = await cluster.make_migrated()
    yield home
    await cluster.drop(home)


@pytest.fixture
async def database(home: Home) -> AsyncIterator[Database]:
    database = Database(app_url=home.app_url, worker_url=home.worker_url, pool_size=5)
    yield database
    await database.close()
