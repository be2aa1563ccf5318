"""The load generator takes no answer's word for anything."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from benchmarks.stream_load import Caller, Generator, Load, Outcome

HEAD = "HTTP/1.1 200 OK\r\nx-ratelimit-remaining-tokens: 1\r\ntransfer-encoding: chunked\r\n\r\n"


def events(*texts: str, counted: int, done: str = "data: [DONE]\n\n") -> str:
    chunks = [{"choices": [{"delta": {"content": text}}]} for text in texts]
    usage = {"prompt_tokens": 7, "completion_tokens": counted}
    told = [*chunks, {"choices": [], "usage": usage}]
    return "".join(f"data: {json.dumps(each)}\n\n" for each in told) + done


@asynccontextmanager
async def answering(body: str) -> AsyncIterator[int]:
    """The port of a server that says this to everybody, each event in a piece of its own."""
    pieces = [f"{event}\n\n" for event in body.split("\n\n") if event]
    chunked = "".join(f"{len(piece):x}\r\n{piece}\r\n" for piece in pieces) + "0\r\n\r\n"

    is_left = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write((HEAD + chunked).encode())
        await reader.read(-1)
        writer.close()
        await writer.wait_closed()
        is_left.set()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        await is_left.wait()


async def asked(body: str) -> Outcome:
    """What one request for two tokens comes to; its seed begins at the first word."""
    async with answering(body) as port:
        load = Load(
            host="127.0.0.1",
            port=port,
            callers=[Caller("key", "model")],
            texts=[" one", " two", " three"],
            max_tokens=2,
            duration_s=0,
        )
        return await Generator(load).run()


async def test_a_right_answer_is_counted() -> None:
    outcome = await asked(events(" one", " two", counted=2))
    assert (outcome.requests, outcome.faults) == (1, {})
    assert (outcome.prompt_tokens, outcome.completion_tokens, outcome.chunks) == (7, 2, 3)


@pytest.mark.parametrize(
    "body",
    [
        events(" one", " three", counted=2),
        events(" one", counted=2),
        events(" one", " two", counted=3),
        events(" one", " two", counted=2, done=""),
    ],
)
async def test_a_wrong_one_is_a_fault(body: str) -> None:
    outcome = await asked(body)
    assert (outcome.requests, sum(outcome.faults.values())) == (0, 1)
