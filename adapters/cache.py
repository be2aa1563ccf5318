"""Hold recently used adapters on the local disk, each verified once, never more than fit.

Threads call it; each adapter is fetched by one of them while the others wait. Knows nothing of
devices or slots.
"""

import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters import lora_config, manifest
from adapters.errors import DigestMismatch
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from adapters.store import ArtifactStore

# What a folder is called while it is being filled or removed; swept at the next start.
_PASSING = "passing-"


@dataclass(slots=True)
class _Held:
    """One adapter on disk; changed only under the cache's lock."""

    size_bytes: int
    num_readers: int = 0
    # To be gone as soon as nobody reads it.
    is_leaving: bool = False


class DiskCache:
    """Adapters of a store as local folders, least recently used first to go.

    One process owns `root`. `max_bytes` is kept except for adapters that are being read.
    """

    def __init__(self, store: ArtifactStore, root: Path, *, max_bytes: int) -> None:
        self._store = store
        self._root = root
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        # Least recently used first.
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._fetching: dict[str, Future[None]] = {}
        # Those of them that were forgotten meanwhile.
        self._unwanted: set[str] = set()
        root.mkdir(parents=True, exist_ok=True)
        self._take_over()

    @contextmanager
    def fetch(self, digest: str) -> Iterator[Path]:
        """Give the folder of an adapter, which stays as long as the `with` block lasts. Blocks.

        Raises ArtifactMissing, DigestMismatch, UnreadableArtifact and StoreUnavailable.
        """
        self._pin(digest)
        try:
            yield self._root / digest
        finally:
            self._unpin(digest)

    def forget(self, digest: str) -> int:
        """Remove an adapter once nobody reads it; gives the bytes that came free at once.

        One that is being fetched goes when those who wait for it have read it.
        """
        with self._lock:
            held = self._held.get(digest)
            if held is None:
                if digest in self._fetching:
                    self._unwanted.add(digest)
                return 0
            held.is_leaving = True
            leaving = self._evict()
        self._remove(leaving)
        return 0 if held.num_readers else held.size_bytes

    @property
    def size_bytes(self) -> int:
        """Bytes on disk, those being fetched not included."""
        with self._lock:
            return sum(held.size_bytes for held in self._held.values())

    def _pin(self, digest: str) -> None:
        while True:
            with self._lock:
                if held := self._held.get(digest):
                    held.num_readers += 1
                    self._held.move_to_end(digest)
                    return
                flight = self._fetching.get(digest)
                is_mine = flight is None
                if flight is None:
                    flight = self._fetching[digest] = Future()
            if is_mine:
                self._fly(digest, flight)
                return
            flight.result()

    def _fly(self, digest: str, flight: Future[None]) -> None:
        """Fetch and pin. A failure goes to all who wait as well, and is not remembered."""
        try:
            size_bytes = self._download(digest)
        except BaseException as error:
            with self._lock:
                del self._fetching[digest]
                self._unwanted.discard(digest)
            flight.set_exception(error)
            raise
        with self._lock:
            is_leaving = digest in self._unwanted
            self._unwanted.discard(digest)
            self._held[digest] = _Held(size_bytes, num_readers=1, is_leaving=is_leaving)
            del self._fetching[digest]
            leaving = self._evict()
        flight.set_result(None)
        self._remove(leaving)

    def _download(self, digest: str) -> int:
        folder = Path(tempfile.mkdtemp(prefix=_PASSING, dir=self._root))
        try:
            self._store.fetch_adapter(digest, folder)
            verify(digest, folder)
            _flush(folder)
            folder.rename(self._root / digest)
        except BaseException:
            shutil.rmtree(folder)
            raise
        return _size_bytes(self._root / digest)

    def _unpin(self, digest: str) -> None:
        with self._lock:
            self._held[digest].num_readers -= 1
            leaving = self._evict()
        self._remove(leaving)

    def _evict(self) -> list[Path]:
        """Forget what must go, under the lock; return the folders, renamed, to be removed later."""
        leaving = []
        total = sum(held.size_bytes for held in self._held.values())
        for digest, held in list(self._held.items()):
            if held.num_readers or not (held.is_leaving or total > self._max_bytes):
                continue
            del self._held[digest]
            total -= held.size_bytes
            leaving.append(self._set_aside(digest))
        return leaving

    def _set_aside(self, digest: str) -> Path:
        """Rename, so that the digest can be fetched anew while the old folder is removed."""
        aside = Path(tempfile.mkdtemp(prefix=_PASSING, dir=self._root))
        return (self._root / digest).rename(aside / digest).parent

    def _remove(self, folders: list[Path]) -> None:
        for folder in folders:
            shutil.rmtree(folder)

    def _take_over(self) -> None:
        """Continue with what an earlier process left: whole folders stay, the rest goes."""
        folders = sorted(self._root.iterdir(), key=lambda folder: folder.stat().st_mtime)
        for folder in folders:
            if folder.name.startswith(_PASSING):
                shutil.rmtree(folder)
            else:
                self._held[folder.name] = _Held(_size_bytes(folder))
        self._remove(self._evict())


def verify(digest: str, folder: Path) -> None:
    """Read the adapter in a folder whole. Raises DigestMismatch and UnreadableArtifact. Blocks."""
    data = (folder / CONFIG_FILE).read_bytes()
    config, _ = lora_config.parse(data)
    found = manifest.read(
        data, folder / WEIGHTS_FILE, base_model=config.base_model_name or ""
    ).weights_digest
    if found != digest:
        raise DigestMismatch(digest, found=found)


def _flush(folder: Path) -> None:
    """Reach the disk before the rename does, so that no power cut leaves a whole-looking folder."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
