"""Customers: made, found, limited, suspended, closed. A slug is given once and for all.

Records nothing in the audit log: whoever knows the actor does.
"""

import re
import secrets
import uuid
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.errors import Conflict, InvalidRequest, NotFound
from gateway.tables import (
    SLUG_PATTERN,
    BaseModel,
    PublicName,
    Tenant,
    WithheldBaseModel,
    new_id,
)

Status = Literal["active", "suspended", "closed"]
# May a tenant call a base model by its own name? Its adapters answer either way.
Access = Literal["allowed", "withheld"]

MAX_NAME_LENGTH = 200
# Words that mean, or may come to mean, something else where a slug can stand: in paths and reports.
RESERVED_SLUGS = frozenset(
    {
        *("admin", "all", "api", "billing", "console", "docs", "health", "internal", "latest"),
        *("manylora", "me", "metrics", "none", "null", "operator", "public", "schema", "self"),
        *("static", "system", "v1"),
    }
)


async def create_tenant(session: AsyncSession, *, slug: str, name: str) -> Tenant:
    """Add a customer, as the worker. Raises InvalidRequest or Conflict."""
    _check_slug(slug)
    _check_name(name)
    named = await session.get(PublicName, slug)
    if named is not None and named.base_model_id is not None:
        raise Conflict(f"{slug!r} is the name of a base model; choose another.", param="slug")
    tenant = Tenant(id=new_id(), slug=slug, name=name, cache_salt=secrets.token_bytes(32))
    try:
        async with session.begin_nested():
            session.add(tenant)
    except IntegrityError as error:
        raise Conflict(
            f"There is, or was, a tenant {slug!r}; a slug is never used again.", param="slug"
        ) from error
    await session.refresh(tenant)
    return tenant


async def get_tenant(session: AsyncSession, slug: str, *, for_update: bool = False) -> Tenant:
    """Raises NotFound."""
    query = select(Tenant).where(Tenant.slug == slug)
    if for_update:
        query = query.with_for_update()
    # PostgreSQL takes no NUL, and no slug has one.
    is_slug = re.fullmatch(SLUG_PATTERN, slug) is not None
    tenant = (await session.scalars(query)).one_or_none() if is_slug else None
    if tenant is None:
        raise NotFound(f"There is no tenant {slug!r}.")
    return tenant


async def list_tenants(session: AsyncSession) -> list[Tenant]:
    """Every tenant, closed ones too, by slug."""
    return list((await session.scalars(select(Tenant).order_by(Tenant.slug))).all())


async def set_status(session: AsyncSession, slug: str, *, status: Status) -> Tenant:
    """Suspend a tenant, let it in again, or close it for ever. Raises NotFound or Conflict."""
    tenant = await get_tenant(session, slug, for_update=True)
    if tenant.status == "closed" and status != "closed":
        raise Conflict(f"The tenant {slug!r} is closed, and closed for good.", param="status")
    tenant.status = status
    await session.flush()
    return tenant


async def set_base_model_access(
    session: AsyncSession, tenant: Tenant, access: Mapping[str, Access]
) -> None:
    """Withhold base models from a tenant, or allow them again; others stay. Raises NotFound."""
    for name, wanted in access.items():
        named = select(BaseModel.id).where(BaseModel.name == name)
        base_model_id = await session.scalar(named) if name.isprintable() else None
        if base_model_id is None:
            raise NotFound(f"There is no base model {name!r}.", param="base_model_access")
        row = {"tenant_id": tenant.id, "base_model_id": base_model_id}
        if wanted == "withheld":
            await session.execute(insert(WithheldBaseModel).values(row).on_conflict_do_nothing())
        else:
            await session.execute(delete(WithheldBaseModel).filter_by(**row))


async def withheld_base_models(session: AsyncSession) -> dict[uuid.UUID, list[str]]:
    """The names of what is withheld, by tenant."""
    query = (
        select(WithheldBaseModel.tenant_id, BaseModel.name)
        .join(BaseModel, BaseModel.id == WithheldBaseModel.base_model_id)
        .order_by(BaseModel.name)
    )
    withheld = defaultdict(list)
    for tenant_id, name in await session.execute(query):
        withheld[tenant_id].append(name)
    return withheld


def _check_slug(slug: str) -> None:
    if re.fullmatch(SLUG_PATTERN, slug) is None:
        raise InvalidRequest(
            "slug must be 1 to 32 of the characters a-z, 0-9 and '-', beginning and ending with a"
            " letter or a digit.",
            param="slug",
        )
    if slug in RESERVED_SLUGS:
        raise Conflict(f"The slug {slug!r} is reserved; choose another.", param="slug")


def _check_name(name: str) -> None:
    if not name.strip() or len(name) > MAX_NAME_LENGTH or "\x00" in name:
        raise InvalidRequest(
            f"name must be 1 to {MAX_NAME_LENGTH} characters, and not only spaces.", param="name"
        )
