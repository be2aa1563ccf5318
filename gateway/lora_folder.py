"""An adapter in a folder of this host, below the one that its operator has opened to loads.

Links are followed as long as they end below; whatever changes meanwhile, every part of the way is
opened as what it was when it was looked at. Looks at names and sizes, and into no file.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapters.folder import ADAPTER_FILES, OPTIONAL_FILES, max_bytes_of
from gateway.errors import InvalidRequest, NotAllowed, NotFound
from gateway.staging import StagedFile, too_large

CHUNK_BYTES = 1 << 20
# Neither a link nor a pipe that nobody writes to is waited for.
OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class LoraFolder:
    """`path` is what was asked for: relative to `root`, or absolute and below it."""

    root: Path
    path: str

    def copy_to(self, into: Path, *, max_bytes: int) -> dict[str, StagedFile]:
        """Blocking: copy the adapter's files. By name.

        Raises NotAllowed for what lies outside, NotFound for what is not there, InvalidRequest for
        what is no folder of an adapter, BodyTooLarge past `max_bytes` for all files together.
        """
        folder = self._below(self.root / self.path)
        copied: dict[str, StagedFile] = {}
        for name in (*ADAPTER_FILES, *OPTIONAL_FILES):
            if name in OPTIONAL_FILES and not os.path.lexists(folder / name):
                continue
            path = self._below(folder / name)
            allowed_bytes = min(max_bytes, max_bytes_of(name) or max_bytes)
            with self._opened(path) as descriptor:
                copied[name] = _copy(descriptor, into / name, max_bytes=allowed_bytes)
            max_bytes -= copied[name].size_bytes
        return copied

    def _below(self, path: Path) -> Path:
        """The path without links, as long as it is below the root."""
        if "\x00" in str(path):
            raise NotFound("lora_path: no path has a NUL character.", param="lora_path")
        resolved, root = Path(os.path.realpath(path)), Path(os.path.realpath(self.root))
        if not resolved.is_relative_to(root):
            raise NotAllowed(
                f"lora_path: {self.path!r} is not below the folder that this server loads adapters"
                " from (--lora-folder).",
                param="lora_path",
            )
        return resolved

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[int]:
        """The file, reached from the root name by name, without a link on the way."""
        root = os.path.realpath(self.root)
        with contextlib.ExitStack() as stack:
            try:
                descriptor = _open(stack, root, None)
                for name in path.relative_to(root).parts:
                    descriptor = _open(stack, name, descriptor)
            except OSError as error:
                raise NotFound(
                    f"lora_path: {self.path!r} has no {path.name} that can be read"
                    f" ({error.strerror}): save the adapter with save_pretrained.",
                    param="lora_path",
                ) from error
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InvalidRequest(
                    f"lora_path: {path.name} in {self.path!r} is no file.", param="lora_path"
                )
            yield descriptor


def _open(stack: contextlib.ExitStack, name: str, folder: int | None) -> int:
    descriptor = os.open(name, OPEN_FLAGS, dir_fd=folder)
    stack.callback(os.close, descriptor)
    return descriptor


def _copy(descriptor: int, to: Path, *, max_bytes: int) -> StagedFile:
    size_bytes, checksum = 0, hashlib.sha256()
    with to.open("xb") as file:
        while chunk := os.read(descriptor, CHUNK_BYTES):
            size_bytes += len(chunk)
            if size_bytes > max_bytes:
                raise too_large(max_bytes)
            checksum.update(chunk)
            file.write(chunk)
    return StagedFile(to, checksum.hexdigest(), size_bytes)
