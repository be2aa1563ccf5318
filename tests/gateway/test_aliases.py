"""Facts about aliases: who wins a move, who gets the canary, and the way back."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import select

from gateway.aliases import AliasEntry, Aliases, Belief, Canary, Meaning, bucket_of
from gateway.auth import Principal
from gateway.database import Database
from gateway.errors import Conflict, InvalidRequest, ModelNotFound, NotFound
from gateway.registry import Registry, Verdict
from gateway.tables import AuditEntry
from tests.gateway.admin_plane import ADDRESS, INFO
from tests.gateway.published import FAILED, make_tenant, publish

NOTHING = Belief()
USERS = [f"user-{number}" for number in range(400)]


@pytest.fixture
async def registry(database: Database) -> Registry:
    registry = Registry(database)
    await registry.register_base_model(INFO, ADDRESS)
    return registry


@pytest.fixture
async def acme(database: Database, registry: Registry) -> Principal:
    """A tenant with versions 1, 2 and 3 of an adapter."""
    acme = await make_tenant(database, "acme")
    for digest in "abc":
        await publish(registry, acme, "sql", digest=digest)
    return acme


@pytest.fixture
def aliases(database: Database) -> Aliases:
    return Aliases(database)


async def move(
    aliases: Aliases,
    acme: Principal,
    to: Meaning,
    believed: Belief = NOTHING,
    *,
    alias: str = "prod",
    is_forced: bool = False,
    reason: str | None = None,
) -> AliasEntry:
    return await aliases.move(
        "acme",
        "sql",
        alias,
        to=to,
        believed=believed,
        is_forced=is_forced,
        reason=reason,
        actor_key_id=acme.key_id,
    )


async def roll_back(aliases: Aliases, acme: Principal, **changes: Any) -> AliasEntry:
    facts = {"to_revision": None, "believed": NOTHING, "reason": None, "alias": "prod", **changes}
    return await aliases.rollback(
        "acme", "sql", facts.pop("alias"), actor_key_id=acme.key_id, **facts
    )


async def number_of(registry: Registry, acme: Principal, name: str = "acme-sql@prod") -> int | None:
    return (await registry.resolve(acme, name)).version_number


async def who_gets(registry: Registry, acme: Principal, number: int) -> set[str]:
    """The users for whom `prod` is that version now."""
    found = [await registry.resolve(acme, "acme-sql@prod", user=user) for user in USERS]
    return {user for user, each in zip(USERS, found, strict=True) if each.version_number == number}


# Moves.


async def test_an_alias_answers_from_its_first_move_on_in_any_case(
    registry: Registry, aliases: Aliases, acme: Principal
) -> None:
    with pytest.raises(ModelNotFound):
        await registry.resolve(acme, "acme-sql@prod")
    made = await move(aliases, acme, Meaning(1))
    assert (made.alias, made.meaning, made.revision) == ("prod", Meaning(1), 1)
    for spelling in ("acme-sql@prod", "ACME-SQL@PROD"):
        assert await number_of(registry, acme, spelling) == 1
    await move(aliases, acme, Meaning(2), Belief(revision=1))
    assert await number_of(registry, acme) == 2
    assert await number_of(registry, acme, "acme-sql") == 3


async def test_who_believes_what_is_not_so_is_told_what_is(
    aliases: Aliases, acme: Principal
) -> None:
    with pytest.raises(Conflict, match="no alias 'acme-sql@prod' now"):
        await move(aliases, acme, Meaning(1), Belief(revision=1))
    await move(aliases, acme, Meaning(1), Belief(revision=0))
    for belief in (NOTHING, Belief(revision=2), Belief(number=2), Belief(1, 2), Belief(0)):
        with pytest.raises(Conflict, match="revision 1, version 1") as caught:
            await move(aliases, acme, Meaning(2), belief)
        assert caught.value.param == "expected_revision"
    assert (await move(aliases, acme, Meaning(2), Belief(1, 1))).revision == 2
    assert (await move(aliases, acme, Meaning(3), Belief(number=2))).revision == 3


async def test_of_two_moves_at_once_one_wins(
    registry: Registry, aliases: Aliases, acme: Principal
) -> None:
    await move(aliases, acme, Meaning(1))
    outcomes = await asyncio.gather(
        *(move(aliases, acme, Meaning(number), Belief(revision=1)) for number in (2, 3, 2, 3)),
        return_exceptions=True,
    )
    winners = [each for each in outcomes if isinstance(each, AliasEntry)]
    losers = [each for each in outcomes if isinstance(each, Conflict)]
    assert (len(winners), len(losers)) == (1, 3)
    assert await number_of(registry, acme) == winners[0].meaning.number
    page = await aliases.history("acme", "sql", "prod")
    assert [each.revision for each in page.items] == [2, 1]


async def test_of_two_who_make_an_alias_at_once_one_wins(aliases: Aliases, acme: Principal) -> None:
    outcomes = await asyncio.gather(
        *(move(aliases, acme, Meaning(number)) for number in (1, 2)), return_exceptions=True
    )
    assert sorted(type(each).__name__ for each in outcomes) == ["AliasEntry", "Conflict"]


@pytest.mark.parametrize("alias", ["", "7", "Prod", "a b", "-a", "x" * 33, "ä", "nul\x00"])
async def test_an_alias_that_could_not_be_called_is_refused(
    aliases: Aliases, acme: Principal, alias: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await move(aliases, acme, Meaning(1), alias=alias)
    assert caught.value.param == "alias"


@pytest.mark.parametrize("number", [0, -1, 4, 2**31, 10**30])
async def test_a_version_that_is_not_there_is_not_found(
    aliases: Aliases, acme: Principal, number: int
) -> None:
    with pytest.raises(NotFound):
        await move(aliases, acme, Meaning(number))


async def test_an_alias_stands_for_what_is_ready(
    registry: Registry, aliases: Aliases, acme: Principal
) -> None:
    await publish(registry, acme, "sql", digest="d", verdict=FAILED)
    with pytest.raises(Conflict, match="rejected"):
        await move(aliases, acme, Meaning(4))


@pytest.mark.parametrize(
    ("alias", "to", "param"),
    [
        ("prod", Meaning(1, Canary(1, 10)), "canary.version"),
        ("prod", Meaning(1, Canary(2, 0)), "canary.percent"),
        ("prod", Meaning(1, Canary(2, 100)), "canary.percent"),
        ("latest", Meaning(1, Canary(2, 10)), "canary"),
    ],
)
async def test_a_canary_that_makes_no_sense_is_refused_by_name(
    aliases: Aliases, acme: Principal, alias: str, to: Meaning, param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await move(aliases, acme, to, alias=alias)
    assert caught.value.param == param


@pytest.mark.parametrize("reason", ["x" * 501, "nul\x00"])
async def test_a_reason_that_cannot_be_kept_is_refused(
    aliases: Aliases, acme: Principal, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match="reason"):
        await move(aliases, acme, Meaning(1), reason=reason)


# What the bare name means.


async def test_the_bare_name_stands_for_the_default_alias(
    registry: Registry, aliases: Aliases, acme: Principal
) -> None:
    with pytest.raises(Conflict, match="no alias 'prod' yet"):
        await aliases.set_default("acme", "sql", "prod", actor_key_id=acme.key_id)
    await move(aliases, acme, Meaning(1))
    assert await number_of(registry, acme, "acme-sql") == 3
    await aliases.set_default("acme", "sql", "prod", actor_key_id=acme.key_id)
    assert await number_of(registry, acme, "acme-sql") == 1
    assert await number_of(registry, acme, "acme-sql@latest") == 3
    [shown] = [each for each in await registry.list_models(acme) if each.id == "acme-sql"]
    assert shown.version_number == 1


async def test_an_alias_that_is_needed_is_not_removed(
    registry: Registry, aliases: Aliases, acme: Principal
) -> None:
    await move(aliases, acme, Meaning(1))
    await aliases.set_default("acme", "sql", "prod", actor_key_id=acme.key_id)
    for alias, reason in (("prod", "default_alias"), ("latest", "by itself")):
        with pytest.raises(Conflict, match=reason):
            await aliases.remove("acme", "sql", alias, actor_key_id=acme.key_id)
    with pytest.raises(NotFound):
        await aliases.remove("acme", "sql", "canary", actor_key_id=acme.key_id)


async def test_an_alias_that_was_removed_and_made_again_has_a_revision_of_its_own(
    registry: Registry, aliases: Aliases, acme: Principal
) -> None:
    await move(aliases, acme, Meaning(1))
    await aliases.remove("acme", "sql", "prod", actor_key_id=acme.key_id)
    with pytest.raises(ModelNotFound):
        await registry.resolve(acme, "acme-sql@prod")
    again = await move(aliases, acme, Meaning(2))
    assert again.revision == 3
    with pytest.raises(Conflict):
        await move(aliases, acme, Meaning(3), Belief(revision=1))


async def test_latest_may_be_moved_and_follows_again_with_the_next_version(
    registry: Registry, aliases: Aliases, acme: Principal
) -> None:
    await roll_back(aliases, acme, alias="latest")
    assert await number_of(registry, acme, "acme-sql") == 2
    await publish(registry, acme, "sql", digest="d")
    assert await number_of(registry, acme, "acme-sql") == 4
    [newest, back, *_] = (await aliases.history("acme", "sql", "latest")).items
    assert (newest.before, newest.after) == (Meaning(2), Meaning(4))
    assert (back.before, back.after, back.restored_revision) == (Meaning(3), Meaning(2), 2)


# The canary.


async def test_a_canary_gets_its_share_and_each_user_stays_on_one_side(
    registry: Registry, aliases: Aliases, acme: Principal
) -> None:
    await move(aliases, acme, Meaning(1, Canary(2, 30)))
    first = await who_gets(registry, acme, 2)
    # Three standard deviations of 400 draws at 30 %.
    assert abs(len(first) - 120) < 28
    assert await who_gets(registry, acme, 2) == first
    assert await who_gets(registry, acme, 1) == set(USERS) - first


async def test_a_higher_percent_only_ever_moves_users_to_the_canary(
    registry: Registry, aliases: Aliases, acme: Principal
) -> None:
    before: set[str] = set()
    entry = await move(aliases, acme, Meaning(1, Canary(2, 1)))
    for percent in (10, 50, 99):
        to = Meaning(1, Canary(2, percent))
        entry = await move(aliases, acme, to, Belief(revision=entry.revision))
        now = await who_gets(registry, acme, 2)
        assert before < now
        before = now
    await roll_back(aliases, acme)
    assert await who_gets(registry, acme, 2) < before


async def test_without_a_user_one_key_gets_one_version(
    registry: Registry, aliases: Aliases, acme: Principal
) -> None:
    await move(aliases, acme, Meaning(1, Canary(2, 50)))
    expected = 2 if bucket_of("acme-sql", str(acme.key_id)) < 50 else 1
    for user in (None, ""):
        found = [await registry.resolve(acme, "acme-sql@prod", user=user) for _ in range(5)]
        assert {each.version_number for each in found} == {expected}


async def test_a_pinned_version_has_no_canary(
    registry: Registry, aliases: Aliases, acme: Principal
) -> None:
    await move(aliases, acme, Meaning(1, Canary(2, 99)))
    found = [await registry.resolve(acme, "acme-sql@1", user=user) for user in USERS[:50]]
    assert {each.version_number for each in found} == {1}


async def test_users_are_spread_evenly_and_apart_from_one_adapter_to_another() -> None:
    buckets = [bucket_of("acme-sql", str(number)) for number in range(20_000)]
    counts = [buckets.count(bucket) for bucket in range(100)]
    # 200 each, within five standard deviations.
    assert min(counts) > 130
    assert max(counts) < 270
    others = [bucket_of("acme-triage", str(number)) for number in range(20_000)]
    assert sum(a == b for a, b in zip(buckets, others, strict=True)) < 400
    # The same in every process and release: users would change sides otherwise.
    assert bucket_of("acme-sql", "user-1") == 67


# The way back.


async def test_rollback_goes_back_one_step_each_time(
    registry: Registry, aliases: Aliases, acme: Principal
) -> None:
    await move(aliases, acme, Meaning(1))
    await move(aliases, acme, Meaning(1, Canary(2, 20)), Belief(revision=1))
    await move(aliases, acme, Meaning(3), Belief(revision=2))
    assert (await roll_back(aliases, acme)).meaning == Meaning(1, Canary(2, 20))
    assert (await roll_back(aliases, acme)).meaning == Meaning(1)
    with pytest.raises(Conflict, match="no way back"):
        await roll_back(aliases, acme)
    assert (await roll_back(aliases, acme, to_revision=3)).meaning == Meaning(3)
    assert await number_of(registry, acme) == 3


async def test_rollback_to_what_never_was_is_refused(aliases: Aliases, acme: Principal) -> None:
    with pytest.raises(NotFound):
        await roll_back(aliases, acme)
    await move(aliases, acme, Meaning(1))
    await move(aliases, acme, Meaning(2), Belief(revision=1))
    for revision in (0, 3, -1):
        with pytest.raises(NotFound, match=f"no revision {revision}"):
            await roll_back(aliases, acme, to_revision=revision)
    with pytest.raises(Conflict, match="revision 2"):
        await roll_back(aliases, acme, believed=Belief(revision=1))


async def test_the_history_says_who_moved_what_from_where_to_where_and_why(
    aliases: Aliases, acme: Principal
) -> None:
    await move(aliases, acme, Meaning(1), reason="first")
    await move(aliases, acme, Meaning(1, Canary(2, 5)), Belief(revision=1), reason="try it")
    await aliases.remove("acme", "sql", "prod", actor_key_id=acme.key_id)
    page = await aliases.history("acme", "sql", "prod")
    assert [(each.before, each.after, each.reason) for each in page.items] == [
        (Meaning(1, Canary(2, 5)), None, None),
        (Meaning(1), Meaning(1, Canary(2, 5)), "try it"),
        (None, Meaning(1), "first"),
    ]
    assert {each.actor_key_id for each in page.items} == {acme.key_id}
    times = [each.moved_at for each in page.items]
    assert times == sorted(times, reverse=True)


async def test_the_history_comes_in_parts(aliases: Aliases, acme: Principal) -> None:
    for revision in range(5):
        await move(aliases, acme, Meaning(1 + revision % 2), Belief(revision=revision))
    seen, after = [], None
    while True:
        page = await aliases.history("acme", "sql", "prod", after=after, limit=2)
        seen += page.items
        if (after := page.next) is None:
            break
    assert [each.revision for each in seen] == [5, 4, 3, 2, 1]
    assert seen == (await aliases.history("acme", "sql", "prod")).items


async def test_before_its_beginning_an_alias_has_no_history(
    aliases: Aliases, acme: Principal
) -> None:
    assert (await aliases.history("acme", "sql", "latest", after=0)).items == []


# Examples.


def scored(this: int, current: int | None, *, total: int = 10) -> Verdict:
    results: dict[str, Any] = {"this": {"passed": this, "total": total}, "base": None}
    if current is not None:
        results["current"] = {"passed": current, "total": total}
    return Verdict(certificate={}, findings=[], example_results=results)


async def test_a_move_to_what_does_worse_at_its_examples_needs_force(
    registry: Registry, aliases: Aliases, acme: Principal, database: Database
) -> None:
    await publish(registry, acme, "sql", digest="d", verdict=scored(7, 9))
    await move(aliases, acme, Meaning(3))
    for to in (Meaning(4), Meaning(3, Canary(4, 10))):
        with pytest.raises(Conflict, match="passed 7 of 10") as caught:
            await move(aliases, acme, to, Belief(revision=1))
        assert caught.value.param == "force"
    await move(aliases, acme, Meaning(3, Canary(4, 10)), Belief(revision=1), is_forced=True)
    # Who serves it already has said so once.
    await move(aliases, acme, Meaning(4), Belief(revision=2))
    async with database.as_worker() as session:
        query = select(AuditEntry).where(AuditEntry.subject == "acme-sql@prod")
        rows = (await session.scalars(query.order_by(AuditEntry.number))).all()
    assert [row.details.get("forced") for row in rows] == [None, [4], None]
    # And the way back and forth is free.
    assert (await roll_back(aliases, acme)).meaning == Meaning(3, Canary(4, 10))


@pytest.mark.parametrize("verdict", [scored(9, 9), scored(1, None), scored(0, 0, total=0)])
async def test_a_move_to_what_does_as_well_needs_none(
    registry: Registry, aliases: Aliases, acme: Principal, verdict: Verdict
) -> None:
    await publish(registry, acme, "sql", digest="d", verdict=verdict)
    assert (await move(aliases, acme, Meaning(4))).meaning == Meaning(4)


async def test_every_move_leaves_an_audit_row(
    aliases: Aliases, acme: Principal, database: Database
) -> None:
    await move(aliases, acme, Meaning(1), reason="go")
    await move(aliases, acme, Meaning(1, Canary(3, 25)), Belief(revision=1))
    await roll_back(aliases, acme, reason="no")
    with pytest.raises(Conflict):
        await move(aliases, acme, Meaning(2))
    async with database.as_worker() as session:
        query = select(AuditEntry).where(AuditEntry.subject == "acme-sql@prod")
        rows = (await session.scalars(query.order_by(AuditEntry.number))).all()
    assert [(row.action, row.details) for row in rows] == [
        ("adapter.alias.move", {"from": None, "to": "1", "revision": 1, "reason": "go"}),
        ("adapter.alias.move", {"from": "1", "to": "1, 3 for 25 %", "revision": 2}),
        (
            "adapter.alias.rollback",
            {"from": "1, 3 for 25 %", "to": "1", "revision": 3, "reason": "no"},
        ),
    ]
