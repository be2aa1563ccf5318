"""A tenant's own files: taken in, kept for a while, and given back to that tenant alone.

Each lies in the artifact store under an id of its own, so whoever else has the same bytes shares
nothing with it. Bytes come before their row and go before it: a row always has its bytes, and what
a killed gateway leaves behind without one is found by fsck. Looks into no file.
"""

import asyncio
import datetime
import logging
import re
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header
from sqlalchemy import ColumnElement, exists, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.errors import ArtifactMissing, StoreUnavailable
from adapters.store import ArtifactStore, FoundFile
from gateway.background import Background
from gateway.database import DATABASE_TROUBLE, Database
from gateway.errors import (
    BodyTooLarge,
    Conflict,
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    Unavailable,
)
from gateway.object_ids import BATCH, Page, spell_id
from gateway.staging import FileSink, StagedFile, Staging, StagingFolder
from gateway.tables import Batch, TenantFile, new_id

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 200 << 20
# So many rows are listed and counted in no time.
MAX_FILES = 10_000
MAX_FIELD_BYTES = 1024
# Part headers, boundaries and text fields on top of the file.
OVERHEAD_BYTES = 64 * 1024
MAX_FILENAME_LENGTH = 255
LIFETIME_S = 30 * 86400
MIN_LIFETIME_S = 3600
SWEEP_S = 600.0

# OpenAI's spelling of a struct in a form.
FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
EXPECTED = "send the parts 'file' and 'purpose', and if you like 'expires_after'"

# Uploads of one tenant are booked one after the other from here on.
LOCK_TENANT = text("SELECT max_file_bytes FROM tenants WHERE id = :tenant_id FOR NO KEY UPDATE")


@dataclass(slots=True)
class Form:
    """Mutable: what has arrived of an upload so far."""

    filename: str = ""
    file: StagedFile | None = None
    fields: dict[str, str] = field(default_factory=dict)


class Files(Background):
    """Takes files in and gives them back. Used as a context it removes what has expired."""

    def __init__(
        self,
        database: Database,
        store: ArtifactStore,
        *,
        staging: Staging,
        max_bytes_per_tenant: int,
    ) -> None:
        self._database = database
        self._store = store
        self._staging = staging
        self._max_bytes = max_bytes_per_tenant

    async def receive(
        self,
        tenant_id: uuid.UUID,
        *,
        content_type: str,
        announced_bytes: int | None,
        body: AsyncIterator[bytes],
    ) -> TenantFile:
        """Take a file in, as it arrives.

        Raises InvalidRequest for what is no whole upload; BodyTooLarge, TooManyUploads and
        QuotaExceeded past the limits: before the first byte where the client has announced too
        many; Unavailable where the store does not answer.
        """
        expected_bytes = max((announced_bytes or 0) - OVERHEAD_BYTES, 0)
        if expected_bytes > MAX_FILE_BYTES:
            raise _too_large()
        async with self._database.as_worker() as session:
            await self._check_room(session, tenant_id, expected_bytes)
        with self._staging.folder(tenant_id) as folder:
            form = await _receive(body, content_type=content_type, folder=folder)
            row = _read_form(form)
            row.tenant_id = tenant_id
            assert form.file is not None, "the form is whole"
            await self._put(row.id, form.file.path)
        try:
            async with self._database.as_worker() as session:
                await self._check_room(session, tenant_id, row.size_bytes)
                session.add(row)
                await session.flush()
                await session.refresh(row)
        except BaseException:
            await asyncio.shield(self._drop(row.id))
            raise
        return row

    async def list_page(
        self, tenant_id: uuid.UUID, page: Page, *, purpose: str | None = None
    ) -> tuple[list[TenantFile], bool]:
        """A page of a tenant's files, and whether there are more."""
        query = select(TenantFile).where(_is_alive(tenant_id))
        if purpose is not None:
            query = query.where(TenantFile.purpose == purpose)
        async with self._database.as_tenant(tenant_id) as session:
            rows = (await session.scalars(page.of(query, TenantFile.id))).all()
        return page.cut(rows)

    async def get(self, tenant_id: uuid.UUID, file_id: uuid.UUID | None) -> TenantFile:
        """Raises NotFound."""
        async with self._database.as_tenant(tenant_id) as session:
            return await find_file(session, tenant_id, file_id)

    async def open(
        self, tenant_id: uuid.UUID, file_id: uuid.UUID | None
    ) -> tuple[TenantFile, FoundFile]:
        """A file and where its bytes are, for `stream`. Raises NotFound or Unavailable."""
        row = await self.get(tenant_id, file_id)
        return row, await self.place_of(row.id)

    async def place_of(self, file_id: uuid.UUID) -> FoundFile:
        """Where the bytes of a file are. Raises NotFound or Unavailable."""
        try:
            found = await self._store.find_document(file_id)
        except StoreUnavailable as error:
            raise _store_away() from error
        if found is None:
            raise _no_file()
        return found

    async def stream(
        self, found: FoundFile, *, begin: int = 0, end: int | None = None
    ) -> AsyncIterator[bytes]:
        """The bytes of a file from `begin` up to `end`. Raises NotFound or Unavailable."""
        try:
            async for chunk in self._store.stream_file(found, begin=begin, end=end):
                yield chunk
        except StoreUnavailable as error:
            raise _store_away() from error
        except ArtifactMissing as error:
            raise _no_file() from error

    async def keep(self, file_id: uuid.UUID, path: Path) -> None:
        """Store bytes for which a row is going to be made; once more replaces them.

        Raises Unavailable.
        """
        await self._put(file_id, path)

    async def delete(self, tenant_id: uuid.UUID, file_id: uuid.UUID | None) -> None:
        """Remove a file for good.

        Raises NotFound, Unavailable, or Conflict while a batch reads it.
        """
        async with self._database.as_worker() as session:
            row = await find_file(session, tenant_id, file_id, for_update=True)
            reader = await session.scalar(select(Batch.id).where(_reads(row)).limit(1))
            if reader is not None:
                raise Conflict(
                    f"The batch {spell_id(BATCH, reader)!r} still reads this file: cancel it first,"
                    " or wait until it has ended.",
                    param="file_id",
                )
            await self._remove(session, row)

    async def sweep(self) -> int:
        """Remove what has expired and no batch reads any more; return how many files."""
        is_over = TenantFile.expires_at <= func.now()
        unread = ~exists().where(Batch.input_file_id == TenantFile.id, Batch.ended_at.is_(None))
        async with self._database.as_worker() as session:
            expired = (await session.scalars(select(TenantFile.id).where(is_over, unread))).all()
        for file_id in expired:
            async with self._database.as_worker() as session:
                query = select(TenantFile).where(TenantFile.id == file_id)
                row = await session.scalar(query.with_for_update(skip_locked=True))
                if row is not None:
                    await self._remove(session, row)
        return len(expired)

    async def _remove(self, session: AsyncSession, row: TenantFile) -> None:
        try:
            await self._store.delete_document(row.id)
        except StoreUnavailable as error:
            raise _store_away() from error
        await session.delete(row)

    async def _put(self, file_id: uuid.UUID, path: Path) -> None:
        try:
            await self._store.put_document(file_id, path)
        except StoreUnavailable as error:
            raise _store_away() from error

    async def _drop(self, file_id: uuid.UUID) -> None:
        try:
            await self._store.delete_document(file_id)
        except StoreUnavailable as error:
            # fsck finds it.
            logger.warning("document_left_behind", extra={"reason": str(error)})

    async def _check_room(
        self, session: AsyncSession, tenant_id: uuid.UUID, needed_bytes: int
    ) -> None:
        own = await session.scalar(LOCK_TENANT, {"tenant_id": tenant_id})
        limit_bytes = self._max_bytes if own is None else own
        sums = select(func.count(), func.coalesce(func.sum(TenantFile.size_bytes), 0))
        number, used_bytes = (await session.execute(sums.where(_is_alive(tenant_id)))).one()
        if used_bytes + needed_bytes > limit_bytes:
            raise QuotaExceeded(
                "bytes of files", limit=limit_bytes, used=int(used_bytes), needed=needed_bytes
            )
        if number >= MAX_FILES:
            raise QuotaExceeded("files", limit=MAX_FILES, used=number, needed=1)

    async def _run_forever(self) -> None:
        while True:
            try:
                if num_removed := await self.sweep():
                    logger.info("files_expired", extra={"num_files": num_removed})
            except (*DATABASE_TROUBLE, Unavailable) as error:
                logger.warning("file_sweep_failed", extra={"reason": str(error)})
            await asyncio.sleep(SWEEP_S)


async def find_file(
    session: AsyncSession,
    tenant_id: uuid.UUID,
    file_id: uuid.UUID | None,
    *,
    for_update: bool = False,
) -> TenantFile:
    """A file that has not expired. Raises NotFound, also for another tenant's."""
    query = select(TenantFile).where(TenantFile.id == file_id, _is_alive(tenant_id))
    row = await session.scalar(query.with_for_update() if for_update else query)
    if row is None:
        raise _no_file()
    return row


def _is_alive(tenant_id: uuid.UUID) -> ColumnElement[bool]:
    return (TenantFile.tenant_id == tenant_id) & (TenantFile.expires_at > func.now())


def _reads(row: TenantFile) -> ColumnElement[bool]:
    return (Batch.input_file_id == row.id) & Batch.ended_at.is_(None)


async def _receive(body: AsyncIterator[bytes], *, content_type: str, folder: StagingFolder) -> Form:
    media_type, options = parse_options_header(content_type)
    if media_type != "multipart/form-data" or not options.get("boundary"):
        raise InvalidRequest(f"The body must be multipart/form-data: {EXPECTED}.")
    reader = _Reader(folder)
    try:
        with PushMultipartParser(
            str(options["boundary"]), max_segment_count=len(FIELDS) + 1
        ) as parser:
            async for chunk in body:
                reader.count(chunk)
                for event in parser.parse(chunk) if chunk else ():
                    await reader.take(event)
    except MultipartError as error:
        raise InvalidRequest(f"The body is no whole multipart/form-data: {error}.") from error
    finally:
        reader.close()
    return reader.form


class _Reader:
    """Mutable: takes the events of the parser: a part's head, its bytes, its end."""

    def __init__(self, folder: StagingFolder) -> None:
        self.form = Form()
        self._folder = folder
        self._received_bytes = 0
        self._sink: FileSink | None = None
        self._field: tuple[str, bytearray] | None = None

    def count(self, chunk: bytes) -> None:
        self._received_bytes += len(chunk)
        if self._received_bytes > MAX_FILE_BYTES + OVERHEAD_BYTES:
            raise _too_large()
        self._folder.claim(self._received_bytes)

    async def take(self, event: MultipartSegment | bytes | bytearray | None) -> None:
        if isinstance(event, MultipartSegment):
            self._begin(event)
        elif event is None:
            await self._end()
        elif self._sink is not None:
            await self._sink.write(event)
        else:
            self._extend_field(event)

    def close(self) -> None:
        if self._sink is not None:
            self._sink.close()

    def _begin(self, part: MultipartSegment) -> None:
        name = part.name or ""
        if name in self.form.fields or (name == "file" and self._has_file):
            raise InvalidRequest(f"The part {name!r} was sent twice.", param=name)
        if name == "file" and part.filename is not None:
            self.form.filename = part.filename
            self._sink = FileSink(self._folder.path / "document")
        elif name in FIELDS and part.filename is None:
            self._field = (name, bytearray())
        else:
            raise InvalidRequest(f"The part {name!r} is not known here: {EXPECTED}.", param=name)

    @property
    def _has_file(self) -> bool:
        return self.form.file is not None

    def _extend_field(self, chunk: bytes | bytearray) -> None:
        assert self._field is not None
        name, value = self._field
        value += chunk
        if len(value) > MAX_FIELD_BYTES:
            raise InvalidRequest(f"{name!r} is at most {MAX_FIELD_BYTES} bytes long.", param=name)

    async def _end(self) -> None:
        if self._sink is not None:
            self.form.file = await self._sink.finish()
        elif self._field is not None:
            name, value = self._field
            self.form.fields[name] = value.decode(errors="replace").strip()
        self._sink = self._field = None


def _read_form(form: Form) -> TenantFile:
    """The row of what has arrived, without its tenant. Raises InvalidRequest."""
    if form.file is None:
        raise InvalidRequest(f"The upload has no file: {EXPECTED}.", param="file")
    if form.file.size_bytes > MAX_FILE_BYTES:
        raise _too_large()
    purpose = form.fields.get("purpose")
    if purpose != "batch":
        raise InvalidRequest(
            "'purpose' must be 'batch': nothing else reads files.", param="purpose"
        )
    if not 0 < len(form.filename) <= MAX_FILENAME_LENGTH or not form.filename.isprintable():
        raise InvalidRequest(
            f"The file's name must be 1 to {MAX_FILENAME_LENGTH} characters that can be printed.",
            param="file",
        )
    lifetime_s = _read_lifetime(form.fields)
    return TenantFile(
        id=new_id(),
        filename=form.filename,
        purpose=purpose,
        size_bytes=form.file.size_bytes,
        expires_at=expiry(lifetime_s),
    )


def _read_lifetime(fields: dict[str, str]) -> int:
    anchor, seconds = (fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return LIFETIME_S
    if anchor != "created_at":
        raise InvalidRequest(
            "'expires_after[anchor]' must be 'created_at'.", param="expires_after[anchor]"
        )
    is_number = re.fullmatch("[0-9]{1,9}", seconds or "", re.ASCII) is not None
    if seconds is None or not is_number or not MIN_LIFETIME_S <= int(seconds) <= LIFETIME_S:
        raise InvalidRequest(
            f"'expires_after[seconds]' must be a whole number from {MIN_LIFETIME_S} to"
            f" {LIFETIME_S}.",
            param="expires_after[seconds]",
        )
    return int(seconds)


def expiry(lifetime_s: int) -> datetime.datetime:
    """When a file that is made now will be gone."""
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=lifetime_s)


def _no_file() -> NotFound:
    return NotFound("There is no such file; it may have expired.", param="file_id")


def _too_large() -> BodyTooLarge:
    return BodyTooLarge(f"The file is larger than the limit of {MAX_FILE_BYTES} bytes.")


def _store_away() -> Unavailable:
    return Unavailable("The artifact store does not answer now; try again shortly.")
