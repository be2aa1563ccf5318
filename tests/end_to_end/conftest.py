"""A whole Manylora, started as an operator starts it, on a real model."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapters.demo.base_model import default_folder
from gateway.embedded import EmbeddedPostgres

START_PATIENCE_S = 300


@dataclass(frozen=True)
class Server:
    """A running demo and what its demo.json says."""

    process: subprocess.Popen[bytes]
    data_dir: Path
    log: Path
    facts: dict[str, Any]

    @property
    def url(self) -> str:
        return str(self.facts["base_url"]).removesuffix("/v1")

    def key(self, tenant: str) -> str:
        return str(self.facts["tenants"][tenant]["key"])

    def client(self, tenant: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=self.facts["base_url"], api_key=self.key(tenant), max_retries=0
        )

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, trust_env=False)

    def operator(self) -> httpx.Client:
        return self.http(str(self.facts["admin_key"]))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(data_dir: Path, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "gateway.cli", "demo"),
        *("--model", str(default_folder())),
        *("--data-dir", str(data_dir), "--port", str(port)),
    ]


def start(data_dir: Path, *, port: int | None = None) -> Server:
    """Start the demo and wait until its facts are written."""
    log = data_dir.with_suffix(".log")
    facts = data_dir / "demo.json"
    written_before = facts.stat().st_mtime_ns if facts.exists() else 0
    with log.open("ab") as output:
        process = subprocess.Popen(
            command(data_dir, port or free_port()), stdout=output, stderr=output
        )
    deadline = time.monotonic() + START_PATIENCE_S
    while not facts.exists() or facts.stat().st_mtime_ns == written_before:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the demo did not start:\n{log.read_text()[-5000:]}")
        time.sleep(0.1)
    return Server(process, data_dir, log, json.loads(facts.read_text()))


def stop(server: Server) -> int:
    """End the demo as Ctrl-C does; return its exit status."""
    server.process.send_signal(signal.SIGINT)
    return server.process.wait(timeout=60)


def remove(data_dir: Path) -> None:
    """Root's clusters live outside the data directory."""
    home = EmbeddedPostgres(data_dir).home
    if data_dir not in home.parents:
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data_dir = tmp_path_factory.mktemp("demo") / "data"
    running = start(data_dir)
    try:
        yield running
    finally:
        status = stop(running)
        remove(data_dir)
        assert status == 0, running.log.read_text()[-5000:]


def children(pid: int) -> list[int]:
    """Those that it started itself."""
    return _families().get(pid, [])


def descendants(pid: int) -> set[int]:
    """All living processes below one."""
    families = _families()
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        new = families.get(waiting.pop(), [])
        found.update(new)
        waiting.extend(new)
    return found


def _families() -> dict[int, list[int]]:
    """Parents and their children. Who ends while they are counted is left out."""
    families: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                families.setdefault(int(fields[1]), []).append(int(entry.name))
    return families


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    return False


def wait_until_gone(pids: set[int], *, patience_s: float = 30) -> set[int]:
    """Return those that are still there after a while."""
    deadline = time.monotonic() + patience_s
    while (alive := {pid for pid in pids if is_alive(pid)}) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive


def is_root() -> bool:
    return os.geteuid() == 0
