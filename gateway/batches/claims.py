"""Which gateway works at a batch, and what it writes down while it does.

A claim is a lease that its gateway renews; whoever lost it writes nothing any more. A result and
what is billed for it are one transaction: the package's docstring says why that is exactly once.
"""

import asyncio
import datetime
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import delete, func, select, text, update

from gateway.batches.lines import Fault
from gateway.database import Database
from gateway.journal import Settlement
from gateway.ledger import settle
from gateway.tables import Batch, BatchResult, TenantFile, new_id

# A gateway that has not renewed its claims for so long is gone, or cannot write anything.
LEASE = datetime.timedelta(seconds=30)
# Each holds a connection of the pool, of ten, which settling needs too.
MAX_WRITES = 4
# Rows that are fetched at once: a few hundred answers.
PAGE_ROWS = 200

# The oldest that nobody works at, of a tenant that this gateway does nothing for yet; tenants for
# whom less is done elsewhere come first.
CLAIM = text("""
    UPDATE batches SET
        claim_id = :claim_id, gateway_instance_id = :instance_id,
        lease_until = now() + CAST(:lease AS interval)
    WHERE id = (
        SELECT b.id FROM batches b
        WHERE b.ended_at IS NULL AND (b.lease_until IS NULL OR b.lease_until < now())
          AND b.tenant_id <> ALL (CAST(:busy AS uuid[]))
        ORDER BY (
            SELECT count(*) FROM batches o
            WHERE o.tenant_id = b.tenant_id AND o.ended_at IS NULL AND o.lease_until >= now()
        ), b.created_at
        LIMIT 1
        FOR UPDATE SKIP LOCKED
    )
    RETURNING id
""")

RENEW = text("""
    UPDATE batches SET lease_until = now() + CAST(:lease AS interval)
    WHERE claim_id = ANY (CAST(:claim_ids AS uuid[]))
    RETURNING claim_id, status, expires_at <= now() AS is_expired
""")

# Whoever ends the batch waits for those that write, and whoever writes then finds it ended.
STILL_OURS = text("""
    SELECT true FROM batches WHERE id = :id AND claim_id = :claim_id AND outcome IS NULL FOR SHARE
""")

INSERT_RESULT = text("""
    INSERT INTO batch_results (batch_id, number, tenant_id, request_id, is_error, line)
    VALUES (:batch_id, :number, :tenant_id, :request_id, :is_error, :line)
    ON CONFLICT DO NOTHING RETURNING number
""")


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to work at a batch; the row is as it was when the right was given."""

    id: uuid.UUID
    batch: Batch


@dataclass(frozen=True, slots=True)
class Renewal:
    """How a batch stands that is still this gateway's."""

    status: str
    is_expired: bool


@dataclass(frozen=True, slots=True)
class Result:
    """What came of the line of that number."""

    number: int
    request_id: uuid.UUID
    is_error: bool
    line: bytes


@dataclass(frozen=True, slots=True)
class Product:
    """A file that a batch leaves behind, whose bytes are stored already."""

    id: uuid.UUID
    filename: str
    size_bytes: int
    num_lines: int
    expires_at: datetime.datetime


class Claims:
    """What a gateway says of the batches it works at. Raises what the database raises."""

    def __init__(self, database: Database, *, instance_id: uuid.UUID) -> None:
        self._database = database
        self._instance_id = instance_id
        self._writing = asyncio.Semaphore(MAX_WRITES)

    async def release_earlier(self) -> None:
        """Let go of what this gateway's earlier lives worked at: they are over."""
        ours = Batch.gateway_instance_id == self._instance_id
        async with self._database.as_worker() as session:
            await session.execute(update(Batch).where(ours).values(_NOBODYS))

    async def claim(self, *, busy: Iterable[uuid.UUID]) -> Claim | None:
        """A batch to work at, of none of the busy tenants; None where there is none."""
        claim_id = new_id()
        asked = {
            "claim_id": claim_id,
            "instance_id": self._instance_id,
            "lease": LEASE,
            "busy": list(busy),
        }
        async with self._database.as_worker() as session:
            batch_id = await session.scalar(CLAIM, asked)
            if batch_id is None:
                return None
            return Claim(claim_id, await session.get_one(Batch, batch_id))

    async def renew(self, claim_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, Renewal]:
        """Go on; claims that are lost are missing in the answer."""
        async with self._database.as_worker() as session:
            rows = await session.execute(RENEW, {"claim_ids": claim_ids, "lease": LEASE})
            return {row.claim_id: Renewal(row.status, row.is_expired) for row in rows}

    async def release(self, claim: Claim) -> None:
        """Let somebody else have it, at once."""
        async with self._database.as_worker() as session:
            await session.execute(update(Batch).where(_is_held(claim)).values(_NOBODYS))

    async def begin(self, claim: Claim, *, num_requests: int) -> bool:
        """The input is sound: its lines may run. Whether it is still ours."""
        async with self._database.as_worker() as session:
            batch = await session.scalar(select(Batch).where(_is_held(claim)).with_for_update())
            if batch is None:
                return False
            batch.num_requests = num_requests
            if batch.status == "validating":
                batch.status, batch.in_progress_at = "in_progress", func.now()
        return True

    async def record(
        self, claim: Claim, result: Result, *, settlement: Settlement | None = None
    ) -> bool:
        """Write a line's result and what is owed for it; whether it is the line's one result.

        Nothing is written where it is not, nor where the batch is no longer ours. Once more for
        the same request changes nothing.
        """
        batch = claim.batch
        row = {
            "batch_id": batch.id,
            "number": result.number,
            "tenant_id": batch.tenant_id,
            "request_id": result.request_id,
            "is_error": result.is_error,
            "line": result.line,
        }
        async with self._writing, self._database.as_worker() as session:
            if not await session.scalar(STILL_OURS, {"id": batch.id, "claim_id": claim.id}):
                return False
            if await session.scalar(INSERT_RESULT, row) is None:
                kept = await session.get_one(BatchResult, (batch.id, result.number))
                return kept.request_id == result.request_id
            if settlement is not None:
                await settle(session, [settlement])
        return True

    async def numbers(self, batch: Batch) -> set[int]:
        """The lines that have a result."""
        async with self._database.as_worker() as session:
            query = select(BatchResult.number).where(BatchResult.batch_id == batch.id)
            return set(await session.scalars(query))

    async def results(self, batch: Batch) -> AsyncIterator[BatchResult]:
        """All results, in the order of their lines."""
        last = 0
        while True:
            query = (
                select(BatchResult)
                .where(BatchResult.batch_id == batch.id, BatchResult.number > last)
                .order_by(BatchResult.number)
                .limit(PAGE_ROWS)
            )
            async with self._database.as_worker() as session:
                rows = (await session.scalars(query)).all()
            for row in rows:
                yield row
            if len(rows) < PAGE_ROWS:
                return
            last = rows[-1].number

    async def close(self, claim: Claim, *, outcome: str, faults: Sequence[Fault]) -> bool:
        """No more results from here on; they are put together next. Whether it is still ours."""
        async with self._database.as_worker() as session:
            batch = await session.scalar(select(Batch).where(_is_held(claim)).with_for_update())
            if batch is None:
                return False
            # Who asked for an end in the last moment gets that one.
            batch.outcome = "cancelled" if batch.status == "cancelling" else outcome
            batch.errors = [msgspec.to_builtins(fault) for fault in faults]
            batch.output_file_id, batch.error_file_id = new_id(), new_id()
            batch.finalizing_at = func.now()
            if batch.status != "cancelling":
                batch.status = "finalizing"
            await session.flush()
            await session.refresh(batch)
            _take_over(claim.batch, batch)
        return True

    async def end(self, claim: Claim, *, output: Product | None, errors: Product | None) -> bool:
        """The batch is over, and what came of it is in its files. Whether it was still ours."""
        async with self._database.as_worker() as session:
            batch = await session.scalar(select(Batch).where(_is_held(claim)).with_for_update())
            if batch is None:
                return False
            assert batch.outcome is not None, "it was closed first"
            batch.status, batch.ended_at = batch.outcome, func.now()
            batch.output_file_id = None if output is None else output.id
            batch.error_file_id = None if errors is None else errors.id
            batch.num_completed = 0 if output is None else output.num_lines
            batch.num_failed = 0 if errors is None else errors.num_lines
            for name, value in _NOBODYS.items():
                setattr(batch, name, value)
            for product in filter(None, (output, errors)):
                session.add(_file_of(batch, product))
            await session.flush()
            await session.execute(delete(BatchResult).where(BatchResult.batch_id == batch.id))
        return True


_NOBODYS: Mapping[str, None] = dict.fromkeys(("claim_id", "gateway_instance_id", "lease_until"))


def _is_held(claim: Claim) -> Any:
    return (Batch.id == claim.batch.id) & (Batch.claim_id == claim.id)


def _take_over(known: Batch, row: Batch) -> None:
    """What closing a batch has decided, for who goes on with it."""
    for name in ("outcome", "status", "output_file_id", "error_file_id", "num_requests"):
        setattr(known, name, getattr(row, name))


def _file_of(batch: Batch, product: Product) -> TenantFile:
    return TenantFile(
        id=product.id,
        tenant_id=batch.tenant_id,
        filename=product.filename,
        purpose="batch_output",
        size_bytes=product.size_bytes,
        expires_at=product.expires_at,
    )
