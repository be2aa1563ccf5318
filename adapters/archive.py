"""Unpack an uploaded .tar, .tar.gz or .zip into a folder, and let nothing out of that folder.

Takes the files that an adapter may have, from the topmost folder that holds one. Whatever lies
deeper, such as a trainer's checkpoints, is never opened. Bytes are counted as they come out, so it
does not matter what the archive says about itself.
"""

import gzip
import io
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath
from typing import IO

from adapters.errors import ArchiveRefused, Finding, TooLarge
from adapters.folder import (
    ADAPTER_FILES,
    OLD_TOKENIZER_FILES,
    OPTIONAL_FILES,
    is_archive,
    is_left_by_trainers,
    is_pickle,
    max_bytes_of,
)
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from adapters.tensor_file import looks_like_pickle, pickle_finding

_CHUNK_BYTES = 1 << 20
# Names and attributes are kept in memory by Python's readers; an adapter's take a few kilobytes,
# a trainer's folder with many checkpoints some hundred.
_MAX_DIRECTORY_BYTES = 1 << 20
# Trained weights hardly shrink, and text shrinks tenfold. Small archives of zeros do no harm.
_MAX_RATIO = 100
_HARMLESS_BYTES = 16 << 20
_MAX_IGNORED_TOLD = 50
# Unix file types as zip keeps them, in the upper half of the external attributes.
_PLAIN_ZIP_MODES = (0, stat.S_IFREG, stat.S_IFDIR)
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ZIP_ENCRYPTED = 0x1
_ZIP_LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True, slots=True)
class Unpacked:
    """An adapter's files by name, and what else the archive holds."""

    files: dict[str, Path]
    # Left aside because they are no part of an adapter: files by path, folders as "name/".
    ignored_files: list[str]
    # About files of which nobody knows what they are for.
    findings: list[Finding]


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    is_folder: bool
    size_bytes: int
    # Why it is not taken, whatever it is called; None for a plain file or folder.
    oddity: str | None
    open: Callable[[], IO[bytes]]

    @property
    def path(self) -> PurePosixPath:
        return PurePosixPath(self.name)


class _Meter:
    """Counts what comes out of one archive, against both limits."""

    def __init__(self, archive: Path, *, max_bytes: int, padding_bytes: int = 0) -> None:
        self._max_bytes = max_bytes
        self._padding_bytes = padding_bytes
        self._max_unpacked_bytes = _HARMLESS_BYTES + _MAX_RATIO * archive.stat().st_size
        self._name = archive.name
        self._unpacked_bytes = 0

    def count(self, num_bytes: int) -> None:
        """Raises TooLarge or ArchiveRefused."""
        self._unpacked_bytes += num_bytes
        if self._unpacked_bytes > self._max_bytes + self._padding_bytes:
            raise TooLarge(self._max_bytes)
        if self._unpacked_bytes > self._max_unpacked_bytes:
            message = f"grows to more than {_MAX_RATIO} times its size"
            raise ArchiveRefused([_finding("decompression_bomb", self._name, message)])


def unpack(archive: Path, into: Path, *, max_total_bytes: int, max_files: int) -> Unpacked:
    """Unpack an adapter's files into the existing folder `into`.

    Raises ArchiveRefused, with a finding for each thing that is wrong, and TooLarge; then nothing
    is left in `into`.
    """
    with ExitStack() as stack:
        file = _Metered(_open(archive, stack, scratch=into, max_bytes=max_total_bytes))
        with _reading(archive.name):
            members = list(islice(_members(file), max_files + 1))
        file.lift()
        _refuse_oddities(members, archive_name=archive.name, max_files=max_files)
        chosen = _choose(members)
        _extract(chosen.wanted, into, _Meter(archive, max_bytes=max_total_bytes))
    files = {name: into / name for name in chosen.wanted}
    return Unpacked(files, chosen.ignored, chosen.findings)


class _Metered(io.RawIOBase):
    """A file that gives few bytes until its directory has been read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left_bytes: int | None = _MAX_DIRECTORY_BYTES

    def lift(self) -> None:
        self._left_bytes = None

    def read(self, size: int = -1, /) -> bytes:
        if self._left_bytes is None:
            return self._file.read(size)
        most = self._left_bytes + 1
        data = self._file.read(most if size < 0 else min(size, most))
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            raise ValueError("its directory is too large")
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _open(archive: Path, stack: ExitStack, *, scratch: Path, max_bytes: int) -> IO[bytes]:
    """Undo gzip, into a file without a name: a tar reader must be able to seek."""
    file = stack.enter_context(archive.open("rb"))
    magic = file.read(2)
    file.seek(0)
    if magic != b"\x1f\x8b":
        return file
    plain = stack.enter_context(tempfile.TemporaryFile(dir=scratch))  # noqa: SIM115 - by the stack
    unzipped = stack.enter_context(gzip.GzipFile(fileobj=file))
    # Tar rounds each file up and adds a header to each.
    meter = _Meter(archive, max_bytes=max_bytes, padding_bytes=_MAX_DIRECTORY_BYTES)
    for chunk in _chunks(unzipped, name=archive.name):
        meter.count(len(chunk))
        plain.write(chunk)
    plain.seek(0)
    return plain


def _members(file: _Metered) -> Iterator[_Member]:
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    return _zip_members(file) if is_zip else _tar_members(file)


def _tar_members(file: _Metered) -> Iterator[_Member]:
    tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - read as long as `file` is open
    for info in tar:
        is_plain = (info.isreg() and not info.issparse()) or info.isdir()
        yield _Member(
            name=info.name,
            is_folder=info.isdir(),
            size_bytes=info.size,
            oddity=None if is_plain else "is a link, a device or a sparse file",
            open=partial(_open_tar, tar, info),
        )


def _open_tar(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(info)
    assert file is not None, "only plain files are opened"
    return file


def _zip_members(file: _Metered) -> Iterator[_Member]:
    archive = zipfile.ZipFile(file)
    _refuse_overlaps(archive.infolist(), directory_begin=archive.start_dir)
    for info in archive.infolist():
        yield _Member(
            # As written; `filename` has been made harmless, and hides what was tried.
            name=info.orig_filename,
            is_folder=info.is_dir(),
            size_bytes=info.file_size,
            oddity=_zip_oddity(info),
            open=partial(archive.open, info),
        )


def _zip_oddity(info: zipfile.ZipInfo) -> str | None:
    if stat.S_IFMT(info.external_attr >> 16) not in _PLAIN_ZIP_MODES:
        return "is a link or a device"
    if info.flag_bits & _ZIP_ENCRYPTED:
        return "is encrypted"
    if info.compress_type not in _ZIP_METHODS:
        return "is compressed in another way than deflate"
    return None


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What to do with the members of an archive in which nothing is hostile."""

    wanted: dict[str, _Member]
    ignored: list[str]
    findings: list[Finding]


def _refuse_oddities(members: list[_Member], *, archive_name: str, max_files: int) -> None:
    refusals = [finding for member in members if (finding := _refusal(member))]
    if len(members) > max_files:
        refusals.append(_finding("too_many_files", archive_name, f"holds more than {max_files}"))
    if refusals:
        raise ArchiveRefused(refusals[:max_files])


def _choose(members: list[_Member]) -> _Chosen:
    """Sort the members by what they are to us. Raises ArchiveRefused."""
    files = [member for member in members if not member.is_folder]
    root = _adapter_folder(files)
    ours = [member for member in files if member.path.parent == root]
    refusals = _refusals_beside(ours)
    if refusals:
        raise ArchiveRefused(refusals)
    names = {member.path.name: member for member in ours}
    wanted = {name: names.pop(name) for name in (*ADAPTER_FILES, *OPTIONAL_FILES) if name in names}
    has_tokenizer = "tokenizer.json" in wanted
    ignored = [name for name in names if _is_ignored(name, has_tokenizer=has_tokenizer)]
    findings = [_not_taken(name) for name in names if name not in ignored]
    return _Chosen(wanted, _told(ignored, files, root=root), findings)


def _adapter_folder(files: list[_Member]) -> PurePosixPath:
    """The topmost folder with a file of an adapter: deeper ones are checkpoints of its training."""
    folders = {member.path.parent for member in files if member.path.name in ADAPTER_FILES}
    depth = min((len(folder.parts) for folder in folders), default=0)
    topmost = sorted(folder for folder in folders if len(folder.parts) == depth)
    if len(topmost) > 1:
        names = ", ".join(str(folder) for folder in topmost[:5])
        raise ArchiveRefused(
            [_finding("several_adapters", names, "hold one each; one is taken at a time")]
        )
    if not topmost:
        raise ArchiveRefused(
            [_finding("missing_file", name, "is not in the archive") for name in ADAPTER_FILES]
        )
    return topmost[0]


def _refusals_beside(ours: list[_Member]) -> list[Finding]:
    """What is wrong among the adapter's own files."""
    refusals = _repeats(ours)
    names = {member.path.name for member in ours}
    refusals += [
        _finding("missing_file", name, "is not in the archive")
        for name in ADAPTER_FILES
        if name not in names
    ]
    refusals += [
        pickle_finding(name)
        for name in sorted(names)
        if is_pickle(name) and not is_left_by_trainers(name)
    ]
    return refusals


def _refusal(member: _Member) -> Finding | None:
    where = ascii(member.name)[1:-1][:500]
    if member.oddity:
        return _finding("file_refused", where, member.oddity)
    if not member.name.isprintable() or "\\" in member.name or ":" in member.name:
        return _finding("path_refused", where, "has characters that a file name must not have")
    if member.name.startswith("/") or ".." in member.path.parts:
        return _finding("path_refused", where, "points outside of the archive")
    if not member.is_folder and is_archive(member.name):
        return _finding("nested_archive", where, "is an archive in an archive")
    return None


def _repeats(ours: Iterable[_Member]) -> list[Finding]:
    refusals = []
    seen: set[str] = set()
    for member in ours:
        # Some file systems would take them for one.
        name = member.path.name.casefold()
        if name in seen:
            refusals.append(_finding("duplicate_file", member.path.name, "is in the archive twice"))
        seen.add(name)
    return refusals


def _is_ignored(name: str, *, has_tokenizer: bool) -> bool:
    return is_left_by_trainers(name) or (has_tokenizer and name in OLD_TOKENIZER_FILES)


def _told(beside: list[str], files: list[_Member], *, root: PurePosixPath) -> list[str]:
    """What was left aside, each folder once."""
    elsewhere: dict[str, None] = {}
    for member in files:
        folder = member.path.parent
        if folder == root:
            continue
        inner = folder.relative_to(root).parts if folder.is_relative_to(root) else folder.parts
        elsewhere[f"{inner[0]}/" if inner else member.path.name] = None
    told = [*sorted(beside), *elsewhere]
    if len(told) <= _MAX_IGNORED_TOLD:
        return told
    return [*told[:_MAX_IGNORED_TOLD], f"and {len(told) - _MAX_IGNORED_TOLD} more"]


def _refuse_overlaps(entries: list[zipfile.ZipInfo], *, directory_begin: int) -> None:
    """Each byte of a zip is one file's: overlapping ones unpack to far more than they weigh."""
    places = sorted(
        (
            entry.header_offset,
            entry.header_offset
            + _ZIP_LOCAL_HEADER_BYTES
            + len(entry.orig_filename)
            + entry.compress_size,
        )
        for entry in entries
    )
    ends = [*places, (directory_begin, directory_begin)]
    if any(end > following for (_, end), (following, _) in pairwise(ends)):
        raise ValueError("its files overlap")


def _extract(wanted: dict[str, _Member], into: Path, meter: _Meter) -> None:
    try:
        for name, member in wanted.items():
            _extract_one(member, into / name, meter)
    except BaseException:
        for name in wanted:
            (into / name).unlink(missing_ok=True)
        raise


def _extract_one(member: _Member, target_path: Path, meter: _Meter) -> None:
    max_bytes = max_bytes_of(target_path.name)
    num_bytes = 0
    with _reading(member.name):
        source = member.open()
    with source, target_path.open("wb") as target:
        for chunk in _chunks(source, name=member.name):
            meter.count(len(chunk))
            num_bytes += len(chunk)
            if max_bytes is not None and num_bytes > max_bytes:
                raise ArchiveRefused([file_too_large(target_path.name, max_bytes)])
            target.write(chunk)
    if num_bytes != member.size_bytes:
        message = "is not as long as the archive says"
        raise ArchiveRefused([_finding("archive_unreadable", target_path.name, message)])
    if target_path.name in ADAPTER_FILES:
        _refuse_pickle(target_path)


def file_too_large(name: str, max_bytes: int) -> Finding:
    """The refusal of one file that is larger than such files may be."""
    return Finding(
        code="file_too_large",
        where=name,
        message=f"is larger than {max_bytes} bytes",
        fix="leave it out, or make it smaller",
    )


def _refuse_pickle(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors header of 640 bytes begins with the same two bytes as a pickle.
    if looks_like_pickle(head) and head[8:] != b"{":
        raise ArchiveRefused([pickle_finding(path.name)])


def _chunks(source: IO[bytes] | gzip.GzipFile, *, name: str) -> Iterator[bytes]:
    while True:
        with _reading(name):
            chunk = source.read(_CHUNK_BYTES)
        if not chunk:
            return
        yield chunk


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn whatever Python's readers raise for a broken archive into a refusal."""
    try:
        yield
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        # zipfile, for what it does not implement or cannot decode.
        struct.error,
        NotImplementedError,
        RuntimeError,
        ValueError,
        IndexError,
        OverflowError,
    ) as error:
        finding = _finding("archive_unreadable", name, f"cannot be read: {error}")
        raise ArchiveRefused([finding]) from error


def _not_taken(name: str) -> Finding:
    if name in OLD_TOKENIZER_FILES:
        message = "is not read, and there is no tokenizer.json beside it"
        return Finding(
            code="file_not_served",
            where=name,
            message=message,
            fix="save the tokenizer with transformers' save_pretrained as tokenizer.json, or leave"
            " it out where it is the base model's own",
        )
    return _finding("unexpected_file", name, "is no file of an adapter")


def _finding(code: str, where: str, message: str) -> Finding:
    return Finding(
        code=code,
        where=where,
        message=message,
        fix=f"pack the folder with {CONFIG_FILE} and {WEIGHTS_FILE}, as plain files, into .tar.gz"
        " or .zip",
    )
