"""Carries small calls to an engine, and brings an answer that does not end.

HTTP/1.1 and no more of it than an engine's answers need: a status, and a body whose length is told
or that comes in chunks. It stands in the way of every request, where a general client takes longer
than all the rest of a submit, and as long again for each frame. Knows nothing of what it carries.
"""

import asyncio
from typing import Self
from urllib.parse import urlsplit

from engine.protocol import MSGPACK, UNIX_PREFIX, bearer

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

# More than this is read no further before it is taken.
_MAX_UNREAD_BYTES = 1 << 20
_MAX_CHUNK_LINE_BYTES = 64


class Courier:
    """Mutable: one connection, made when it is needed and made again where it was lost."""

    def __init__(self, address: str, *, secret: str | None) -> None:
        self._address = address
        self._headers = _headers(secret)
        self._streams: Streams | None = None

    async def post(self, path: str, body: bytes, *, timeout_s: float) -> tuple[int, bytes]:
        """Status and body of the answer. Raises OSError where none comes; it may have arrived."""
        request = f"POST {path} HTTP/1.1\r\n{self._headers}content-length: {len(body)}\r\n\r\n"
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await self._connect()
                writer.write(request.encode() + body)
                await writer.drain()
                head = await _Head.read(reader)
                return head.status_code, await head.body(reader)
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

    async def _connect(self) -> Streams:
        if self._streams is not None and self._streams[0].at_eof():
            self.close()
        if self._streams is None:
            self._streams = await _connect(self._address)
        return self._streams


class Feed:
    """Mutable: one answer that goes on and on, on a connection of its own, until it is closed.

    Silence for longer than `silence_s` ends it, as an error.
    """

    def __init__(self, streams: Streams, *, silence_s: float) -> None:
        self._reader, self._writer = streams
        self._silence_s = silence_s
        self._chunks = _Chunks()
        self._loop = asyncio.get_running_loop()
        self._heard_at_s = self._loop.time()
        self._is_silent = False
        self._watch = self._loop.call_later(silence_s, self._check)
        # Filled by `open`; the body only where the status is an error's.
        self.status_code = 0
        self.body = b""

    @classmethod
    async def open(
        cls, address: str, path: str, *, secret: str | None, connect_s: float, silence_s: float
    ) -> Self:
        """Raises OSError where no answer begins."""
        async with asyncio.timeout(connect_s):
            streams = await _connect(address)
        feed = cls(streams, silence_s=silence_s)
        try:
            await feed._begin(f"GET {path} HTTP/1.1\r\n{_headers(secret)}\r\n")
        except (EOFError, ValueError, asyncio.LimitOverrunError) as fault:
            feed.close()
            raise ConnectionError(f"no answer of HTTP came: {fault!r}") from fault
        except BaseException:
            feed.close()
            raise
        return feed

    async def _begin(self, request: str) -> None:
        self._writer.write(request.encode())
        head = await _Head.read(self._reader)
        self.status_code = head.status_code
        if not head.is_chunked:
            self.body = await head.body(self._reader)

    async def read(self) -> bytes:
        """What has come since; nothing at the end. Raises OSError."""
        while not self._chunks.is_over:
            data = await self._reader.read(_MAX_UNREAD_BYTES)
            if not data:
                raise ConnectionError("it fell silent" if self._is_silent else "it was cut off")
            self._heard_at_s = self._loop.time()
            try:
                found = self._chunks.feed(data)
            except ValueError as fault:
                raise ConnectionError(f"no answer of HTTP came: {fault!r}") from fault
            if found:
                return found
        return b""

    def close(self) -> None:
        self._watch.cancel()
        self._writer.close()

    def _check(self) -> None:
        """A timer for each read would take longer than the read."""
        left_s = self._heard_at_s + self._silence_s - self._loop.time()
        if left_s > 0:
            self._watch = self._loop.call_later(left_s, self._check)
        else:
            self._is_silent = True
            self._writer.transport.abort()


class _Head:
    """What an answer says before its body."""

    def __init__(self, text: str) -> None:
        status_line, *lines = text.split("\r\n")
        self.status_code = int(status_line.split(" ", 2)[1])
        self.is_chunked = False
        self._size_bytes = 0
        for line in lines:
            name, _, value = line.partition(":")
            if name.lower() == "content-length":
                self._size_bytes = int(value)
            elif name.lower() == "transfer-encoding":
                self.is_chunked = True

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> Self:
        """Raises EOFError, ValueError or LimitOverrunError for what is none."""
        try:
            return cls((await reader.readuntil(b"\r\n\r\n")).decode("latin-1"))
        except IndexError as fault:
            raise ValueError("there is no status") from fault

    async def body(self, reader: asyncio.StreamReader) -> bytes:
        """Raises EOFError, and ValueError where its length is not told."""
        if self.is_chunked:
            raise ValueError("the length of the body is not told")
        return await reader.readexactly(self._size_bytes)


class _Chunks:
    """Mutable: takes the frames of a chunked body off it (RFC 9112, section 7.1)."""

    def __init__(self) -> None:
        self.is_over = False
        # Of the chunk that has begun.
        self._num_left = 0
        # The beginning of a line; in all but the first the end of the chunk before it comes first.
        self._line = b""

    def feed(self, data: bytes) -> bytes:
        """What is in it of the body. Raises ValueError for what is no chunk."""
        data, self._line = self._line + data, b""
        place, found = 0, []
        while place < len(data) and not self.is_over:
            if self._num_left:
                found.append(data[place : place + self._num_left])
                place += len(found[-1])
                self._num_left -= len(found[-1])
                continue
            line_end = data.find(b"\r\n", place + 2 if data.startswith(b"\r", place) else place)
            if line_end < 0:
                self._line = data[place:]
                break
            self._begin(data[place:line_end])
            place = line_end + 2
        if len(self._line) > _MAX_CHUNK_LINE_BYTES:
            raise ValueError("a chunk's length is too long")
        return found[0] if len(found) == 1 else b"".join(found)

    def _begin(self, line: bytes) -> None:
        self._num_left = int(line.partition(b";")[0], 16)
        if self._num_left < 0:
            raise ValueError("a chunk's length is negative")
        self.is_over = self._num_left == 0


def _headers(secret: str | None) -> str:
    authorization = "" if secret is None else f"authorization: {bearer(secret)}\r\n"
    return f"host: engine\r\ncontent-type: {MSGPACK}\r\n{authorization}"


async def _connect(address: str) -> Streams:
    if address.startswith(UNIX_PREFIX):
        path = address.removeprefix(UNIX_PREFIX)
        return await asyncio.open_unix_connection(path, limit=_MAX_UNREAD_BYTES)
    url = urlsplit(address)
    return await asyncio.open_connection(url.hostname, url.port, limit=_MAX_UNREAD_BYTES)
