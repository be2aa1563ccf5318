"""The one namespace of everything that `model=` can say: a name is taken once and never freed.

Knows names and whose they are, nothing of what they mean.
"""

import uuid

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.errors import Conflict
from gateway.tables import PublicName


async def claim_name(
    session: AsyncSession,
    name: str,
    *,
    base_model_id: uuid.UUID | None = None,
    adapter_id: uuid.UUID | None = None,
) -> None:
    """Take a name for good, or find that it is ours already. Raises Conflict."""
    await session.execute(
        insert(PublicName)
        .values(name=name, base_model_id=base_model_id, adapter_id=adapter_id)
        .on_conflict_do_nothing()
    )
    owner = await session.get_one(PublicName, name)
    if (owner.base_model_id, owner.adapter_id) != (base_model_id, adapter_id):
        raise name_taken(name)


async def check_name_is_free(session: AsyncSession, name: str) -> None:
    """Raises Conflict."""
    if await session.get(PublicName, name) is not None:
        raise name_taken(name)


def name_taken(name: str) -> Conflict:
    return Conflict(f"The model name {name!r} is taken, and names are never used again.")
