"""Ask a server for streamed chat answers, as cheaply as that can be done, and check every byte.

    python -m benchmarks.stream_load        one JSON `Load` a line in, one `Outcome` a line out

Raw HTTP/1.1 over kept connections, because an HTTP library would take more of the machine than the
server that is measured. Clocks stop at the last byte; answers are taken apart when all have come:
the text must be that of the seed, the usage must count it, and `[DONE]` must end it. Knows nothing
of what is behind the address.
"""

import asyncio
import gc
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import msgspec
import uvloop

END = b"0\r\n\r\n"
DATA = b"data: "
DONE = b"[DONE]"


class Caller(msgspec.Struct, frozen=True):
    """Who asks for what."""

    key: str
    model: str


class Load(msgspec.Struct, frozen=True):
    """What is to be asked for how long."""

    host: str
    port: int
    callers: list[Caller]
    # The answer to seed s is texts[s], texts[s + 1] and so on, around.
    texts: list[str]
    max_tokens: int
    duration_s: float
    # So many clients that each wait for their answer, or, with a rate, nobody waits for anybody.
    concurrency: int = 1
    rate_per_s: float | None = None
    random_seed: int = 0


class Outcome(msgspec.Struct, frozen=True):
    """All answers are whole and right; whatever was not is a fault."""

    requests: int
    faults: dict[str, int]
    # From the first request that was sent to the last byte that came.
    elapsed_s: float
    prompt_tokens: int
    completion_tokens: int
    # Events that carried a JSON body.
    chunks: int
    # Since a request was due, in ms: until its first byte, and until its last.
    first_ms: list[float]
    total_ms: list[float]


class Wrong(Exception):
    """The answer is not what it must be."""


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


_decoder = msgspec.json.Decoder(_Chunk)


class Connection(asyncio.Protocol):
    """Mutable: one connection, one answer at a time."""

    def __init__(self) -> None:
        self.first_at = 0.0
        self.last_at = 0.0
        self.is_lost = False
        self._transport: asyncio.Transport
        self._pieces: list[bytes] = []
        self._whole: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def ask(self, request: bytes) -> "asyncio.Future[bytes]":
        self._pieces.clear()
        self._whole = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._whole

    def data_received(self, data: bytes) -> None:
        if not self._pieces:
            self.first_at = time.perf_counter()
        self._pieces.append(data)
        if data.endswith(END) and self._whole is not None:
            self.last_at = time.perf_counter()
            self._whole.set_result(b"".join(self._pieces))
            self._whole = None
        elif len(self._pieces) == 1 and not data.startswith(b"HTTP/1.1 200"):
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        if self._whole is not None:
            self._whole.set_exception(Wrong(b"".join(self._pieces)[:500].decode()))

    def close(self) -> None:
        self._transport.close()


@dataclass(frozen=True, slots=True)
class _Answer:
    """What has come, the seed that it answers, and when since the request was due."""

    raw: bytes
    seed: int
    first_ms: float
    total_ms: float


class Generator:
    """Mutable: what one load has come to so far."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._random = random.Random(load.random_seed)
        self._seeds: Iterator[int] = iter(range(load.random_seed % 1000, 1 << 60))
        self._idle: list[Connection] = []
        # Not looked into before the load is over.
        self._answers: list[_Answer] = []
        self._faults: dict[str, int] = {}
        self._requests = self._chunks = self._prompt_tokens = self._completion_tokens = 0
        self._first_ms: list[float] = []
        self._total_ms: list[float] = []
        self._begun_at = self._ended_at = 0.0

    async def run(self) -> Outcome:
        self._begun_at = time.perf_counter()
        if self._load.rate_per_s is None:
            clients = (self._ask_on_and_on() for _ in range(self._load.concurrency))
            await asyncio.gather(*clients)
        else:
            await self._ask_at_random(self._load.rate_per_s)
        for connection in self._idle:
            connection.close()
        for answer in self._answers:
            try:
                self._count(answer)
            except (Wrong, msgspec.MsgspecError) as fault:
                self._note(fault)
        return Outcome(
            requests=self._requests,
            faults=self._faults,
            elapsed_s=self._ended_at - self._begun_at,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            chunks=self._chunks,
            first_ms=self._first_ms,
            total_ms=self._total_ms,
        )

    async def _ask_on_and_on(self) -> None:
        """Once at least."""
        until = self._begun_at + self._load.duration_s
        await self._ask(time.perf_counter())
        while time.perf_counter() < until:
            await self._ask(time.perf_counter())

    async def _ask_at_random(self, rate_per_s: float) -> None:
        """Poisson: the gaps between requests are exponential, and clocks start when one is due."""
        loop, gaps = asyncio.get_running_loop(), random.Random(self._load.random_seed)
        async with asyncio.TaskGroup() as tasks:

            def begin(due: float) -> None:
                tasks.create_task(self._ask(due))

            def ring() -> None:
                # In a thread, because the loop's timers are up to a millisecond late.
                due, until = self._begun_at, self._begun_at + self._load.duration_s
                while (due := due + gaps.expovariate(rate_per_s)) < until:
                    time.sleep(max(due - time.perf_counter(), 0.0))
                    loop.call_soon_threadsafe(begin, due)

            await asyncio.to_thread(ring)

    async def _ask(self, due: float) -> None:
        seed = next(self._seeds)
        connection = self._find_idle() or await self._connect()
        try:
            raw = await connection.ask(self._request(seed))
        except Wrong as fault:
            self._note(fault)
            return
        self._ended_at = connection.last_at
        self._idle.append(connection)
        first_s, total_s = connection.first_at - due, connection.last_at - due
        self._answers.append(_Answer(raw, seed, first_s * 1e3, total_s * 1e3))

    def _note(self, fault: Exception) -> None:
        self._faults[str(fault)] = self._faults.get(str(fault), 0) + 1

    def _find_idle(self) -> Connection | None:
        """The one that was used last; a server closes those that nobody uses for long."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_lost:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._load.host, self._load.port)
        return connection

    def _request(self, seed: int) -> bytes:
        caller = self._random.choice(self._load.callers)
        body = msgspec.json.encode(
            {
                "model": caller.model,
                "messages": [
                    {"role": "system", "content": "You are a helpful assistant."},
                    {"role": "user", "content": f"Please tell me the words from {seed} on."},
                ],
                "max_tokens": self._load.max_tokens,
                "seed": seed,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        return (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self._load.host}\r\n"
            f"Authorization: Bearer {caller.key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body

    def _count(self, answer: _Answer) -> None:
        """Raises Wrong, and counts nothing of it, where the answer is not what it must be."""
        head, _, body = answer.raw.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200") or b"x-ratelimit-remaining-tokens" not in head:
            raise Wrong(f"head: {head[:500]!r}")
        *events, done = _events(b"".join(_dechunked(body)))
        if done != DONE:
            raise Wrong(f"the last event is {done[:200]!r}")
        chunks = [_decoder.decode(event) for event in events]
        said = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
        texts = self._load.texts
        num_tokens = self._load.max_tokens
        expected = "".join(texts[(answer.seed + i) % len(texts)] for i in range(num_tokens))
        if said != expected:
            raise Wrong(f"the answer is {said[:100]!r}, not {expected[:100]!r}")
        usage = chunks[-1].usage
        if usage is None or usage.completion_tokens != num_tokens:
            raise Wrong(f"the usage is {usage}")
        self._requests += 1
        self._first_ms.append(answer.first_ms)
        self._total_ms.append(answer.total_ms)
        self._chunks += len(chunks)
        self._prompt_tokens += usage.prompt_tokens
        self._completion_tokens += usage.completion_tokens


def _dechunked(body: bytes) -> Iterator[bytes]:
    place = 0
    while True:
        line_end = body.index(b"\r\n", place)
        size = int(body[place:line_end], 16)
        if size == 0:
            return
        yield body[line_end + 2 : line_end + 2 + size]
        place = line_end + 4 + size


def _events(body: bytes) -> list[bytes]:
    *events, rest = body.split(b"\n\n")
    if rest or not all(event.startswith(DATA) for event in events):
        raise Wrong(f"not only events: {body[:200]!r}")
    return [event[len(DATA) :] for event in events]


def main() -> None:
    for line in sys.stdin:
        load = msgspec.json.decode(line, type=Load)
        # A pause of the collector's here would be told of the server.
        gc.collect()
        gc.disable()
        outcome = uvloop.run(Generator(load).run())
        gc.enable()
        print(msgspec.json.encode(outcome).decode(), flush=True)


if __name__ == "__main__":
    main()
