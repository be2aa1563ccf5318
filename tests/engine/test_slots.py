import pytest

from engine.errors import AdapterMissing, AdapterUnavailable, TooManyPins
from engine.protocol import Tier
from engine.slots import Freed
from tests.engine.tier_lab import BLOCK_BYTES, MOST_PASSES, TierLab

# Coming near


def test_an_adapter_is_read_then_copied_then_pinned() -> None:
    lab = TierLab()
    assert lab.run_pass("a1") == []
    assert (lab.loads.reads, lab.loads.copies) == (["a1"], [])
    lab.finish_read("a1")
    assert lab.run_pass("a1") == []
    assert (lab.loads.reads, lab.loads.copies) == ([], ["a1"])
    lab.finish_copy("a1")
    assert lab.run_pass("a1") == ["a1"]
    lab.pool.check_integrity({"a1": 1})


def test_an_absent_adapter_is_loaded_once_however_many_wait() -> None:
    lab = TierLab()
    for _ in range(2):
        assert lab.run_pass("a1", "a1") == []
    assert lab.loads.reads == ["a1"]
    lab.finish_read("a1")
    for _ in range(2):
        assert lab.run_pass("a1", "a1") == []
    assert lab.loads.copies == ["a1"]


def test_an_adapter_that_is_read_takes_no_slot() -> None:
    lab = TierLab(num_slots=1)
    lab.run_pass("a1")
    lab.bring("b1")
    assert lab.pool.resident == ("b1",)


def test_two_adapters_never_share_a_slot() -> None:
    lab = TierLab()
    lab.bring("a1", "b1")
    lab.pool.begin_pass()
    slots = {lab.pool.acquire("a1"), lab.pool.acquire("b1")}
    assert len(slots) == 2
    assert {lab.device.installed[slot] for slot in slots if slot is not None} == {"a1", "b1"}


def test_the_first_in_turn_is_read_first_and_a_few_at_once() -> None:
    lab = TierLab()
    names = [f"{letter}1" for letter in "abcdefgh"]
    lab.run_pass(*names)
    assert lab.loads.reads == names[:4]
    lab.finish_read("c1")
    lab.run_pass(*names)
    assert lab.loads.reads == ["a1", "b1", "d1", "e1"]


def test_an_evicted_adapter_comes_back_from_host_memory() -> None:
    lab = TierLab(num_slots=1)
    lab.bring("a1", "b1")
    assert lab.pool.hosted == ("a1", "b1")
    lab.run_pass("a1")
    assert (lab.loads.reads, lab.loads.copies) == ([], ["a1"])


# Slots


def test_the_least_recently_used_adapter_makes_room() -> None:
    lab = TierLab()
    lab.bring("a1", "b1", "a1", "c1")
    assert lab.pool.resident == ("a1", "c1")


def test_what_somebody_waits_for_is_evicted_after_what_nobody_wants() -> None:
    lab = TierLab()
    lab.bring("a1", "b1")
    lab.run_pass("c1", prefetched=("a1",))
    lab.finish_all()
    lab.run_pass("c1")
    assert lab.pool.resident == ("a1",)


def test_a_pinned_adapter_is_never_evicted() -> None:
    lab = TierLab(num_slots=1)
    lab.pin("a1")
    for _ in range(3):
        assert lab.run_pass("b1") == []
        lab.finish_all()
    assert lab.pool.resident == ("a1",)
    lab.pool.check_integrity({"a1": 1})


def test_an_adapter_that_is_being_copied_is_never_evicted() -> None:
    lab = TierLab(num_slots=1)
    lab.run_pass("a1", "b1")
    lab.finish_all()
    lab.run_pass("a1", "b1")
    lab.run_pass("b1")
    assert lab.loads.copies == ["a1"]
    assert lab.pool.make_room(100) == 0


def test_an_adapter_that_makes_room_gets_no_new_sequence_in_that_pass() -> None:
    lab = TierLab(num_slots=1)
    lab.pin("a1")
    lab.run_pass("b1")
    lab.finish_all()
    assert lab.run_pass("b1", "a1") == []
    lab.pool.release("a1")
    assert lab.run_pass("b1", "a1") == []
    assert lab.loads.copies == ["b1"]


# Memory


def test_room_is_made_of_adapters_that_nobody_wants() -> None:
    lab = TierLab(num_slots=4, num_blocks=20)
    lab.bring("a3", "b3", "c3")
    lab.run_pass("b3")
    assert lab.pool.make_room(5) == 6
    assert lab.pool.resident == ("b3",)
    assert lab.device.num_free_blocks == 17


def test_no_more_room_is_made_than_needed() -> None:
    lab = TierLab(num_slots=4, num_blocks=20)
    lab.bring("a3", "b3", "c3")
    lab.run_pass()
    assert lab.pool.make_room(2) == 3
    assert lab.pool.resident == ("b3", "c3")


def test_an_adapter_that_waits_for_memory_has_its_blocks_reserved() -> None:
    lab = TierLab(num_blocks=20)
    lab.device.num_kv_blocks = 15
    lab.run_pass("a8")
    lab.finish_all()
    lab.run_pass("a8")
    assert lab.pool.num_reserved_blocks == 8
    lab.device.num_kv_blocks = 12
    lab.run_pass("a8")
    assert (lab.pool.num_reserved_blocks, lab.loads.copies) == (0, ["a8"])


def test_a_small_adapter_does_not_take_the_memory_that_a_large_one_waits_for() -> None:
    lab = TierLab(num_blocks=20)
    lab.device.num_kv_blocks = 15
    lab.run_pass("a8", "b1")
    lab.finish_all()
    lab.run_pass("a8", "b1", prefetched=("c1",))
    assert lab.loads.copies == []
    assert lab.run_pass("b1", "a8") == []
    assert lab.loads.copies == ["b1"]


def test_those_who_keep_coming_do_not_starve_one_that_waits_for_memory() -> None:
    lab = TierLab(num_slots=4, num_blocks=30, max_blocks=20)
    lab.pin("a8", "b8", "b8")
    lab.run_pass("c12")
    lab.finish_all()
    # Both others together are more than what c12 leaves of the twenty; a8 has the fewest pins.
    assert lab.run_pass("c12", "a8", "b8") == ["b8"]
    lab.pool.release("a8")
    lab.run_pass("c12", "a8")
    assert lab.loads.copies == ["c12"]
    lab.pool.check_integrity({"b8": 3})


def test_memory_that_drains_is_not_reserved_twice() -> None:
    lab = TierLab(num_slots=4, num_blocks=30, max_blocks=20)
    lab.pin("a8", "b8")
    lab.run_pass("c12")
    lab.finish_all()
    lab.run_pass("c12")
    assert lab.pool.num_reserved_blocks == 4


def test_memory_that_drains_for_one_is_not_given_to_others() -> None:
    lab = TierLab(num_slots=4, num_blocks=30, max_blocks=20)
    lab.pin("a8", "b8")
    lab.run_pass("c15")
    lab.finish_all()
    lab.pool.release("a8")
    lab.run_pass("c15")
    assert lab.pool.make_room(5) == 0
    assert lab.pool.resident == ("a8", "b8")


def test_an_adapter_larger_than_the_memory_is_missing_and_says_why() -> None:
    lab = TierLab(num_blocks=20, max_blocks=10)
    lab.run_pass("a11", "b10")
    fault = lab.finish_read("a11")
    assert isinstance(fault, AdapterMissing)
    for word in ("a11", "110 bytes", "11 blocks", "10:", "memory_bytes"):
        assert word in str(fault)
    assert lab.finish_read("b10") is None
    assert lab.pool.hosted == ("b10",)


# Prefetch


def test_a_prefetched_adapter_is_pinned_at_once_when_its_turn_comes() -> None:
    lab = TierLab()
    lab.run_pass(prefetched=("a1",))
    lab.finish_all()
    lab.run_pass(prefetched=("a1",))
    lab.finish_all()
    lab.pool.check_integrity({})
    assert lab.run_pass("a1") == ["a1"]


def test_a_prefetch_drains_nobody() -> None:
    lab = TierLab(num_slots=1)
    lab.pin("a1")
    lab.run_pass(prefetched=("b1",))
    lab.finish_all()
    lab.pool.begin_pass()
    lab.pool.prefetch("b1")
    assert lab.pool.acquire("a1") is not None
    assert lab.loads.copies == []


def test_a_prefetch_takes_the_place_of_what_nobody_in_the_pass_wants() -> None:
    lab = TierLab()
    lab.bring("a1", "b1")
    for _ in range(2):
        lab.run_pass(prefetched=("a1", "c1"))
        lab.finish_all()
    assert lab.pool.resident == ("a1", "c1")
    for _ in range(3):
        lab.run_pass(prefetched=("a1", "c1", "b1"))
    assert lab.loads.copies == []


def test_a_prefetch_that_finds_no_memory_costs_nobody_their_place() -> None:
    lab = TierLab(num_slots=4, num_blocks=20)
    lab.bring("a3", "b3")
    lab.device.num_kv_blocks = 14
    for _ in range(3):
        lab.run_pass(prefetched=("c4",))
        for digest in tuple(lab.loads.reads):
            lab.finish_read(digest)
    assert lab.pool.resident == ("a3", "b3")
    assert lab.loads.copies == []
    assert lab.device.num_free_blocks == 0


def test_one_reader_is_left_to_those_whose_turn_it_is() -> None:
    lab = TierLab()
    lab.run_pass(prefetched=("a1", "b1", "c1", "d1"))
    assert lab.loads.reads == ["a1", "b1", "c1"]
    lab.run_pass("e1")
    assert lab.loads.reads == ["a1", "b1", "c1", "e1"]


# Host memory


def test_the_host_tier_lets_the_longest_unused_go() -> None:
    lab = TierLab(num_slots=1, host_blocks=3)
    lab.bring("a1", "b1", "a1", "c2")
    assert lab.pool.hosted == ("a1", "c2")
    assert lab.host.num_evictions == 1


def test_what_waits_in_host_memory_for_a_slot_is_not_pushed_out_by_those_behind() -> None:
    lab = TierLab(num_slots=1, host_blocks=2)
    lab.pin("a1")
    for _ in range(5):
        lab.run_pass("b1", "c1", "d1", "e1")
        for digest in tuple(lab.loads.reads):
            lab.finish_read(digest)
    assert sorted(lab.pool.hosted) == ["b1", "c1"]
    num_reads = lab.pool.report(disk_bytes=0).num_reads
    for _ in range(5):
        lab.run_pass("b1", "c1", "d1", "e1")
    assert lab.loads.reads == []
    assert lab.pool.report(disk_bytes=0).num_reads == num_reads


def test_an_adapter_larger_than_the_host_tier_is_served_all_the_same() -> None:
    lab = TierLab(host_blocks=2)
    lab.pin("a5")
    assert lab.pool.hosted == ()
    lab.pool.check_integrity({"a5": 1})


# For operators


def warm(lab: TierLab, *digests: str, to: Tier = "device", others: tuple[str, ...] = ()) -> None:
    """Passes in which operators want these and sequences those, until nothing moves any more."""
    for _ in range(MOST_PASSES):
        for digest in lab.run_pass(*others):
            lab.pool.release(digest)
        for digest in digests:
            lab.pool.bring(digest, to)
        lab.finish_all()


def test_an_adapter_comes_to_the_host_or_to_a_slot_without_a_sequence() -> None:
    lab = TierLab()
    warm(lab, "a1", to="host")
    assert (lab.pool.resident, lab.pool.hosted) == ((), ("a1",))
    assert lab.pool.is_near("a1", "host")
    assert not lab.pool.is_near("a1", "device")
    warm(lab, "a1")
    assert lab.pool.resident == ("a1",)
    assert lab.pool.is_near("a1", "device")
    lab.pool.check_integrity({})


def test_what_no_sequence_asks_for_evicts_idle_adapters_however_many_and_no_other() -> None:
    lab = TierLab(num_slots=4, num_blocks=10)
    lab.bring("a3", "b3", "c3")
    warm(lab, "d8", others=("c3",))
    assert set(lab.pool.resident) == {"a3", "b3", "c3"}
    warm(lab, "d8")
    assert lab.pool.resident == ("d8",)


def test_nothing_is_evicted_in_vain_for_what_no_sequence_asks_for() -> None:
    lab = TierLab(num_slots=4, num_blocks=10)
    lab.bring("a3", "b3")
    lab.device.num_kv_blocks = 4
    warm(lab, "d8")
    assert lab.pool.resident == ("a3", "b3")


def test_a_pinned_adapter_stays_and_an_unpinned_one_goes() -> None:
    lab = TierLab()
    lab.bring("a1")
    lab.pool.pin("a1")
    lab.bring("b1", "c1", "d1")
    assert lab.pool.resident == ("a1", "d1")
    assert lab.pool.pinned == ("a1",)
    lab.run_pass()
    assert lab.pool.make_room(100) == 1
    lab.pool.unpin("a1")
    lab.bring("b1", "c1")
    assert lab.pool.resident == ("b1", "c1")
    lab.pool.check_integrity({})


def test_one_slot_is_left_to_what_is_not_pinned() -> None:
    lab = TierLab(num_slots=3)
    lab.pool.pin("a1")
    lab.pool.pin("b1")
    lab.pool.pin("b1")
    with pytest.raises(TooManyPins, match="2 of 3 slots"):
        lab.pool.pin("c1")
    warm(lab, *lab.pool.absent_pins)
    lab.bring("c1", "d1")
    assert set(lab.pool.resident) == {"a1", "b1", "d1"}
    assert lab.pool.absent_pins == ()


def test_an_engine_of_one_slot_pins_nothing() -> None:
    lab = TierLab(num_slots=1)
    with pytest.raises(TooManyPins):
        lab.pool.pin("a1")


def test_a_pinned_adapter_makes_room_for_one_that_fits_in_no_other_way_and_comes_back() -> None:
    lab = TierLab(num_slots=3, num_blocks=10)
    lab.pool.pin("a3")
    warm(lab, "a3")
    lab.pin("b8")
    assert lab.pool.resident == ("b8",)
    assert lab.pool.absent_pins == ("a3",)
    warm(lab, "a3")
    assert lab.pool.resident == ("b8",)
    lab.pool.release("b8")
    lab.run_pass()
    warm(lab, "a3")
    assert lab.pool.resident == ("a3",)
    lab.pool.check_integrity({})


def test_others_drain_before_a_pinned_adapter_does() -> None:
    lab = TierLab(num_slots=2)
    lab.pool.pin("a1")
    lab.pin("a1", "b1")
    lab.run_pass("c1")
    lab.finish_all()
    assert lab.run_pass("c1", "a1", "b1") == ["a1"]


def test_an_unload_unpins() -> None:
    lab = TierLab()
    lab.bring("a3")
    lab.pool.pin("a3")
    assert lab.pool.forget("a3") == Freed(30, 30, is_in_use=False)
    assert (lab.pool.pinned, lab.pool.resident) == ((), ())
    assert lab.pool.forget("a3") == Freed(0, 0, is_in_use=False)


def test_an_unload_tells_what_sequences_and_loads_still_hold() -> None:
    lab = TierLab()
    lab.pin("a3")
    assert lab.pool.forget("a3") == Freed(0, 30, is_in_use=True)
    lab.run_pass("b1")
    assert lab.pool.forget("b1") == Freed(0, 0, is_in_use=True)


def test_a_pin_takes_an_unload_back() -> None:
    lab = TierLab()
    lab.pin("a3")
    lab.pool.forget("a3")
    lab.pool.pin("a3")
    assert lab.run_pass("a3") == ["a3"]
    for _ in range(2):
        lab.pool.release("a3")
    assert lab.pool.resident == ("a3",)


# Going away


@pytest.mark.parametrize("is_retryable", [False, True])
def test_a_failed_read_leaves_nothing_behind(is_retryable: bool) -> None:
    lab = TierLab(num_slots=1)
    lab.run_pass("a1")
    fault = AdapterUnavailable() if is_retryable else AdapterMissing()
    assert lab.finish_read("a1", fault) is fault
    lab.pool.check_integrity({})
    lab.pin("b1")
    assert lab.run_pass("a1") == []
    assert lab.loads.reads == ["a1"]


def test_a_failed_copy_leaves_nothing_behind() -> None:
    lab = TierLab(num_slots=1)
    lab.run_pass("a1")
    lab.finish_all()
    lab.run_pass("a1")
    fault = AdapterUnavailable()
    assert lab.finish_copy("a1", fault) is fault
    lab.pool.check_integrity({})
    assert lab.device.num_free_blocks == 100
    assert lab.device.installed == {}
    lab.pin("b1")


def test_a_load_that_nobody_waits_for_any_more_ends_as_an_idle_adapter() -> None:
    lab = TierLab()
    lab.run_pass("a1")
    lab.finish_read("a1")
    lab.run_pass("a1")
    lab.run_pass()
    lab.finish_copy("a1")
    lab.pool.check_integrity({})
    assert lab.pool.resident == ("a1",)
    assert lab.pool.make_room(1) == 1


def test_an_unload_gives_all_memory_back() -> None:
    lab = TierLab()
    lab.bring("a3", "b3")
    lab.pool.forget("a3")
    assert lab.pool.resident == lab.pool.hosted == ("b3",)
    assert lab.device.num_free_blocks == 97
    assert lab.host.size_bytes == 3 * BLOCK_BYTES


def test_an_unload_waits_for_the_sequences_that_use_the_adapter() -> None:
    lab = TierLab()
    lab.pin("a3")
    lab.pool.forget("a3")
    assert lab.run_pass("a3") == []
    assert lab.pool.resident == ("a3",)
    lab.pool.release("a3")
    assert lab.pool.resident == ()
    assert lab.device.num_free_blocks == 100
    lab.run_pass("a3")
    assert lab.loads.reads == ["a3"]


def test_an_unload_during_a_load_frees_what_the_load_brings() -> None:
    lab = TierLab()
    lab.run_pass("a3", "b3")
    lab.pool.forget("a3")
    lab.finish_all()
    assert lab.pool.hosted == ("b3",)
    lab.run_pass("b3")
    lab.pool.forget("b3")
    lab.finish_all()
    assert (lab.pool.resident, lab.pool.hosted) == ((), ())
    assert lab.device.num_free_blocks == 100
    lab.pool.check_integrity({})


# Reports


def test_a_wait_counts_from_the_submit_until_the_adapter_is_resident() -> None:
    lab = TierLab()
    lab.now_ns = 500
    lab.bring("a1")
    lab.now_ns = 900
    lab.run_pass("a1")
    assert lab.pool.wait_ns("a1", since_ns=200) == 300
    assert lab.pool.wait_ns("a1", since_ns=600) == 0


def test_a_report_counts_what_moved() -> None:
    lab = TierLab(num_slots=1, host_blocks=4)
    lab.bring("a1", "b2", "c3")
    lab.run_pass("d1")
    lab.finish_read("d1", AdapterMissing())
    report = lab.pool.report(disk_bytes=7)
    assert (report.num_reads, report.num_read_bytes) == (3, 60)
    assert (report.num_copies, report.num_copied_bytes) == (3, 60)
    assert (report.num_slot_evictions, report.num_host_evictions) == (2, 2)
    assert report.num_load_failures == 1
    assert (report.disk_bytes, report.host_bytes, report.device_bytes) == (7, 30, 30)
