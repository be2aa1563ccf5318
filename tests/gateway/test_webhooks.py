"""Facts about webhooks: what arrives, how it is signed, and where nothing is ever sent."""

import asyncio
import datetime
import ipaddress
import uuid
from collections.abc import AsyncIterator

import msgspec
import pytest
from sqlalchemy import select, update

from gateway import tenants, webhooks
from gateway.addresses import parse_networks
from gateway.database import Database
from gateway.errors import InvalidRequest
from gateway.tables import Webhook, WebhookDelivery, new_id
from gateway.webhooks import Outbox, is_public, pause_after, signature

PEPPERS = {1: b"p" * 32}
LOOPBACK = parse_networks(["127.0.0.0/8"], param="networks")


class Receiver:
    """A server that answers as it is told and remembers what came."""

    def __init__(self) -> None:
        self.status = "200 OK"
        self.heads: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.port = 0

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()[1:-1]
        fields = dict(line.lower().split(": ", 1) for line in head)
        self.heads.append(fields)
        self.bodies.append(await reader.readexactly(int(fields["content-length"])))
        answer = f"HTTP/1.1 {self.status}\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n"
        writer.write(answer.encode())
        await writer.drain()
        writer.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    async with await asyncio.start_server(receiver.take, "127.0.0.1", 0) as server:
        receiver.port = server.sockets[0].getsockname()[1]
        yield receiver


async def add(database: Database, url: str) -> Webhook:
    """A webhook with one event that waits for it."""
    async with database.as_worker() as session:
        tenant = await tenants.create_tenant(session, slug="acme", name="Acme")
        webhook = await webhooks.create_webhook(
            session, tenant_id=tenant.id, url=url, pepper_version=1
        )
        session.add(
            WebhookDelivery(
                id=new_id(),
                webhook_id=webhook.id,
                tenant_id=tenant.id,
                event={"type": "budget.threshold", "percent": 80},
            )
        )
    return webhook


async def delivery(database: Database) -> WebhookDelivery:
    async with database.as_worker() as session:
        return (await session.scalars(select(WebhookDelivery))).one()


async def test_an_event_arrives_signed_and_once(database: Database, receiver: Receiver) -> None:
    webhook = await add(database, f"http://localhost:{receiver.port}/hook?a=b")
    outbox = Outbox(database, PEPPERS, allowed_networks=LOOPBACK)
    assert await outbox.deliver_due() == 1
    assert await outbox.deliver_due() == 0
    [head], [body] = receiver.heads, receiver.bodies
    told = msgspec.json.decode(body)
    assert told["data"] == {"type": "budget.threshold", "percent": 80}
    assert told["id"] == head["x-manylora-delivery"]
    # The name is told, though the connection went to the address.
    assert head["host"] == f"localhost:{receiver.port}"
    signed = head["x-manylora-signature"]
    secret = outbox.secret_of(webhook.id, pepper_version=1)
    at_s = int(signed.removeprefix("t=").partition(",")[0])
    assert signed == signature(secret, body, at_s=at_s)
    assert signed != signature(secret, body + b" ", at_s=at_s)
    assert (await delivery(database)).state == "delivered"


@pytest.mark.parametrize("status", ["500 Oops", "302 Found", "404 Gone"])
async def test_what_is_no_success_is_tried_again_later(
    database: Database, receiver: Receiver, status: str
) -> None:
    await add(database, f"http://127.0.0.1:{receiver.port}/")
    outbox = Outbox(database, PEPPERS, allowed_networks=LOOPBACK)
    receiver.status = status
    assert await outbox.deliver_due() == 1
    row = await delivery(database)
    assert (row.state, row.num_attempts) == ("waiting", 1)
    assert row.last_error is not None
    assert status[:3] in row.last_error
    assert await outbox.deliver_due() == 0
    # One request: a redirect is not followed.
    assert len(receiver.heads) == 1
    receiver.status = "204 No Content"
    async with database.as_worker() as session:
        past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=1)
        await session.execute(update(WebhookDelivery).values(next_attempt_at=past))
    assert await outbox.deliver_due() == 1
    assert (await delivery(database)).state == "delivered"


async def test_after_many_attempts_it_is_given_up(database: Database) -> None:
    await add(database, "http://127.0.0.1:9/")
    async with database.as_worker() as session:
        await session.execute(
            update(WebhookDelivery).values(num_attempts=webhooks.MAX_ATTEMPTS - 1)
        )
    await Outbox(database, PEPPERS).deliver_due()
    assert (await delivery(database)).state == "failed"


async def test_no_private_address_is_called(database: Database, receiver: Receiver) -> None:
    await add(database, f"http://localhost:{receiver.port}/")
    await Outbox(database, PEPPERS).deliver_due()
    row = await delivery(database)
    assert row.state == "waiting"
    assert row.last_error is not None
    assert "no public address" in row.last_error
    assert receiver.heads == []


async def test_two_gateways_do_not_tell_the_same(database: Database, receiver: Receiver) -> None:
    await add(database, f"http://127.0.0.1:{receiver.port}/")
    outboxes = [Outbox(database, PEPPERS, allowed_networks=LOOPBACK) for _ in range(3)]
    assert sum(await asyncio.gather(*(each.deliver_due() for each in outboxes))) == 1
    assert len(receiver.heads) == 1


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.1"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1"),
        *("ff02::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001::1"),
    ],
)
def test_addresses_that_are_not_the_internets(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1"])
def test_addresses_of_the_internet(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    ["", "ftp://a.example", "/path", "https://", "https://u:p@a.example", "https://[::1", "x"],
)
async def test_a_url_that_cannot_be_is_refused(database: Database, url: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await add(database, url)
    assert refused.value.param == "url"


def test_secrets_differ_by_webhook_and_pepper(database: Database) -> None:
    outbox = Outbox(database, {1: b"p" * 32, 2: b"q" * 32})
    first, second = uuid.UUID(int=1), uuid.UUID(int=2)
    secrets = {
        outbox.secret_of(each, pepper_version=version)
        for each in (first, second)
        for version in (1, 2)
    }
    assert len(secrets) == 4


def test_pauses_grow_to_an_hour() -> None:
    pauses = [pause_after(number).total_seconds() for number in (1, 2, 3, 11, 18)]
    assert pauses == [5, 10, 20, 3600, 3600]
