"""How long a server takes to be there: seconds until ready, and until a first token.

    python -m benchmarks.start_up --model ~/.cache/manylora/models/SmolLM2-135M-Instruct --json FILE

Starts `manylora serve` again and again on one data directory in a temporary folder; the first start
makes the database, compiles what is compiled once and is not counted. Ready is when GET
/health/ready answers 200; right then a chat is asked, and its first token awaited. Reports medians
and ranges: of these, of how long the server then takes to end, of the CPU time of all processes,
and of when each phase began by what the server says. With --other FOLDER another checkout takes
turns with this one.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from benchmarks import provenance
from gateway.embedded import EmbeddedPostgres

HERE = Path(__file__).resolve().parent.parent
POLL_INTERVAL_S = 0.01
PATIENCE_S = 300.0
# How the lines begin with which the processes tell that a phase begins.
PHASES = {
    "engine starts": "manylora  engine: starting",
    "database starts": "manylora  database: starting",
    "migrations": "manylora  database: migrating",
    "gateway starts": "manylora  gateway: starting",
    "engine has its imports": "engine  exporting",
    "engine loads": "engine  loading",
    "engine has loaded": "engine  loaded",
    "engine answers": "engine  ready",
    "all said": "manylora  ready",
}


@dataclass(slots=True)
class Start:
    """Seconds since the command; the CPU time is that of all its processes, to their end."""

    ready_s: float = 0.0
    first_token_s: float = 0.0
    # From the signal until all have ended
    stop_s: float = 0.0
    cpu_s: float = 0.0
    phases_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkout:
    """One version of the code, with a data directory of its own."""

    name: str
    folder: Path
    data_dir: Path


def start(checkout: Checkout, model: Path) -> Start:
    """Start a server, ask it, and end it."""
    found, port = Start(), _free_port()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with _server(checkout, model, port, found) as (process, began_s):
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
            while not _is_ready(client):
                if process.poll() is not None or time.perf_counter() - began_s > PATIENCE_S:
                    raise SystemExit(f"The server of {checkout.folder} did not start.")
                time.sleep(POLL_INTERVAL_S)
            found.ready_s = time.perf_counter() - began_s
            _await_first_token(client, model.name, _key(client, checkout.data_dir))
            found.first_token_s = time.perf_counter() - began_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found.cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return found


@contextmanager
def _server(
    checkout: Checkout, model: Path, port: int, found: Start
) -> Iterator[tuple["subprocess.Popen[str]", float]]:
    command = [sys.executable, "-m", "gateway.cli", "serve", "--model", str(model)]
    command += ["--port", str(port), "--data-dir", str(checkout.data_dir)]
    # As an installation has them.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    began_s = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=checkout.folder, env=environment, stderr=subprocess.PIPE, text=True
    )

    def listen() -> None:
        for line in process.stderr or ():
            for phase, beginning in PHASES.items():
                if line.startswith(beginning):
                    found.phases_s[phase] = time.perf_counter() - began_s

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield process, began_s
    finally:
        told_s = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
        found.stop_s = time.perf_counter() - told_s
        listener.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/health/ready").is_success
    except httpx.TransportError:
        return False


def _key(client: httpx.Client, data_dir: Path) -> str:
    """A tenant's, made at the first start and kept."""
    kept = data_dir / "benchmark.key"
    if not kept.exists():
        operator = (data_dir / "operator.key").read_text().strip()
        headers = {"authorization": f"Bearer {operator}"}
        client.post("/admin/v1/tenants", json={"slug": "acme"}, headers=headers).raise_for_status()
        made = client.post(
            "/admin/v1/tenants/acme/keys", json={"name": "benchmark"}, headers=headers
        )
        kept.write_text(made.raise_for_status().json()["key"])
    return kept.read_text()


def _await_first_token(client: httpx.Client, model: str, key: str) -> None:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "stream": True,
        "max_tokens": 4,
    }
    headers = {"authorization": f"Bearer {key}"}
    with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line.removeprefix("data: "))["choices"]
                if choices and choices[0]["delta"].get("content"):
                    return
    raise SystemExit("The answer had no token.")


# Telling


def _report(checkout: Checkout, starts: Sequence[Start]) -> dict[str, object]:
    columns = {
        "ready": [each.ready_s for each in starts],
        "first token": [each.first_token_s for each in starts],
        "stop": [each.stop_s for each in starts],
        "CPU time": [each.cpu_s for each in starts],
    }
    phases = [phase for phase in PHASES if all(phase in each.phases_s for each in starts)]
    columns |= {phase: [each.phases_s[phase] for each in starts] for phase in phases}
    print(f"\n{checkout.name}, {len(starts)} starts, seconds: median (range)")
    for name, values in columns.items():
        print(f"{name:24}{statistics.median(values):7.2f}  {min(values):.2f} to {max(values):.2f}")
    return {
        "medians_s": {
            name: round(statistics.median(values), 2) for name, values in columns.items()
        },
        "starts": [asdict(each) for each in starts],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--starts", type=int, default=7)
    parser.add_argument("--other", type=Path, help="a checkout to compare with")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"commit {provenance.commit()}, Python {platform.python_version()}", end=", ")
    print(f"{platform.machine()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"this": HERE} | ({"other": args.other.resolve()} if args.other else {})
        checkouts = [Checkout(name, at, Path(scratch, name)) for name, at in folders.items()]
        starts: dict[str, list[Start]] = {each.name: [] for each in checkouts}
        for number in range(args.starts + 1):
            for each in checkouts:
                done = start(each, args.model.expanduser().resolve())
                if number:
                    starts[each.name].append(done)
        for each in checkouts:
            # Root's clusters are outside of the data directories.
            shutil.rmtree(EmbeddedPostgres(each.data_dir).home)
        reports = {each.name: _report(each, starts[each.name]) for each in checkouts}
    if args.json:
        about = {"commit": provenance.commit(), "model": args.model.name, "cores": os.cpu_count()}
        args.json.write_text(json.dumps(about | reports, indent=2) + "\n")


if __name__ == "__main__":
    main()
