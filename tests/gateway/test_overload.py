"""Facts about the waiting room: it is never full for everybody, and few never wait for many."""

import uuid
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Overloaded
from gateway.overload import Place, WaitingRoom

GREEDY, MODEST = uuid.UUID(int=1), uuid.UUID(int=2)


def fill(room: WaitingRoom, tenant: uuid.UUID) -> list[Place]:
    places = []
    while True:
        try:
            places.append(room.enter(tenant))
        except Overloaded:
            return places


def test_one_tenant_alone_leaves_room_for_others() -> None:
    room = WaitingRoom(100)
    assert len(fill(room, GREEDY)) == 50
    room.enter(MODEST)


def test_a_request_takes_a_place_for_each_of_its_answers() -> None:
    room = WaitingRoom(100)
    place = room.enter(GREEDY, num_answers=30)
    with pytest.raises(Overloaded):
        room.enter(GREEDY, num_answers=41)
    assert room.num_waiting == 30
    place.leave()
    assert room.num_waiting == 0
    room.enter(GREEDY, num_answers=50)


def test_a_tenant_with_many_waiting_is_refused_before_one_with_few() -> None:
    room = WaitingRoom(100)
    fill(room, GREEDY)
    assert len(fill(room, MODEST)) == 25
    with pytest.raises(Overloaded) as refused:
        room.enter(GREEDY)
    assert refused.value.status == 503
    assert refused.value.headers["retry-after"] == "1"


def test_a_place_is_given_back_once() -> None:
    room = WaitingRoom(4)
    first, second = room.enter(GREEDY), room.enter(GREEDY)
    for _ in range(2):
        first.leave()
    assert room.num_waiting == 1
    second.leave()
    assert room.num_waiting == 0
    assert not room._waiting


@given(st.lists(st.integers(0, 3), max_size=200), st.integers(1, 40))
def test_there_are_never_more_waiting_than_places_and_the_next_newcomer_gets_in(
    arrivals: list[int], max_waiting: int
) -> None:
    room, waiting = WaitingRoom(max_waiting), Counter[int]()
    for number in arrivals:
        try:
            room.enter(uuid.UUID(int=number))
        except Overloaded:
            assert waiting[number] >= max_waiting - waiting.total()
        else:
            waiting[number] += 1
        assert room.num_waiting == waiting.total() <= max_waiting
