"""Tenants and versions for the tests of the registry and of what is around it, without uploads."""

import uuid

from gateway.auth import Principal
from gateway.database import Database
from gateway.registry import Contents, Registry, Verdict
from gateway.tables import ApiKey, Tenant, new_id

PASSED = Verdict(certificate={}, findings=[])
FAILED = Verdict(certificate={}, findings=[{"code": "probe_failed"}])


async def make_tenant(database: Database, slug: str) -> Principal:
    tenant = Tenant(id=new_id(), slug=slug, name=slug, cache_salt=bytes(16), status="active")
    key = ApiKey(
        id=new_id(),
        public_id=slug,
        tenant_id=tenant.id,
        name="test",
        secret_hmac=bytes(32),
        scopes=["inference", "usage"],
    )
    async with database.as_worker() as session:
        session.add(tenant)
        await session.flush()
        session.add(key)
    return Principal(
        key_id=key.id,
        key_name=key.name,
        tenant_id=tenant.id,
        tenant_slug=slug,
        cache_salt=tenant.cache_salt,
        scopes=frozenset(key.scopes),
    )


async def publish(
    registry: Registry,
    owner: Principal,
    adapter: str,
    *,
    digest: str = "d",
    verdict: Verdict = PASSED,
    text_bundle_digest: str | None = None,
) -> uuid.UUID:
    """Book a version and finish it; return its id. `digest` is one hexadecimal digit."""
    assert owner.tenant_slug is not None
    destination = await registry.destination(owner.tenant_slug, adapter)
    base_model = await registry.base_model_for(destination, None)
    published = await registry.create_version(
        destination,
        Contents(
            weights_digest=digest * 64,
            text_bundle_digest=text_bundle_digest,
            rank=4,
            num_modules=2,
            size_bytes=100,
        ),
        base_model_id=base_model.id,
        actor_key_id=owner.key_id,
    )
    await registry.finish_version(published.version.id, verdict, actor_key_id=owner.key_id)
    return published.version.id
