"""Which bytes in the store a row still needs, where an upload's go, and the removal of the rest.

Bytes are put before a row names them and removed after none does any more, so the two can meet:
whoever books bytes and whoever removes them take turns, digest by digest, and whoever books looks
once more, afterwards, whether they are there.

Each tenant's first upload of a file writes it, whoever has the same already, so that how long this
takes tells nobody what others have; within one tenant a file is written once.
"""

import asyncio
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.manifest import WEIGHTS_FILE
from adapters.store import ArtifactStore, FoundFile
from gateway.database import Database

# Held until the transaction ends.
LOCK_BYTES = text("SELECT pg_advisory_xact_lock(hashtextextended('bytes ' || :digest, 0))")
# Whose weights file lies beside an adapter. Whoever puts it holds this for as long as that takes.
LOCK_PLACE = text("SELECT pg_advisory_xact_lock(hashtextextended('place ' || :digest, 0))")
TRY_PLACE = text("SELECT pg_try_advisory_xact_lock(hashtextextended('place ' || :digest, 0))")
# The largest file through the slowest link that is of any use.
LET_IT_TAKE = text("SET LOCAL idle_in_transaction_session_timeout = '2h'")
# Each holds a connection of the pool, of ten, and they share the way to the store anyway.
MAX_PUTS = 4

# By any tenant. A rejected version is never served: another upload of its contents brings them.
NAMES_ADAPTER = (
    "SELECT FROM adapter_versions"
    " WHERE weights_digest = {} AND state <> 'rejected' AND purged_at IS NULL"
)
NAMES_BUNDLE = (
    "SELECT FROM adapter_versions"
    " WHERE text_bundle_digest = {} AND state <> 'rejected' AND purged_at IS NULL"
    " UNION ALL SELECT FROM base_models WHERE text_bundle_digest = {}"
)
NAMES_FILE = (
    "SELECT FROM adapter_versions"
    " WHERE jsonb_path_query_array(source_files, '$.*') ? {} AND source_files IS NOT NULL"
    " AND state <> 'rejected' AND purged_at IS NULL"
)
IS_ADAPTER_NEEDED = text(f"SELECT EXISTS ({NAMES_ADAPTER.format(':digest')})")
IS_BUNDLE_NEEDED = text(f"SELECT EXISTS ({NAMES_BUNDLE.format(':digest', ':digest')})")
IS_FILE_NEEDED = text(f"SELECT EXISTS ({NAMES_FILE.format(':digest')})")

# The versions of one tenant that have one of these files. What is missing is not had.
HAD_ALREADY = text("""
    SELECT weights_digest, source_files FROM adapter_versions
    WHERE jsonb_path_query_array(source_files, '$.*') ?| CAST(:digests AS text[])
      AND source_files IS NOT NULL AND tenant_id = :tenant_id
      AND state IN ('probing', 'ready') AND purged_at IS NULL
""")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of an upload, on this host."""

    path: Path
    sha256: str


@dataclass(frozen=True, slots=True)
class UploadBytes:
    """The bytes of one upload, as they are stored."""

    tenant_id: uuid.UUID
    weights_digest: str
    # `Manifest.canonical_config()`
    config: bytes
    # By name, the weights among them.
    files: Mapping[str, SourceFile]

    @property
    def weights(self) -> SourceFile:
        return self.files[WEIGHTS_FILE]


class Blobs:
    """Puts uploads into the store, and removes from it what no row names.

    Raises StoreUnavailable.
    """

    def __init__(self, database: Database, store: ArtifactStore) -> None:
        self._database = database
        self._store = store
        self._puts = asyncio.Semaphore(MAX_PUTS)

    async def put(self, upload: UploadBytes) -> None:
        """Store what the tenant does not have, whoever else may have it."""
        query = {
            "tenant_id": upload.tenant_id,
            "digests": [file.sha256 for file in upload.files.values()],
        }
        async with self._database.as_worker() as session:
            rows = (await session.execute(HAD_ALREADY, query)).all()
        had = {sha256 for row in rows for sha256 in row.source_files.values()}
        for name, file in upload.files.items():
            if name != WEIGHTS_FILE and file.sha256 not in had:
                await self._store.put_file(file.sha256, file.path)
        weights = {(row.weights_digest, row.source_files.get(WEIGHTS_FILE)) for row in rows}
        if (upload.weights_digest, upload.weights.sha256) not in weights:
            await self._put_weights(upload)

    async def complete(self, upload: UploadBytes, *, is_source: bool) -> None:
        """Store what is not there, once a row names it: from then on nobody removes it.

        `is_source` says that the row names the files as well, and not those of an earlier upload.
        """
        if not await self._store.has_adapter(upload.weights_digest):
            async with self._puts, self._database.as_worker() as session:
                await session.execute(LET_IT_TAKE)
                await session.execute(LOCK_PLACE, {"digest": upload.weights_digest})
                await self._put_adapter(upload)
        for name, file in upload.files.items() if is_source else ():
            if await self.find_file(name, file.sha256, upload.weights_digest) is None:
                await self._store.put_file(file.sha256, file.path)

    async def find_file(self, name: str, sha256: str, weights_digest: str) -> FoundFile | None:
        """Where a file lies that a version with these weights was uploaded as."""
        beside = weights_digest if name == WEIGHTS_FILE else None
        return await self._store.find_file(sha256, beside=beside)

    async def has_files(self, files: Mapping[str, str], weights_digest: str) -> bool:
        """Whether all files of a version, name -> SHA-256, are stored."""
        for name, sha256 in files.items():
            if await self.find_file(name, sha256, weights_digest) is None:
                return False
        return True

    async def discard_adapter(self, digest: str) -> bool:
        """Remove an adapter's bytes, unless a version needs them; return whether they are gone."""
        async with self._database.as_worker() as session:
            await lock_bytes(session, digest)
            if await session.scalar(IS_ADAPTER_NEEDED, {"digest": digest}):
                return False
            await self._store.delete_adapter(digest)
        return True

    async def discard_bundle(self, digest: str) -> bool:
        """The same for a text bundle."""
        async with self._database.as_worker() as session:
            await lock_bytes(session, digest)
            if await session.scalar(IS_BUNDLE_NEEDED, {"digest": digest}):
                return False
            await self._store.delete_bundle(digest)
        return True

    async def discard_file(self, sha256: str) -> bool:
        """The same for a file as it was uploaded."""
        async with self._database.as_worker() as session:
            await lock_bytes(session, sha256)
            if await session.scalar(IS_FILE_NEEDED, {"digest": sha256}):
                return False
            await self._store.delete_file(sha256)
        return True

    async def discard(
        self, weights_digest: str, text_bundle_digest: str | None, sha256s: Iterable[str]
    ) -> bool:
        """All that one upload brought; return whether all of it is gone."""
        gone = [await self.discard_file(sha256) for sha256 in sorted(set(sha256s))]
        if text_bundle_digest is not None:
            gone.append(await self.discard_bundle(text_bundle_digest))
        gone.append(await self.discard_adapter(weights_digest))
        return all(gone)

    async def _put_weights(self, upload: UploadBytes) -> None:
        async with self._puts, self._database.as_worker() as session:
            await session.execute(LET_IT_TAKE)
            # Not waited for: that would tell that somebody else sends the same weights now.
            is_our_turn = await session.scalar(TRY_PLACE, {"digest": upload.weights_digest})
            if is_our_turn and await self._put_adapter(upload):
                return
            await self._store.put_file(upload.weights.sha256, upload.weights.path)

    async def _put_adapter(self, upload: UploadBytes) -> bool:
        """Return whether it was not there. Its place is locked."""
        if await self._store.has_adapter(upload.weights_digest):
            return False
        await self._store.put_adapter(
            upload.weights_digest,
            upload.config,
            upload.weights.path,
            weights_sha256=upload.weights.sha256,
        )
        return True


async def lock_bytes(session: AsyncSession, digest: str) -> None:
    await session.execute(LOCK_BYTES, {"digest": digest})
