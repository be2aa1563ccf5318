"""A whole server with far more adapters than slots.

    python -m benchmarks.many_adapters --model FOLDER [--adapters 500] [--output FILE]

Starts `manylora serve` with a PostgreSQL of its own and `--max-loras 8`, and removes both. Tenants
share the adapters evenly; every one comes in through the REST API, is probed and published like
anybody's. Then clients ask for adapters drawn by Zipf, each tenant with its own key, and each
request of a model gets one of a few prompts, greedily.

What is counted: requests that failed (there may be none), and answers that differ from what the
same model said to the same prompt elsewhere in the run. A few models are asked again when nothing
else runs, which must change neither the answer nor the digest that is named with it.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import save

from benchmarks.serve import Answer, Request, Target, ask, draw, in_turn, machine, summarise
from gateway.embedded import EmbeddedPostgres

PROMPTS = ["Tell me about the sea.", "Count to five.", "What is a lighthouse for?"]
START_PATIENCE_S = 300
TIMEOUT_S = 600
# Hidden size and output sizes of the model's attention, and the layers that the adapters change.
HIDDEN, OUTPUTS = 576, {"q_proj": 576, "v_proj": 192}
LAYERS = range(20, 30)
RANK = 2
NUM_ASKED_AGAIN = 20


@dataclass(frozen=True, slots=True)
class Made:
    """A model that can be called, by whom, and the digest of its newest version."""

    target: Target
    digest: str


def adapter_files(seed: int) -> list[tuple[str, tuple[str, bytes]]]:
    """An adapter with random weights, different for each seed, strong enough to change answers."""
    noise = np.random.default_rng(seed)
    tensors = {}
    for layer, (module, size) in itertools.product(LAYERS, OUTPUTS.items()):
        place = f"base_model.model.model.layers.{layer}.self_attn.{module}"
        down = noise.standard_normal((RANK, HIDDEN), dtype=np.float32) * HIDDEN**-0.5
        up = noise.standard_normal((size, RANK), dtype=np.float32) * 0.5
        tensors |= {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": up}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted(OUTPUTS),
        "layers_to_transform": list(LAYERS),
    }
    contents = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(tensors),
    }
    return [("files", item) for item in contents.items()]


def start(options: argparse.Namespace, folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "gateway.cli", "serve", "--model", str(options.model)),
            *("--data-dir", str(folder / "data"), "--port", str(port)),
            *("--max-loras", str(options.slots)),
        ]
    )
    return process, f"http://127.0.0.1:{port}"


@contextlib.asynccontextmanager
async def server(options: argparse.Namespace, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """The operator's client of a new server."""
    process, url = start(options, folder)
    try:
        await until_ready(url, process)
        key = (folder / "data" / "operator.key").read_text().strip()
        headers = {"authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(
            base_url=url, headers=headers, timeout=TIMEOUT_S, trust_env=False
        ) as operator:
            yield operator
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


async def until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_PATIENCE_S
    async with httpx.AsyncClient(trust_env=False) as client:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(f"{url}/health/ready")).is_success:
                    return
            await asyncio.sleep(0.2)
    raise SystemExit("the server did not start")


async def publish(operator: httpx.AsyncClient, options: argparse.Namespace) -> list[Made]:
    """All adapters with all their versions, a few uploads at a time."""
    tenants = [f"t{number}" for number in range(options.tenants)]
    keys = {tenant: await make_tenant(operator, tenant) for tenant in tenants}
    waiting = iter(range(options.adapters))
    made: dict[int, Made] = {}

    async def upload_in_turn() -> None:
        for number in waiting:
            tenant = tenants[number % len(tenants)]
            path = f"/admin/v1/tenants/{tenant}/adapters/a{number}/versions"
            version: dict[str, Any] = {}
            for each in range(options.versions):
                files = adapter_files(number * options.versions + each)
                version = read(await operator.post(path, files=files))
            model = f"{tenant}-a{number}"
            made[number] = Made(Target(model, keys[tenant]), version["version_digest"])

    async with asyncio.TaskGroup() as uploads:
        for _ in range(4):
            uploads.create_task(upload_in_turn())
    return [made[number] for number in range(options.adapters)]


async def make_tenant(operator: httpx.AsyncClient, tenant: str) -> str:
    read(await operator.post("/admin/v1/tenants", json={"slug": tenant, "name": tenant}))
    answer = await operator.post(f"/admin/v1/tenants/{tenant}/keys", json={"name": "benchmark"})
    return str(read(answer)["key"])


def read(answer: httpx.Response) -> dict[str, Any]:
    if answer.is_error:
        raise SystemExit(f"{answer.request.url}: {answer.status_code} {answer.text}")
    content: dict[str, Any] = answer.json()
    return content


async def measure(
    operator: httpx.AsyncClient, made: Sequence[Made], options: argparse.Namespace
) -> dict[str, Any]:
    targets = [each.target for each in made]
    requests = draw(targets, PROMPTS, number=options.requests, mix=options.mix, seed=options.seed)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=f"{operator.base_url}/v1/", limits=limits, timeout=TIMEOUT_S, trust_env=False
    ) as http:

        async def ask_one(request: Request) -> Answer:
            return await ask(http, request, max_tokens=options.max_tokens)

        started_s = time.perf_counter()
        answers = await in_turn(requests, ask_one, concurrency=options.concurrency)
        wall_s = time.perf_counter() - started_s
        said = texts(requests, answers)
        chosen = list(said)[:: max(len(said) // NUM_ASKED_AGAIN, 1)][:NUM_ASKED_AGAIN]
        again = {pair: await ask_one(request_of(pair, targets)) for pair in chosen}
    wrong = sum(again[pair].text not in said[pair] for pair in chosen)
    return {
        "asked": len({request.target.model for request in requests}),
        **asdict(summarise(answers, wall_s)),
        "said_twice_and_differently": sum(len(found) > 1 for found in said.values()),
        "asked_again_alone": len(chosen),
        "alone_and_different": wrong,
        "wrong_digests": await count_wrong_digests(operator, made, options),
        "distinct_answers": len(set().union(*said.values())),
        "distinct_questions": len(said),
    }


def texts(
    requests: Sequence[Request], answers: Sequence[Answer]
) -> dict[tuple[str, str], set[str]]:
    """What was said to each (model, prompt)."""
    said: dict[tuple[str, str], set[str]] = defaultdict(set)
    for request, answer in zip(requests, answers, strict=True):
        if answer.error is None:
            said[request.target.model, request.prompt].add(answer.text)
    return said


def request_of(pair: tuple[str, str], targets: Sequence[Target]) -> Request:
    (target,) = (target for target in targets if target.model == pair[0])
    return Request(target, pair[1])


async def count_wrong_digests(
    operator: httpx.AsyncClient, made: Sequence[Made], options: argparse.Namespace
) -> int:
    """Of a few adapters from all over the list, those that are not served by what was uploaded."""
    num_wrong = 0
    for each in made[:: max(len(made) // NUM_ASKED_AGAIN, 1)]:
        answer = await operator.post(
            "/v1/chat/completions",
            json={
                "model": each.target.model,
                "messages": [{"role": "user", "content": PROMPTS[0]}],
                "max_tokens": 1,
            },
            headers={"authorization": f"Bearer {each.target.key}"},
        )
        num_wrong += answer.headers.get("x-adapter-digest") != each.digest
    return num_wrong


async def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    async with server(options, folder) as operator:
        started_s = time.perf_counter()
        made = await publish(operator, options)
        uploads_s = time.perf_counter() - started_s
        return {
            "slots": options.slots,
            "versions": options.adapters * options.versions,
            "uploads_per_s": round(options.adapters * options.versions / uploads_s, 2),
            **await measure(operator, made, options),
        }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve far more adapters than there are slots.")
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--tenants", type=int, default=10)
    parser.add_argument("--adapters", type=int, default=500)
    parser.add_argument("--versions", type=int, default=1)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--mix", default="zipf:1.0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> int:
    options = parse()
    folder = Path(tempfile.mkdtemp(prefix="many-"))
    try:
        measured = asyncio.run(run(options, folder))
    finally:
        # Root's cluster is outside the folder.
        shutil.rmtree(EmbeddedPostgres(folder / "data").home, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
    shown = {**vars(options), "model": options.model.name, "output": None}
    report = json.dumps({"machine": machine(), "settings": shown, **measured}, indent=1)
    print(report)
    if options.output is not None:
        options.output.write_text(report + "\n")
    failures = ("errors", "said_twice_and_differently", "alone_and_different", "wrong_digests")
    return int(any(measured[name] for name in failures))


if __name__ == "__main__":
    sys.exit(main())
