"""What the runner may ask of a peer, and the two kinds of running ones.

A peer is a server on a local port, or a program that answers on its standard streams because the
library it uses has no server. Knows nothing of any one peer.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
from tokenizers import Tokenizer

from benchmarks.peers import load
from benchmarks.peers.scene import Ask, Scene, cache_folder
from benchmarks.peers.watch import memory_bytes
from benchmarks.serve import Answer

PATIENCE_S, END_PATIENCE_S = 600, 20
LOOK_EVERY_S = 0.2
FOREIGN = Path(__file__).parent / "foreign"


class PeerFailed(Exception):
    """A peer could not be installed, did not start, or ended."""


class Running(Protocol):
    """A peer that has started."""

    @property
    def child(self) -> "Child":
        """The process from which all the peer's processes come."""

    def answer(self, asks: Sequence[Ask], *, concurrency: int, new_tokens: int) -> list[Answer]: ...


class Peer(Protocol):
    name: str
    # How readers know it, with what precision it computes.
    title: str
    # "fp32", or what its weights are rounded to.
    precision: str

    def install(self) -> None:
        """Everything it needs, in a folder of its own; nothing where that is there."""

    def versions(self) -> dict[str, str]: ...

    def serves(self, scene: Scene) -> bool:
        """Whether it claims to serve such a scene at all."""

    def start(self, scene: Scene) -> contextlib.AbstractContextManager[Running]:
        """Ready to answer; raises PeerFailed."""


# Where a peer lives


@dataclass(frozen=True, slots=True)
class Home:
    """A folder with a virtual environment and whatever else a peer keeps."""

    name: str

    @property
    def folder(self) -> Path:
        return cache_folder() / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def install(self, recipe: Sequence[Sequence[str]], *, mark: str = "installed") -> None:
        """One call of pip for each line of the recipe, once."""
        if (self.folder / mark).exists():
            return
        if not self.python.exists():
            self.run(sys.executable, "-m", "venv", str(self.folder))
            self.run(str(self.python), "-m", "pip", "install", "--upgrade", "pip")
        for arguments in recipe:
            self.run(str(self.python), "-m", "pip", "install", *arguments)
        (self.folder / mark).touch()

    def run(self, *command: str, **environment: str) -> str:
        """What it printed. Raises PeerFailed with the end of that."""
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise PeerFailed(f"{' '.join(command)}:\n{done.stdout[-3000:]}")
        return done.stdout

    def versions(self, *packages: str) -> dict[str, str]:
        program = (
            "import sys, json, importlib.metadata as m;"
            "print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
        )
        found: dict[str, str] = json.loads(self.run(str(self.python), "-c", program, *packages))
        return found


# Processes


class Child:
    """A peer's process, its log, and what it took to start."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        is_asked_by_pipe: bool = False,
    ) -> None:
        pipe = subprocess.PIPE if is_asked_by_pipe else None
        self._log = log
        self.most_bytes = 0
        self._started_s = time.monotonic()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **(environment or {})},
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._started_s

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        while not is_ready():
            if self.process.poll() is not None or self.age_s > PATIENCE_S:
                raise PeerFailed(f"did not start:\n{self.tail()}")
            self.look()
            time.sleep(LOOK_EVERY_S)

    def look(self) -> None:
        self.most_bytes = max(self.most_bytes, memory_bytes(self.pid))

    def tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def end(self) -> None:
        """In order; by force where that takes too long, and with whatever it left behind."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_PATIENCE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@dataclass(frozen=True, slots=True)
class HttpRunning:
    """A server that streams the OpenAI API's completions."""

    child: Child
    base_url: str
    # The request's body, and headers, for an ask and a number of tokens.
    compose: Callable[[Ask, int], load.HttpRequest]

    def answer(self, asks: Sequence[Ask], *, concurrency: int, new_tokens: int) -> list[Answer]:
        requests = [self.compose(ask, new_tokens) for ask in asks]
        return load.answers(self.base_url, requests, concurrency=concurrency)


@dataclass(frozen=True, slots=True)
class PipeRunning:
    """A program that answers lists of asks, a JSON line for a JSON line."""

    child: Child
    tokenizer: Tokenizer

    def answer(self, asks: Sequence[Ask], *, concurrency: int, new_tokens: int) -> list[Answer]:
        question = {
            "asks": [{"prompt": ask.prompt.token_ids, "adapter": ask.adapter} for ask in asks],
            "concurrency": concurrency,
            "new_tokens": new_tokens,
        }
        return [
            Answer(
                model=str(ask.adapter),
                arrivals_s=each["arrivals_s"],
                total_s=each["arrivals_s"][-1],
                prompt_tokens=len(ask.prompt.token_ids),
                completion_tokens=len(each["token_ids"]),
                text=self.tokenizer.decode(each["token_ids"], skip_special_tokens=True),
            )
            for ask, each in zip(asks, self.say(question)["answers"], strict=True)
        ]

    def say(self, question: object) -> dict[str, Any]:
        streams = self.child.process
        assert streams.stdin is not None
        assert streams.stdout is not None
        streams.stdin.write(json.dumps(question).encode() + b"\n")
        streams.stdin.flush()
        line = streams.stdout.readline()
        if not line:
            raise PeerFailed(f"ended while it was asked:\n{self.child.tail()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def http_server(
    command: Sequence[str],
    port: int,
    compose: Callable[[Ask, int], load.HttpRequest],
    *,
    log: Path,
    health: str = "/health",
    environment: Mapping[str, str] | None = None,
) -> Iterator[HttpRunning]:
    child = Child(command, log=log, environment=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        child.wait_until(lambda: is_healthy(url + health))
        yield HttpRunning(child, url, compose)
    finally:
        child.end()


@contextlib.contextmanager
def program(command: Sequence[str], model: Path, *, log: Path) -> Iterator[PipeRunning]:
    """`model` is where the tokenizer is."""
    child = Child(command, log=log, is_asked_by_pipe=True)
    spoken = child.process.stdout
    assert spoken is not None
    try:
        # Its first line says that it is ready.
        child.wait_until(lambda: bool(select.select([spoken], [], [], 0)[0]))
        if not spoken.readline():
            raise PeerFailed(f"did not start:\n{child.tail()}")
        yield PipeRunning(child, Tokenizer.from_file(str(model / "tokenizer.json")))
    finally:
        child.end()


def is_healthy(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, timeout=5, trust_env=False).is_success
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
