"""An echo for a core, a wire that can be cut, and an engine server around them.

The core is the far side of the link's boundary: what these tests are about is everything between
it and a gateway worker, over real sockets.
"""

import asyncio
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from adapters.validate import BaseShape
from engine.client import EngineLink
from engine.core import CoreStatus
from engine.errors import AdapterMissing, InvalidSequence, ProbeError, TooManyPins
from engine.pool import Pool
from engine.protocol import (
    PROTOCOL_VERSION,
    UNIX_PREFIX,
    AdapterPlace,
    EngineInfo,
    Frame,
    ProbeReport,
    SamplingParams,
    SequenceEvent,
    SequenceState,
    TierReport,
    TokenLogprob,
)
from engine.sequence import Sequence, SequenceKey, StepEvent
from engine.server import EngineServer, bind
from engine.sessions import LinkLimits
from engine.slots import Freed
from engine.wishes import Wish

DEADLINE_S = 30


class EchoCore:
    """Answers each prompt with itself, again and again, one token of every sequence per step.

    The vector of a prompt is its kind of pooling, its length, and its first token.

    It has every adapter at hand but those in `missing`; those in `waiting` find no room.
    """

    def __init__(self) -> None:
        self.wake: Callable[[], None] = lambda: None
        self.running: dict[SequenceKey, Sequence] = {}
        self.held: set[str] = set()
        self.seen: list[SequenceKey] = []
        self.must_fail = False
        self.resident: list[str] = ["ab" * 32]
        self.hosted: list[str] = ["ab" * 32, "cd" * 32]
        self.pinned: list[str] = []
        self.missing: set[str] = set()
        self.waiting: set[str] = set()
        self.given_up: list[str] = []
        self.fingerprints: dict[str, str | None] = {}
        self._aborted: list[Sequence] = []
        # None lets it run freely; a number is how many steps it may still make.
        self._steps_left: int | None = None
        self._lock = threading.Lock()

    def allow_steps(self, number: int | None) -> None:
        with self._lock:
            self._steps_left = number
        self.wake()

    def submit(self, sequence: Sequence) -> None:
        self.seen.append(sequence.key)
        if not sequence.token_ids:
            raise InvalidSequence("The prompt is empty")
        self.running[sequence.key] = sequence

    def abort(self, key: SequenceKey) -> None:
        sequence = self.running.pop(key, None)
        if sequence is not None:
            self._aborted.append(sequence)

    def hold_back(self, owner: str, *, held: bool) -> None:
        (self.held.add if held else self.held.discard)(owner)

    def has_work(self) -> bool:
        return self.must_fail or (self._steps_left != 0 and bool(self._free()))

    def step(self) -> list[StepEvent]:
        assert not self.must_fail, "told to fail"
        events = [_event(s, SequenceState.ABORTED, []) for s in self._aborted]
        self._aborted.clear()
        free = self._free()
        with self._lock:
            if not free or self._steps_left == 0:
                return events
            if self._steps_left is not None:
                self._steps_left -= 1
        return events + [self._advance(sequence) for sequence in free]

    def status(self) -> CoreStatus:
        tiers = TierReport(
            num_reads=2,
            num_read_bytes=2048,
            num_copies=3,
            num_copied_bytes=3072,
            num_load_failures=1,
            num_fingerprint_mismatches=6,
            num_slot_evictions=4,
            num_host_evictions=5,
            disk_bytes=4096,
            host_bytes=2048,
            device_bytes=1024,
        )
        return CoreStatus(
            num_running=len(self.running),
            num_waiting=0,
            num_blocks=100,
            num_free_blocks=90,
            num_adapter_blocks=5,
            resident_adapters=tuple(self.resident),
            hosted_adapters=tuple(self.hosted),
            pinned_adapters=tuple(self.pinned),
            quarantined_adapters=("ef" * 32,),
            tiers=tiers,
        )

    def prefetch(self, adapter_digest: str) -> None: ...

    def probe(self, adapter_digest: str) -> ProbeReport:
        assert not self.must_fail, "told to fail"
        if adapter_digest != "ab" * 32:
            raise ProbeError(f"No such adapter: {adapter_digest}")
        return ProbeReport(adapter_digest, 4, 1e-6, 1e-4, 2.0, 1e-3, [], is_passed=True)

    def warm(self, wish: Wish, *, fingerprint: str | None) -> None:
        digest = wish.adapter_digest
        self.fingerprints[digest] = fingerprint
        if digest in self.missing:
            wish.on_end(AdapterMissing(f"No such adapter: {digest}"))
        elif digest not in self.waiting:
            tier = self.resident if wish.to == "device" else self.hosted
            tier.append(digest)
            wish.on_end(None)

    def give_up(self, wish: Wish) -> None:
        self.given_up.append(wish.adapter_digest)

    def pin(self, adapter_digest: str) -> None:
        if adapter_digest not in self.pinned:
            if len(self.pinned) == INFO.max_loras - 1:
                raise TooManyPins
            self.pinned.append(adapter_digest)

    def unpin(self, adapter_digest: str) -> AdapterPlace:
        if adapter_digest in self.pinned:
            self.pinned.remove(adapter_digest)
        return self.place_of(adapter_digest)

    def forget(self, adapter_digest: str) -> Freed:
        self.unpin(adapter_digest)
        was_resident = adapter_digest in self.resident
        for tier in (self.resident, self.hosted):
            tier[:] = [digest for digest in tier if digest != adapter_digest]
        return Freed(1024 * was_resident, 0, is_in_use=False)

    def forget_files(self, adapter_digest: str) -> int:
        return 4096

    def place_of(self, adapter_digest: str) -> AdapterPlace:
        return AdapterPlace(
            adapter_digest=adapter_digest,
            is_resident=adapter_digest in self.resident,
            is_hosted=adapter_digest in self.hosted,
            is_pinned=adapter_digest in self.pinned,
        )

    def _free(self) -> list[Sequence]:
        return [s for s in self.running.values() if s.owner not in self.held]

    def _advance(self, sequence: Sequence) -> StepEvent:
        if sequence.pool is not None:
            return self._pool(sequence, sequence.pool)
        is_first = not sequence.num_generated_tokens
        token = sequence.token_ids[sequence.num_generated_tokens % sequence.num_prompt_tokens]
        sequence.token_ids.append(token)
        state = sequence.ending()
        if state.is_final:
            del self.running[sequence.key]
        event = _event(sequence, state, [token])
        asked = sequence.sampling.logprobs, sequence.sampling.prompt_logprobs
        prompt = sequence.token_ids[1 : sequence.num_prompt_tokens]
        return replace(
            event,
            logprobs=None if asked[0] is None else [_logprob(token, asked[0])],
            prompt_logprobs=(
                None
                if asked[1] is None or not is_first
                else [_logprob(each, asked[1]) for each in prompt]
            ),
        )

    def _pool(self, sequence: Sequence, pool: Pool) -> StepEvent:
        del self.running[sequence.key]
        is_mean = pool.num_skippable_tokens(2) == 0
        vector = struct.pack("<3f", is_mean, sequence.num_prompt_tokens, sequence.token_ids[0])
        return replace(_event(sequence, SequenceState.STOPPED, []), vector=vector)


def _logprob(token_id: int, num_top: int) -> TokenLogprob:
    """The token itself is the likeliest, and its successors follow it."""
    top = [(token_id + place, -0.25 * (place + 1)) for place in range(num_top)]
    return TokenLogprob(-0.25, top)


def _event(sequence: Sequence, state: SequenceState, token_ids: list[int]) -> StepEvent:
    return StepEvent(
        key=sequence.key,
        state=state,
        token_ids=token_ids,
        prompt_tokens=sequence.num_prompt_tokens,
        cached_tokens=0,
        generated_tokens=sequence.num_generated_tokens,
        engine_ns=1,
        adapter_wait_ns=250_000_000,
    )


class Wire:
    """Carries connections from one socket to another until it is cut."""

    def __init__(self, source: Path, target: Path) -> None:
        self.address = f"{UNIX_PREFIX}{source}"
        self.num_connections = 0
        self._flows = asyncio.Event()
        self._flows.set()
        self._source = source
        self._target = target
        self._carriers: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._listener: socket.socket | None = None

    @property
    def is_stuck(self) -> bool:
        """Whether what the target says stays on the way."""
        return not self._flows.is_set()

    @is_stuck.setter
    def is_stuck(self, stuck: bool) -> None:
        (self._flows.clear if stuck else self._flows.set)()

    @property
    def is_carrying(self) -> bool:
        return bool(self._carriers)

    def mend(self) -> None:
        self._source.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._source))
        self._listener.listen()
        self._listener.setblocking(False)
        # Not asyncio's server: one that is closed while it accepts loses the connection's socket.
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def drop_connections(self) -> None:
        for writers in self._carriers.values():
            for writer in writers:
                writer.transport.abort()

    def cut(self) -> None:
        """Drop what is connected and let nobody connect until mended."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        self._source.unlink(missing_ok=True)
        self.drop_connections()

    def _accept(self) -> None:
        assert self._listener is not None
        with suppress(BlockingIOError):
            near, _ = self._listener.accept()
            near.setblocking(False)
            self.num_connections += 1
            task = asyncio.create_task(self._carry(near))
            self._carriers[task] = []
            task.add_done_callback(self._carriers.pop)

    async def _carry(self, near: socket.socket) -> None:
        carrier = asyncio.current_task()
        assert carrier is not None
        reader, writer = await asyncio.open_unix_connection(sock=near)
        try:
            far_reader, far_writer = await asyncio.open_unix_connection(str(self._target))
        except OSError:
            writer.transport.abort()
            return
        if self._listener is None:
            # Cut while it connected.
            writer.transport.abort()
            far_writer.transport.abort()
            return
        self._carriers[carrier] = [writer, far_writer]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pump(reader, far_writer))
            tasks.create_task(self._pump(far_reader, writer, can_stick=True))

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        can_stick: bool = False,
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if can_stick:
                    await self._flows.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@asynccontextmanager
async def wire_between(source: Path, target: Path) -> AsyncIterator[Wire]:
    """A wire that is whole at first, and gone at the end with all that it carried."""
    wire = Wire(source, target)
    wire.mend()
    try:
        yield wire
    finally:
        wire.cut()
        await until(lambda: not wire.is_carrying)


INFO = EngineInfo(
    protocol_version=PROTOCOL_VERSION,
    engine_epoch=7,
    base_model="echo",
    base_digest="00" * 32,
    text_bundle_digest="11" * 32,
    max_model_len=1000,
    vocab_size=1000,
    max_loras=4,
    max_lora_rank=16,
    device="cpu",
    dtype="float32",
    base_shape=BaseShape(base_model="echo", modules={"model.layers.0.mlp.up_proj": (4, 8)}),
)


@dataclass
class Engine:
    """A served echo core and how to reach it."""

    path: Path
    core: EchoCore = field(default_factory=EchoCore)
    limits: LinkLimits = field(default_factory=LinkLimits)
    secret: str | None = None
    info: EngineInfo = INFO
    address: str = ""
    has_ended_well: bool | None = None

    def __post_init__(self) -> None:
        self.address = self.address or f"{UNIX_PREFIX}{self.path}"

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["Engine"]:
        with bind(self.address) as listener:
            server = EngineServer(
                self.core,
                info=self.info,
                listener=listener,
                secret=self.secret,
                limits=self.limits,
            )
            async with asyncio.TaskGroup() as tasks:
                listening = asyncio.Event()
                serving = tasks.create_task(server.serve(on_listening=listening.set))
                await listening.wait()
                yield self
                server.stop()
                self.has_ended_well = await serving


@asynccontextmanager
async def engine(path: Path, **settings: object) -> AsyncIterator[Engine]:
    async with Engine(path, **settings).serve() as served:  # type: ignore[arg-type]  # any field
        yield served


@asynccontextmanager
async def link(
    address: str,
    *,
    worker_id: str = "w1",
    worker_epoch: int = 1,
    on_frame: Callable[[Frame], None] = lambda frame: None,
    **settings: object,
) -> AsyncIterator[EngineLink]:
    """A link that is connected. A test that is slow to read is no slow consumer by default."""
    made = EngineLink(
        address,
        worker_id=worker_id,
        worker_epoch=worker_epoch,
        on_frame=on_frame,
        **{"secret": None, "max_queued_events": 1 << 20, **settings},  # type: ignore[arg-type]  # any parameter
    )
    async with made:
        await until(lambda: made.is_connected)
        yield made


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not is_true():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.005)


async def collect(stream: AsyncIterator[SequenceEvent]) -> list[SequenceEvent]:
    async with asyncio.timeout(DEADLINE_S):
        return [event async for event in stream]


def tokens_of(events: list[SequenceEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0)


@asynccontextmanager
async def short_folder() -> AsyncIterator[Path]:
    """A folder whose path is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ml-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
