"""The load generator, against a small server that speaks the API's words."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks import serve
from benchmarks.serve import Target


@dataclass
class Server:
    """Answers each chat request with as many words as it may, and counts how many come at once."""

    port: int = 0
    seen: list[dict[str, object]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["Server"]:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        async with server:
            self.port = server.sockets[0].getsockname()[1]
            yield self

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body = json.loads(await reader.readexactly(int(fields["content-length"])))
        self.seen.append(body)
        self.keys.append(fields["authorization"])
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        await asyncio.sleep(0.01)
        self.num_open -= 1
        if body["model"] == "broken":
            writer.write(b"HTTP/1.1 429 No\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + _events(body))
        await writer.drain()
        writer.close()
        await writer.wait_closed()


def _events(body: dict[str, object]) -> bytes:
    number = int(str(body["max_tokens"]))
    chunks: list[dict[str, object]] = [{"choices": [{"delta": {"role": "assistant"}}]}]
    chunks += [{"choices": [{"delta": {"content": "word "}}]}] * number
    chunks.append({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": number}})
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([*lines, "data: [DONE]\n\n"]).encode()


async def run(tmp_path: Path, *arguments: str) -> tuple[Server, dict[str, object], int]:
    async with Server().serve() as server:
        output = tmp_path / "out.json"
        command = [*("--url", server.url, "--key", "k1", "--json", str(output)), *arguments]
        code = await asyncio.to_thread(serve.main, command)
    return server, json.loads(output.read_text()), code


async def test_all_requests_are_sent_by_so_many_clients_and_counted(tmp_path: Path) -> None:
    server, report, code = await run(
        tmp_path,
        *("--models", "a,b", "--requests", "20", "--concurrency", "4", "--max-tokens", "6"),
    )
    (measured,) = report["rounds"]
    total = measured["server"]
    assert code == 0
    assert (total["requests"], total["completion_tokens"], total["errors"]) == (20, 120, {})
    assert sum(each["requests"] for each in measured["by_model"].values()) == 20
    # Two more have warmed it up.
    assert len(server.seen) == 22
    assert server.most_open <= 4
    assert set(server.keys) == {"bearer k1"}
    assert all(body["stream_options"] == {"include_usage": True} for body in server.seen)
    assert "k1" not in json.dumps(report["settings"])


async def test_a_rate_sends_without_waiting_for_answers(tmp_path: Path) -> None:
    _, report, code = await run(
        tmp_path, *("--models", "a", "--requests", "30", "--rate", "1000", "--max-tokens", "2")
    )
    assert code == 0
    assert report["rounds"][0]["server"]["completion_tokens"] == 60


async def test_failures_are_counted_by_kind_and_show_in_the_exit_status(tmp_path: Path) -> None:
    _, report, code = await run(tmp_path, "--models", "broken", "--requests", "3")
    assert code == 1
    assert report["rounds"][0]["server"]["errors"] == {"status 429": 3}


def test_the_same_seed_draws_the_same_requests() -> None:
    targets = [Target(name, None) for name in "abc"]
    first, second, other = (
        serve.draw(targets, ["x", "y", "z"], number=50, mix="zipf:1.0", seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == second != other


def test_zipf_prefers_the_first_models() -> None:
    assert serve.weights("zipf:1.0", 4) == [1, 1 / 2, 1 / 3, 1 / 4]
    assert serve.weights("uniform", 2) == [1, 1]
    with pytest.raises(SystemExit):
        serve.weights("often", 2)


def test_percentiles_are_values_that_occurred() -> None:
    values = [n / 1000 for n in range(1, 101)]
    assert serve.percentile_ms(values, 50) == 50
    assert serve.percentile_ms(values, 99) == 99
    assert serve.percentile_ms([0.007], 99) == 7
    assert serve.percentile_ms([], 50) is None


def test_the_demos_file_names_url_models_and_keys(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    demo = {
        "base_url": "http://h/v1",
        "base_model": "base",
        "tenants": {
            "acme": {"key": "ka", "adapters": ["acme-sql"]},
            "globex": {"key": "kg", "adapters": ["globex-pirate"]},
        },
    }
    path.write_text(json.dumps(demo))
    options = serve.parse(["--demo", str(path)])
    targets = serve.read_targets(options)
    assert options.url == "http://h/v1"
    assert targets == [
        Target("acme-sql", "ka"),
        Target("globex-pirate", "kg"),
        Target("base", "ka"),
    ]
    with pytest.raises(SystemExit, match="nobody"):
        serve.read_targets(serve.parse(["--demo", str(path), "--models", "nobody"]))
