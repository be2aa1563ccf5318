"""Names that move between the versions of one adapter, and the memory of where they have been.

An alias stands for one version, or for two: then so many of a hundred callers get the canary.
Whoever moves one names the revision or the version that they believe it has, so nobody undoes
another's move unseen. `latest` moves by itself to each new version that is ready, and can be moved
too: it stays where it is put until a newer version comes. Knows nothing of who may call what.
"""

import datetime
import hashlib
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from gateway import audit
from gateway.adapter_rows import (
    DEFAULT_PAGE,
    SLUG_RULE,
    Page,
    any_version,
    is_slug,
    living_adapter,
)
from gateway.database import Database
from gateway.errors import Conflict, InvalidRequest, NotFound
from gateway.tables import Adapter, AdapterAlias, AdapterVersion, AliasMove

LATEST = "latest"
MAX_REASON_LENGTH = 500


@dataclass(frozen=True, slots=True)
class Canary:
    """The version that some callers of an alias get instead."""

    number: int
    # Of a hundred callers, 1 to 99.
    percent: int


@dataclass(frozen=True, slots=True)
class Meaning:
    """What an alias stands for."""

    number: int
    canary: Canary | None = None


@dataclass(frozen=True, slots=True)
class Belief:
    """What the caller takes an alias to be before it moves; both None where there is none yet."""

    revision: int | None = None
    number: int | None = None


@dataclass(frozen=True, slots=True)
class AliasEntry:
    """An alias as it is now."""

    alias: str
    meaning: Meaning
    revision: int
    moved_at: datetime.datetime


@dataclass(frozen=True, slots=True)
class MoveEntry:
    """One move of an alias: what it stood for before and after. None is no alias."""

    revision: int
    before: Meaning | None
    after: Meaning | None
    restored_revision: int | None
    reason: str | None
    # None where it moved by itself.
    actor_key_id: uuid.UUID | None
    moved_at: datetime.datetime


class Score(msgspec.Struct, frozen=True):
    """How many of an adapter's examples were answered as its uploader said."""

    passed: int
    total: int


class ExampleResults(msgspec.Struct, frozen=True, rename={"this_version": "this"}):
    """How a version's examples went when it was published."""

    this_version: Score
    # The version that was current then, and its number.
    current: Score | None = None
    current_version: int | None = None
    base: Score | None = None
    # Which examples this version failed, the first ones, counted from 1.
    failed: list[int] = []
    # Not asked, of anybody, for lack of time.
    num_left_out: int = 0

    @property
    def is_worse(self) -> bool:
        """Whether the version did worse than the one that was current."""
        then, now = self.current, self.this_version
        return then is not None and now.passed * then.total < then.passed * now.total


@dataclass(frozen=True, slots=True)
class _State:
    """What the columns of an alias, or of one of its moves, say."""

    version_id: uuid.UUID | None
    canary_version_id: uuid.UUID | None = None
    canary_percent: int | None = None

    @classmethod
    def of(cls, row: AdapterAlias | AliasMove) -> "_State":
        return cls(row.version_id, row.canary_version_id, row.canary_percent)

    @property
    def version_ids(self) -> set[uuid.UUID]:
        return {each for each in (self.version_id, self.canary_version_id) if each is not None}


@dataclass(frozen=True, slots=True)
class _Why:
    """What the history and the audit log say of a move besides where it went."""

    action: str
    actor_key_id: uuid.UUID | None
    reason: str | None = None
    restored_revision: int | None = None
    # Numbers of versions that do worse at their examples, and were wanted all the same.
    forced: tuple[int, ...] = ()


class Aliases:
    """Moves aliases for operators. Every move is one transaction with its audit row."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def list_aliases(self, tenant: str, adapter: str) -> list[AliasEntry]:
        """Return an adapter's aliases by name. Raises NotFound."""
        async with self._database.as_worker() as session:
            row = await living_adapter(session, tenant, adapter)
            query = select(AdapterAlias).where(AdapterAlias.adapter_id == row.id)
            aliases = (await session.scalars(query.order_by(AdapterAlias.alias))).all()
            numbers = await _numbers(session, map(_State.of, aliases))
            return [_entry(alias, numbers) for alias in aliases]

    async def get_alias(self, tenant: str, adapter: str, alias: str) -> AliasEntry:
        """Raises NotFound."""
        async with self._database.as_worker() as session:
            row = await living_adapter(session, tenant, adapter)
            found = await _existing(session, row, alias)
            return _entry(found, await _numbers(session, [_State.of(found)]))

    async def history(
        self,
        tenant: str,
        adapter: str,
        alias: str,
        *,
        after: int | None = None,
        limit: int = DEFAULT_PAGE,
    ) -> Page[MoveEntry, int]:
        """Return the moves of an alias, newest first, removed ones' too. Raises NotFound."""
        async with self._database.as_worker() as session:
            row = await living_adapter(session, tenant, adapter)
            moves = await _moves(session, row.id, alias, before=after, limit=limit + 2)
            if not moves and after is None:
                raise _no_alias(row, alias)
            numbers = await _numbers(session, map(_State.of, moves))
        befores = [*moves, None][1:]
        entries = [
            _move_entry(move, before, numbers) for move, before in zip(moves, befores, strict=True)
        ]
        return Page.of(entries[: limit + 1], limit=limit, key=lambda each: each.revision)

    async def move(
        self,
        tenant: str,
        adapter: str,
        alias: str,
        *,
        to: Meaning,
        believed: Belief,
        is_forced: bool,
        reason: str | None,
        actor_key_id: uuid.UUID,
    ) -> AliasEntry:
        """Make an alias, or move it from where the caller believes it to be.

        Raises NotFound; InvalidRequest; Conflict where the alias is elsewhere, where a version
        cannot be served, or where it does worse at its examples and `is_forced` is not given.
        """
        _check_alias(alias)
        _check_reason(reason)
        _check_meaning(alias, to)
        async with self._database.as_worker() as session:
            row = await living_adapter(session, tenant, adapter, for_update=True)
            current = await session.get(AdapterAlias, (row.id, alias))
            await _check_belief(session, row, alias, current=current, believed=believed)
            state, versions = await _state_of(session, row, to)
            served = _State.of(current).version_ids if current is not None else set()
            worse = [each for each in versions if each.id not in served and _is_worse(each)]
            if worse and not is_forced:
                raise _regression(worse[0])
            forced = tuple(each.number for each in worse)
            why = _Why("adapter.alias.move", actor_key_id, reason, forced=forced)
            moved = await _write(session, row, alias, state=state, why=why)
            return _entry(moved, await _numbers(session, [state]))

    async def rollback(
        self,
        tenant: str,
        adapter: str,
        alias: str,
        *,
        to_revision: int | None,
        believed: Belief,
        reason: str | None,
        actor_key_id: uuid.UUID,
    ) -> AliasEntry:
        """Bring back what an alias stood for before its last move, or at `to_revision`.

        A second rollback goes one further back. What was served before needs no force. Raises
        NotFound; Conflict where there is nothing before, or it was deleted since.
        """
        _check_reason(reason)
        async with self._database.as_worker() as session:
            row = await living_adapter(session, tenant, adapter, for_update=True)
            current = await _existing(session, row, alias)
            if believed != Belief():
                await _check_belief(session, row, alias, current=current, believed=believed)
            past = await _past(session, current, to_revision=to_revision)
            state = _State.of(past)
            for version_id in state.version_ids:
                _check_servable(await session.get_one(AdapterVersion, version_id))
            why = _Why("adapter.alias.rollback", actor_key_id, reason, past.revision)
            moved = await _write(session, row, alias, state=state, why=why)
            return _entry(moved, await _numbers(session, [state]))

    async def remove(
        self, tenant: str, adapter: str, alias: str, *, actor_key_id: uuid.UUID
    ) -> None:
        """Take an alias away; its history stays.

        Raises NotFound, or Conflict where it is needed.
        """
        async with self._database.as_worker() as session:
            row = await living_adapter(session, tenant, adapter, for_update=True)
            await _existing(session, row, alias)
            if alias == LATEST:
                raise Conflict(f"{LATEST!r} follows the newest version by itself, and stays.")
            if alias == row.default_alias:
                raise Conflict(
                    f"{row.public_name!r} stands for {alias!r}: give it another default_alias"
                    " first.",
                    param="default_alias",
                )
            why = _Why("adapter.alias.remove", actor_key_id)
            await _write(session, row, alias, state=_State(None), why=why)

    async def set_default(
        self, tenant: str, adapter: str, alias: str, *, actor_key_id: uuid.UUID
    ) -> None:
        """Say which alias the adapter's bare name stands for. Raises NotFound or Conflict."""
        async with self._database.as_worker() as session:
            row = await living_adapter(session, tenant, adapter, for_update=True)
            if not is_slug(alias) or await session.get(AdapterAlias, (row.id, alias)) is None:
                raise Conflict(
                    f"The adapter {row.public_name!r} has no alias {alias!r} yet: make it first.",
                    param="default_alias",
                )
            details = {"from": row.default_alias, "to": alias}
            row.default_alias = alias
            await audit.record(
                session,
                tenant_id=row.tenant_id,
                actor_key_id=actor_key_id,
                action="adapter.default_alias",
                subject=row.public_name,
                details=details,
            )


def bucket_of(public_name: str, caller: str) -> int:
    """Which of a hundred parts a caller of an adapter is in: those below a canary's percent get it.

    Depends on nothing that moves, so raising the percent only ever moves callers to the canary, and
    lowering it only ever back. SHA-256 of the name, which is never used again, and the caller.
    """
    digest = hashlib.sha256(f"{public_name}\n{caller}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % 100


async def follow_latest(
    session: AsyncSession,
    adapter: Adapter,
    version: AdapterVersion,
    *,
    actor_key_id: uuid.UUID | None,
) -> None:
    """Move `latest` to a version that became ready, if it never was at one as new.

    So it does not run away from where somebody put it back to when an old probe ends late. The
    adapter's row is locked.
    """
    visited = (
        select(func.max(AdapterVersion.number))
        .select_from(AliasMove)
        .join(AdapterVersion, AdapterVersion.id == AliasMove.version_id)
        .where(AliasMove.adapter_id == adapter.id, AliasMove.alias == LATEST)
    )
    if version.number > (await session.scalar(visited) or 0):
        why = _Why("adapter.alias.follow", actor_key_id)
        await _write(session, adapter, LATEST, state=_State(version.id), why=why)


async def leave_version(
    session: AsyncSession, adapter: Adapter, version: AdapterVersion, *, actor_key_id: uuid.UUID
) -> None:
    """See to it that no alias stands for a version that is about to be deleted.

    `latest` falls back to the highest number that is left. Raises Conflict where another alias
    stands for it, or none is left. The adapter's row is locked.
    """
    query = select(AdapterAlias).where(AdapterAlias.adapter_id == adapter.id)
    for alias in (await session.scalars(query.order_by(AdapterAlias.alias))).all():
        if version.id in _State.of(alias).version_ids and alias.alias != LATEST:
            raise Conflict(
                f"The alias {alias.alias!r} stands for version {version.number}: move it first."
            )
    latest = await session.get(AdapterAlias, (adapter.id, LATEST))
    if latest is None or latest.version_id != version.id:
        return
    rest = (
        select(AdapterVersion)
        .where(
            AdapterVersion.adapter_id == adapter.id,
            AdapterVersion.id != version.id,
            AdapterVersion.state == "ready",
            AdapterVersion.deleted_at.is_(None),
        )
        .order_by(AdapterVersion.number.desc())
        .limit(1)
    )
    highest = (await session.scalars(rest)).one_or_none()
    if highest is None:
        raise Conflict(
            f"Version {version.number} is the only one that can be called: delete the adapter."
        )
    why = _Why("adapter.alias.follow", actor_key_id, f"version {version.number} was deleted")
    await _write(session, adapter, LATEST, state=_State(highest.id), why=why)


async def _write(
    session: AsyncSession, adapter: Adapter, alias: str, *, state: _State, why: _Why
) -> AdapterAlias:
    """Move, make or remove an alias, with its history and its audit row; return what it was."""
    row = await session.get(AdapterAlias, (adapter.id, alias))
    before = _State.of(row) if row is not None else _State(None)
    revision = await _next_revision(session, adapter.id, alias, row=row)
    moved_at: datetime.datetime = (await session.scalars(select(func.clock_timestamp()))).one()
    if row is None:
        row = AdapterAlias(adapter_id=adapter.id, alias=alias, tenant_id=adapter.tenant_id)
    if state.version_id is None:
        await session.delete(row)
    else:
        row.version_id, row.canary_version_id = state.version_id, state.canary_version_id
        row.canary_percent = state.canary_percent
        row.revision, row.moved_at = revision, moved_at
        session.add(row)
    session.add(
        AliasMove(
            adapter_id=adapter.id,
            alias=alias,
            revision=revision,
            tenant_id=adapter.tenant_id,
            version_id=state.version_id,
            canary_version_id=state.canary_version_id,
            canary_percent=state.canary_percent,
            restored_revision=why.restored_revision,
            reason=why.reason,
            actor_key_id=why.actor_key_id,
            moved_at=moved_at,
        )
    )
    await session.flush()
    await _record(session, adapter, alias, revision=revision, states=(before, state), why=why)
    return row


async def _record(
    session: AsyncSession,
    adapter: Adapter,
    alias: str,
    *,
    revision: int,
    states: tuple[_State, _State],
    why: _Why,
) -> None:
    numbers = await _numbers(session, states)
    before, after = (_spell(_meaning(state, numbers)) for state in states)
    details: dict[str, Any] = {"from": before, "to": after, "revision": revision}
    if why.reason is not None:
        details["reason"] = why.reason
    if why.forced:
        details["forced"] = list(why.forced)
    await audit.record(
        session,
        tenant_id=adapter.tenant_id,
        actor_key_id=why.actor_key_id,
        action=why.action,
        subject=f"{adapter.public_name}@{alias}",
        details=details,
    )


async def _next_revision(
    session: AsyncSession, adapter_id: uuid.UUID, alias: str, *, row: AdapterAlias | None
) -> int:
    """One that this alias never had, though it was removed and made again."""
    query = select(func.max(AliasMove.revision)).where(
        AliasMove.adapter_id == adapter_id, AliasMove.alias == alias
    )
    highest = await session.scalar(query) or 0
    return max(highest, row.revision if row is not None else 0) + 1


async def _moves(
    session: AsyncSession, adapter_id: uuid.UUID, alias: str, *, before: int | None, limit: int
) -> Sequence[AliasMove]:
    if not is_slug(alias):
        return []
    query = select(AliasMove).where(AliasMove.adapter_id == adapter_id, AliasMove.alias == alias)
    if before is not None:
        query = query.where(AliasMove.revision < before)
    return (await session.scalars(query.order_by(AliasMove.revision.desc()).limit(limit))).all()


async def _past(
    session: AsyncSession, alias: AdapterAlias, *, to_revision: int | None
) -> AliasMove:
    """The move whose outcome a rollback brings back. Raises NotFound or Conflict."""
    if to_revision is not None:
        moves = await _moves(
            session, alias.adapter_id, alias.alias, before=to_revision + 1, limit=1
        )
        if not moves or moves[0].revision != to_revision or moves[0].version_id is None:
            raise NotFound(
                f"The alias {alias.alias!r} has no revision {to_revision} to go back to.",
                param="to_revision",
            )
        return moves[0]
    last = await session.get(AliasMove, (alias.adapter_id, alias.alias, alias.revision))
    here = last.restored_revision if last is not None else None
    query = (
        select(AliasMove)
        .where(
            AliasMove.adapter_id == alias.adapter_id,
            AliasMove.alias == alias.alias,
            AliasMove.revision < (here or alias.revision),
            AliasMove.version_id.is_not(None),
        )
        .order_by(AliasMove.revision.desc())
        .limit(1)
    )
    past = (await session.scalars(query)).one_or_none()
    if past is None:
        raise Conflict(f"The alias {alias.alias!r} stood for nothing before: there is no way back.")
    return past


async def _existing(session: AsyncSession, adapter: Adapter, alias: str) -> AdapterAlias:
    row = await session.get(AdapterAlias, (adapter.id, alias)) if is_slug(alias) else None
    if row is None:
        raise _no_alias(adapter, alias)
    return row


async def _state_of(
    session: AsyncSession, adapter: Adapter, meaning: Meaning
) -> tuple[_State, list[AdapterVersion]]:
    """The columns for what an alias is to stand for, and the versions in it."""
    version = await any_version(session, adapter, meaning.number)
    _check_servable(version)
    if meaning.canary is None:
        return _State(version.id), [version]
    canary = await any_version(session, adapter, meaning.canary.number)
    _check_servable(canary)
    return _State(version.id, canary.id, meaning.canary.percent), [version, canary]


async def _numbers(session: AsyncSession, states: Iterable[_State]) -> dict[uuid.UUID, int]:
    ids = {version_id for state in states for version_id in state.version_ids}
    query = select(AdapterVersion.id, AdapterVersion.number).where(AdapterVersion.id.in_(ids))
    return {row.id: row.number for row in await session.execute(query)}


def _meaning(state: _State, numbers: dict[uuid.UUID, int]) -> Meaning | None:
    if state.version_id is None:
        return None
    if state.canary_version_id is None or state.canary_percent is None:
        return Meaning(numbers[state.version_id])
    canary = Canary(numbers[state.canary_version_id], state.canary_percent)
    return Meaning(numbers[state.version_id], canary)


def _spell(meaning: Meaning | None) -> str | None:
    """For people: `3`, or `3, 4 for 10 %`."""
    if meaning is None or meaning.canary is None:
        return str(meaning.number) if meaning is not None else None
    return f"{meaning.number}, {meaning.canary.number} for {meaning.canary.percent} %"


def _entry(alias: AdapterAlias, numbers: dict[uuid.UUID, int]) -> AliasEntry:
    meaning = _meaning(_State.of(alias), numbers)
    assert meaning is not None, "an alias stands for a version"
    return AliasEntry(alias.alias, meaning, alias.revision, alias.moved_at)


def _move_entry(
    move: AliasMove, before: AliasMove | None, numbers: dict[uuid.UUID, int]
) -> MoveEntry:
    return MoveEntry(
        revision=move.revision,
        before=_meaning(_State.of(before), numbers) if before is not None else None,
        after=_meaning(_State.of(move), numbers),
        restored_revision=move.restored_revision,
        reason=move.reason,
        actor_key_id=move.actor_key_id,
        moved_at=move.moved_at,
    )


async def _check_belief(
    session: AsyncSession,
    adapter: Adapter,
    alias: str,
    *,
    current: AdapterAlias | None,
    believed: Belief,
) -> None:
    """Raises Conflict, saying what is so, where the caller believes something else."""
    name = f"{adapter.public_name}@{alias}"
    if current is None:
        if believed.revision or believed.number is not None:
            raise Conflict(f"There is no alias {name!r} now: leave out what you expect.")
        return
    entry = _entry(current, await _numbers(session, [_State.of(current)]))
    is_named = believed != Belief()
    is_right = believed.revision in (None, entry.revision) and believed.number in (
        None,
        entry.meaning.number,
    )
    if is_named and is_right:
        return
    now = f"{name!r} is at revision {entry.revision}, version {_spell(entry.meaning)}"
    fix = "look again" if is_named else "name that as expected_revision or expected_version"
    raise Conflict(f"{now}: {fix}.", param="expected_revision")


def _check_alias(alias: str) -> None:
    if not is_slug(alias) or alias.isdigit():
        raise InvalidRequest(
            f"alias must be {SLUG_RULE}, and not a number: those are versions.", param="alias"
        )


def _check_reason(reason: str | None) -> None:
    if reason is not None and (len(reason) > MAX_REASON_LENGTH or "\x00" in reason):
        raise InvalidRequest(
            f"reason must be at most {MAX_REASON_LENGTH} characters of text.", param="reason"
        )


def _check_meaning(alias: str, meaning: Meaning) -> None:
    canary = meaning.canary
    if canary is None:
        return
    if alias == LATEST:
        raise InvalidRequest(
            f"{LATEST!r} follows the newest version by itself and has no canary: make another"
            " alias, and let it be the adapter's default_alias.",
            param="canary",
        )
    if canary.number == meaning.number:
        raise InvalidRequest("canary.version must be another version.", param="canary.version")
    if not 1 <= canary.percent <= 99:
        raise InvalidRequest("canary.percent must be 1 to 99.", param="canary.percent")


def _check_servable(version: AdapterVersion) -> None:
    if version.deleted_at is not None:
        raise Conflict(f"Version {version.number} was deleted.", param="version")
    if version.state != "ready":
        raise Conflict(
            f"Version {version.number} is {version.state}, and an alias stands for what is ready.",
            param="version",
        )


def _is_worse(version: AdapterVersion) -> bool:
    results = version.example_results
    return results is not None and msgspec.convert(results, ExampleResults).is_worse


def _regression(version: AdapterVersion) -> Conflict:
    results = msgspec.convert(version.example_results, ExampleResults)
    then, now = results.current, results.this_version
    assert then is not None
    return Conflict(
        f"Version {version.number} passed {now.passed} of {now.total} of its examples, where the"
        f" version before it passed {then.passed} of {then.total}: send force to move all the"
        " same.",
        param="force",
    )


def _no_alias(adapter: Adapter, alias: str) -> NotFound:
    return NotFound(f"The adapter {adapter.public_name!r} has no alias {alias!r}.", param="alias")
