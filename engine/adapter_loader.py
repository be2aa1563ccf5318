"""Move adapters between the tiers in threads, beside the computation and at its mercy.

Reads bring files from the disk tier into host memory, copies bring prepared adapters from there to
the device. All of it together keeps to one bandwidth, for memory bandwidth is what a step computes
with. Knows digests, sizes and windows. Whether a load is wanted, and where to, others decide.
"""

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from adapters.errors import AdapterError, StoreUnavailable
from engine.errors import AdapterMissing, AdapterUnavailable
from engine.host_tier import Adapter

logger = logging.getLogger(__name__)

# Reading from a store is mostly waiting; more threads would only share its bandwidth.
NUM_READERS = 4
# Short against a step, so that a capped copy runs evenly; long against the cost of one call.
SLICE_BYTES = 1024**2
# Steps come first where there are fewer cores than threads.
NICENESS = 10

Window = TypeVar("Window")


class LoadsEnded(Exception):
    """The engine closes: a load that waits for its bandwidth is given up."""


class Pace:
    """A bandwidth that threads share: whoever takes bytes sleeps until their time has come."""

    def __init__(
        self,
        max_bytes_per_s: float | None,
        *,
        clock_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._max_bytes_per_s = max_bytes_per_s
        self._clock_s = clock_s
        self._ended = threading.Event()
        self._sleep = sleep or self._ended.wait
        self._lock = threading.Lock()
        # When all that was taken so far will have had its time.
        self._paid_until_s = 0.0

    def take(self, num_bytes: int) -> None:
        """Blocks until `num_bytes` may move. Raises LoadsEnded."""
        if self._max_bytes_per_s is not None:
            with self._lock:
                now_s = self._clock_s()
                start_s = max(now_s, self._paid_until_s)
                self._paid_until_s = start_s + num_bytes / self._max_bytes_per_s
            if start_s > now_s:
                self._sleep(start_s - now_s)
        if self._ended.is_set():
            raise LoadsEnded

    def end(self) -> None:
        """Wake those who sleep; nothing moves any more."""
        self._ended.set()


@dataclass(frozen=True, slots=True)
class ReadResult(Generic[Adapter]):
    digest: str
    # The adapter, or why there is none.
    outcome: Adapter | AdapterUnavailable


@dataclass(frozen=True, slots=True)
class CopyResult:
    digest: str
    # Why the window does not hold the adapter; None where it does.
    fault: AdapterUnavailable | None


class AdapterLoader(Generic[Adapter, Window]):
    """Runs `read` and `copy_slice` in threads, and keeps what comes of it until it is asked for.

    `read` calls `Pace.take` before it moves each piece. `copy_slice(adapter, window, start, end)`
    has brought these bytes of the adapter into the window when it returns. `check_copy` raises
    AdapterUnavailable where the window does not hold the adapter of that digest after all of them.
    """

    def __init__(
        self,
        read: Callable[[str, Pace], Adapter],
        copy_slice: Callable[[Adapter, Window, int, int], None],
        *,
        check_copy: Callable[[str, Adapter, Window], None],
        max_bytes_per_s: float | None,
        on_result: Callable[[], None],
    ) -> None:
        self._read_adapter = read
        self._copy_slice = copy_slice
        self._check_copy = check_copy
        self._on_result = on_result
        self._pace = Pace(max_bytes_per_s)
        self._results: queue.SimpleQueue[ReadResult[Adapter] | CopyResult] = queue.SimpleQueue()
        self._readers = ThreadPoolExecutor(
            NUM_READERS, thread_name_prefix="adapter-read", initializer=step_aside
        )
        # One after another: two copies side by side would both be late.
        self._copier = ThreadPoolExecutor(
            1, thread_name_prefix="adapter-copy", initializer=step_aside
        )

    def read(self, digest: str) -> None:
        self._readers.submit(self._run, lambda: self._read(digest))

    def copy(self, digest: str, adapter: Adapter, window: Window) -> None:
        self._copier.submit(self._run, lambda: self._copy(digest, adapter, window))

    def has_results(self) -> bool:
        return not self._results.empty()

    def take_results(self) -> list[ReadResult[Adapter] | CopyResult]:
        results = []
        while not self._results.empty():
            results.append(self._results.get())
        return results

    def close(self) -> None:
        """Drop what has not begun and wait for the rest."""
        self._pace.end()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._copier.shutdown(wait=True, cancel_futures=True)

    # All below runs in the load threads.

    def _run(self, load: Callable[[], ReadResult[Adapter] | CopyResult]) -> None:
        try:
            result = load()
        except LoadsEnded:
            return
        self._results.put(result)
        self._on_result()

    def _read(self, digest: str) -> ReadResult[Adapter]:
        try:
            return ReadResult(digest, self._read_adapter(digest, self._pace))
        except LoadsEnded:
            raise
        except Exception as error:
            logger.warning("adapter_read_failed", extra={"digest": digest}, exc_info=True)
            return ReadResult(digest, unavailable(digest, error))

    def _copy(self, digest: str, adapter: Adapter, window: Window) -> CopyResult:
        try:
            for start in range(0, adapter.size_bytes, SLICE_BYTES):
                end = min(start + SLICE_BYTES, adapter.size_bytes)
                self._pace.take(end - start)
                self._copy_slice(adapter, window, start, end)
            self._check_copy(digest, adapter, window)
        except LoadsEnded:
            raise
        except Exception as error:
            logger.warning("adapter_copy_failed", extra={"digest": digest}, exc_info=True)
            return CopyResult(digest, unavailable(digest, error))
        return CopyResult(digest, None)


def unavailable(digest: str, error: Exception) -> AdapterUnavailable:
    """Files that are missing or wrong stay so; whatever else failed may work the next time."""
    if isinstance(error, AdapterUnavailable):
        return error
    is_lasting = isinstance(error, AdapterError | FileNotFoundError)
    if is_lasting and not isinstance(error, StoreUnavailable):
        return AdapterMissing(f"The adapter {digest} cannot be loaded: {error}")
    return AdapterUnavailable(f"The adapter {digest} could not be loaded now.")


def step_aside() -> None:
    """Run on any core, after those who compute."""
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    # OMP_PROC_BIND binds the thread that loads OpenMP to one core, and whatever thread it starts
    # inherits that: all loads would run on the core of the one thread that a step waits for.
    os.sched_setaffinity(thread, _cores_of_this_process())
    niceness = os.getpriority(os.PRIO_PROCESS, thread)
    # Of one thread alone, on Linux.
    os.setpriority(os.PRIO_PROCESS, thread, max(niceness, NICENESS))


def _cores_of_this_process() -> set[int]:
    """Those that its threads have together: OpenMP gives each of its own another core."""
    cores: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            cores |= os.sched_getaffinity(int(task.name))
        except ProcessLookupError:
            continue  # it ended meanwhile
    return cores
