"""Take the files of an upload to disk while they arrive, hashed, in constant memory.

Knows which files an upload may have and how large they may be, and how much of the disk one tenant
may fill at a time. Looks into no file, and leaves none behind.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from adapters.folder import ADAPTER_FILES, OPTIONAL_FILES, max_bytes_of
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from gateway.errors import BodyTooLarge, InvalidRequest, TooManyUploads

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")
FIELDS = ("sha256", "base_model")
MAX_FIELD_BYTES = 1024
MAX_PARTS = len(ADAPTER_FILES) + len(OPTIONAL_FILES) + len(FIELDS)
# Part headers, boundaries and text fields on top of the files.
OVERHEAD_BYTES = 64 * 1024
# So many uploads of the largest size may one tenant have under way in one gateway.
MAX_UPLOADS_UNDER_WAY = 4
# One hop to a thread costs as much as hashing 50 kB; a stream of small chunks shares them.
WRITE_BYTES = 1 << 20

EXPECTED = (
    f"send {CONFIG_FILE} and {WEIGHTS_FILE}, with any of {', '.join(OPTIONAL_FILES)}, or one"
    f" archive ({', '.join(ARCHIVE_SUFFIXES)}), and if you like the text fields"
    f" {' and '.join(FIELDS)}"
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
        # What each tenant's uploads may still fill or have filled already, by tenant.
        self._claimed_bytes: Counter[uuid.UUID] = Counter()

    @contextlib.contextmanager
    def folder(self, tenant_id: uuid.UUID) -> Iterator["StagingFolder"]:
        """A folder that is gone afterwards, however that comes."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            with _locked(self._root):
                path = Path(tempfile.mkdtemp(dir=self._root))
                stack.enter_context(_locked(path))
                stack.callback(shutil.rmtree, path)
            folder = StagingFolder(path, lambda num_bytes: self._claim(tenant_id, num_bytes))
            stack.callback(lambda: self._release(tenant_id, folder.claimed_bytes))
            yield folder

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
        folder: "StagingFolder",
    ) -> Form:
        """Write the body's files to `folder`.

        Raises InvalidRequest for what is no whole upload; BodyTooLarge and TooManyUploads past the
        limits: before the first byte where the client has announced too many.
        """
        if (announced_bytes or 0) > self.max_upload_bytes + OVERHEAD_BYTES:
            raise too_large(self.max_upload_bytes)
        folder.claim(announced_bytes or 0)
        reader = _Reader(folder, max_upload_bytes=self.max_upload_bytes)
        try:
            with PushMultipartParser(
                _boundary(content_type), max_segment_count=MAX_PARTS
            ) as parser:
                async for chunk in body:
                    reader.count(chunk)
                    for event in parser.parse(chunk) if chunk else ():
                        await reader.take(event)
        except MultipartError as error:
            raise InvalidRequest(f"The body is no whole multipart/form-data: {error}.") from error
        finally:
            reader.close()
        check_complete(reader.form.files)
        return reader.form

    def _claim(self, tenant_id: uuid.UUID, num_bytes: int) -> None:
        limit_bytes = MAX_UPLOADS_UNDER_WAY * self.max_upload_bytes
        if self._claimed_bytes[tenant_id] + num_bytes > limit_bytes:
            raise TooManyUploads(
                f"This tenant's uploads under way come to more than {limit_bytes} bytes."
            )
        self._claimed_bytes[tenant_id] += num_bytes

    def _release(self, tenant_id: uuid.UUID, num_bytes: int) -> None:
        self._claimed_bytes[tenant_id] -= num_bytes
        # Forgets tenants that have nothing under way.
        self._claimed_bytes += Counter()


class StagingFolder:
    """One upload's folder, and how much of the tenant's share of the disk it takes."""

    def __init__(self, path: Path, claim: Callable[[int], None]) -> None:
        self.path = path
        self.claimed_bytes = 0
        self._claim = claim

    def claim(self, total_bytes: int) -> None:
        """Take so many bytes in all. Raises TooManyUploads where the tenant has no more left."""
        if total_bytes > self.claimed_bytes:
            self._claim(total_bytes - self.claimed_bytes)
            self.claimed_bytes = total_bytes


class _Reader:
    """Takes the events of the parser: a part's head, its bytes, its end."""

    def __init__(self, folder: StagingFolder, *, max_upload_bytes: int) -> None:
        self.form = Form()
        self._folder = folder
        self._limit_bytes = max_upload_bytes
        self._received_bytes = 0
        self._file_bytes = 0
        self._sink: FileSink | None = None
        self._field: tuple[str, bytearray] | None = None

    def count(self, chunk: bytes) -> None:
        """Bound the whole body, whatever it is made of."""
        self._received_bytes += len(chunk)
        if self._received_bytes > self._limit_bytes + OVERHEAD_BYTES:
            raise too_large(self._limit_bytes)
        self._folder.claim(self._received_bytes)

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
            self._sink = FileSink(self._folder.path / name)

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


class FileSink:
    """A file that is written and hashed in threads, about a MiB at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._max_bytes = max_bytes_of(path.name)
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._pending = bytearray()
        self._received_bytes = 0

    async def write(self, chunk: bytes | bytearray) -> None:
        """Raises BodyTooLarge where files of this name are smaller."""
        self._pending += chunk
        self._received_bytes += len(chunk)
        if self._max_bytes is not None and self._received_bytes > self._max_bytes:
            raise BodyTooLarge(f"{self._path.name} is larger than {self._max_bytes} bytes.")
        if len(self._pending) >= WRITE_BYTES:
            await asyncio.to_thread(self._flush)

    async def finish(self) -> StagedFile:
        await asyncio.to_thread(self._flush)
        self.close()
        return StagedFile(self._path, self._hash.hexdigest(), self._received_bytes)

    def close(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        self._file.write(self._pending)
        self._hash.update(self._pending)
        self._pending.clear()


def too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The upload is larger than the limit of {limit_bytes} bytes.")


def _boundary(content_type: str) -> str:
    media_type, options = parse_options_header(content_type)
    if media_type != "multipart/form-data" or not options.get("boundary"):
        raise InvalidRequest(f"The body must be multipart/form-data: {EXPECTED}.")
    return str(options["boundary"])


def _known_name(part: MultipartSegment) -> str:
    """The name under which a part is kept."""
    name: str = part.name or ""
    filename: str | None = part.filename
    if filename is None and name in FIELDS:
        return name
    known = None if filename is None else known_file(filename)
    if known is None:
        label = f"{name!r}" + (f" (file {filename!r})" if filename else "")
        raise InvalidRequest(f"The part {label} is not known here: {EXPECTED}.", param=name)
    return known


def known_file(filename: str) -> str | None:
    """The name under which a file is kept: one of ours, never one that could be a path."""
    if filename in ADAPTER_FILES or filename in OPTIONAL_FILES:
        return filename
    for suffix in ARCHIVE_SUFFIXES:
        if filename.lower().endswith(suffix):
            return f"archive{suffix}"
    return None


def _text(name: str, value: bytearray) -> str:
    try:
        return value.decode().strip()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name} is not UTF-8.", param=name) from error


def check_complete(names: Collection[str]) -> None:
    """Raises InvalidRequest for files that are no whole upload; `names` are those we keep."""
    if any(name.endswith(ARCHIVE_SUFFIXES) for name in names):
        if len(names) > 1:
            raise InvalidRequest(f"An archive is sent alone, not beside other files: {EXPECTED}.")
        return
    missing = [name for name in ADAPTER_FILES if name not in names]
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
