"""Facts about tenants: what they may be called, and that a name is given once."""

import pytest

from gateway import tenants
from gateway.database import Database
from gateway.errors import Conflict, InvalidRequest, NotFound
from gateway.tables import BaseModel, PublicName, new_id


async def test_a_tenant_is_found_by_its_slug(database: Database) -> None:
    async with database.as_worker() as session:
        made = await tenants.create_tenant(session, slug="acme", name="Acme Ltd")
    async with database.as_worker() as session:
        found = await tenants.get_tenant(session, "acme")
        assert (found.id, found.name, found.status) == (made.id, "Acme Ltd", "active")
        assert found.created_at.tzinfo is not None
        assert [tenant.slug for tenant in await tenants.list_tenants(session)] == ["acme"]
        with pytest.raises(NotFound, match="'globex'"):
            await tenants.get_tenant(session, "globex")


async def test_two_tenants_have_two_cache_salts(database: Database) -> None:
    async with database.as_worker() as session:
        made = [await tenants.create_tenant(session, slug=slug, name="x") for slug in ("a", "b")]
    assert len({tenant.cache_salt for tenant in made}) == 2
    assert all(len(tenant.cache_salt) == 32 for tenant in made)


async def test_a_slug_is_given_once_even_after_its_tenant_closed(database: Database) -> None:
    async with database.as_worker() as session:
        await tenants.create_tenant(session, slug="acme", name="Acme")
        await tenants.set_status(session, "acme", status="closed")
        with pytest.raises(Conflict, match="never used again"):
            await tenants.create_tenant(session, slug="acme", name="Another")
        # The caller's transaction is still of use.
        await tenants.create_tenant(session, slug="globex", name="Globex")


@pytest.mark.parametrize(
    "slug", ["", "-a", "a-", "A", "a_b", "a.b", "a/b", "a b", "é", "a\n", "a" * 33]
)
async def test_a_slug_that_breaks_the_rule_is_refused(database: Database, slug: str) -> None:
    async with database.as_worker() as session:
        with pytest.raises(InvalidRequest) as refused:
            await tenants.create_tenant(session, slug=slug, name="x")
    assert refused.value.param == "slug"


@pytest.mark.parametrize("name", ["", "  ", "x" * 201, "a\x00b"])
async def test_a_name_that_breaks_the_rule_is_refused(database: Database, name: str) -> None:
    async with database.as_worker() as session:
        with pytest.raises(InvalidRequest) as refused:
            await tenants.create_tenant(session, slug="acme", name=name)
    assert refused.value.param == "name"


async def test_a_reserved_slug_is_refused(database: Database) -> None:
    async with database.as_worker() as session:
        with pytest.raises(Conflict, match="reserved"):
            await tenants.create_tenant(session, slug="admin", name="x")


async def test_a_slug_that_is_a_base_models_name_is_refused(database: Database) -> None:
    async with database.as_worker() as session:
        base_model = BaseModel(
            id=new_id(),
            name="smol",
            digest="d",
            text_bundle_digest="t",
            shape={},
            context_length=1,
            vocab_size=1,
            max_lora_rank=1,
        )
        session.add(base_model)
        await session.flush()
        session.add(PublicName(name="smol", base_model_id=base_model.id))
        await session.flush()
        with pytest.raises(Conflict, match="base model"):
            await tenants.create_tenant(session, slug="smol", name="x")


async def test_a_closed_tenant_stays_closed(database: Database) -> None:
    async with database.as_worker() as session:
        await tenants.create_tenant(session, slug="acme", name="Acme")
        for status in ("suspended", "active", "closed", "closed"):
            tenant = await tenants.set_status(session, "acme", status=status)
            assert tenant.status == status
        with pytest.raises(Conflict, match="for good"):
            await tenants.set_status(session, "acme", status="active")
        with pytest.raises(NotFound):
            await tenants.set_status(session, "globex", status="active")
