import pytest

from engine.breaker import Breaker
from engine.errors import AdapterQuarantined, InvalidLogits
from engine.protocol import SequenceState
from engine.sequence import SequenceKey, StepEvent


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock_s=clock)


def key(number: int) -> SequenceKey:
    return "worker", 1, number


def event(
    number: int, state: SequenceState, token_ids: list[int], *, digest: str | None = "a"
) -> StepEvent:
    fault = InvalidLogits().fault() if state is SequenceState.FAILED else None
    return StepEvent(key(number), state, token_ids, 1, 0, 0, 0, fault=fault, adapter_digest=digest)


def fail(breaker: Breaker, times: int = 3, digest: str | None = "a") -> None:
    for _ in range(times):
        breaker.observe([event(99, SequenceState.FAILED, [], digest=digest)])


def is_refused(breaker: Breaker, number: int = 0, digest: str | None = "a") -> bool:
    try:
        breaker.admit(digest, key(number))
    except AdapterQuarantined:
        return True
    return False


def test_three_faults_within_a_minute_quarantine_an_adapter_and_no_other(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker, 2)
    assert not is_refused(breaker)
    clock.now_s += 59
    fail(breaker, 1)
    assert is_refused(breaker)
    assert not is_refused(breaker, digest="b")
    assert not is_refused(breaker, digest=None)
    assert breaker.quarantined == ("a",)


def test_faults_that_lie_far_apart_do_no_harm(breaker: Breaker, clock: Clock) -> None:
    for _ in range(10):
        fail(breaker, 1)
        clock.now_s += 31
    assert not is_refused(breaker)


def test_the_base_model_alone_is_never_refused(breaker: Breaker) -> None:
    fail(breaker, 10, digest=None)
    assert not is_refused(breaker, digest=None)
    assert breaker.quarantined == ()


def test_failed_loads_count_as_bad_logits_do(breaker: Breaker) -> None:
    fail(breaker, 2)
    breaker.record_fault("a")
    assert is_refused(breaker)


def test_other_ends_are_no_faults(breaker: Breaker) -> None:
    for state in (SequenceState.ABORTED, SequenceState.LENGTH, SequenceState.STOPPED):
        breaker.observe([event(n, state, []) for n in range(5)])
    assert not is_refused(breaker)


def test_a_refusal_is_retryable_and_says_until_when(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now_s += 12.5
    with pytest.raises(AdapterQuarantined, match="in 18 s") as found:
        breaker.admit("a", key(1))
    fault = found.value.fault()
    assert (fault.code, fault.is_retryable) == ("adapter_quarantined", True)


def test_after_the_quarantine_one_sequence_tries_and_its_first_token_lets_all_pass(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker)
    clock.now_s += 30
    assert not is_refused(breaker, 1)
    assert is_refused(breaker, 2)
    breaker.observe([event(3, SequenceState.RUNNING, [7])])
    assert is_refused(breaker, 2)
    breaker.observe([event(1, SequenceState.RUNNING, [7])])
    assert not is_refused(breaker, 2)
    assert breaker.quarantined == ()


def test_each_trial_that_fails_doubles_the_quarantine_up_to_ten_minutes(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker)
    for quarantine_s in (30, 60, 120, 240, 480, 600, 600):
        clock.now_s += quarantine_s - 1
        assert is_refused(breaker)
        clock.now_s += 1
        assert not is_refused(breaker, 1)
        breaker.observe([event(1, SequenceState.FAILED, [])])


def test_a_trial_that_is_aborted_lets_another_try(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now_s += 30
    assert not is_refused(breaker, 1)
    breaker.observe([event(1, SequenceState.ABORTED, [])])
    assert not is_refused(breaker, 2)
    assert is_refused(breaker, 3)


def test_faults_of_sequences_that_ran_already_do_not_prolong_a_quarantine(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker)
    clock.now_s += 29
    fail(breaker, 10)
    clock.now_s += 1
    assert not is_refused(breaker)


def test_an_adapter_that_fails_again_soon_is_quarantined_for_longer(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker)
    clock.now_s += 30
    assert not is_refused(breaker, 1)
    breaker.observe([event(1, SequenceState.RUNNING, [7])])
    fail(breaker, 3)
    clock.now_s += 59
    assert is_refused(breaker)
    clock.now_s += 1
    assert not is_refused(breaker, 2)
    breaker.observe([event(2, SequenceState.RUNNING, [7])])
    # Ten good minutes later nothing is held against it.
    clock.now_s += 601
    fail(breaker, 3)
    clock.now_s += 30
    assert not is_refused(breaker)


def test_memory_is_bounded_and_trials_go_with_their_records(clock: Clock) -> None:
    breaker = Breaker(clock_s=clock, max_digests=10)
    fail(breaker)
    clock.now_s += 30
    assert not is_refused(breaker, 1)
    for number in range(1000):
        fail(breaker, 3, digest=f"bad-{number}")
    assert len(breaker.quarantined) == 10
    breaker.observe([event(1, SequenceState.RUNNING, [7])])
    assert not is_refused(breaker, 2)


def test_a_fault_without_doubt_quarantines_at_once_and_is_named_until_the_adapter_works(
    breaker: Breaker, clock: Clock
) -> None:
    breaker.quarantine("a", reason="is not what its probe found")
    with pytest.raises(AdapterQuarantined, match="a is not what its probe found"):
        breaker.check("a")
    clock.now_s += 30
    breaker.check("a")
    assert not is_refused(breaker, 1)
    with pytest.raises(AdapterQuarantined, match="It is being tried again"):
        breaker.admit("a", key(2))
    breaker.observe([event(1, SequenceState.RUNNING, [7])])
    fail(breaker)
    with pytest.raises(AdapterQuarantined, match="failed 3 times"):
        breaker.check("a")
