"""Keep adapters and text bundles under their digests, on disk or in an object store.

    adapters/<aa>/<digest>/adapter_model.safetensors
    adapters/<aa>/<digest>/adapter_config.json         written last: where it is, all is
    text-bundles/<aa>/<digest>/text_bundle.msgpack

Knows nothing of names or owners: what is stored is never changed, only removed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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


class ArtifactStore:
    """Artifacts by digest at a URL: file://, memory://, s3://, gs:// or az://.

    Credentials of object stores come from where their own tools look for them. Every method
    raises StoreUnavailable when the store cannot be reached or refuses.
    """

    def __init__(self, url: str) -> None:
        self._store = _open(url)

    async def put_adapter(self, digest: str, config_bytes: bytes, weights_path: Path) -> None:
        """Store an adapter whole or not at all; one that is there already stays as it is.

        `config_bytes` is `Manifest.canonical_config()`, and nothing else: engines check the digest
        against it, and match no pattern that a stranger wrote.
        """
        if not is_canonical(config_bytes):
            raise AdapterError("Only Manifest.canonical_config() is stored as a configuration.")
        folder = _folder("adapters", digest)
        if await self.has_adapter(digest):
            return
        with _reporting(digest):
            await obstore.put_async(
                self._store,
                f"{folder}/{WEIGHTS_FILE}",
                weights_path,
                # Parts of 5 MiB under way; by default 12 are, and stay in memory as long.
                max_concurrency=2,
            )
            await obstore.put_async(self._store, f"{folder}/{CONFIG_FILE}", config_bytes)

    async def has_adapter(self, digest: str) -> bool:
        """Whether the adapter is stored, whole."""
        try:
            with _reporting(digest):
                await obstore.head_async(
                    self._store, f"{_folder('adapters', digest)}/{CONFIG_FILE}"
                )
        except ArtifactMissing:
            return False
        return True

    async def delete_adapter(self, digest: str) -> None:
        """Remove an adapter; one that is not there is not an error."""
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            await self._delete("adapters", digest, name=name)

    async def delete_bundle(self, digest: str) -> None:
        """Remove a text bundle; one that is not there is not an error."""
        await self._delete("text-bundles", digest, name=_BUNDLE_FILE)

    async def _delete(self, kind: str, digest: str, *, name: str) -> None:
        path = f"{_folder(kind, digest)}/{name}"
        with suppress(ArtifactMissing), _reporting(digest):
            await obstore.delete_async(self._store, path)

    def fetch_adapter(self, digest: str, into: Path) -> None:
        """Write an adapter's two files into an existing folder. Blocks.

        Raises ArtifactMissing.
        """
        folder = _folder("adapters", digest)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            with _reporting(digest), (into / name).open("wb") as file:
                for chunk in obstore.get(self._store, f"{folder}/{name}").stream():
                    file.write(chunk)

    async def put_bundle(self, bundle: TextBundle) -> str:
        """Store a text bundle and return its digest."""
        digest = text_bundle.digest(bundle)
        path = f"{_folder('text-bundles', digest)}/{_BUNDLE_FILE}"
        with _reporting(digest):
            await obstore.put_async(self._store, path, text_bundle.encode(bundle))
        return digest

    async def get_bundle(self, digest: str) -> TextBundle:
        """Return the text bundle with this digest.

        Raises ArtifactMissing, UnreadableArtifact and DigestMismatch.
        """
        path = f"{_folder('text-bundles', digest)}/{_BUNDLE_FILE}"
        with _reporting(digest):
            result = await obstore.get_async(self._store, path)
            data = bytes(await result.bytes_async())
        bundle = text_bundle.decode(data)
        if text_bundle.digest(bundle) != digest:
            raise DigestMismatch(digest, found=text_bundle.digest(bundle))
        return bundle


def _open(url: str) -> ObjectStore:
    try:
        if url.startswith("file:"):
            return LocalStore.from_url(url, mkdir=True)
        if url.startswith("memory:"):
            return MemoryStore()
        return from_url(url)
    except (BaseError, ValueError, OSError) as error:
        raise StoreUnavailable(f"The artifact store {url!r} cannot be opened: {error}") from error


def _folder(kind: str, digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise ArtifactMissing(digest)
    return f"{kind}/{digest[:2]}/{digest}"


@contextmanager
def _reporting(digest: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactMissing(digest) from error
    except (BaseError, OSError) as error:
        raise StoreUnavailable(f"The artifact store failed at {digest}: {error}") from error
