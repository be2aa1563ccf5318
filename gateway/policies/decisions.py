"""How often each rule decided what, by tenant and day: counted in memory, written once a minute.

What was refused is audited too, one entry a tenant and minute with the counts by rule: an entry for
each refusal would let a client write the log full. A gateway that dies takes at most the last
minute's counts with it. Nothing of any text is kept, nor whose request it was.
"""

import asyncio
import datetime
import logging
import uuid
from collections import Counter, defaultdict
from types import TracebackType
from typing import Any, Literal

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from gateway import audit
from gateway.background import Background
from gateway.database import DATABASE_TROUBLE, Database

logger = logging.getLogger(__name__)

FLUSH_S = 60.0

# A moderation that does not answer fails open or closed, as its policy says.
Verdict = Literal["passed", "refused", "failed_open", "failed_closed"]

ADD = text("""
    INSERT INTO policy_decisions AS d (tenant_id, day, rule, verdict, num_decisions)
    VALUES (:tenant_id, CAST(now() AT TIME ZONE 'UTC' AS date), :rule, :verdict, :num_decisions)
    ON CONFLICT (tenant_id, day, rule, verdict)
    DO UPDATE SET num_decisions = d.num_decisions + excluded.num_decisions
""")


class Decisions(Background):
    """Mutable: what was decided since it was written last. Writes by itself while entered."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # Tenant -> (rule, verdict) -> how often
        self._counts: defaultdict[uuid.UUID, Counter[tuple[str, Verdict]]] = defaultdict(Counter)
        self._since = datetime.datetime.now(datetime.UTC)
        # Held while writing, so that what is being written is not interrupted and written again.
        self._writing = asyncio.Lock()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Not in the middle of writing.
        async with self._writing:
            await super().__aexit__(kind, error, trace)
        await self._try_to_flush()

    def count(self, tenant_id: uuid.UUID, rule: str, verdict: Verdict) -> None:
        self._counts[tenant_id][rule, verdict] += 1

    async def flush(self) -> None:
        """Write what was counted. What cannot be written is kept for the next time."""
        async with self._writing:
            counts, self._counts = self._counts, defaultdict(Counter)
            since, self._since = self._since, datetime.datetime.now(datetime.UTC)
            try:
                for tenant_id in list(counts):
                    async with self._database.as_worker() as session:
                        await _write(session, tenant_id, counts[tenant_id], since=since)
                    del counts[tenant_id]
            finally:
                for tenant_id, rest in counts.items():
                    self._counts[tenant_id].update(rest)

    async def _run_forever(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            await self._try_to_flush()

    async def _try_to_flush(self) -> None:
        try:
            await self.flush()
        except DATABASE_TROUBLE:
            logger.warning("policy_decisions_not_written", exc_info=True)


async def _write(
    session: AsyncSession,
    tenant_id: uuid.UUID,
    counted: Counter[tuple[str, Verdict]],
    *,
    since: datetime.datetime,
) -> None:
    # In one order everywhere, so that two gateways never wait for each other.
    rows: list[dict[str, Any]] = [
        {"rule": rule, "verdict": verdict, "num_decisions": number}
        for (rule, verdict), number in sorted(counted.items())
    ]
    await session.execute(ADD, [{"tenant_id": tenant_id, **row} for row in rows])
    told = [row for row in rows if row["verdict"] != "passed"]
    if told:
        await audit.record(
            session,
            tenant_id=tenant_id,
            actor_key_id=None,
            action="policy.decisions",
            subject="policy",
            details={"since": since, "decisions": told},
        )
