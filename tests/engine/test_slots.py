from collections.abc import Callable

import pytest

from engine.slots import SlotPool


@pytest.fixture
def loads() -> list[str]:
    return []


def pool_of(num_slots: int, loads: list[str]) -> SlotPool:
    return SlotPool(num_slots, start_load=loads.append)


def bring(pool: SlotPool, digest: str) -> None:
    assert pool.acquire(digest) is None
    pool.set_resident(digest)


def pinned(acquire: Callable[[str], int | None], digest: str) -> int:
    slot = acquire(digest)
    assert slot is not None
    return slot


def test_an_absent_adapter_is_loaded_once_however_many_wait(loads: list[str]) -> None:
    pool = pool_of(2, loads)
    assert pool.acquire("a") is None
    assert pool.acquire("a") is None
    assert loads == ["a"]


def test_two_adapters_never_share_a_slot(loads: list[str]) -> None:
    pool = pool_of(2, loads)
    bring(pool, "a")
    bring(pool, "b")
    assert pinned(pool.acquire, "a") != pinned(pool.acquire, "b")


def test_the_least_recently_used_adapter_makes_room(loads: list[str]) -> None:
    pool = pool_of(2, loads)
    for digest in ("a", "b"):
        bring(pool, digest)
    pinned(pool.acquire, "a")
    pool.release("a")
    bring(pool, "c")
    assert pool.resident == ("a", "c")


def test_a_pinned_adapter_is_never_evicted(loads: list[str]) -> None:
    pool = pool_of(1, loads)
    bring(pool, "a")
    pinned(pool.acquire, "a")
    assert pool.acquire("b") is None
    assert pool.resident == ("a",)
    assert loads == ["a"]


def test_a_loading_adapter_is_never_evicted(loads: list[str]) -> None:
    pool = pool_of(1, loads)
    assert pool.acquire("a") is None
    assert pool.acquire("b") is None
    assert loads == ["a"]


def test_an_adapter_that_makes_room_gets_no_new_sequence_in_that_pass(loads: list[str]) -> None:
    pool = pool_of(1, loads)
    bring(pool, "a")
    pinned(pool.acquire, "a")
    pool.begin_pass()
    assert pool.acquire("b") is None
    assert pool.acquire("a") is None
    pool.release("a")
    pool.begin_pass()
    assert pool.acquire("b") is None
    assert loads == ["a", "b"]


def test_the_slot_of_a_failed_load_is_free_again(loads: list[str]) -> None:
    pool = pool_of(1, loads)
    assert pool.acquire("a") is None
    pool.drop("a")
    bring(pool, "b")
    pinned(pool.acquire, "b")
    pool.check_integrity({"b": 1})
