"""An answer that goes on and on, over a real socket."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.courier import Feed, _Chunks

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(pieces: Sequence[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@asynccontextmanager
async def answering(
    data: bytes, *, stays: bool = False, silence_s: float = 5.0
) -> AsyncIterator[Feed]:
    """A feed from a server that says this, and then leaves or says no more."""
    is_over = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        if stays:
            await is_over.wait()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        feed = await Feed.open(
            f"http://{host}:{port}", "/x", secret=None, connect_s=5.0, silence_s=silence_s
        )
        try:
            yield feed
        finally:
            feed.close()
            is_over.set()


@given(st.lists(st.binary(min_size=1, max_size=40)), st.lists(st.integers(1, 7), min_size=1))
def test_chunks_say_the_same_however_they_are_cut(pieces: list[bytes], cuts: list[int]) -> None:
    chunks, data, found = _Chunks(), chunked(pieces), b""
    for size in itertools.cycle(cuts):
        part, data = data[:size], data[size:]
        found += chunks.feed(part)
        if not data:
            break
    assert found == b"".join(pieces)
    assert chunks.is_over


@pytest.mark.parametrize("data", [b"xyz\r\n", b"-5\r\n", b"1" * 100])
def test_what_is_no_chunk_is_told(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"chunk|invalid literal"):
        _Chunks().feed(data)


async def test_an_answer_is_read_to_its_end() -> None:
    async with answering(HEAD + chunked([b"one", b"two"])) as feed:
        assert feed.status_code == 200
        found = b""
        while piece := await feed.read():
            found += piece
    assert found == b"onetwo"


async def test_an_answer_that_breaks_off_is_an_error() -> None:
    async with answering(HEAD + b"5\r\non") as feed:
        assert await feed.read() == b"on"
        with pytest.raises(ConnectionError, match="cut off"):
            await feed.read()


async def test_an_answer_that_falls_silent_is_an_error() -> None:
    async with answering(HEAD + b"3\r\none\r\n", stays=True, silence_s=0.2) as feed:
        assert await feed.read() == b"one"
        with pytest.raises(ConnectionError, match="silent"):
            await feed.read()


async def test_a_refusal_comes_with_its_body() -> None:
    async with answering(b"HTTP/1.1 410 Gone\r\ncontent-length: 4\r\n\r\ngone") as feed:
        assert (feed.status_code, feed.body) == (410, b"gone")


async def test_what_is_not_http_is_an_error() -> None:
    with pytest.raises(ConnectionError, match="no answer of HTTP"):
        async with answering(b"hello\r\n\r\n"):
            pass
