"""Every request that ended is in the database exactly once, whatever died on the way."""

import asyncio
import datetime
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import func, select, text, update

from gateway.billing.verify import verify
from gateway.budgets import create_budget, standings
from gateway.database import Database
from gateway.journal import Journal, Opened
from gateway.ledger import Ledger, settle
from gateway.limits import admit
from gateway.prices import Bill
from gateway.segments import find_segments
from gateway.tables import GatewayInstance, Hold, UsageEvent, UsageRollup, new_id
from tests.conftest import Cluster, Home, execute
from tests.gateway.money import Shop, a_base_model, a_shop, frame_of


@pytest.fixture
async def shop(database: Database) -> Shop:
    return await a_shop(database, "acme", await a_base_model(database))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.open(tmp_path / "journal")


@pytest.fixture
async def ledger(database: Database, journal: Journal) -> AsyncIterator[Ledger]:
    ledger = Ledger(database, journal)
    await ledger.start()
    yield ledger
    await ledger.stop()
    journal.close()


# Ends every connection to one database.
CUT_OFF = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"


async def begin(
    database: Database,
    journal: Journal,
    shop: Shop,
    *,
    is_streamed: bool = True,
    sequence_id: int = 1,
    max_tokens: int = 300,
) -> Opened:
    """Admit a request and tell the journal of it."""
    admission = await admit(
        database,
        shop.principal,
        shop.target,
        request_id=new_id(),
        endpoint="chat.completions",
        prompt_tokens=10,
        max_tokens=max_tokens,
        gateway_instance_id=journal.instance_id,
    )
    opened = Opened.of(
        shop.principal,
        shop.target,
        admission,
        endpoint="chat.completions",
        is_streamed=is_streamed,
        prompt_tokens=10,
        sequence_ids=[sequence_id],
    )
    return journal.opened(opened).opened


def die(journal: Journal) -> None:
    """What `kill -9` does to a journal: the kernel has its bytes and drops its lock."""
    journal._segments.close(keep=True)
    journal._lock.release()


async def events(database: Database) -> list[UsageEvent]:
    async with database.as_worker() as session:
        return list((await session.scalars(select(UsageEvent).order_by(UsageEvent.id))).all())


async def hold_states(database: Database) -> dict[uuid.UUID, str]:
    async with database.as_worker() as session:
        rows = await session.execute(select(Hold.id, Hold.state))
        return {row.id: row.state for row in rows}


async def mismatches(database: Database) -> list[object]:
    async with database.as_worker() as session:
        return list(await verify(session))


def bill_of(event: UsageEvent) -> Bill:
    return Bill(
        event.prompt_tokens,
        event.cached_tokens,
        event.completion_tokens,
        event.cost_nano,
        event.engine_ns,
    )


async def test_the_event_says_what_the_client_was_shown(
    database: Database, journal: Journal, ledger: Ledger, shop: Shop
) -> None:
    opened = await begin(database, journal, shop)
    journal.on_frame(frame_of((1, 7), cached=4, engine_ns=99))
    shown = ledger.close(opened.request_id, "stop")
    await ledger.drain()

    [event] = await events(database)

    assert bill_of(event) == shown
    assert shown.cost_nano == round((6 * 3_000_000 + 4 * 1_000_000 + 7 * 10_500_001) / 10**6)
    assert (event.id, event.outcome, event.endpoint) == (
        opened.request_id,
        "stop",
        "chat.completions",
    )
    assert event.started_at == opened.started_at
    assert event.adapter_version_id == shop.version.id
    assert await hold_states(database) == {opened.request_id: "settled"}
    assert await mismatches(database) == []


async def test_a_free_answer_gives_its_hold_back_and_leaves_no_event(
    database: Database, journal: Journal, ledger: Ledger, shop: Shop
) -> None:
    opened = await begin(database, journal, shop, is_streamed=False)
    journal.on_frame(frame_of((1, 7)))
    assert ledger.close(opened.request_id, "abort", sent=False) == Bill()
    await ledger.drain()
    assert await events(database) == []
    assert await hold_states(database) == {opened.request_id: "released"}


async def test_settling_one_request_twice_at_once_makes_one_event(
    database: Database, journal: Journal, ledger: Ledger, shop: Shop
) -> None:
    opened = await begin(database, journal, shop)
    journal.on_frame(frame_of((1, 7)))
    settlement = journal.closed(opened.request_id, "stop")

    async def settle_it() -> int:
        async with database.as_worker() as session:
            return await settle(session, [settlement])

    assert sorted(await asyncio.gather(*(settle_it() for _ in range(4)))) == [0, 0, 0, 1]
    assert len(await events(database)) == 1
    assert await mismatches(database) == []


async def test_two_settlers_with_the_same_rollup_rows_in_other_orders_do_not_hang(
    database: Database, journal: Journal, ledger: Ledger, shop: Shop
) -> None:
    other = await a_shop(database, "globex", (shop.base_model, shop.price))
    opened = [
        await begin(database, journal, each, sequence_id=number)
        for number, each in enumerate([shop, other] * 4)
    ]
    journal.on_frame(frame_of(*((number, 1) for number in range(8))))
    closed = [journal.closed(each.request_id, "stop") for each in opened]

    async def settle_them(step: int) -> None:
        for at in range(4):
            async with database.as_worker() as session:
                await settle(session, closed[at::4][::step])

    await asyncio.gather(settle_them(1), settle_them(-1))
    assert len(await events(database)) == 8
    assert await mismatches(database) == []


async def test_a_gateway_that_died_is_settled_at_its_next_start_exactly_once(
    database: Database, shop: Shop, tmp_path: Path
) -> None:
    dead = Journal.open(tmp_path)
    first = Ledger(database, dead)
    await first.start()
    streamed, unsent, sent, silent = [
        await begin(database, dead, shop, sequence_id=number, is_streamed=number in (0, 3))
        for number in range(4)
    ]
    dead.on_frame(frame_of((0, 5), (1, 6), (2, 7)))
    shown = dead.closed(sent.request_id, "length").bill
    for task in first._tasks:
        task.cancel()
    await asyncio.gather(*first._tasks, return_exceptions=True)
    die(dead)

    for _ in range(2):
        journal = Journal.open(tmp_path)
        ledger = Ledger(database, journal)
        await ledger.start()
        await ledger.stop()
        die(journal)

    found = {event.id: event for event in await events(database)}
    assert set(found) == {streamed.request_id, sent.request_id}
    assert found[streamed.request_id].outcome == "abort"
    assert found[streamed.request_id].completion_tokens == 5
    assert bill_of(found[sent.request_id]) == shown
    states = await hold_states(database)
    assert states[unsent.request_id] == states[silent.request_id] == "released"
    assert await mismatches(database) == []


# A gateway that serves as fast as it can, and tells what it showed each client.
SERVE_FOR_EVER = """
import asyncio, itertools, sys, uuid
from pathlib import Path

import msgspec

from gateway.database import Database
from gateway.journal import Journal
from gateway.ledger import Ledger
from tests.gateway.money import PRICE, a_request, frame_of

async def main(app_url, worker_url, directory, *ids):
    tenant, key, base_model, adapter, version, price = map(uuid.UUID, ids)
    database = Database(app_url=app_url, worker_url=worker_url, pool_size=3)
    journal = Journal.open(Path(directory), max_segment_bytes=5000)
    ledger = Ledger(database, journal)
    await ledger.start()
    for number in itertools.count():
        request = a_request(
            gateway_instance_id=journal.instance_id, tenant_id=tenant, api_key_id=key,
            base_model_id=base_model, adapter_id=adapter, adapter_version_id=version,
            price=msgspec.structs.replace(PRICE, id=price), sequence_ids=(number,),
            is_streamed=number % 2 == 0,
        )
        journal.opened(request)
        journal.on_frame(frame_of((number, number % 5)))
        shown = ledger.close(request.request_id, "stop")
        print(request.request_id, shown.cost_nano, flush=True)
        await asyncio.sleep(0)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_gateway_that_is_killed_again_and_again_bills_what_it_showed(
    database: Database, home: Home, shop: Shop, tmp_path: Path
) -> None:
    rows = (shop.tenant, shop.key, shop.base_model, shop.adapter, shop.version, shop.price)
    arguments = [home.app_url, home.worker_url, str(tmp_path), *(str(row.id) for row in rows)]
    shown: dict[uuid.UUID, int] = {}
    for num_lines in (1, 40, 150):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", SERVE_FOR_EVER, *arguments),
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        lines = [await process.stdout.readline() for _ in range(num_lines)]
        process.kill()
        lines += (await process.stdout.read()).splitlines(keepends=True)
        await process.wait()
        for line in lines:
            if line.endswith(b"\n"):
                name, cost_nano = line.split()
                shown[uuid.UUID(name.decode())] = int(cost_nano)

    journal = Journal.open(tmp_path)
    ledger = Ledger(database, journal)
    await ledger.start()
    await ledger.stop()
    journal.close()

    billed = {event.id: event.cost_nano for event in await events(database)}
    assert {name: billed.get(name, 0) for name in shown} == shown
    # At each death there was one at most that nobody had been told of.
    assert len(billed.keys() - shown.keys()) <= 3
    assert await mismatches(database) == []


async def test_what_the_database_has_already_is_not_billed_again_by_a_replay(
    database: Database, shop: Shop, tmp_path: Path
) -> None:
    dead = Journal.open(tmp_path)
    first = Ledger(database, dead)
    await first.start()
    opened = await begin(database, dead, shop)
    dead.on_frame(frame_of((1, 5)))
    async with database.as_worker() as session:
        await settle(session, [dead.closed(opened.request_id, "stop")])
    await first.stop()
    # The commit came through, and the process died before it could note it.
    die(dead)

    journal = Journal.open(tmp_path)
    ledger = Ledger(database, journal)
    await ledger.start()
    await ledger.stop()
    journal.close()

    assert [event.completion_tokens for event in await events(database)] == [5]
    assert await mismatches(database) == []
    assert find_segments(tmp_path / str(journal.instance_id)) == {}


async def test_a_hold_that_the_database_lost_is_rebuilt_from_the_journal(
    database: Database, journal: Journal, ledger: Ledger, shop: Shop
) -> None:
    request = shop.request(journal.instance_id)
    journal.opened(request)
    journal.on_frame(frame_of((1, 3)))
    ledger.close(request.request_id, "stop")
    await ledger.drain()
    assert await hold_states(database) == {request.request_id: "settled"}
    assert await mismatches(database) == []


async def test_a_settlement_waits_for_a_database_that_is_away(
    database: Database, journal: Journal, ledger: Ledger, shop: Shop, cluster: Cluster, home: Home
) -> None:
    opened = [await begin(database, journal, shop, sequence_id=number) for number in range(3)]
    journal.on_frame(frame_of((0, 1), (1, 2), (2, 3)))
    name = home.owner_url.rpartition("/")[2].partition("?")[0]
    await cluster.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    await cluster.execute(CUT_OFF.format(name=name))
    for each in opened:
        ledger.close(each.request_id, "stop")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ledger.drain(), 0.5)
    await cluster.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    await ledger.drain()

    assert [event.completion_tokens for event in await events(database)] == [1, 2, 3]
    assert await mismatches(database) == []


async def test_a_row_that_the_database_refuses_holds_up_no_other(
    database: Database, journal: Journal, ledger: Ledger, shop: Shop
) -> None:
    bad = shop.request(journal.instance_id, tenant_id=uuid.uuid4(), sequence_ids=(8,))
    journal.opened(bad)
    good = await begin(database, journal, shop, sequence_id=9)
    journal.on_frame(frame_of((8, 1), (9, 1)))
    ledger.close(bad.request_id, "stop")
    ledger.close(good.request_id, "stop")
    await ledger.drain()
    assert [event.id for event in await events(database)] == [good.request_id]
    # It stays in the journal, for whoever repairs the cause.
    assert journal.known_request_ids() == {bad.request_id}


async def test_a_heartbeat_tells_progress_and_funds_the_next_tranche(
    database: Database, journal: Journal, ledger: Ledger, shop: Shop
) -> None:
    long, unsent = [
        await begin(
            database, journal, shop, sequence_id=n, is_streamed=n == 0, max_tokens=(1000, 50)[n]
        )
        for n in range(2)
    ]
    journal.on_frame(frame_of((0, 200), (1, 40), cached=3))
    async with database.as_worker() as session:
        await session.execute(text("UPDATE gateway_instances SET heartbeat_at = '2020-01-01'"))
    await ledger.beat()
    async with database.as_worker() as session:
        [instance] = (await session.scalars(select(GatewayInstance))).all()
        assert instance.heartbeat_at.year > 2020
        holds = {hold.id: hold for hold in (await session.scalars(select(Hold))).all()}
    moved = holds[long.request_id]
    assert (moved.progress_output_tokens, moved.progress_cached_tokens) == (200, 3)
    assert moved.funded_output_tokens == 512
    assert moved.amount_nano == -(-(10 * 3_000_000 + 512 * 10_500_001) // 10**6)
    assert holds[unsent.request_id].progress_output_tokens == 0
    assert holds[unsent.request_id].funded_output_tokens == 50


async def a_lost_gateway(database: Database) -> uuid.UUID:
    """A gateway on another host, not heard of for two minutes."""
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=2)
    instance = GatewayInstance(
        id=uuid.uuid4(), host="gone", epoch=1, started_at=before, heartbeat_at=before
    )
    async with database.as_worker() as session:
        session.add(instance)
    return instance.id


async def an_old_hold(
    database: Database,
    shop: Shop,
    gateway_instance_id: uuid.UUID,
    *,
    progress: int,
    age_s: float = 180,
) -> Hold:
    hold = Hold(
        id=new_id(),
        tenant_id=shop.tenant.id,
        api_key_id=shop.key.id,
        base_model_id=shop.base_model.id,
        adapter_id=shop.adapter.id,
        adapter_version_id=shop.version.id,
        price_version_id=shop.price.id,
        gateway_instance_id=gateway_instance_id,
        endpoint="completions",
        prompt_tokens=10,
        funded_output_tokens=256,
        progress_output_tokens=progress,
        progress_cached_tokens=4,
        amount_nano=1,
        created_at=datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age_s),
    )
    async with database.as_worker() as session:
        session.add(hold)
    return hold


async def test_a_host_that_never_came_back_is_settled_at_its_last_heartbeat(
    database: Database, ledger: Ledger, shop: Shop
) -> None:
    gone = await a_lost_gateway(database)
    streaming = await an_old_hold(database, shop, gone, progress=42)
    silent = await an_old_hold(database, shop, gone, progress=0)

    # Until our own heartbeat has gone on for a lease, theirs proves nothing.
    assert await ledger.sweep(judges_others=False) == 0
    assert await ledger.sweep(judges_others=True) == 2
    assert await ledger.sweep(judges_others=True) == 0

    [event] = await events(database)
    assert (event.id, event.outcome, event.completion_tokens) == (streaming.id, "lost", 42)
    assert (event.cached_tokens, event.version_digest) == (4, "d" * 64)
    assert await hold_states(database) == {streaming.id: "settled", silent.id: "released"}
    assert await mismatches(database) == []


async def test_what_a_lost_gateway_held_of_a_budget_is_free_or_spent_once_it_is_swept(
    database: Database, ledger: Ledger, shop: Shop
) -> None:
    async with database.as_worker() as session:
        await create_budget(
            session,
            tenant_id=shop.tenant.id,
            api_key_id=None,
            kind="hard",
            period="month",
            time_zone="UTC",
            cap_nano=10**12,
            alert_percents=[],
        )
    gone = await a_lost_gateway(database)
    holds = [await an_old_hold(database, shop, gone, progress=progress) for progress in (42, 0)]

    async def standing() -> tuple[int, int]:
        async with database.as_worker() as session:
            [found] = await standings(session, shop.tenant.id)
        return found.held_nano, found.spent_nano

    assert await standing() == (sum(hold.amount_nano for hold in holds), 0)
    assert await ledger.sweep(judges_others=True) == 2
    [event] = await events(database)
    assert await standing() == (0, event.cost_nano)


async def test_a_hold_that_the_journal_never_heard_of_is_given_back(
    database: Database, journal: Journal, ledger: Ledger, shop: Shop
) -> None:
    forgotten = await an_old_hold(database, shop, journal.instance_id, progress=0)
    running = await begin(database, journal, shop)
    assert await ledger.sweep(judges_others=False) == 1
    assert await hold_states(database) == {forgotten.id: "released", running.request_id: "open"}


async def test_what_an_earlier_life_held_and_never_journalled_is_given_back_at_once(
    database: Database, journal: Journal, ledger: Ledger, shop: Shop
) -> None:
    """No client of the new life is refused for a request that died with the old one."""
    forgotten = await an_old_hold(database, shop, journal.instance_id, progress=0, age_s=40)
    of_this_life = await an_old_hold(database, shop, journal.instance_id, progress=0, age_s=-1)
    assert await ledger.sweep(judges_others=False) == 1
    states = await hold_states(database)
    assert states == {forgotten.id: "released", of_this_life.id: "open"}


@pytest.mark.parametrize("is_looked_for", [False, True])
async def test_a_hold_that_the_database_lost_is_put_back_while_its_stream_runs(
    database: Database,
    home: Home,
    journal: Journal,
    ledger: Ledger,
    shop: Shop,
    is_looked_for: bool,
) -> None:
    """No budget seems spent to a stream because its server crashed, and none seems free."""
    async with database.as_worker() as session:
        await create_budget(
            session,
            tenant_id=shop.tenant.id,
            api_key_id=None,
            kind="hard",
            period="month",
            time_zone="UTC",
            cap_nano=10**12,
            alert_percents=[],
        )
    opened = await begin(database, journal, shop)
    async with database.as_worker() as session:
        [before] = await standings(session, shop.tenant.id)
    await execute(home.superuser_url, "DELETE FROM holds")
    if is_looked_for:
        assert await ledger.put_back_lost() == 1
        assert await ledger.put_back_lost() == 0
        async with database.as_worker() as session:
            assert await standings(session, shop.tenant.id) == [before]

    meter = journal.find_meter(opened.request_id)
    assert meter is not None
    journal.on_frame(frame_of((1, 200)))
    await ledger.fund(meter)
    assert (meter.funded_output_tokens, meter.is_budgeted) == (300, True)
    ledger.close(opened.request_id, "length")
    await ledger.drain()
    assert await hold_states(database) == {opened.request_id: "settled"}
    assert await mismatches(database) == []


async def test_what_was_given_back_stays_so_when_its_gateway_comes_back_after_all(
    database: Database, home: Home, shop: Shop, tmp_path: Path
) -> None:
    """Its money may be another request's by now, and a budget's cap is a cap."""
    dead = Journal.open(tmp_path / "one")
    first = Ledger(database, dead)
    await first.start()
    for task in first._tasks:
        task.cancel()
    await asyncio.gather(*first._tasks, return_exceptions=True)
    _, ended = [await begin(database, dead, shop, sequence_id=n) for n in range(2)]
    dead.on_frame(frame_of((0, 5), (1, 6)))
    dead.closed(ended.request_id, "stop")
    die(dead)
    await execute(
        home.superuser_url,
        "UPDATE gateway_instances SET heartbeat_at = heartbeat_at - interval '2 hours';"
        "UPDATE holds SET created_at = created_at - interval '2 hours'",
    )
    other = Ledger(database, Journal.open(tmp_path / "two"))
    assert await other.sweep(judges_others=True) == 2

    journal = Journal.open(tmp_path / "one")
    ledger = Ledger(database, journal)
    await ledger.start()
    await ledger.stop()
    journal.close()

    assert await events(database) == []
    assert set((await hold_states(database)).values()) == {"released"}
    assert await mismatches(database) == []


async def test_a_hold_of_a_gateway_that_lives_is_left_alone(
    database: Database, ledger: Ledger, shop: Shop
) -> None:
    living = await a_lost_gateway(database)
    await an_old_hold(database, shop, living, progress=5)
    async with database.as_worker() as session:
        await session.execute(
            update(GatewayInstance)
            .where(GatewayInstance.id == living)
            .values(heartbeat_at=func.now())
        )
    assert await ledger.sweep(judges_others=True) == 0


async def test_a_clean_stop_settles_everything_and_leaves_no_file(
    database: Database, shop: Shop, tmp_path: Path
) -> None:
    journal = Journal.open(tmp_path)
    ledger = Ledger(database, journal)
    await ledger.start()
    opened = await begin(database, journal, shop)
    journal.on_frame(frame_of((1, 2)))
    ledger.close(opened.request_id, "stop")
    await ledger.stop()
    journal.close()
    assert len(await events(database)) == 1
    assert find_segments(tmp_path / str(journal.instance_id)) == {}


async def test_verify_names_what_does_not_add_up(
    database: Database, journal: Journal, ledger: Ledger, shop: Shop
) -> None:
    opened = await begin(database, journal, shop)
    journal.on_frame(frame_of((1, 2)))
    ledger.close(opened.request_id, "stop")
    await ledger.drain()
    async with database.as_worker() as session:
        await session.execute(update(UsageRollup).values(cost_nano=UsageRollup.cost_nano + 1))
        await session.execute(text("UPDATE holds SET state = 'released'"))
    kinds = sorted(str(each.kind) for each in await mismatches(database))  # type: ignore[attr-defined]
    assert kinds == ["event_without_settled_hold", "rollup"]
