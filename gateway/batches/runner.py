"""The batches that one gateway works at: it looks for some, keeps its claims, and heeds their ends.

One batch of a tenant at a time, so that no tenant waits for another's; their lines share this
gateway's slots.
"""

import asyncio
import contextlib
import logging
import uuid
from types import TracebackType
from typing import Self

from gateway.batches.claims import Claim, Renewal
from gateway.batches.job import ClaimLost, Ending, Job, Workshop
from gateway.database import DATABASE_TROUBLE
from gateway.errors import Unavailable

logger = logging.getLogger(__name__)

# Lines of all batches that one gateway answers at a time: enough to keep an engine's batches full,
# few enough that they are soon done when something more urgent comes.
MAX_LINES = 64
MAX_JOBS = 64
POLL_S = 2.0
# Several to a lease; how soon a batch that is to be cancelled hears of it.
RENEWAL_S = 2.0


class BatchRunner:
    """Mutable: the jobs under way. Used as a context it looks for more."""

    def __init__(self, workshop: Workshop) -> None:
        self._shop = workshop
        self._jobs: dict[uuid.UUID, Job] = {}
        self._tasks: dict[uuid.UUID, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._shop.claims.release_earlier()
        self._loops = [
            asyncio.create_task(self._look_forever(), name="batches"),
            asyncio.create_task(self._renew_forever(), name="batch-claims"),
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Lines under way are left; the next gateway runs them."""
        tasks = [*self._loops, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self) -> None:
        """Look now: there is a batch, or one is to be cancelled."""
        self._wake.set()

    async def _look_forever(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._begin_jobs()
                await self._renew()
            except DATABASE_TROUBLE as fault:
                logger.warning("batches_not_looked_for", extra={"reason": str(fault)})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._wake.wait()

    async def _begin_jobs(self) -> None:
        while len(self._jobs) < MAX_JOBS:
            busy = {job.tenant_id for job in self._jobs.values()}
            claim = await self._shop.claims.claim(busy=busy)
            if claim is None:
                return
            self._begin(claim)

    def _begin(self, claim: Claim) -> None:
        job = Job(claim, self._shop)
        self._jobs[claim.id] = job
        self._tasks[claim.id] = asyncio.create_task(self._run(job), name="batch")

    async def _run(self, job: Job) -> None:
        facts = {"batch_id": str(job.claim.batch.id)}
        try:
            await job.run()
        except asyncio.CancelledError:
            with contextlib.suppress(*DATABASE_TROUBLE):
                await self._shop.claims.release(job.claim)
            raise
        except ClaimLost:
            logger.warning("batch_claim_lost", extra=facts)
        except (*DATABASE_TROUBLE, Unavailable) as fault:
            # It is claimed again when the lease is over, here or elsewhere.
            logger.warning("batch_put_off", extra={**facts, "reason": str(fault)})
        except Exception:
            logger.exception("batch_job_failed", extra=facts)
        finally:
            del self._jobs[job.claim.id], self._tasks[job.claim.id]
        self.wake()

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(RENEWAL_S)
            try:
                await self._renew()
            except DATABASE_TROUBLE as fault:
                logger.warning("batch_claims_not_renewed", extra={"reason": str(fault)})

    async def _renew(self) -> None:
        jobs = dict(self._jobs)
        if not jobs:
            return
        renewed = await self._shop.claims.renew(list(jobs))
        for claim_id, job in jobs.items():
            _heed(job, renewed.get(claim_id))


def _heed(job: Job, renewal: Renewal | None) -> None:
    if renewal is None:
        job.stop(None)
    elif renewal.status == "cancelling":
        job.stop(Ending("cancelled"))
    elif renewal.is_expired:
        job.stop(Ending("expired"))
