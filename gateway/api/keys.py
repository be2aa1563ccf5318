"""/v1/keys: an owner's own keys.

Nobody can make, renew or end a key that may do more than the one that asks.
"""

import datetime
import uuid
from typing import Annotated

import msgspec
from litestar import delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from sqlalchemy.ext.asyncio import AsyncSession

from gateway import audit, auth
from gateway.auth import ROLES, Authenticator, Principal
from gateway.database import Database
from gateway.errors import NotAllowed
from gateway.tables import ApiKey

TAGS = ["keys"]

# A day is a comfortable time to roll a new secret out in.
DEFAULT_OVERLAP_S = 86_400
Overlap = Annotated[int, msgspec.Meta(ge=0, le=int(auth.MAX_OVERLAP.total_seconds()))]


class NewKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key to be: with a role, or with scopes named one by one, or a developer's."""

    name: str
    role: str | None = None
    # `priority`, which is in no role, lets a key ask for the service tier of that name.
    scopes: list[str] | None = None
    expires_at: datetime.datetime | None = None
    # Names of models, in which * stands for anything; all where it is left out.
    allowed_models: list[str] | None = None
    # Addresses and ranges in CIDR notation; all where it is left out.
    ip_ranges: list[str] | None = None


class Rotation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For how long the old secret stays good beside the new one."""

    overlap_s: Overlap = DEFAULT_OVERLAP_S


class KeyView(msgspec.Struct, frozen=True):
    """A key, without its secret. `prefix` is how the key begins."""

    id: uuid.UUID
    prefix: str
    name: str
    # Null where its scopes were named one by one.
    role: str | None
    scopes: list[str]
    allowed_models: list[str] | None
    ip_ranges: list[str] | None
    created_at: datetime.datetime
    expires_at: datetime.datetime | None
    revoked_at: datetime.datetime | None
    # To the minute.
    last_used_at: datetime.datetime | None
    # Until when the secret before the last rotation is good.
    old_secret_expires_at: datetime.datetime | None

    @classmethod
    def of(cls, row: ApiKey) -> "KeyView":
        return cls(
            id=row.id,
            prefix=f"ml_{row.public_id}",
            name=row.name,
            role=row.role,
            scopes=row.scopes,
            allowed_models=row.allowed_models,
            ip_ranges=row.ip_ranges,
            created_at=row.created_at,
            expires_at=row.expires_at,
            revoked_at=row.revoked_at,
            last_used_at=row.last_used_at,
            old_secret_expires_at=row.previous_expires_at,
        )


class KeyMade(KeyView, frozen=True):
    """A key with its secret. `key` is told here and never again."""

    key: str

    @classmethod
    def with_secret(cls, row: ApiKey, plain: str) -> "KeyMade":
        return cls(**msgspec.structs.asdict(KeyView.of(row)), key=plain)


class KeyList(msgspec.Struct, frozen=True):
    """A tenant's keys, revoked ones too, oldest first."""

    data: list[KeyView]


@get("/v1/keys", scope="keys", tags=TAGS, summary="List your tenant's keys")
async def list_keys(
    principal: NamedDependency[Principal], database: NamedDependency[Database]
) -> KeyList:
    async with database.as_worker() as session:
        rows = await auth.list_keys(session, tenant_id=_tenant_of(principal))
    return KeyList([KeyView.of(row) for row in rows])


@post("/v1/keys", scope="keys", tags=TAGS, summary="Create a key")
async def create_key(
    data: JSONBody[NewKey],
    principal: NamedDependency[Principal],
    database: NamedDependency[Database],
    authenticator: NamedDependency[Authenticator],
) -> KeyMade:
    """It may do no more than the key that asks: what is left out is as narrow as that one."""
    narrowed = _narrow(data, principal)
    async with database.as_worker() as session:
        row, plain = await authenticator.issue_key(
            session, tenant_id=_tenant_of(principal), **msgspec.structs.asdict(narrowed)
        )
        _check_reach(row, principal)
        await audit.record(
            session,
            tenant_id=row.tenant_id,
            actor_key_id=principal.key_id,
            action="key.create",
            subject=row.public_id,
            details=describe(row),
        )
    return KeyMade.with_secret(row, plain)


@post("/v1/keys/{key_id:uuid}/rotate", scope="keys", tags=TAGS, summary="Give a key a new secret")
async def rotate_key(
    key_id: FromPath[uuid.UUID],
    data: JSONBody[Rotation],
    principal: NamedDependency[Principal],
    database: NamedDependency[Database],
    authenticator: NamedDependency[Authenticator],
) -> KeyMade:
    """It stays the same key, with its limits and budgets; its old secret ends after the overlap."""
    async with database.as_worker() as session:
        row = await auth.get_key(session, tenant_id=_tenant_of(principal), key_id=key_id)
        _check_reach(row, principal)
        plain = await renew(authenticator, session, row, data, actor_key_id=principal.key_id)
    return KeyMade.with_secret(row, plain)


@delete("/v1/keys/{key_id:uuid}", scope="keys", tags=TAGS, summary="Revoke a key")
async def revoke_key(
    key_id: FromPath[uuid.UUID],
    principal: NamedDependency[Principal],
    database: NamedDependency[Database],
) -> None:
    """It stops working within two seconds. Once more changes nothing."""
    async with database.as_worker() as session:
        row = await auth.get_key(session, tenant_id=_tenant_of(principal), key_id=key_id)
        _check_reach(row, principal)
        await auth.revoke_key(session, tenant_id=row.tenant_id, key_id=key_id)
        await audit.record(
            session,
            tenant_id=row.tenant_id,
            actor_key_id=principal.key_id,
            action="key.revoke",
            subject=row.public_id,
            details={"name": row.name},
        )


async def renew(
    authenticator: Authenticator,
    session: AsyncSession,
    row: ApiKey,
    rotation: Rotation,
    *,
    actor_key_id: uuid.UUID,
) -> str:
    """Rotate a key and write it down; return the key itself."""
    plain = await authenticator.renew_key(
        session, row, overlap=datetime.timedelta(seconds=rotation.overlap_s)
    )
    await audit.record(
        session,
        tenant_id=row.tenant_id,
        actor_key_id=actor_key_id,
        action="key.rotate",
        subject=row.public_id,
        details={"name": row.name, "overlap_s": rotation.overlap_s},
    )
    return plain


def describe(row: ApiKey) -> dict[str, object]:
    """What the audit log says of a new key."""
    return {
        "name": row.name,
        "role": row.role,
        "scopes": row.scopes,
        "expires_at": row.expires_at,
        "allowed_models": row.allowed_models,
        "ip_ranges": row.ip_ranges,
    }


def _tenant_of(principal: Principal) -> uuid.UUID:
    assert principal.tenant_id is not None, "operators' keys have not this scope"
    return principal.tenant_id


def _narrow(wanted: NewKey, principal: Principal) -> NewKey:
    """What is left out, filled by what the caller has itself."""
    scopes = wanted.scopes
    if wanted.role is None and scopes is None:
        scopes = sorted(principal.scopes & ROLES[auth.DEFAULT_ROLE]) or sorted(principal.scopes)
    return msgspec.structs.replace(
        wanted,
        scopes=scopes,
        expires_at=wanted.expires_at or principal.expires_at,
        allowed_models=(
            _list(principal.allowed_models)
            if wanted.allowed_models is None
            else wanted.allowed_models
        ),
        ip_ranges=_list(principal.ip_ranges) if wanted.ip_ranges is None else wanted.ip_ranges,
    )


def _list(values: tuple[str, ...] | None) -> list[str] | None:
    return None if values is None else list(values)


def _check_reach(row: ApiKey, principal: Principal) -> None:
    """Raise NotAllowed where a key may do what the caller's own may not."""
    for name, theirs, ours in (
        ("scopes", row.scopes, sorted(principal.scopes)),
        ("allowed_models", row.allowed_models, principal.allowed_models),
        ("ip_ranges", row.ip_ranges, principal.ip_ranges),
    ):
        if ours is not None and (theirs is None or not set(theirs) <= set(ours)):
            raise _beyond(name)
    if principal.expires_at is not None and (
        row.expires_at is None or row.expires_at > principal.expires_at
    ):
        raise _beyond("expires_at")


def _beyond(param: str) -> NotAllowed:
    return NotAllowed(f"The other key's {param} go beyond those of the key that asks.", param=param)
