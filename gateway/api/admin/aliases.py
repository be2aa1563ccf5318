"""Where an adapter's aliases stand, for operators: move, split, roll back, and look back."""

import datetime
import uuid
from typing import Annotated

import msgspec
from litestar import delete, get, post, put
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody, QueryParameter

from gateway.adapter_rows import DEFAULT_PAGE, MAX_PAGE
from gateway.aliases import AliasEntry, Aliases, Belief, Canary, Meaning, MoveEntry
from gateway.auth import Principal

TAGS = ["admin: aliases"]

# What every JSON library can say.
MAX_REVISION = 2**53 - 1
Revision = Annotated[int, msgspec.Meta(ge=0, le=MAX_REVISION)]


class CanaryBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The version that so many of a hundred callers get instead, 1 to 99.

    The same callers always: chosen by the request's `user`, or by its key where it names none.
    """

    version: int
    percent: int


class MeaningView(msgspec.Struct, frozen=True):
    """What an alias stands for."""

    version: int
    canary: CanaryBody | None

    @classmethod
    def of(cls, meaning: Meaning) -> "MeaningView":
        return cls(meaning.number, _canary_view(meaning))


class AliasView(msgspec.Struct, frozen=True):
    """An alias. Its revision grows with each move."""

    alias: str
    version: int
    canary: CanaryBody | None
    revision: int
    moved_at: datetime.datetime

    @classmethod
    def of(cls, entry: AliasEntry) -> "AliasView":
        return cls(
            alias=entry.alias,
            version=entry.meaning.number,
            canary=_canary_view(entry.meaning),
            revision=entry.revision,
            moved_at=entry.moved_at,
        )


class AliasList(msgspec.Struct, frozen=True):
    """The aliases of one adapter, by name."""

    data: list[AliasView]


class MoveView(msgspec.Struct, frozen=True):
    """One move of an alias. `before` null made it, `after` null removed it."""

    revision: int
    before: MeaningView | None
    after: MeaningView | None
    # Of a rollback: the revision that it brought back.
    restored_revision: int | None
    reason: str | None
    # Null where the alias followed by itself.
    actor_key_id: uuid.UUID | None
    moved_at: datetime.datetime

    @classmethod
    def of(cls, entry: MoveEntry) -> "MoveView":
        return cls(
            revision=entry.revision,
            before=MeaningView.of(entry.before) if entry.before is not None else None,
            after=MeaningView.of(entry.after) if entry.after is not None else None,
            restored_revision=entry.restored_revision,
            reason=entry.reason,
            actor_key_id=entry.actor_key_id,
            moved_at=entry.moved_at,
        )


class MoveList(msgspec.Struct, frozen=True):
    """A part of an alias's history, newest first."""

    data: list[MoveView]
    # Send it as `after` for the next part; null where this is the last.
    next: int | None


class AliasMoveBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an alias is to stand for, and what it is believed to be now.

    An alias that exists moves only where `expected_revision` or `expected_version` is right.
    """

    version: int
    canary: CanaryBody | None = None
    expected_revision: Revision | None = None
    expected_version: int | None = None
    reason: str | None = None
    # Move to a version that does worse at its own examples all the same.
    force: bool = False


class RollbackBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far to go back: to before the last move, or to a revision. All may be left out."""

    to_revision: Revision | None = None
    expected_revision: Revision | None = None
    expected_version: int | None = None
    reason: str | None = None


@get(
    "/tenants/{tenant:str}/adapters/{adapter:str}/aliases",
    scope="operator",
    tags=TAGS,
    summary="List an adapter's aliases",
)
async def list_aliases(
    tenant: FromPath[str], adapter: FromPath[str], aliases: NamedDependency[Aliases]
) -> AliasList:
    return AliasList([AliasView.of(each) for each in await aliases.list_aliases(tenant, adapter)])


@get(
    "/tenants/{tenant:str}/adapters/{adapter:str}/aliases/{alias:str}",
    scope="operator",
    tags=TAGS,
    summary="Show an alias",
)
async def get_alias(
    tenant: FromPath[str],
    adapter: FromPath[str],
    alias: FromPath[str],
    aliases: NamedDependency[Aliases],
) -> AliasView:
    return AliasView.of(await aliases.get_alias(tenant, adapter, alias))


@get(
    "/tenants/{tenant:str}/adapters/{adapter:str}/aliases/{alias:str}/history",
    scope="operator",
    tags=TAGS,
    summary="Show where an alias has been",
    description="Also of an alias that was removed.",
)
async def list_moves(
    tenant: FromPath[str],
    adapter: FromPath[str],
    alias: FromPath[str],
    aliases: NamedDependency[Aliases],
    limit: Annotated[int, QueryParameter(ge=1, le=MAX_PAGE)] = DEFAULT_PAGE,
    after: Annotated[int | None, QueryParameter(ge=0, le=MAX_REVISION)] = None,
) -> MoveList:
    page = await aliases.history(tenant, adapter, alias, after=after, limit=limit)
    return MoveList([MoveView.of(each) for each in page.items], page.next)


@put(
    "/tenants/{tenant:str}/adapters/{adapter:str}/aliases/{alias:str}",
    scope="operator",
    tags=TAGS,
    summary="Make or move an alias",
    description=(
        "One call, one move: requests that run keep their version, the next ones get the new one. A"
        " `canary` splits the callers; raising its percent never moves anybody back. 409 says where"
        " the alias is if it is not where you expect it, or why the version may not be served."
        " `latest` can be moved too, and stays there until a newer version is ready."
    ),
)
async def move_alias(
    tenant: FromPath[str],
    adapter: FromPath[str],
    alias: FromPath[str],
    data: JSONBody[AliasMoveBody],
    aliases: NamedDependency[Aliases],
    principal: NamedDependency[Principal],
) -> AliasView:
    canary = Canary(data.canary.version, data.canary.percent) if data.canary is not None else None
    moved = await aliases.move(
        tenant,
        adapter,
        alias,
        to=Meaning(data.version, canary),
        believed=Belief(data.expected_revision, data.expected_version),
        is_forced=data.force,
        reason=data.reason,
        actor_key_id=principal.key_id,
    )
    return AliasView.of(moved)


@post(
    "/tenants/{tenant:str}/adapters/{adapter:str}/aliases/{alias:str}/rollback",
    scope="operator",
    status_code=200,
    tags=TAGS,
    summary="Roll an alias back",
    description=(
        "Brings back what it stood for before its last move, a canary included; once more goes one"
        " further back. The body may be left out."
    ),
)
async def roll_back_alias(
    tenant: FromPath[str],
    adapter: FromPath[str],
    alias: FromPath[str],
    aliases: NamedDependency[Aliases],
    principal: NamedDependency[Principal],
    data: JSONBody[RollbackBody | None] = None,
) -> AliasView:
    asked = data or RollbackBody()
    moved = await aliases.rollback(
        tenant,
        adapter,
        alias,
        to_revision=asked.to_revision,
        believed=Belief(asked.expected_revision, asked.expected_version),
        reason=asked.reason,
        actor_key_id=principal.key_id,
    )
    return AliasView.of(moved)


@delete(
    "/tenants/{tenant:str}/adapters/{adapter:str}/aliases/{alias:str}",
    scope="operator",
    tags=TAGS,
    summary="Remove an alias",
    description="Its history stays. 409 for `latest` and for the adapter's default alias.",
)
async def remove_alias(
    tenant: FromPath[str],
    adapter: FromPath[str],
    alias: FromPath[str],
    aliases: NamedDependency[Aliases],
    principal: NamedDependency[Principal],
) -> None:
    await aliases.remove(tenant, adapter, alias, actor_key_id=principal.key_id)


def _canary_view(meaning: Meaning) -> CanaryBody | None:
    canary = meaning.canary
    return CanaryBody(canary.number, canary.percent) if canary is not None else None
