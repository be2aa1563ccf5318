"""What was uploaded as a version, had back bit for bit.

Reads the store, for a version that has its bytes there. Knows nothing of HTTP but what a range is.
"""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from adapters.errors import StoreUnavailable
from adapters.store import ArtifactStore, FoundFile
from gateway.blobs import Blobs
from gateway.errors import NotFound, RangeNotSatisfiable, Unavailable
from gateway.registry import Registry
from gateway.tables import AdapterVersion

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@dataclass(frozen=True, slots=True)
class KeptFile:
    """One file of a version, as it was uploaded."""

    name: str
    sha256: str
    found: FoundFile

    @property
    def size_bytes(self) -> int:
        return self.found.size_bytes


@dataclass(frozen=True, slots=True)
class Part:
    """Which bytes of a file are asked for; `end` is one past the last."""

    begin: int
    end: int

    @classmethod
    def of(cls, header: str | None, size_bytes: int) -> "Part | None":
        """Read a Range header (RFC 9110, section 14.2); None for the whole file.

        Several ranges, or what is none, count as not said. Raises RangeNotSatisfiable.
        """
        match = _RANGE.fullmatch(header or "")
        if match is None or match[0] == "bytes=-":
            return None
        first, last = match.groups()
        if not first:
            begin, end = max(0, size_bytes - int(last)), size_bytes
        else:
            begin, end = int(first), min(int(last or size_bytes) + 1, size_bytes)
            if last and int(last) < begin:
                return None
        if begin >= end:
            raise RangeNotSatisfiable(size_bytes)
        return cls(begin, end)


class SourceFiles:
    """The files of versions. Raises NotFound for what is purged or was refused, and Unavailable."""

    def __init__(self, registry: Registry, store: ArtifactStore, blobs: Blobs) -> None:
        self._registry = registry
        self._store = store
        self._blobs = blobs

    async def list(self, tenant: str, adapter: str, number: int) -> list[KeptFile]:
        """All files of a version, by name."""
        version, name, files = await self._files_of(tenant, adapter, number)
        return [await self._find(version, name, file) for file in sorted(files)]

    async def find(self, tenant: str, adapter: str, number: int, file: str) -> KeptFile:
        version, name, files = await self._files_of(tenant, adapter, number)
        if file not in files:
            raise NotFound(
                f"{name!r} was uploaded without {file!r}; it has {', '.join(sorted(files))}.",
                param="file",
            )
        return await self._find(version, name, file)

    def stream(self, file: KeptFile, part: Part | None = None) -> AsyncIterator[bytes]:
        """The bytes of a file, a piece at a time."""
        if part is None:
            return self._store.stream_file(file.found)
        return self._store.stream_file(file.found, begin=part.begin, end=part.end)

    async def _files_of(
        self, tenant: str, adapter: str, number: int
    ) -> tuple[AdapterVersion, str, dict[str, str]]:
        row, version = await self._registry.get_version(tenant, adapter, number)
        name = f"{row.public_name}@{version.number}"
        if version.purged_at is not None:
            raise NotFound(f"{name!r} was purged: its files are gone.", param="version")
        if version.state == "rejected":
            raise NotFound(f"{name!r} was refused: its files were not kept.", param="version")
        if version.source_files is None:
            raise NotFound(
                f"The files of {name!r} were not kept when it was uploaded: upload it again.",
                param="version",
            )
        return version, name, version.source_files

    async def _find(self, version: AdapterVersion, name: str, file: str) -> KeptFile:
        assert version.source_files is not None
        sha256 = version.source_files[file]
        try:
            found = await self._blobs.find_file(file, sha256, version.weights_digest)
        except StoreUnavailable as error:
            raise Unavailable("The artifact store does not answer; try again shortly.") from error
        if found is None:
            raise Unavailable(
                f"{file} of {name!r} is missing from the artifact store; upload it again.",
                retry_after_s=60,
            )
        return KeptFile(file, sha256, found)
