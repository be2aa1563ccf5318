"""What gateways wrote down before they sent anything, read by code that is not theirs.

A gateway drops its journal once the database has what is in it, so each file is given a second name
here when it appears: the bytes stay. The form of the records is `gateway.journal`'s and is spelled
out once more; what they add up to is worked out here from the rule alone: a stream owes what its
last mark says, a whole answer what was written down as sent, and nothing without a token.
"""

import contextlib
import os
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from engine.sequence import SequenceKey

HEAD = struct.Struct("<2sII")


@dataclass(frozen=True)
class Counts:
    """Tokens of one request: what is billed, or shown, or owed."""

    prompt: int
    cached: int
    completion: int


@dataclass
class Entry:
    """One admitted request in a journal."""

    request_id: str
    sequences: list[SequenceKey]
    is_streamed: bool
    prompt_tokens: int
    end_user: str | None
    # Of each progress record, in order.
    marks: list[Counts] = field(default_factory=list)
    is_closed: bool = False
    outcome: str | None = None
    # What its closing record says is billed.
    sent: Counts | None = None

    @property
    def owed(self) -> Counts | None:
        if not self.is_streamed:
            return self.sent
        return self.marks[-1] if self.marks and self.marks[-1].completion else None


class Archive:
    """Keeps what the journals of one host ever said."""

    def __init__(self, journals: Path, folder: Path) -> None:
        self._journals = journals
        self._folder = folder
        folder.mkdir()

    def keep(self) -> None:
        for path in self._journals.glob("*/*.journal"):
            # Gone already, or kept already.
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.link(path, self._folder / f"{path.parent.name}+{path.name}")

    def entries(self) -> list[Entry]:
        epochs: dict[tuple[str, int], list[Any]] = {}
        for path in sorted(self._folder.iterdir()):
            instance, _, name = path.name.partition("+")
            epochs.setdefault((instance, int(name.partition("-")[0])), []).extend(_records(path))
        return [
            entry
            for (instance, epoch), records in epochs.items()
            for entry in _entries(instance, epoch, records)
        ]


def _records(path: Path) -> list[Any]:
    """All whole records; a kill may have left a piece of one at the end."""
    data, position, found = path.read_bytes(), 0, []
    while position + HEAD.size <= len(data):
        magic, length, checksum = HEAD.unpack_from(data, position)
        record = data[position + HEAD.size : position + HEAD.size + length]
        if len(record) < length:
            break
        assert magic == b"\xa7J"
        assert zlib.crc32(struct.pack("<I", length) + record) == checksum
        found.append(msgspec.msgpack.decode(record))
        position += HEAD.size + length
    return found


def _entries(instance: str, epoch: int, records: list[Any]) -> list[Entry]:
    entries: dict[int, Entry] = {}
    for kind, *fields in records:
        if kind == "opened":
            entries[fields[0]] = Entry(
                request_id=fields[1],
                sequences=[(instance, epoch, sequence_id) for sequence_id in fields[16]],
                is_streamed=fields[11],
                prompt_tokens=fields[12],
                end_user=fields[17],
            )
        elif kind == "progress":
            for number, prompt, cached, completion, _ in fields[1]:
                assert not entries[number].is_closed, "nothing is counted after the end"
                entries[number].marks.append(Counts(prompt, cached, completion))
        elif kind == "closed":
            entry, bill = entries[fields[0]], fields[3]
            entry.is_closed, entry.outcome = True, fields[1]
            entry.sent = None if bill is None else Counts(*bill[:3])
    return list(entries.values())
