"""Decide which adapters sit on the device, and bring them there without stopping anyone.

A slot is a place for one adapter. It is pinned while a sequence uses it, and a pinned or loading
slot is never given away. Knows digests and counts; what a loaded adapter is, only its loader knows.
"""

import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from engine.errors import AdapterUnavailable

# Reading from a store is mostly waiting; more threads would only share its bandwidth.
NUM_LOAD_THREADS = 4

Adapter = TypeVar("Adapter")


@dataclass(slots=True)
class _Slot:
    index: int
    num_pins: int = 0
    is_resident: bool = False


class SlotPool:
    """Which adapter is in which slot, least recently used first. Mutable; one thread."""

    def __init__(self, num_slots: int, *, start_load: Callable[[str], None]) -> None:
        self._start_load = start_load
        self._num_slots = num_slots
        self._free = list(range(num_slots))
        self._by_digest: dict[str, _Slot] = {}
        self._draining: dict[str, str] = {}

    @property
    def resident(self) -> tuple[str, ...]:
        return tuple(digest for digest, slot in self._by_digest.items() if slot.is_resident)

    def begin_pass(self) -> None:
        """Forget who is to make room: the coming `acquire` calls, in order of turn, say it anew."""
        self._draining.clear()

    def acquire(self, digest: str) -> int | None:
        """Pin the adapter's slot, or see to it that one comes and give None.

        Where every slot is pinned, the least pinned adapter drains: it gets no further sequence in
        this pass, so those that keep coming for it cannot starve the one that waits.
        """
        slot = self._by_digest.get(digest)
        if slot is None:
            self._make_room(digest)
            return None
        if not slot.is_resident or digest in self._draining:
            return None
        slot.num_pins += 1
        self._by_digest[digest] = self._by_digest.pop(digest)
        return slot.index

    def prefetch(self, digest: str) -> None:
        """Bring the adapter near where nothing has to make room for it. Pins nothing."""
        if digest not in self._by_digest and self._free:
            self._load_into(self._free.pop(), digest)

    def release(self, digest: str) -> None:
        slot = self._by_digest[digest]
        assert slot.num_pins > 0, "released more often than pinned"
        slot.num_pins -= 1

    def set_resident(self, digest: str) -> int:
        """The loader has brought the adapter; gives the slot to put it into."""
        slot = self._by_digest[digest]
        slot.is_resident = True
        return slot.index

    def drop(self, digest: str) -> None:
        """The load failed."""
        slot = self._by_digest.pop(digest)
        assert slot.num_pins == 0, "an adapter in use was dropped"
        self._free.append(slot.index)

    def check_integrity(self, num_pins: dict[str, int]) -> None:
        """`num_pins`: how many sequences say that they pin each adapter."""
        pins = {digest: s.num_pins for digest, s in self._by_digest.items() if s.num_pins}
        assert pins == num_pins, f"pins {pins} differ from the sequences' {num_pins}"
        used = [slot.index for slot in self._by_digest.values()]
        assert sorted(used + self._free) == list(range(self._num_slots)), "leaked slots"

    def _make_room(self, digest: str) -> None:
        index = self._free.pop() if self._free else self._evict()
        if index is not None:
            self._load_into(index, digest)
        elif digest not in self._draining.values():
            self._drain_for(digest)

    def _load_into(self, index: int, digest: str) -> None:
        self._by_digest[digest] = _Slot(index)
        self._start_load(digest)

    def _evict(self) -> int | None:
        for digest, slot in self._by_digest.items():
            if slot.is_resident and slot.num_pins == 0:
                del self._by_digest[digest]
                return slot.index
        return None

    def _drain_for(self, digest: str) -> None:
        candidates = [
            (slot.num_pins, name)
            for name, slot in self._by_digest.items()
            if slot.is_resident and name not in self._draining
        ]
        if candidates:
            _, victim = min(candidates, key=lambda candidate: candidate[0])
            self._draining[victim] = digest


@dataclass(frozen=True, slots=True)
class LoadResult(Generic[Adapter]):
    digest: str
    # The adapter, or why there is none.
    outcome: Adapter | AdapterUnavailable


class AdapterLoader(Generic[Adapter]):
    """Runs `read` in threads and keeps what it gives until it is asked for."""

    def __init__(
        self,
        read: Callable[[str], Adapter | AdapterUnavailable],
        *,
        on_result: Callable[[], None],
    ) -> None:
        self._read = read
        self._on_result = on_result
        self._results: queue.SimpleQueue[LoadResult[Adapter]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(NUM_LOAD_THREADS, thread_name_prefix="adapter-load")

    def start(self, digest: str) -> None:
        self._threads.submit(self._load, digest)

    def has_results(self) -> bool:
        return not self._results.empty()

    def take_results(self) -> list[LoadResult[Adapter]]:
        results = []
        while not self._results.empty():
            results.append(self._results.get())
        return results

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _load(self, digest: str) -> None:
        self._results.put(LoadResult(digest, self._read(digest)))
        self._on_result()
