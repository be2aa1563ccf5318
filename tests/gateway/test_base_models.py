"""Facts about the rows of base models and engines: what an operator let go of stays so."""

from dataclasses import replace

import msgspec
import pytest

from gateway.auth import Principal
from gateway.base_models import BaseModels
from gateway.database import Database
from gateway.errors import Conflict, ModelNotFound
from gateway.registry import Registry, Verdict
from tests.gateway.admin_plane import ADDRESS, INFO
from tests.gateway.published import make_tenant, publish

NEXT = msgspec.structs.replace(INFO, base_digest="e" * 64, engine_epoch=2)
NEXT_ADDRESS = "unix:/run/next.sock"


@pytest.fixture
def registry(database: Database) -> Registry:
    return Registry(database)


@pytest.fixture
def base_models(database: Database) -> BaseModels:
    return BaseModels(database)


@pytest.fixture
async def acme(database: Database, registry: Registry) -> Principal:
    """With an adapter on the base model that is served."""
    await registry.register_base_model(INFO, ADDRESS)
    acme = await make_tenant(database, "acme")
    await publish(registry, acme, "sql")
    return acme


async def retire(base_models: BaseModels, by: Principal) -> None:
    await base_models.retire(INFO.base_model, address=None, actor_key_id=by.key_id)


async def test_a_retired_base_model_is_not_brought_back_by_its_engine(
    registry: Registry, base_models: BaseModels, acme: Principal
) -> None:
    await retire(base_models, acme)
    for address in (ADDRESS, NEXT_ADDRESS):
        with pytest.raises(Conflict, match="is retired"):
            await registry.register_base_model(INFO, address)
    with pytest.raises(ModelNotFound, match="was retired"):
        await registry.resolve(acme, "acme-sql")
    await base_models.attach(INFO, ADDRESS, actor_key_id=acme.key_id)
    assert (await registry.resolve(acme, "acme-sql")).base_revision == 1
    await registry.register_base_model(INFO, ADDRESS)


async def test_that_a_base_model_was_retired_is_told_to_those_alone_who_could_call_it(
    registry: Registry, base_models: BaseModels, database: Database, acme: Principal
) -> None:
    globex = await make_tenant(database, "globex")
    await retire(base_models, acme)
    with pytest.raises(ModelNotFound) as told:
        await registry.resolve(globex, "acme-sql")
    with pytest.raises(ModelNotFound) as unknown:
        await registry.resolve(globex, "acme-abc")
    assert told.value.message.replace("acme-sql", "acme-abc") == unknown.value.message


async def test_an_engine_that_was_let_go_is_not_taken_for_a_new_one(
    registry: Registry, base_models: BaseModels, acme: Principal
) -> None:
    """Its digest may be the same as that of what took its place, and its weights others."""
    successor = msgspec.structs.replace(NEXT, base_digest=INFO.base_digest)
    await base_models.swap("tiny-base", successor, NEXT_ADDRESS, actor_key_id=acme.key_id)
    for _ in range(2):
        with pytest.raises(Conflict, match="was let go"):
            await registry.register_base_model(INFO, ADDRESS)
        await base_models.let_go(ADDRESS)
    await base_models.let_go(NEXT_ADDRESS)
    states = {row.address: (row.state, row.revision) for row in await base_models.engines()}
    assert states == {ADDRESS: ("gone", 1), NEXT_ADDRESS: ("serving", 2)}


async def test_a_request_means_one_revision(
    registry: Registry, base_models: BaseModels, acme: Principal
) -> None:
    longer = msgspec.structs.replace(NEXT, max_model_len=1024)
    before = await registry.resolve(acme, "acme-sql")
    await base_models.swap(INFO.base_model, longer, NEXT_ADDRESS, actor_key_id=acme.key_id)
    after = await registry.resolve(acme, "acme-sql")
    assert (before.base_revision, before.context_length) == (1, INFO.max_model_len)
    assert (after.base_revision, after.context_length) == (2, 1024)
    assert before.base_model_id == after.base_model_id
    assert before.weights_digest == after.weights_digest


async def test_a_fingerprint_holds_on_the_revision_that_was_probed(
    registry: Registry, base_models: BaseModels, acme: Principal
) -> None:
    """What is prepared of an adapter may follow from the base model's weights."""
    told = Verdict(certificate={"fingerprint": "1-float32-0"}, findings=[])
    await publish(registry, acme, "old", digest="a", verdict=told)
    assert (await registry.resolve(acme, "acme-old")).fingerprint == "1-float32-0"
    await base_models.swap(INFO.base_model, NEXT, NEXT_ADDRESS, actor_key_id=acme.key_id)
    assert (await registry.resolve(acme, "acme-old")).fingerprint is None
    await publish(registry, acme, "new", digest="b", verdict=replace(told, base_revision=2))
    assert (await registry.resolve(acme, "acme-new")).fingerprint == "1-float32-0"


async def test_one_engine_by_two_addresses_is_refused(
    base_models: BaseModels, acme: Principal
) -> None:
    with pytest.raises(Conflict, match=f"known already: as {ADDRESS}"):
        await base_models.attach(INFO, "http://localhost:9000", actor_key_id=acme.key_id)


async def test_engines_that_share_a_base_model_are_alike(
    registry: Registry, base_models: BaseModels, acme: Principal
) -> None:
    shorter = msgspec.structs.replace(INFO, max_model_len=64, engine_epoch=2)
    with pytest.raises(Conflict, match="tokens: 64, and the one at"):
        await base_models.attach(shorter, NEXT_ADDRESS, actor_key_id=acme.key_id)
    with pytest.raises(Conflict, match="start both alike"):
        await registry.register_base_model(shorter, NEXT_ADDRESS)
    assert (await registry.resolve(acme, "tiny-base")).context_length == INFO.max_model_len


async def test_a_base_model_can_be_named_by_its_id(
    base_models: BaseModels, acme: Principal
) -> None:
    [entry] = await base_models.entries()
    assert await base_models.name_of(str(entry.base_model.id)) == INFO.base_model
    assert await base_models.name_of(INFO.base_model.upper()) == INFO.base_model


async def test_a_host_that_starts_again_serves_what_it_is_told_to(
    registry: Registry, base_models: BaseModels, acme: Principal
) -> None:
    """Whatever its engines were before at the same addresses, or were let go."""
    elsewhere = msgspec.structs.replace(INFO, base_model="far", engine_epoch=9)
    await registry.register_base_model(elsewhere, "http://far:1")
    folder = ADDRESS.removesuffix("engine.sock")
    await base_models.swap(INFO.base_model, NEXT, NEXT_ADDRESS, actor_key_id=acme.key_id)
    await base_models.let_go(ADDRESS)
    await retire(base_models, acme)
    await base_models.expect(folder, {ADDRESS: INFO.base_model, f"{folder}2": "not known yet"})
    states = {row.address: (row.state, row.revision) for row in await base_models.engines()}
    assert states == {ADDRESS: ("serving", 2), "http://far:1": ("serving", 1)}
    assert (await registry.resolve(acme, "acme-sql")).base_revision == 2
    await registry.register_base_model(NEXT, ADDRESS)
