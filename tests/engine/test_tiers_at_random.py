"""Whatever the order of wishes, loads, failures and unloads, nothing leaks and nobody starves."""

import random
from collections import Counter, deque

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.errors import AdapterMissing, AdapterUnavailable, TooManyPins
from engine.protocol import Tier
from tests.engine.tier_lab import BLOCK_BYTES, TierLab

# The last one is larger than any memory here.
DIGESTS = ("a1", "b1", "c2", "d3", "e5", "f8", "g8", "h12", "x99")
GOOD = DIGESTS[:-1]
digests = st.sampled_from(DIGESTS)
LARGEST = 12
# Enough for every adapter here to be placed after what a few sequences in between cost.
MANY_PASSES = 60


def lab_bytes(lab: TierLab) -> int:
    report = lab.pool.report(disk_bytes=0)
    return report.device_bytes + report.host_bytes


class Tiers(RuleBasedStateMachine):
    @initialize(
        num_slots=st.integers(1, 4),
        max_blocks=st.integers(LARGEST, 30),
        sequence_blocks=st.integers(1, 10),
        host_blocks=st.integers(1, 30),
    )
    def begin(
        self, num_slots: int, max_blocks: int, sequence_blocks: int, host_blocks: int
    ) -> None:
        self.lab = TierLab(
            num_slots,
            num_blocks=max_blocks + sequence_blocks,
            max_blocks=max_blocks,
            host_blocks=host_blocks,
        )
        self.num_slots = num_slots
        self.pins: Counter[str] = Counter()
        self.slot_of: dict[str, int] = {}

    @rule(wanted=st.lists(digests, max_size=8), later=st.lists(digests, max_size=4))
    def run_a_pass(self, wanted: list[str], later: list[str]) -> None:
        self.lab.pool.begin_pass()
        for digest in wanted:
            slot = self.lab.pool.acquire(digest)
            if slot is not None:
                assert self.slot_of.setdefault(digest, slot) == slot
                self.pins[digest] += 1
        for digest in later:
            self.lab.pool.prefetch(digest)

    @rule(pick=st.randoms(use_true_random=False))
    def release(self, pick: random.Random) -> None:
        if not self.pins:
            return
        digest = pick.choice(sorted(self.pins))
        self.lab.pool.release(digest)
        self.pins[digest] -= 1
        if not self.pins[digest]:
            del self.pins[digest], self.slot_of[digest]

    @rule(
        pick=st.randoms(use_true_random=False),
        fault=st.sampled_from((None, None, None, AdapterUnavailable(), AdapterMissing())),
    )
    def finish_a_read(self, pick: random.Random, fault: AdapterUnavailable | None) -> None:
        if self.lab.loads.reads:
            digest = pick.choice(self.lab.loads.reads)
            found = self.lab.finish_read(digest, fault)
            assert (found is None) == (fault is None and digest in GOOD)

    @rule(fault=st.sampled_from((None, None, None, AdapterUnavailable())))
    def finish_the_first_copy(self, fault: AdapterUnavailable | None) -> None:
        if self.lab.loads.copies:
            assert self.lab.finish_copy(self.lab.loads.copies[0], fault) is fault

    @rule(num_blocks=st.integers(0, 20))
    def make_room(self, num_blocks: int) -> None:
        before = self.lab.device.num_free_blocks
        num_freed = self.lab.pool.make_room(num_blocks)
        assert self.lab.device.num_free_blocks == before + num_freed

    @rule(num_blocks=st.integers(0, 40))
    def sequences_hold(self, num_blocks: int) -> None:
        device = self.lab.device
        device.num_kv_blocks = min(num_blocks, device.num_free_blocks + device.num_kv_blocks)

    @rule(wanted=st.lists(st.tuples(digests, st.sampled_from(("host", "device"))), max_size=4))
    def bring_for_operators(self, wanted: list[tuple[str, Tier]]) -> None:
        """Only after all sequences have asked, in the same pass."""
        before = set(self.pins)
        for digest in self.lab.pool.absent_pins:
            self.lab.pool.bring(digest, "device")
        for digest, tier in wanted:
            self.lab.pool.bring(digest, tier)
        assert before <= set(self.lab.pool.resident)

    @rule(digest=digests)
    def pin(self, digest: str) -> None:
        pinned = self.lab.pool.pinned
        try:
            self.lab.pool.pin(digest)
        except TooManyPins:
            assert digest not in pinned
            assert len(pinned) == self.num_slots - 1

    @rule(digest=digests)
    def unpin(self, digest: str) -> None:
        self.lab.pool.unpin(digest)
        assert digest not in self.lab.pool.pinned

    @rule(digest=digests)
    def forget(self, digest: str) -> None:
        before = lab_bytes(self.lab)
        freed = self.lab.pool.forget(digest)
        assert before - lab_bytes(self.lab) == freed.device_bytes + freed.host_bytes
        assert digest not in self.lab.pool.pinned
        assert digest not in self.lab.pool.hosted
        assert digest not in self.lab.pool.resident or digest in self.pins

    @invariant()
    def nothing_leaks(self) -> None:
        if not hasattr(self, "lab"):
            return
        lab = self.lab
        lab.pool.check_integrity(dict(self.pins))
        assert lab.device.num_free_blocks >= 0
        assert len(lab.device.windows) == len(lab.pool.resident) + len(lab.loads.copies)
        assert set(lab.device.installed.values()) == set(lab.pool.resident)
        for digest, slot in self.slot_of.items():
            assert lab.device.installed[slot] == digest, "an adapter in use was overwritten"
        # One that is waited for may outweigh the tier; reads in flight may come on top.
        assert lab.host.size_bytes <= lab.host.max_bytes + 5 * LARGEST * BLOCK_BYTES

    def teardown(self) -> None:
        """From any state, every adapter still gets its turn, and all memory comes back."""
        if not hasattr(self, "lab"):
            return
        self.lab.device.num_kv_blocks = 0
        for digest in self.pins.elements():
            self.lab.pool.release(digest)
        for digest in tuple(self.lab.loads.reads):
            self.lab.finish_read(digest)
        self.lab.bring(*GOOD)
        for digest in DIGESTS:
            self.lab.pool.forget(digest)
        assert self.lab.device.num_free_blocks == self.lab.device.num_blocks
        assert self.lab.host.size_bytes == 0
        assert not self.lab.device.installed


Tiers.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestTiers = Tiers.TestCase


@settings(max_examples=400, deadline=None)
@given(
    num_slots=st.integers(1, 4),
    max_blocks=st.integers(LARGEST, 30),
    sequence_blocks=st.integers(1, 10),
    patient=st.sampled_from(GOOD),
    others=st.lists(st.sampled_from(GOOD), min_size=1, max_size=4),
    num_passes_each=st.integers(1, 6),
    kv_blocks_each=st.integers(0, 5),
    pinned=st.lists(st.sampled_from(GOOD), max_size=3, unique=True),
)
def test_nobody_starves_an_adapter_that_is_first_in_turn(
    num_slots: int,
    max_blocks: int,
    sequence_blocks: int,
    patient: str,
    others: list[str],
    num_passes_each: int,
    kv_blocks_each: int,
    pinned: list[str],
) -> None:
    """Others come in every pass, take all that admission leaves them, and stay a while."""
    lab = TierLab(num_slots, num_blocks=max_blocks + sequence_blocks, max_blocks=max_blocks)
    for digest in pinned[: num_slots - 1]:
        lab.pool.pin(digest)
    others = [digest for digest in others if digest != patient]
    running: deque[list[str]] = deque()

    def run_a_pass(first: list[str]) -> list[str]:
        lab.finish_all()
        if len(running) >= num_passes_each:
            for digest in running.popleft():
                lab.pool.release(digest)
                lab.device.num_kv_blocks -= kv_blocks_each
        lab.pool.begin_pass()
        served = [digest for digest in first if lab.pool.acquire(digest) is not None]
        running.append([digest for digest in others if admit(digest)])
        for digest in lab.pool.absent_pins:
            lab.pool.bring(digest, "device")
        return served

    def admit(digest: str) -> bool:
        if lab.pool.acquire(digest) is None:
            return False
        missing = kv_blocks_each + lab.pool.num_reserved_blocks - lab.device.num_free_blocks
        if missing > 0 and lab.pool.make_room(missing) < missing:
            lab.pool.release(digest)
            return False
        lab.device.num_kv_blocks += kv_blocks_each
        return True

    for _ in range(3 * num_passes_each):
        run_a_pass([])
    assert any(run_a_pass([patient]) for _ in range(MANY_PASSES)), "it waited for ever"
