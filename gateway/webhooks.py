"""Bring events to the URLs that operators configured: signed, retried, and nowhere private.

What is to be told is a row in `webhook_deliveries`, put there by the transaction that it tells of.
Any gateway takes rows that are due; a row is told at least once, so receivers go by its id. Knows
nothing of what events say.
"""

import asyncio
import contextlib
import datetime
import functools
import hmac
import ipaddress
import logging
import socket
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.addresses import Address, Network, is_within
from gateway.background import Background
from gateway.database import DATABASE_TROUBLE, Database
from gateway.errors import InvalidRequest, NotFound
from gateway.tables import Webhook, new_id

logger = logging.getLogger(__name__)

POLL_S = 2.0
MAX_BATCH = 20
TIMEOUT_S = 10.0
# Longer than one attempt can take: whoever took a row and died lets it go then.
LEASE = datetime.timedelta(seconds=60)
FIRST_BACKOFF_S = 5
MAX_BACKOFF_S = 3600
# With these pauses the last one comes after about eight hours.
MAX_ATTEMPTS = 18
MAX_URL_LENGTH = 2048
MAX_ERROR_LENGTH = 200
# IPv4 inside of IPv6, as translators on the way understand it.
NAT64 = ipaddress.ip_network("64:ff9b::/96")

TAKE = text("""
    UPDATE webhook_deliveries AS d SET
        num_attempts = d.num_attempts + 1, next_attempt_at = clock_timestamp() + :lease
    FROM webhooks AS w
    WHERE w.id = d.webhook_id AND d.id IN (
        SELECT id FROM webhook_deliveries
        WHERE state = 'waiting' AND next_attempt_at <= clock_timestamp()
        ORDER BY next_attempt_at
        LIMIT :max_batch
        FOR UPDATE SKIP LOCKED
    )
    RETURNING d.id, d.event, d.created_at, d.num_attempts, w.id AS webhook_id, w.url,
              w.pepper_version
""")

FINISH = text("""
    UPDATE webhook_deliveries SET
        state = :state, last_error = :last_error, next_attempt_at = clock_timestamp() + :pause
    WHERE id = :id AND state = 'waiting'
""")


class DeliveryFault(Exception):
    """An attempt failed; the message says why."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One attempt to be made."""

    id: uuid.UUID
    event: Mapping[str, Any]
    created_at: datetime.datetime
    num_attempts: int
    webhook_id: uuid.UUID
    url: str
    pepper_version: int


async def create_webhook(
    session: AsyncSession, *, tenant_id: uuid.UUID | None, url: str, pepper_version: int
) -> Webhook:
    """Add a webhook, as the worker. Raises InvalidRequest."""
    check_url(url, param="url")
    webhook = Webhook(id=new_id(), tenant_id=tenant_id, url=url, pepper_version=pepper_version)
    session.add(webhook)
    await session.flush()
    await session.refresh(webhook)
    return webhook


async def get_webhook(session: AsyncSession, webhook_id: uuid.UUID) -> Webhook:
    """Raises NotFound."""
    webhook = (await session.scalars(select(Webhook).filter_by(id=webhook_id))).one_or_none()
    if webhook is None:
        raise NotFound("There is no such webhook.")
    return webhook


def signature(secret: str, body: bytes, *, at_s: int) -> str:
    """`t=<unix seconds>,v1=<hex>`: HMAC-SHA256 over `<unix seconds>.<body>`."""
    digest = hmac.new(secret.encode(), f"{at_s}.".encode() + body, "sha256").hexdigest()
    return f"t={at_s},v1={digest}"


class Outbox(Background):
    """Mutable: the task that brings due deliveries to their webhooks, while used as a context.

    `allowed_networks` are private addresses that webhooks may have all the same.
    """

    def __init__(
        self,
        database: Database,
        peppers: Mapping[int, bytes],
        *,
        allowed_networks: Sequence[Network] = (),
    ) -> None:
        self._database = database
        self._peppers = dict(peppers)
        self._allowed_networks = tuple(allowed_networks)

    @property
    def newest_pepper_version(self) -> int:
        return max(self._peppers)

    def secret_of(self, webhook_id: uuid.UUID, *, pepper_version: int) -> str:
        """What a webhook's events are signed with; derived, so that nothing secret is stored."""
        pepper = self._peppers[pepper_version]
        return "whsec_" + hmac.digest(pepper, b"webhook " + webhook_id.bytes, "sha256").hex()

    async def deliver_due(self) -> int:
        """Attempt what is due, side by side; return how many attempts were made."""
        async with self._database.as_worker() as session:
            rows = await session.execute(TAKE, {"lease": LEASE, "max_batch": MAX_BATCH})
            due = [Delivery(**row) for row in rows.mappings()]
        await asyncio.gather(*(self._attempt(delivery) for delivery in due))
        return len(due)

    async def _run_forever(self) -> None:
        while True:
            try:
                num_attempts = await self.deliver_due()
            except DATABASE_TROUBLE as error:
                logger.warning("webhooks_not_read", extra={"reason": str(error)})
                num_attempts = 0
            if num_attempts < MAX_BATCH:
                await asyncio.sleep(POLL_S)

    async def _attempt(self, delivery: Delivery) -> None:
        reason = None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._send(delivery)
        except (DeliveryFault, httpx.HTTPError, OSError, KeyError) as error:
            # TimeoutError is an OSError; KeyError is a pepper that is no longer kept.
            reason = f"{type(error).__name__}: {error}"[:MAX_ERROR_LENGTH]
            logger.warning(
                "webhook_failed", extra={"delivery_id": str(delivery.id), "reason": reason}
            )
        is_last = delivery.num_attempts >= MAX_ATTEMPTS
        waits = "failed" if is_last else "waiting"
        async with self._database.as_worker() as session:
            await session.execute(
                FINISH,
                {
                    "id": delivery.id,
                    "state": "delivered" if reason is None else waits,
                    "last_error": reason,
                    "pause": pause_after(delivery.num_attempts),
                },
            )

    async def _send(self, delivery: Delivery) -> None:
        address = await find_address(delivery.url, allowed_networks=self._allowed_networks)
        body = msgspec.json.encode(
            {"id": str(delivery.id), "created_at": delivery.created_at, "data": delivery.event}
        )
        secret = self.secret_of(delivery.webhook_id, pepper_version=delivery.pepper_version)
        headers = {"x-manylora-delivery": str(delivery.id)}
        async with post_signed(
            delivery.url, body, address=address, secret=secret, headers=headers
        ) as response:
            # A redirect is an answer like any other that is no success.
            if not response.is_success:
                raise DeliveryFault(f"answered {response.status_code}")


async def find_address(url: str, *, allowed_networks: Sequence[Network]) -> Address:
    """An address of the URL's host that may be called. Raises DeliveryFault or OSError."""
    parsed = httpx.URL(url)
    port = parsed.port or {"http": 80, "https": 443}[parsed.scheme]
    found = await asyncio.get_running_loop().getaddrinfo(parsed.host, port, type=socket.SOCK_STREAM)
    for *_, where in found:
        address = ipaddress.ip_address(str(where[0]).partition("%")[0])
        if is_public(address) or is_within(address, allowed_networks):
            return address
    raise DeliveryFault("the host has no public address")


@contextlib.asynccontextmanager
async def post_signed(
    url: str, body: bytes, *, address: Address, secret: str, headers: Mapping[str, str]
) -> AsyncIterator[httpx.Response]:
    """POST JSON to an address that was checked, and to no other: no redirect is followed.

    How long that may take is the caller's to say. Raises httpx.HTTPError.
    """
    parsed = httpx.URL(url)
    sent = {
        # The name goes where it is looked at, the connection to the address that was checked.
        "host": parsed.netloc.decode(),
        "content-type": "application/json",
        "user-agent": "manylora",
        "x-manylora-signature": signature(secret, body, at_s=int(time.time())),
        **headers,
    }
    async with (
        httpx.AsyncClient(trust_env=False, verify=_tls(), timeout=TIMEOUT_S) as client,
        client.stream(
            "POST",
            parsed.copy_with(host=str(address)),
            content=body,
            headers=sent,
            extensions={"sni_hostname": parsed.host},
        ) as response,
    ):
        yield response


@functools.cache
def _tls() -> ssl.SSLContext:
    """Made once: reading the authorities that are trusted takes some 20 ms."""
    return httpx.create_ssl_context(trust_env=False)


def pause_after(num_attempts: int) -> datetime.timedelta:
    """Until the next attempt: five seconds at first, twice as long each time, an hour at most."""
    return datetime.timedelta(seconds=min(FIRST_BACKOFF_S * 2 ** (num_attempts - 1), MAX_BACKOFF_S))


def is_public(address: Address) -> bool:
    """Whether an address is one of the whole internet's, however it is written."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.sixtofour is not None or address.teredo is not None:
            return False
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified
    )


def check_url(url: str, *, param: str) -> None:
    """Raises InvalidRequest where nothing could be sent there."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host or len(url) > MAX_URL_LENGTH:
        raise InvalidRequest(f"{param} must be an http or https URL.", param=param)
    if parsed.userinfo or parsed.fragment:
        raise InvalidRequest(
            f"{param} must have neither a password nor a fragment: events are signed.", param=param
        )
