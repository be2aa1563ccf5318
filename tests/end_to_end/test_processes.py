"""Processes come up together, go down together, and come back."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from gateway.cli import main
from tests.end_to_end.conftest import (
    Server,
    children,
    command,
    descendants,
    free_port,
    remove,
    start,
    stop,
    wait_until_gone,
)

SETTLE_PATIENCE_S = 30


@dataclass(frozen=True)
class Restarted:
    """A server whose supervisor was killed, and which was started again."""

    facts_before: dict[str, Any]
    num_started: int
    outlived: set[int]
    server: Server


@pytest.fixture(scope="module")
def restarted(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("processes") / "data"
    try:
        first = start(data_dir)
        started = descendants(first.process.pid)
        first.process.kill()
        first.process.wait()
        outlived = wait_until_gone(started)
        second = start(data_dir)
        yield Restarted(first.facts, len(started), outlived, second)
        started = descendants(second.process.pid)
        assert stop(second) == 0
        assert wait_until_gone(started) == set()
    finally:
        remove(data_dir)


def test_nothing_outlives_a_killed_supervisor_and_the_next_start_recovers(restarted):
    assert restarted.num_started >= 3
    assert restarted.outlived == set()
    server = restarted.server
    assert server.facts["tenants"] == restarted.facts_before["tenants"]
    assert server.facts["admin_key"] == restarted.facts_before["admin_key"]
    with server.http(server.key("acme")) as http:
        assert "acme-sql" in http.get("/v1/models").text


def test_a_second_start_on_the_same_data_says_who_holds_it(server):
    run = _try(server.data_dir, free_port())
    assert run.returncode == 1
    assert f"in use by process {server.process.pid}" in run.stderr


def test_a_taken_port_is_told_before_anything_is_started(tmp_path):
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        port = squatter.getsockname()[1]
        run = _try(tmp_path / "data", port)
    assert run.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in run.stderr
    assert not (tmp_path / "data" / "postgres").exists()


def test_a_dead_engine_and_a_dead_gateway_are_started_again(restarted):
    server = restarted.server
    _check_that_a_stream_ends_with_an_error_when_its_engine_dies(server)
    _wait_until_ready(server)
    (gateway,) = _children(server.process.pid, "gateway")
    os.kill(gateway, signal.SIGKILL)
    assert wait_until_gone({gateway}) == set()
    _wait_until_ready(server)
    (database,) = (pid for pid in children(server.process.pid) if _is_postmaster(pid))
    os.kill(database, signal.SIGKILL)
    assert wait_until_gone({database}) == set()
    _wait_until_ready(server)
    with server.http(server.key("acme")) as http:
        assert "acme-sql" in http.get("/v1/models").text
    log = server.log.read_text()
    assert "engine: died" in log
    assert "gateway: died" in log
    assert "the embedded PostgreSQL died" in log


def _check_that_a_stream_ends_with_an_error_when_its_engine_dies(server):
    body = {
        "model": server.facts["base_model"],
        "prompt": "Once upon a time",
        "max_tokens": 2000,
        "ignore_eos": True,
        "stream": True,
    }
    with (
        server.http(server.key("acme")) as http,
        http.stream("POST", "/v1/completions", json=body) as answer,
    ):
        events = []
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                if len(events) == 5:
                    (engine,) = _children(server.process.pid, "engine")
                    os.kill(engine, signal.SIGKILL)
                    assert wait_until_gone({engine}) == set()
    assert json.loads(events[-1])["error"]["code"] == "service_unavailable"
    # The settler bills what was delivered.
    deadline = time.monotonic() + SETTLE_PATIENCE_S
    while (billed := _billed_tokens(server)) == 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert billed == len(events) - 1


def _billed_tokens(server):
    with server.http(server.key("acme")) as http:
        return http.get("/v1/usage").json()["totals"]["completion_tokens"]


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        (["--lora-modules"], "requires an argument"),
        (["--lora-modules", "sql"], "'sql' must be name=path"),
        (["--lora-modules", "a=/b", '{"name": "sql"}'], "missing required field `path`"),
        (["--lora-folder", "/no/such/folder"], "does not exist"),
        (["--api-key", "abc"], "--api-key is not supported: every tenant has keys"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size 2 is not supported"),
        (["--no-such-flag"], "No such option"),
    ],
)
def test_a_flag_that_is_not_served_is_refused_by_name(flag, hint):
    run = CliRunner().invoke(main, ["serve", "--model", "x", *flag])
    assert run.exit_code == 2
    assert hint in run.stderr


def _try(data_dir, port):
    return subprocess.run(
        command(data_dir, port), capture_output=True, text=True, check=False, timeout=120
    )


def _children(pid, module):
    """Of those that it started itself: theirs may look like them until they are something else."""
    return [child for child in children(pid) if _words(child)[1:3] == ["-m", module]]


def _is_postmaster(pid):
    words = _words(pid)
    return Path(words[0]).name == "postgres" and "-D" in words


def _words(pid):
    """Of its command line; none once it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return [""]


def _wait_until_ready(server):
    deadline = time.monotonic() + 120
    with server.http() as http:
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if http.get("/health/ready").status_code == httpx.codes.OK:
                    return
            time.sleep(0.2)
    pytest.fail("the server did not come back")
