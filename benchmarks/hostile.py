"""What a tenant's streams notice of another tenant's hostile uploads: the time between tokens.

    python -m benchmarks.hostile [--rounds 3] [--seconds 20] [--output FILE]

A gateway process with a PostgreSQL of its own, both started and removed by this program, with
authentication, ledger and journal as they always are. Behind it, over the real transport, an engine
that makes one token of every stream each 20 ms, so that what varies is the gateway and the machine
and not a model. One tenant keeps so many streams open; for half of the time, in turns, a process
beside uploads template and tokenizer bombs as fast as they are refused, in a name of another
tenant: those of the tests, but for those that are refused for their size. A gap is the time between
two pieces of one stream as its client gets them. Every stream is compared with what it should say.

Streams, engine, uploader and gateway share the machine: with few processors the bombs' own use of
them is part of what is measured. Run it on one that does nothing else.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

from adapters.store import ArtifactStore
from benchmarks.provenance import commit
from engine.sequence import StepEvent
from gateway.auth import create_key
from gateway.database import Database, migrate, role_urls
from gateway.embedded import EmbeddedPostgres
from gateway.settings import PURGE_AFTER_DAYS, Settings
from tests.engine.echo_engine import INFO, EchoCore, Engine, short_folder
from tests.gateway.admin_plane import adapter_files
from tests.text_bombs import BOMBS, small_bundle

BASE = small_bundle()
PEPPER = bytes(32)
# Of an engine that lives as long as this program.
SECRET = "the-engines-own"  # noqa: S105
STEP_S = 0.02
PATIENCE_S = 60
STREAM = {
    "model": INFO.base_model,
    "messages": [{"role": "user", "content": "the quick brown fox"}],
    "max_tokens": 200,
    "ignore_eos": True,
    "stream": True,
}
OPERATOR_ROUTE = "/admin/v1/tenants"


class PacedCore(EchoCore):
    """An echo that says a token of every stream at each step, and steps as a clock does."""

    def __init__(self) -> None:
        super().__init__()
        self._next_at = 0.0

    def step(self) -> list[StepEvent]:
        now = time.monotonic()
        self._next_at = max(self._next_at + STEP_S, now)
        time.sleep(self._next_at - now)
        return super().step()


@dataclass(frozen=True, slots=True)
class Shop:
    """A gateway that serves, and the keys of its operator and of the tenant that streams."""

    url: str
    operator_key: str
    key: str


@contextlib.asynccontextmanager
async def open_shop(postgres: EmbeddedPostgres, folder: Path) -> AsyncIterator[Shop]:
    store_url = (folder / "store").as_uri()
    digest = await ArtifactStore(store_url).put_bundle(BASE)
    info = msgspec.structs.replace(INFO, text_bundle_digest=digest)
    operator_key, app_url, worker_url = await prepare(postgres)
    async with short_folder() as sockets:
        engine = Engine(sockets / "engine", core=PacedCore(), secret=SECRET, info=info)
        settings = Settings(
            database_app_url=app_url,
            database_worker_url=worker_url,
            engine_addresses=(engine.address,),
            engine_secret=SECRET,
            peppers={1: PEPPER},
            store_url=store_url,
            data_dir=folder,
            host="127.0.0.1",
            port=free_port(),
            max_upload_bytes=8 << 20,
            purge_after_days=PURGE_AFTER_DAYS,
        )
        async with engine.serve(), gateway(settings):
            url = f"http://127.0.0.1:{settings.port}"
            yield Shop(url, operator_key, await make_tenants(url, operator_key))


async def prepare(postgres: EmbeddedPostgres) -> tuple[str, str, str]:
    """Migrate; return an operator's key and the URLs of the two roles."""
    passwords = {"app_password": "a", "worker_password": "w"}
    await migrate(postgres.url, **passwords)
    app_url, worker_url = role_urls(postgres.url, **passwords)
    database = Database(app_url=app_url, worker_url=worker_url)
    async with database.as_worker() as session:
        _, key = await create_key(
            session, tenant_id=None, name="operator", scopes=None, expires_at=None, pepper=PEPPER
        )
    await database.close()
    return key, app_url, worker_url


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.asynccontextmanager
async def gateway(settings: Settings) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway",
        env={**os.environ, **settings.to_environment()},
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        await process.wait()


async def make_tenants(url: str, operator_key: str) -> str:
    """Two tenants and a price; return the key of the one that streams."""
    async with speaking(url, operator_key) as operator:
        async with asyncio.timeout(PATIENCE_S):
            while not await is_ready(operator):  # noqa: ASYNC110 - a server that starts
                await asyncio.sleep(0.1)
        price = {"input_nano_per_million": 10**6, "output_nano_per_million": 10**6}
        for path, body in (
            ("/admin/v1/prices", {"base_model": INFO.base_model, **price}),
            (OPERATOR_ROUTE, {"slug": "globex"}),
            (OPERATOR_ROUTE, {"slug": "acme"}),
            (f"{OPERATOR_ROUTE}/acme/keys", {"name": "streams"}),
        ):
            answer = await operator.post(path, json=body)
            answer.raise_for_status()
    key: str = answer.json()["key"]
    return key


async def is_ready(operator: httpx.AsyncClient) -> bool:
    try:
        return (await operator.get("/health/ready")).is_success
    except httpx.ConnectError:
        return False


def speaking(url: str, key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url,
        headers={"authorization": f"Bearer {key}"},
        timeout=PATIENCE_S,
        limits=httpx.Limits(max_connections=None),
        trust_env=False,
    )


async def stream(client: httpx.AsyncClient, gaps_ms: list[float]) -> str:
    """One answer; adds the time between each two of its pieces."""
    said, last = "", None
    async with client.stream("POST", "/v1/chat/completions", json=STREAM) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now = time.perf_counter()
            if last is not None:
                gaps_ms.append((now - last) * 1000)
            last = now
            choices = json.loads(line.removeprefix("data: "))["choices"]
            said += "".join(choice["delta"].get("content") or "" for choice in choices)
    return said


async def measure(shop: Shop, *, expected: str, num_streams: int, for_s: float) -> dict[str, Any]:
    """Keep so many streams open for so long; what their clients saw."""
    gaps_ms: list[float] = []
    ends_at = time.monotonic() + for_s

    async def keep_streaming(client: httpx.AsyncClient) -> int:
        num_wrong = 0
        while time.monotonic() < ends_at:
            num_wrong += await stream(client, gaps_ms) != expected
        return num_wrong

    async with speaking(shop.url, shop.key) as client:
        wrong = await asyncio.gather(*(keep_streaming(client) for _ in range(num_streams)))
    assert not any(wrong), f"{sum(wrong)} streams said something else"
    percentiles = statistics.quantiles(gaps_ms, n=1000)
    return {
        "gaps": len(gaps_ms),
        **{f"p{name}_ms": round(percentiles[int(name * 10) - 1], 2) for name in (50, 99, 99.9)},
        "max_ms": round(max(gaps_ms), 2),
    }


@contextlib.asynccontextmanager
async def attacked(shop: Shop) -> AsyncIterator[dict[str, int]]:
    """Bombs arrive meanwhile; what they were answered is in the dictionary afterwards."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.hostile", "--attack", shop.url),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    answers: dict[str, int] = {}
    process.stdin.write(f"{shop.operator_key}\n".encode())
    # Its first answer: from here on it is under way.
    await process.stdout.readline()
    yield answers
    process.stdin.close()
    answers |= json.loads(await process.stdout.read())
    await process.wait()


def attack(url: str) -> None:
    """Upload one bomb after the other until standard input ends; print what was answered."""
    # It would be on another machine: what it takes to make a bomb is not what is measured.
    os.nice(19)
    key = sys.stdin.readline().strip()
    is_over = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        is_over.set()

    threading.Thread(target=wait, daemon=True).start()
    good = adapter_files(modules=dict(INFO.base_shape.modules), target_modules=["up_proj"])
    small = [bomb for bomb in BOMBS if bomb.code != "text_file_too_large"]
    answers: Counter[str] = Counter()
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_S, trust_env=False) as client:
        for bomb in itertools.cycle(small):
            answer = client.post(
                f"{OPERATOR_ROUTE}/globex/adapters/bomb/versions",
                files=[("files", each) for each in {**good, **bomb.files(BASE)}.items()],
            )
            if not answers:
                print("begun", flush=True)
            answers[str(answer.status_code)] += 1
            if is_over.is_set():
                break
    print(json.dumps(answers))


async def run(arguments: argparse.Namespace, postgres: EmbeddedPostgres) -> dict[str, Any]:
    rounds = []
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        async with open_shop(postgres, Path(folder)) as shop:
            async with speaking(shop.url, shop.key) as client:
                expected = await stream(client, [])
            asked = {"num_streams": arguments.streams, "for_s": arguments.seconds}
            # Connections, plans and caches, which a served gateway has.
            await measure(shop, expected=expected, num_streams=arguments.streams, for_s=2)
            for _ in range(arguments.rounds):
                quiet = await measure(shop, expected=expected, **asked)
                async with attacked(shop) as answers:
                    beside_bombs = await measure(shop, expected=expected, **asked)
                rounds.append({"quiet": quiet, "beside_bombs": beside_bombs, "bombs": answers})
                show(rounds[-1])
    return {"rounds": rounds, "median": median_of(rounds)}


def median_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    medians = {
        phase: {
            name: statistics.median(each[phase][name] for each in rounds)
            for name in ("p50_ms", "p99_ms")
        }
        for phase in ("quiet", "beside_bombs")
    }
    ratio = medians["beside_bombs"]["p99_ms"] / medians["quiet"]["p99_ms"]
    return {**medians, "p99_ratio": round(ratio, 3)}


def show(measured: dict[str, Any]) -> None:
    """One round, side by side."""
    quiet, beside = measured["quiet"], measured["beside_bombs"]
    print(f"{'':10}{'quiet':>12}{'with bombs':>12}   bombs: {measured['bombs']}", file=sys.stderr)
    for name in quiet:
        print(f"{name:10}{quiet[name]:>12}{beside[name]:>12}", file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time streams beside hostile uploads.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--attack", metavar="URL", help="for this program's own use")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.attack is not None:
        attack(arguments.attack)
        return
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    postgres = EmbeddedPostgres(folder)
    try:
        with postgres:
            measured = asyncio.run(run(arguments, postgres))
    finally:
        # Root's is outside the folder.
        shutil.rmtree(postgres.home, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
    report = {
        "command": " ".join(["python -m benchmarks.hostile", *sys.argv[1:]]),
        "commit": commit(),
        "machine": f"{os.cpu_count()} processors, {platform.machine()},"
        f" {platform.python_implementation()} {platform.python_version()}",
        "streams": arguments.streams,
        "seconds": arguments.seconds,
        "step_ms": STEP_S * 1000,
        **measured,
    }
    written = json.dumps(report, indent=2)
    print(written)
    if arguments.output is not None:
        arguments.output.write_text(written + "\n")


if __name__ == "__main__":
    main()
