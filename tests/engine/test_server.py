"""What the engine answers to calls as they come over the wire, good and bad."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import msgspec
import pytest

from engine.errors import ConfigurationError
from engine.protocol import (
    FRAME_LENGTH,
    MAX_BODY_BYTES,
    Abort,
    CommandBatch,
    EngineProblem,
    Frame,
    PinRequest,
    SequenceState,
    Submit,
    WarmRequest,
)
from engine.server import bind
from engine.sessions import LinkLimits
from tests.engine.echo_engine import Engine, engine, greedy, short_folder, until


@pytest.fixture
async def folder() -> AsyncIterator[Path]:
    async with short_folder() as path:
        yield path


@pytest.fixture
async def echo(folder: Path) -> AsyncIterator[Engine]:
    async with engine(folder / "engine.sock") as served:
        yield served


@asynccontextmanager
async def client(served: Engine, **settings: object) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.AsyncHTTPTransport(uds=str(served.path))
    async with httpx.AsyncClient(
        transport=transport,
        base_url="http://engine",
        **settings,  # type: ignore[arg-type]  # any setting
    ) as made:
        yield made


class Reading:
    """One connection to /v1/frames."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self._chunks = response.aiter_raw()
        self._buffer = b""

    async def frame(self) -> Frame | None:
        """The next one, heartbeats included; None at the end."""
        while True:
            if len(self._buffer) >= FRAME_LENGTH.size:
                (size,) = FRAME_LENGTH.unpack_from(self._buffer)
                body = self._buffer[FRAME_LENGTH.size :][:size]
                if len(body) == size:
                    self._buffer = self._buffer[FRAME_LENGTH.size + size :]
                    return msgspec.msgpack.decode(body, type=Frame)
            chunk = await anext(self._chunks, None)
            if chunk is None:
                return None
            self._buffer += chunk

    async def news(self) -> Frame | None:
        """The next frame that has events; None at the end."""
        while (frame := await self.frame()) is not None and not frame.events:
            pass
        return frame


@asynccontextmanager
async def reading(
    http: httpx.AsyncClient, *, epoch: int = 1, after: int = 0, resume: int = 0
) -> AsyncIterator[Reading]:
    query = {"worker": "w", "epoch": epoch, "after": after, "resume": resume}
    async with http.stream("GET", "/v1/frames", params=query) as response:
        yield Reading(response)


async def step(echo: Engine, frames: Reading) -> Frame | None:
    """One step of the core, and the frame that tells of it."""
    echo.core.allow_steps(1)
    return await frames.news()


def batch(*commands: Submit | Abort, epoch: int = 1, acknowledged: int = 0) -> bytes:
    return msgspec.msgpack.encode(CommandBatch("w", epoch, acknowledged, list(commands)))


def submit(sequence_id: int, *, max_tokens: int) -> Submit:
    return Submit(
        sequence_id=sequence_id, prompt_token_ids=[sequence_id], sampling=greedy(max_tokens)
    )


def problem(response: httpx.Response) -> str:
    return msgspec.msgpack.decode(response.content, type=EngineProblem).code


async def test_malformed_batches_are_refused_and_change_nothing(echo: Engine) -> None:
    good = msgspec.msgpack.decode(batch(submit(1, max_tokens=5)))
    first = good["commands"][0]
    broken = [
        b"",
        b"\xc1",
        batch(submit(1, max_tokens=5))[:-1],
        msgspec.msgpack.encode(["w", 1, 0, []]),
        msgspec.msgpack.encode({**good, "extra": 1}),
        msgspec.msgpack.encode({**good, "commands": [first, {**first, "surprise": 1}]}),
        msgspec.msgpack.encode({**good, "commands": [first, {"type": "reset"}]}),
        msgspec.msgpack.encode({**good, "commands": [{**first, "prompt_token_ids": ["one"]}]}),
        b"\x91" * 5000,
    ]
    async with client(echo) as http, reading(http):
        for body in broken:
            response = await http.post("/v1/commands", content=body)
            assert (response.status_code, problem(response)) == (400, "malformed"), body[:40]
        assert echo.core.seen == []


async def test_a_refusal_names_the_field(echo: Engine) -> None:
    body = msgspec.msgpack.encode({"adapter_digest": "ab" * 32, "fast": True})
    async with client(echo) as http:
        response = await http.post("/v1/probe", content=body)
    assert b"fast" in response.content


async def test_an_adapter_is_refused_by_the_reason_for_which_it_cannot_come(echo: Engine) -> None:
    echo.core.missing.add("none")
    async with client(echo) as http:
        body = msgspec.msgpack.encode(WarmRequest(adapter_digest="none"))
        response = await http.post("/v1/warm", content=body)
        assert (response.status_code, problem(response)) == (422, "adapter_unavailable")
        for number in range(4):
            body = msgspec.msgpack.encode(PinRequest(adapter_digest=f"a{number}"))
            response = await http.post("/v1/pin", content=body)
        assert (response.status_code, problem(response)) == (409, "too_many_pins")
        for path in ("warm", "pin", "unpin", "forget"):
            response = await http.post(f"/v1/{path}", content=msgspec.msgpack.encode({}))
            assert (response.status_code, problem(response)) == (400, "malformed")


async def test_a_body_that_is_too_large_is_refused(echo: Engine) -> None:
    async with client(echo) as http:
        response = await http.post("/v1/commands", content=b"\0" * (MAX_BODY_BYTES + 1))
    assert response.status_code == 413


async def test_commands_need_a_session_of_the_same_epoch(echo: Engine) -> None:
    async with client(echo) as http:
        response = await http.post("/v1/commands", content=batch())
        assert (response.status_code, problem(response)) == (409, "not_connected")
        async with reading(http, epoch=5):
            response = await http.post("/v1/commands", content=batch(epoch=6))
            assert problem(response) == "not_connected"
            response = await http.post("/v1/commands", content=batch(epoch=4))
            assert problem(response) == "stale_epoch"
            response = await http.post("/v1/commands", content=batch(epoch=5))
            assert response.status_code == 204


@pytest.mark.parametrize(
    "query",
    [
        {"epoch": 1, "after": 0, "resume": 0},
        {"worker": "w", "epoch": "first", "after": 0, "resume": 0},
        {"worker": "w", "epoch": 1, "after": -1, "resume": 0},
        {"worker": "w", "epoch": 1, "after": 0},
        {"worker": "w", "epoch": 1, "after": "9" * 40, "resume": 0},
    ],
)
async def test_frames_need_a_whole_query(echo: Engine, query: dict[str, str | int]) -> None:
    async with client(echo) as http:
        response = await http.get("/v1/frames", params=query)
    assert (response.status_code, problem(response)) == (400, "malformed")


async def test_unknown_frames_cannot_be_resumed(echo: Engine) -> None:
    async with client(echo) as http:
        query = {"worker": "w", "epoch": 1, "after": 3, "resume": 1}
        response = await http.get("/v1/frames", params=query)
        assert (response.status_code, problem(response)) == (410, "frames_gone")
        async with reading(http, after=3) as begun:
            await http.post("/v1/commands", content=batch(submit(1, max_tokens=1)))
            frame = await begun.news()
            assert frame is not None
            assert frame.number == 4
        async with reading(http, after=9, resume=1) as ahead:
            assert ahead.status == 410


async def test_an_older_epoch_cannot_read(echo: Engine) -> None:
    async with client(echo) as http, reading(http, epoch=2), reading(http, epoch=1) as old:
        assert old.status == 409


async def test_a_second_connection_takes_over_and_the_first_ends(echo: Engine) -> None:
    echo.core.allow_steps(0)
    async with client(echo) as http, reading(http) as first:
        await http.post("/v1/commands", content=batch(submit(1, max_tokens=4)))
        seen = [await step(echo, first), await step(echo, first)]
        async with reading(http, after=1, resume=1) as second:
            assert await first.news() is None
            assert await second.news() == seen[1]
            frames = [await step(echo, second), await step(echo, second)]
            assert [frame.number for frame in frames if frame] == [3, 4]


async def test_frames_stay_until_they_are_acknowledged(echo: Engine) -> None:
    echo.core.allow_steps(0)
    async with client(echo) as http:
        async with reading(http) as first:
            await http.post("/v1/commands", content=batch(submit(1, max_tokens=3)))
            frames = [await step(echo, first) for _ in range(3)]
        async with reading(http, resume=1) as again:
            assert [await again.news() for _ in range(3)] == frames
            await http.post("/v1/commands", content=batch(acknowledged=2))
        async with reading(http, after=1, resume=1) as late:
            assert late.status == 410
        async with reading(http, after=2, resume=1) as rest:
            assert await rest.news() == frames[2]


async def test_a_silent_connection_beats(folder: Path) -> None:
    limits = LinkLimits(heartbeat_s=0.01)
    async with (
        engine(folder / "engine.sock", limits=limits) as echo,
        client(echo) as http,
        reading(http) as idle,
    ):
        beats = [await idle.frame() for _ in range(3)]
    assert beats == [Frame(0, echo.info.engine_epoch, [])] * 3


async def test_a_connected_worker_that_never_acknowledges_is_given_up(folder: Path) -> None:
    limits = LinkLimits(max_silence_s=0.1, heartbeat_s=0.02)
    async with (
        engine(folder / "engine.sock", limits=limits) as echo,
        client(echo) as http,
        reading(http) as mute,
    ):
        await http.post("/v1/commands", content=batch(submit(1, max_tokens=10**6)))
        while await mute.frame() is not None:
            pass
        await until(lambda: not echo.core.running)


async def test_an_idle_worker_is_not_given_up(folder: Path) -> None:
    limits = LinkLimits(max_silence_s=0.1, heartbeat_s=0.05)
    async with (
        engine(folder / "engine.sock", limits=limits) as echo,
        client(echo) as http,
        reading(http) as idle,
    ):
        for _ in range(30):
            assert await idle.frame() is not None


async def test_a_new_session_of_the_same_epoch_aborts_what_the_old_one_ran(echo: Engine) -> None:
    async with client(echo) as http:
        async with reading(http):
            await http.post("/v1/commands", content=batch(submit(1, max_tokens=10**6)))
            await until(lambda: bool(echo.core.running))
        async with reading(http):
            await until(lambda: not echo.core.running)


async def test_everything_but_health_needs_the_secret(folder: Path) -> None:
    async with engine(folder / "engine.sock", secret="hush") as echo, client(echo) as http:
        assert (await http.get("/health")).text == "ok"
        for path in ("/metrics", "/v1/info", "/v1/status", "/v1/frames"):
            response = await http.get(path)
            assert (response.status_code, problem(response)) == (401, "secret_mismatch"), path
        for path in ("/v1/commands", "/v1/probe", "/v1/warm", "/v1/pin", "/v1/unpin", "/v1/forget"):
            assert (await http.post(path, content=batch())).status_code == 401, path
        authorized = await http.get("/v1/info", headers={"authorization": "Bearer hush"})
        assert authorized.status_code == 200


async def test_health_fails_when_the_core_has_failed(echo: Engine) -> None:
    async with client(echo) as http, reading(http) as idle:
        assert (await http.get("/health")).status_code == 200
        echo.core.must_fail = True
        echo.core.wake()
        while await idle.frame() is not None:
            pass
        # When it is gone already, that is as unhealthy.
        with suppress(httpx.TransportError):
            assert (await http.get("/health")).status_code == 503


async def test_metrics_count_what_was_done(echo: Engine) -> None:
    async with client(echo) as http, reading(http) as frames:
        await http.post("/v1/commands", content=batch(submit(1, max_tokens=3)))
        while (frame := await frames.news()) and frame.events[-1].state is SequenceState.RUNNING:
            pass
        lines = (await http.get("/metrics")).text.splitlines()
    assert "manylora_engine_generated_tokens_total 3" in lines
    assert 'manylora_engine_finished_sequences_total{state="length"} 1' in lines
    for line in (
        "resident_adapters 1",
        "hosted_adapters 2",
        "pinned_adapters 0",
        "quarantined_adapters 1",
        "adapter_wait_seconds_total 0.25",
        "adapter_reads_total 2",
        "adapter_read_bytes_total 2048",
        "adapter_copies_total 3",
        "adapter_copied_bytes_total 3072",
        "adapter_load_failures_total 1",
        "adapter_fingerprint_mismatches_total 6",
        'adapter_evictions_total{tier="slot"} 4',
        'adapter_evictions_total{tier="host"} 5',
        'adapter_tier_bytes{tier="disk"} 4096',
        'adapter_tier_bytes{tier="host"} 2048',
        'adapter_tier_bytes{tier="device"} 1024',
    ):
        assert f"manylora_engine_{line}" in lines


async def test_an_unknown_route_is_404(echo: Engine) -> None:
    async with client(echo) as http:
        assert (await http.get("/v1/nothing")).status_code == 404


async def test_a_socket_that_is_left_over_is_taken_and_one_in_use_is_not(folder: Path) -> None:
    path = folder / "engine.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    async with engine(path):
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(ConfigurationError, match="Another process listens"):
            bind(f"unix:{path}").__enter__()
    assert not path.exists()


@pytest.mark.parametrize(
    "address",
    ["engine.sock", "unix:", "http://127.0.0.1", "https://127.0.0.1:1", "http://a:port", "x:1"],
)
def test_an_address_that_makes_no_sense_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError), bind(address):
        pass


def test_a_path_that_is_no_socket_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ConfigurationError, match="not a socket"), bind(f"unix:{path}"):
        pass
    assert path.read_text() == "data"
