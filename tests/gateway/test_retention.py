"""Facts about going away: what can be restored, what cannot, and what is kept for the bills."""

import asyncio
import datetime
import uuid
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text, update

from adapters.store import ArtifactStore
from gateway.aliases import Aliases, Belief, Canary, Meaning
from gateway.auth import Principal
from gateway.blobs import Blobs
from gateway.database import Database
from gateway.errors import Conflict, ModelNotFound, NotFound
from gateway.grants import EVERYBODY, Grants
from gateway.journal import Opened, Settlement
from gateway.ledger import settle
from gateway.limits import admit
from gateway.prices import bill
from gateway.registry import Contents, Registry, Target, Verdict
from gateway.retention import Retention
from gateway.tables import (
    Adapter,
    AdapterVersion,
    AuditEntry,
    GatewayInstance,
    Table,
    UsageEvent,
    new_id,
)
from tests.gateway.admin_plane import ADDRESS, INFO
from tests.gateway.published import make_tenant, publish

INSTANCE = uuid.UUID(int=99)
MONTH = datetime.timedelta(days=30)
DAY = datetime.timedelta(days=1)
BUNDLE = "b" * 64
# Of a move that makes an alias.
PLAIN: dict[str, Any] = {"believed": Belief(), "is_forced": False, "reason": None}


@pytest.fixture
async def registry(database: Database) -> Registry:
    registry = Registry(database)
    await registry.register_base_model(INFO, ADDRESS)
    async with database.as_worker() as session:
        session.add(GatewayInstance(id=INSTANCE, host="here", epoch=1))
    return registry


@pytest.fixture
async def acme(database: Database, registry: Registry) -> Principal:
    return await make_tenant(database, "acme")


@pytest.fixture
def retention(database: Database, tmp_path: Path) -> Retention:
    return Retention(database, Blobs(database, ArtifactStore(tmp_path.as_uri())), purge_after=MONTH)


@pytest.fixture
def aliases(database: Database) -> Aliases:
    return Aliases(database)


def files_of(folder: Path, digest: str) -> list[Path]:
    """Where the store keeps an adapter; `digest` is one hexadecimal digit."""
    whole = digest * 64
    names = ("adapter_config.json", "adapter_model.safetensors")
    return [folder / "adapters" / whole[:2] / whole / name for name in names]


def file_of_bundle(folder: Path) -> Path:
    return folder / "text-bundles" / BUNDLE[:2] / BUNDLE / "text_bundle.msgpack"


def write(*paths: Path) -> None:
    """Store something; nobody here reads what it is."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"stored")


def are_there(paths: list[Path]) -> bool:
    assert len({path.exists() for path in paths}) == 1, "half an adapter is stored"
    return paths[0].exists()


async def begin(database: Database, principal: Principal, target: Target) -> Opened:
    """Admit a request, as `Inference.start` does."""
    request_id = new_id()
    admission = await admit(
        database,
        principal,
        target,
        request_id=request_id,
        endpoint="completions",
        prompt_tokens=1,
        max_tokens=1,
        gateway_instance_id=INSTANCE,
    )
    return Opened.of(
        principal,
        target,
        admission,
        endpoint="completions",
        is_streamed=True,
        prompt_tokens=1,
        sequence_ids=[1],
    )


async def end(database: Database, opened: Opened) -> None:
    charged = bill(opened.price, prompt_tokens=1, cached_tokens=0, completion_tokens=1)
    now = datetime.datetime.now(datetime.UTC)
    async with database.as_worker() as session:
        await settle(session, [Settlement(opened, "stop", now, charged)])


async def age(database: Database, table: type[Table], by: datetime.timedelta) -> None:
    """Let every deletion in a table have been so long ago."""
    assert table in (Adapter, AdapterVersion)
    async with database.as_worker() as session:
        moved = update(table).values(deleted_at=text("deleted_at - CAST(:by AS interval)"))
        await session.execute(moved, {"by": by})


async def version_row(database: Database, version_id: uuid.UUID) -> AdapterVersion:
    async with database.as_worker() as session:
        return await session.get_one(AdapterVersion, version_id)


async def number_of(registry: Registry, principal: Principal, name: str) -> int | None:
    return (await registry.resolve(principal, name)).version_number


# Adapters.


async def test_a_deleted_adapter_is_nobodys_and_comes_back_as_it_was(
    registry: Registry,
    retention: Retention,
    aliases: Aliases,
    database: Database,
    acme: Principal,
) -> None:
    globex = await make_tenant(database, "globex")
    for digest in "cd":
        await publish(registry, acme, "sql", digest=digest)
    await aliases.move("acme", "sql", "prod", to=Meaning(1), actor_key_id=acme.key_id, **PLAIN)
    await Grants(database).grant("acme", "sql", "globex", actor_key_id=acme.key_id)
    before = await registry.get_adapter("acme", "sql")
    await retention.delete_adapter("acme", "sql", actor_key_id=acme.key_id)
    for principal in (acme, globex):
        for name in ("acme-sql", "acme-sql@prod", "acme-sql@1"):
            with pytest.raises(ModelNotFound):
                await registry.resolve(principal, name)
        assert [each.id for each in await registry.list_models(principal)] == ["Tiny-Base"]
    [gone] = (await registry.list_adapters("acme", is_deleted=True)).items
    assert gone.adapter.deleted_at is not None
    await retention.restore_adapter("acme", "sql", actor_key_id=acme.key_id)
    after = await registry.get_adapter("acme", "sql")
    assert (after.aliases, after.adapter.deleted_at) == (before.aliases, None)
    assert await number_of(registry, acme, "acme-sql@prod") == 1
    assert await number_of(registry, globex, "acme-sql") == 2


async def test_what_is_not_deleted_is_neither_restored_nor_purged(
    registry: Registry, retention: Retention, acme: Principal
) -> None:
    await publish(registry, acme, "sql")
    for act in (retention.restore_adapter, retention.purge_adapter):
        with pytest.raises(Conflict, match="not deleted"):
            await act("acme", "sql", actor_key_id=acme.key_id)
        with pytest.raises(NotFound):
            await act("acme", "nothing", actor_key_id=acme.key_id)
    for act in (retention.restore_version, retention.purge_version):
        with pytest.raises(Conflict, match="not deleted"):
            await act("acme", "sql", 1, actor_key_id=acme.key_id)
        with pytest.raises(NotFound):
            await act("acme", "sql", 2, actor_key_id=acme.key_id)


async def test_purging_has_no_way_back_and_leaves_the_name_taken(
    registry: Registry, retention: Retention, database: Database, acme: Principal, tmp_path: Path
) -> None:
    write(*files_of(tmp_path, "c"))
    version_id = await publish(registry, acme, "sql", digest="c")
    await retention.delete_adapter("acme", "sql", actor_key_id=acme.key_id)
    assert are_there(files_of(tmp_path, "c"))
    await retention.purge_adapter("acme", "sql", actor_key_id=acme.key_id)
    assert not are_there(files_of(tmp_path, "c"))
    for act in (retention.restore_adapter, retention.purge_adapter):
        with pytest.raises(Conflict, match="purged"):
            await act("acme", "sql", actor_key_id=acme.key_id)
    with pytest.raises(Conflict, match="never used again"):
        await registry.destination("acme", "sql")
    with pytest.raises(ModelNotFound):
        await registry.resolve(acme, "acme-sql")
    tombstone = await version_row(database, version_id)
    assert (tombstone.number, tombstone.weights_digest) == (1, "c" * 64)
    assert tombstone.certificate is None
    assert tombstone.erased_at is not None


async def test_the_sweeper_purges_what_was_deleted_long_enough_ago(
    registry: Registry, retention: Retention, database: Database, acme: Principal, tmp_path: Path
) -> None:
    for adapter, digest in (("old", "c"), ("new", "d"), ("kept", "e")):
        write(*files_of(tmp_path, digest))
        await publish(registry, acme, adapter, digest=digest)
    await retention.delete_adapter("acme", "old", actor_key_id=acme.key_id)
    await age(database, Adapter, MONTH - DAY)
    assert await retention.sweep() == 0
    await age(database, Adapter, 2 * DAY)
    await retention.delete_adapter("acme", "new", actor_key_id=acme.key_id)
    assert await retention.sweep() == 1
    assert await retention.sweep() == 0
    assert [are_there(files_of(tmp_path, digest)) for digest in "cde"] == [False, True, True]
    await retention.restore_adapter("acme", "new", actor_key_id=acme.key_id)


async def test_sweepers_of_several_gateways_do_not_get_in_each_others_way(
    registry: Registry, retention: Retention, database: Database, acme: Principal
) -> None:
    for number in range(6):
        await publish(registry, acme, f"a{number}", digest=f"{number}")
        await retention.delete_adapter("acme", f"a{number}", actor_key_id=acme.key_id)
    await age(database, Adapter, 2 * MONTH)
    purged = await asyncio.gather(*(retention.sweep() for _ in range(3)))
    assert sum(purged) == 6
    async with database.as_worker() as session:
        query = select(AuditEntry.actor_key_id).where(AuditEntry.action == "adapter.purge")
        assert (await session.scalars(query)).all() == [None] * 6


# Versions.


async def test_latest_falls_back_when_its_version_is_deleted(
    registry: Registry, retention: Retention, aliases: Aliases, acme: Principal
) -> None:
    for digest in "cde":
        await publish(registry, acme, "sql", digest=digest)
    await retention.delete_version("acme", "sql", 3, actor_key_id=acme.key_id)
    assert await number_of(registry, acme, "acme-sql") == 2
    with pytest.raises(ModelNotFound):
        await registry.resolve(acme, "acme-sql@3")
    newest = (await aliases.history("acme", "sql", "latest")).items[0]
    assert newest.reason == "version 3 was deleted"
    # It comes back for those who name it; nobody is moved.
    await retention.restore_version("acme", "sql", 3, actor_key_id=acme.key_id)
    assert await number_of(registry, acme, "acme-sql@3") == 3
    assert await number_of(registry, acme, "acme-sql") == 2


async def test_the_last_version_that_can_be_called_is_not_deleted(
    registry: Registry, retention: Retention, acme: Principal
) -> None:
    await publish(registry, acme, "sql")
    with pytest.raises(Conflict, match="delete the adapter"):
        await retention.delete_version("acme", "sql", 1, actor_key_id=acme.key_id)
    assert await number_of(registry, acme, "acme-sql") == 1


async def test_a_version_that_an_alias_stands_for_is_not_deleted(
    registry: Registry, retention: Retention, aliases: Aliases, acme: Principal
) -> None:
    for digest in "cde":
        await publish(registry, acme, "sql", digest=digest)
    to = Meaning(1, Canary(2, 10))
    await aliases.move("acme", "sql", "prod", to=to, actor_key_id=acme.key_id, **PLAIN)
    for number in (1, 2):
        with pytest.raises(Conflict, match="alias 'prod'"):
            await retention.delete_version("acme", "sql", number, actor_key_id=acme.key_id)


async def test_no_alias_moves_or_rolls_back_to_a_deleted_version(
    registry: Registry, retention: Retention, aliases: Aliases, acme: Principal
) -> None:
    for digest in "cde":
        await publish(registry, acme, "sql", digest=digest)
    for revision, number in enumerate((1, 2)):
        facts = {**PLAIN, "believed": Belief(revision=revision)}
        to = Meaning(number)
        await aliases.move("acme", "sql", "prod", to=to, actor_key_id=acme.key_id, **facts)
    await retention.delete_version("acme", "sql", 1, actor_key_id=acme.key_id)
    facts = {**PLAIN, "believed": Belief(revision=2)}
    with pytest.raises(Conflict, match="Version 1 was deleted"):
        await aliases.move("acme", "sql", "prod", to=Meaning(1), actor_key_id=acme.key_id, **facts)
    with pytest.raises(Conflict, match="Version 1 was deleted"):
        await aliases.rollback(
            "acme",
            "sql",
            "prod",
            to_revision=None,
            believed=Belief(),
            reason=None,
            actor_key_id=acme.key_id,
        )


async def test_numbers_are_not_used_again_and_contents_can_be(
    registry: Registry, retention: Retention, acme: Principal
) -> None:
    for digest in "cd":
        await publish(registry, acme, "sql", digest=digest)
    await retention.delete_version("acme", "sql", 2, actor_key_id=acme.key_id)
    # The same bytes again are a new version, because the other one is gone.
    await publish(registry, acme, "sql", digest="d")
    assert await number_of(registry, acme, "acme-sql") == 3
    await retention.restore_version("acme", "sql", 2, actor_key_id=acme.key_id)
    await publish(registry, acme, "sql", digest="d")
    _, page = await registry.list_versions("acme", "sql")
    assert [version.number for version in page.items] == [3, 2, 1]
    await retention.delete_version("acme", "sql", 2, actor_key_id=acme.key_id)
    await retention.purge_version("acme", "sql", 2, actor_key_id=acme.key_id)
    await publish(registry, acme, "sql", digest="e")
    assert await number_of(registry, acme, "acme-sql") == 4


async def test_a_verdict_on_a_deleted_version_moves_nobody(
    registry: Registry, retention: Retention, acme: Principal
) -> None:
    for digest in "cd":
        await publish(registry, acme, "sql", digest=digest)
    destination = await registry.destination("acme", "sql")
    base_model = await registry.base_model_for(destination, None)
    slow = await registry.create_version(
        destination,
        Contents("e" * 64, None, rank=1, num_modules=1, size_bytes=1),
        base_model_id=base_model.id,
        actor_key_id=acme.key_id,
    )
    await retention.delete_version("acme", "sql", 3, actor_key_id=acme.key_id)
    assert await registry.versions_in_probe(base_model.id) == []
    await registry.finish_version(slow.version.id, Verdict({}, []), actor_key_id=None)
    assert await number_of(registry, acme, "acme-sql") == 2
    with pytest.raises(ModelNotFound):
        await registry.resolve(acme, "acme-sql@3")


# What is in use.


async def test_a_running_request_keeps_its_version_and_its_bill_names_it(
    registry: Registry,
    retention: Retention,
    aliases: Aliases,
    database: Database,
    acme: Principal,
    tmp_path: Path,
) -> None:
    write(*files_of(tmp_path, "c"))
    for digest in "cd":
        await publish(registry, acme, "sql", digest=digest)
    await aliases.move("acme", "sql", "prod", to=Meaning(1), actor_key_id=acme.key_id, **PLAIN)
    target = await registry.resolve(acme, "acme-sql@prod")
    opened = await begin(database, acme, target)
    facts = {**PLAIN, "believed": Belief(number=1)}
    await aliases.move("acme", "sql", "prod", to=Meaning(2), actor_key_id=acme.key_id, **facts)
    await retention.delete_version("acme", "sql", 1, actor_key_id=acme.key_id)
    with pytest.raises(Conflict, match="in use"):
        await retention.purge_version("acme", "sql", 1, actor_key_id=acme.key_id)
    await age(database, AdapterVersion, 2 * MONTH)
    assert await retention.sweep() == 0
    assert are_there(files_of(tmp_path, "c"))
    await end(database, opened)
    assert await retention.sweep() == 1
    assert not are_there(files_of(tmp_path, "c"))
    async with database.as_worker() as session:
        event = await session.get_one(UsageEvent, opened.request_id)
        version = await session.get_one(AdapterVersion, event.adapter_version_id)
    assert (version.number, version.version_digest) == (1, event.version_digest)
    assert event.version_digest == target.version_digest


async def test_an_adapter_is_not_purged_under_a_grantees_request(
    registry: Registry, retention: Retention, database: Database, acme: Principal
) -> None:
    globex = await make_tenant(database, "globex")
    await publish(registry, acme, "sql")
    await Grants(database).grant("acme", "sql", EVERYBODY, actor_key_id=acme.key_id)
    opened = await begin(database, globex, await registry.resolve(globex, "acme-sql"))
    await retention.delete_adapter("acme", "sql", actor_key_id=acme.key_id)
    with pytest.raises(Conflict, match="in use"):
        await retention.purge_adapter("acme", "sql", actor_key_id=acme.key_id)
    await age(database, Adapter, 2 * MONTH)
    assert await retention.sweep() == 0
    await end(database, opened)
    await retention.purge_adapter("acme", "sql", actor_key_id=acme.key_id)


# The bytes.


async def test_bytes_stay_while_any_tenants_version_needs_them(
    registry: Registry, retention: Retention, database: Database, acme: Principal, tmp_path: Path
) -> None:
    globex = await make_tenant(database, "globex")
    write(*files_of(tmp_path, "c"))
    owners = ((acme, "sql"), (acme, "copy"), (globex, "sql"))
    for owner, adapter in owners:
        await publish(registry, owner, adapter, digest="c")
    for owner, adapter in owners:
        assert are_there(files_of(tmp_path, "c"))
        assert owner.tenant_slug is not None
        await retention.delete_adapter(owner.tenant_slug, adapter, actor_key_id=owner.key_id)
        await retention.purge_adapter(owner.tenant_slug, adapter, actor_key_id=owner.key_id)
    assert not are_there(files_of(tmp_path, "c"))
    async with database.as_worker() as session:
        erased = (await session.scalars(select(AdapterVersion.erased_at))).all()
    assert len(erased) == 3
    assert None not in erased


async def test_a_text_bundle_goes_with_the_last_version_that_speaks_through_it(
    registry: Registry, retention: Retention, acme: Principal, tmp_path: Path
) -> None:
    write(file_of_bundle(tmp_path), *files_of(tmp_path, "c"), *files_of(tmp_path, "d"))
    for adapter, digest in (("one", "c"), ("two", "d")):
        await publish(registry, acme, adapter, digest=digest, text_bundle_digest=BUNDLE)
    for adapter, is_left in (("one", True), ("two", False)):
        await retention.delete_adapter("acme", adapter, actor_key_id=acme.key_id)
        await retention.purge_adapter("acme", adapter, actor_key_id=acme.key_id)
        assert file_of_bundle(tmp_path).exists() == is_left


async def test_what_the_store_refuses_to_erase_is_tried_again(
    registry: Registry, retention: Retention, database: Database, acme: Principal, tmp_path: Path
) -> None:
    version_id = await publish(registry, acme, "sql", digest="c")
    # A folder where a file should be: the store cannot remove it.
    [config, _] = files_of(tmp_path, "c")
    config.mkdir(parents=True)
    await retention.delete_adapter("acme", "sql", actor_key_id=acme.key_id)
    await retention.purge_adapter("acme", "sql", actor_key_id=acme.key_id)
    row = await version_row(database, version_id)
    assert (row.purged_at is not None, row.erased_at) == (True, None)
    config.rmdir()
    write(*files_of(tmp_path, "c"))
    await retention.sweep()
    assert not are_there(files_of(tmp_path, "c"))
    assert (await version_row(database, version_id)).erased_at is not None


async def test_every_change_leaves_an_audit_row(
    registry: Registry, retention: Retention, database: Database, acme: Principal
) -> None:
    for digest in "cd":
        await publish(registry, acme, "sql", digest=digest)
    for act in (retention.delete_version, retention.restore_version, retention.delete_version):
        await act("acme", "sql", 1, actor_key_id=acme.key_id)
    await retention.purge_version("acme", "sql", 1, actor_key_id=acme.key_id)
    for change in (retention.delete_adapter, retention.restore_adapter, retention.delete_adapter):
        await change("acme", "sql", actor_key_id=acme.key_id)
    await retention.purge_adapter("acme", "sql", actor_key_id=acme.key_id)
    async with database.as_worker() as session:
        query = select(AuditEntry).order_by(AuditEntry.number)
        rows = [row for row in await session.scalars(query) if row.actor_key_id == acme.key_id]
    assert [(row.action.removeprefix("adapter."), row.subject) for row in rows][6:] == [
        ("version.delete", "acme-sql@1"),
        ("version.restore", "acme-sql@1"),
        ("version.delete", "acme-sql@1"),
        ("version.purge", "acme-sql@1"),
        ("delete", "acme-sql"),
        ("restore", "acme-sql"),
        ("delete", "acme-sql"),
        ("purge", "acme-sql"),
    ]
