"""What a request costs in the gateway, where the engine costs nothing.

    python -m benchmarks.gateway_overhead [--rounds 5] [--seconds 8] [--json FILE] [--profile]

Everything but the model is real and a process of its own: `python -m gateway` with keys, limits,
hard budgets and the ledger on, a PostgreSQL that is started and removed by this program, the
engine's server with an instant core (`instant_engine`), and a client that checks every answer
(`stream_load`). Each request is a streamed chat answer from an adapter with its usage at the end.

    many  closed loop: so many clients that each wait for their answer, of many tenants
    hot   the same, all of one tenant: its limits' rows and its budget's are locked by each request
    open  Poisson, half of what `many` has just reached; times count from when a request was due

They take turns; what is told is the median of the rounds and their range. Since all share the
machine's cores, rates per gateway core are per CPU second of the gateway's processes, settlement
of what was asked included. A CPU second does less while others use the same core: how much less is
told by the yardstick, the CPU time of a fixed piece of Python right after each load.

At the end usage events must say what the client counted, and the books are proven. With `--step-ms`
the engine takes that long for each token of all streams, so that no two tokens of one stream are
there at once. `--profile` says instead where the gateway's CPU time goes.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import text
from tokenizers import Tokenizer

from adapters.demo.base_model import default_folder
from adapters.store import ArtifactStore
from adapters.text_bundle import TextBundle
from benchmarks.instant_engine import Job
from benchmarks.provenance import commit
from benchmarks.stream_load import Caller, Load, Outcome
from engine.model.text_bundle import export
from engine.protocol import PROTOCOL_VERSION, BaseShape, EngineInfo
from gateway.auth import PEPPER_VERSION, create_key
from gateway.billing.verify import prove
from gateway.budgets import create_budget
from gateway.ceilings import Ceilings, Subject, set_ceilings
from gateway.database import Database, migrate, role_urls
from gateway.embedded import EmbeddedPostgres
from gateway.journal import survey
from gateway.prices import PriceScope, Rates, set_price
from gateway.registry import Registry
from gateway.settings import Settings
from gateway.tables import Adapter, AdapterAlias, AdapterVersion, PublicName, Tenant, new_id

PASSWORDS = {"app_password": "app", "worker_password": "worker"}
PATIENCE_S = 60
NUM_WORDS = 1000
# High enough to refuse nobody; each is checked and charged all the same.
CEILINGS = Ceilings(
    requests_per_minute=10_000_000, tokens_per_minute=10_000_000_000, concurrent_requests=100_000
)
BUDGET_NANO = 10**18
RATES = Rates(
    input_nano_per_million=100_000_000,
    cached_input_nano_per_million=10_000_000,
    output_nano_per_million=400_000_001,
)

# Innermost frame of ours that a stack has -> what is being done there. Of each line the first that
# fits; a stack that fits nowhere is the event loop's own.
AREAS: Sequence[tuple[str, str]] = (
    ("/importlib/", "start"),
    ("<frozen importlib", "start"),
    ("/gateway/auth.py", "auth"),
    ("/gateway/addresses.py", "auth"),
    ("/gateway/registry.py", "resolve"),
    ("/gateway/chat_template.py", "text"),
    ("/gateway/text.py", "text"),
    ("/gateway/limits.py", "admit"),
    ("/gateway/overload.py", "admit"),
    ("/gateway/journal.py", "journal"),
    ("/gateway/segments.py", "journal"),
    ("/gateway/ledger.py", "settle"),
    ("/gateway/budgets.py", "settle"),
    ("/gateway/telemetry.py", "log"),
    ("/logging/__init__.py", "log"),
    ("/engine/client.py", "engine link"),
    ("/gateway/api/sse.py", "stream"),
    ("/gateway/api/chat.py", "stream"),
    ("/gateway/api/attempts.py", "stream"),
    ("/gateway/inference.py", "generation"),
    ("/gateway/generation", "generation"),
    ("/gateway/prompts.py", "generation"),
    ("/gateway/choices.py", "generation"),
    ("/gateway/", "other of ours"),
    ("/litestar/", "litestar"),
    ("/uvicorn/", "uvicorn"),
)


@dataclass(frozen=True, slots=True)
class Town:
    """Who asks: one caller of each tenant, and one adapter of each."""

    callers: list[Caller]


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU seconds that processes have used, all their children's included."""

    gateway: float
    engine: float
    database: float
    generator: float

    def since(self, before: "Cpu") -> "Cpu":
        return Cpu(*(b - a for a, b in zip(_values(before), _values(self), strict=True)))


def _values(cpu: Cpu) -> tuple[float, ...]:
    return cpu.gateway, cpu.engine, cpu.database, cpu.generator


class Processes:
    """Mutable: the processes that are measured, and how much CPU time each has used."""

    def __init__(self, settings: Settings, job: Job, *, log: Path, profile: Path | None) -> None:
        self.settings = settings
        self._log = log
        self._job = job
        self._profile = profile
        self._stack = contextlib.ExitStack()
        # These four are filled by __enter__.
        self.gateway: subprocess.Popen[bytes]
        self.engine: subprocess.Popen[bytes]
        self.generator: subprocess.Popen[bytes]
        self.database_pid: int

    def __enter__(self) -> "Processes":
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(self._log.open("wb"))
            self.engine = self._start(stack, "-m", "benchmarks.instant_engine", stderr=log)
            assert self.engine.stdin is not None
            self.engine.stdin.write(msgspec.json.encode(self._job))
            self.engine.stdin.close()
            self.engine.stdin = None
            program = ["-m", "gateway"]
            if self._profile is not None:
                program = ["-m", "benchmarks.sampled_gateway", str(self._profile)]
            environment = {**os.environ, **self.settings.to_environment()}
            self.gateway = self._start(stack, *program, stderr=log, env=environment)
            self.generator = self._start(stack, "-m", "benchmarks.stream_load", stderr=None)
            self._wait_until_ready()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ask(self, load: Load) -> Outcome:
        assert self.generator.stdin is not None
        assert self.generator.stdout is not None
        self.generator.stdin.write(msgspec.json.encode(load) + b"\n")
        self.generator.stdin.flush()
        outcome = msgspec.json.decode(self.generator.stdout.readline(), type=Outcome)
        if outcome.faults:
            raise SystemExit(f"answers were wrong: {outcome.faults}")
        return outcome

    def cpu(self) -> Cpu:
        return Cpu(
            gateway=_cpu_s(self.gateway.pid),
            engine=_cpu_s(self.engine.pid),
            database=_cpu_s(self.database_pid),
            generator=_cpu_s(self.generator.pid),
        )

    def stop_gateway(self) -> None:
        """Let it settle and end."""
        self.gateway.terminate()
        # Once it has stopped in order, uvicorn lets the signal that it was sent end it.
        if self.gateway.wait(PATIENCE_S) not in (0, -signal.SIGTERM):
            raise SystemExit(f"the gateway ended badly:\n{self._log.read_text()[-3000:]}")

    def _start(
        self, stack: contextlib.ExitStack, *program: str, **options: Any
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            **options,
        )
        stack.callback(_end, process)
        return process

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        url = f"http://{self.settings.host}:{self.settings.port}/health/ready"
        while self.gateway.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                if urllib.request.urlopen(url).status == 200:
                    return
            time.sleep(0.1)
        raise SystemExit(f"the gateway is not ready:\n{self._log.read_text()[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def _cpu_s(pid: int) -> float:
    """User and system time of a process, of its living descendants and of its dead children."""
    ticks = os.sysconf("SC_CLK_TCK")
    children: dict[int, list[int]] = {}
    used: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
                used[int(entry.name)] = sum(map(int, fields[11:15]))
    found, waiting = 0, [pid]
    while waiting:
        each = waiting.pop()
        found += used.get(each, 0)
        waiting += children.get(each, [])
    return found / ticks


def words_of(bundle: TextBundle) -> tuple[list[int], list[str]]:
    """Tokens that are a blank and a lower-case word each, and their texts."""
    tokenizer = Tokenizer.from_buffer(bundle.tokenizer_json)
    texts = ((each, tokenizer.decode([each])) for each in range(bundle.vocab_size))
    found = [(each, spelled) for each, spelled in texts if re.fullmatch(" [a-z]{2,}", spelled)]
    return [each for each, _ in found[:NUM_WORDS]], [spelled for _, spelled in found[:NUM_WORDS]]


def engine_info(bundle: TextBundle, *, bundle_digest: str) -> EngineInfo:
    return EngineInfo(
        protocol_version=PROTOCOL_VERSION,
        engine_epoch=1,
        base_model="base",
        base_digest="b" * 64,
        text_bundle_digest=bundle_digest,
        max_model_len=bundle.context_length,
        vocab_size=bundle.vocab_size,
        max_loras=64,
        max_lora_rank=64,
        device="cpu",
        dtype="float32",
        base_shape=BaseShape(base_model="base", modules={}),
    )


async def fill(database: Database, info: EngineInfo, *, num_tenants: int, pepper: bytes) -> Town:
    """Tenants with a key, an adapter, limits and a hard budget each."""
    base_model = await Registry(database).register_base_model(info, "unix:/nowhere")
    async with database.as_worker() as session:
        await set_price(session, PriceScope(base_model.id), rates=RATES)
    callers = [
        await _settle_in(database, base_model.id, slug=f"t{number}", pepper=pepper)
        for number in range(num_tenants)
    ]
    return Town(callers)


async def _settle_in(
    database: Database, base_model_id: uuid.UUID, *, slug: str, pepper: bytes
) -> Caller:
    tenant = Tenant(id=new_id(), slug=slug, name=slug, cache_salt=secrets.token_bytes(32))
    ours = {"tenant_id": tenant.id, "base_model_id": base_model_id}
    name = f"{slug}-words"
    adapter = Adapter(id=new_id(), slug="words", public_name=name, **ours)
    digest = hashlib.sha256(name.encode()).hexdigest()
    version = AdapterVersion(
        id=new_id(),
        adapter_id=adapter.id,
        number=1,
        state="ready",
        weights_digest=digest,
        version_digest=digest[::-1],
        rank=8,
        num_modules=120,
        size_bytes=1 << 20,
        findings=[],
        **ours,
    )
    async with database.as_worker() as session:
        for row in (tenant, adapter, PublicName(name=name, adapter_id=adapter.id), version):
            session.add(row)
            await session.flush()
        session.add(
            AdapterAlias(
                adapter_id=adapter.id, tenant_id=tenant.id, alias="latest", version_id=version.id
            )
        )
        await session.flush()
        key, plain = await create_key(
            session, tenant_id=tenant.id, name="k", scopes=None, expires_at=None, pepper=pepper
        )
        for subject in (Subject(tenant.id), Subject(tenant.id, api_key_id=key.id)):
            await set_ceilings(session, subject, CEILINGS)
        await create_budget(
            session,
            tenant_id=tenant.id,
            api_key_id=None,
            kind="hard",
            period="month",
            time_zone="UTC",
            cap_nano=BUDGET_NANO,
            alert_percents=(80,),
        )
    return Caller(plain, name)


class Books:
    """Mutable: what the client was told, and whether the database says the same."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._told = (0, 0, 0)

    def add(self, outcome: Outcome) -> None:
        new = (outcome.requests, outcome.prompt_tokens, outcome.completion_tokens)
        self._told = (self._told[0] + new[0], self._told[1] + new[1], self._told[2] + new[2])

    async def settled(self) -> None:
        """Wait until every request has its usage event."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := await self._found())[0] < self._told[0]:
            if time.monotonic() > deadline:
                raise SystemExit(f"{self._told} were answered, {found} are settled")
            await asyncio.sleep(0.02)

    async def prove(self, data_dir: Path) -> dict[str, int]:
        """Nothing is open, and everything says the same."""
        found = await self._found()
        proof = await prove(self._database, survey(data_dir / "journal"))
        if found != self._told or proof.mismatches or proof.num_pending:
            raise SystemExit(f"told {self._told}, found {found}, {proof}")
        return proof.sums

    async def _found(self) -> tuple[int, int, int]:
        query = text(
            "SELECT CAST(coalesce(sum(requests), 0) AS bigint) AS requests,"
            " CAST(coalesce(sum(prompt_tokens), 0) AS bigint) AS prompt,"
            " CAST(coalesce(sum(completion_tokens), 0) AS bigint) AS completion"
            " FROM usage_rollups"
        )
        async with self._database.as_worker() as session:
            row = (await session.execute(query)).one()
        return row.requests, row.prompt, row.completion


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything that is running, and how it is asked."""

    instant: Processes
    books: Books
    town: Town
    texts: list[str]
    arguments: argparse.Namespace

    async def measure(
        self, *, callers: Sequence[Caller], rate_per_s: float | None = None, seed: int = 0
    ) -> dict[str, Any]:
        load = Load(
            host=self.instant.settings.host,
            port=self.instant.settings.port,
            callers=list(callers),
            texts=self.texts,
            max_tokens=self.arguments.tokens,
            duration_s=self.arguments.seconds,
            concurrency=self.arguments.concurrency,
            rate_per_s=rate_per_s,
            random_seed=seed,
        )
        before = self.instant.cpu()
        outcome = await asyncio.to_thread(self.instant.ask, load)
        self.books.add(outcome)
        await self.books.settled()
        return told(outcome, self.instant.cpu().since(before))


def yardstick_ms() -> float:
    """CPU time of some dictionary and string work: median of seven."""
    found = []
    for _ in range(7):
        began = time.process_time()
        words = {}
        for number in range(100_000):
            words[number % 1000] = str(number)
        found.append((time.process_time() - began) * 1e3)
    return statistics.median(found)


def told(outcome: Outcome, cpu: Cpu) -> dict[str, Any]:
    first = statistics.quantiles(outcome.first_ms, n=100, method="inclusive")
    total = statistics.quantiles(outcome.total_ms, n=100, method="inclusive")
    return {
        "requests": outcome.requests,
        "requests_per_s": outcome.requests / outcome.elapsed_s,
        "requests_per_gateway_core_s": outcome.requests / cpu.gateway,
        "chunks_per_gateway_core_s": outcome.chunks / cpu.gateway,
        "gateway_ms_per_request": cpu.gateway * 1e3 / outcome.requests,
        "engine_ms_per_request": cpu.engine * 1e3 / outcome.requests,
        "database_ms_per_request": cpu.database * 1e3 / outcome.requests,
        "generator_ms_per_request": cpu.generator * 1e3 / outcome.requests,
        "yardstick_ms": yardstick_ms(),
        "first_p50_ms": first[49],
        "first_p99_ms": first[98],
        "total_p50_ms": total[49],
        "total_p99_ms": total[98],
    }


def summarise(rounds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "median": round(statistics.median(each[name] for each in rounds), 3),
            "least": round(min(each[name] for each in rounds), 3),
            "most": round(max(each[name] for each in rounds), 3),
        }
        for name in rounds[0]
    }


async def measure_all(bench: Bench) -> dict[str, Any]:
    """The loads in turns, and what they come to."""
    callers, arguments = bench.town.callers, bench.arguments
    rounds: dict[str, list[dict[str, Any]]] = {"many": [], "hot": [], "open": []}
    # Connections, prepared statements, PostgreSQL's caches, which a served gateway has.
    await bench.measure(callers=callers)
    for number in range(arguments.rounds):
        many = await bench.measure(callers=callers, seed=number)
        hot = await bench.measure(callers=callers[:1], seed=number)
        rate = many["requests_per_s"] / 2
        half = await bench.measure(callers=callers, rate_per_s=rate, seed=number)
        half["rate_per_s"] = rate
        for name, found in (("many", many), ("hot", hot), ("open", half)):
            rounds[name].append(found)
            say(name, found)
    shares = [
        {"hot_share_of_many": hot["requests_per_s"] / many["requests_per_s"]}
        for hot, many in zip(rounds["hot"], rounds["many"], strict=True)
    ]
    return {name: summarise(each) for name, each in {**rounds, "shares": shares}.items()}


def say(name: str, found: Mapping[str, float]) -> None:
    print(
        f"{name:>6}: {found['requests_per_s']:6.0f} requests/s;"
        f" per gateway core {found['requests_per_gateway_core_s']:6.0f} requests/s,"
        f" {found['chunks_per_gateway_core_s']:7.0f} chunks/s;"
        f" p50 {found['total_p50_ms']:6.1f} ms, p99 {found['total_p99_ms']:6.1f} ms;"
        f" yardstick {found['yardstick_ms']:4.1f} ms",
        flush=True,
    )


def report_profile(path: Path) -> dict[str, Any]:
    """Shares of the samples by area, and in each the functions that take the most themselves."""
    stacks = json.loads(path.read_text())
    areas: dict[str, Counter[str]] = {}
    for stack, times in stacks.items():
        frames = stack.split(";")
        innermost = "/".join(frames[0].rsplit("/", 2)[-2:])
        areas.setdefault(_area(frames), Counter())[innermost] += times
    total = sum(found.total() for found in areas.values())
    return {
        "samples": total,
        "areas": {
            name: {
                "share": round(found.total() / total, 4),
                "functions": {
                    function: round(times / total, 4) for function, times in found.most_common(25)
                },
            }
            for name, found in sorted(areas.items(), key=lambda each: -each[1].total())
        },
    }


def _area(frames: Sequence[str]) -> str:
    if any("gateway/app.py:create_app" in frame for frame in frames):
        return "start"
    for frame in frames:
        for part, name in AREAS:
            if part in frame:
                return name
    return "event loop"


async def run(
    arguments: argparse.Namespace, folder: Path, postgres: EmbeddedPostgres
) -> dict[str, Any]:
    await migrate(postgres.url, **PASSWORDS)
    app_url, worker_url = role_urls(postgres.url, **PASSWORDS)
    store_url = (folder / "store").absolute().as_uri()
    bundle = export(str(arguments.model))
    info = engine_info(bundle, bundle_digest=await ArtifactStore(store_url).put_bundle(bundle))
    words, texts = words_of(bundle)
    secret, pepper = secrets.token_hex(32), secrets.token_bytes(32)
    settings = Settings(
        database_app_url=app_url,
        database_worker_url=worker_url,
        engine_addresses=(f"unix:{folder / 'e'}",),
        engine_secret=secret,
        peppers={PEPPER_VERSION: pepper},
        store_url=store_url,
        data_dir=folder,
        host="127.0.0.1",
        port=_free_port(),
        max_upload_bytes=1 << 20,
        purge_after_days=30,
    )
    job = Job(settings.engine_addresses[0], secret, info, words, arguments.step_ms)
    profile = folder / "profile.json" if arguments.profile else None
    database = Database(app_url=app_url, worker_url=worker_url, pool_size=2)
    try:
        town = await fill(database, info, num_tenants=arguments.tenants, pepper=pepper)
        processes = Processes(settings, job, log=folder / "gateway.log", profile=profile)
        with processes:
            books = Books(database)
            processes.database_pid = _postmaster(postgres)
            bench = Bench(processes, books, town, texts, arguments)
            if profile is None:
                measured = await measure_all(bench)
            else:
                measured = {"measured": await bench.measure(callers=town.callers)}
            processes.stop_gateway()
            measured["books"] = await books.prove(folder)
    finally:
        await database.close()
    return measured if profile is None else {**measured, "profile": report_profile(profile)}


def _postmaster(postgres: EmbeddedPostgres) -> int:
    return int((postgres.home / "data" / "postmaster.pid").read_text().split()[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what the gateway adds to a request.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load in a round")
    parser.add_argument("--tenants", type=int, default=50)
    parser.add_argument("--concurrency", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--step-ms", type=float, default=0.0, help="that the engine takes")
    parser.add_argument("--model", type=Path, default=default_folder(), help="whose text it is")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    folder = Path(tempfile.mkdtemp(prefix="overhead-"))
    postgres = EmbeddedPostgres(folder)
    try:
        with postgres:
            measured = asyncio.run(run(arguments, folder, postgres))
    finally:
        # Root's is outside the folder.
        shutil.rmtree(postgres.home, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
    report = {
        "command": " ".join(["python -m benchmarks.gateway_overhead", *sys.argv[1:]]),
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{platform.python_implementation()} {platform.python_version()}",
        "load_average": os.getloadavg(),
        "tenants": arguments.tenants,
        "concurrency": arguments.concurrency,
        "tokens": arguments.tokens,
        "step_ms": arguments.step_ms,
        **measured,
    }
    written = json.dumps(report, indent=2)
    print(written)
    if arguments.json is not None:
        arguments.json.write_text(written + "\n")


if __name__ == "__main__":
    main()
