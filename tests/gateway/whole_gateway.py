"""A whole gateway on a real socket: its own PostgreSQL, and an engine that echoes.

The engine answers each prompt with itself, one token a step, as fast as the test allows. Each word
`w7` is the token 7, so a test can count what it asks for.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
from litestar import Litestar
from sqlalchemy import select
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from adapters.store import ArtifactStore
from adapters.text_bundle import TextBundle
from gateway.app import PartsAtHand, build, lay_out
from gateway.auth import create_key
from gateway.billing.verify import Mismatch, prove
from gateway.database import Database
from gateway.settings import PURGE_AFTER_DAYS, Settings
from gateway.tables import UsageEvent
from tests.conftest import Home
from tests.engine.echo_engine import INFO, EchoCore, Engine, short_folder
from tests.gateway.admin_plane import serve, tls

PEPPER = b"\x06" * 32
SECRET = "the-engines-own"
PATIENCE_S = 120
MODEL = INFO.base_model
# Nano-USD of one token, in or out.
TOKEN_NANO = 1000


@dataclass(frozen=True)
class Gateway:
    """A running gateway, a tenant of it, and all that one may look at behind it."""

    url: str
    # Speaks with an owner's key of the tenant `acme`.
    client: httpx.AsyncClient
    operator: httpx.AsyncClient
    database: Database
    core: EchoCore
    app: Litestar

    async def key(self, **fields: Any) -> httpx.AsyncClient:
        """A client with another key of acme."""
        answer = await self.operator.post(
            "/admin/v1/tenants/acme/keys", json={"name": "other", **fields}
        )
        assert answer.status_code == httpx.codes.CREATED, answer.text
        return speaking(self.url, answer.json()["key"])

    async def limit(self, **ceilings: int) -> None:
        answer = await self.operator.put("/admin/v1/tenants/acme/limits", json=ceilings)
        assert answer.status_code == httpx.codes.OK, answer.text

    async def budget(self, cap_nano: int, **fields: Any) -> None:
        answer = await self.operator.post(
            "/admin/v1/tenants/acme/budgets", json={"cap_nano": cap_nano, **fields}
        )
        assert answer.status_code == httpx.codes.CREATED, answer.text

    async def events(self, number: int) -> list[UsageEvent]:
        """All usage events, once there are so many."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                async with self.database.as_worker() as session:
                    query = select(UsageEvent).order_by(UsageEvent.id)
                    found = list((await session.scalars(query)).all())
                if len(found) >= number:
                    return found
                await asyncio.sleep(0.02)

    async def differences(self) -> list[Mismatch]:
        return (await prove(self.database)).mismatches


def chat(text: str = "Hello", **fields: Any) -> dict[str, Any]:
    """A request whose answer is as long as `max_tokens` says."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 8,
        "ignore_eos": True,
        **fields,
    }


def speaking(url: str, key: str) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.AsyncClient(
        base_url=url, headers=headers, timeout=PATIENCE_S, trust_env=False, verify=tls()
    )


@contextlib.asynccontextmanager
async def whole_gateway(
    home: Home,
    database: Database,
    folder: Path,
    *,
    core: EchoCore | None = None,
    bundle: TextBundle | None = None,
    **settings: Any,
) -> AsyncIterator[Gateway]:
    """The gateway with the tenant acme and a price for its one model."""
    store = ArtifactStore((folder / "store").as_uri())
    info = msgspec.structs.replace(
        INFO, text_bundle_digest=await store.put_bundle(bundle or _bundle())
    )
    core = core or EchoCore()
    async with short_folder() as sockets:
        engine = Engine(sockets / "engine", core=core, secret=SECRET, info=info)
        async with (
            engine.serve(),
            _app(_settings(home, engine, folder, **settings)) as app,
            serve(app) as url,
            speaking(url, await _operator_key(database)) as operator,
            speaking(url, await _open_shop(operator)) as client,
        ):
            yield Gateway(url, client, operator, database, core, app)


@contextlib.asynccontextmanager
async def another_engine(
    gateway: Gateway, *, core: EchoCore | None = None, **changes: Any
) -> AsyncIterator[Engine]:
    """An engine that runs, speaks the same words, and that nobody has told the gateway of."""
    known = (await gateway.operator.get("/admin/v1/base-models")).json()["data"]
    info = msgspec.structs.replace(
        INFO,
        text_bundle_digest=known[0]["text_bundle_digest"],
        engine_epoch=time.time_ns(),
        **changes,
    )
    shape = msgspec.structs.replace(info.base_shape, base_model=info.base_model)
    info = msgspec.structs.replace(info, base_shape=shape)
    async with (
        short_folder() as sockets,
        Engine(
            sockets / "engine", core=core or EchoCore(), secret=SECRET, info=info
        ).serve() as engine,
    ):
        yield engine


# Apps that no test uses now, by what their routes depend on: laying one out takes long.
_IDLE: dict[bool, list[tuple[Litestar, PartsAtHand]]] = {False: [], True: []}


@contextlib.asynccontextmanager
async def _app(settings: Settings) -> AsyncIterator[Litestar]:
    parts, idle = build(settings), _IDLE[settings.reports_unknown_fields]
    if idle:
        app, at_hand = idle.pop()
        at_hand.fill(parts)
    else:
        at_hand = PartsAtHand(parts)
        app = lay_out(at_hand)
    yield app
    # After a failure nobody knows in what state it is.
    idle.append((app, at_hand))


def _bundle() -> TextBundle:
    words = {f"w{number}": number for number in range(1000)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return TextBundle(
        tokenizer_json=tokenizer.to_str().encode(),
        chat_template="{% for each in messages %}{{ each.content }} {% endfor %}",
        special_tokens={},
        eos_token_ids=(999,),
        generation_defaults={},
        context_length=INFO.max_model_len,
        vocab_size=INFO.vocab_size,
    )


def _settings(home: Home, engine: Engine, folder: Path, **settings: Any) -> Settings:
    made = Settings(
        database_app_url=home.app_url,
        database_worker_url=home.worker_url,
        engine_addresses=(engine.address,),
        engine_secret=SECRET,
        peppers={1: PEPPER},
        store_url=(folder / "store").as_uri(),
        data_dir=folder,
        host="127.0.0.1",
        port=0,
        max_upload_bytes=1 << 20,
        purge_after_days=PURGE_AFTER_DAYS,
    )
    return replace(made, **settings)


async def _operator_key(database: Database) -> str:
    async with database.as_worker() as session:
        _, key = await create_key(
            session, tenant_id=None, name="operator", scopes=None, expires_at=None, pepper=PEPPER
        )
    return key


async def _is_ready(client: httpx.AsyncClient) -> bool:
    # One in a process of its own may not listen yet.
    with contextlib.suppress(httpx.ConnectError):
        return (await client.get("/health/ready")).is_success
    return False


async def _open_shop(operator: httpx.AsyncClient) -> str:
    """Wait for the model, and make what selling it takes; return an owner's key."""
    async with asyncio.timeout(PATIENCE_S):
        while not await _is_ready(operator):  # noqa: ASYNC110 - a server
            await asyncio.sleep(0.02)
    rate = TOKEN_NANO * 1_000_000
    price = {"base_model": MODEL, "input_nano_per_million": rate, "output_nano_per_million": rate}
    for path, body in (
        ("/admin/v1/tenants", {"slug": "acme"}),
        ("/admin/v1/prices", price),
        ("/admin/v1/tenants/acme/keys", {"name": "first", "role": "owner"}),
    ):
        answer = await operator.post(path, json=body)
        assert answer.status_code == httpx.codes.CREATED, answer.text
    key: str = answer.json()["key"]
    return key


@dataclass(frozen=True)
class GatewayProcess:
    """A gateway in a process of its own, to be looked at from outside."""

    pid: int
    url: str
    # The tenant acme's, of an owner.
    key: str
    operator: httpx.AsyncClient
    core: EchoCore


@contextlib.asynccontextmanager
async def gateway_process(
    home: Home,
    database: Database,
    folder: Path,
    *,
    module: str,
    environment: dict[str, str],
    context_length: int = INFO.max_model_len,
    **settings: Any,
) -> AsyncIterator[GatewayProcess]:
    """`module` is what runs the gateway, and the engine, an echo, is here."""
    store = ArtifactStore((folder / "store").as_uri())
    bundle = msgspec.structs.replace(_bundle(), context_length=context_length)
    info = msgspec.structs.replace(
        INFO, text_bundle_digest=await store.put_bundle(bundle), max_model_len=context_length
    )
    async with short_folder() as sockets:
        engine = Engine(sockets / "engine", core=EchoCore(), secret=SECRET, info=info)
        own = _settings(home, engine, folder, port=free_port(), **settings)
        url = f"http://{own.host}:{own.port}"
        async with (
            engine.serve(),
            _running(module, own.to_environment() | environment, folder / "log") as process,
            speaking(url, await _operator_key(database)) as operator,
        ):
            key = await _open_shop(operator)
            yield GatewayProcess(process.pid, url, key, operator, engine.core)
            process.terminate()
            # uvicorn ends, when it has ended everything, as the signal would have ended it.
            status = await process.wait()
            log = await asyncio.to_thread((folder / "log").read_text)
            assert status == -signal.SIGTERM, log
            assert "Traceback" not in log


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def _running(
    module: str, environment: dict[str, str], log: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module),
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
