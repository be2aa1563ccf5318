"""Who is calling: API keys, what they may do, and the guard in front of every route.

A key is `ml_<id>_<secret><checksum>`; only its HMAC under a pepper is stored. Every route names the
scope that it needs or says that it is public; one that says nothing answers nobody.
"""

import asyncio
import datetime
import fnmatch
import hashlib
import hmac
import logging
import re
import secrets
import string
import time
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from litestar import Litestar, Request
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.routes import HTTPRoute
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.addresses import (
    Address,
    FailedLookUps,
    Network,
    client_address,
    is_within,
    parse_networks,
)
from gateway.background import Background
from gateway.database import DATABASE_TROUBLE, Database
from gateway.errors import (
    Conflict,
    InvalidKey,
    InvalidRequest,
    NotAllowed,
    NotFound,
    Unavailable,
)
from gateway.tables import ApiKey, new_id

logger = logging.getLogger(__name__)

OPERATOR = "operator"
# What the people of a tenant do, and the scopes that each needs.
ROLES: Mapping[str, frozenset[str]] = {
    "owner": frozenset({"inference", "usage", "billing", "keys"}),
    "developer": frozenset({"inference", "usage"}),
    "billing": frozenset({"usage", "billing"}),
    "viewer": frozenset({"usage"}),
}
# Of a key that nobody chose a role or scopes for.
DEFAULT_ROLE = "developer"
# To be served before others. No role has it: operators give it to keys by name.
PRIORITY = "priority"
TENANT_SCOPES = ROLES["owner"] | {PRIORITY}
SCOPES = TENANT_SCOPES | {OPERATOR}
# What a route says that any key of a tenant may call.
ANY_TENANT = "tenant"
# Of the one pepper that an installation has; another one gets another number.
PEPPER_VERSION = 1
# What a route says that needs no key.
PUBLIC = "public"

# How long a revoked key may still pass where its notice was lost.
CACHE_S = 2.0
# A key that is shown in the second half of that is looked up anew before it ends, together with
# others, so that of the keys in use no request waits for that.
REFRESH_INTERVAL_S = 0.25
MAX_CACHED_KEYS = 10_000
MAX_NAME_LENGTH = 200
MAX_GLOBS = 64
MAX_GLOB_LENGTH = 128
# Long enough for the slowest roll-out of a new secret.
MAX_OVERLAP = datetime.timedelta(days=30)

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
ID_LENGTH = 12
# 62^43 is just above 2^256.
SECRET_LENGTH = 43
# 62^6 is above 2^32.
CHECKSUM_LENGTH = 6
KEY_FORMAT = re.compile(
    rf"(ml_([0-9A-Za-z]{{{ID_LENGTH}}})_[0-9A-Za-z]{{{SECRET_LENGTH}}})"
    rf"([0-9A-Za-z]{{{CHECKSUM_LENGTH}}})"
)

# The channel of the triggers on api_keys, tenants and policies.
CHANNEL = "api_keys"

# A key with its tenant, before any tenant is known: runs as the worker inside.
FIND_KEY = text("SELECT * FROM find_api_key(:public_id)")

FIND_KEYS = text("""
    SELECT found.* FROM unnest(CAST(:public_ids AS text[])) AS wanted (public_id)
    CROSS JOIN LATERAL find_api_key(wanted.public_id) AS found
""")

# Remember, once a minute at most, that a key was used.
TOUCH_KEY = text("SELECT touch_api_key(:key_id)")
TOUCH_INTERVAL = datetime.timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request comes from. An operator has no tenant."""

    key_id: uuid.UUID
    key_name: str
    tenant_id: uuid.UUID | None
    tenant_slug: str | None
    cache_salt: bytes
    scopes: frozenset[str]
    # Globs of public names, and ranges of addresses; None for all.
    allowed_models: tuple[str, ...] | None = None
    ip_ranges: tuple[str, ...] | None = None
    expires_at: datetime.datetime | None = None
    # Of the tenant's policy, another one after each change; None where it has none.
    policy_id: uuid.UUID | None = None

    def may_call(self, public_name: str) -> bool:
        """Whether this key may call a model of this name, in lower case."""
        return self.allowed_models is None or any(
            fnmatch.fnmatchcase(public_name, glob) for glob in self.allowed_models
        )

    @property
    def is_operator(self) -> bool:
        return OPERATOR in self.scopes


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that nobody has yet. `plain` is shown once and stored nowhere."""

    public_id: str
    plain: str


def new_key() -> NewKey:
    public_id = _random_text(ID_LENGTH)
    body = f"ml_{public_id}_{_random_text(SECRET_LENGTH)}"
    return NewKey(public_id, body + _checksum(body))


def public_id_of(plain: str) -> str | None:
    """The key's public id; None for what cannot be a key, a typo for example."""
    match = KEY_FORMAT.fullmatch(plain)
    if match is None or _checksum(match[1]) != match[3]:
        return None
    return match[2]


def fingerprint(plain: str, *, pepper: bytes) -> bytes:
    return hmac.digest(pepper, plain.encode(), "sha256")


async def create_key(
    session: AsyncSession,
    *,
    tenant_id: uuid.UUID | None,
    name: str,
    scopes: Iterable[str] | None,
    expires_at: datetime.datetime | None,
    pepper: bytes,
    pepper_version: int = PEPPER_VERSION,
    role: str | None = None,
    allowed_models: Sequence[str] | None = None,
    ip_ranges: Sequence[str] | None = None,
) -> tuple[ApiKey, str]:
    """Add a key, as the worker; return its row and the key itself, which cannot be had again.

    `tenant_id` None makes an operator's key. A tenant's key has the scopes of its role, or those
    that are named, or those of a developer. Raises InvalidRequest.
    """
    allowed = frozenset({OPERATOR}) if tenant_id is None else TENANT_SCOPES
    if tenant_id is not None and role is None and scopes is None:
        role = DEFAULT_ROLE
    granted = _scopes_of(role, scopes, allowed=allowed)
    _check_key(name, granted, allowed=allowed, expires_at=expires_at)
    _check_globs(allowed_models)
    if ip_ranges is not None:
        parse_networks(ip_ranges, param="ip_ranges")
    key = new_key()
    row = ApiKey(
        id=new_id(),
        public_id=key.public_id,
        tenant_id=tenant_id,
        name=name,
        secret_hmac=fingerprint(key.plain, pepper=pepper),
        pepper_version=pepper_version,
        scopes=sorted(granted),
        expires_at=expires_at,
        role=role,
        allowed_models=None if allowed_models is None else [g.lower() for g in allowed_models],
        ip_ranges=None if ip_ranges is None else list(ip_ranges),
    )
    session.add(row)
    await session.flush()
    await session.refresh(row)
    return row, key.plain


async def rotate_key(
    session: AsyncSession,
    row: ApiKey,
    *,
    overlap: datetime.timedelta,
    pepper: bytes,
    pepper_version: int = PEPPER_VERSION,
) -> str:
    """Give a key a new secret; the old one stays good for the overlap. Return the key itself.

    It stays the same key: its limits, budgets and usage go on. A secret that was still in an
    earlier overlap ends now. Raises InvalidRequest or Conflict.
    """
    if not datetime.timedelta() <= overlap <= MAX_OVERLAP:
        raise InvalidRequest(
            f"overlap_s must be 0 to {int(MAX_OVERLAP.total_seconds())}.", param="overlap_s"
        )
    now = datetime.datetime.now(datetime.UTC)
    if row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= now):
        raise Conflict("The key is revoked or has expired: make a new one.")
    row.previous_secret_hmac = row.secret_hmac
    row.previous_pepper_version = row.pepper_version
    row.previous_expires_at = now + overlap
    body = f"ml_{row.public_id}_{_random_text(SECRET_LENGTH)}"
    plain = body + _checksum(body)
    row.secret_hmac = fingerprint(plain, pepper=pepper)
    row.pepper_version = pepper_version
    await session.flush()
    return plain


async def list_keys(session: AsyncSession, *, tenant_id: uuid.UUID | None) -> list[ApiKey]:
    """A tenant's keys, or the operators'; oldest first, dead ones too."""
    of_tenant = ApiKey.tenant_id.is_not_distinct_from(tenant_id)
    return list((await session.scalars(select(ApiKey).where(of_tenant).order_by(ApiKey.id))).all())


async def get_key(
    session: AsyncSession, *, tenant_id: uuid.UUID | None, key_id: uuid.UUID
) -> ApiKey:
    """A tenant's key, or an operator's, locked for a change. Raises NotFound."""
    query = (
        select(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.tenant_id.is_not_distinct_from(tenant_id))
        .with_for_update()
    )
    row = (await session.scalars(query)).one_or_none()
    if row is None:
        raise NotFound("There is no such key.")
    return row


async def revoke_key(
    session: AsyncSession, *, tenant_id: uuid.UUID | None, key_id: uuid.UUID
) -> ApiKey:
    """End a key now. Once more changes nothing. Raises NotFound where the tenant has no such."""
    row = await get_key(session, tenant_id=tenant_id, key_id=key_id)
    if row.revoked_at is None:
        row.revoked_at = datetime.datetime.now(datetime.UTC)
        await session.flush()
    return row


class Authenticator(Background):
    """Turns `Authorization` headers into principals, remembering each for a moment.

    Used as a context it also hears of changes at once, and looks keys that are in use up before
    they are forgotten; without, `CACHE_S` is the bound.
    """

    def __init__(
        self,
        database: Database,
        peppers: Mapping[int, bytes],
        *,
        trusted_proxies: Sequence[Network] = (),
    ) -> None:
        self._database = database
        self._peppers = dict(peppers)
        self._trusted_proxies = tuple(trusted_proxies)
        self._failed = FailedLookUps()
        # SHA-256 of the whole key -> who it is; the oldest first.
        self._known: dict[bytes, _Known] = {}
        # Key's id -> the same, of keys that nobody shows.
        self._by_id: dict[uuid.UUID, _Known] = {}
        # Those of them that were shown late in their time: digest -> the key itself.
        self._ageing: dict[bytes, str] = {}
        # Grows with each change, so that an answer read before one is not remembered after it.
        self._num_changes = 0

    async def _run_forever(self) -> None:
        """Hear of changes, and know the keys in use anew before their time is over."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._database.listen(CHANNEL, self.forget))
            tasks.create_task(self._refresh_forever())

    def forget(self) -> None:
        """Look every key up anew from now on."""
        self._num_changes += 1
        self._known.clear()
        self._ageing.clear()
        self._by_id.clear()

    async def issue_key(
        self,
        session: AsyncSession,
        *,
        tenant_id: uuid.UUID | None,
        name: str,
        scopes: Iterable[str] | None,
        expires_at: datetime.datetime | None,
        role: str | None = None,
        allowed_models: Sequence[str] | None = None,
        ip_ranges: Sequence[str] | None = None,
    ) -> tuple[ApiKey, str]:
        """`create_key` under the newest pepper."""
        newest = max(self._peppers)
        return await create_key(
            session,
            tenant_id=tenant_id,
            name=name,
            scopes=scopes,
            expires_at=expires_at,
            role=role,
            allowed_models=allowed_models,
            ip_ranges=ip_ranges,
            pepper=self._peppers[newest],
            pepper_version=newest,
        )

    async def renew_key(
        self, session: AsyncSession, row: ApiKey, *, overlap: datetime.timedelta
    ) -> str:
        """`rotate_key` under the newest pepper."""
        newest = max(self._peppers)
        return await rotate_key(
            session,
            row,
            overlap=overlap,
            pepper=self._peppers[newest],
            pepper_version=newest,
        )

    def address_of(self, connection: ASGIConnection[Any, Any, Any, Any]) -> Address | None:
        """Where a request comes from, as far as it can be believed."""
        return client_address(
            connection.client.host if connection.client is not None else None,
            ",".join(connection.headers.getall("x-forwarded-for", [])),
            trusted_proxies=self._trusted_proxies,
        )

    async def authenticate(
        self, authorization: str | None, *, address: Address | None = None
    ) -> Principal:
        """Raises InvalidKey, NotAllowed where the tenant is not active or the key is not for this
        address, LimitReached where the address has guessed too often, or Unavailable.
        """
        known = await self._find(authorization, address)
        if known.networks is not None and not is_within(address, known.networks):
            raise NotAllowed("This key may not be used from this address.")
        return known.principal

    async def principal_of(self, key_id: uuid.UUID) -> Principal:
        """Who a key stands for, where nobody shows it: for what was begun with it and goes on.

        Raises InvalidKey, NotAllowed where its tenant is not active, or Unavailable.
        """
        known = self._by_id.get(key_id)
        if known is None or not known.is_fresh():
            num_changes = self._num_changes
            known = await self._look_up_by_id(key_id)
            if num_changes == self._num_changes:
                self._by_id[key_id] = known
        return known.principal

    async def _look_up_by_id(self, key_id: uuid.UUID) -> "_Known":
        self._by_id = {each: known for each, known in self._by_id.items() if known.is_fresh()}
        try:
            async with self._database.as_worker() as session:
                public_id = await session.scalar(
                    select(ApiKey.public_id).where(ApiKey.id == key_id)
                )
            rows = await self._database.call(FIND_KEY, {"public_id": public_id})
        except DATABASE_TROUBLE as error:
            raise Unavailable("Keys cannot be checked now; try again shortly.") from error
        if not rows:
            raise _invalid("The API key is not known here.")
        return _still_good(rows[0], ends_at=rows[0]["expires_at"])

    async def _find(self, authorization: str | None, address: Address | None) -> "_Known":
        plain = _bearer(authorization)
        public_id = public_id_of(plain)
        if public_id is None:
            raise _invalid("This is not an API key: check for typing errors.")
        digest = hashlib.sha256(plain.encode()).digest()
        known = self._known.get(digest)
        if known is not None and known.is_fresh():
            if known.is_ageing():
                self._ageing[digest] = plain
            return known
        self._failed.check(address)
        num_changes = self._num_changes
        try:
            known = await self._look_up(public_id, plain)
        except InvalidKey:
            self._failed.add(address)
            raise
        if num_changes == self._num_changes:
            self._remember(digest, known)
        return known

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_INTERVAL_S)
            try:
                if self._ageing:
                    await self._refresh()
            except DATABASE_TROUBLE as error:
                # What is known ends in its time, and whoever shows it then is told.
                logger.warning("keys_not_refreshed", extra={"reason": str(error)})

    async def _refresh(self) -> None:
        """Look all that age up in one round trip. Raises what is in DATABASE_TROUBLE."""
        ageing, self._ageing, num_changes = self._ageing, {}, self._num_changes
        ids = {digest: public_id_of(plain) for digest, plain in ageing.items()}
        rows = await self._database.call(FIND_KEYS, {"public_ids": list({*ids.values()})})
        if num_changes != self._num_changes:
            return
        found = {row["public_id"]: row for row in rows}
        for digest, plain in ageing.items():
            try:
                self._remember(digest, self._judge(found.get(ids[digest]), plain))
            except (InvalidKey, NotAllowed):
                # The next to show it is told why.
                self._known.pop(digest, None)
        for row in rows:
            await self._touch(row)

    async def _look_up(self, public_id: str, plain: str) -> "_Known":
        try:
            rows = await self._database.call(FIND_KEY, {"public_id": public_id})
            row = rows[0] if rows else None
            known = self._judge(row, plain)
            if row is not None:
                await self._touch(row)
        except DATABASE_TROUBLE as error:
            raise Unavailable("Keys cannot be checked now; try again shortly.") from error
        return known

    async def _touch(self, row: Mapping[str, Any]) -> None:
        if _is_long_unused(row["last_used_at"]):
            await self._database.call(TOUCH_KEY, {"key_id": row["id"]})

    def _judge(self, row: Mapping[str, Any] | None, plain: str) -> "_Known":
        now = datetime.datetime.now(datetime.UTC)
        # An unknown key takes as long as a known one, and both of its secrets are always compared.
        facts: Mapping[str, Any] = {} if row is None else row
        is_current = self._is_secret(
            plain, facts.get("secret_hmac"), pepper_version=facts.get("pepper_version")
        )
        is_previous = self._is_secret(
            plain,
            facts.get("previous_secret_hmac"),
            pepper_version=facts.get("previous_pepper_version"),
        )
        if row is None or not (is_current or is_previous):
            raise _invalid("The API key is not known here.")
        ends_at = row["expires_at"]
        if not is_current:
            if row["previous_expires_at"] <= now:
                raise _invalid("The API key was replaced by a newer one.")
            ends_at = min(filter(None, (ends_at, row["previous_expires_at"])))
        return _still_good(row, ends_at=ends_at)

    def _is_secret(
        self, plain: str, secret_hmac: bytes | None, *, pepper_version: int | None
    ) -> bool:
        pepper = self._peppers.get(pepper_version or 0, b"")
        found = fingerprint(plain, pepper=pepper)
        expected = secret_hmac if secret_hmac is not None and pepper else bytes(len(found))
        return hmac.compare_digest(found, expected)

    def _remember(self, digest: bytes, known: "_Known") -> None:
        # All live equally long, so the first to be remembered is the first to end.
        self._known.pop(digest, None)
        self._known[digest] = known
        now = time.monotonic()
        while (oldest := next(iter(self._known))) != digest and (
            self._known[oldest].until <= now or len(self._known) > MAX_CACHED_KEYS
        ):
            del self._known[oldest]


@dataclass(frozen=True, slots=True)
class _Known:
    principal: Principal
    networks: tuple[Network, ...] | None
    expires_at: datetime.datetime | None
    # On the monotonic clock.
    until: float

    def is_fresh(self) -> bool:
        if self.expires_at is not None and self.expires_at <= datetime.datetime.now(datetime.UTC):
            return False
        return time.monotonic() < self.until

    def is_ageing(self) -> bool:
        """Whether more than half of its time is over."""
        return time.monotonic() > self.until - CACHE_S / 2


def _still_good(row: Mapping[str, Any], *, ends_at: datetime.datetime | None) -> _Known:
    """What is known of a key that may be used. Raises InvalidKey or NotAllowed."""
    if row["revoked_at"] is not None:
        raise _invalid("The API key was revoked.")
    if row["expires_at"] is not None and row["expires_at"] <= datetime.datetime.now(datetime.UTC):
        raise _invalid("The API key has expired.")
    if row["tenant_id"] is not None and row["tenant_status"] != "active":
        raise NotAllowed(f"The tenant {row['tenant_slug']!r} is {row['tenant_status']}.")
    networks = (
        None if row["ip_ranges"] is None else parse_networks(row["ip_ranges"], param="ip_ranges")
    )
    return _Known(_principal(row), networks, ends_at, time.monotonic() + CACHE_S)


async def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Let through whoever has the scope that the route names. Raises InvalidKey or NotAllowed."""
    scope = handler.opt.get("scope")
    if scope == PUBLIC:
        return
    if scope not in SCOPES | {ANY_TENANT}:
        raise NotAllowed("This route answers nobody.")
    authenticator: Authenticator = connection.app.state.authenticator
    principal = await authenticator.authenticate(
        connection.headers.get("authorization"), address=authenticator.address_of(connection)
    )
    if scope == ANY_TENANT and principal.tenant_id is None:
        raise NotAllowed("This route is for keys of tenants.")
    if scope != ANY_TENANT and scope not in principal.scopes:
        raise NotAllowed(f"This key has not the scope {scope!r}, which this route needs.")
    connection.state.principal = principal


def caller_of(request: Request[Any, Any, Any]) -> Principal:
    """Whom the guard let in: only on routes that need a key."""
    principal = request.state.principal
    assert isinstance(principal, Principal)
    return principal


async def provide_principal(request: Request[Any, Any, Any]) -> Principal:
    """The caller, for handlers: only of routes that need a key."""
    return caller_of(request)


def check_routes(app: Litestar) -> None:
    """Refuse, at start, an application with a route that names no scope: it would answer nobody."""
    silent = sorted(
        f"{'/'.join(sorted(handler.http_methods))} {route.path}"
        for route in app.routes
        if isinstance(route, HTTPRoute)
        for handler in route.route_handlers
        # Litestar answers OPTIONS itself; the guard refuses it.
        if handler.http_methods != {"OPTIONS"}
        and handler.opt.get("scope") not in SCOPES | {PUBLIC, ANY_TENANT}
    )
    if silent:
        raise AssertionError(f"routes that name no scope: {', '.join(silent)}")


def _principal(row: Mapping[str, Any]) -> Principal:
    return Principal(
        key_id=row["id"],
        key_name=row["name"],
        tenant_id=row["tenant_id"],
        tenant_slug=row["tenant_slug"],
        cache_salt=row["cache_salt"] or b"",
        scopes=frozenset(row["scopes"]),
        allowed_models=None if row["allowed_models"] is None else tuple(row["allowed_models"]),
        ip_ranges=None if row["ip_ranges"] is None else tuple(row["ip_ranges"]),
        expires_at=row["expires_at"],
        policy_id=row["policy_id"],
    )


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise _invalid("Send an API key as `Authorization: Bearer ml_...`.")
    return key.strip()


def _invalid(message: str) -> InvalidKey:
    error = InvalidKey(message)
    error.headers["www-authenticate"] = "Bearer"
    return error


def _is_long_unused(last_used_at: datetime.datetime | None) -> bool:
    if last_used_at is None:
        return True
    return datetime.datetime.now(datetime.UTC) - last_used_at > TOUCH_INTERVAL


def _scopes_of(
    role: str | None, scopes: Iterable[str] | None, *, allowed: frozenset[str]
) -> frozenset[str]:
    if role is None:
        return allowed if scopes is None else frozenset(scopes)
    if scopes is not None:
        raise InvalidRequest("Give a role or scopes, not both.", param="scopes")
    if role not in ROLES or OPERATOR in allowed:
        raise InvalidRequest(
            f"role must be one of: {', '.join(ROLES)}; operators have none.", param="role"
        )
    return ROLES[role]


def _check_globs(globs: Sequence[str] | None) -> None:
    if globs is None:
        return
    if not 0 < len(globs) <= MAX_GLOBS or not all(
        0 < len(glob) <= MAX_GLOB_LENGTH and glob.isprintable() for glob in globs
    ):
        raise InvalidRequest(
            f"allowed_models must be 1 to {MAX_GLOBS} names, in which * stands for anything;"
            " leave it out for all models.",
            param="allowed_models",
        )


def _check_key(
    name: str,
    scopes: frozenset[str],
    *,
    allowed: frozenset[str],
    expires_at: datetime.datetime | None,
) -> None:
    if not name.strip() or len(name) > MAX_NAME_LENGTH or "\x00" in name:
        raise InvalidRequest(
            f"name must be 1 to {MAX_NAME_LENGTH} characters, and not only spaces.", param="name"
        )
    if not scopes or not scopes <= allowed:
        raise InvalidRequest(
            f"scopes must be one or more of: {', '.join(sorted(allowed))}.", param="scopes"
        )
    if expires_at is None:
        return
    if expires_at.tzinfo is None:
        raise InvalidRequest(
            "expires_at must name its time zone, such as 2030-01-01T00:00:00Z.", param="expires_at"
        )
    if expires_at <= datetime.datetime.now(datetime.UTC):
        raise InvalidRequest("expires_at must be in the future.", param="expires_at")


def _random_text(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def _checksum(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(CHECKSUM_LENGTH):
        number, digit = divmod(number, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits
