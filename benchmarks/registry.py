"""How long it takes to find out what a model name means, in a registry of many versions.

    python -m benchmarks.registry [--adapters 500] [--versions 4] [--output FILE]

A PostgreSQL of its own, started and removed by this program, with the real schema, roles and
row-level security; the gateway's own `Registry`, in this process, over a Unix socket. The registry
is filled with rows, without files: half of the adapters have an alias `prod` with a canary, one in
ten is shared with all tenants, one in ten with one. Every version has a digest of its own.

A resolve is what a request pays: a connection from the pool, and one statement that is its own
transaction. Names are drawn at random, of all spellings, from all tenants alike; one
in ten is anybody's, so mostly one that the caller may not use. `list_models` is one tenant's
`GET /v1/models`. Nothing is cached between calls but what PostgreSQL and its driver do. The plans
of both statements are looked at too: a sequential scan of a table that grows with the registry is
named with its pages. PostgreSQL reads a table of a few pages whole because that is the cheapest.
"""

import argparse
import asyncio
import hashlib
import itertools
import json
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy import insert, text

from benchmarks.provenance import commit
from engine.protocol import PROTOCOL_VERSION, BaseShape, EngineInfo
from gateway.auth import Principal
from gateway.database import Database, migrate, role_urls
from gateway.embedded import EmbeddedPostgres
from gateway.errors import ModelNotFound
from gateway.registry import LIST_MODELS, RESOLVE, Registry
from gateway.tables import (
    Adapter,
    AdapterAlias,
    AdapterGrant,
    AdapterVersion,
    PublicName,
    Table,
    Tenant,
    new_id,
)

INFO = EngineInfo(
    protocol_version=PROTOCOL_VERSION,
    engine_epoch=1,
    base_model="base",
    base_digest="b" * 64,
    text_bundle_digest="c" * 64,
    max_model_len=512,
    vocab_size=1000,
    max_loras=4,
    max_lora_rank=8,
    device="cpu",
    dtype="float32",
    base_shape=BaseShape(base_model="base", modules={}),
)
# What does not grow with the registry.
SMALL_TABLES = {"base_models", "engine_replicas", "tenants", "withheld_base_models"}
# Rows of one INSERT.
BATCH = 500


@dataclass(frozen=True, slots=True)
class Town:
    """Who calls, and what can be called by whom."""

    principals: list[Principal]
    # By tenant: the bare names of its own adapters.
    names: dict[uuid.UUID, list[str]]


async def fill(
    database: Database,
    *,
    num_tenants: int,
    num_adapters: int,
    num_versions: int,
    rng: random.Random,
) -> Town:
    """Write the rows of a registry; `num_adapters` over all tenants."""
    base_model = await Registry(database).register_base_model(INFO, "unix:/nowhere")
    tenants = [
        {"id": new_id(), "slug": f"t{number}", "name": "t", "cache_salt": bytes(32)}
        for number in range(num_tenants)
    ]
    rows: dict[type[Table], list[dict[str, Any]]] = {
        table: [] for table in (Adapter, PublicName, AdapterVersion, AdapterAlias, AdapterGrant)
    }
    for number in range(num_adapters):
        owner = tenants[number % num_tenants]
        ours = {"tenant_id": owner["id"], "base_model_id": base_model.id}
        adapter = {
            "id": new_id(),
            "slug": f"a{number}",
            "public_name": f"{owner['slug']}-a{number}",
            **ours,
        }
        rows[Adapter].append(adapter)
        rows[PublicName].append({"name": adapter["public_name"], "adapter_id": adapter["id"]})
        versions = [_version(adapter["id"], each, ours) for each in range(1, num_versions + 1)]
        rows[AdapterVersion] += versions
        rows[AdapterAlias] += _aliases(adapter["id"], versions, is_split=number % 2 == 0)
        grant = {"id": new_id(), "adapter_id": adapter["id"], "tenant_id": owner["id"]}
        if number % 10 == 0:
            rows[AdapterGrant].append({**grant, "grantee_id": None})
        elif number % 10 == 1:
            rows[AdapterGrant].append({**grant, "grantee_id": rng.choice(tenants)["id"]})
    async with database.as_worker() as session:
        for table, values in {Tenant: tenants, **rows}.items():
            for first in range(0, len(values), BATCH):
                await session.execute(insert(table), values[first : first + BATCH])
    names: dict[uuid.UUID, list[str]] = {tenant["id"]: [] for tenant in tenants}
    for adapter in rows[Adapter]:
        names[adapter["tenant_id"]].append(adapter["public_name"])
    return Town([_principal(tenant) for tenant in tenants], names)


def _version(adapter_id: uuid.UUID, number: int, ours: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(f"{adapter_id} {number}".encode()).hexdigest()
    return {
        "id": new_id(),
        "adapter_id": adapter_id,
        "number": number,
        "state": "ready",
        "weights_digest": digest,
        "version_digest": digest[::-1],
        "rank": 8,
        "num_modules": 120,
        "size_bytes": 1 << 20,
        "findings": [],
        **ours,
    }


def _aliases(
    adapter_id: uuid.UUID, versions: list[dict[str, Any]], *, is_split: bool
) -> Iterator[dict[str, Any]]:
    newest = versions[-1]
    ours = {"adapter_id": adapter_id, "tenant_id": newest["tenant_id"]}
    whole = {"canary_version_id": None, "canary_percent": None}
    yield {**ours, **whole, "alias": "latest", "version_id": newest["id"]}
    if is_split and len(versions) > 1:
        canary = {"canary_version_id": newest["id"], "canary_percent": 10}
        yield {**ours, **canary, "alias": "prod", "version_id": versions[0]["id"]}


def _principal(tenant: dict[str, Any]) -> Principal:
    return Principal(
        key_id=new_id(),
        key_name="benchmark",
        tenant_id=tenant["id"],
        tenant_slug=tenant["slug"],
        cache_salt=tenant["cache_salt"],
        scopes=frozenset({"inference"}),
    )


def calls(town: Town, *, num_versions: int, rng: random.Random) -> Iterator[tuple[Principal, str]]:
    """Callers and model names, for ever."""
    everything = list(itertools.chain(*town.names.values()))
    suffixes = ["", "", "@latest", "@prod", *(f"@{n}" for n in range(1, num_versions + 1))]
    while True:
        caller = rng.choice(town.principals)
        assert caller.tenant_id is not None
        mine = everything if rng.random() < 0.1 else town.names[caller.tenant_id]
        yield caller, rng.choice(mine) + rng.choice(suffixes)


async def measure(
    call: Callable[[], Awaitable[bool]], *, num_calls: int, concurrency: int
) -> dict[str, Any]:
    """Latencies of so many calls, so many at a time. A call says whether it found something."""
    latencies_ms: list[float] = []
    found = 0
    remaining = iter(range(num_calls))

    async def work() -> None:
        nonlocal found
        for _ in remaining:
            started = time.perf_counter()
            is_found = await call()
            found += is_found
            latencies_ms.append((time.perf_counter() - started) * 1e3)

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    elapsed_s = time.perf_counter() - started
    quantiles = statistics.quantiles(latencies_ms, n=100, method="inclusive")
    return {
        "calls": num_calls,
        "concurrency": concurrency,
        "found": found,
        "p50_ms": round(quantiles[49], 3),
        "p90_ms": round(quantiles[89], 3),
        "p99_ms": round(quantiles[98], 3),
        "max_ms": round(max(latencies_ms), 3),
        "per_s": round(num_calls / elapsed_s),
    }


async def plans(database: Database, town: Town) -> dict[str, Any]:
    """Which tables that grow are read whole, by statement; and PostgreSQL's own time for it."""
    caller = town.principals[0]
    assert caller.tenant_id is not None
    bare = {
        "tenant": str(caller.tenant_id),
        "name": town.names[caller.tenant_id][0],
        "alias": None,
        "number": None,
        "bucket": 5,
        "is_versioned": False,
    }
    statements = {
        "resolve": (RESOLVE, bare),
        "resolve_number": (RESOLVE, {**bare, "number": 1, "is_versioned": True}),
        "resolve_alias": (RESOLVE, {**bare, "alias": "prod", "is_versioned": True}),
        "list_models": (LIST_MODELS, {"tenant_id": caller.tenant_id}),
    }
    told = {}
    async with database.as_tenant(caller.tenant_id) as session:
        for name, (statement, parameters) in statements.items():
            explain = text(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement.text}")
            [plan] = (await session.execute(explain, parameters)).scalar_one()
            scanned = {node["Relation Name"] for node in _nodes(plan["Plan"]) if _is_whole(node)}
            pages = text("SELECT relpages FROM pg_class WHERE oid = to_regclass(:table)")
            told[name] = {
                "sequential_scans": {
                    table: (await session.execute(pages, {"table": table})).scalar_one()
                    for table in sorted(scanned - SMALL_TABLES)
                },
                "execution_ms": plan["Execution Time"],
            }
    return told


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from _nodes(child)


def _is_whole(node: dict[str, Any]) -> bool:
    return bool(node["Node Type"] == "Seq Scan")


async def run(arguments: argparse.Namespace, postgres: EmbeddedPostgres) -> dict[str, Any]:
    passwords = {"app_password": "app", "worker_password": "worker"}
    await migrate(postgres.url, **passwords)
    app_url, worker_url = role_urls(postgres.url, **passwords)
    database = Database(app_url=app_url, worker_url=worker_url, pool_size=arguments.concurrency)
    rng = random.Random(arguments.seed)
    try:
        town = await fill(
            database,
            num_tenants=arguments.tenants,
            num_adapters=arguments.adapters,
            num_versions=arguments.versions,
            rng=rng,
        )
        await analyze(postgres.url)
        return await measure_all(arguments, database, town, rng=rng)
    finally:
        await database.close()


async def measure_all(
    arguments: argparse.Namespace, database: Database, town: Town, *, rng: random.Random
) -> dict[str, Any]:
    registry = Registry(database)
    asked = calls(town, num_versions=arguments.versions, rng=rng)

    async def resolve() -> bool:
        caller, name = next(asked)
        try:
            await registry.resolve(caller, name, user=str(rng.randrange(10_000)))
        except ModelNotFound:
            return False
        return True

    async def list_models() -> bool:
        return bool(await registry.list_models(rng.choice(town.principals)))

    # Connections, prepared statements and PostgreSQL's own caches, which a served gateway has.
    await measure(resolve, num_calls=20 * arguments.concurrency, concurrency=arguments.concurrency)
    return {
        "resolve_alone": await measure(resolve, num_calls=arguments.calls, concurrency=1),
        "resolve_together": await measure(
            resolve, num_calls=arguments.calls, concurrency=arguments.concurrency
        ),
        "list_models": await measure(
            list_models, num_calls=max(arguments.calls // 20, 2), concurrency=1
        ),
        "plans": await plans(database, town),
    }


async def analyze(owner_url: str) -> None:
    """What autovacuum does within a minute of so many rows."""
    connection = await asyncpg.connect(owner_url.replace("+asyncpg", ""))
    try:
        await connection.execute("ANALYZE")
    finally:
        await connection.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the registry.")
    parser.add_argument("--tenants", type=int, default=20)
    parser.add_argument("--adapters", type=int, default=500)
    parser.add_argument("--versions", type=int, default=4)
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    folder = Path(tempfile.mkdtemp(prefix="registry-"))
    postgres = EmbeddedPostgres(folder)
    try:
        with postgres:
            measured = asyncio.run(run(arguments, postgres))
    finally:
        # Root's is outside the folder.
        shutil.rmtree(postgres.home, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
    report = {
        "command": " ".join(["python -m benchmarks.registry", *sys.argv[1:]]),
        "commit": commit(),
        "machine": f"{platform.machine()}, {platform.python_implementation()} "
        f"{platform.python_version()}",
        "tenants": arguments.tenants,
        "adapters": arguments.adapters,
        "versions": arguments.adapters * arguments.versions,
        **measured,
    }
    written = json.dumps(report, indent=2)
    print(written)
    if arguments.output is not None:
        arguments.output.write_text(written + "\n")


if __name__ == "__main__":
    main()
