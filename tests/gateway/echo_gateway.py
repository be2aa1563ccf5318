"""The whole gateway on a real socket, with an engine that answers each prompt with itself."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from adapters.store import ArtifactStore
from adapters.text_bundle import TextBundle
from gateway import tenants
from gateway.app import create_app
from gateway.auth import create_key
from gateway.database import Database
from gateway.settings import Settings
from tests.conftest import Home
from tests.engine.echo_engine import INFO, EchoCore, Engine, short_folder
from tests.gateway.admin_plane import serve

PEPPER = b"\x07" * 32
MODEL = INFO.base_model
# Nano-USD of one token, in or out.
TOKEN_NANO = 1000


@dataclass(frozen=True)
class EchoGateway:
    """A running gateway, its engine's core, and keys for both planes."""

    url: str
    core: EchoCore
    database: Database
    # Speaks with the operator's key, and with an owner's of the tenant acme.
    operator: httpx.AsyncClient
    client: httpx.AsyncClient

    async def key(self, **fields: Any) -> httpx.AsyncClient:
        """A client with another key of acme."""
        answer = await self.operator.post(
            "/admin/v1/tenants/acme/keys", json={"name": "other", **fields}
        )
        assert answer.status_code == 201, answer.text
        return speaking(self.url, answer.json()["key"])

    async def limit(self, **ceilings: int) -> None:
        answer = await self.operator.put("/admin/v1/tenants/acme/limits", json=ceilings)
        assert answer.status_code == 200, answer.text

    async def budget(self, cap_nano: int, **fields: Any) -> None:
        answer = await self.operator.post(
            "/admin/v1/tenants/acme/budgets", json={"cap_nano": cap_nano, **fields}
        )
        assert answer.status_code == 201, answer.text


def speaking(url: str, key: str) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=30, trust_env=False)


def word_bundle() -> TextBundle:
    """Each word `w7` is the token 7."""
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(1000)}, "w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return TextBundle(
        tokenizer_json=tokenizer.to_str().encode(),
        chat_template="{% for message in messages %}{{ message.content }} {% endfor %}",
        special_tokens={},
        eos_token_ids=(999,),
        generation_defaults={},
        context_length=INFO.max_model_len,
        vocab_size=INFO.vocab_size,
    )


@contextlib.asynccontextmanager
async def echo_gateway(home: Home, folder: Path) -> AsyncIterator[EchoGateway]:
    """The gateway with the tenant acme and a price for its one model."""
    store_url = (folder / "store").as_uri()
    bundle_digest = await ArtifactStore(store_url).put_bundle(word_bundle())
    info = msgspec.structs.replace(INFO, text_bundle_digest=bundle_digest)
    database = Database(app_url=home.app_url, worker_url=home.worker_url)
    async with short_folder() as sockets:
        engine = Engine(sockets / "engine", info=info, secret="s")
        app = create_app(_settings(home, folder, engine.address, store_url))
        async with engine.serve(), serve(app) as url:
            operator, owner = await _make_keys(database)
            async with speaking(url, operator) as operating, speaking(url, owner) as owning:
                await _wait_until_priced(operating)
                yield EchoGateway(url, engine.core, database, operating, owning)
    await database.close()


def _settings(home: Home, folder: Path, engine_address: str, store_url: str) -> Settings:
    return Settings(
        database_app_url=home.app_url,
        database_worker_url=home.worker_url,
        engine_address=engine_address,
        engine_secret="s",
        peppers={1: PEPPER},
        store_url=store_url,
        data_dir=folder,
        host="127.0.0.1",
        port=0,
        max_upload_bytes=1 << 20,
    )


async def _make_keys(database: Database) -> tuple[str, str]:
    async with database.as_worker() as session:
        acme = await tenants.create_tenant(session, slug="acme", name="Acme")
        plain = []
        for tenant_id, role in ((None, None), (acme.id, "owner")):
            _, key = await create_key(
                session,
                tenant_id=tenant_id,
                name="first",
                scopes=None,
                role=role,
                expires_at=None,
                pepper=PEPPER,
            )
            plain.append(key)
    return plain[0], plain[1]


async def _wait_until_priced(operator: httpx.AsyncClient) -> None:
    price = {
        "base_model": MODEL,
        "input_nano_per_million": TOKEN_NANO * 1_000_000,
        "output_nano_per_million": TOKEN_NANO * 1_000_000,
    }
    # The engine's base model is registered as soon as the gateway has found it.
    while (await operator.get("/health/ready")).status_code != 200 or (  # noqa: ASYNC110 - polled
        await operator.post("/admin/v1/prices", json=price)
    ).status_code != 201:
        await asyncio.sleep(0.05)
