"""A gateway is killed again and again while uploads run, and nothing is lost or half there."""

import asyncio
import contextlib
import datetime
import hashlib
import json
import os
import random
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from sqlalchemy import text

from adapters.store import ArtifactStore
from adapters.validate import BaseShape
from engine.protocol import ProbeReport
from gateway.auth import create_key
from gateway.database import Database
from gateway.fsck import Fsck
from gateway.settings import Settings
from tests.conftest import Home
from tests.engine.echo_engine import EchoCore, Engine, short_folder
from tests.gateway.admin_plane import INFO, PEPPER, adapter_files, report

SECRET = "between-gateway-and-engine"
MODULES = {f"model.layers.{layer}.self_attn.q_proj": (4096, 512) for layer in range(2)}
SHAPE = BaseShape(base_model="Tiny-Base", modules=MODULES)
RANGE_BYTES = 48 * 1024
NUM_MULTIPART, NUM_RESUMABLE = 3, 3
MAX_LIFE_S = 1.2
START_S = 60

STATES = text("""
    SELECT v.state, v.weights_digest, v.source_files, a.slug, v.number
    FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id
""")
HALF_VISIBLE = text("""
    SELECT count(*) FROM adapter_aliases l JOIN adapter_versions v ON v.id = l.version_id
    WHERE v.state <> 'ready'
""")


class Core(EchoCore):
    """Finds every adapter in order."""

    def probe(self, adapter_digest: str) -> ProbeReport:
        return report(adapter_digest)


@dataclass
class Town:
    """One installation, whose gateway comes and goes."""

    settings: Settings
    database: Database
    store: ArtifactStore
    key: str
    dice: random.Random
    # Where gateways are born.
    nursery: asyncio.subprocess.Process
    counts: Counter[str] = field(default_factory=Counter)
    # What clients were told: (adapter, number) -> digest of the weights.
    told: dict[tuple[str, int], str] = field(default_factory=dict)
    seeds: int = 0

    def next_files(self) -> dict[str, bytes]:
        self.seeds += 1
        return adapter_files(
            seed=self.seeds, rank=8, modules=MODULES, target_modules=["q_proj"], lora_alpha=2
        )

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self.settings.port}",
            headers={"authorization": f"Bearer {self.key}"},
            timeout=30,
            trust_env=False,
        )

    def tell(self, answer: httpx.Response) -> None:
        assert answer.status_code in (200, 201), answer.text
        version = answer.json()
        adapter = version["model"].removeprefix("acme-")
        self.told[adapter, version["number"]] = version["weights_digest"]


@dataclass
class Journey:
    """A client that keeps at one upload in pieces across any number of gateways."""

    town: Town
    name: str
    files: dict[str, bytes] = field(default_factory=dict)
    url: str | None = None

    async def run(self, client: httpx.AsyncClient) -> None:
        while True:
            if self.url is None:
                await self._declare(client)
            await self.send_what_is_missing(client)
            answer = await client.post(f"{self.url}/complete")
            if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                # The gateway has not met its engine yet.
                await asyncio.sleep(0.1)
                continue
            self.town.tell(answer)
            self.town.counts["resumable uploads completed"] += 1
            self.url = None

    async def _declare(self, client: httpx.AsyncClient) -> None:
        self.files = self.town.next_files()
        declared = [
            {"name": name, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in self.files.items()
        ]
        url = f"/admin/v1/tenants/acme/adapters/{self.name}/uploads"
        answer = await client.post(url, json={"files": declared})
        assert answer.status_code == 201, answer.text
        self.url = f"{url}/{answer.json()['id']}"

    async def send_what_is_missing(self, client: httpx.AsyncClient) -> None:
        shown = (await client.get(str(self.url))).json()
        if shown["state"] != "open":
            return
        if any(file["received_bytes"] for file in shown["files"]):
            self.town.counts["resumed in the middle"] += 1
        for file in shown["files"]:
            data = self.files[file["name"]]
            for begin in range(file["received_bytes"], len(data), RANGE_BYTES):
                end = min(begin + RANGE_BYTES, len(data))
                answer = await client.put(
                    f"{self.url}/files/{file['name']}",
                    content=data[begin:end],
                    headers={"content-range": f"bytes {begin}-{end - 1}/{len(data)}"},
                )
                assert answer.status_code == 200, answer.text


async def upload_whole(town: Town, client: httpx.AsyncClient, name: str) -> None:
    while True:
        answer = await client.post(
            f"/admin/v1/tenants/acme/adapters/{name}/versions",
            files=[("files", item) for item in town.next_files().items()],
        )
        if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            await asyncio.sleep(0.1)
            continue
        town.tell(answer)
        town.counts["multipart uploads completed"] += 1


@pytest.fixture
async def town(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Town]:
    async with short_folder() as folder:
        settings = Settings(
            database_app_url=home.app_url,
            database_worker_url=home.worker_url,
            engine_addresses=(f"unix:{folder / 'engine.sock'}",),
            engine_secret=SECRET,
            peppers={1: PEPPER},
            store_url=(tmp_path / "store").as_uri(),
            data_dir=tmp_path,
            host="127.0.0.1",
            port=free_port(),
            max_upload_bytes=8 << 20,
            purge_after_days=30,
        )
        async with database.as_worker() as session:
            _, key = await create_key(
                session,
                tenant_id=None,
                name="operator",
                scopes=["operator"],
                expires_at=None,
                pepper=PEPPER,
            )
        info = msgspec.structs.replace(INFO, base_shape=SHAPE)
        served = Engine(folder / "engine.sock", core=Core(), secret=SECRET, info=info)
        async with served.serve():
            store = ArtifactStore(settings.store_url)
            async with nursery() as born:
                yield Town(settings, database, store, key, random.Random(4), born)


@contextlib.asynccontextmanager
async def nursery() -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.crash.nursery", "gateway"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert await hear(process) == ["born"]
        yield process
    finally:
        process.kill()
        await process.wait()


async def hear(nursery: asyncio.subprocess.Process) -> list[str]:
    assert nursery.stdout is not None
    return (await nursery.stdout.readline()).decode().split()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def gateway(town: Town) -> AsyncIterator[None]:
    """A gateway that answers; killed without warning at the end."""
    life = {
        "log": str(town.settings.data_dir / "gateway.log"),
        "arguments": [],
        "environment": town.settings.to_environment(),
    }
    assert town.nursery.stdin is not None
    town.nursery.stdin.write(f"{json.dumps(life)}\n".encode())
    said, pid = await hear(town.nursery)
    assert said == "lives"
    try:
        async with town.client() as client, asyncio.timeout(START_S):
            while not await is_ready(client):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.02)
        yield
    finally:
        os.kill(int(pid), signal.SIGKILL)
        assert await hear(town.nursery) == ["ended", f"{-signal.SIGKILL}"]


async def is_ready(client: httpx.AsyncClient) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return (await client.get("/health/ready")).status_code == httpx.codes.OK
    return False


async def live_until_killed(town: Town, journeys: list[Journey]) -> None:
    """One life of a gateway, with all its clients, which learn of its end by their sockets."""

    async def until_it_is_gone(work: Any) -> None:
        with contextlib.suppress(httpx.HTTPError):
            await work

    async with town.client() as client, asyncio.TaskGroup() as clients:
        async with gateway(town):
            await check(town)
            for journey in journeys:
                clients.create_task(until_it_is_gone(journey.run(client)))
            for number in range(NUM_MULTIPART):
                clients.create_task(until_it_is_gone(upload_whole(town, client, f"m{number}")))
            await asyncio.sleep(town.dice.uniform(0, MAX_LIFE_S))
        town.counts["kills"] += 1


async def check(town: Town) -> None:
    """Every version row has its bytes, nothing half is visible, nothing that was told is gone."""
    async with town.database.as_worker() as session:
        rows = (await session.execute(STATES)).all()
        assert (await session.execute(HALF_VISIBLE)).scalar_one() == 0
    for row in rows:
        assert row.state in ("probing", "ready")
        assert await town.store.has_adapter(row.weights_digest)
        weights = row.source_files["adapter_model.safetensors"]
        assert await town.store.weights_sha256(row.weights_digest) == weights
        assert await town.store.find_file(row.source_files["adapter_config.json"]) is not None
    found = {(row.slug, row.number): row.weights_digest for row in rows if row.state == "ready"}
    assert town.told.items() <= found.items()


@pytest.mark.parametrize("num_kills", [5, pytest.param(50, marks=pytest.mark.slow)])
async def test_uploads_survive_a_gateway_that_is_killed_at_any_moment(
    town: Town, announce: Callable[[str], None], num_kills: int
) -> None:
    async with gateway(town), town.client() as client:
        body = {"slug": "acme", "name": "acme"}
        assert (await client.post("/admin/v1/tenants", json=body)).status_code == 201
    journeys = [Journey(town, f"r{number}") for number in range(NUM_RESUMABLE)]
    for _ in range(num_kills):
        await live_until_killed(town, journeys)

    async with gateway(town), town.client() as client:
        unfinished = [journey for journey in journeys if journey.url is not None]
        for journey in unfinished:
            await journey.send_what_is_missing(client)
            town.tell(await client.post(f"{journey.url}/complete"))
        town.counts["unfinished at the end, and completed"] = len(unfinished)
        await no_version_is_left_in_probe(town)
        await check(town)
        await nothing_is_left_over(town)
    announce(f"{dict(town.counts)}")


async def no_version_is_left_in_probe(town: Town) -> None:
    """A gateway finishes, once it has its engine, what its predecessors left."""
    async with asyncio.timeout(START_S):
        while True:
            async with town.database.as_worker() as session:
                states = {row.state for row in await session.execute(STATES)}
            if states == {"ready"}:
                return
            await asyncio.sleep(0.05)


async def nothing_is_left_over(town: Town) -> None:
    staging = town.settings.data_dir / "staging"
    assert [path for path in staging.rglob("*") if path.is_file()] == []
    # A day later: pieces of uploads whose end nobody was told of go with their expiry.
    async with town.database.as_worker() as session:
        await session.execute(text("UPDATE uploads SET expires_at = now()"))
    compare = Fsck(town.database, town.store, grace=datetime.timedelta(0))
    swept = await compare.run(is_deep=True, must_repair=True)
    assert {problem.kind for problem in swept.problems} <= {
        "orphan_adapter",
        "orphan_file",
        "stale_upload",
        "unfinished_file",
    }
    town.counts["orphans swept"] = len(swept.problems)
    town.counts["versions"] = swept.num_versions
    assert (await compare.run(is_deep=False, must_repair=False)).problems == []
    assert await town.store.uploads() == []
