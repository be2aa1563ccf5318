"""A device that counts blocks and a loader that waits to be told, for tests of the tiers.

Both stand at the pool's boundary: what these tests are about is who is where, not what is moved.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.adapter_loader import CopyResult, ReadResult
from engine.errors import AdapterUnavailable
from engine.host_tier import HostTier
from engine.slots import SlotPool

BLOCK_BYTES = 10
# One to see off what is leaving, one to read, one to copy, one to pin.
MOST_PASSES = 4


@dataclass(frozen=True, slots=True)
class Weights:
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Window:
    number: int
    num_blocks: int


@dataclass(slots=True)
class Device:
    """Blocks without places, and what each slot computes with."""

    num_blocks: int
    num_kv_blocks: int = 0
    windows: set[Window] = field(default_factory=set)
    installed: dict[int, str] = field(default_factory=dict)
    num_windows: int = 0

    @property
    def num_free_blocks(self) -> int:
        return self.num_blocks - self.num_kv_blocks - sum(w.num_blocks for w in self.windows)

    def window_blocks(self, size_bytes: int) -> int:
        return -(-size_bytes // BLOCK_BYTES)

    def take_window(self, size_bytes: int) -> Window | None:
        window = Window(self.num_windows, self.window_blocks(size_bytes))
        if window.num_blocks > self.num_free_blocks:
            return None
        self.num_windows += 1
        self.windows.add(window)
        return window

    def gather(self, movable: Iterable[Window]) -> dict[Window, Window]:
        return {}

    def return_window(self, window: Window) -> None:
        self.windows.remove(window)

    def install(self, slot: int, adapter: Weights, window: Window) -> None:
        assert window in self.windows
        assert window.num_blocks == self.window_blocks(adapter.size_bytes)
        self.installed[slot] = adapter.digest

    def move(self, slot: int, window: Window) -> None:
        raise AssertionError("nothing lies in between here")

    def clear(self, slot: int) -> None:
        self.installed.pop(slot, None)


@dataclass(slots=True)
class Loads:
    """What was begun, in order."""

    reads: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)

    def read(self, digest: str) -> None:
        self.reads.append(digest)

    def copy(self, digest: str, adapter: Weights, window: Window) -> None:
        assert adapter.digest == digest
        self.copies.append(digest)


class TierLab:
    """Adapters are named by their size: "a3" takes three blocks of the device."""

    def __init__(
        self,
        num_slots: int = 2,
        *,
        num_blocks: int = 100,
        max_blocks: int | None = None,
        host_blocks: int = 100,
    ) -> None:
        self.device = Device(num_blocks)
        self.loads = Loads()
        self.host: HostTier[Weights] = HostTier(host_blocks * BLOCK_BYTES)
        self.now_ns = 0
        self.pool: SlotPool[Weights, Window] = SlotPool(
            num_slots,
            memory=self.device,
            max_blocks=num_blocks if max_blocks is None else max_blocks,
            host=self.host,
            loads=self.loads,
            bank=self.device,
            clock_ns=lambda: self.now_ns,
        )

    def finish_read(
        self, digest: str, fault: AdapterUnavailable | None = None
    ) -> AdapterUnavailable | None:
        self.loads.reads.remove(digest)
        weights = Weights(digest, int(digest[1:]) * BLOCK_BYTES)
        return self.pool.take(ReadResult(digest, fault or weights))

    def finish_copy(
        self, digest: str, fault: AdapterUnavailable | None = None
    ) -> AdapterUnavailable | None:
        self.loads.copies.remove(digest)
        return self.pool.take(CopyResult(digest, fault))

    def finish_all(self) -> None:
        for digest in tuple(self.loads.reads):
            assert self.finish_read(digest) is None
        for digest in tuple(self.loads.copies):
            assert self.finish_copy(digest) is None

    def run_pass(self, *wanted: str, prefetched: tuple[str, ...] = ()) -> list[str]:
        """Ask for these in turn; gives those that are pinned now."""
        self.pool.begin_pass()
        pinned = [digest for digest in wanted if self.pool.acquire(digest) is not None]
        for digest in prefetched:
            self.pool.prefetch(digest)
        return pinned

    def bring(self, *digests: str) -> None:
        """Make them resident and idle."""
        for digest in digests:
            for _ in range(MOST_PASSES):
                if self.run_pass(digest):
                    break
                self.finish_all()
            self.pool.release(digest)

    def pin(self, *digests: str) -> None:
        for digest in digests:
            self.bring(digest)
            assert self.run_pass(digest) == [digest]
