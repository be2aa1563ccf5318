"""Carries small calls to an engine, one after another, on a connection that stays.

HTTP/1.1 and no more of it than an engine's answers to commands need: a status, and a body whose
length is told. It stands in the way of every request, where a general client takes longer than all
the rest of a submit. Knows nothing of what it carries.
"""

import asyncio
from urllib.parse import urlsplit

from engine.protocol import MSGPACK, UNIX_PREFIX, bearer


class Courier:
    """Mutable: one connection, made when it is needed and made again where it was lost."""

    def __init__(self, address: str, *, secret: str | None) -> None:
        self._address = address
        authorization = "" if secret is None else f"authorization: {bearer(secret)}\r\n"
        self._headers = f"host: engine\r\ncontent-type: {MSGPACK}\r\n{authorization}"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes, *, timeout_s: float) -> tuple[int, bytes]:
        """Status and body of the answer. Raises OSError where none comes; it may have arrived."""
        request = f"POST {path} HTTP/1.1\r\n{self._headers}content-length: {len(body)}\r\n\r\n"
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await self._connect()
                writer.write(request.encode() + body)
                await writer.drain()
                return await _answer(reader)
        except (EOFError, ValueError, asyncio.LimitOverrunError) as fault:
            self.close()
            raise ConnectionError(f"no answer of HTTP came: {fault!r}") from fault
        except BaseException:
            # Whatever comes on it now would be taken for the next call's answer.
            self.close()
            raise

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is not None and self._streams[0].at_eof():
            self.close()
        if self._streams is None:
            if self._address.startswith(UNIX_PREFIX):
                path = self._address.removeprefix(UNIX_PREFIX)
                self._streams = await asyncio.open_unix_connection(path)
            else:
                url = urlsplit(self._address)
                self._streams = await asyncio.open_connection(url.hostname, url.port)
        return self._streams


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Raises EOFError, ValueError or LimitOverrunError for what is none."""
    head = await reader.readuntil(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    size_bytes = 0
    for line in lines:
        name, _, value = line.partition(":")
        if name.lower() == "content-length":
            size_bytes = int(value)
        elif name.lower() == "transfer-encoding":
            raise ValueError("the length of the body is not told")
    return int(status_line.split(" ", 2)[1]), await reader.readexactly(size_bytes)
