"""An installation whose processes are killed and come back: PostgreSQL, an engine, two gateways.

Every process is a real one and speaks over its real sockets. Who dies is started again at once, as
a supervisor would. Knows how to kill, and nothing of what must be true afterwards.
"""

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
from uvicorn.main import STARTUP_FAILURE

from gateway.auth import create_key
from gateway.database import Database, migrate, role_urls
from gateway.embedded import EmbeddedPostgres
from gateway.errors import PostgresFailed
from gateway.settings import PURGE_AFTER_DAYS, Settings
from tests.conftest import APP_PASSWORD, WORKER_PASSWORD, execute
from tests.crash.journals import Archive
from tests.engine.echo_engine import short_folder

PEPPER = b"\x06" * 32
SECRET = "between-gateway-and-engine"
START_S = 240
# What retries may give back in a day.
MAX_RETRY_CREDIT_NANO = 10**9
NUM_GATEWAYS = 2
T = TypeVar("T")


class Victim:
    """One process that is started again whenever it ends."""

    def __init__(
        self,
        name: str,
        kind: str,
        *,
        log: Path,
        arguments: list[str],
        environment: dict[str, str],
        on_end: Callable[[], None],
    ) -> None:
        self.name = name
        self.log = log
        self._kind = kind
        self._life = {"log": str(log), "arguments": arguments, "environment": environment}
        self._on_end = on_end
        self._pid: int | None = None
        self._is_stopping = False
        self._nursery: asyncio.subprocess.Process

    async def open(self) -> None:
        self._nursery = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.crash.nursery", self._kind),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert await self._hear() == ["born"]

    async def keep(self) -> None:
        while not self._is_stopping:
            assert self._nursery.stdin is not None
            self._nursery.stdin.write(f"{json.dumps(self._life)}\n".encode())
            said, pid = await self._hear()
            assert said == "lives"
            self._pid = int(pid)
            _, status = await self._hear()
            self._pid = None
            self._on_end()
            expected = (-signal.SIGKILL, -signal.SIGTERM if self._is_stopping else STARTUP_FAILURE)
            assert int(status) in expected, f"{self.name} ended with {status}; see {self.log}"
            if int(status) == STARTUP_FAILURE:
                # Without a database there is no gateway.
                await asyncio.sleep(0.1)

    @property
    def is_alive(self) -> bool:
        return self._pid is not None

    def kill(self) -> bool:
        """Whether there was somebody to kill."""
        pid, self._pid = self._pid, None
        return _kill_one(pid)

    def end(self) -> None:
        """Ask it to end, for good."""
        self._is_stopping = True
        if self._pid is not None:
            os.kill(self._pid, signal.SIGTERM)

    async def close(self) -> None:
        assert self._nursery.stdin is not None
        self._nursery.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            self._nursery.kill()
        await self._nursery.wait()

    async def _hear(self) -> list[str]:
        assert self._nursery.stdout is not None
        line = await self._nursery.stdout.readline()
        assert line, f"the nursery of {self.name} is gone"
        return line.decode().split()


@dataclass
class Town:
    settings: Settings
    postgres: EmbeddedPostgres
    engine: Victim
    gateways: list[Victim]
    urls: list[str]
    database: Database
    archive: Archive
    trace: Path
    operator_key: str
    kills: Counter[str] = field(default_factory=Counter)
    # Filled once it runs.
    life: asyncio.Task[None] | None = None

    @property
    def journals(self) -> Path:
        return self.settings.data_dir / "journal"

    @property
    def logs(self) -> list[Path]:
        return [self.engine.log, *(gateway.log for gateway in self.gateways)]

    def operator(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.urls[0],
            headers={"authorization": f"Bearer {self.operator_key}"},
            timeout=30,
            trust_env=False,
        )

    async def are_ready(self) -> None:
        """Wait until everything is there."""
        async with asyncio.timeout(START_S), httpx.AsyncClient(trust_env=False) as http:
            for url in self.urls:
                while not await _is_ready(http, url):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.05)

    def kill(self, whom: str, dice: random.Random) -> None:
        match whom:
            case "gateway":
                is_hit = dice.choice(self.gateways).kill()
            case "engine":
                is_hit = self.engine.kill()
            case "postgres":
                is_hit = _kill_one(_postmaster(self.postgres))
            case "backend":
                children = _children_of(_postmaster(self.postgres))
                is_hit = _kill_one(dice.choice(children) if children else None)
            case _:
                raise AssertionError(whom)
        self.kills[whom] += is_hit

    async def keep_postgres(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            if not self.postgres.is_running:
                # It may be killed again while it starts.
                with contextlib.suppress(PostgresFailed):
                    await asyncio.to_thread(self.postgres.start)

    async def keep_journals(self) -> None:
        while True:
            self.archive.keep()
            await asyncio.sleep(0.02)

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        """Do the work while the town lives; raises what ended the town."""
        assert self.life is not None
        working = asyncio.create_task(work)
        await asyncio.wait({working, self.life}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            self.life.result()
        return await working

    async def live(self) -> None:
        """Keep everything alive until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.keep_postgres())
            tasks.create_task(self.keep_journals())
            for victim in (self.engine, *self.gateways):
                tasks.create_task(victim.keep())

    async def end_gateways(self) -> None:
        """Stop them politely, and wait until they are gone."""
        for gateway in self.gateways:
            gateway.end()
        async with asyncio.timeout(START_S):
            while any(gateway.is_alive for gateway in self.gateways):  # noqa: ASYNC110 - processes
                await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def town(
    folder: Path, *, engine: str, flags: Callable[[Settings], list[str]]
) -> AsyncIterator[Town]:
    """Everything runs and is ready. `flags` are the engine's, after the path of its trace."""
    postgres = EmbeddedPostgres(folder)
    try:
        with postgres:
            async with short_folder() as sockets:
                built = await _build(postgres, folder, sockets, engine=engine, flags=flags)
                victims = (built.engine, *built.gateways)
                await asyncio.gather(*(victim.open() for victim in victims))
                living = asyncio.create_task(built.live())
                try:
                    built.life = living
                    await built.during(built.are_ready())
                    yield built
                finally:
                    living.cancel()
                    await asyncio.gather(living, return_exceptions=True)
                    for victim in victims:
                        await victim.close()
                    await built.database.close()
    finally:
        shutil.rmtree(postgres.home, ignore_errors=True)


async def _build(
    postgres: EmbeddedPostgres,
    folder: Path,
    sockets: Path,
    *,
    engine: str,
    flags: Callable[[Settings], list[str]],
) -> Town:
    passwords = {"app_password": APP_PASSWORD, "worker_password": WORKER_PASSWORD}
    # A kill takes what a process had in its memory, not what the kernel has: no disk is waited for.
    for setting in ("fsync = off", "full_page_writes = off"):
        await execute(postgres.superuser_url, f"ALTER SYSTEM SET {setting}")
    await execute(postgres.superuser_url, "SELECT pg_reload_conf()")
    await migrate(postgres.url, **passwords)
    app_url, worker_url = role_urls(postgres.url, **passwords)
    database = Database(app_url=app_url, worker_url=worker_url, pool_size=5)
    async with database.as_worker() as session:
        _, operator_key = await create_key(
            session, tenant_id=None, name="operator", scopes=None, expires_at=None, pepper=PEPPER
        )
    settings = [
        Settings(
            database_app_url=app_url,
            database_worker_url=worker_url,
            engine_addresses=(f"unix:{sockets / 'engine'}",),
            engine_secret=SECRET,
            peppers={1: PEPPER},
            store_url=(folder / "store").as_uri(),
            data_dir=folder,
            host="127.0.0.1",
            port=free_port(),
            max_upload_bytes=1 << 20,
            purge_after_days=PURGE_AFTER_DAYS,
            max_retry_credit_nano=MAX_RETRY_CREDIT_NANO,
        )
        for _ in range(NUM_GATEWAYS)
    ]
    archive = Archive(folder / "journal", folder / "archive")
    trace = folder / "trace"
    return Town(
        settings=settings[0],
        postgres=postgres,
        engine=Victim(
            "engine",
            engine,
            log=folder / "engine.log",
            arguments=[str(trace), *flags(settings[0])],
            environment={"MANYLORA_ENGINE_SECRET": SECRET},
            on_end=archive.keep,
        ),
        gateways=[
            Victim(
                f"gateway {number}",
                "gateway",
                log=folder / f"gateway-{number}.log",
                arguments=[],
                environment=each.to_environment(),
                on_end=archive.keep,
            )
            for number, each in enumerate(settings)
        ],
        urls=[f"http://{each.host}:{each.port}" for each in settings],
        database=database,
        archive=archive,
        trace=trace,
        operator_key=operator_key,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _is_ready(http: httpx.AsyncClient, url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return (await http.get(f"{url}/health/ready")).status_code == httpx.codes.OK
    return False


def _postmaster(postgres: EmbeddedPostgres) -> int | None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int((postgres.home / "data" / "postmaster.pid").read_text().partition("\n")[0])
    return None


def _children_of(pid: int | None) -> list[int]:
    """Backends, and PostgreSQL's own helpers."""
    if pid is None:
        return []
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _kill_one(pid: int | None) -> bool:
    if pid is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False
