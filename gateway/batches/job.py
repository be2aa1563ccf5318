"""One batch, from the first line of its input to the files that it leaves behind.

Whatever of it was done before is found and not done again. Knows which errors are worth waiting
for; how a line is answered is told to it.
"""

import asyncio
import contextlib
import logging
import random
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from gateway.auth import Principal
from gateway.batches.claims import Claim, Claims, Product, Result
from gateway.batches.lines import (
    Fault,
    InputLine,
    Judgement,
    read_line,
    read_lines,
    spell_answer,
    spell_unasked,
)
from gateway.batches.slots import Slots
from gateway.database import DATABASE_TROUBLE, is_away
from gateway.errors import (
    BudgetSpent,
    GatewayError,
    InvalidKey,
    JournalFailed,
    LimitReached,
    NotAllowed,
    NotFound,
    Unavailable,
)
from gateway.files import LIFETIME_S, Files, expiry
from gateway.journal import Settlement
from gateway.prices import Bill
from gateway.staging import FileSink, Staging
from gateway.tables import new_id

logger = logging.getLogger(__name__)

# Lines of one batch that are answered, or wait for another try, at a time.
MAX_LINES_UNDER_WAY = 32
# How long a line waits that was refused for a while, at first and at most.
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
FINDINGS = {
    "expired": ("batch_expired", "The batch expired before this request was run."),
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was run."),
    "failed": ("batch_failed", "The batch failed before this request was run."),
}


class Work(Protocol):
    """An answer that is whole, and not closed yet: a generation or an embedding."""

    request_id: uuid.UUID

    def settlement(self) -> Settlement: ...

    def finish(self) -> Bill: ...

    def leave(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Answered:
    """The body of an answer, and what is owed for it."""

    body: bytes
    work: Work
    # Fields that were not known, where the operator wants them told of instead of refused.
    ignored_fields: Sequence[str] = ()


# What a route makes of a body, for a key; raises what the route would answer.
Answer = Callable[[Principal, str, bytes], Awaitable[Answered]]
FindPrincipal = Callable[[uuid.UUID], Awaitable[Principal]]


@dataclass(frozen=True, slots=True)
class Workshop:
    """What all jobs of a gateway work with."""

    claims: Claims
    files: Files
    staging: Staging
    slots: Slots
    find_principal: FindPrincipal
    answer: Answer
    # As the route would spell it.
    spell_error: Callable[[GatewayError], msgspec.Struct]


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a batch takes no more results."""

    outcome: str
    faults: tuple[Fault, ...] = ()


class ClaimLost(Exception):
    """Another gateway works at this batch, or nobody may any more."""


class Job:
    """Mutable: how far one batch has come, here."""

    def __init__(self, claim: Claim, workshop: Workshop) -> None:
        self.claim = claim
        self._batch = claim.batch
        self._shop = workshop
        self._is_stopped = asyncio.Event()
        # Filled by whoever stops it; None where the batch is not ours any more.
        self._ending: Ending | None = None

    @property
    def tenant_id(self) -> uuid.UUID:
        return self._batch.tenant_id

    def stop(self, ending: Ending | None) -> None:
        """Run no more lines; None says that the claim is lost. The first to say so is heard."""
        if not self._is_stopped.is_set():
            self._ending = ending
            self._is_stopped.set()

    async def run(self) -> None:
        """Work at the batch until it has ended. Raises ClaimLost, and what cannot be helped now."""
        if self._batch.outcome is None:
            ending = await self._work()
            self._check(
                await self._shop.claims.close(
                    self.claim, outcome=ending.outcome, faults=ending.faults
                )
            )
        await self._put_together()
        logger.info(
            "batch_ended",
            extra={"batch_id": str(self._batch.id), "outcome": self._batch.outcome},
        )

    def _check(self, is_ours: bool) -> None:
        if not is_ours:
            raise ClaimLost

    async def _work(self) -> Ending:
        """Do what there is to do, unless told to stop."""
        if self._batch.status == "cancelling":
            return Ending("cancelled")
        working = asyncio.create_task(self._judge_and_answer())
        stopped = asyncio.create_task(self._is_stopped.wait())
        try:
            await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            if not working.done():
                working.cancel()
            await asyncio.wait({working, stopped})
        if self._is_stopped.is_set():
            if not working.cancelled() and (fault := working.exception()) is not None:
                logger.warning("batch_stopped_in_trouble", extra={"reason": str(fault)})
            if self._ending is None:
                raise ClaimLost
            return self._ending
        return working.result()

    async def _judge_and_answer(self) -> Ending:
        try:
            if self._batch.in_progress_at is None:
                judgement = await self._judge()
                if judgement.faults:
                    return Ending("failed", tuple(judgement.faults))
                num_requests = judgement.num_lines
                self._check(await self._shop.claims.begin(self.claim, num_requests=num_requests))
            await self._answer_all()
        except NotFound:
            lost = Fault("input_file_lost", "The input file is not there any more.")
            return Ending("failed", (lost,))
        return Ending("completed")

    async def _read(self, begin: int, end: int) -> bytes:
        found = await self._shop.files.place_of(self._batch.input_file_id)
        stream = self._shop.files.stream(found, begin=begin, end=end)
        return b"".join([chunk async for chunk in stream])

    async def _size_bytes(self) -> int:
        return (await self._shop.files.place_of(self._batch.input_file_id)).size_bytes

    async def _judge(self) -> Judgement:
        judgement = Judgement(self._batch.endpoint)
        async for number, raw in read_lines(self._read, await self._size_bytes()):
            judgement.add(number, raw)
            if judgement.is_over:
                break
        judgement.finish()
        return judgement

    async def _answer_all(self) -> None:
        done = await self._shop.claims.numbers(self._batch)
        under_way = asyncio.Semaphore(MAX_LINES_UNDER_WAY)
        try:
            async with asyncio.TaskGroup() as tasks:
                async for number, raw in read_lines(self._read, await self._size_bytes()):
                    if number not in done:
                        await under_way.acquire()
                        tasks.create_task(self._answer_one(number, read_line(raw), under_way))
        except BaseExceptionGroup as group:
            # What went wrong first stands for the rest.
            raise group.exceptions[0] from None

    async def _answer_one(self, number: int, line: InputLine, under_way: asyncio.Semaphore) -> None:
        """Try until the line has its result."""
        backoff_s = FIRST_BACKOFF_S
        try:
            while True:
                async with self._shop.slots.place(self.tenant_id):
                    wait_s = await self._try(number, line)
                if wait_s is None:
                    return
                # Not all at once: who was refused together would be refused together again.
                await asyncio.sleep(max(wait_s, backoff_s) * random.uniform(1.0, 1.5))  # noqa: S311 - no secret
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
        finally:
            under_way.release()

    async def _try(self, number: int, line: InputLine) -> float | None:
        """None where the line has its result; else how many seconds to wait at least."""
        principal = await self._principal()
        if principal is None:
            return 0.0
        try:
            answered = await self._shop.answer(principal, self._batch.endpoint, bytes(line.body))
        except GatewayError as error:
            if may_pass(error):
                return retry_after_s(error)
            await self._record_error(number, line, error)
            return None
        except Exception as error:
            if is_away(error):
                logger.warning("batch_line_put_off", extra={"reason": str(error)})
                return 0.0
            logger.exception("batch_line_failed", extra={"batch_id": str(self._batch.id)})
            ours = GatewayError("Something went wrong on our side.")
            await self._record_error(number, line, ours)
            return None
        await self._deliver(number, line, answered)
        return None

    async def _principal(self) -> Principal | None:
        """Whose request it is; None where that cannot be known now, or nobody's any more."""
        try:
            return await self._shop.find_principal(self._batch.api_key_id)
        except (InvalidKey, NotAllowed) as error:
            self.stop(Ending("failed", (Fault.of(error),)))
        except Unavailable:
            logger.warning("batch_key_unknown", extra={"batch_id": str(self._batch.id)})
        return None

    async def _record_error(self, number: int, line: InputLine, error: GatewayError) -> None:
        request_id = new_id()
        body = msgspec.json.encode(self._shop.spell_error(error))
        spelled = spell_answer(line, request_id, status=error.status, body=body)
        result = Result(number, request_id, is_error=True, line=spelled)
        await self._persist(lambda: self._shop.claims.record(self.claim, result))

    async def _deliver(self, number: int, line: InputLine, answered: Answered) -> None:
        """Write an answer down with what is owed for it, and let it go where that cannot be."""
        work = answered.work
        spelled = spell_answer(
            line,
            work.request_id,
            status=200,
            body=answered.body,
            ignored_fields=answered.ignored_fields,
        )
        result = Result(number, work.request_id, is_error=False, line=spelled)
        settlement = work.settlement()

        async def write() -> bool:
            is_ours = await self._shop.claims.record(self.claim, result, settlement=settlement)
            if is_ours:
                # The books have it already; a journal that cannot be written ends this gateway.
                with contextlib.suppress(JournalFailed):
                    work.finish()
            return is_ours

        try:
            await self._persist(write)
        finally:
            # Does nothing where it is finished.
            work.leave()

    async def _persist(self, write: Callable[[], Awaitable[bool]]) -> None:
        """Try to write until the database answers. What is being written is never cut off."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            writing = asyncio.ensure_future(write())
            try:
                is_ours = await asyncio.shield(writing)
            except asyncio.CancelledError:
                await asyncio.wait({writing})
                if not writing.cancelled() and (fault := writing.exception()) is not None:
                    logger.warning("batch_result_not_written", extra={"reason": str(fault)})
                raise
            except DATABASE_TROUBLE as trouble:
                logger.warning("batch_result_not_written", extra={"reason": str(trouble)})
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
                continue
            if not is_ours:
                self.stop(None)
            return

    async def _put_together(self) -> None:
        """Make the files of all results, and end the batch."""
        with self._shop.staging.folder(self.tenant_id) as folder:
            output = _Pile(FileSink(folder.path / "output"))
            errors = _Pile(FileSink(folder.path / "error"))
            try:
                await self._pile_up(output, errors)
                assert self._batch.output_file_id is not None, "the batch is closed"
                assert self._batch.error_file_id is not None, "the batch is closed"
                products = [
                    await self._product(output, self._batch.output_file_id, "output"),
                    await self._product(errors, self._batch.error_file_id, "error"),
                ]
            finally:
                output.sink.close()
                errors.sink.close()
        self._check(await self._shop.claims.end(self.claim, output=products[0], errors=products[1]))

    async def _pile_up(self, output: "_Pile", errors: "_Pile") -> None:
        done = set()
        async for result in self._shop.claims.results(self._batch):
            done.add(result.number)
            await (errors if result.is_error else output).add(result.line)
        if len(done) < self._batch.num_requests:
            with contextlib.suppress(NotFound):
                await self._add_unasked(errors, done)

    async def _add_unasked(self, errors: "_Pile", done: set[int]) -> None:
        assert self._batch.outcome is not None, "the batch is closed"
        code, message = FINDINGS[self._batch.outcome]
        async for number, raw in read_lines(self._read, await self._size_bytes()):
            if number not in done:
                await errors.add(spell_unasked(read_line(raw), code=code, message=message))

    async def _product(self, pile: "_Pile", file_id: uuid.UUID, kind: str) -> Product | None:
        """A file in the store; None where there is nothing to put into it."""
        staged = await pile.sink.finish()
        if not pile.num_lines:
            return None
        await self._shop.files.keep(file_id, staged.path)
        return Product(
            id=file_id,
            filename=f"batch_{self._batch.id.hex}_{kind}.jsonl",
            size_bytes=staged.size_bytes,
            num_lines=pile.num_lines,
            expires_at=expiry(self._batch.output_expires_after_s or LIFETIME_S),
        )


@dataclass(slots=True)
class _Pile:
    """Mutable: lines on their way into a file."""

    sink: FileSink
    num_lines: int = 0

    async def add(self, line: bytes) -> None:
        self.num_lines += 1
        await self.sink.write(line)


def may_pass(error: GatewayError) -> bool:
    """Whether the same request may be answered later: it is not the request's own fault."""
    if isinstance(error, BudgetSpent):
        return False
    if isinstance(error, LimitReached):
        return error.headers.get("x-should-retry") != "false"
    return isinstance(error, Unavailable)


def retry_after_s(error: GatewayError) -> float:
    """What the error says of when to come again."""
    return min(float(error.headers.get("retry-after", "0")), MAX_BACKOFF_S)
