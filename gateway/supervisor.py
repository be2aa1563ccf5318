"""Keep one host's processes alive: the embedded database, engines, a gateway.

Starts them in order, restarts what dies, ends everything together. Each child dies with this
process, whatever ends it. Knows nothing of requests.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from gateway.addresses import Network
from gateway.children import CannotServe, Child
from gateway.engine_room import EngineRoom, ServedModel
from gateway.private_files import write_private
from gateway.settings import MAX_FILE_BYTES_PER_TENANT, MEBIBYTE, PURGE_AFTER_DAYS, Settings

if TYPE_CHECKING:
    from gateway.embedded import EmbeddedPostgres

POLL_INTERVAL_S = 0.1
# What is done once requests are answered.
Ready = Callable[[], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `manylora serve` was told."""

    # At least one, each with a name of its own.
    models: tuple[ServedModel, ...]
    host: str
    port: int
    data_dir: Path
    # The owner's URL; None runs the embedded PostgreSQL.
    database_url: str | None
    # None keeps adapters under the data directory.
    store_url: str | None
    # For engines of models that the command line does not name: as they take them.
    engine_flags: tuple[str, ...] = ()
    # Below which operators may have models served that lie there; None for nowhere.
    model_folder: Path | None = None
    max_upload_bytes: int = 1024 * MEBIBYTE
    purge_after_days: int = PURGE_AFTER_DAYS
    # None for no limit.
    max_adapters_per_tenant: int | None = None
    max_adapter_bytes_per_tenant: int | None = None
    max_file_bytes_per_tenant: int = MAX_FILE_BYTES_PER_TENANT
    # What adapters may be loaded from by path.
    lora_folder: Path | None = None
    trusted_proxies: tuple[Network, ...] = ()
    webhook_networks: tuple[Network, ...] = ()
    # Back to a tenant in a day, for streams that were left and asked for again.
    max_retry_credit_nano: int = 0
    # Instead of refusing them.
    reports_unknown_fields: bool = False
    # How models call functions; None leaves it to their chat templates.
    tool_call_parser: str | None = None


@dataclass(frozen=True, slots=True)
class Secrets:
    """Made once for an installation and kept in its data directory."""

    pepper: str
    engine_secret: str
    app_password: str
    worker_password: str

    @classmethod
    def of(cls, path: Path) -> "Secrets":
        """Read the secrets, making them at the first start."""
        if not path.exists():
            made = cls(*(secrets.token_hex(32) for _ in range(4)))
            write_private(path, json.dumps(asdict(made)))
        return cls(**json.loads(path.read_text()))


def store_url_of(data_dir: Path) -> str:
    """Where adapters are kept by default."""
    return (data_dir / "store").absolute().as_uri()


class Supervisor:
    """The processes of one host. `say` tells the operator what is being done."""

    def __init__(self, options: ServeOptions, *, say: Callable[[str], None]) -> None:
        self._options = options
        self._say = say
        self._stopping = asyncio.Event()
        self._postgres: EmbeddedPostgres | None = None
        self._operator_key_path = options.data_dir / "operator.key"

    @property
    def operator_key(self) -> str:
        """The operator's key of this installation, once `run` is past its start."""
        return self._operator_key_path.read_text().strip()

    async def run(self, on_ready: Ready) -> None:
        """Serve until a signal comes; `on_ready` is called once requests are answered.

        Raises CannotServe or DatabaseRefused with a message for the operator.
        """
        options = self._options
        options.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stopping.set)
        with _locked(options.data_dir / "lock"), contextlib.ExitStack() as stack:
            _check_port(options.host, options.port)
            runtime_dir = _runtime_dir(options.data_dir)
            keys = Secrets.of(options.data_dir / "secrets.json")
            room = self._engine_room(keys, runtime_dir)
            async with room.answering(), asyncio.TaskGroup() as tasks:
                room.start(tasks)
                # They load while the rest comes up, of which they need nothing.
                await asyncio.sleep(0)
                try:
                    settings = await self._prepare(stack, keys, room)
                    if not self._stopping.is_set():
                        await self._serve(settings, room, tasks, on_ready)
                finally:
                    self._stopping.set()
                    await room.stop()
            self._say("stopped")

    def stop(self) -> None:
        self._stopping.set()

    def _start_postgres(self, stack: contextlib.ExitStack) -> str:
        self._say("database: starting the embedded PostgreSQL")
        # As in `_prepare`.
        from gateway.embedded import EmbeddedPostgres

        self._postgres = EmbeddedPostgres(self._options.data_dir)
        self._postgres.start()
        stack.callback(self._postgres.stop)
        return self._postgres.url

    def _engine_room(self, keys: Secrets, runtime_dir: Path) -> EngineRoom:
        options = self._options
        return EngineRoom(
            options.models,
            engine_flags=options.engine_flags,
            model_folder=options.model_folder,
            runtime_dir=runtime_dir,
            data_dir=options.data_dir.absolute(),
            store_url=options.store_url or store_url_of(options.data_dir),
            secret=keys.engine_secret,
            say=self._say,
            is_ending=self._stopping.is_set,
        )

    async def _prepare(
        self, stack: contextlib.ExitStack, keys: Secrets, room: EngineRoom
    ) -> Settings:
        # Not at the top: engines start before all this is imported.
        from gateway.auth import PEPPER_VERSION
        from gateway.database import role_urls
        from gateway.preparation import prepare

        options = self._options
        owner_url = options.database_url or self._start_postgres(stack)
        passwords = {"app_password": keys.app_password, "worker_password": keys.worker_password}
        app_url, worker_url = role_urls(owner_url, **passwords)
        settings = Settings(
            database_app_url=app_url,
            database_worker_url=worker_url,
            engine_addresses=tuple(room.planned),
            supervisor_socket=room.socket_path,
            engine_secret=keys.engine_secret,
            peppers={PEPPER_VERSION: bytes.fromhex(keys.pepper)},
            store_url=options.store_url or store_url_of(options.data_dir),
            data_dir=options.data_dir.absolute(),
            host=options.host,
            port=options.port,
            max_upload_bytes=options.max_upload_bytes,
            purge_after_days=options.purge_after_days,
            max_adapters_per_tenant=options.max_adapters_per_tenant,
            max_adapter_bytes_per_tenant=options.max_adapter_bytes_per_tenant,
            max_file_bytes_per_tenant=options.max_file_bytes_per_tenant,
            lora_folder=options.lora_folder,
            trusted_proxies=options.trusted_proxies,
            webhook_networks=options.webhook_networks,
            max_retry_credit_nano=options.max_retry_credit_nano,
            reports_unknown_fields=options.reports_unknown_fields,
            tool_call_parser=options.tool_call_parser,
            parent_pid=os.getpid(),
        )
        self._say("database: migrating")
        await prepare(
            owner_url,
            settings,
            **passwords,
            addresses_begin=room.addresses_begin,
            names={address: model.name for address, model in room.planned.items()},
            operator_key_path=self._operator_key_path,
        )
        return settings

    async def _serve(
        self, settings: Settings, room: EngineRoom, tasks: asyncio.TaskGroup, on_ready: Ready
    ) -> None:
        gateway = Child(
            "gateway",
            [sys.executable, "-m", "gateway"],
            settings.to_environment(),
            say=self._say,
            is_ending=self._stopping.is_set,
        )
        url = f"http://{reachable(settings.host)}:{settings.port}"
        keepers = [
            tasks.create_task(gateway.keep()),
            tasks.create_task(self._watch_postgres()),
        ]
        try:
            if await self._answers(url, room):
                await self._unless_stopped(on_ready())
                await self._stopping.wait()
        finally:
            self._stopping.set()
            self._say("stopping")
            # Before the engines: it finishes its streams while they still answer.
            await gateway.stop()
            for keeper in keepers:
                keeper.cancel()

    async def _watch_postgres(self) -> None:
        while self._postgres is not None:
            await asyncio.sleep(1)
            if not self._stopping.is_set() and not self._postgres.is_running:
                self._say("database: the embedded PostgreSQL died; starting it again")
                self._postgres.stop()
                await asyncio.to_thread(self._postgres.start)

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Finish the work, or drop it when told to stop."""
        working = asyncio.create_task(work)
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if working.done():
            working.result()
        working.cancel()

    async def _answers(self, url: str, room: EngineRoom) -> bool:
        """Wait until the gateway answers, for every model; False when told to stop before."""
        headers = {"authorization": f"Bearer {self.operator_key}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False) as client:
            while not self._stopping.is_set():
                with contextlib.suppress(httpx.HTTPError):
                    if await _is_whole(client, room.expected):
                        return True
                await asyncio.sleep(POLL_INTERVAL_S)
        return False


async def _is_whole(client: httpx.AsyncClient, addresses: set[str]) -> bool:
    if not (await client.get("/health/ready")).is_success:
        return False
    if len(addresses) == 1:
        return True
    answer = await client.get("/admin/v1/engines")
    engines = answer.json()["data"] if answer.is_success else []
    return addresses <= {engine["address"] for engine in engines if engine["is_connected"]}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the data directory. Raises CannotServe naming the process that holds it already."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise CannotServe(
                f"{path.parent} is in use by process {holder}: stop it, or give another --data-dir"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _check_port(host: str, port: int) -> None:
    """Raises CannotServe when the port is taken, before anything is started."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CannotServe(
                f"cannot listen on {host}:{port}: {error.strerror}; give another --host or --port"
            ) from None


def reachable(host: str) -> str:
    """Where one who is on this host finds what listens there."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104 (compared only)


def _runtime_dir(data_dir: Path) -> Path:
    """A private folder with a short name, because socket paths end at 107 bytes."""
    name = hashlib.sha256(str(data_dir.absolute()).encode()).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"manylora-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise CannotServe(f"{folder} is not a private folder of this user: remove it")
    return folder
