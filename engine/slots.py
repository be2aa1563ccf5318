"""Decide which adapters sit on the device, and bring them there without stopping anyone.

An adapter is absent, being read into host memory, hosted there, being copied into a window of the
device's memory, or resident in a slot. Its slot is pinned while a sequence uses it; what is pinned
or being copied is never given away. An operator may want one to stay: it makes room only for one
that fits in no other way. Knows digests, sizes and counts. What an adapter is, and how windows and
blocks lie in memory, it leaves to others.
"""

import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from engine.adapter_loader import NUM_READERS, CopyResult, ReadResult, Window
from engine.errors import AdapterCorrupted, AdapterMissing, AdapterUnavailable, TooManyPins
from engine.host_tier import Adapter, HostTier
from engine.protocol import Tier, TierReport

AdapterIn = TypeVar("AdapterIn", contravariant=True)
WindowIn = TypeVar("WindowIn", contravariant=True)


class AdapterMemory(Protocol[Window]):
    """The device memory that adapters share with the KV cache, in blocks."""

    @property
    def num_free_blocks(self) -> int: ...

    def window_blocks(self, size_bytes: int) -> int:
        """How many consecutive blocks hold so many bytes."""

    def take_window(self, size_bytes: int) -> Window | None:
        """None where too few blocks are free now, or too few of them are neighbours."""

    def gather(self, movable: Iterable[Window]) -> dict[Window, Window]:
        """Move windows together, so that free blocks are neighbours; gives where they went."""

    def return_window(self, window: Window) -> None: ...


class Loads(Protocol[AdapterIn, WindowIn]):
    """What brings adapters nearer: `engine.adapter_loader.AdapterLoader`."""

    def read(self, digest: str) -> None: ...
    def copy(self, digest: str, adapter: AdapterIn, window: WindowIn) -> None: ...


class SlotBank(Protocol[AdapterIn, WindowIn]):
    """What computes with the adapters in the slots."""

    def install(self, slot: int, adapter: AdapterIn, window: WindowIn) -> None:
        """`window` holds the adapter now: rows of this slot take it from there."""

    def move(self, slot: int, window: WindowIn) -> None:
        """What the slot holds lies in `window` now."""

    def clear(self, slot: int) -> None:
        """The slot is empty, and its window somebody else's."""


@dataclass(slots=True)
class _Slot(Generic[Adapter, Window]):
    index: int
    window: Window
    num_blocks: int
    size_bytes: int
    # The copy's source; None once the adapter is resident.
    copying: Adapter | None
    resident_since_ns: int = 0
    num_pins: int = 0

    @property
    def is_idle(self) -> bool:
        return self.copying is None and self.num_pins == 0


@dataclass(frozen=True, slots=True)
class Freed:
    """What an unload gave back at once."""

    device_bytes: int
    host_bytes: int
    # Sequences or loads still use the adapter.
    is_in_use: bool


@dataclass(slots=True)
class _Counts:
    """What moved since the start. Mutable."""

    reads: int = 0
    read_bytes: int = 0
    copies: int = 0
    copied_bytes: int = 0
    failures: int = 0
    mismatches: int = 0
    evictions: int = 0


class SlotPool(Generic[Adapter, Window]):
    """Adapters in the host tier and in slots, least recently used first to go.

    Mutable; one thread. All wishes of a pass come between two calls of `begin_pass`, in order of
    turn, and memory that is short goes to the first that asks.
    """

    def __init__(
        self,
        num_slots: int,
        *,
        memory: AdapterMemory[Window],
        max_blocks: int,
        host: HostTier[Adapter],
        loads: Loads[Adapter, Window],
        bank: SlotBank[Adapter, Window],
        max_reads: int = NUM_READERS,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        """`max_blocks`: what all adapters together may take of the memory.

        The rest must hold the longest sequence: then one can always run beside the adapters that
        other, waiting ones have pinned.
        """
        self._memory = memory
        self._max_blocks = max_blocks
        self._host = host
        self._loads = loads
        self._bank = bank
        self._max_reads = max_reads
        self._clock_ns = clock_ns
        self._num_slots = num_slots
        self._free = list(range(num_slots))
        # Least recently used first.
        self._slots: dict[str, _Slot[Adapter, Window]] = {}
        self._reading: set[str] = set()
        # To be gone as soon as nobody uses them.
        self._leaving: set[str] = set()
        # Wanted by operators in a slot, for good; in order of coming.
        self._staying: dict[str, None] = {}
        self._counts = _Counts()
        # Of this pass: who was asked for; for whom the host tier has room, and how much of it is
        # spoken for; who gets no further sequence, so that a waiting one can have its place.
        self._wanted: set[str] = set()
        self._kept: set[str] = set()
        self._kept_bytes = 0
        self._draining: set[str] = set()
        self._is_memory_short = False
        self.num_reserved_blocks = 0
        # Of the pass before.
        self._lately_wanted: set[str] = set()

    @property
    def resident(self) -> tuple[str, ...]:
        return tuple(digest for digest, slot in self._slots.items() if slot.copying is None)

    @property
    def hosted(self) -> tuple[str, ...]:
        return self._host.digests

    @property
    def pinned(self) -> tuple[str, ...]:
        """What operators want to stay in a slot, whether it is there yet or not."""
        return tuple(self._staying)

    @property
    def absent_pins(self) -> tuple[str, ...]:
        return tuple(digest for digest in self._staying if digest not in self._slots)

    def is_near(self, digest: str, tier: Tier) -> bool:
        """Whether the adapter is in this tier or in one that is nearer."""
        slot = self._slots.get(digest)
        is_resident = slot is not None and slot.copying is None
        return is_resident or (tier == "host" and digest in self._host)

    def report(self, *, disk_bytes: int) -> TierReport:
        return TierReport(
            num_reads=self._counts.reads,
            num_read_bytes=self._counts.read_bytes,
            num_copies=self._counts.copies,
            num_copied_bytes=self._counts.copied_bytes,
            num_load_failures=self._counts.failures,
            num_fingerprint_mismatches=self._counts.mismatches,
            num_slot_evictions=self._counts.evictions,
            num_host_evictions=self._host.num_evictions,
            disk_bytes=disk_bytes,
            host_bytes=self._host.size_bytes,
            device_bytes=sum(slot.size_bytes for slot in self._slots.values()),
        )

    # A pass

    def begin_pass(self) -> None:
        """Forget who waits for what: the coming calls, in order of turn, say it anew."""
        self._host.trim(keep=self._spoken_for())
        self._lately_wanted = self._wanted
        self._wanted, self._kept, self._kept_bytes = set(), set(), 0
        self._draining.clear()
        self._is_memory_short = False
        # Blocks that must stay free for the first adapter that waits for memory: admissions that
        # come after it in this pass leave them alone, however few they need.
        self.num_reserved_blocks = 0

    def acquire(self, digest: str) -> int | None:
        """Pin the adapter's slot, or see to it that one comes and give None.

        Where all that could make room is pinned, the least pinned adapter drains: it gets no
        further sequence in this pass, so those that keep coming for it cannot starve the one that
        waits.
        """
        slot = self._slots.get(digest)
        if slot is None:
            self._bring(digest, max_reads=self._max_reads, place=self._place_at_all_costs)
            return None
        self._wanted.add(digest)
        if slot.copying is not None or digest in self._draining or digest in self._leaving:
            return None
        slot.num_pins += 1
        self._slots[digest] = self._slots.pop(digest)
        self._host.get(digest)
        return slot.index

    def prefetch(self, digest: str) -> None:
        """Bring an adapter near whose turn has not come: into what is free, or what idles unwanted.

        Pins nothing and drains nobody. One reader is left to those whose turn it is.
        """
        if digest in self._slots:
            self._wanted.add(digest)
        else:
            self._bring(digest, max_reads=self._max_reads - 1, place=self._place_if_easy)

    def bring(self, digest: str, tier: Tier) -> None:
        """Bring an adapter near that no sequence asks for: after all that do, in the same pass.

        Into what is free, or what idles unwanted and is not pinned, however many that are.
        """
        if digest in self._slots:
            self._wanted.add(digest)
            return
        place = self._place_among_idle if tier == "device" else _stay_in_host
        self._bring(digest, max_reads=self._max_reads - 1, place=place)

    def release(self, digest: str) -> None:
        slot = self._slots[digest]
        assert slot.num_pins > 0, "released more often than pinned"
        slot.num_pins -= 1
        self._let_leave(digest)

    def make_room(self, num_blocks: int) -> int:
        """Evict what idles and nobody has asked for in this pass, until so many blocks came free.

        Gives how many did; fewer where there is no more to evict.
        """
        num_freed = 0
        for digest in self._idle(but=self._wanted):
            if num_freed >= num_blocks:
                break
            num_freed += self._evict(digest)
        return num_freed

    def wait_ns(self, digest: str, *, since_ns: int) -> int:
        """How long an adapter that is resident now was not, from `since_ns` on."""
        return max(0, self._slots[digest].resident_since_ns - since_ns)

    # Between passes

    def take(self, result: ReadResult[Adapter] | CopyResult) -> AdapterUnavailable | None:
        """What a load thread has done; gives the fault of those who wait for this adapter."""
        if isinstance(result, CopyResult):
            fault = self._finish_copy(result)
        else:
            fault = self._finish_read(result)
        self._counts.failures += fault is not None
        self._counts.mismatches += isinstance(fault, AdapterCorrupted)
        return fault

    def pin(self, digest: str) -> None:
        """Let an adapter stay in a slot from when it is in one. Raises TooManyPins."""
        if digest not in self._staying and len(self._staying) >= self._num_slots - 1:
            raise TooManyPins(
                f"{len(self._staying)} of {self._num_slots} slots hold pinned adapters, and one is "
                "left to the others: unpin one first, or give the engine more with max_loras."
            )
        self._staying[digest] = None
        self._leaving.discard(digest)

    def unpin(self, digest: str) -> None:
        """Let it go when another needs its place. One that is not pinned is no error."""
        self._staying.pop(digest, None)

    def forget(self, digest: str) -> Freed:
        """Unpin and unload: from the host at once, from the device when no sequence uses it."""
        self.unpin(digest)
        host_bytes, device_bytes = self._host.forget(digest), 0
        if digest in self._slots or digest in self._reading:
            device_bytes = self._slots[digest].size_bytes if digest in self._slots else 0
            self._leaving.add(digest)
            self._let_leave(digest)
        is_in_use = digest in self._leaving
        return Freed(0 if is_in_use else device_bytes, host_bytes, is_in_use)

    def check_integrity(self, num_pins: dict[str, int]) -> None:
        """`num_pins`: how many sequences say that they pin each adapter."""
        pins = {digest: s.num_pins for digest, s in self._slots.items() if s.num_pins}
        assert pins == num_pins, f"pins {pins} differ from the sequences' {num_pins}"
        used = [slot.index for slot in self._slots.values()]
        assert sorted(used + self._free) == list(range(self._num_slots)), "leaked slots"
        assert self._num_used_blocks <= self._max_blocks, "adapters took the sequences' memory"
        assert not self._reading & self._slots.keys(), "read again while on the device"
        assert self._leaving <= self._slots.keys() | self._reading, "nobody is left to leave"
        assert not any(self._slots[digest].is_idle for digest in self._leaving & self._slots.keys())
        assert self._draining <= self._slots.keys()
        assert not self._staying or len(self._staying) < self._num_slots, "no slot for the others"
        assert not self._staying.keys() & self._leaving, "it shall stay, and leave"
        assert len(self._reading) <= self._max_reads
        self._host.check_integrity()

    def _finish_read(self, result: ReadResult[Adapter]) -> AdapterUnavailable | None:
        digest, outcome = result.digest, result.outcome
        self._reading.remove(digest)
        is_leaving = digest in self._leaving
        self._leaving.discard(digest)
        if isinstance(outcome, AdapterUnavailable):
            return outcome
        self._counts.reads += 1
        self._counts.read_bytes += outcome.size_bytes
        num_blocks = self._memory.window_blocks(outcome.size_bytes)
        if num_blocks > self._max_blocks:
            return AdapterMissing(
                f"The adapter {digest} has {outcome.size_bytes} bytes and takes {num_blocks} "
                f"blocks of the device's memory, where all adapters together may take "
                f"{self._max_blocks}: give the engine more memory with memory_bytes."
            )
        if not is_leaving:
            self._host.put(digest, outcome)
            self._host.trim(keep=self._spoken_for())
        return None

    def _finish_copy(self, result: CopyResult) -> AdapterUnavailable | None:
        digest, slot = result.digest, self._slots[result.digest]
        adapter, slot.copying = slot.copying, None
        assert adapter is not None, "a copy that nobody began"
        if result.fault is not None:
            self._remove(digest)
        else:
            self._counts.copies += 1
            self._counts.copied_bytes += slot.size_bytes
            slot.resident_since_ns = self._clock_ns()
            self._bank.install(slot.index, adapter, slot.window)
            self._let_leave(digest)
        self._kept.discard(digest)
        self._host.trim(keep=self._spoken_for())
        return result.fault

    # Disk to host

    def _bring(self, digest: str, *, max_reads: int, place: Callable[[str, Adapter], None]) -> None:
        self._wanted.add(digest)
        if digest in self._leaving:
            return
        # Those that come first in turn are kept in the host tier as long as it has room; others
        # could only push each other out, and would be read again in each pass.
        has_room = digest in self._kept or self._kept_bytes < self._host.max_bytes
        adapter = self._host.get(digest)
        if adapter is not None and digest not in self._kept:
            self._kept_bytes += adapter.size_bytes
        if has_room:
            self._kept.add(digest)
        if adapter is not None:
            place(digest, adapter)
        elif has_room and digest not in self._reading and len(self._reading) < max_reads:
            self._reading.add(digest)
            self._loads.read(digest)

    def _spoken_for(self) -> set[str]:
        """What the host tier keeps whatever it weighs: what is waited for or being copied."""
        copying = {digest for digest, slot in self._slots.items() if slot.copying is not None}
        return self._kept | copying

    # Host to device

    @property
    def _num_used_blocks(self) -> int:
        return sum(slot.num_blocks for slot in self._slots.values())

    def _num_blocks_of(self, digests: Iterable[str]) -> int:
        return sum(self._slots[digest].num_blocks for digest in digests)

    def _idle(self, *, but: Container[str], spared: Container[str] | None = None) -> list[str]:
        """What may be evicted: first what nobody asks for, then the longest unused.

        `spared`: what is to stay; None for all that operators have pinned.
        """
        spared = self._staying if spared is None else spared
        idle = [
            digest
            for digest, slot in self._slots.items()
            if slot.is_idle
            and digest not in but
            and digest not in spared
            and digest not in self._draining
        ]
        return sorted(idle, key=(self._wanted | self._lately_wanted).__contains__)

    def _spared_for(self, num_blocks: int) -> Container[str]:
        """The pinned adapters, or none of them where this one fits in no other way."""
        num_pinned_blocks = sum(
            slot.num_blocks for digest, slot in self._slots.items() if digest in self._staying
        )
        return () if num_pinned_blocks + num_blocks > self._max_blocks else self._staying

    def _place_at_all_costs(self, digest: str, adapter: Adapter) -> None:
        """Copy the adapter to the device, or let drain what is in its way."""
        if self._is_memory_short:
            return
        num_blocks = self._memory.window_blocks(adapter.size_bytes)
        spared = self._spared_for(num_blocks)
        idle = self._idle(but=(), spared=spared)
        excess = self._num_used_blocks + num_blocks - self._max_blocks
        if excess > self._num_blocks_of(idle):
            num_drained = self._drain_blocks(excess, spared=spared)
            self._wait_for_memory(num_blocks, num_drained_blocks=num_drained)
            return
        if not self._free and not idle:
            self._drain_one(spared=spared)
            return
        window = self._evict_for(adapter, idle)
        if window is None:
            self._wait_for_memory(num_blocks, num_drained_blocks=0)
        else:
            self._begin_copy(digest, adapter, window)

    def _place_among_idle(self, digest: str, adapter: Adapter) -> None:
        """Copy the adapter to the device where evictions of what idles unwanted suffice for it."""
        if self._is_memory_short:
            return
        num_blocks = self._memory.window_blocks(adapter.size_bytes)
        idle = self._idle(but=self._wanted)
        num_idle_blocks = self._num_blocks_of(idle)
        if (
            (not self._free and not idle)
            or self._num_used_blocks + num_blocks - num_idle_blocks > self._max_blocks
            or self._memory.num_free_blocks + num_idle_blocks < num_blocks
        ):
            return
        window = self._evict_for(adapter, idle)
        if window is not None:
            self._begin_copy(digest, adapter, window)

    def _evict_for(self, adapter: Adapter, idle: list[str]) -> Window | None:
        """Evict as many of `idle`, in order, as it takes to have a slot and a window."""
        num_blocks = self._memory.window_blocks(adapter.size_bytes)
        while idle and (not self._free or self._num_used_blocks + num_blocks > self._max_blocks):
            self._evict(idle.pop(0))
        window = self._take_window(adapter.size_bytes)
        while window is None and idle:
            self._evict(idle.pop(0))
            window = self._take_window(adapter.size_bytes)
        return window

    def _take_window(self, size_bytes: int) -> Window | None:
        """Free blocks that lie between other adapters are brought together."""
        window = self._memory.take_window(size_bytes)
        if window is not None or (
            self._memory.num_free_blocks < self._memory.window_blocks(size_bytes)
        ):
            return window
        moved = self._memory.gather([s.window for s in self._slots.values() if s.copying is None])
        for slot in self._slots.values():
            if slot.window in moved:
                slot.window = moved[slot.window]
                self._bank.move(slot.index, slot.window)
        return self._memory.take_window(size_bytes)

    def _place_if_easy(self, digest: str, adapter: Adapter) -> None:
        """Copy the adapter to the device where that takes no more than one eviction."""
        if self._is_memory_short:
            return
        num_blocks = self._memory.window_blocks(adapter.size_bytes)
        has_blocks = self._num_used_blocks + num_blocks <= self._max_blocks
        window = self._memory.take_window(adapter.size_bytes) if has_blocks else None
        if window is None or not self._free:
            # Without a window of its own it takes the place of one that is not smaller.
            least = num_blocks if window is None else 0
            idle = self._idle(but=self._wanted)
            victim = next((each for each in idle if self._slots[each].num_blocks >= least), None)
            if victim is not None:
                self._evict(victim)
                if window is None:
                    window = self._memory.take_window(adapter.size_bytes)
        if window is not None and self._free:
            self._begin_copy(digest, adapter, window)
        elif window is not None:
            self._memory.return_window(window)

    def _begin_copy(self, digest: str, adapter: Adapter, window: Window) -> None:
        num_blocks = self._memory.window_blocks(adapter.size_bytes)
        self._slots[digest] = _Slot(
            self._free.pop(), window, num_blocks, adapter.size_bytes, copying=adapter
        )
        self._loads.copy(digest, adapter, window)

    def _wait_for_memory(self, num_blocks: int, *, num_drained_blocks: int) -> None:
        """Nobody later in this pass gets memory; those who drain will give theirs in one go."""
        self._is_memory_short = True
        self.num_reserved_blocks = max(0, num_blocks - num_drained_blocks)

    def _by_pins(self, *, spared: Container[str]) -> list[str]:
        """The least pinned first: it alone can only become less pinned while it drains."""
        candidates = [
            digest
            for digest, slot in self._slots.items()
            if slot.copying is None and digest not in self._draining and digest not in spared
        ]
        return sorted(candidates, key=lambda digest: self._slots[digest].num_pins)

    def _drain_one(self, *, spared: Container[str]) -> None:
        self._draining.update(self._by_pins(spared=spared)[:1])

    def _drain_blocks(self, num_blocks: int, *, spared: Container[str]) -> int:
        """Let as many adapters drain as have so many blocks together; gives how many they have."""
        num_drained = 0
        for digest in self._by_pins(spared=spared):
            if num_drained >= num_blocks:
                break
            self._draining.add(digest)
            num_drained += self._slots[digest].num_blocks
        return num_drained

    # Out of the device

    def _evict(self, digest: str) -> int:
        """Gives how many blocks came free."""
        self._counts.evictions += 1
        return self._remove(digest)

    def _remove(self, digest: str) -> int:
        slot = self._slots.pop(digest)
        assert slot.is_idle, "an adapter in use was removed"
        self._bank.clear(slot.index)
        self._memory.return_window(slot.window)
        self._free.append(slot.index)
        self._draining.discard(digest)
        self._leaving.discard(digest)
        return slot.num_blocks

    def _let_leave(self, digest: str) -> None:
        slot = self._slots.get(digest)
        if digest in self._leaving and slot is not None and slot.is_idle:
            self._evict(digest)


def _stay_in_host(digest: str, adapter: object) -> None:
    """Where it is wanted it is."""
