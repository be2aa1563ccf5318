"""An engine that answers at once: everything of a real one but the model.

    python -m benchmarks.instant_engine < job.json

Server, sessions, frames and worker thread are the engine's own. The core behind them makes one
token of every sequence per step and takes no time for it: the sequence's seed says where in a list
of words its answer begins, so that whoever asked knows what must come. With `step_ms` a step takes
that long, as a model's would. Serves every adapter there is and loads none.
"""

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable

import msgspec
import uvloop

from engine.core import CoreStatus
from engine.errors import ProbeError
from engine.protocol import AdapterPlace, EngineInfo, ProbeReport, SequenceState, TierReport
from engine.sequence import Sequence, SequenceKey, StepEvent
from engine.server import EngineServer, bind
from engine.sessions import LinkLimits
from engine.slots import Freed
from engine.wishes import Wish

NO_TIERS = TierReport(**dict.fromkeys(TierReport.__struct_fields__, 0))


class Job(msgspec.Struct, frozen=True):
    """What the benchmark says on standard input."""

    address: str
    secret: str
    info: EngineInfo
    # Token ids; the answer to seed s is words[s], words[s + 1] and so on, around.
    words: list[int]
    step_ms: float = 0.0


class InstantCore:
    """Mutable: the sequences that have tokens to come."""

    def __init__(self, words: list[int], *, step_s: float) -> None:
        self.wake: Callable[[], None] = lambda: None
        self._words = words
        self._step_s = step_s
        self._next_step_at = 0.0
        self._running: dict[SequenceKey, Sequence] = {}
        self._aborted: list[Sequence] = []
        self._held: set[str] = set()
        self._pause = threading.Event()

    def submit(self, sequence: Sequence) -> None:
        self._running[sequence.key] = sequence

    def abort(self, key: SequenceKey) -> None:
        sequence = self._running.pop(key, None)
        if sequence is not None:
            self._aborted.append(sequence)

    def hold_back(self, owner: str, *, held: bool) -> None:
        (self._held.add if held else self._held.discard)(owner)

    def has_work(self) -> bool:
        return any(sequence.owner not in self._held for sequence in self._running.values())

    def step(self) -> list[StepEvent]:
        aborted, self._aborted = self._aborted, []
        events = [_event(sequence, SequenceState.ABORTED, []) for sequence in aborted]
        free = [each for each in self._running.values() if each.owner not in self._held]
        if free and self._step_s:
            self._wait()
        return events + [self._advance(sequence) for sequence in free]

    def _wait(self) -> None:
        now = time.monotonic()
        self._next_step_at = max(self._next_step_at + self._step_s, now)
        self._pause.wait(self._next_step_at - now)

    def _advance(self, sequence: Sequence) -> StepEvent:
        place = sequence.sampling.seed + sequence.num_generated_tokens
        token = self._words[place % len(self._words)]
        sequence.token_ids.append(token)
        state = sequence.ending()
        if state.is_final:
            del self._running[sequence.key]
        return _event(sequence, state, [token])

    def status(self) -> CoreStatus:
        return CoreStatus(len(self._running), 0, 1, 1, 0, (), (), (), (), NO_TIERS)

    # Adapters, of which it has all and none.

    def prefetch(self, adapter_digest: str) -> None: ...

    def probe(self, adapter_digest: str) -> ProbeReport:
        raise ProbeError("There is no model here to probe.")

    def warm(self, wish: Wish, *, fingerprint: str | None) -> None:
        wish.on_end(None)

    def give_up(self, wish: Wish) -> None: ...

    def pin(self, adapter_digest: str) -> None: ...

    def unpin(self, adapter_digest: str) -> AdapterPlace:
        return self.place_of(adapter_digest)

    def forget(self, adapter_digest: str) -> Freed:
        return Freed(0, 0, is_in_use=False)

    def forget_files(self, adapter_digest: str) -> int:
        return 0

    def place_of(self, adapter_digest: str) -> AdapterPlace:
        return AdapterPlace(
            adapter_digest=adapter_digest, is_resident=True, is_hosted=True, is_pinned=False
        )


def _event(sequence: Sequence, state: SequenceState, token_ids: list[int]) -> StepEvent:
    return StepEvent(
        key=sequence.key,
        state=state,
        token_ids=token_ids,
        prompt_tokens=sequence.num_prompt_tokens,
        cached_tokens=0,
        generated_tokens=sequence.num_generated_tokens,
        engine_ns=1000 * sequence.num_generated_tokens,
    )


async def serve(job: Job) -> None:
    with bind(job.address) as listener:
        server = EngineServer(
            InstantCore(job.words, step_s=job.step_ms / 1000),
            info=job.info,
            listener=listener,
            secret=job.secret,
            limits=LinkLimits(),
        )
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.stop)
        await server.serve(on_listening=lambda: None)


if __name__ == "__main__":
    uvloop.run(serve(msgspec.json.decode(sys.stdin.buffer.read(), type=Job)))
