"""Append-only files of checksummed records.

A record is whole or absent: a tail that a crash tore is cut off and reported, damage before good
records is an error with its position. Knows nothing of what the records say.
"""

import logging
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gateway.errors import JournalCorrupt, JournalFailed

logger = logging.getLogger(__name__)

MAGIC = b"\xa7J"
# magic, length of the record, CRC-32 of that length and the record
_HEAD = struct.Struct("<2sII")
_LENGTH = struct.Struct("<I")
# A frame of ten thousand sequences stays far below; a length above is not one of ours.
MAX_RECORD_BYTES = 1 << 24
_SUFFIX = ".journal"


@dataclass(frozen=True, slots=True)
class TornTail:
    """What a crash left unfinished at the end of a file; nobody was answered on its strength."""

    path: Path
    position: int
    size_bytes: int


def frame(record: bytes) -> bytes:
    assert len(record) <= MAX_RECORD_BYTES, "a record is shorter than a segment"
    return _HEAD.pack(MAGIC, len(record), _checksum(record)) + record


def segment_path(folder: Path, epoch: int, number: int) -> Path:
    return folder / f"{epoch:010d}-{number:08d}{_SUFFIX}"


def find_segments(folder: Path) -> dict[int, list[Path]]:
    """The segments in a folder, oldest first, by the epoch that wrote them."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.glob(f"*-*{_SUFFIX}")):
        found.setdefault(int(path.name.partition("-")[0]), []).append(path)
    return found


@dataclass(frozen=True, slots=True)
class SegmentContent:
    """The records of one segment, and what had to be cut off behind them."""

    records: list[bytes]
    torn: TornTail | None


def read_records(path: Path, *, is_last: bool) -> SegmentContent:
    """All records of a segment; a torn tail of the last segment is cut off the file.

    Raises JournalCorrupt for any other damage.
    """
    data = path.read_bytes()
    records, position = _scan(data)
    if position == len(data):
        return SegmentContent(records, None)
    # A segment is synced before the next one begins, so only the last one can be torn.
    if not is_last or _has_record_after(data, position):
        raise JournalCorrupt(path, position)
    return SegmentContent(records, _cut(path, position, len(data) - position))


def peek_records(path: Path) -> list[bytes]:
    """All records of a segment that may still be written; the file stays as it is.

    Raises JournalCorrupt for damage before good records.
    """
    data = path.read_bytes()
    records, position = _scan(data)
    if position < len(data) and _has_record_after(data, position):
        raise JournalCorrupt(path, position)
    return records


def _scan(data: bytes) -> tuple[list[bytes], int]:
    """The records from the beginning on, and where they end."""
    records, position = [], 0
    while (record := _record_at(data, position)) is not None:
        records.append(record)
        position += _HEAD.size + len(record)
    return records, position


def _cut(path: Path, position: int, size_bytes: int) -> TornTail:
    os.truncate(path, position)
    logger.warning(
        "journal_tail_cut",
        extra={"path": str(path), "position": position, "size_bytes": size_bytes},
    )
    return TornTail(path, position, size_bytes)


def _record_at(data: bytes, position: int) -> bytes | None:
    """The record that begins there, or None where none does or it is not whole."""
    if position + _HEAD.size > len(data):
        return None
    magic, length, checksum = _HEAD.unpack_from(data, position)
    begin = position + _HEAD.size
    if magic != MAGIC or length > MAX_RECORD_BYTES or begin + length > len(data):
        return None
    record = data[begin : begin + length]
    return record if _checksum(record) == checksum else None


def _has_record_after(data: bytes, position: int) -> bool:
    return any(_record_at(data, place) is not None for place in _magics(data, position + 1))


def _magics(data: bytes, position: int) -> Iterator[int]:
    while (position := data.find(MAGIC, position)) != -1:
        yield position
        position += 1


def _checksum(record: bytes) -> int:
    return zlib.crc32(record, zlib.crc32(_LENGTH.pack(len(record))))


class Segments:
    """The segments that one process writes: the last one grows, the oldest are dropped.

    `append` returns when the kernel has the bytes, so they survive a `kill -9` of the process;
    `sync`, called about once a second from a thread, makes them survive the machine's power.
    """

    def __init__(self, folder: Path, epoch: int, *, max_segment_bytes: int) -> None:
        self._folder = folder
        self._epoch = epoch
        self._max_segment_bytes = max_segment_bytes
        # Guards the file descriptor against a sync that runs while a segment ends.
        self._lock = threading.Lock()
        self._oldest = self.number = 1
        self._size_bytes = 0
        self._is_closed = False
        self._fd = self._create(self.number)

    def append(self, record: bytes) -> int:
        """Write a record; return the number of the segment that has it.

        Raises JournalFailed when the file system refuses; nothing of the record is left then.
        """
        if self._is_closed:
            raise JournalFailed("The journal is closed.")
        data = frame(record)
        if self._size_bytes and self._size_bytes + len(data) > self._max_segment_bytes:
            self._rotate()
        try:
            _write_all(self._fd, data)
        except OSError as fault:
            self._cut_back()
            raise JournalFailed(f"The journal cannot be written: {fault.strerror}") from fault
        self._size_bytes += len(data)
        return self.number

    def sync(self) -> None:
        with self._lock:
            if not self._is_closed:
                os.fdatasync(self._fd)

    def drop_before(self, number: int) -> None:
        """Delete the segments with smaller numbers; never the one that grows."""
        while self._oldest < min(number, self.number):
            segment_path(self._folder, self._epoch, self._oldest).unlink(missing_ok=True)
            self._oldest += 1

    def close(self, *, keep: bool) -> None:
        """Stop writing; delete what is there unless it is to be kept."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                os.fdatasync(self._fd)
                os.close(self._fd)
        if not keep:
            self.number += 1
            self.drop_before(self.number)

    def _cut_back(self) -> None:
        """Half a record in the middle would make all later ones unreadable."""
        try:
            os.ftruncate(self._fd, self._size_bytes)
        except OSError:
            logger.exception("journal_tail_left", extra={"position": self._size_bytes})
            self.close(keep=True)

    def _rotate(self) -> None:
        try:
            with self._lock:
                os.fdatasync(self._fd)
                fd = self._create(self.number + 1)
                os.close(self._fd)
                self._fd = fd
        except OSError as fault:
            raise JournalFailed(f"The journal cannot be written: {fault.strerror}") from fault
        self.number += 1
        self._size_bytes = 0

    def _create(self, number: int) -> int:
        path = segment_path(self._folder, self._epoch, number)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC
        fd = os.open(path, flags, 0o600)
        sync_folder(self._folder)
        return fd


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive the machine's power."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
