"""Which adapters operators keep near, and where adapters are: on what engine, in which tier.

A pin is a row, and every engine of its base model is told of it: when an operator makes it, when
the engine comes back without a memory of it, and now and then for whatever was lost on the way.
Warming is asked for and done, or not. Knows digests, engines and rows. How an engine makes room,
and what a version may be called for, others know.
"""

import asyncio
import contextlib
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from sqlalchemy import delete, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from engine.client import EngineLink
from engine.errors import LinkError
from engine.protocol import AdapterPlace, EngineStatus, ForgetReport, Tier
from gateway import audit
from gateway.background import Background
from gateway.database import DATABASE_TROUBLE, Database
from gateway.errors import Conflict, NotFound, Unavailable
from gateway.routing import Replica, Router
from gateway.tables import SLUG_PATTERN, AdapterPin

logger = logging.getLogger(__name__)

# A pin that did not reach an engine, or was taken back behind its back, is put right after this.
LOOK_INTERVAL_S = 30.0

FIND_VERSION = text("""
    SELECT v.id AS version_id, v.tenant_id, v.base_model_id, v.state, v.weights_digest,
           CASE WHEN v.base_revision = b.revision THEN v.certificate ->> 'fingerprint' END
               AS fingerprint,
           a.public_name || '@' || v.number AS model
    FROM tenants t
    JOIN adapters a ON a.tenant_id = t.id AND a.deleted_at IS NULL
    JOIN adapter_versions v ON v.adapter_id = a.id AND v.deleted_at IS NULL
    JOIN base_models b ON b.id = v.base_model_id
    LEFT JOIN adapter_aliases l ON l.adapter_id = a.id AND l.alias = :alias
    WHERE t.slug = :tenant AND a.slug = :adapter AND (v.number = :number OR v.id = l.version_id)
""")

# What the engines of a base model have to keep; two versions may have the same weights.
WANTED_PINS = text("""
    SELECT v.weights_digest, max(
        CASE WHEN v.base_revision = b.revision THEN v.certificate ->> 'fingerprint' END
    ) AS fingerprint
    FROM adapter_pins p
    JOIN adapter_versions v ON v.id = p.version_id AND v.deleted_at IS NULL
    JOIN adapters a ON a.id = v.adapter_id AND a.deleted_at IS NULL
    JOIN base_models b ON b.id = v.base_model_id
    WHERE v.base_model_id = :base_model_id
    GROUP BY v.weights_digest
""")

VERSIONS_OF_ADAPTER = text("""
    SELECT v.id AS version_id, v.base_model_id, v.weights_digest
    FROM adapter_versions v
    JOIN adapters a ON a.id = v.adapter_id
    JOIN tenants t ON t.id = a.tenant_id
    WHERE t.slug = :tenant AND a.slug = :adapter
          AND (CAST(:number AS integer) IS NULL OR v.number = :number)
""")

# Others that may be called, or come back, with the same weights.
STILL_SERVED = text("""
    SELECT EXISTS (
        SELECT FROM adapter_versions v
        JOIN adapters a ON a.id = v.adapter_id AND a.deleted_at IS NULL
        WHERE v.weights_digest = :digest AND v.base_model_id = :base_model_id
              AND v.state = 'ready' AND v.deleted_at IS NULL
    )
""")

NAMES_OF_WEIGHTS = text("""
    SELECT v.weights_digest, array_agg(a.public_name || '@' || v.number ORDER BY v.id) AS models
    FROM adapter_versions v
    JOIN adapters a ON a.id = v.adapter_id
    WHERE v.weights_digest = ANY(:digests)
    GROUP BY v.weights_digest
""")


@dataclass(frozen=True, slots=True)
class Version:
    """What an operator named."""

    version_id: uuid.UUID
    tenant_id: uuid.UUID
    base_model_id: uuid.UUID
    state: str
    weights_digest: str
    # Of its probe; None where that told none, or was of another revision of the base model.
    fingerprint: str | None
    # e.g. "acme-sql@3"
    model: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What one engine said."""

    address: str
    # None where it refused, or did not answer.
    place: AdapterPlace | None
    problem: str | None = None
    # Whether asking again can help.
    is_retryable: bool = False


@dataclass(frozen=True, slots=True)
class Residence:
    """Where a version is now, engine by engine."""

    version: Version
    answers: list[Answer]


@dataclass(frozen=True, slots=True)
class EngineState:
    """How one engine is doing."""

    replica: Replica
    is_draining: bool
    # None where it does not answer.
    status: EngineStatus | None
    problem: str | None
    # weights digest -> "acme-sql@3", of all that the status names.
    models: dict[str, list[str]]


class Residency(Background):
    """Mutable: the task that keeps engines at what the pins say, while used as a context."""

    def __init__(
        self, database: Database, router: Router, *, look_interval_s: float = LOOK_INTERVAL_S
    ) -> None:
        self._database = database
        self._router = router
        self._look_interval_s = look_interval_s
        self._has_news = asyncio.Event()

    def look(self) -> None:
        """An engine may have lost its memory: see to it soon."""
        self._has_news.set()

    # What operators ask.

    async def engines(self) -> list[EngineState]:
        """How every engine is doing, in the order in which they came."""
        replicas = self._router.replicas
        draining = [self._router.is_draining(replica.link) for replica in replicas]
        found = await asyncio.gather(*(_status(replica.link) for replica in replicas))
        statuses = [status for status in found if isinstance(status, EngineStatus)]
        models = await self._models(
            {digest for status in statuses for digest in _digests_of(status)}
        )
        return [
            EngineState(replica, is_draining, status, None, models)
            if isinstance(status, EngineStatus)
            else EngineState(replica, is_draining, None, status, {})
            for replica, is_draining, status in zip(replicas, draining, found, strict=True)
        ]

    async def warm(self, tenant: str, adapter: str, version: str, *, to: Tier) -> Residence:
        """Bring a version near on every engine, and return when it is there.

        Raises NotFound, Conflict, or Unavailable where it came near on none.
        """
        async with self._database.as_worker() as session:
            found = await _find(session, tenant, adapter, version)
        answers = await self._ask(
            found.base_model_id,
            lambda link: link.warm(found.weights_digest, to=to, fingerprint=found.fingerprint),
        )
        _check_any(found, answers)
        return Residence(found, answers)

    async def pin(
        self, tenant: str, adapter: str, version: str, *, actor_key_id: uuid.UUID
    ) -> Residence:
        """Keep a version in a slot of every engine, from now on and after their restarts.

        An engine that cannot be reached now is told later. Raises NotFound, or Conflict where the
        version cannot be pinned: nothing is kept then.
        """
        async with self._database.as_worker() as session:
            found = await _find(session, tenant, adapter, version)
            is_new = await _keep(session, found, actor_key_id=actor_key_id)
        answers = await self._ask(
            found.base_model_id,
            lambda link: link.pin(found.weights_digest, fingerprint=found.fingerprint),
        )
        refused = [a for a in answers if a.problem is not None and not a.is_retryable]
        if refused and len(refused) == len(answers):
            if is_new:
                await self._unpin(found, actor_key_id=actor_key_id)
            raise Conflict(f"{found.model} cannot be pinned: {refused[0].problem}")
        return Residence(found, answers)

    async def unpin(
        self, tenant: str, adapter: str, version: str, *, actor_key_id: uuid.UUID
    ) -> Residence:
        """Let a version go when others need its place. Once more changes nothing.

        Raises NotFound or Conflict.
        """
        async with self._database.as_worker() as session:
            found = await _find(session, tenant, adapter, version)
        return Residence(found, await self._unpin(found, actor_key_id=actor_key_id))

    async def forget_adapter(
        self, tenant: str, adapter: str, *, number: int | None = None
    ) -> list[ForgetReport]:
        """Let engines unload what no adapter is called for any more, and drop its pins.

        For an adapter, or one version of it, that was just deleted. Weights that others are served
        with stay where they are; an engine that does not answer forgets by itself, when it needs
        the room.
        """
        async with self._database.as_worker() as session:
            which = {"tenant": tenant, "adapter": adapter, "number": number}
            rows = (await session.execute(VERSIONS_OF_ADAPTER, which)).all()
            await session.execute(
                delete(AdapterPin).where(AdapterPin.version_id.in_([r.version_id for r in rows]))
            )
            gone = {
                (row.base_model_id, row.weights_digest)
                for row in rows
                if not await _is_served(session, row.base_model_id, row.weights_digest)
            }
        self.look()
        found = [
            await _tried(replica.link.forget(digest))
            for replica in self._router.replicas
            for base_model_id, digest in sorted(gone, key=str)
            if replica.base_model_id == base_model_id
        ]
        return [report for report in found if isinstance(report, ForgetReport)]

    async def _unpin(self, version: Version, *, actor_key_id: uuid.UUID) -> list[Answer]:
        async with self._database.as_worker() as session:
            await _let_go(session, version, actor_key_id=actor_key_id)
            wanted = await _wanted(session, version.base_model_id)
        if version.weights_digest in wanted:
            # Another version that is pinned has the same weights.
            return []
        return await self._ask(
            version.base_model_id, lambda link: link.unpin(version.weights_digest)
        )

    async def _ask(
        self, base_model_id: uuid.UUID, question: Callable[[EngineLink], Awaitable[AdapterPlace]]
    ) -> list[Answer]:
        """Every engine of the base model, all at once."""
        links = [r.link for r in self._router.replicas if r.base_model_id == base_model_id]
        found = await asyncio.gather(*(_tried(question(link)) for link in links))
        return [_answer(link, said) for link, said in zip(links, found, strict=True)]

    async def _models(self, digests: Iterable[str]) -> dict[str, list[str]]:
        async with self._database.as_worker() as session:
            rows = await session.execute(NAMES_OF_WEIGHTS, {"digests": sorted(digests)})
            return {row.weights_digest: row.models for row in rows}

    # Keeping engines at what the pins say.

    async def _run_forever(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._look_interval_s):
                    await self._has_news.wait()
            self._has_news.clear()
            await asyncio.gather(*(self._put_right(r) for r in self._router.replicas))

    async def _put_right(self, replica: Replica) -> None:
        try:
            # In this order: whoever pins writes the row first, and then tells the engine.
            pinned = set((await replica.link.status()).pinned_adapters)
            async with self._database.as_worker() as session:
                wanted = await _wanted(session, replica.base_model_id)
            for digest in pinned - wanted.keys():
                await replica.link.unpin(digest)
            missing = [
                replica.link.pin(digest, fingerprint=fingerprint)
                for digest, fingerprint in wanted.items()
                if digest not in pinned
            ]
            for said in await asyncio.gather(*(_tried(pin) for pin in missing)):
                if isinstance(said, LinkError):
                    logger.warning("pin_refused", extra={"reason": str(said)})
        except (LinkError, *DATABASE_TROUBLE) as error:
            logger.info("pins_not_checked", extra={"reason": str(error)})


async def _tried(call: Awaitable[AdapterPlace | ForgetReport]) -> object:
    try:
        return await call
    except LinkError as error:
        return error


async def _status(link: EngineLink) -> EngineStatus | str:
    try:
        return await link.status()
    except LinkError as error:
        return str(error)


def _answer(link: EngineLink, said: object) -> Answer:
    if isinstance(said, LinkError):
        return Answer(link.address, None, str(said), is_retryable=said.is_retryable)
    assert isinstance(said, AdapterPlace)
    return Answer(link.address, said)


def _digests_of(status: EngineStatus) -> list[str]:
    return [
        *status.resident_adapters,
        *status.hosted_adapters,
        *status.pinned_adapters,
        *status.quarantined_adapters,
    ]


def _check_any(version: Version, answers: list[Answer]) -> None:
    if any(answer.place is not None for answer in answers):
        return
    if not answers:
        raise Unavailable(f"No engine serves the base model of {version.model} now.")
    if any(answer.is_retryable for answer in answers):
        raise Unavailable(f"{version.model} did not come: {answers[0].problem}")
    raise Conflict(f"{version.model} cannot be loaded: {answers[0].problem}")


async def _find(session: AsyncSession, tenant: str, adapter: str, version: str) -> Version:
    """Raises NotFound, or Conflict for a version that may not be served."""
    is_number = version.isascii() and version.isdigit() and len(version) < 10
    row = None
    # PostgreSQL takes no NUL, and no slug has one.
    if all(re.fullmatch(SLUG_PATTERN, name) for name in (tenant, adapter, version)):
        names = {"tenant": tenant, "adapter": adapter}
        which = {"alias": version, "number": int(version) if is_number else None}
        row = (await session.execute(FIND_VERSION, {**names, **which})).one_or_none()
    if row is None:
        raise NotFound(
            f"The tenant {tenant!r} has no adapter {adapter!r} with a version {version!r}."
        )
    if row.state != "ready":
        raise Conflict(f"{row.model} is {row.state}; only a version that is ready can be loaded.")
    return Version(**row._mapping)


async def _wanted(session: AsyncSession, base_model_id: uuid.UUID) -> dict[str, str | None]:
    """Weights digest -> fingerprint."""
    rows = await session.execute(WANTED_PINS, {"base_model_id": base_model_id})
    return {row.weights_digest: row.fingerprint for row in rows}


async def _is_served(session: AsyncSession, base_model_id: uuid.UUID, digest: str) -> bool:
    which = {"base_model_id": base_model_id, "digest": digest}
    return bool(await session.scalar(STILL_SERVED, which))


async def _keep(session: AsyncSession, version: Version, *, actor_key_id: uuid.UUID) -> bool:
    """Write a pin down; gives whether it is a new one."""
    made = await session.execute(
        insert(AdapterPin)
        .values(version_id=version.version_id, tenant_id=version.tenant_id)
        .on_conflict_do_nothing()
        .returning(AdapterPin.version_id)
    )
    is_new = made.one_or_none() is not None
    if is_new:
        await _record(session, version, action="adapter.version.pin", actor_key_id=actor_key_id)
    return is_new


async def _let_go(session: AsyncSession, version: Version, *, actor_key_id: uuid.UUID) -> None:
    gone = await session.execute(
        delete(AdapterPin)
        .where(AdapterPin.version_id == version.version_id)
        .returning(AdapterPin.version_id)
    )
    if gone.one_or_none() is not None:
        await _record(session, version, action="adapter.version.unpin", actor_key_id=actor_key_id)


async def _record(
    session: AsyncSession, version: Version, *, action: str, actor_key_id: uuid.UUID
) -> None:
    await audit.record(
        session,
        tenant_id=version.tenant_id,
        actor_key_id=actor_key_id,
        action=action,
        subject=version.model,
        details={"weights_digest": version.weights_digest},
    )
