"""The admin plane on a real socket and a real database, and adapters small enough to write by hand.

Only the engine's probe is a function of the test: the engine is another process.
"""

import asyncio
import contextlib
import datetime
import functools
import json
import ssl
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from litestar import Litestar
from litestar.di import Provide
from litestar.exceptions import HTTPException
from safetensors.numpy import save

from adapters import text_bundle
from adapters.store import ArtifactStore
from adapters.validate import BaseShape
from engine.client import EngineLink
from engine.protocol import PROTOCOL_VERSION, EngineInfo, ProbeReport
from gateway.aliases import Aliases
from gateway.api.admin import admin_router
from gateway.api.lora import load_lora_adapter, unload_lora_adapter
from gateway.api.wire import answer_error, answer_http_exception, answer_unexpected
from gateway.auth import Authenticator, create_key, guard, provide_principal
from gateway.base_models import BaseModels
from gateway.blobs import Blobs
from gateway.database import Database
from gateway.engines import Engines
from gateway.errors import GatewayError
from gateway.examples import ExampleRunner
from gateway.grants import Grants
from gateway.policies.decisions import Decisions
from gateway.policies.store import Policies
from gateway.quotas import NO_QUOTAS, Quotas
from gateway.registry import Registry
from gateway.residency import Residency
from gateway.resumable import LIFETIME, ResumableUploads
from gateway.retention import Retention
from gateway.routing import Router
from gateway.runtime_loras import RuntimeLoras
from gateway.source_files import SourceFiles
from gateway.staging import Staging
from gateway.templates import Templates
from gateway.text import TextCodecs
from gateway.uploads import Uploads
from gateway.webhooks import Outbox
from tests.text_bombs import small_bundle

MAX_UPLOAD_BYTES = 256 * 1024
# Some uploads use all the processor time that they are given, beside other tests.
PATIENCE_S = 60
PEPPER = b"\x07" * 32
ADDRESS = "unix:/run/engine.sock"

# module path -> (in_features, out_features)
MODULES = {
    f"model.layers.{layer}.self_attn.{name}": shape
    for layer in range(2)
    for name, shape in {"q_proj": (16, 16), "v_proj": (16, 8)}.items()
}
BUNDLE = small_bundle()
BUNDLE_DIGEST = text_bundle.digest(BUNDLE)
INFO = EngineInfo(
    protocol_version=PROTOCOL_VERSION,
    engine_epoch=1,
    base_model="Tiny-Base",
    base_digest="b" * 64,
    text_bundle_digest=BUNDLE_DIGEST,
    max_model_len=512,
    vocab_size=1000,
    max_loras=4,
    max_lora_rank=8,
    device="cpu",
    dtype="float32",
    base_shape=BaseShape(base_model="Tiny-Base", modules=MODULES),
)


def adapter_files(
    *, seed: int = 0, rank: int = 2, modules: dict[str, tuple[int, int]] = MODULES, **config: Any
) -> dict[str, bytes]:
    """An adapter as PEFT would save it: file name -> bytes."""
    random = np.random.default_rng(seed)
    tensors = {}
    for module, (in_features, out_features) in modules.items():
        name = f"base_model.model.{module}"
        for half, shape in {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}.items():
            tensors[f"{name}.{half}.weight"] = random.normal(size=shape).astype(np.float32)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "v_proj"],
        **config,
    }
    return {
        "adapter_config.json": json.dumps(fields).encode(),
        "adapter_model.safetensors": save(tensors),
    }


def report(digest: str, **changes: Any) -> ProbeReport:
    """What an engine says of an adapter that passes, but for `changes`."""
    facts: dict[str, Any] = {
        "weights_digest": digest,
        "num_modules": 4,
        "largest_relative_error": 1e-7,
        "error_bound": 1e-4,
        "logit_shift": 0.5,
        "noise": 1e-5,
        "untouched_modules": [],
        "is_passed": True,
    }
    return ProbeReport(**{**facts, **changes})


async def passing_probe(digest: str) -> ProbeReport:
    return report(digest)


class Probe:
    """Stands where the engine is; `answer` is whatever the test puts there."""

    def __init__(self) -> None:
        self.answer: Callable[[str], Awaitable[ProbeReport]] = passing_probe
        self.asked_for: list[str] = []

    async def __call__(self, base_model_id: uuid.UUID, digest: str) -> ProbeReport:
        self.asked_for.append(digest)
        return await self.answer(digest)


@dataclass(frozen=True)
class Plane:
    """A running admin plane and all that one may look at behind it."""

    app: Litestar
    # Speaks with an operator's key.
    client: httpx.AsyncClient
    database: Database
    registry: Registry
    store: ArtifactStore
    staging: Staging
    residency: Residency
    uploads: Uploads
    resumable: ResumableUploads
    probe: Probe
    folder: Path

    async def make_tenant(self, slug: str) -> None:
        answer = await self.client.post("/admin/v1/tenants", json={"slug": slug, "name": slug})
        assert answer.status_code == 201, answer.text

    async def make_key(self, tenant: str, **fields: Any) -> dict[str, Any]:
        body = {"name": "test", **fields}
        answer = await self.client.post(f"/admin/v1/tenants/{tenant}/keys", json=body)
        assert answer.status_code == 201, answer.text
        made: dict[str, Any] = answer.json()
        return made

    async def upload(
        self,
        files: dict[str, bytes] | None = None,
        *,
        tenant: str = "acme",
        adapter: str = "sql",
        fields: dict[str, str] | None = None,
    ) -> httpx.Response:
        files = adapter_files() if files is None else files
        return await self.client.post(
            f"/admin/v1/tenants/{tenant}/adapters/{adapter}/versions",
            files=[("files", (name, data)) for name, data in files.items()],
            data=fields,
        )

    async def start_anew(self) -> None:
        """What a gateway does that finds an engine after its start."""
        await self.uploads.sweep()
        for entry in await BaseModels(self.database).entries():
            await self.uploads.recover(entry.base_model.id)

    def stored_files(self) -> list[str]:
        """All but the base model's text bundle."""
        files = _files_below(self.folder / "store")
        return [file for file in files if BUNDLE_DIGEST not in file]

    def stored_adapters(self) -> set[str]:
        """The digests of those that engines could load."""
        files = (Path(file) for file in self.stored_files())
        return {file.parent.name for file in files if file.is_relative_to("adapters")}

    def staged_files(self) -> list[str]:
        return _files_below(self.folder / "staging")


@contextlib.asynccontextmanager
async def admin_plane(
    database: Database,
    folder: Path,
    *,
    info: EngineInfo = INFO,
    max_upload_bytes: int = MAX_UPLOAD_BYTES,
    quotas: Quotas = NO_QUOTAS,
    store_url: str | None = None,
    lifetime: datetime.timedelta = LIFETIME,
    router: Router | None = None,
    lora_folder: Path | None = None,
) -> AsyncIterator[Plane]:
    """The plane with one engine's base model registered, and no tenant yet."""
    registry, probe = Registry(database, quotas), Probe()
    engines = router or Router()
    store = ArtifactStore(store_url or (folder / "store").as_uri())
    staging = Staging(folder / "staging", max_upload_bytes=max_upload_bytes)
    blobs = Blobs(database, store)
    templates = Templates()
    uploads = Uploads(
        registry,
        store,
        blobs=blobs,
        staging=staging,
        probe=probe,
        templates=templates,
        examples=ExampleRunner(TextCodecs(store, templates=templates), engines),
    )
    resumable = ResumableUploads(
        database, registry, store, staging=staging, uploads=uploads, lifetime=lifetime
    )
    await store.put_bundle(BUNDLE)
    await registry.register_base_model(info, ADDRESS)
    authenticator = Authenticator(database, {1: PEPPER})
    month = datetime.timedelta(days=30)
    retention = Retention(database, blobs, purge_after=month, quotas=quotas)
    residency = Residency(database, engines)
    runtime_loras = RuntimeLoras(
        database, uploads=uploads, residency=residency, shelf=retention, root=lora_folder
    )
    parts = {
        "base_models": BaseModels(database),
        "engines": Engines(
            database,
            engines,
            connect=_no_link,
            enroll=registry.register_base_model,
            given=(),
            host=None,
            on_attached=uploads.recover,
        ),
        "registry": registry,
        "uploads": uploads,
        "resumable_uploads": resumable,
        "aliases": Aliases(database),
        "grants": Grants(database),
        "retention": retention,
        "source_files": SourceFiles(registry, store, blobs),
        "residency": residency,
        "runtime_loras": runtime_loras,
        "outbox": Outbox(database, {1: PEPPER}),
        "policies": Policies(database, Decisions(database), {1: PEPPER}),
    }
    async with (
        authenticator,
        _app({"database": database, "authenticator": authenticator, **parts}) as app,
        serve(app) as url,
        httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, verify=tls()) as client,
    ):
        client.headers["authorization"] = f"Bearer {await _operator_key(database)}"
        yield Plane(
            app,
            client,
            database,
            registry,
            store,
            staging,
            residency,
            uploads,
            resumable,
            probe,
            folder,
        )


# Apps that no test uses now, each with what it hands out: making one takes some 70 ms.
_IDLE: list[tuple[Litestar, dict[str, Any]]] = []


@contextlib.asynccontextmanager
async def _app(parts: dict[str, Any]) -> AsyncIterator[Litestar]:
    app, handed_out = _IDLE.pop() if _IDLE else _new_app(list(parts))
    handed_out.update(parts)
    app.state.authenticator = parts["authenticator"]
    try:
        yield app
    finally:
        handed_out.clear()
        _IDLE.append((app, handed_out))


def _new_app(names: list[str]) -> tuple[Litestar, dict[str, Any]]:
    handed_out: dict[str, Any] = {}

    def provide(name: str) -> Provide:
        return Provide(lambda: handed_out[name], sync_to_thread=False)

    app = Litestar(
        [admin_router, load_lora_adapter, unload_lora_adapter],
        guards=[guard],
        dependencies={
            "principal": Provide(provide_principal),
            **{name: provide(name) for name in names},
        },
        exception_handlers={
            GatewayError: answer_error,
            HTTPException: answer_http_exception,
            Exception: answer_unexpected,
        },
        logging_config=None,
    )
    return app, handed_out


def _no_link(address: str, on_session: Callable[[], None]) -> EngineLink:
    raise AssertionError("this plane reaches no engine by its address")


async def _operator_key(database: Database) -> str:
    async with database.as_worker() as session:
        _, key = await create_key(
            session,
            tenant_id=None,
            name="operator",
            scopes=["operator"],
            expires_at=None,
            pepper=PEPPER,
        )
    return key


@functools.cache
def tls() -> ssl.SSLContext:
    """What each client makes for itself otherwise, in some 20 ms, and none here needs."""
    return httpx.create_ssl_context(trust_env=False)


@contextlib.asynccontextmanager
async def serve(app: Litestar) -> AsyncIterator[str]:
    """The app on a loopback port of its own."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", proxy_headers=False))
    running = asyncio.create_task(server.serve())
    await until(lambda: server.started or running.done())
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await running


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what other tasks or threads do. Raises TimeoutError."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - files and servers raise no events
            await asyncio.sleep(0.01)


def _files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
