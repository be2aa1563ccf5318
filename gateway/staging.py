"""Take the files of a multipart body to disk while they arrive, hashed, in constant memory.

Knows which parts an upload has and how large it may be. Looks into no file, and leaves none behind.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from gateway.errors import BodyTooLarge, InvalidRequest

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")
FIELDS = ("sha256", "base_model")
MAX_FIELD_BYTES = 1024
# Part headers, boundaries and text fields on top of the files.
OVERHEAD_BYTES = 64 * 1024
# One hop to a thread costs as much as hashing 50 kB; a stream of small chunks shares them.
WRITE_BYTES = 1 << 20

EXPECTED = (
    f"send {CONFIG_FILE} and {WEIGHTS_FILE}, or one archive"
    f" ({', '.join(ARCHIVE_SUFFIXES)}), and if you like the text fields {' and '.join(FIELDS)}"
)


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A file that arrived whole."""

    path: Path
    sha256: str
    size_bytes: int


@dataclass(slots=True)
class Form:
    """What has arrived so far, by the names of files and fields."""

    files: dict[str, StagedFile] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def archive(self) -> StagedFile | None:
        """The archive, if it is what was sent."""
        for name, file in self.files.items():
            if name.endswith(ARCHIVE_SUFFIXES):
                return file
        return None


class Staging:
    """A folder of ours on a local disk, with one folder in it for each upload under way.

    A lock on each tells those of living processes from what a killed one left.
    """

    def __init__(self, root: Path, *, max_upload_bytes: int) -> None:
        self._root = root
        self.max_upload_bytes = max_upload_bytes

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder that is gone afterwards, however that comes."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            with _locked(self._root):
                path = Path(tempfile.mkdtemp(dir=self._root))
                stack.enter_context(_locked(path))
                stack.callback(shutil.rmtree, path)
            yield path

    def sweep(self) -> int:
        """Remove what processes left that were killed in an upload; return how many folders."""
        if not self._root.is_dir():
            return 0
        with _locked(self._root):
            return sum(_remove_abandoned(path) for path in self._root.iterdir())

    async def receive(
        self,
        body: AsyncIterator[bytes],
        *,
        content_type: str,
        announced_bytes: int | None,
        folder: Path,
    ) -> Form:
        """Write the body's files to `folder`.

        Raises InvalidRequest for what is no whole upload, BodyTooLarge past the limit: before the
        first byte where the client has announced too many.
        """
        if (announced_bytes or 0) > self.max_upload_bytes + OVERHEAD_BYTES:
            raise too_large(self.max_upload_bytes)
        reader = _Reader(folder, max_upload_bytes=self.max_upload_bytes)
        try:
            with PushMultipartParser(_boundary(content_type), max_segment_count=8) as parser:
                async for chunk in body:
                    reader.count(chunk)
                    for event in parser.parse(chunk) if chunk else ():
                        await reader.take(event)
        except MultipartError as error:
            raise InvalidRequest(f"The body is no whole multipart/form-data: {error}.") from error
        finally:
            reader.close()
        _check_complete(reader.form)
        return reader.form


class _Reader:
    """Takes the events of the parser: a part's head, its bytes, its end."""

    def __init__(self, folder: Path, *, max_upload_bytes: int) -> None:
        self.form = Form()
        self._folder = folder
        self._limit_bytes = max_upload_bytes
        self._received_bytes = 0
        self._file_bytes = 0
        self._sink: _FileSink | None = None
        self._field: tuple[str, bytearray] | None = None

    def count(self, chunk: bytes) -> None:
        """Bound the whole body, whatever it is made of."""
        self._received_bytes += len(chunk)
        if self._received_bytes > self._limit_bytes + OVERHEAD_BYTES:
            raise too_large(self._limit_bytes)

    async def take(self, event: MultipartSegment | bytes | bytearray | None) -> None:
        if isinstance(event, MultipartSegment):
            self._begin(event)
        elif event is None:
            await self._end()
        elif self._sink is not None:
            self._file_bytes += len(event)
            if self._file_bytes > self._limit_bytes:
                raise too_large(self._limit_bytes)
            await self._sink.write(event)
        else:
            self._extend_field(event)

    def close(self) -> None:
        if self._sink is not None:
            self._sink.close()

    def _begin(self, part: MultipartSegment) -> None:
        name = _known_name(part)
        if name in self.form.files or name in self.form.fields:
            raise InvalidRequest(f"The part {name!r} was sent twice.", param=name)
        if part.filename is None:
            self._field = (name, bytearray())
        else:
            self._sink = _FileSink(self._folder / name)

    def _extend_field(self, chunk: bytes | bytearray) -> None:
        assert self._field is not None
        name, value = self._field
        value += chunk
        if len(value) > MAX_FIELD_BYTES:
            raise InvalidRequest(f"{name} is at most {MAX_FIELD_BYTES} bytes long.", param=name)

    async def _end(self) -> None:
        if self._sink is not None:
            file = await self._sink.finish()
            self.form.files[file.path.name] = file
        elif self._field is not None:
            name, value = self._field
            self.form.fields[name] = _text(name, value)
        self._sink = self._field = None


class _FileSink:
    """A file that is written and hashed in threads, about a MiB at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._pending = bytearray()
        self._size_bytes = 0

    async def write(self, chunk: bytes | bytearray) -> None:
        self._pending += chunk
        if len(self._pending) >= WRITE_BYTES:
            await asyncio.to_thread(self._flush)

    async def finish(self) -> StagedFile:
        await asyncio.to_thread(self._flush)
        self.close()
        return StagedFile(self._path, self._hash.hexdigest(), self._size_bytes)

    def close(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        self._file.write(self._pending)
        self._hash.update(self._pending)
        self._size_bytes += len(self._pending)
        self._pending.clear()


def too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The upload is larger than the limit of {limit_bytes} bytes.")


def _boundary(content_type: str) -> str:
    media_type, options = parse_options_header(content_type)
    if media_type != "multipart/form-data" or not options.get("boundary"):
        raise InvalidRequest(f"The body must be multipart/form-data: {EXPECTED}.")
    return str(options["boundary"])


def _known_name(part: MultipartSegment) -> str:
    """The name under which a part is kept: one of ours, never one that could be a path."""
    name: str = part.name or ""
    filename: str | None = part.filename
    if filename is None and name in FIELDS:
        return name
    if filename in (CONFIG_FILE, WEIGHTS_FILE):
        return filename
    for suffix in ARCHIVE_SUFFIXES:
        if (filename or "").lower().endswith(suffix):
            return f"archive{suffix}"
    label = f"{name!r}" + (f" (file {filename!r})" if filename else "")
    raise InvalidRequest(f"The part {label} is not known here: {EXPECTED}.", param=name)


def _text(name: str, value: bytearray) -> str:
    try:
        return value.decode().strip()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name} is not UTF-8.", param=name) from error


def _check_complete(form: Form) -> None:
    names = set(form.files)
    if form.archive is not None:
        if len(names) > 1:
            raise InvalidRequest(f"An archive is sent alone, not beside other files: {EXPECTED}.")
        return
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in names]
    if missing:
        raise InvalidRequest(
            f"The upload has no {' and no '.join(missing)}: {EXPECTED}.", param=missing[0]
        )


@contextlib.contextmanager
def _locked(folder: Path, flags: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold the folder's lock, which the kernel frees should the process die. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, flags)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(path: Path) -> bool:
    try:
        with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(path)
    except BlockingIOError:
        return False
    return True
