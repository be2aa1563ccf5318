"""Which bytes in the store a row still needs, and the removal of those that none does.

Bytes are put before a row names them and removed after none does any more, so the two can meet:
whoever books bytes and whoever removes them take turns, digest by digest, and whoever books looks
once more, afterwards, whether they are there.
"""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.store import ArtifactStore
from gateway.database import Database

# Held until the transaction ends.
LOCK_BYTES = text("SELECT pg_advisory_xact_lock(hashtextextended('bytes ' || :digest, 0))")

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
IS_ADAPTER_NEEDED = text(f"SELECT EXISTS ({NAMES_ADAPTER.format(':digest')})")
IS_BUNDLE_NEEDED = text(f"SELECT EXISTS ({NAMES_BUNDLE.format(':digest', ':digest')})")


class Blobs:
    """Removes from the store what no row names."""

    def __init__(self, database: Database, store: ArtifactStore) -> None:
        self._database = database
        self._store = store

    async def discard_adapter(self, digest: str) -> bool:
        """Remove an adapter's bytes, unless a version needs them; return whether they are gone.

        Raises StoreUnavailable.
        """
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


async def lock_bytes(session: AsyncSession, digest: str) -> None:
    await session.execute(LOCK_BYTES, {"digest": digest})
