"""Facts about the choice of an engine: over real links, on engines that echo."""

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from engine.client import EngineLink, SequenceStream
from gateway.errors import Unavailable
from gateway.routing import Replica, Router
from tests.engine.echo_engine import Engine, engine, greedy, link, short_folder, until

BASE, OTHER = uuid.UUID(int=1), uuid.UUID(int=2)
HOT, COLD = "aa" * 32, "bb" * 32


@dataclass(frozen=True)
class Place:
    """A router with two engines of one base model, which finish nothing by themselves."""

    router: Router
    engines: tuple[Engine, Engine]
    links: tuple[EngineLink, EngineLink]

    def submit(self, digest: str | None = None) -> EngineLink:
        """Send a sequence where the router says; it stays there."""
        chosen = self.router.pick(BASE, adapter_digest=digest)
        chosen.submit([1], sampling=greedy(5), adapter_digest=digest)
        return chosen


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    router = Router()
    async with (
        short_folder() as folder,
        engine(folder / "a") as first,
        engine(folder / "b") as second,
        link(first.address) as to_first,
        link(second.address) as to_second,
    ):
        for each, its_link in ((first, to_first), (second, to_second)):
            each.core.allow_steps(0)
            router.attach(Replica(its_link, BASE, "base"))
        yield Place(router, (first, second), (to_first, to_second))


async def test_only_engines_of_the_base_model_are_chosen(place: Place) -> None:
    with pytest.raises(Unavailable):
        place.router.pick(OTHER)
    place.router.attach(Replica(place.links[1], OTHER, "other"))
    assert {place.router.pick(BASE) for _ in range(3)} == {place.links[0]}
    assert place.router.pick(OTHER) is place.links[1]


async def test_an_engine_in_doubt_is_chosen_for_nothing_until_it_is_trusted(place: Place) -> None:
    near, far = place.links
    place.router.doubt(near)
    assert {place.router.pick(BASE) for _ in range(3)} == {far}
    place.router.doubt(far)
    assert not place.router.is_any_connected
    with pytest.raises(Unavailable):
        place.router.pick(BASE, revision=1)
    place.router.trust(near)
    assert {place.router.pick(BASE) for _ in range(3)} == {near}


async def test_requests_go_to_the_least_busy_engine(place: Place) -> None:
    chosen = [place.submit() for _ in range(6)]
    assert chosen.count(place.links[0]) == chosen.count(place.links[1]) == 3


async def test_whoever_waits_for_admission_is_counted_already(place: Place) -> None:
    for _ in range(4):
        place.router.room(place.router.pick(BASE)).enter(uuid.UUID(int=9))
    assert [place.router.room(each).num_waiting for each in place.links] == [2, 2]


async def test_an_adapter_stays_where_it_is_until_that_engine_is_too_busy(place: Place) -> None:
    first, second = place.submit(HOT), place.submit(HOT)
    assert first is second
    others = {place.submit(HOT) for _ in range(6)}
    assert others == set(place.links)
    loads = [each.num_sequences for each in place.links]
    assert max(loads) - min(loads) <= 2


async def test_what_an_engine_says_of_its_slots_is_believed(place: Place) -> None:
    near, far = place.links
    for digest, at in ((HOT, near), (COLD, far)):
        place.router.note_residents(near, [HOT] if digest == HOT else [])
        place.router.note_residents(far, [COLD] if digest == COLD else [])
        assert place.router.pick(BASE, adapter_digest=digest) is at


async def test_gateways_bring_a_cold_adapter_to_the_same_engine(place: Place) -> None:
    another = Router()
    for each in reversed(place.links):
        another.attach(Replica(each, BASE, "base"))
    for digest in (f"{number:064x}" for number in range(20)):
        chosen = place.router.pick(BASE, adapter_digest=digest)
        assert another.pick(BASE, adapter_digest=digest) is chosen


async def test_a_revision_is_answered_by_engines_of_that_revision_alone(place: Place) -> None:
    old, new = place.links
    place.router.attach(Replica(new, BASE, "base", revision=2))
    place.router.drain(old)
    assert place.router.pick(BASE, revision=2) is new
    # It was resolved before the swap, and its tokens are the old ones'.
    assert place.router.pick(BASE, revision=1) is old
    assert place.router.pick(BASE) is new
    with pytest.raises(Unavailable):
        place.router.pick(BASE, revision=3)


async def test_one_that_drains_gets_nothing_that_another_can_answer(place: Place) -> None:
    place.router.drain(place.links[0])
    assert {place.submit() for _ in range(4)} == {place.links[1]}
    assert {place.router.pick(BASE, revision=1) for _ in range(2)} == {place.links[1]}
    place.router.attach(Replica(place.links[0], BASE, "base"))
    assert place.submit() is place.links[0]


async def test_links_that_share_their_numbers_never_give_one_twice(place: Place) -> None:
    numbers = iter(range(1, 100))
    streams: list[SequenceStream] = []
    async with (
        link(place.engines[0].address, worker_id="w2", sequence_ids=numbers) as first,
        link(place.engines[1].address, worker_id="w2", sequence_ids=numbers) as second,
    ):
        for each in (first, second, second, first):
            streams.append(each.submit([1], sampling=greedy(1)))
        seen = [each.core.seen for each in place.engines]
        await until(lambda: sum(map(len, seen)) == 4)
    assert [stream.sequence_id for stream in streams] == [1, 2, 3, 4]
    assert [[key[2] for key in keys] for keys in seen] == [[1, 4], [2, 3]]
