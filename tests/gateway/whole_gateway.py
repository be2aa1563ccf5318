"""A whole gateway on real sockets: its own PostgreSQL, a real tokenizer, and an engine that echoes.

The engine answers each prompt with itself, one token a step, as fast as the test allows.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
from sqlalchemy import select

from adapters.demo.base_model import default_folder
from adapters.store import ArtifactStore
from adapters.text_bundle import TextBundle
from gateway.app import create_app
from gateway.auth import create_key
from gateway.billing.verify import Mismatch, prove
from gateway.database import Database
from gateway.settings import Settings
from gateway.tables import UsageEvent
from tests.conftest import Home
from tests.engine.echo_engine import INFO, EchoCore, Engine
from tests.gateway.admin_plane import serve

PEPPER = b"\x06" * 32
PATIENCE_S = 30
RATES = {"input_nano_per_million": 150_000_001, "output_nano_per_million": 600_000_007}


@dataclass(frozen=True)
class Gateway:
    """A running gateway, a tenant of it, and all that one may look at behind it."""

    # Speaks with the key of the tenant `acme`.
    client: httpx.AsyncClient
    operator: httpx.AsyncClient
    database: Database
    core: EchoCore

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
        "model": "echo",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 8,
        "ignore_eos": True,
        **fields,
    }


@contextlib.asynccontextmanager
async def whole_gateway(
    home: Home, database: Database, folder: Path, **settings: Any
) -> AsyncIterator[Gateway]:
    store = ArtifactStore((folder / "store").as_uri())
    info = msgspec.structs.replace(INFO, text_bundle_digest=await store.put_bundle(_bundle()))
    core = EchoCore()
    engine = Engine(folder / "engine.sock", core=core, secret="the-engines-own", info=info)
    app = create_app(_settings(home, engine, folder, **settings))
    async with (
        engine.serve(),
        serve(app) as url,
        _client(url) as client,
        _client(url) as operator,
    ):
        await _sign_in(database, operator, client)
        yield Gateway(client, operator, database, core)


def _bundle() -> TextBundle:
    return TextBundle(
        tokenizer_json=(default_folder() / "tokenizer.json").read_bytes(),
        chat_template="{% for each in messages %}{{ each.content }}{% endfor %}",
        special_tokens={},
        eos_token_ids=(2,),
        generation_defaults={},
        context_length=INFO.max_model_len,
        vocab_size=49152,
    )


def _settings(home: Home, engine: Engine, folder: Path, **settings: Any) -> Settings:
    made = Settings(
        database_app_url=home.app_url,
        database_worker_url=home.worker_url,
        engine_address=engine.address,
        engine_secret="the-engines-own",
        pepper=PEPPER,
        store_url=(folder / "store").as_uri(),
        data_dir=folder,
        host="127.0.0.1",
        port=0,
        max_upload_bytes=1 << 20,
    )
    return replace(made, **settings)


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False)


async def _sign_in(
    database: Database, operator: httpx.AsyncClient, client: httpx.AsyncClient
) -> None:
    async with database.as_worker() as session:
        _, key = await create_key(
            session, tenant_id=None, name="operator", scopes=None, expires_at=None, pepper=PEPPER
        )
    operator.headers["authorization"] = f"Bearer {key}"
    async with asyncio.timeout(PATIENCE_S):
        while not (await operator.get("/health/ready")).is_success:  # noqa: ASYNC110 - a server
            await asyncio.sleep(0.02)
    for path, body in (
        ("/admin/v1/tenants", {"slug": "acme"}),
        ("/admin/v1/prices", {"base_model": "echo", **RATES}),
    ):
        answer = await operator.post(path, json=body)
        assert answer.status_code == httpx.codes.CREATED, answer.text
    made = await operator.post("/admin/v1/tenants/acme/keys", json={"name": "first"})
    client.headers["authorization"] = f"Bearer {made.json()['key']}"
