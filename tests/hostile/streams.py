"""Clients that do to a stream what clients do: read it, read it slowly, leave it, never read it.

They are sockets and bytes, with receive buffers so small that nothing is hidden in them.
"""

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

# The kernel makes a little more of it, and nothing near its own megabytes.
RECEIVE_BUFFER_BYTES = 4096
DONE = b"data: [DONE]\n\n"
PATIENCE_S = 120

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Asker:
    """Opens streams of one model with one key."""

    def __init__(self, url: str, key: str, model: str) -> None:
        self._address = urlsplit(url)
        self._key = key
        self._model = model

    @contextlib.asynccontextmanager
    async def ask(self, *, max_tokens: int, **fields: Any) -> AsyncIterator[Streams]:
        """A stream that has been asked for; afterwards the line is cut, however much came."""
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": "w7 w8 w9"}],
            "max_tokens": max_tokens,
            "stream": True,
            "ignore_eos": True,
            **fields,
        }
        reader, writer = await self._connect()
        try:
            writer.write(self._request(json.dumps(body).encode()))
            await writer.drain()
            yield reader, writer
        finally:
            writer.transport.abort()

    async def _connect(self) -> Streams:
        line = socket.socket()
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        line.setblocking(False)
        address = (self._address.hostname, self._address.port)
        await asyncio.get_running_loop().sock_connect(line, address)
        return await asyncio.open_connection(sock=line, limit=RECEIVE_BUFFER_BYTES)

    def _request(self, body: bytes) -> bytes:
        head = (
            "POST /v1/chat/completions HTTP/1.1",
            f"Host: {self._address.netloc}",
            f"Authorization: Bearer {self._key}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
        )
        return "\r\n".join((*head, "", "")).encode() + body


async def read_all(streams: Streams, *, pause_s: float = 0) -> bytes:
    """Everything that comes, a little at a time."""
    said = b""
    async with asyncio.timeout(PATIENCE_S):
        while piece := await streams[0].read(512):
            said += piece
            if pause_s:
                await asyncio.sleep(pause_s)
    return said


async def reader(asker: Asker, dice: random.Random, *, max_tokens: int) -> None:
    async with asker.ask(max_tokens=dice.randint(1, max_tokens)) as streams:
        assert DONE in await read_all(streams)


async def slow_reader(asker: Asker, dice: random.Random, *, max_tokens: int) -> None:
    async with asker.ask(max_tokens=dice.randint(1, max_tokens)) as streams:
        assert DONE in await read_all(streams, pause_s=0.005)


async def leaver(asker: Asker, dice: random.Random, *, max_tokens: int) -> None:
    """Has the beginning of an answer, or nothing of it yet."""
    async with asker.ask(max_tokens=max_tokens) as streams:
        async with asyncio.timeout(PATIENCE_S):
            await streams[0].read(dice.choice((1, 300, 3000)))
        await asyncio.sleep(dice.random() / 20)


async def hasty_leaver(asker: Asker, dice: random.Random, *, max_tokens: int) -> None:
    """Does not wait for a single byte."""
    async with asker.ask(max_tokens=max_tokens):
        await asyncio.sleep(dice.random() / 20)


MANNERS: tuple[Callable[..., Awaitable[None]], ...] = (reader, slow_reader, leaver, hasty_leaver)


async def crowd(asker: Asker, dice: random.Random, *, number: int, max_tokens: int) -> None:
    """So many at once, of all manners."""
    async with asyncio.TaskGroup() as tasks:
        for each in range(number):
            manner = MANNERS[each % len(MANNERS)]
            tasks.create_task(manner(asker, random.Random(dice.random()), max_tokens=max_tokens))
