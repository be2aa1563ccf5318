"""Facts about names: what each means, to whom, and what nobody can take."""

import asyncio
import dataclasses
import datetime
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import select

from adapters.store import ArtifactStore
from gateway.aliases import Meaning
from gateway.auth import Principal
from gateway.base_models import BaseModels
from gateway.blobs import Blobs
from gateway.database import Database
from gateway.errors import Conflict, InvalidRequest, ModelNotFound, NotFound, Unavailable
from gateway.registry import Contents, Registry
from gateway.retention import Retention
from gateway.tables import AuditEntry, PriceVersion, Tenant
from tests.gateway.admin_plane import ADDRESS, INFO
from tests.gateway.published import FAILED, PASSED, make_tenant, publish


@pytest.fixture
def registry(database: Database) -> Registry:
    return Registry(database)


@pytest.fixture
def retention(database: Database, tmp_path: Path) -> Retention:
    store = ArtifactStore(tmp_path.as_uri())
    return Retention(database, Blobs(database, store), purge_after=datetime.timedelta(days=30))


@pytest.fixture
async def base(registry: Registry) -> None:
    await registry.register_base_model(INFO, ADDRESS)


@pytest.fixture
async def acme(database: Database) -> Principal:
    return await make_tenant(database, "acme")


# What a name means.


async def test_a_base_model_answers_to_its_name_in_any_case(
    registry: Registry, base: None, acme: Principal
) -> None:
    for spelling in ("Tiny-Base", "tiny-base", "TINY-BASE"):
        target = await registry.resolve(acme, spelling)
        assert target.base_model == "Tiny-Base"
        assert target.adapter_id is None
        assert target.weights_digest is None
        assert target.text_bundle_digest == INFO.text_bundle_digest
        assert target.context_length == INFO.max_model_len


async def test_an_adapter_answers_to_its_public_name(
    registry: Registry, base: None, acme: Principal
) -> None:
    version_id = await publish(registry, acme, "sql")
    target = await registry.resolve(acme, "Acme-SQL")
    assert target.public_name == "acme-sql"
    assert target.adapter_version_id == version_id
    assert target.version_number == 1
    assert target.weights_digest == "d" * 64
    assert target.base_model == "Tiny-Base"


async def test_a_suffix_chooses_a_version_and_latest_is_the_default(
    registry: Registry, base: None, acme: Principal
) -> None:
    for digest in "de":
        await publish(registry, acme, "sql", digest=digest)
    numbers = {
        name: (await registry.resolve(acme, name)).version_number
        for name in ("acme-sql", "acme-sql@latest", "acme-sql@LATEST", "acme-sql@1", "acme-sql@2")
    }
    assert list(numbers.values()) == [2, 2, 2, 1, 2]


async def test_a_name_is_never_split_at_its_dashes(
    registry: Registry, base: None, database: Database, acme: Principal
) -> None:
    await publish(registry, acme, "b-c-d")
    assert (await registry.resolve(acme, "acme-b-c-d")).public_name == "acme-b-c-d"
    with pytest.raises(ModelNotFound):
        await registry.resolve(acme, "acme-b-c")


async def refusal(registry: Registry, principal: Principal, model: str) -> tuple[object, ...]:
    with pytest.raises(ModelNotFound) as caught:
        await registry.resolve(principal, model)
    error = caught.value
    return error.status, error.code, error.param, error.message.replace(f"`{model}`", "`MODEL`")


async def test_what_is_not_yours_is_refused_in_the_words_for_what_does_not_exist(
    registry: Registry, retention: Retention, base: None, database: Database, acme: Principal
) -> None:
    globex = await make_tenant(database, "globex")
    await publish(registry, globex, "sql")
    await publish(registry, acme, "gone")
    await retention.delete_adapter("acme", "gone", actor_key_id=acme.key_id)
    await publish(registry, acme, "bad", verdict=FAILED)
    unknown = await refusal(registry, acme, "no-such-model")
    for model in (
        "globex-sql",
        "globex-sql@1",
        "acme-gone",
        "acme-gone@1",
        "acme-bad",
        "acme-bad@1",
        "tiny-base@latest",
        "tiny-base@1",
        "acme-bad@",
        "@",
        "@latest",
        "",
        "a@b@c",
        "acme-bad@" + "9" * 50,
        "x" * 10_000,
    ):
        expected = unknown if len(model) < 300 else unknown[:3]
        assert (await refusal(registry, acme, model))[: len(expected)] == expected


@pytest.mark.parametrize("model", ["nul\x00", "lone \ud800 surrogate", "tab\t"])
async def test_a_name_that_no_name_can_be_is_not_found(
    registry: Registry, base: None, acme: Principal, model: str
) -> None:
    with pytest.raises(ModelNotFound) as caught:
        await registry.resolve(acme, model)
    caught.value.message.encode()


async def test_an_operator_is_no_tenant_and_calls_no_model(
    registry: Registry, base: None, acme: Principal
) -> None:
    operator = dataclasses.replace(
        acme, tenant_id=None, tenant_slug=None, scopes=frozenset({"operator"})
    )
    with pytest.raises(ModelNotFound):
        await registry.resolve(operator, "tiny-base")
    assert await registry.list_models(operator) == []


async def test_the_list_has_base_models_and_own_adapters(
    registry: Registry, base: None, database: Database, acme: Principal
) -> None:
    globex = await make_tenant(database, "globex")
    await publish(registry, globex, "sql")
    await publish(registry, acme, "triage")
    await publish(registry, acme, "sql", digest="e")
    await publish(registry, acme, "bad", verdict=FAILED)
    entries = await registry.list_models(acme)
    assert [(e.id, e.owned_by, e.version_number) for e in entries] == [
        ("Tiny-Base", "manylora", None),
        ("acme-sql", "acme", 1),
        ("acme-triage", "acme", 1),
    ]
    for entry in entries:
        target = await registry.resolve(acme, entry.id)
        assert target.version_digest == entry.version_digest


# Base models.


async def test_registering_again_changes_nothing(registry: Registry, database: Database) -> None:
    first = await registry.register_base_model(INFO, ADDRESS)
    second = await registry.register_base_model(INFO, ADDRESS)
    assert first.id == second.id
    [entry] = await BaseModels(database).entries()
    assert entry.replicas == [ADDRESS]
    async with database.as_worker() as session:
        assert len((await session.scalars(select(PriceVersion))).all()) == 1


async def test_gateways_that_start_at_once_agree(registry: Registry) -> None:
    rows = await asyncio.gather(*(registry.register_base_model(INFO, ADDRESS) for _ in range(4)))
    assert len({row.id for row in rows}) == 1


async def test_a_name_that_stands_for_another_model_is_refused(
    registry: Registry, database: Database
) -> None:
    await registry.register_base_model(INFO, ADDRESS)
    other = msgspec.structs.replace(INFO, base_digest="e" * 64)
    with pytest.raises(Conflict, match="--served-model-name"):
        await registry.register_base_model(other, ADDRESS)
    same_but_for_case = msgspec.structs.replace(other, base_model="TINY-base")
    with pytest.raises(Conflict, match="tiny-base"):
        await registry.register_base_model(same_but_for_case, ADDRESS)
    assert len(await BaseModels(database).entries()) == 1


async def test_an_engine_that_starts_with_other_limits_is_believed(
    registry: Registry, acme: Principal
) -> None:
    await registry.register_base_model(INFO, ADDRESS)
    await registry.register_base_model(msgspec.structs.replace(INFO, max_model_len=64), ADDRESS)
    assert (await registry.resolve(acme, "tiny-base")).context_length == 64


async def test_what_no_engine_serves_any_more_is_not_offered(
    registry: Registry, base: None, acme: Principal
) -> None:
    await publish(registry, acme, "sql")
    other = msgspec.structs.replace(INFO, base_model="other", base_digest="e" * 64)
    await registry.register_base_model(other, ADDRESS)
    assert [entry.id for entry in await registry.list_models(acme)] == ["other"]
    for model in ("tiny-base", "acme-sql"):
        with pytest.raises(ModelNotFound):
            await registry.resolve(acme, model)
    with pytest.raises(Conflict, match="No engine serves"):
        await publish(registry, acme, "sql", digest="e")


async def test_the_base_model_must_be_named_where_several_are_served(
    registry: Registry, base: None, acme: Principal
) -> None:
    other = msgspec.structs.replace(INFO, base_model="other", base_digest="e" * 64)
    await registry.register_base_model(other, "unix:/other")
    destination = await registry.destination("acme", "sql")
    with pytest.raises(InvalidRequest, match="Tiny-Base, other"):
        await registry.base_model_for(destination, None)
    assert (await registry.base_model_for(destination, "other")).name == "other"


async def test_before_any_engine_has_started_there_is_nothing_to_upload_for(
    registry: Registry, acme: Principal
) -> None:
    with pytest.raises(Unavailable):
        await publish(registry, acme, "sql")


@pytest.mark.parametrize("name", ["", "a@b", "x" * 300, "line\nbreak"])
async def test_a_base_model_needs_a_name_that_can_be_called(registry: Registry, name: str) -> None:
    with pytest.raises(InvalidRequest):
        await registry.register_base_model(msgspec.structs.replace(INFO, base_model=name), ADDRESS)


# Adapters and versions.


async def test_two_adapters_that_spell_one_name_collide(
    registry: Registry, base: None, database: Database
) -> None:
    a, ab = await make_tenant(database, "a"), await make_tenant(database, "a-b")
    destination = await registry.destination("a-b", "c")
    await publish(registry, a, "b-c")
    with pytest.raises(Conflict, match="'a-b-c'"):
        await registry.destination("a-b", "c")
    # Too late to have seen it coming: both were on their way.
    contents = Contents("d" * 64, None, rank=1, num_modules=1, size_bytes=1)
    base_model = await registry.base_model_for(destination, None)
    with pytest.raises(Conflict, match="'a-b-c'"):
        await registry.create_version(
            destination, contents, base_model_id=base_model.id, actor_key_id=ab.key_id
        )
    assert (await registry.list_adapters("a-b")).items == []


async def test_an_adapter_cannot_take_a_base_models_name(
    registry: Registry, base: None, database: Database
) -> None:
    tiny = await make_tenant(database, "tiny")
    with pytest.raises(Conflict, match="'tiny-base'"):
        await publish(registry, tiny, "base")


async def test_a_base_model_cannot_take_an_adapters_name(
    registry: Registry, base: None, acme: Principal, database: Database
) -> None:
    await publish(registry, acme, "sql")
    with pytest.raises(Conflict, match="'acme-sql'"):
        await registry.register_base_model(
            msgspec.structs.replace(INFO, base_model="ACME-sql"), "unix:/other"
        )
    assert len(await BaseModels(database).entries()) == 1


@pytest.mark.parametrize("slug", ["", "-a", "a-", "A", "a_b", "a.b", "x" * 33, "ä", "a\n"])
async def test_a_bad_slug_is_refused_with_the_rule(
    registry: Registry, acme: Principal, slug: str
) -> None:
    with pytest.raises(InvalidRequest, match="adapter must be 1 to 32") as caught:
        await registry.destination("acme", slug)
    assert caught.value.param == "adapter"


@pytest.mark.parametrize("slug", ["nobody", "\x00", ""])
async def test_an_unknown_tenant_is_not_found(registry: Registry, slug: str) -> None:
    with pytest.raises(NotFound):
        await registry.destination(slug, "sql")


async def test_the_name_of_a_deleted_adapter_is_not_used_again(
    registry: Registry, retention: Retention, base: None, acme: Principal
) -> None:
    await publish(registry, acme, "sql")
    await retention.delete_adapter("acme", "sql", actor_key_id=acme.key_id)
    assert (await registry.list_adapters("acme")).items == []
    with pytest.raises(Conflict, match="deleted"):
        await publish(registry, acme, "sql", digest="e")
    with pytest.raises(NotFound):
        await retention.delete_adapter("acme", "sql", actor_key_id=acme.key_id)


async def test_latest_never_goes_back_to_an_older_version(
    registry: Registry, base: None, acme: Principal
) -> None:
    older = await publish(registry, acme, "sql", digest="d", verdict=FAILED)
    destination = await registry.destination("acme", "sql")
    base_model = await registry.base_model_for(destination, None)
    slow = await registry.create_version(
        destination,
        Contents("e" * 64, None, rank=1, num_modules=1, size_bytes=1),
        base_model_id=base_model.id,
        actor_key_id=acme.key_id,
    )
    await publish(registry, acme, "sql", digest="f")
    await registry.finish_version(slow.version.id, PASSED, actor_key_id=None)
    assert (await registry.get_adapter("acme", "sql")).aliases == {"latest": Meaning(3)}
    assert (await registry.resolve(acme, "acme-sql@2")).version_number == 2
    # And a verdict stands.
    await registry.finish_version(older, PASSED, actor_key_id=None)
    with pytest.raises(ModelNotFound):
        await registry.resolve(acme, "acme-sql@1")


async def test_a_closed_tenant_takes_no_adapters(
    registry: Registry, base: None, database: Database, acme: Principal
) -> None:
    async with database.as_worker() as session:
        (await session.get_one(Tenant, acme.tenant_id)).status = "closed"
    with pytest.raises(Conflict, match="closed"):
        await registry.destination("acme", "sql")


async def test_every_change_leaves_an_audit_row(
    registry: Registry, retention: Retention, base: None, database: Database, acme: Principal
) -> None:
    await publish(registry, acme, "sql")
    await retention.delete_adapter("acme", "sql", actor_key_id=acme.key_id)
    async with database.as_worker() as session:
        rows = (await session.scalars(select(AuditEntry).order_by(AuditEntry.number))).all()
    assert [(row.action, row.subject, row.actor_key_id) for row in rows] == [
        ("adapter.version.create", "acme-sql@1", acme.key_id),
        ("adapter.alias.follow", "acme-sql@latest", acme.key_id),
        ("adapter.version.ready", "acme-sql@1", acme.key_id),
        ("adapter.delete", "acme-sql", acme.key_id),
    ]
