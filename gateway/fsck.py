"""Compare the artifact store with the rows that name what is in it, and repair what differs.

Works beside running gateways: what may be part of an upload under way is left alone, and each
finding is looked at again before anything is changed. Removes only what no row needs; a version
whose bytes are gone is marked, and answers 503 by name until its adapter is uploaded again.
"""

import asyncio
import datetime
import hashlib
import tempfile
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from sqlalchemy import text

from adapters.cache import verify
from adapters.errors import ArtifactMissing, DigestMismatch, InvalidAdapter
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from adapters.store import ArtifactStore, FoundFile, Stored
from gateway import audit
from gateway.blobs import Blobs, lock_bytes
from gateway.database import Database
from gateway.resumable import expired_uploads, remove_upload

NAMED = text("""
    SELECT v.id, v.tenant_id, a.public_name || '@' || v.number AS name, v.state,
           v.weights_digest, v.text_bundle_digest, coalesce(v.source_files, '{}') AS source_files
    FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id
    WHERE v.state <> 'rejected' AND v.purged_at IS NULL
    ORDER BY name
""")
BASE_BUNDLES = text("SELECT name, text_bundle_digest FROM base_models ORDER BY name")
UPLOAD_IDS = text("SELECT id FROM uploads")
# Those that a batch is going to have are named before they are stored.
FILE_IDS = text("""
    SELECT id, true AS is_whole FROM tenant_files
    UNION ALL SELECT output_file_id, false FROM batches WHERE ended_at IS NULL
    UNION ALL SELECT error_file_id, false FROM batches WHERE ended_at IS NULL
""")
MARK_MISSING = text("""
    UPDATE adapter_versions SET state = 'missing'
    WHERE id = :id AND state IN ('probing', 'ready') RETURNING id
""")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it should be. `kind` is stable, for programs."""

    kind: str
    # A digest, a version's name, an upload's id or a file.
    subject: str
    message: str
    is_repaired: bool = False

    def line(self) -> str:
        return f"{'repaired' if self.is_repaired else 'found'}  {self.kind}  {self.subject}  " + (
            self.message
        )


@dataclass(frozen=True, slots=True)
class Report:
    """What was compared and what is wrong."""

    num_adapters: int
    num_versions: int
    problems: list[Problem] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        return all(problem.is_repaired for problem in self.problems)

    def summary(self) -> str:
        kinds = Counter(problem.kind for problem in self.problems)
        found = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        return (
            f"{self.num_adapters} stored adapters and {self.num_versions} versions compared:"
            f" {found or 'nothing is wrong'}"
        )


@dataclass(frozen=True, slots=True)
class _Version:
    id: uuid.UUID
    tenant_id: uuid.UUID
    # With its number, e.g. "acme-sql@3".
    name: str
    state: str
    weights_digest: str
    text_bundle_digest: str | None
    # file name -> SHA-256
    source_files: dict[str, str]


class Fsck:
    """One comparison. `grace` is how old something must be to be called left behind."""

    def __init__(
        self, database: Database, store: ArtifactStore, *, grace: datetime.timedelta
    ) -> None:
        self._database = database
        self._store = store
        self._blobs = Blobs(database, store)
        self._grace = grace
        self._must_repair = False

    async def run(self, *, is_deep: bool, must_repair: bool) -> Report:
        """Compare, and repair where told to. Raises StoreUnavailable."""
        self._must_repair = must_repair
        # The store first: what is uploaded meanwhile has rows that are looked at twice.
        stored, bundles = await self._store.adapters(), await self._store.bundles()
        files = await self._store.files()
        async with self._database.as_worker() as session:
            versions = [_Version(**row) for row in (await session.execute(NAMED)).mappings()]
            bases = (await session.execute(BASE_BUNDLES)).all()
        named_bundles = {base.text_bundle_digest for base in bases} | {
            version.text_bundle_digest for version in versions
        }
        named = {version.weights_digest for version in versions}
        named_files = {sha256 for each in versions for sha256 in each.source_files.values()}
        report = Report(len(stored), len(versions))
        problems = report.problems
        problems += [p async for p in self._missing(versions, stored, bundles)]
        if is_deep:
            problems += [p async for p in self._damaged(versions, stored)]
            problems += [p async for p in self._damaged_files(files, named_files)]
        lost = {problem.subject for problem in problems}
        served = [v for v in versions if v.name not in lost and v.weights_digest not in lost]
        problems += [p async for p in self._missing_files(served, files)]
        problems += [p async for p in self._orphans(stored, named, kind="adapter")]
        problems += [p async for p in self._orphans(files, named_files, kind="file")]
        problems += [p async for p in self._orphans(bundles, named_bundles, kind="bundle")]
        problems += [p async for p in self._documents()]
        problems += [p async for p in self._stale_uploads()]
        problems += await asyncio.to_thread(self._unfinished)
        return report

    async def _missing(
        self, versions: list[_Version], stored: list[Stored], bundles: list[Stored]
    ) -> AsyncIterator[Problem]:
        whole = {each.name for each in stored if each.files >= {CONFIG_FILE, WEIGHTS_FILE}}
        there = {each.name for each in bundles}
        for version in versions:
            bundle = version.text_bundle_digest
            is_there = version.weights_digest in whole and (bundle is None or bundle in there)
            if is_there or await self._is_there_now(version):
                continue
            problem = Problem("missing", version.name, "its bytes are not in the store")
            yield await self._mark_missing(problem, [version])

    async def _is_there_now(self, version: _Version) -> bool:
        if not await self._store.has_adapter(version.weights_digest):
            return False
        if version.text_bundle_digest is None:
            return True
        return version.text_bundle_digest in {each.name for each in await self._store.bundles()}

    async def _damaged(
        self, versions: list[_Version], stored: list[Stored]
    ) -> AsyncIterator[Problem]:
        """Read each needed adapter whole, one at a time, through a folder that is then gone."""
        whole = {each.name for each in stored if each.files >= {CONFIG_FILE, WEIGHTS_FILE}}
        for digest in sorted({version.weights_digest for version in versions} & whole):
            sha256 = await self._store.weights_sha256(digest)
            reason = await asyncio.to_thread(self._damage, digest, sha256)
            if reason is None:
                continue
            problem = Problem("damaged", digest, reason)
            hit = [version for version in versions if version.weights_digest == digest]
            if self._must_repair:
                # Gone, so that the next upload of the same contents brings them again.
                await self._store.delete_adapter(digest)
            yield await self._mark_missing(problem, hit)

    def _damage(self, digest: str, sha256: str | None) -> str | None:
        with tempfile.TemporaryDirectory(prefix="manylora-fsck-") as folder:
            try:
                self._store.fetch_adapter(digest, Path(folder))
                verify(digest, Path(folder))
            except (DigestMismatch, InvalidAdapter) as error:
                return str(error)
            except ArtifactMissing:
                return "was there a moment ago, and is not whole now"
            with (Path(folder) / WEIGHTS_FILE).open("rb") as file:
                if sha256 not in (None, hashlib.file_digest(file, "sha256").hexdigest()):
                    return f"its {WEIGHTS_FILE} is not the one that was uploaded"
        return None

    async def _missing_files(
        self, versions: list[_Version], files: list[Stored]
    ) -> AsyncIterator[Problem]:
        """Versions that are served, and whose files cannot be had back.

        Only another upload of the same contents can repair that.
        """
        there = {each.name for each in files}
        for version in versions:
            for name, sha256 in version.source_files.items():
                if version.state == "missing" or sha256 in there:
                    continue
                if await self._blobs.find_file(name, sha256, version.weights_digest) is None:
                    message = f"{name} is not in the store; upload the same adapter again"
                    yield Problem("missing_file", version.name, message)

    async def _damaged_files(self, files: list[Stored], named: set[str]) -> AsyncIterator[Problem]:
        for sha256 in sorted({each.name for each in files} & named):
            found = await self._store.find_file(sha256)
            if found is None or await self._is_as_uploaded(found, sha256):
                continue
            if self._must_repair:
                # Gone, so that the next upload of the same file brings it again.
                await self._store.delete_file(sha256)
            message = "has another SHA-256 now"
            yield Problem("damaged_file", sha256, message, is_repaired=self._must_repair)

    async def _is_as_uploaded(self, found: FoundFile, sha256: str) -> bool:
        checksum = hashlib.sha256()
        async for chunk in self._store.stream_file(found):
            await asyncio.to_thread(checksum.update, chunk)
        return checksum.hexdigest() == sha256

    async def _mark_missing(self, problem: Problem, versions: list[_Version]) -> Problem:
        """A problem that is known and marked already is told, and counts as dealt with."""
        if all(version.state == "missing" for version in versions):
            return replace(problem, message=f"{problem.message}; marked", is_repaired=True)
        if not self._must_repair:
            return problem
        async with self._database.as_worker() as session:
            for version in versions:
                await lock_bytes(session, version.weights_digest)
                if await session.scalar(MARK_MISSING, {"id": version.id}) is None:
                    continue
                await audit.record(
                    session,
                    tenant_id=version.tenant_id,
                    actor_key_id=None,
                    action="adapter.version.missing",
                    subject=version.name,
                    details={"weights_digest": version.weights_digest},
                )
        return replace(problem, message=f"{problem.message}; marked", is_repaired=True)

    async def _orphans(
        self, stored: list[Stored], named: set[str] | set[str | None], *, kind: str
    ) -> AsyncIterator[Problem]:
        discard = {
            "adapter": self._blobs.discard_adapter,
            "bundle": self._blobs.discard_bundle,
            "file": self._blobs.discard_file,
        }[kind]
        for each in stored:
            if each.name in named or not self._is_old(each.modified_at):
                continue
            problem = Problem(f"orphan_{kind}", each.name, f"{each.size_bytes} bytes")
            if not self._must_repair:
                yield problem
            elif await discard(each.name):
                yield replace(problem, is_repaired=True)

    async def _documents(self) -> AsyncIterator[Problem]:
        """Tenants' own files without bytes, and bytes that are nobody's file."""
        stored = await self._store.documents()
        async with self._database.as_worker() as session:
            rows = (await session.execute(FILE_IDS)).all()
        there, known = {each.name for each in stored}, {str(row.id) for row in rows}
        for row in rows:
            is_missed = row.is_whole and str(row.id) not in there
            if is_missed and await self._store.find_document(row.id) is None:
                yield Problem("missing_document", str(row.id), "its bytes are not in the store")
        for each in stored:
            if each.name in known or not self._is_old(each.modified_at):
                continue
            if self._must_repair:
                await self._store.delete_document(uuid.UUID(each.name))
            message = f"{each.size_bytes} bytes that no file knows"
            yield Problem("orphan_document", each.name, message, is_repaired=self._must_repair)

    async def _stale_uploads(self) -> AsyncIterator[Problem]:
        async with self._database.as_worker() as session:
            known = {str(upload_id) for upload_id in await session.scalars(UPLOAD_IDS)}
        lost = [
            (each.name, f"{each.size_bytes} bytes that no upload knows")
            for each in await self._store.uploads()
            if each.name not in known and self._is_old(each.modified_at)
        ]
        expired = [(str(found), "expired") for found in await expired_uploads(self._database)]
        for name, message in [*expired, *lost]:
            if self._must_repair:
                await remove_upload(self._database, self._store, uuid.UUID(name))
            yield Problem("stale_upload", name, message, is_repaired=self._must_repair)

    def _unfinished(self) -> list[Problem]:
        """Files that a killed writer left; on a local disk only."""
        problems = []
        for path in self._store.unfinished_files():
            modified_at = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
            if not self._is_old(modified_at):
                continue
            if self._must_repair:
                path.unlink(missing_ok=True)
            problems.append(
                Problem("unfinished_file", str(path), "", is_repaired=self._must_repair)
            )
        return problems

    def _is_old(self, modified_at: datetime.datetime) -> bool:
        return datetime.datetime.now(datetime.UTC) - modified_at >= self._grace
