"""Uploads that arrive in pieces, in any number of requests, over any gateway, for a day and longer.

Each piece is an object in the artifact store, and a row says that it is there: the object first,
then the row. So whatever is killed, the rows tell what has arrived, and another gateway goes on
from there. Whole, the pieces become files in a staging folder and go the way of every upload.
"""

import asyncio
import datetime
import logging
import re
import secrets
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Annotated, Self

import msgspec
from sqlalchemy import delete, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.errors import ArtifactMissing, Finding, StoreUnavailable
from adapters.store import ArtifactStore
from gateway import audit
from gateway.background import Background
from gateway.database import DATABASE_TROUBLE, Database
from gateway.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    OffsetMismatch,
    RejectedUpload,
    TooManyUploads,
    Unavailable,
)
from gateway.registry import Destination, Published, Registry
from gateway.staging import (
    EXPECTED,
    MAX_UPLOADS_UNDER_WAY,
    FileSink,
    Form,
    StagedFile,
    Staging,
    StagingFolder,
    check_complete,
    known_file,
    too_large,
)
from gateway.tables import Adapter, AdapterVersion, Upload, UploadPart, new_id
from gateway.uploads import Accepted, Uploads, wrong_sha256

logger = logging.getLogger(__name__)

LIFETIME = datetime.timedelta(hours=24)
SWEEP_INTERVAL_S = 600.0
# What a piece holds, and what a request that receives one keeps in memory.
PIECE_BYTES = 8 << 20
# Of one file. Tiny ranges would make rows and objects without end.
MAX_PIECES = 2000
MAX_OPEN_UPLOADS = 64

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")

# Declarations of one tenant are counted one after the other.
COUNT_OPEN = text("""
    SELECT count(*) AS number, coalesce(sum(total), 0)::bigint AS total_bytes
    FROM (
        SELECT (SELECT sum((file ->> 'size_bytes')::bigint)
                FROM jsonb_array_elements(files) AS file) AS total
        FROM uploads WHERE tenant_id = :tenant_id AND state = 'open' AND expires_at > now()
    ) AS opened
""")
LOCK_TENANT = text("SELECT FROM tenants WHERE id = :tenant_id FOR NO KEY UPDATE")

_Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-fA-F]{64}$")]


class DeclaredFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file that is going to arrive."""

    name: Annotated[str, msgspec.Meta(max_length=200)]
    size_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 60)]
    # 64 hexadecimal digits
    sha256: _Sha256


@dataclass(frozen=True, slots=True)
class Progress:
    """An upload and how many bytes of each of its files have arrived, all from the beginning."""

    upload: Upload
    files: list[DeclaredFile]
    received_bytes: dict[str, int]
    # Of the version that it became.
    version_number: int | None


@dataclass(frozen=True, slots=True)
class Range:
    """Which bytes of a file a request brings; `end` is one past the last."""

    begin: int
    end: int

    @classmethod
    def of(cls, header: str, file: DeclaredFile) -> Self:
        """Read a Content-Range header (RFC 9110, section 14.4). Raises InvalidRequest."""
        match = _CONTENT_RANGE.fullmatch(header)
        if match is None:
            raise InvalidRequest(
                "Say which bytes these are: Content-Range: bytes FIRST-LAST/SIZE.",
                param="Content-Range",
            )
        first, last, size = (int(group) for group in match.groups())
        if size != file.size_bytes or not first <= last < size:
            raise InvalidRequest(
                f"{header!r} is no range of {file.name}, which was declared with"
                f" {file.size_bytes} bytes.",
                param="Content-Range",
            )
        return cls(first, last + 1)


class ResumableUploads(Background):
    """Mutable: the task that removes expired uploads, while used as a context."""

    def __init__(
        self,
        database: Database,
        registry: Registry,
        store: ArtifactStore,
        *,
        staging: Staging,
        uploads: Uploads,
        lifetime: datetime.timedelta = LIFETIME,
    ) -> None:
        self._database = database
        self._registry = registry
        self._store = store
        self._staging = staging
        self._uploads = uploads
        self._lifetime = lifetime

    async def declare(
        self,
        tenant: str,
        adapter: str,
        *,
        files: list[DeclaredFile],
        base_model: str | None,
        actor_key_id: uuid.UUID,
    ) -> Progress:
        """Begin an upload. Raises InvalidRequest, BodyTooLarge, TooManyUploads and Conflict."""
        destination = await self._registry.destination(tenant, adapter)
        await self._registry.base_model_for(destination, base_model)
        declared = _checked(files, max_bytes=self._staging.max_upload_bytes)
        async with self._database.as_worker() as session:
            await self._check_room(session, destination, declared)
            upload = Upload(
                id=new_id(),
                tenant_id=destination.tenant_id,
                adapter=adapter,
                base_model=base_model,
                files=msgspec.to_builtins(declared),
                expires_at=func.now() + self._lifetime,
            )
            session.add(upload)
            await session.flush()
            await session.refresh(upload)
            await audit.record(
                session,
                tenant_id=upload.tenant_id,
                actor_key_id=actor_key_id,
                action="adapter.upload.declare",
                subject=destination.public_name,
                details={"upload_id": str(upload.id)},
            )
        return _progress(upload, {}, version_number=None)

    async def progress(self, tenant: str, adapter: str, upload_id: uuid.UUID) -> Progress:
        """What has arrived. Raises NotFound."""
        destination = await self._registry.destination(tenant, adapter)
        async with self._database.as_worker() as session:
            upload = await _find(session, destination, upload_id)
            received = await _received(session, upload.id)
            number = await session.scalar(
                select(AdapterVersion.number).where(AdapterVersion.id == upload.version_id)
            )
        return _progress(upload, received, version_number=number)

    async def receive(
        self,
        tenant: str,
        adapter: str,
        upload_id: uuid.UUID,
        *,
        file: str,
        content_range: str,
        body: AsyncIterator[bytes],
    ) -> Progress:
        """Take in a range of one file. What has arrived before is passed over.

        Whatever of the range arrives is kept, in whole pieces, when the client goes away in the
        middle. Raises NotFound, InvalidRequest, Conflict, OffsetMismatch and Unavailable.
        """
        progress = await self.progress(tenant, adapter, upload_id)
        _check_open(progress.upload)
        declared = _declared(progress, file)
        span = Range.of(content_range, declared)
        offset = progress.received_bytes[declared.name]
        if span.begin > offset:
            raise OffsetMismatch(declared.name, expected_offset=offset)
        piece_bytes = max(PIECE_BYTES, -(-declared.size_bytes // (MAX_PIECES // 2)))
        pieces = _pieces(body, span, begin=offset, piece_bytes=piece_bytes)
        async for begin, piece in pieces:
            await self._keep(progress.upload, declared.name, begin, piece)
        return await self.progress(tenant, adapter, upload_id)

    async def complete(
        self, tenant: str, adapter: str, upload_id: uuid.UUID, *, actor_key_id: uuid.UUID
    ) -> Accepted:
        """Make a version of an upload that has arrived; asked again, return the same version.

        Raises as `Uploads.publish` does, and OffsetMismatch where bytes are missing.
        """
        progress = await self.progress(tenant, adapter, upload_id)
        if progress.upload.state != "open":
            return await self._outcome(progress.upload)
        for file in progress.files:
            if progress.received_bytes[file.name] < file.size_bytes:
                raise OffsetMismatch(file.name, expected_offset=progress.received_bytes[file.name])
        try:
            accepted = await self._take(tenant, progress, actor_key_id=actor_key_id)
        except RejectedUpload as error:
            await self._close(progress.upload, findings=error.findings)
            raise
        except ArtifactMissing as error:
            # Somebody else completed it meanwhile, and removed the pieces.
            again = await self.progress(tenant, adapter, upload_id)
            if again.upload.state != "open":
                return await self._outcome(again.upload)
            raise Conflict(
                "The artifact store has lost pieces of this upload; begin another."
            ) from error
        await self._close(progress.upload, accepted=accepted)
        return accepted

    async def delete(
        self, tenant: str, adapter: str, upload_id: uuid.UUID, *, actor_key_id: uuid.UUID
    ) -> None:
        """Forget an upload with all that has arrived; its version, if it has one, stays.

        Raises NotFound.
        """
        destination = await self._registry.destination(tenant, adapter)
        async with self._database.as_worker() as session:
            await _find(session, destination, upload_id)
        try:
            await self._store.delete_upload(upload_id)
        except StoreUnavailable as error:
            raise _store_away() from error
        async with self._database.as_worker() as session:
            if await _remove_rows(session, upload_id):
                await audit.record(
                    session,
                    tenant_id=destination.tenant_id,
                    actor_key_id=actor_key_id,
                    action="adapter.upload.delete",
                    subject=destination.public_name,
                    details={"upload_id": str(upload_id)},
                )

    async def sweep(self) -> int:
        """Remove what has expired; return how many uploads."""
        expired = await expired_uploads(self._database)
        for upload_id in expired:
            await remove_upload(self._database, self._store, upload_id)
        return len(expired)

    async def _run_forever(self) -> None:
        while True:
            try:
                if num_removed := await self.sweep():
                    logger.info("uploads_expired", extra={"num_uploads": num_removed})
            except (*DATABASE_TROUBLE, StoreUnavailable) as error:
                logger.warning("upload_sweep_failed", extra={"reason": str(error)})
            await asyncio.sleep(SWEEP_INTERVAL_S)

    async def _check_room(
        self, session: AsyncSession, destination: Destination, files: list[DeclaredFile]
    ) -> None:
        tenant_id = {"tenant_id": destination.tenant_id}
        await session.execute(LOCK_TENANT, tenant_id)
        opened = (await session.execute(COUNT_OPEN, tenant_id)).one()
        if opened.number >= MAX_OPEN_UPLOADS:
            raise TooManyUploads(f"This tenant has {opened.number} uploads under way.")
        limit_bytes = MAX_UPLOADS_UNDER_WAY * self._staging.max_upload_bytes
        if opened.total_bytes + sum(file.size_bytes for file in files) > limit_bytes:
            raise TooManyUploads(
                f"This tenant's uploads under way come to more than {limit_bytes} bytes."
            )

    async def _keep(self, upload: Upload, file: str, begin: int, piece: bytes) -> None:
        """Store a piece, and then say so; one that another request brought meanwhile is dropped."""
        name = f"{file}.{begin:020d}.{secrets.token_hex(8)}"
        try:
            await self._store.put_part(upload.id, name, piece)
            is_kept = await self._book(upload, file, begin=begin, size=len(piece), name=name)
        except StoreUnavailable as error:
            raise _store_away() from error
        except BaseException:
            await self._drop(upload.id, name)
            raise
        if not is_kept:
            await self._drop(upload.id, name)

    async def _book(self, upload: Upload, file: str, *, begin: int, size: int, name: str) -> bool:
        """Return whether this piece is the one that goes on where the last one ended."""
        async with self._database.as_worker() as session:
            row = await session.get(Upload, upload.id, with_for_update=True)
            if row is None:
                raise _no_upload(upload.id)
            _check_open(row)
            received, number = await _received_of(session, row.id, file)
            if received >= begin + size:
                return False
            if received != begin:
                raise OffsetMismatch(file, expected_offset=received)
            if number >= MAX_PIECES:
                raise InvalidRequest(
                    f"{file} came in {MAX_PIECES} ranges, which are too many; delete this upload"
                    f" and send ranges of {PIECE_BYTES} bytes or more."
                )
            session.add(
                UploadPart(
                    upload_id=row.id,
                    file=file,
                    begin_bytes=begin,
                    tenant_id=row.tenant_id,
                    size_bytes=size,
                    part=name,
                )
            )
            row.expires_at = func.now() + self._lifetime
        return True

    async def _drop(self, upload_id: uuid.UUID, name: str) -> None:
        try:
            await asyncio.shield(self._store.delete_part(upload_id, name))
        except StoreUnavailable as error:
            # It goes with its upload.
            logger.warning("piece_left_behind", extra={"piece": name, "reason": str(error)})

    async def _take(self, tenant: str, progress: Progress, *, actor_key_id: uuid.UUID) -> Accepted:
        upload = progress.upload
        destination = await self._registry.destination(tenant, upload.adapter)
        with self._staging.folder(upload.tenant_id) as folder:
            form = await self._assemble(progress, folder)
            if upload.base_model is not None:
                form.fields["base_model"] = upload.base_model
            return await self._uploads.take(
                destination, form, folder.path, actor_key_id=actor_key_id
            )

    async def _assemble(self, progress: Progress, folder: StagingFolder) -> Form:
        """Put the pieces together in a staging folder, and check what was declared of them.

        Raises ArtifactMissing, RejectedUpload, TooManyUploads and Unavailable.
        """
        folder.claim(sum(file.size_bytes for file in progress.files))
        form = Form()
        findings: list[Finding] = []
        for file in progress.files:
            staged = await self._assemble_file(progress.upload, file, folder)
            form.files[file.name] = staged
            if staged.sha256 != file.sha256:
                findings.append(wrong_sha256(staged, file.sha256))
        if findings:
            raise RejectedUpload(findings)
        return form

    async def _assemble_file(
        self, upload: Upload, file: DeclaredFile, folder: StagingFolder
    ) -> StagedFile:
        async with self._database.as_worker() as session:
            query = (
                select(UploadPart)
                .where(UploadPart.upload_id == upload.id, UploadPart.file == file.name)
                .order_by(UploadPart.begin_bytes)
            )
            pieces = (await session.scalars(query)).all()
        if sum(piece.size_bytes for piece in pieces) != file.size_bytes:
            # They were there a moment ago.
            raise ArtifactMissing(file.name)
        sink = FileSink(folder.path / file.name)
        try:
            for piece in pieces:
                async for chunk in self._store.stream_part(upload.id, piece.part):
                    await sink.write(chunk)
            return await sink.finish()
        except StoreUnavailable as error:
            raise _store_away() from error
        finally:
            sink.close()

    async def _close(
        self,
        upload: Upload,
        *,
        accepted: Accepted | None = None,
        findings: Iterable[Finding] = (),
    ) -> None:
        """Write down what came of an upload, then let go of its pieces."""
        async with self._database.as_worker() as session:
            row = await session.get(Upload, upload.id, with_for_update=True)
            if row is not None and row.state == "open":
                row.state = "rejected" if accepted is None else "published"
                row.findings = [msgspec.to_builtins(finding) for finding in findings]
                if accepted is not None:
                    row.version_id = accepted.published.version.id
                    row.ignored_files = accepted.ignored_files
                await session.execute(delete(UploadPart).where(UploadPart.upload_id == upload.id))
        try:
            await self._store.delete_upload(upload.id)
        except StoreUnavailable as error:
            # They go when the upload expires.
            logger.warning("pieces_left_behind", extra={"reason": str(error)})

    async def _outcome(self, upload: Upload) -> Accepted:
        """What came of an upload that was completed before. Raises RejectedUpload."""
        if upload.state == "rejected":
            raise RejectedUpload(msgspec.convert(upload.findings, list[Finding]))
        async with self._database.as_worker() as session:
            version = await session.get_one(AdapterVersion, upload.version_id)
            adapter = await session.get_one(Adapter, version.adapter_id)
        return Accepted(Published(adapter, version, is_new=False), list(upload.ignored_files))


async def remove_upload(database: Database, store: ArtifactStore, upload_id: uuid.UUID) -> None:
    """Forget an upload; where this is cut off in the middle, it can be done again.

    Raises StoreUnavailable.
    """
    # The objects first: a row that is left is found again, an object that is left only by fsck.
    await store.delete_upload(upload_id)
    async with database.as_worker() as session:
        await _remove_rows(session, upload_id)


async def _remove_rows(session: AsyncSession, upload_id: uuid.UUID) -> bool:
    """Return whether there were any."""
    row = await session.get(Upload, upload_id, with_for_update=True)
    if row is None:
        return False
    await session.execute(delete(UploadPart).where(UploadPart.upload_id == upload_id))
    await session.delete(row)
    return True


async def expired_uploads(database: Database) -> list[uuid.UUID]:
    async with database.as_worker() as session:
        query = select(Upload.id).where(Upload.expires_at <= func.now())
        return list((await session.scalars(query)).all())


async def _pieces(
    body: AsyncIterator[bytes], span: Range, *, begin: int, piece_bytes: int
) -> AsyncIterator[tuple[int, bytes]]:
    """Cut a body into pieces with their offsets, from `begin` on. Raises InvalidRequest.

    Reads nothing of a body that brings nothing new.
    """
    position, pending = span.begin, bytearray()
    if begin >= span.end:
        return
    async for chunk in body:
        position += len(chunk)
        if position > span.end:
            raise InvalidRequest("The body is longer than its Content-Range.")
        # Bytes that were there already are passed over.
        is_new_from = max(0, len(chunk) - max(0, position - begin - len(pending)))
        pending += memoryview(chunk)[is_new_from:]
        while len(pending) >= piece_bytes:
            yield begin, bytes(pending[:piece_bytes])
            begin += piece_bytes
            del pending[:piece_bytes]
    if pending:
        yield begin, bytes(pending)
    if position < span.end:
        raise InvalidRequest(
            f"The body is shorter than its Content-Range: {span.end - position} bytes are missing."
        )


def _checked(files: list[DeclaredFile], *, max_bytes: int) -> list[DeclaredFile]:
    """The declaration, by the names under which files are kept. Raises InvalidRequest."""
    declared: dict[str, DeclaredFile] = {}
    for file in files:
        name = known_file(file.name)
        if name is None:
            raise InvalidRequest(
                f"The file {file.name!r} is not known here: {EXPECTED}.", param="files"
            )
        if name in declared:
            raise InvalidRequest(f"The file {file.name!r} is declared twice.", param="files")
        declared[name] = DeclaredFile(name, file.size_bytes, file.sha256.lower())
    check_complete(declared)
    if sum(file.size_bytes for file in files) > max_bytes:
        raise too_large(max_bytes)
    return list(declared.values())


async def _find(session: AsyncSession, destination: Destination, upload_id: uuid.UUID) -> Upload:
    upload = await session.get(Upload, upload_id)
    is_there = (
        upload is not None
        and upload.tenant_id == destination.tenant_id
        and upload.adapter == destination.slug
    )
    if upload is None or not is_there:
        raise _no_upload(upload_id)
    return upload


async def _received(session: AsyncSession, upload_id: uuid.UUID) -> dict[str, int]:
    query = (
        select(UploadPart.file, func.max(UploadPart.begin_bytes + UploadPart.size_bytes))
        .where(UploadPart.upload_id == upload_id)
        .group_by(UploadPart.file)
    )
    return dict((await session.execute(query)).all())


async def _received_of(session: AsyncSession, upload_id: uuid.UUID, file: str) -> tuple[int, int]:
    """How many bytes of a file have arrived, and in how many pieces."""
    end = func.coalesce(func.max(UploadPart.begin_bytes + UploadPart.size_bytes), 0)
    query = select(end, func.count()).where(
        UploadPart.upload_id == upload_id, UploadPart.file == file
    )
    received, number = (await session.execute(query)).one()
    return received, number


def _progress(
    upload: Upload, received_bytes: dict[str, int], *, version_number: int | None
) -> Progress:
    files = msgspec.convert(upload.files, list[DeclaredFile])
    is_whole = upload.state != "open"
    received = {
        file.name: file.size_bytes if is_whole else received_bytes.get(file.name, 0)
        for file in files
    }
    return Progress(upload, files, received, version_number)


def _declared(progress: Progress, file: str) -> DeclaredFile:
    name = known_file(file)
    for declared in progress.files:
        if declared.name == name:
            return declared
    names = ", ".join(declared.name for declared in progress.files)
    raise NotFound(f"{file!r} was not declared for this upload; declared are: {names}.")


def _check_open(upload: Upload) -> None:
    if upload.state != "open":
        raise Conflict(f"This upload is {upload.state}; it takes no more bytes.")
    if upload.expires_at <= datetime.datetime.now(datetime.UTC):
        raise _no_upload(upload.id)


def _no_upload(upload_id: uuid.UUID) -> NotFound:
    return NotFound(f"This adapter has no upload {str(upload_id)!r}; it may have expired.")


def _store_away() -> Unavailable:
    return Unavailable("The artifact store does not answer now; try again shortly.")
