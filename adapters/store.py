"""Keep adapters and text bundles under their digests, on disk or in an object store.

    adapters/<aa>/<digest>/adapter_model.safetensors
    adapters/<aa>/<digest>/adapter_model.safetensors.sha256   whose upload's bytes these are
    adapters/<aa>/<digest>/adapter_config.json         written last: where it is, all is
    files/<aa>/<sha256>                                files as they were uploaded
    text-bundles/<aa>/<digest>/text_bundle.msgpack
    uploads/<upload>/<part>                            pieces of uploads that are not whole yet
    documents/<document>                               files that are nobody's but one owner's

Weights that two uploads spell differently have one digest: the first upload's file lies beside the
adapter, every other's is a file of its own. Knows nothing of names or owners: what is stored is
never changed, only removed.
"""

import datetime
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url

from adapters import text_bundle
from adapters.errors import (
    AdapterError,
    ArtifactMissing,
    DigestMismatch,
    StoreUnavailable,
)
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, is_canonical
from adapters.text_bundle import TextBundle

_DIGEST = re.compile(r"[0-9a-f]{64}")
_BUNDLE_FILE = "text_bundle.msgpack"
_SHA256_FILE = f"{WEIGHTS_FILE}.sha256"
_ADAPTERS, _BUNDLES, _UPLOADS, _FILES = "adapters", "text-bundles", "uploads", "files"
_DOCUMENTS = "documents"
# What reading a file holds in memory at a time.
_CHUNK_BYTES = 1 << 20
# A store that is away is told to the caller, who can come again; its own default is three minutes.
_RETRIES = {"max_retries": 4, "retry_timeout": datetime.timedelta(seconds=20)}
_NO_BUCKET = "NoSuchBucket"
# object_store writes a local file under such a name and then renames it; it lists none of them.
_UNFINISHED = re.compile(r".+#\d+")


@dataclass(frozen=True, slots=True)
class Stored:
    """All that is under one digest, or all pieces of one upload."""

    # The digest, of one file its SHA-256, or the upload's id.
    name: str
    files: frozenset[str]
    size_bytes: int
    # Of the youngest file, by the store's clock.
    modified_at: datetime.datetime


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file as it was uploaded, where it lies."""

    # In the store.
    path: str
    size_bytes: int


class ArtifactStore:
    """Artifacts by digest at a URL: file://, memory://, s3://, gs:// or az://.

    Credentials of object stores come from where their own tools look for them. What else the
    driver is to know can stand in the URL's query or in the environment, so that a MinIO is
    s3://bucket/folder?endpoint=http://minio:9000 or AWS_ENDPOINT with AWS_ALLOW_HTTP=true. Every
    method raises StoreUnavailable when the store cannot be reached or refuses.
    """

    def __init__(self, url: str) -> None:
        # Without the query, which may hold credentials.
        self._name = url.partition("?")[0]
        self._folder = _local_folder(url)
        self._store = _open(url)

    async def put_adapter(
        self, digest: str, config_bytes: bytes, weights_path: Path, *, weights_sha256: str
    ) -> None:
        """Store an adapter whole or not at all; one that is there already stays as it is.

        `config_bytes` is `Manifest.canonical_config()`, and nothing else: engines check the digest
        against it, and match no pattern that a stranger wrote. `weights_sha256` is that of the
        file. Two that put different files of one digest at once would mix them: they take turns.
        """
        if not is_canonical(config_bytes):
            raise AdapterError("Only Manifest.canonical_config() is stored as a configuration.")
        folder = _folder(_ADAPTERS, digest)
        if await self.has_adapter(digest):
            return
        await self._put_path(f"{folder}/{WEIGHTS_FILE}", weights_path)
        with self._writing():
            sha256 = weights_sha256.encode()
            await obstore.put_async(self._store, f"{folder}/{_SHA256_FILE}", sha256)
            await obstore.put_async(self._store, f"{folder}/{CONFIG_FILE}", config_bytes)

    async def has_adapter(self, digest: str) -> bool:
        """Whether the adapter is stored, whole."""
        folder = _folder(_ADAPTERS, digest)
        try:
            with self._reading(digest):
                for name in (CONFIG_FILE, WEIGHTS_FILE):
                    await obstore.head_async(self._store, f"{folder}/{name}")
        except ArtifactMissing:
            return False
        return True

    async def delete_adapter(self, digest: str) -> None:
        """Remove an adapter; one that is not there is not an error."""
        folder = _folder(_ADAPTERS, digest)
        # The configuration first: where it is, all is.
        for name in (CONFIG_FILE, WEIGHTS_FILE, _SHA256_FILE):
            await self._delete(f"{folder}/{name}")

    async def weights_sha256(self, digest: str) -> str | None:
        """The SHA-256 of the weights file beside a whole adapter.

        None where there is none, or it was stored before that was written down.
        """
        path = f"{_folder(_ADAPTERS, digest)}/{_SHA256_FILE}"
        try:
            with self._reading(digest):
                result = await obstore.get_async(self._store, path)
                sha256 = bytes(await result.bytes_async()).decode("ascii", "replace")
        except ArtifactMissing:
            return None
        return sha256 if await self.has_adapter(digest) else None

    def fetch_adapter(self, digest: str, into: Path) -> None:
        """Write an adapter's two files into an existing folder. Blocks.

        Raises ArtifactMissing.
        """
        folder = _folder(_ADAPTERS, digest)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            with self._reading(digest), (into / name).open("wb") as file:
                for chunk in obstore.get(self._store, f"{folder}/{name}").stream():
                    file.write(chunk)

    async def put_file(self, sha256: str, path: Path) -> None:
        """Store a file under its SHA-256."""
        await self._put_path(_file(sha256), path)

    async def find_file(self, sha256: str, *, beside: str | None = None) -> FoundFile | None:
        """Where the file with this SHA-256 lies; None where it is not stored.

        `beside` is the digest of the adapter whose weights it is. Then both places are looked at,
        whichever has it: how long that takes says nothing of who else has the same weights.
        """
        own = await self._found(_file(sha256))
        if beside is None:
            return own
        shared = await self._found(f"{_folder(_ADAPTERS, beside)}/{WEIGHTS_FILE}")
        is_ours = await self.weights_sha256(beside) == sha256
        return own or (shared if is_ours else None)

    async def stream_file(
        self, file: FoundFile, *, begin: int = 0, end: int | None = None
    ) -> AsyncIterator[bytes]:
        """Yield the bytes of a file from `begin` up to `end`. Raises ArtifactMissing."""
        end = file.size_bytes if end is None else end
        if begin >= end:
            return
        with self._reading(file.path):
            result = await obstore.get_async(
                self._store, file.path, options={"range": (begin, end)}
            )
            async for chunk in result.stream(min_chunk_size=_CHUNK_BYTES):
                yield bytes(chunk)

    async def delete_file(self, sha256: str) -> None:
        """Remove a file; one that is not there is not an error."""
        await self._delete(_file(sha256))

    async def put_bundle(self, bundle: TextBundle) -> str:
        """Store a text bundle and return its digest."""
        digest = text_bundle.digest(bundle)
        path = f"{_folder(_BUNDLES, digest)}/{_BUNDLE_FILE}"
        with self._writing():
            await obstore.put_async(self._store, path, text_bundle.encode(bundle))
        return digest

    async def get_bundle(self, digest: str) -> TextBundle:
        """Return the text bundle with this digest.

        Raises ArtifactMissing, UnreadableArtifact and DigestMismatch.
        """
        path = f"{_folder(_BUNDLES, digest)}/{_BUNDLE_FILE}"
        with self._reading(digest):
            result = await obstore.get_async(self._store, path)
            data = bytes(await result.bytes_async())
        bundle = text_bundle.decode(data)
        if text_bundle.digest(bundle) != digest:
            raise DigestMismatch(digest, found=text_bundle.digest(bundle))
        return bundle

    async def delete_bundle(self, digest: str) -> None:
        """Remove a text bundle; one that is not there is not an error."""
        await self._delete(f"{_folder(_BUNDLES, digest)}/{_BUNDLE_FILE}")

    async def put_part(self, upload_id: uuid.UUID, part: str, data: bytes) -> None:
        """Store one piece of an upload under a name that no other piece has."""
        with self._writing():
            await obstore.put_async(self._store, f"{_UPLOADS}/{upload_id}/{part}", data)

    async def stream_part(self, upload_id: uuid.UUID, part: str) -> AsyncIterator[bytes]:
        """Yield the bytes of a piece. Raises ArtifactMissing."""
        with self._reading(part):
            result = await obstore.get_async(self._store, f"{_UPLOADS}/{upload_id}/{part}")
            async for chunk in result.stream():
                yield bytes(chunk)

    async def delete_part(self, upload_id: uuid.UUID, part: str) -> None:
        """Remove one piece; one that is not there is not an error."""
        await self._delete(f"{_UPLOADS}/{upload_id}/{part}")

    async def delete_upload(self, upload_id: uuid.UUID) -> None:
        """Remove all pieces of an upload."""
        with self._writing():
            async for metas in obstore.list(self._store, f"{_UPLOADS}/{upload_id}"):
                for meta in metas:
                    await self._delete(meta["path"])

    async def put_document(self, document_id: uuid.UUID, path: Path) -> None:
        """Store a file under an id of its own; once more replaces it."""
        await self._put_path(f"{_DOCUMENTS}/{document_id}", path)

    async def find_document(self, document_id: uuid.UUID) -> FoundFile | None:
        """Where a document lies, for `stream_file`; None where it is not stored."""
        return await self._found(f"{_DOCUMENTS}/{document_id}")

    async def delete_document(self, document_id: uuid.UUID) -> None:
        """Remove a document; one that is not there is not an error."""
        await self._delete(f"{_DOCUMENTS}/{document_id}")

    async def documents(self) -> list[Stored]:
        """Every document, by id."""
        return await self._list(_DOCUMENTS, depth=-1)

    async def adapters(self) -> list[Stored]:
        """Everything that is stored as an adapter, whole or not, by digest."""
        return await self._list(_ADAPTERS)

    async def bundles(self) -> list[Stored]:
        """Everything that is stored as a text bundle, by digest."""
        return await self._list(_BUNDLES)

    async def files(self) -> list[Stored]:
        """Every file that is stored as it was uploaded, by SHA-256; not those beside adapters."""
        return await self._list(_FILES, depth=-1)

    async def uploads(self) -> list[Stored]:
        """What is stored of uploads that are not whole yet, by id."""
        return await self._list(_UPLOADS)

    def unfinished_files(self) -> list[Path]:
        """What writers left that were killed; only a local disk keeps such files. Blocks."""
        if self._folder is None:
            return []
        return sorted(
            path
            for path in self._folder.rglob("*#*")
            if path.is_file() and _UNFINISHED.fullmatch(path.name)
        )

    async def _put_path(self, to: str, path: Path) -> None:
        with self._writing():
            # Parts of 5 MiB under way; by default 12 are, and stay in memory as long.
            await obstore.put_async(self._store, to, path, max_concurrency=2)

    async def _found(self, path: str) -> FoundFile | None:
        try:
            with self._reading(path):
                meta = await obstore.head_async(self._store, path)
        except ArtifactMissing:
            return None
        return FoundFile(path, meta["size"])

    async def _list(self, kind: str, *, depth: int = -2) -> list[Stored]:
        """`depth`: which part of a path is the name that its files have in common."""
        found: dict[str, list[Any]] = {}
        with self._writing():
            async for metas in obstore.list(self._store, kind, chunk_size=1000):
                for meta in metas:
                    found.setdefault(meta["path"].split("/")[depth], []).append(meta)
        return [
            Stored(
                name=name,
                files=frozenset(meta["path"].rpartition("/")[2] for meta in metas),
                size_bytes=sum(meta["size"] for meta in metas),
                modified_at=max(meta["last_modified"] for meta in metas),
            )
            for name, metas in sorted(found.items())
        ]

    async def _delete(self, path: str) -> None:
        try:
            with self._reading(path):
                await obstore.delete_async(self._store, path)
        except ArtifactMissing:
            return

    @contextmanager
    def _reading(self, digest: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if _NO_BUCKET in str(error):
                raise self._unavailable(error) from error
            raise ArtifactMissing(digest) from error
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What is not found where one writes or lists is the store itself."""
        try:
            yield
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        reason = str(error).partition("\n")[0]
        if _NO_BUCKET in str(error):
            reason = "there is no such bucket"
        return StoreUnavailable(f"The artifact store {self._name!r} failed: {reason}")


def _open(url: str) -> ObjectStore:
    address, _, query = url.partition("?")
    try:
        if address.startswith("file:"):
            return LocalStore.from_url(url, automatic_cleanup=True, mkdir=True)
        if address.startswith("memory:"):
            return MemoryStore()
        options = dict(parse_qsl(query, strict_parsing=bool(query)))
        plain = {"allow_http": True} if _is_plain_http(options) else None
        # Which options there are differs by kind of store; the driver refuses those it lacks.
        open_at: Callable[..., ObjectStore] = from_url
        return open_at(address, config=options, client_options=plain, retry_config=_RETRIES)
    except (BaseError, ValueError, OSError) as error:
        raise StoreUnavailable(
            f"The artifact store {address!r} cannot be opened: {error}"
        ) from error


def _is_plain_http(options: dict[str, str]) -> bool:
    """Whoever writes http:// in the URL wants it; in the environment AWS_ALLOW_HTTP says so."""
    return any(value.startswith("http://") for value in options.values())


def _local_folder(url: str) -> Path | None:
    return Path(unquote(urlsplit(url).path)) if url.startswith("file:") else None


def _file(sha256: str) -> str:
    return _folder(_FILES, sha256)


def _folder(kind: str, digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise ArtifactMissing(digest)
    return f"{kind}/{digest[:2]}/{digest}"
