"""A moderation server on a socket: it answers as it is told and remembers what it was asked."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from gateway.webhooks import signature

Misbehaviour = Callable[[asyncio.StreamWriter], Awaitable[None]]
ALLOWED = b'{"allow": true}'


class Moderator:
    """Refuses a text that has one of its words, unless it is told to misbehave."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.reason = "that is not said here"
        self.misbehaves: Misbehaviour | None = None
        self.questions: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.url = ""

    def is_signed_with(self, secret: str) -> bool:
        signed = [head["x-manylora-signature"] for head in self.heads]
        times = [int(each.removeprefix("t=").partition(",")[0]) for each in signed]
        return bool(signed) and signed == [
            signature(secret, body, at_s=at_s)
            for body, at_s in zip(self.bodies, times, strict=True)
        ]

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()[1:-1]
            fields = dict(line.lower().split(": ", 1) for line in head)
            body = await reader.readexactly(int(fields["content-length"]))
            question = msgspec.json.decode(body)
            self.heads.append(fields)
            self.bodies.append(body)
            self.questions.append(question)
            with contextlib.suppress(OSError):
                await (self.misbehaves or self._answer)(writer)
        finally:
            writer.transport.abort()

    async def _answer(self, writer: asyncio.StreamWriter) -> None:
        text = self.questions[-1]["text"]
        is_refused = any(word in text for word in self.words)
        await reply(msgspec.json.encode({"allow": not is_refused, "reason": self.reason}))(writer)


def reply(body: bytes, *, status: str = "200 OK") -> Misbehaviour:
    async def write(writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 {status}\r\nlocation: /elsewhere\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        # Closed, not torn down: what was written arrives.
        writer.close()
        await writer.wait_closed()

    return write


async def answer_without_end(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")
    while True:
        writer.write(b'{"allow": true, "rest": "' + b"x" * 65536)
        await writer.drain()


async def answer_drop_by_drop(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"H")
        await writer.drain()
        await asyncio.sleep(0.05)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def say_nothing(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


@contextlib.asynccontextmanager
async def moderating() -> AsyncIterator[Moderator]:
    moderator = Moderator()
    tasks: set[asyncio.Task[None]] = set()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        await moderator.take(reader, writer)

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    moderator.url = f"http://localhost:{server.sockets[0].getsockname()[1]}/judge?key=hidden"
    try:
        yield moderator
    finally:
        for task in list(tasks):
            task.cancel()
        server.close()
        await server.wait_closed()
