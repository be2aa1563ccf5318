"""Find the rows of adapters and versions that operators name, and say so where there are none.

What the registry, the aliases, the grants and the retention ask alike. Changes nothing.
"""

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from gateway import tenants
from gateway.errors import InvalidRequest, NotFound
from gateway.tables import SLUG_PATTERN, Adapter, AdapterVersion

SLUG_RULE = (
    "1 to 32 of the characters a-z, 0-9 and '-', beginning and ending with a letter or a digit"
)
# A column of 32 bits holds a version's number.
MAX_NUMBER = 2**31 - 1
# Of lists that come in parts.
DEFAULT_PAGE, MAX_PAGE = 100, 1000

Item = TypeVar("Item")
Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Page(Generic[Item, Key]):
    """A part of a list, and after what the next one begins; None where nothing follows."""

    items: list[Item]
    next: Key | None

    @classmethod
    def of(cls, found: list[Item], *, limit: int, key: Callable[[Item], Key]) -> Self:
        """Make a page of what a query for one row more than `limit` found."""
        items = found[:limit]
        return cls(items, key(items[-1]) if len(found) > limit else None)


def is_slug(name: str) -> bool:
    return re.fullmatch(SLUG_PATTERN, name) is not None


def check_slug(slug: str, *, field: str) -> None:
    """Raises InvalidRequest, naming the field and the rule."""
    if not is_slug(slug):
        raise InvalidRequest(f"{field} must be {SLUG_RULE}.", param=field)


async def find_adapter(
    session: AsyncSession, tenant_id: uuid.UUID, slug: str, *, for_update: bool = False
) -> Adapter | None:
    """The adapter, deleted or not."""
    query = select(Adapter).where(Adapter.tenant_id == tenant_id, Adapter.slug == slug)
    if for_update:
        query = query.with_for_update()
    return (await session.scalars(query)).one_or_none()


async def any_adapter(
    session: AsyncSession, tenant: str, slug: str, *, for_update: bool = False
) -> Adapter:
    """The adapter, deleted or not. Raises NotFound."""
    owner = await tenants.get_tenant(session, tenant)
    # PostgreSQL takes no NUL, and no slug has one.
    adapter = (
        await find_adapter(session, owner.id, slug, for_update=for_update)
        if is_slug(slug)
        else None
    )
    if adapter is None:
        raise _no_adapter(tenant, slug)
    return adapter


async def living_adapter(
    session: AsyncSession, tenant: str, slug: str, *, for_update: bool = False
) -> Adapter:
    """An adapter that is not deleted. Raises NotFound."""
    adapter = await any_adapter(session, tenant, slug, for_update=for_update)
    if adapter.deleted_at is not None:
        raise _no_adapter(tenant, slug)
    return adapter


async def any_version(session: AsyncSession, adapter: Adapter, number: int) -> AdapterVersion:
    """A version by its number, deleted or not. Raises NotFound."""
    query = select(AdapterVersion).where(
        AdapterVersion.adapter_id == adapter.id, AdapterVersion.number == number
    )
    # As it is now that the adapter's row is locked, where it is.
    query = query.execution_options(populate_existing=True)
    is_number = 0 < number <= MAX_NUMBER
    version = (await session.scalars(query)).one_or_none() if is_number else None
    if version is None:
        raise NotFound(
            f"The adapter {adapter.public_name!r} has no version {number}.", param="version"
        )
    return version


def _no_adapter(tenant: str, slug: str) -> NotFound:
    return NotFound(f"The tenant {tenant!r} has no adapter {slug!r}.", param="adapter")
