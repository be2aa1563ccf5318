"""Read the header of a safetensors file that a stranger sent, and trust none of it.

Knows bytes, dtypes and shapes; knows nothing of what the tensors are for.
"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from adapters.errors import Finding, UnreadableArtifact

CHUNK_BYTES = 4 << 20
# 100,000 tensors with long names; PEFT's largest are a tenth of that.
MAX_HEADER_BYTES = 16 << 20

MAX_NAME_LENGTH = 500

_LENGTH = struct.Struct("<Q")
_DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies in its file."""

    name: str
    # As safetensors spells it: "F32", "F16", "BF16", ...
    dtype: str
    shape: tuple[int, ...]
    # Bytes from the start of the file; `end` is one past the last.
    begin: int
    end: int


_Size = Annotated[int, msgspec.Meta(ge=0)]


class _Declared(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=8)]
    data_offsets: tuple[_Size, _Size]


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file by name.

    Raises UnreadableArtifact, whatever the bytes are.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH.size)
        if len(prefix) < _LENGTH.size:
            raise _unreadable(path, "is too short to hold a header")
        (header_bytes,) = _LENGTH.unpack(prefix)
        _check_length(path, prefix + file.read(1), header_bytes, size_bytes=size_bytes)
        file.seek(_LENGTH.size)
        header = file.read(header_bytes)
    declared = _decode(path, header)
    tensors = {
        name: _place(path, name, entry, data_begin=_LENGTH.size + header_bytes)
        for name, entry in declared.items()
    }
    _check_tiling(path, tensors, begin=_LENGTH.size + header_bytes, end=size_bytes)
    return tensors


def chunks(path: Path, entry: TensorEntry) -> Iterator[bytes]:
    """Yield the bytes of one tensor, a few MiB at a time; each chunk but the last is full.

    Raises UnreadableArtifact when the file has become shorter than its header says.
    """
    with path.open("rb") as file:
        file.seek(entry.begin)
        left = entry.end - entry.begin
        while left:
            chunk = file.read(min(left, CHUNK_BYTES))
            if len(chunk) < min(left, CHUNK_BYTES):
                raise _unreadable(path, "ends before its last tensor")
            left -= len(chunk)
            yield chunk


def looks_like_pickle(head: bytes) -> bool:
    """Whether bytes that are no safetensors file begin like one of PyTorch's own formats."""
    return head.startswith(b"PK\x03\x04") or (
        head[:1] == b"\x80" and head[1:2] in b"\x01\x02\x03\x04\x05"
    )


def _check_length(path: Path, head: bytes, header_bytes: int, *, size_bytes: int) -> None:
    is_plausible = 2 <= header_bytes <= size_bytes - _LENGTH.size and head[8:9] == b"{"
    if is_plausible and header_bytes <= MAX_HEADER_BYTES:
        return
    if looks_like_pickle(head):
        raise UnreadableArtifact([pickle_finding(path.name)])
    if header_bytes > size_bytes - _LENGTH.size:
        raise _unreadable(path, "is truncated, or is not a safetensors file")
    if header_bytes > MAX_HEADER_BYTES:
        raise _unreadable(path, f"has a header of more than {MAX_HEADER_BYTES} bytes")
    raise _unreadable(path, "is not a safetensors file")


def pickle_finding(file_name: str) -> Finding:
    """The refusal of a pickle, whatever it is called."""
    return Finding(
        code="pickle_refused",
        where=file_name,
        message="is a pickle, which can run code when it is read",
        fix="save the adapter with PEFT's save_pretrained(..., safe_serialization=True)",
    )


def _decode(path: Path, header: bytes) -> dict[str, _Declared]:
    try:
        # Shape before content: the typed pass refuses what would take much memory as objects.
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        metadata = raw.pop(_METADATA, None)
        if metadata is not None:
            msgspec.json.decode(metadata, type=dict[str, str])
        declared = {name: msgspec.json.decode(r, type=_Declared) for name, r in raw.items()}
        json.loads(header, object_pairs_hook=_refuse_repeats)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, f"has a malformed header: {error}") from error
    return declared


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> None:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("the same name appears twice")


def _place(path: Path, name: str, declared: _Declared, *, data_begin: int) -> TensorEntry:
    begin, end = declared.data_offsets
    if len(name) > MAX_NAME_LENGTH:
        raise _unreadable(path, f"has a name of more than {MAX_NAME_LENGTH} characters", where=name)
    width = _DTYPE_BYTES.get(declared.dtype)
    if width is None:
        raise _unreadable(path, f"has the unknown dtype {declared.dtype[:40]!r}", where=name)
    if math.prod(declared.shape) * width != end - begin:
        raise _unreadable(path, "has a shape that does not fit its bytes", where=name)
    return TensorEntry(
        name=name,
        dtype=declared.dtype,
        shape=declared.shape,
        begin=data_begin + begin,
        end=data_begin + end,
    )


def _check_tiling(path: Path, tensors: dict[str, TensorEntry], *, begin: int, end: int) -> None:
    """Tensors must cover the data exactly: no gap where bytes could hide, no byte used twice."""
    place = begin
    for entry in sorted(tensors.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != place:
            problem = "overlaps another tensor" if entry.begin < place else "leaves a gap before it"
            raise _unreadable(path, problem, where=entry.name)
        place = entry.end
    if place != end:
        problem = "is truncated" if place > end else "has bytes that belong to no tensor"
        raise _unreadable(path, problem)


def _unreadable(path: Path, problem: str, *, where: str | None = None) -> UnreadableArtifact:
    finding = Finding(
        code="weights_unreadable",
        where=(where or path.name)[:500],
        message=problem,
        fix="upload the adapter_model.safetensors that PEFT's save_pretrained wrote, whole",
    )
    return UnreadableArtifact([finding])
