"""Facts about names that a gateway has resolved before: it asks no more of them, and never errs.

What changes is changed by a stranger to the gateway's memory, as another gateway is.
"""

import asyncio
import contextlib
import datetime
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import msgspec
import pytest
from sqlalchemy import make_url, select

from adapters.store import ArtifactStore
from gateway.aliases import Aliases, Belief, Canary, Meaning, bucket_of
from gateway.auth import Authenticator, Principal
from gateway.blobs import Blobs
from gateway.database import Database
from gateway.errors import MeaningChanged, ModelNotFound
from gateway.grants import Grants
from gateway.limits import Admission, admit
from gateway.registry import Recollection, Registry
from gateway.retention import Retention
from gateway.tables import AdapterVersion, GatewayInstance, Hold, new_id
from tests.conftest import Home
from tests.engine.echo_engine import short_folder
from tests.gateway.published import make_tenant, publish
from tests.gateway.whole_gateway import MODEL, Gateway, whole_gateway

CHAT = "/v1/chat/completions"
SYNC = ord("S")


@dataclass(frozen=True)
class Stranger:
    """Who changes names without the gateway's knowledge, and the tenant whose they are."""

    registry: Registry
    aliases: Aliases
    retention: Retention
    grants: Grants
    store: ArtifactStore
    acme: Principal

    async def move(self, number: int, *, canary: Canary | None = None) -> None:
        entries = await self.aliases.list_aliases("acme", "sql")
        revision = next((each.revision for each in entries if each.alias == "prod"), None)
        await self.aliases.move(
            "acme",
            "sql",
            "prod",
            to=Meaning(number, canary),
            believed=Belief(revision),
            is_forced=False,
            reason=None,
            actor_key_id=self.acme.key_id,
        )


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with whole_gateway(home, database, tmp_path) as running:
        yield running


@pytest.fixture
async def stranger(gateway: Gateway, tmp_path: Path) -> Stranger:
    """With two versions of an adapter of acme's, of which the first is `prod`."""
    database, store = gateway.database, ArtifactStore((tmp_path / "store").as_uri())
    authenticator: Authenticator = gateway.app.state.authenticator
    stranger = Stranger(
        Registry(database),
        Aliases(database),
        Retention(database, Blobs(database, store), purge_after=datetime.timedelta(days=30)),
        Grants(database),
        store,
        await authenticator.authenticate(gateway.client.headers["authorization"]),
    )
    for digest in "de":
        await publish(stranger.registry, stranger.acme, "sql", digest=digest)
    await stranger.move(1)
    return stranger


async def ask(
    gateway: Gateway, model: str = "acme-sql@prod", *, user: str | None = None
) -> httpx.Response:
    message = {"role": "user", "content": "w1 w2"}
    body = {"model": model, "messages": [message], "max_tokens": 2, "user": user}
    return await gateway.client.post(CHAT, json=body)


async def versions(gateway: Gateway, num_requests: int) -> list[int]:
    """Which version answered each request, in turn; none was billed twice, or not at all."""
    events = await gateway.events(num_requests)
    assert len(events) == num_requests
    assert await gateway.differences() == []
    async with gateway.database.as_worker() as session:
        rows = await session.execute(select(AdapterVersion.id, AdapterVersion.number))
        numbers = {row.id: row.number for row in rows}
    return [numbers[event.adapter_version_id] for event in events]


async def holds(database: Database) -> int:
    async with database.as_worker() as session:
        return len((await session.scalars(select(Hold))).all())


async def test_the_next_request_after_a_move_gets_the_new_version(
    gateway: Gateway, stranger: Stranger
) -> None:
    for _ in range(2):
        assert (await ask(gateway)).is_success
    await stranger.move(2)
    for _ in range(2):
        assert (await ask(gateway)).is_success
    await stranger.move(1)
    assert (await ask(gateway)).is_success
    assert await versions(gateway, 5) == [1, 1, 2, 2, 1]


async def test_the_next_request_after_an_end_is_refused(
    gateway: Gateway, stranger: Stranger
) -> None:
    owner = stranger.acme.key_id
    globex = await make_tenant(gateway.database, "globex")
    await publish(stranger.registry, globex, "shared", digest="f")
    await stranger.grants.grant("globex", "shared", "acme", actor_key_id=owner)
    for name in ("globex-shared", "acme-sql@1", "acme-sql@2", "acme-sql"):
        assert (await ask(gateway, name)).is_success
    await stranger.grants.revoke("globex", "shared", "acme", actor_key_id=owner)
    assert (await ask(gateway, "globex-shared")).status_code == 404
    await stranger.retention.delete_version("acme", "sql", 2, actor_key_id=owner)
    assert (await ask(gateway, "acme-sql@2")).status_code == 404
    assert (await ask(gateway, "acme-sql@1")).is_success
    await stranger.retention.delete_adapter("acme", "sql", actor_key_id=owner)
    for name in ("acme-sql@1", "acme-sql@2", "acme-sql@prod", "acme-sql"):
        assert (await ask(gateway, name)).status_code == 404
    await stranger.retention.restore_adapter("acme", "sql", actor_key_id=owner)
    assert (await ask(gateway, "acme-sql")).is_success
    # That no tenant named what it lost is told by the versions: globex's was number 1 too.
    assert await versions(gateway, 6) == [1, 1, 2, 2, 1, 1]


async def test_a_canary_gets_exactly_the_callers_that_are_meant_for_it(
    gateway: Gateway, stranger: Stranger
) -> None:
    assert (await ask(gateway)).is_success
    await stranger.move(1, canary=Canary(2, 50))
    users = [f"u{number}" for number in range(12)]
    for user in users:
        assert (await ask(gateway, user=user)).is_success
    await stranger.move(1)
    assert (await ask(gateway)).is_success
    meant = [2 if bucket_of("acme-sql", user) < 50 else 1 for user in users]
    assert set(meant) == {1, 2}
    assert await versions(gateway, 14) == [1, *meant, 1]


async def test_what_is_wrong_with_a_version_is_not_told_of_the_next_one(
    gateway: Gateway, stranger: Stranger
) -> None:
    [base] = (await gateway.operator.get("/admin/v1/base-models")).json()["data"]
    bundle = await stranger.store.get_bundle(base["text_bundle_digest"])
    refusing = msgspec.structs.replace(bundle, chat_template="{{ raise_exception('no') }}")
    digest = await stranger.store.put_bundle(refusing)
    await publish(stranger.registry, stranger.acme, "sql", digest="f", text_bundle_digest=digest)
    await stranger.move(3)
    for _ in range(2):
        answer = await ask(gateway)
        assert answer.status_code == 400, answer.text
    await stranger.move(1)
    assert (await ask(gateway)).is_success
    await stranger.move(3)
    assert (await ask(gateway)).status_code == 400
    assert await versions(gateway, 1) == [1]


async def test_a_name_that_another_key_asked_for_stays_closed_to_a_key_that_may_not(
    gateway: Gateway, stranger: Stranger
) -> None:
    assert (await ask(gateway)).is_success
    async with await gateway.key(allowed_models=[MODEL]) as other:
        body = {"model": "acme-sql@prod", "messages": [{"role": "user", "content": "w1"}]}
        assert (await other.post(CHAT, json=body)).status_code == 404


async def test_what_is_admitted_as_assumed_is_held_and_anything_else_is_not(
    gateway: Gateway, stranger: Stranger
) -> None:
    registry, acme, database = stranger.registry, stranger.acme, gateway.database
    async with database.as_worker() as session:
        instance = (await session.scalars(select(GatewayInstance.id))).one()

    async def admitted(assumed: Recollection) -> Admission:
        return await admit(
            database,
            acme,
            assumed.target,
            request_id=new_id(),
            endpoint="completions",
            prompt_tokens=1,
            max_tokens=1,
            gateway_instance_id=instance,
            assumed=assumed,
        )

    await gateway.limit(requests_per_minute=10)
    await registry.resolve(acme, "acme-sql@prod")
    before = registry.recall(acme, "Acme-SQL@prod")
    assert before is not None
    for number in (1, 2):
        await admitted(before)
        assert await holds(database) == number
    await stranger.move(2)
    with pytest.raises(MeaningChanged):
        await admitted(before)
    assert await holds(database) == 2
    await registry.resolve(acme, "acme-sql@prod")
    after = registry.recall(acme, "acme-sql@prod")
    assert after is not None
    levels = (await admitted(after)).levels
    # Nothing was charged for the one in between either.
    assert levels.requests is not None
    assert levels.requests.remaining == 7
    with pytest.raises(MeaningChanged):
        await admitted(before)


async def test_a_name_that_means_nothing_any_more_is_forgotten(
    gateway: Gateway, stranger: Stranger
) -> None:
    registry, acme = stranger.registry, stranger.acme
    await registry.resolve(acme, "acme-sql")
    assert registry.recall(acme, "acme-sql") is not None
    await stranger.retention.delete_adapter("acme", "sql", actor_key_id=acme.key_id)
    with pytest.raises(ModelNotFound):
        await registry.resolve(acme, "acme-sql")
    assert registry.recall(acme, "acme-sql") is None


# Counted on the wire.


class Wire:
    """Mutable: how many round trips went over it, each of which a client ends with Sync."""

    def __init__(self) -> None:
        self.num_round_trips = 0

    async def carry(
        self, server: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        there, here = await asyncio.open_unix_connection(server)
        async with asyncio.TaskGroup() as group:
            group.create_task(_copy(there, writer))
            group.create_task(self._listen(reader, here))

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The first message alone has no type.
        head_bytes = 4
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readexactly(head_bytes)
                [size_bytes] = struct.unpack("!i", head[-4:])
                self.num_round_trips += head_bytes == 5 and head[0] == SYNC
                writer.write(head + await reader.readexactly(size_bytes - 4))
                head_bytes = 5
        writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(1 << 16):
            writer.write(piece)
    # Each side waits for the other one to hang up.
    writer.close()


@asynccontextmanager
async def counted(app_url: str) -> AsyncIterator[tuple[Wire, str]]:
    """A wire to the server, and the URL that leads over it."""
    url, wire = make_url(app_url), Wire()
    name = ".s.PGSQL.5432"
    async with short_folder() as folder:
        server = await asyncio.start_unix_server(
            partial(wire.carry, f"{url.query['host']}/{name}"), folder / name
        )
        async with server:
            counted_url = url.update_query_dict({"host": str(folder)})
            yield wire, counted_url.render_as_string(hide_password=False)


async def test_a_request_for_a_name_that_was_resolved_before_is_one_round_trip(
    home: Home, database: Database, tmp_path: Path
) -> None:
    async with (
        counted(home.app_url) as (wire, app_url),
        whole_gateway(home, database, tmp_path, database_app_url=app_url) as gateway,
    ):
        counts = []
        for _ in range(10):
            before = wire.num_round_trips
            assert (await ask(gateway, MODEL)).is_success
            counts.append(wire.num_round_trips - before)
        # Now and then a key is looked up once more, and whether its tenant's texts are kept.
        assert min(counts) == 1
