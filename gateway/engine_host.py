"""What a gateway asks of the supervisor of its host: to start an engine, or to end one.

One request a connection, in lines of JSON over a socket that only their user can open. An engine
that was started ends with its connection, until it is kept: whoever asked may die on the way. Knows
nothing of what engines serve.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import msgspec

from gateway.errors import InvalidRequest, Unavailable

# A line is a name and a path.
MAX_LINE_BYTES = 1 << 16


class StartOrder(msgspec.Struct, frozen=True, tag="start"):
    """Start an engine for the model in a folder, or of a hub id, under a name."""

    name: str
    model: str


class StopOrder(msgspec.Struct, frozen=True, tag="stop"):
    """End the engine at an address; one that is not yours is no error."""

    address: str


class KeepOrder(msgspec.Struct, frozen=True, tag="keep"):
    """The engine that this connection started shall stay, over restarts too."""


Order = StartOrder | StopOrder | KeepOrder


class Reply(msgspec.Struct, frozen=True):
    """What became of an order, or of the engine that it started."""

    state: Literal["done", "refused", "failed"]
    address: str = ""
    problem: str = ""


class EngineHost:
    """The supervisor of this host."""

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = socket_path

    @contextlib.asynccontextmanager
    async def start(self, name: str, model: str) -> AsyncIterator["StartedEngine"]:
        """An engine that is starting; it ends with the block unless it is kept.

        Raises InvalidRequest where the operator has not allowed that folder, and Unavailable.
        """
        async with self._connected() as (reader, writer):
            reply = await _ask(reader, writer, StartOrder(name, model))
            if reply.state != "done":
                raise InvalidRequest(reply.problem, param="model")
            yield StartedEngine(reply.address, reader, writer)

    async def stop(self, address: str) -> None:
        """Raises Unavailable."""
        async with self._connected() as (reader, writer):
            await _ask(reader, writer, StopOrder(address))

    @contextlib.asynccontextmanager
    async def _connected(
        self,
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        try:
            reader, writer = await asyncio.open_unix_connection(
                self._socket_path, limit=MAX_LINE_BYTES
            )
        except OSError as error:
            raise Unavailable(f"The supervisor of this host does not answer: {error}") from error
        try:
            yield reader, writer
        finally:
            writer.close()


class StartedEngine:
    """Where an engine is going to answer, and what becomes of it meanwhile."""

    def __init__(
        self, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.address = address
        self._reader = reader
        self._writer = writer

    async def failure(self) -> str:
        """Return why the engine died before it was kept, should it do so."""
        return (await read_reply(self._reader)).problem

    async def keep(self) -> None:
        """Let the engine stay. Raises Unavailable."""
        reply = await _ask(self._reader, self._writer, KeepOrder())
        if reply.state != "done":
            raise Unavailable(reply.problem)


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, order: Order) -> Reply:
    writer.write(msgspec.json.encode(order) + b"\n")
    with contextlib.suppress(OSError):
        await writer.drain()
    return await read_reply(reader)


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    """Raises Unavailable where the supervisor went away."""
    try:
        return msgspec.json.decode(await reader.readuntil(b"\n"), type=Reply)
    except (OSError, EOFError, asyncio.LimitOverrunError, msgspec.MsgspecError) as error:
        raise Unavailable(f"The supervisor of this host went away: {error!r}") from error
