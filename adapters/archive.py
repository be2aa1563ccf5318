"""Unpack an uploaded .tar, .tar.gz or .zip into a folder, and let nothing out of that folder.

Takes an adapter's two files and no others. Bytes are counted as they come out, so it does not
matter what the archive says about itself.
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
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO

from adapters.errors import ArchiveRefused, Finding, TooLarge
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from adapters.tensor_file import looks_like_pickle, pickle_finding

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_IGNORED = ("README.md",)
_TEXT_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_CHUNK_BYTES = 1 << 20
# Names and attributes are kept in memory by Python's readers; an adapter's take a few kilobytes.
_MAX_DIRECTORY_BYTES = 1 << 20
# Unix file types as zip keeps them, in the upper half of the external attributes.
_PLAIN_ZIP_MODES = (0, stat.S_IFREG, stat.S_IFDIR)
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ZIP_ENCRYPTED = 0x1


@dataclass(frozen=True, slots=True)
class Unpacked:
    """An adapter's two files, and what else in the archive is not served."""

    config_path: Path
    weights_path: Path
    findings: list[Finding]


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    is_folder: bool
    # Why it is not taken, whatever it is called; None for a plain file or folder.
    oddity: str | None
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, into: Path, *, max_total_bytes: int, max_files: int) -> Unpacked:
    """Unpack an adapter's two files into the existing folder `into`.

    The files may lie at the top or in one folder. Raises ArchiveRefused, with a finding for each
    thing that is wrong, and TooLarge; then nothing is left in `into`.
    """
    with ExitStack() as stack:
        file = _Metered(_open(archive, stack, scratch=into, max_bytes=max_total_bytes))
        with _reading(archive.name):
            members = list(islice(_members(file), max_files + 1))
        file.lift()
        wanted, findings = _choose(members, archive_name=archive.name, max_files=max_files)
        _extract(wanted, into, archive_name=archive.name, max_total_bytes=max_total_bytes)
    return Unpacked(into / CONFIG_FILE, into / WEIGHTS_FILE, findings)


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
    left_bytes = max_bytes + _MAX_DIRECTORY_BYTES
    for chunk in _chunks(unzipped, name=archive.name):
        left_bytes -= len(chunk)
        if left_bytes < 0:
            raise TooLarge(max_bytes)
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
            oddity=None if is_plain else "is a link, a device or a sparse file",
            open=partial(_open_tar, tar, info),
        )


def _open_tar(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(info)
    assert file is not None, "only plain files are opened"
    return file


def _zip_members(file: _Metered) -> Iterator[_Member]:
    archive = zipfile.ZipFile(file)
    for info in archive.infolist():
        yield _Member(
            # As written; `filename` has been made harmless, and hides what was tried.
            name=info.orig_filename,
            is_folder=info.is_dir(),
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


def _choose(
    members: list[_Member], *, archive_name: str, max_files: int
) -> tuple[dict[str, _Member], list[Finding]]:
    """Return the members to extract by file name, and what is wrong with harmless others."""
    refusals = [finding for member in members if (finding := _refusal(member))]
    if len(members) > max_files:
        refusals.append(_finding("too_many_files", archive_name, f"holds more than {max_files}"))
    if not refusals:
        refusals = _layout_refusals(members)
    if refusals:
        raise ArchiveRefused(refusals)
    files = {_path(member).name: member for member in members if not member.is_folder}
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in files]
    if missing:
        raise ArchiveRefused(
            [_finding("missing_file", name, "is not in the archive") for name in missing]
        )
    wanted = {name: files.pop(name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    return wanted, [_not_taken(name) for name in files if name not in _IGNORED]


def _refusal(member: _Member) -> Finding | None:
    where = ascii(member.name)[1:-1][:500]
    if member.oddity:
        return _finding("file_refused", where, member.oddity)
    if not member.name.isprintable() or "\\" in member.name or ":" in member.name:
        return _finding("path_refused", where, "has characters that a file name must not have")
    if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
        return _finding("path_refused", where, "points outside of the archive")
    if len(_path(member).parts) > (1 if member.is_folder else 2):
        return _finding("path_refused", where, "lies more than one folder deep")
    if _path(member).suffix.lower() in _PICKLES:
        return pickle_finding(where)
    return None


def _layout_refusals(members: Iterable[_Member]) -> list[Finding]:
    files = [_path(member) for member in members if not member.is_folder]
    folders = {path.parent for path in files}
    refusals = []
    if len(folders) > 1:
        names = ", ".join(sorted(str(folder) for folder in folders)[:5])
        refusals.append(_finding("path_refused", names, "are several folders; one is allowed"))
    seen: set[str] = set()
    for path in files:
        # Some file systems would take them for one.
        name = path.name.casefold()
        if name in seen:
            refusals.append(_finding("duplicate_file", path.name, "is in the archive twice"))
        seen.add(name)
    return refusals


def _path(member: _Member) -> PurePosixPath:
    return PurePosixPath(member.name)


def _extract(
    wanted: dict[str, _Member], into: Path, *, archive_name: str, max_total_bytes: int
) -> None:
    left_bytes = max_total_bytes
    try:
        for name, member in wanted.items():
            with _reading(archive_name):
                source = member.open()
            with source, (into / name).open("wb") as target:
                for chunk in _chunks(source, name=archive_name):
                    left_bytes -= len(chunk)
                    if left_bytes < 0:
                        raise TooLarge(max_total_bytes)
                    target.write(chunk)
            _refuse_pickle(into / name)
    except BaseException:
        for name in wanted:
            (into / name).unlink(missing_ok=True)
        raise


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
    if name in _TEXT_FILES:
        return _finding("file_not_served", name, "is not served yet: the base model's own is used")
    return _finding("unexpected_file", name, "is no file of an adapter")


def _finding(code: str, where: str, message: str) -> Finding:
    return Finding(
        code=code,
        where=where,
        message=message,
        fix=f"pack {CONFIG_FILE} and {WEIGHTS_FILE} alone, as plain files, into .tar.gz or .zip",
    )
