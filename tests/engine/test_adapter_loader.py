"""Loads in real threads, and the bandwidth that they share."""

import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from adapters.errors import ArtifactMissing
from engine.adapter_loader import (
    SLICE_BYTES,
    AdapterLoader,
    CopyResult,
    LoadsEnded,
    Pace,
    ReadResult,
)
from engine.errors import AdapterCorrupted, AdapterMissing, AdapterUnavailable

PATIENCE_S = 60


@dataclass(frozen=True, slots=True)
class Weights:
    content: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.content)


Loader = AdapterLoader[Weights, bytearray]
Result = ReadResult[Weights] | CopyResult


class Desk:
    """A loader, what it reads from, and its results."""

    def __init__(self) -> None:
        self.files = {"a": b"a" * 10}
        self.troubles: dict[str, Exception] = {}
        self.gates: dict[str, threading.Event] = {}
        self.slices: list[tuple[int, int]] = []
        # What windows must hold after a copy, where a test says so.
        self.expected: dict[str, bytes] = {}
        self._has_news = threading.Event()
        self.loader: Loader = AdapterLoader(
            self._read,
            self._copy_slice,
            check_copy=self._check_copy,
            max_bytes_per_s=None,
            on_result=self._has_news.set,
        )

    def _read(self, digest: str, pace: Pace) -> Weights:
        if digest in self.gates:
            assert self.gates[digest].wait(PATIENCE_S)
        if digest in self.troubles:
            raise self.troubles[digest]
        pace.take(len(self.files[digest]))
        return Weights(self.files[digest])

    def _copy_slice(self, adapter: Weights, window: bytearray, start: int, end: int) -> None:
        if adapter.content.startswith(b"broken"):
            raise RuntimeError("the device has gone")
        self.slices.append((start, end))
        window[start:end] = adapter.content[start:end]

    def _check_copy(self, digest: str, adapter: Weights, window: bytearray) -> None:
        if bytes(window) != self.expected.get(digest, bytes(window)):
            raise AdapterCorrupted(f"{digest} is something else")

    def results(self, count: int) -> list[Result]:
        found: list[Result] = []
        while len(found) < count:
            assert self._has_news.wait(PATIENCE_S), "no result came"
            self._has_news.clear()
            found += self.loader.take_results()
        return found


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    for gate in desk.gates.values():
        gate.set()
    desk.loader.close()


def test_a_read_gives_the_adapter(desk: Desk) -> None:
    desk.loader.read("a")
    assert desk.results(1) == [ReadResult("a", Weights(b"a" * 10))]
    assert not desk.loader.has_results()


def test_a_copy_moves_all_bytes_slice_by_slice(desk: Desk) -> None:
    content = os.urandom(2 * SLICE_BYTES + 5)
    window = bytearray(len(content))
    desk.loader.copy("a", Weights(content), window)
    assert desk.results(1) == [CopyResult("a", None)]
    assert window == content
    assert desk.slices == [
        (0, SLICE_BYTES),
        (SLICE_BYTES, 2 * SLICE_BYTES),
        (2 * SLICE_BYTES, 2 * SLICE_BYTES + 5),
    ]


def test_reads_and_copies_go_on_beside_a_read_that_hangs(desk: Desk) -> None:
    desk.gates["slow"] = threading.Event()
    desk.loader.read("slow")
    desk.loader.read("a")
    desk.loader.copy("b", Weights(b"b"), bytearray(1))
    assert {result.digest for result in desk.results(2)} == {"a", "b"}


@pytest.mark.parametrize(
    ("trouble", "is_retryable"),
    [
        (ArtifactMissing("bad"), False),
        (FileNotFoundError("no such file"), False),
        (AdapterMissing("rank 99"), False),
        (OSError("connection reset"), True),
        (RuntimeError("a store's own error"), True),
    ],
)
def test_a_read_that_fails_says_whether_it_may_work_later(
    desk: Desk, trouble: Exception, is_retryable: bool
) -> None:
    desk.troubles["bad"] = trouble
    desk.loader.read("bad")
    (result,) = desk.results(1)
    assert isinstance(result, ReadResult)
    assert isinstance(result.outcome, AdapterUnavailable)
    assert result.outcome.is_retryable is is_retryable


def test_a_copy_that_fails_says_so_and_the_next_goes_on(desk: Desk) -> None:
    desk.loader.copy("bad", Weights(b"broken"), bytearray(6))
    desk.loader.copy("a", Weights(b"a"), bytearray(1))
    bad, good = desk.results(2)
    assert isinstance(bad, CopyResult)
    assert isinstance(bad.fault, AdapterUnavailable)
    assert good == CopyResult("a", None)


@pytest.mark.skipif(sys.platform != "linux", reason="cores and priorities are Linux's")
def test_load_threads_run_on_any_core_after_those_who_compute() -> None:
    cores = os.sched_getaffinity(0)
    found: list[tuple[set[int], int]] = []
    has_come = threading.Event()

    def read(digest: str, pace: Pace) -> Weights:
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread)
        found.append((os.sched_getaffinity(thread), niceness))
        return Weights(b"")

    # As a thread that stands for the other cores of OpenMP's.
    ends = threading.Event()
    other = threading.Thread(target=ends.wait)
    other.start()
    loader: Loader = AdapterLoader(
        read,
        lambda *_: None,
        check_copy=lambda *_: None,
        max_bytes_per_s=None,
        on_result=has_come.set,
    )
    try:
        os.sched_setaffinity(0, {min(cores)})
        loader.read("a")
        assert has_come.wait(PATIENCE_S)
    finally:
        os.sched_setaffinity(0, cores)
        ends.set()
        other.join()
        loader.close()
    ((affinity, niceness),) = found
    assert affinity == cores
    assert niceness >= 10
    assert os.getpriority(os.PRIO_PROCESS, 0) <= niceness


def test_close_gives_up_a_load_that_waits_for_its_bandwidth() -> None:
    moved: list[int] = []
    has_begun = threading.Event()

    def copy_slice(adapter: Weights, window: bytearray, start: int, end: int) -> None:
        moved.append(end - start)
        has_begun.set()

    # At this pace the second slice's turn is next year's.
    loader: Loader = AdapterLoader(
        lambda digest, pace: Weights(b""),
        copy_slice,
        check_copy=lambda *_: None,
        max_bytes_per_s=0.01,
        on_result=lambda: None,
    )
    loader.copy("a", Weights(bytes(2 * SLICE_BYTES)), bytearray())
    assert has_begun.wait(PATIENCE_S)
    loader.close()
    assert moved == [SLICE_BYTES]
    assert not loader.has_results()


class Time:
    """Passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 50.0

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


def paced(max_bytes_per_s: float | None) -> tuple[Pace, Time]:
    time = Time()
    return Pace(max_bytes_per_s, clock_s=lambda: time.now_s, sleep=time.sleep), time


def test_bytes_keep_to_the_bandwidth_whatever_their_portions() -> None:
    pace, time = paced(100)
    for size_bytes in (10, 300, 0, 40, 150):
        pace.take(size_bytes)
    pace.take(1)
    assert time.now_s == pytest.approx(50 + 5.0)


def test_nothing_is_saved_up_while_nothing_moves() -> None:
    pace, time = paced(100)
    time.now_s += 1000
    for _ in range(3):
        pace.take(100)
    assert time.now_s == pytest.approx(1050 + 2.0)


def test_without_a_limit_nobody_waits() -> None:
    pace, time = paced(None)
    for _ in range(3):
        pace.take(10**12)
    assert time.now_s == 50


@pytest.mark.parametrize("max_bytes_per_s", [None, 100])
def test_nothing_moves_after_the_end(max_bytes_per_s: float | None) -> None:
    pace, _ = paced(max_bytes_per_s)
    pace.end()
    with pytest.raises(LoadsEnded):
        pace.take(1)


def test_a_copy_that_is_not_the_adapter_is_told(desk: Desk) -> None:
    desk.expected["b"] = b"b" * 10
    desk.loader.copy("b", Weights(b"a" * 10), bytearray(10))
    (result,) = desk.results(1)
    assert isinstance(result, CopyResult)
    assert isinstance(result.fault, AdapterCorrupted)
    assert "b is something else" in str(result.fault)
