"""Bring every request that ended into the database, exactly once, however long that takes.

The journal remembers what is owed; the settler moves it into usage events, holds and rollups, in
one transaction each batch, keyed by the request's id, and tries until it succeeds. A heartbeat
keeps this gateway's holds alive; a sweeper ends those of gateways that are gone. Knows no prices:
a bill is made when a request ends, and what its client was shown is what is settled.
"""

import asyncio
import contextlib
import datetime
import logging
import socket
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Row, func, select, text, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.budgets import Spending, spend
from gateway.credits import credit_retries
from gateway.database import DATABASE_TROUBLE, Database
from gateway.errors import Unavailable
from gateway.journal import Journal, Meter, Opened, Settlement
from gateway.limits import Funding, Refund, Stream, extend, refund, want
from gateway.prices import Bill, Price, bill, ceiling
from gateway.tables import EndUser, GatewayInstance, Hold, new_id

logger = logging.getLogger(__name__)

# A transaction of a few hundredths of a second.
MAX_BATCH = 500
# From the beginning of one batch to the next: what ends meanwhile is settled together, which costs
# a fraction of settling each by itself. What ends after a pause is settled at once.
SETTLE_INTERVAL_S = 0.25
# How long a request that is refused waits until what has ended is settled.
HURRY_S = 1.0
HEARTBEAT_S = 1.0
SWEEP_S = 10.0
# A gateway that has not been heard of for so long is gone, and so are its streams.
LEASE_S = 60.0
# A hold of this gateway's own that its journal does not know by then never will be known: the two
# are one round trip apart.
ROUND_TRIP_S = 10.0
MAX_BACKOFF_S = 5.0
# The outcome of a request whose gateway's host never came back.
LOST = "lost"

# The rows of these three come as arrays, so that their texts, and with them their plans, are the
# same for any number of rows.
INSERT_EVENTS = text("""
    INSERT INTO usage_events (
        id, tenant_id, api_key_id, base_model_id, adapter_id, adapter_version_id, version_digest,
        price_version_id, endpoint, outcome, prompt_tokens, cached_tokens, completion_tokens,
        cost_nano, engine_ns, started_at, finished_at, end_user_id, attempt_digest, is_retry
    )
    SELECT * FROM unnest(
        CAST(:id AS uuid[]), CAST(:tenant_id AS uuid[]), CAST(:api_key_id AS uuid[]),
        CAST(:base_model_id AS uuid[]), CAST(:adapter_id AS uuid[]),
        CAST(:adapter_version_id AS uuid[]), CAST(:version_digest AS text[]),
        CAST(:price_version_id AS uuid[]), CAST(:endpoint AS text[]), CAST(:outcome AS text[]),
        CAST(:prompt_tokens AS bigint[]), CAST(:cached_tokens AS bigint[]),
        CAST(:completion_tokens AS bigint[]), CAST(:cost_nano AS bigint[]),
        CAST(:engine_ns AS bigint[]), CAST(:started_at AS timestamptz[]),
        CAST(:finished_at AS timestamptz[]), CAST(:end_user_id AS uuid[]),
        CAST(:attempt_digest AS bytea[]), CAST(:is_retry AS boolean[])
    ) AS ended (id)
    WHERE NOT EXISTS (SELECT FROM holds h WHERE h.id = ended.id AND h.state = 'released')
    ON CONFLICT (id) DO NOTHING
    RETURNING id
""")

ADD_TO_ROLLUPS = text("""
    INSERT INTO usage_rollups AS r (
        id, tenant_id, day, base_model_id, adapter_id, api_key_id,
        requests, prompt_tokens, cached_tokens, completion_tokens, cost_nano
    )
    SELECT * FROM unnest(
        CAST(:id AS uuid[]), CAST(:tenant_id AS uuid[]), CAST(:day AS date[]),
        CAST(:base_model_id AS uuid[]), CAST(:adapter_id AS uuid[]), CAST(:api_key_id AS uuid[]),
        CAST(:requests AS bigint[]), CAST(:prompt_tokens AS bigint[]),
        CAST(:cached_tokens AS bigint[]), CAST(:completion_tokens AS bigint[]),
        CAST(:cost_nano AS bigint[])
    )
    ON CONFLICT (tenant_id, day, base_model_id, adapter_id, api_key_id) DO UPDATE SET
        requests = r.requests + excluded.requests,
        prompt_tokens = r.prompt_tokens + excluded.prompt_tokens,
        cached_tokens = r.cached_tokens + excluded.cached_tokens,
        completion_tokens = r.completion_tokens + excluded.completion_tokens,
        cost_nano = r.cost_nano + excluded.cost_nano
""")

# One that was lost, with the database's last moments, is put back.
SETTLE_HOLDS = text("""
    INSERT INTO holds AS h (
        id, tenant_id, api_key_id, base_model_id, adapter_id, adapter_version_id,
        price_version_id, gateway_instance_id, endpoint, state, prompt_tokens,
        funded_output_tokens, amount_nano, created_at, closed_at
    )
    SELECT id, tenant_id, api_key_id, base_model_id, adapter_id, adapter_version_id,
           price_version_id, gateway_instance_id, endpoint, 'settled', prompt_tokens,
           funded_output_tokens, amount_nano, created_at, closed_at
    FROM unnest(
        CAST(:id AS uuid[]), CAST(:tenant_id AS uuid[]), CAST(:api_key_id AS uuid[]),
        CAST(:base_model_id AS uuid[]), CAST(:adapter_id AS uuid[]),
        CAST(:adapter_version_id AS uuid[]), CAST(:price_version_id AS uuid[]),
        CAST(:gateway_instance_id AS uuid[]), CAST(:endpoint AS text[]),
        CAST(:prompt_tokens AS bigint[]), CAST(:funded_output_tokens AS bigint[]),
        CAST(:amount_nano AS bigint[]), CAST(:created_at AS timestamptz[]),
        CAST(:closed_at AS timestamptz[])
    ) AS ended (
        id, tenant_id, api_key_id, base_model_id, adapter_id, adapter_version_id,
        price_version_id, gateway_instance_id, endpoint, prompt_tokens, funded_output_tokens,
        amount_nano, created_at, closed_at
    )
    ON CONFLICT (id) DO UPDATE SET state = 'settled', closed_at = excluded.closed_at
    WHERE h.state = 'open'
""")

# A sweeper may be about to end them: whoever comes second finds the other's word.
LOCK_HOLDS = text("""
    SELECT id FROM holds WHERE id = ANY (CAST(:ids AS uuid[])) ORDER BY id FOR UPDATE
""")

RELEASE_HOLDS = text("""
    UPDATE holds SET state = 'released', closed_at = now()
    WHERE id = ANY (CAST(:ids AS uuid[])) AND state = 'open'
""")

_ROLLUP_KEY = ("tenant_id", "day", "base_model_id", "adapter_id", "api_key_id")
_SUMMED = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_nano")

# Open holds that nobody will settle: of gateways whose lease has run out, and those of this one
# that its journal does not know, because it died, or lost its connection, between hold and journal.
# Those of its earlier lives need not wait: this life could not begin before that one was over.
FIND_LOST = text("""
    SELECT h.id, h.tenant_id, h.api_key_id, h.base_model_id, h.adapter_id, h.adapter_version_id,
           v.version_digest, h.endpoint, h.prompt_tokens, h.funded_output_tokens,
           h.progress_output_tokens, h.progress_cached_tokens, h.created_at, i.heartbeat_at,
           h.gateway_instance_id, p.id AS price_id, p.input_nano_per_million,
           p.cached_input_nano_per_million, p.output_nano_per_million
    FROM holds h
    JOIN gateway_instances i ON i.id = h.gateway_instance_id
    JOIN price_versions p ON p.id = h.price_version_id
    LEFT JOIN adapter_versions v ON v.id = h.adapter_version_id
    WHERE h.state = 'open' AND h.id <> ALL (CAST(:known AS uuid[]))
      AND CASE WHEN i.id = CAST(:gateway_instance_id AS uuid)
          THEN h.created_at < greatest(i.started_at, now() - CAST(:round_trip AS interval))
          ELSE CAST(:judges_others AS boolean)
               AND greatest(h.created_at, i.heartbeat_at) < now() - CAST(:lease AS interval) END
    ORDER BY h.id
    LIMIT CAST(:max_batch AS bigint)
    FOR UPDATE OF h SKIP LOCKED
""")


async def settle(
    session: AsyncSession, settlements: Sequence[Settlement], *, max_credit_nano: int = 0
) -> int:
    """Write usage events, rollups and holds; return how many events are new.

    A request that was settled before changes nothing, so this may be repeated at will; nor does one
    whose hold was given back, because others may have spent that money since.
    `max_credit_nano` is what retries may give back to a tenant in a day.
    """
    ordered = sorted(settlements, key=lambda each: each.request_id)
    billed = [each for each in ordered if each.bill is not None]
    fresh = await _insert_events(session, billed)
    new = [each for each in billed if each.request_id in fresh]
    await _add_to_rollups(session, new)
    spendings = [_spending(each) for each in new]
    comparable = {
        each.request_id: each.opened.tenant_id
        for each in new
        if each.opened.attempt_digest is not None
    }
    if max_credit_nano and comparable:
        spendings += await credit_retries(session, comparable, max_a_day_nano=max_credit_nano)
    # Before the holds: budgets, then holds, is the order in which rows are locked everywhere.
    await spend(session, spendings)
    await _settle_holds(session, billed)
    await _release_holds(session, [each.request_id for each in ordered if each.bill is None])
    return len(fresh)


async def _insert_events(session: AsyncSession, billed: Sequence[Settlement]) -> set[uuid.UUID]:
    if not billed:
        return set()
    users = await _end_users(session, billed)
    events = [_event(each, users) for each in billed]
    return set((await session.execute(INSERT_EVENTS, _arrays(events))).scalars())


def _arrays(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The columns of rows that all have the same."""
    return {name: [row[name] for row in rows] for name in rows[0]}


async def _end_users(
    session: AsyncSession, billed: Sequence[Settlement]
) -> dict[tuple[uuid.UUID, str], uuid.UUID]:
    """The rows of everybody whom these requests named, made where there is none."""
    named = {
        (each.opened.tenant_id, each.opened.end_user)
        for each in billed
        if each.opened.end_user is not None
    }
    if not named:
        return {}
    # Always in one order, so that two settlers wait for each other instead of deadlocking.
    rows = [{"id": new_id(), "tenant_id": t, "name": name} for t, name in sorted(named)]
    await session.execute(insert(EndUser).values(rows).on_conflict_do_nothing())
    found = await session.execute(
        select(EndUser.tenant_id, EndUser.name, EndUser.id).where(
            tuple_(EndUser.tenant_id, EndUser.name).in_(sorted(named))
        )
    )
    return {(row.tenant_id, row.name): row.id for row in found}


def _event(
    settlement: Settlement, users: Mapping[tuple[uuid.UUID, str], uuid.UUID]
) -> dict[str, Any]:
    opened, charged = settlement.opened, settlement.bill
    assert charged is not None
    user = opened.end_user
    return {
        "id": opened.request_id,
        "tenant_id": opened.tenant_id,
        "api_key_id": opened.api_key_id,
        "base_model_id": opened.base_model_id,
        "adapter_id": opened.adapter_id,
        "adapter_version_id": opened.adapter_version_id,
        "version_digest": opened.version_digest,
        "price_version_id": opened.price.id,
        "endpoint": opened.endpoint,
        "outcome": settlement.outcome,
        "prompt_tokens": charged.prompt_tokens,
        "cached_tokens": charged.cached_tokens,
        "completion_tokens": charged.completion_tokens,
        "cost_nano": charged.cost_nano,
        "engine_ns": charged.engine_ns,
        "started_at": opened.started_at,
        "finished_at": settlement.finished_at,
        "end_user_id": None if user is None else users[opened.tenant_id, user],
        "attempt_digest": opened.attempt_digest,
        "is_retry": opened.is_retry,
    }


def _spending(settlement: Settlement) -> Spending:
    opened, charged = settlement.opened, settlement.bill
    assert charged is not None
    return Spending(opened.tenant_id, opened.api_key_id, charged.cost_nano, settlement.finished_at)


def _refund(settlement: Settlement) -> Refund:
    """What admission charged to the buckets, less what was used."""
    opened, used = settlement.opened, settlement.bill or Bill()
    return Refund(
        tenant_id=opened.tenant_id,
        api_key_id=opened.api_key_id,
        adapter_id=opened.adapter_id,
        tokens=opened.prompt_tokens
        + opened.funded_output_tokens
        - used.prompt_tokens
        - used.completion_tokens,
        admitted_at=opened.started_at,
    )


async def _add_to_rollups(session: AsyncSession, fresh: Iterable[Settlement]) -> None:
    sums: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0] * len(_SUMMED))
    for each in fresh:
        charged = each.bill
        assert charged is not None
        amounts = (
            1,
            charged.prompt_tokens,
            charged.cached_tokens,
            charged.completion_tokens,
            charged.cost_nano,
        )
        key = _rollup_key(each)
        sums[key] = [total + amount for total, amount in zip(sums[key], amounts, strict=True)]
    if not sums:
        return
    rows = [
        {"id": new_id(), **dict(zip(_ROLLUP_KEY, key, strict=True))}
        | dict(zip(_SUMMED, totals, strict=True))
        # Always in one order, so that two settlers wait for each other instead of deadlocking.
        for key, totals in sorted(sums.items(), key=lambda item: str(item[0]))
    ]
    await session.execute(ADD_TO_ROLLUPS, _arrays(rows))


def _rollup_key(settlement: Settlement) -> tuple[Any, ...]:
    opened = settlement.opened
    day = settlement.finished_at.astimezone(datetime.UTC).date()
    return opened.tenant_id, day, opened.base_model_id, opened.adapter_id, opened.api_key_id


async def _settle_holds(session: AsyncSession, billed: Sequence[Settlement]) -> None:
    if billed:
        await session.execute(SETTLE_HOLDS, _arrays([_settled_hold(each) for each in billed]))


def _settled_hold(settlement: Settlement) -> dict[str, Any]:
    charged = settlement.bill
    assert charged is not None
    return _hold(settlement.opened) | {
        "prompt_tokens": charged.prompt_tokens,
        "funded_output_tokens": charged.completion_tokens,
        "amount_nano": charged.cost_nano,
        "closed_at": settlement.finished_at,
    }


def _open_hold(meter: Meter) -> dict[str, Any]:
    opened, funded = meter.opened, meter.funded_output_tokens
    amount_nano = ceiling(opened.price, prompt_tokens=opened.prompt_tokens, output_tokens=funded)
    return _hold(opened) | {
        "state": "open",
        "prompt_tokens": opened.prompt_tokens,
        "funded_output_tokens": funded,
        "amount_nano": amount_nano,
    }


def _hold(opened: Opened) -> dict[str, Any]:
    return {
        "id": opened.request_id,
        "tenant_id": opened.tenant_id,
        "api_key_id": opened.api_key_id,
        "base_model_id": opened.base_model_id,
        "adapter_id": opened.adapter_id,
        "adapter_version_id": opened.adapter_version_id,
        "price_version_id": opened.price.id,
        "gateway_instance_id": opened.gateway_instance_id,
        "endpoint": opened.endpoint,
        "created_at": opened.started_at,
    }


async def _release_holds(session: AsyncSession, request_ids: Sequence[uuid.UUID]) -> None:
    if request_ids:
        await session.execute(RELEASE_HOLDS, {"ids": list(request_ids)})


class Ledger:
    """Mutable: what this gateway owes the database, and the tasks that bring it there.

    The queue has no limit and drops nothing; the journal on disk is what it is made of, and its
    docstring says what keeps it short.
    """

    def __init__(
        self, database: Database, journal: Journal, *, max_retry_credit_nano: int = 0
    ) -> None:
        self._database = database
        self._max_credit_nano = max_retry_credit_nano
        self._journal = journal
        self._queue: dict[uuid.UUID, Settlement] = {}
        # Of an earlier life, or of a sibling's: their tokens may have been given back already.
        self._recovered: set[uuid.UUID] = set()
        # What the database will not take as it is; kept in the journal and tried at each start.
        self._refused: set[uuid.UUID] = set()
        self._wake = asyncio.Event()
        # Set by whoever waits for the next batch, and by that batch; there is a new one for each.
        self._hurry = asyncio.Event()
        self._batch_settled = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._tasks: list[asyncio.Task[None]] = []
        # What the last heartbeat said of each stream.
        self._told: dict[uuid.UUID, Stream] = {}
        # Since when, by the monotonic clock, no heartbeat has failed.
        self._beating_since: float | None = None

    async def start(self) -> None:
        """Register this gateway, settle what earlier lives left, and begin to settle.

        Raises what the database raises, JournalCorrupt where this instance's journal is damaged.
        """
        async with self._database.as_worker() as session:
            await _register(session, self._journal)
        await self._recover()
        await self._flush()
        self._tasks = [
            asyncio.create_task(self._settle_forever(), name="settler"),
            asyncio.create_task(_every(HEARTBEAT_S, self.beat), name="heartbeat"),
            asyncio.create_task(_every(HEARTBEAT_S, self._sync), name="journal-sync"),
            asyncio.create_task(_every(SWEEP_S, self._tend), name="sweeper"),
        ]

    async def stop(self, *, drain_timeout_s: float = 5.0) -> None:
        """Settle what has ended, for a while, then stop; the journal keeps the rest."""
        try:
            await asyncio.wait_for(self.drain(), drain_timeout_s)
        except TimeoutError:
            logger.warning("ledger_stopped_early", extra={"num_unsettled": len(self._queue)})
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    def close(self, request_id: uuid.UUID, outcome: str, *, sent: bool = True) -> Bill:
        """End a request; the bill is final and is the one that its client may be shown.

        Call it just before the last byte of a stream, or the body of another answer, is written.
        `sent=False` says that no body will be: nothing of an answer that is not streamed is billed
        then. Raises JournalFailed; nothing may be sent then.
        """
        settlement = self._journal.closed(request_id, outcome, sent=sent)
        self._enqueue([settlement])
        return settlement.bill or Bill()

    def ending(self, request_id: uuid.UUID, outcome: str) -> Settlement:
        """What `close` would have settled, for who writes that and the answer in one transaction.

        `close` it once that is done: what is settled already, it settles no second time.
        """
        return self._journal.ending(request_id, outcome)

    async def settle_ended_of(self, tenant_id: uuid.UUID) -> bool:
        """Settle now what a tenant's requests that have ended still hold; whether there was any.

        What is refused for their sake alone may be asked again then.
        """
        ended = {key for key, each in self._queue.items() if each.opened.tenant_id == tenant_id}
        if not ended:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HURRY_S):
                while not ended.isdisjoint(self._queue):
                    self._hurry.set()
                    await self._batch_settled.wait()
        return ended.isdisjoint(self._queue)

    async def drain(self) -> None:
        """Wait until the database has everything that has ended."""
        await self._is_idle.wait()

    async def beat(self) -> None:
        """Renew the lease of this gateway's holds, with their progress."""
        streams = {
            meter.opened.request_id: _stream_of(meter) for meter in self._journal.open_meters()
        }
        news = [each for key, each in streams.items() if self._told.get(key) != each]
        try:
            fundings = await self._extend(news)
        except Exception:
            self._beating_since = None
            raise
        self._told = streams
        self._take(fundings)
        if self._beating_since is None:
            self._beating_since = time.monotonic()

    async def fund(self, meter: Meter) -> None:
        """Fund a stream that has come to the end of its hold, without waiting for the heartbeat.

        Whether there was more money is told by the meter. Raises Unavailable, JournalFailed.
        """
        try:
            fundings = await self._extend([_stream_of(meter)])
        except DATABASE_TROUBLE as fault:
            raise Unavailable("The ledger does not answer. Try again shortly.") from fault
        self._take(fundings)

    async def _extend(self, streams: Sequence[Stream]) -> list[Funding]:
        fundings = await self._tell(streams)
        told = {each.request_id for each in fundings}
        untold = [each for each in streams if each.request_id not in told]
        if await self._put_back(each.request_id for each in untold):
            fundings += await self._tell(untold)
        return fundings

    async def _tell(self, streams: Sequence[Stream]) -> list[Funding]:
        async with self._database.as_worker() as session:
            return await extend(
                session, gateway_instance_id=self._journal.instance_id, streams=streams
            )

    async def _put_back(self, request_ids: Iterable[uuid.UUID]) -> int:
        """Hold money again for what runs, where the database lost its hold; return for how many.

        Admissions do not wait for the disk, so a server that crashed forgets the last of them.
        """
        meters = (self._journal.find_meter(each) for each in request_ids)
        rows = [_open_hold(meter) for meter in meters if meter is not None]
        if not rows:
            return 0
        statement = insert(Hold).values(rows).on_conflict_do_nothing().returning(Hold.id)
        async with self._database.as_worker() as session:
            num_lost = len((await session.execute(statement)).all())
        if num_lost:
            logger.warning("lost_holds_put_back", extra={"num_requests": num_lost})
        return num_lost

    async def put_back_lost(self) -> int:
        """Hold money again for every running request whose hold the database lost."""
        running = {meter.opened.request_id for meter in self._journal.open_meters()}
        async with self._database.as_worker() as session:
            query = select(Hold.id).where(Hold.id.in_(running))
            held = set(await session.scalars(query))
        return await self._put_back(running - held)

    def _take(self, fundings: Iterable[Funding]) -> None:
        for each in fundings:
            meter = self._journal.find_meter(each.request_id)
            if meter is not None:
                meter.fund(each.funded_output_tokens, is_budgeted=each.is_budgeted)

    async def sweep(self, *, judges_others: bool) -> int:
        """End open holds that nobody will settle, at their last heartbeat; return how many."""
        async with self._database.as_worker() as session:
            parameters = {
                "gateway_instance_id": self._journal.instance_id,
                "known": list(self._journal.known_request_ids()),
                "lease": datetime.timedelta(seconds=LEASE_S),
                "round_trip": datetime.timedelta(seconds=ROUND_TRIP_S),
                "judges_others": judges_others,
                "max_batch": MAX_BATCH,
            }
            rows = (await session.execute(FIND_LOST, parameters)).all()
            await settle(session, [_settlement_of_lost(row) for row in rows])
        if rows:
            logger.warning("lost_requests_swept", extra={"num_requests": len(rows)})
        return len(rows)

    async def _tend(self) -> None:
        """Take over from dead siblings on this host, then let journal and database agree."""
        await self._recover()
        await self.put_back_lost()
        # When the database was away, nobody's heartbeat is a sign of anything: wait for one whole
        # lease of our own before judging others.
        since = self._beating_since
        await self.sweep(judges_others=since is not None and time.monotonic() - since > LEASE_S)

    async def _recover(self) -> None:
        leftovers = await asyncio.to_thread(self._journal.find_leftovers)
        settlements = self._journal.take_over(leftovers)
        self._recovered.update(each.request_id for each in settlements)
        self._enqueue(settlements)

    async def _sync(self) -> None:
        await asyncio.to_thread(self._journal.sync)

    def _enqueue(self, settlements: Iterable[Settlement]) -> None:
        self._queue.update((each.request_id, each) for each in settlements)
        if self._queue:
            self._is_idle.clear()
            self._wake.set()

    async def _settle_forever(self) -> None:
        backoff_s = 0.1
        while True:
            await self._wake.wait()
            self._wake.clear()
            next_at = time.monotonic() + SETTLE_INTERVAL_S
            try:
                await self._flush()
                backoff_s = 0.1
                await self._pause(next_at - time.monotonic())
            except Exception:
                logger.warning("settlement_failed", exc_info=True)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
                self._wake.set()

    async def _pause(self, duration_s: float) -> None:
        """Let more end, unless somebody waits for what has."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(duration_s):
                await self._hurry.wait()
        self._hurry.clear()

    async def _flush(self) -> None:
        """Settle all that has ended by now."""
        batch = list(self._queue.values())
        for first in range(0, len(batch), MAX_BATCH):
            await self._settle_batch(batch[first : first + MAX_BATCH])
        if not self._queue:
            self._is_idle.set()

    async def _settle_batch(self, batch: Sequence[Settlement]) -> None:
        try:
            async with self._database.as_worker() as session:
                recovered = [
                    each.request_id for each in batch if each.request_id in self._recovered
                ]
                if recovered:
                    await session.execute(LOCK_HOLDS, {"ids": recovered})
                await settle(session, batch, max_credit_nano=self._max_credit_nano)
        except (IntegrityError, DataError):
            await self._find_refused(batch)
            return
        await self._give_back(batch)
        request_ids = [each.request_id for each in batch]
        self._journal.settled(request_ids)
        for request_id in request_ids:
            self._queue.pop(request_id, None)
        self._batch_settled.set()
        self._batch_settled = asyncio.Event()

    async def _give_back(self, batch: Sequence[Settlement]) -> None:
        """Correct the buckets in a transaction of its own: admissions must not wait for a disk."""
        try:
            await refund(
                self._database,
                [_refund(each) for each in batch if each.request_id not in self._recovered],
            )
        except DATABASE_TROUBLE as fault:
            # It drains away by itself.
            logger.warning("tokens_not_refunded", extra={"reason": str(fault)})
        self._recovered.difference_update(each.request_id for each in batch)

    async def _find_refused(self, batch: Sequence[Settlement]) -> None:
        """One row that the database refuses must not hold up the others."""
        if len(batch) > 1:
            for each in batch:
                await self._settle_batch([each])
            return
        refused = batch[0].request_id
        logger.exception("settlement_refused", extra={"request_id": str(refused)})
        self._refused.add(refused)
        self._queue.pop(refused, None)


async def _every(period_s: float, what: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await what()
        except Exception:
            logger.warning("ledger_task_failed", exc_info=True)
        await asyncio.sleep(period_s)


async def _register(session: AsyncSession, journal: Journal) -> None:
    life = {
        "host": socket.gethostname(),
        "epoch": journal.epoch,
        "started_at": func.now(),
        "heartbeat_at": func.now(),
    }
    await session.execute(
        insert(GatewayInstance)
        .values(id=journal.instance_id, **life)
        .on_conflict_do_update(index_elements=[GatewayInstance.id], set_=life)
    )


def _stream_of(meter: Meter) -> Stream:
    opened = meter.opened
    return Stream(
        request_id=opened.request_id,
        # What is not streamed owes nothing before it is sent.
        progress_output_tokens=meter.completion_tokens if opened.is_streamed else 0,
        progress_cached_tokens=meter.cached_tokens if opened.is_streamed else 0,
        wanted_output_tokens=want(
            progress=meter.completion_tokens,
            funded=meter.funded_output_tokens,
            max_output_tokens=opened.max_output_tokens,
        ),
    )


def _settlement_of_lost(row: Row[Any]) -> Settlement:
    opened = Opened(
        number=0,
        request_id=row.id,
        gateway_instance_id=row.gateway_instance_id,
        tenant_id=row.tenant_id,
        api_key_id=row.api_key_id,
        base_model_id=row.base_model_id,
        adapter_id=row.adapter_id,
        adapter_version_id=row.adapter_version_id,
        version_digest=row.version_digest,
        price=Price(
            row.price_id,
            row.input_nano_per_million,
            row.cached_input_nano_per_million,
            row.output_nano_per_million,
        ),
        endpoint=row.endpoint,
        is_streamed=row.progress_output_tokens > 0,
        prompt_tokens=row.prompt_tokens,
        max_output_tokens=row.funded_output_tokens,
        funded_output_tokens=row.funded_output_tokens,
        started_at=row.created_at,
        sequence_ids=(),
    )
    charged = bill(
        opened.price,
        prompt_tokens=row.prompt_tokens,
        cached_tokens=min(row.progress_cached_tokens, row.prompt_tokens),
        completion_tokens=row.progress_output_tokens,
    )
    finished_at = max(row.created_at, row.heartbeat_at)
    return Settlement(opened, LOST, finished_at, charged if opened.is_streamed else None)
