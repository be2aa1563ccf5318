"""What survives of a request whose gateway dies, and what its tokens are counted as."""

import os
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.protocol import Frame, SequenceEvent, SequenceState
from gateway.errors import JournalCorrupt, JournalFailed, JournalInUse
from gateway.journal import Journal, Opened, Settlement
from gateway.segments import find_segments
from tests.gateway.money import a_request, frame_of


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal.open(tmp_path / "journal")
    yield journal
    journal.close()


def left_behind(directory: Path) -> list[Settlement]:
    """What a new process finds after the death of the one that wrote there."""
    journal = Journal.open(directory)
    try:
        return journal.take_over(journal.find_leftovers())
    finally:
        journal.close()


def die(journal: Journal) -> None:
    """What `kill -9` does to a journal: the kernel has its bytes and drops its lock."""
    journal._segments.close(keep=True)
    journal._lock.release()


def only_segment(directory: Path) -> Path:
    [folder] = directory.iterdir()
    [[path]] = find_segments(folder).values()
    return path


def run_with_journal(directory: Path, script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_a_killed_process_leaves_exactly_the_records_that_were_acknowledged(tmp_path: Path) -> None:
    script = """
        import itertools, sys
        from pathlib import Path
        from gateway.journal import Journal
        from tests.gateway.money import a_request, frame_of

        journal = Journal.open(Path(sys.argv[1]), max_segment_bytes=4096)
        for number in itertools.count(1):
            request = a_request(sequence_ids=(number,), prompt_tokens=number)
            journal.opened(request)
            journal.on_frame(frame_of((number, 1), (number - 1, 2)))
            print(request.request_id, number, flush=True)
    """
    with run_with_journal(tmp_path, script) as process:
        assert process.stdout is not None
        acknowledged = [process.stdout.readline().split() for _ in range(300)]
        process.send_signal(signal.SIGKILL)
        acknowledged += [line.split() for line in process.stdout if line.count(" ") == 1]
    expected = [(uuid.UUID(name), int(number)) for name, number in acknowledged]

    found = [
        (each.request_id, each.bill.prompt_tokens) for each in left_behind(tmp_path) if each.bill
    ]

    assert found[: len(expected)] == expected
    # The one that was written when the signal came, before it could be told.
    assert len(found) - len(expected) <= 1


def test_tokens_of_the_last_frame_before_a_kill_are_billed(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    request = a_request(sequence_ids=(1,), prompt_tokens=10)
    meter = journal.opened(request)
    journal.on_frame(frame_of((1, 1)))
    journal.on_frame(frame_of((1, 2)))
    shown = meter.usage()
    die(journal)

    [found] = left_behind(tmp_path)

    assert found.outcome == "abort"
    assert found.bill == shown
    assert shown.completion_tokens == 2


def test_an_unsent_answer_is_free_after_a_kill(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    journal.opened(a_request(sequence_ids=(1,), is_streamed=False))
    journal.on_frame(frame_of((1, 5)))
    die(journal)
    assert [each.bill for each in left_behind(tmp_path)] == [None]


def test_a_sent_answer_is_billed_after_a_kill_as_its_client_was_shown(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    request = a_request(sequence_ids=(1,), is_streamed=False)
    journal.opened(request)
    journal.on_frame(frame_of((1, 5), engine_ns=70))
    shown = journal.closed(request.request_id, "length")
    die(journal)
    [found] = left_behind(tmp_path)
    assert found == shown
    assert found.bill is not None
    assert found.bill.completion_tokens == 5


def read_through(*sequence_ids: int, cached: int = 0) -> Frame:
    """One step in which the last token of each of these prompts was computed."""
    ended = [
        SequenceEvent(number, SequenceState.STOPPED, [], 5, cached, 0, 7, vector=b"\0" * 4)
        for number in sequence_ids
    ]
    return Frame(1, 1, ended)


def a_request_for_vectors(*sequence_ids: int) -> Opened:
    return a_request(
        sequence_ids=sequence_ids,
        is_streamed=False,
        prompt_tokens=5 * len(sequence_ids),
        max_output_tokens=0,
        funded_output_tokens=0,
    )


def test_a_request_for_vectors_owes_all_its_prompts_once_all_are_read(journal: Journal) -> None:
    request = a_request_for_vectors(1, 2, 3)
    meter = journal.opened(request)
    for _ in range(2):
        journal.on_frame(read_through(1, 2, cached=2))
        assert meter.usage().prompt_tokens == 0
    journal.on_frame(read_through(3))
    found = journal.closed(request.request_id, "stop").bill
    assert found == meter.usage()
    assert found is not None
    assert (found.prompt_tokens, found.cached_tokens, found.completion_tokens) == (15, 4, 0)
    assert found.engine_ns == 21
    assert found.cost_nano > 0


def test_a_request_for_vectors_that_was_not_sent_or_not_whole_is_free(journal: Journal) -> None:
    unsent, unread = a_request_for_vectors(1), a_request_for_vectors(2, 3)
    for request in (unsent, unread):
        journal.opened(request)
    journal.on_frame(read_through(1, 2))
    assert journal.closed(unsent.request_id, "abort", sent=False).bill is None
    assert journal.closed(unread.request_id, "stop").bill is None


def test_vectors_that_were_sent_are_billed_after_a_kill_and_others_not(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    sent, unsent = a_request_for_vectors(1, 2), a_request_for_vectors(3)
    for request in (sent, unsent):
        journal.opened(request)
    journal.on_frame(read_through(1, 2, 3))
    shown = journal.closed(sent.request_id, "stop")
    die(journal)
    found = left_behind(tmp_path)
    assert [each.bill for each in found] == [shown.bill, None]


def test_what_was_settled_is_not_brought_again(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    done, running = a_request(sequence_ids=(1,)), a_request(sequence_ids=(2,))
    journal.opened(done)
    journal.opened(running)
    journal.on_frame(frame_of((1, 1), (2, 1)))
    journal.closed(done.request_id, "stop")
    journal.settled([done.request_id])
    die(journal)
    assert [each.request_id for each in left_behind(tmp_path)] == [running.request_id]


@pytest.mark.parametrize("cut", [1, 5, 11, 30])
def test_a_torn_tail_is_cut_and_the_records_before_it_count(
    tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal.open(tmp_path)
    journal.opened(a_request(sequence_ids=(1,)))
    journal.on_frame(frame_of((1, 1)))
    whole = only_segment(tmp_path).stat().st_size
    journal.on_frame(frame_of((1, 2)))
    die(journal)
    os.truncate(only_segment(tmp_path), whole + cut)

    [found] = left_behind(tmp_path)

    assert found.bill is not None
    assert found.bill.completion_tokens == 1
    [report] = [each for each in caplog.records if each.message == "journal_tail_cut"]
    assert (report.__dict__["position"], report.__dict__["size_bytes"]) == (whole, cut)


def test_zeros_that_a_power_loss_leaves_at_the_end_are_a_torn_tail(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    journal.opened(a_request(sequence_ids=(1,)))
    journal.on_frame(frame_of((1, 1)))
    die(journal)
    with only_segment(tmp_path).open("ab") as file:
        file.write(bytes(4096))
    assert len(left_behind(tmp_path)) == 1


@pytest.mark.parametrize("offset", [0, 2, 6, 10, 40])
def test_damage_before_good_records_is_an_error_that_names_the_place(
    tmp_path: Path, offset: int
) -> None:
    instance_id = uuid.uuid4()
    journal = Journal.open(tmp_path, instance_id)
    journal.opened(a_request(sequence_ids=(1,)))
    damaged_at = only_segment(tmp_path).stat().st_size
    for _ in range(2):
        journal.opened(a_request(sequence_ids=(2,)))
    die(journal)
    path = only_segment(tmp_path)
    data = bytearray(path.read_bytes())
    data[damaged_at + offset] ^= 0xFF
    path.write_bytes(data)

    again = Journal.open(tmp_path, instance_id)
    with pytest.raises(JournalCorrupt) as caught:
        again.find_leftovers()
    again.close()

    assert (caught.value.path, caught.value.position) == (path, damaged_at)
    assert path.read_bytes() == data


def test_the_damage_of_a_dead_sibling_stops_nobody_else(tmp_path: Path) -> None:
    sibling = Journal.open(tmp_path, uuid.uuid4())
    for number in range(3):
        sibling.opened(a_request(sequence_ids=(number,)))
    die(sibling)
    path = only_segment(tmp_path)
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    journal = Journal.open(tmp_path, uuid.uuid4())
    assert journal.find_leftovers() == []
    journal.close()
    assert path.exists()


def test_two_processes_cannot_write_one_journal(tmp_path: Path) -> None:
    instance_id = uuid.uuid4()
    journal = Journal.open(tmp_path, instance_id)
    with pytest.raises(JournalInUse):
        Journal.open(tmp_path, instance_id)
    other = Journal.open(tmp_path)
    assert other.instance_id != instance_id
    other.close()
    journal.close()


def test_processes_that_start_at_once_each_find_a_folder(tmp_path: Path) -> None:
    """Whoever makes one may be outrun by another who looks for one that nobody has."""
    with ThreadPoolExecutor(8) as pool:
        for attempt in range(20):
            directory = tmp_path / str(attempt)
            journals = list(pool.map(lambda _, at=directory: Journal.open(at), range(8)))
            assert len({journal.instance_id for journal in journals}) == 8
            for journal in journals:
                journal.close()


def test_a_new_process_goes_on_as_an_instance_that_is_dead_with_a_larger_epoch(
    tmp_path: Path,
) -> None:
    first = Journal.open(tmp_path)
    first.close()
    second = Journal.open(tmp_path)
    assert (second.instance_id, second.epoch) == (first.instance_id, first.epoch + 1)
    second.close()


def test_a_living_siblings_files_are_left_alone_and_a_dead_ones_are_taken_over(
    tmp_path: Path,
) -> None:
    journal, sibling = (Journal.open(tmp_path, uuid.uuid4()) for _ in range(2))
    request = a_request(sequence_ids=(1,))
    sibling.opened(request)
    sibling.on_frame(frame_of((1, 3)))
    assert journal.find_leftovers() == []

    die(sibling)
    [found] = journal.take_over(journal.find_leftovers())
    assert found.request_id == request.request_id
    assert journal.known_request_ids() == {request.request_id}
    # Nobody else takes it over meanwhile, and it is told once.
    with pytest.raises(JournalInUse):
        Journal.open(tmp_path, sibling.instance_id)
    assert journal.find_leftovers() == []

    journal.settled([request.request_id])
    assert find_segments(tmp_path / str(sibling.instance_id)) == {}
    Journal.open(tmp_path, sibling.instance_id).close()
    journal.close()


def test_segments_go_when_all_that_began_in_them_is_settled(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, max_segment_bytes=1000)
    [folder] = tmp_path.iterdir()
    requests = [a_request(sequence_ids=(number,)) for number in range(30)]
    for request in requests:
        journal.opened(request)
        journal.on_frame(frame_of((request.sequence_ids[0], 1)))
        journal.closed(request.request_id, "stop")
    num_segments = len(find_segments(folder)[1])
    assert num_segments > 3

    # The first one is still owed, so everything since stays.
    journal.settled([request.request_id for request in requests[1:]])
    assert len(find_segments(folder)[1]) >= num_segments
    journal.settled([requests[0].request_id])
    assert len(find_segments(folder)[1]) == 1
    journal.close()
    assert find_segments(folder) == {}


def test_a_full_disk_leaves_meters_where_the_journal_stands(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = journal.opened(a_request(sequence_ids=(1,)))
    journal.on_frame(frame_of((1, 1)))
    path = only_segment(journal._directory)
    before = path.read_bytes()
    write = os.write

    def write_a_little(fd: int, data: Any) -> int:
        if len(data) < 10:
            raise OSError(28, "No space left on device")
        return write(fd, data[:10])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_a_little)
        with pytest.raises(JournalFailed):
            journal.on_frame(frame_of((1, 2)))
    assert meter.completion_tokens == 1
    assert path.read_bytes() == before

    journal.on_frame(frame_of((1, 3)))
    assert meter.completion_tokens == 3


def test_nothing_is_written_after_the_end(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    journal.close()
    with pytest.raises(JournalFailed):
        journal.opened(a_request(sequence_ids=(1,)))
    journal.sync()


# Meters


def test_the_prompt_counts_once_whatever_the_number_of_sequences(journal: Journal) -> None:
    meter = journal.opened(a_request(sequence_ids=(1, 2, 3), prompt_tokens=50))
    journal.on_frame(frame_of((1, 1), cached=16))
    journal.on_frame(frame_of((1, 2), cached=16))
    journal.on_frame(frame_of((2, 4), (3, 5), cached=48))
    assert (meter.prompt_tokens, meter.cached_tokens, meter.completion_tokens) == (50, 16, 11)


def test_each_of_several_prompts_counts_once_an_answer_to_it_has_begun(journal: Journal) -> None:
    request = a_request(sequence_ids=(1, 2, 3, 4), prompt_tokens=70, prompt_lengths=(50, 20))
    meter = journal.opened(request)
    journal.on_frame(frame_of((2, 1), cached=32))
    assert (meter.prompt_tokens, meter.cached_tokens, meter.completion_tokens) == (50, 32, 1)
    journal.on_frame(frame_of((1, 4), cached=0))
    journal.on_frame(frame_of((3, 2), (4, 2), cached=16))
    assert (meter.prompt_tokens, meter.cached_tokens, meter.completion_tokens) == (70, 16, 9)


def test_no_token_means_no_prompt_to_pay_for(journal: Journal) -> None:
    request = a_request(sequence_ids=(1,))
    meter = journal.opened(request)
    journal.on_frame(
        Frame(1, 1, [SequenceEvent(1, SequenceState.FAILED, [], 10, 0, 0, engine_ns=9)])
    )
    assert meter.usage().cost_nano == 0
    assert journal.closed(request.request_id, "error").bill is None


def test_a_frame_that_comes_twice_counts_once(journal: Journal) -> None:
    meter = journal.opened(a_request(sequence_ids=(1,)))
    for _ in range(2):
        journal.on_frame(frame_of((1, 4)))
    assert meter.completion_tokens == 4


def test_nothing_counts_after_the_client_is_gone(journal: Journal) -> None:
    request = a_request(sequence_ids=(1,))
    meter = journal.opened(request)
    journal.on_frame(frame_of((1, 4)))
    meter.disconnect()
    journal.on_frame(frame_of((1, 5)))
    meter.cap(1, 2)
    closed = journal.closed(request.request_id, "abort", sent=False)
    assert closed.bill is not None
    assert closed.bill.completion_tokens == 4


@pytest.mark.parametrize(
    ("is_streamed", "leaves", "outcome", "sent", "is_billed"),
    [
        (True, False, "stop", True, True),
        (True, True, "abort", False, True),
        (True, False, "error", False, True),
        (False, False, "stop", True, True),
        (False, False, "stop", False, False),
        (False, True, "abort", True, False),
        (False, False, "error", True, False),
    ],
)
def test_who_pays_for_an_answer(
    journal: Journal, is_streamed: bool, leaves: bool, outcome: str, sent: bool, is_billed: bool
) -> None:
    request = a_request(sequence_ids=(1,), is_streamed=is_streamed)
    meter = journal.opened(request)
    journal.on_frame(frame_of((1, 4)))
    if leaves:
        meter.disconnect()
    assert (journal.closed(request.request_id, outcome, sent=sent).bill is not None) is is_billed


def test_tokens_that_nobody_has_searched_for_a_stop_string_are_not_billed(tmp_path: Path) -> None:
    """A gateway that is killed before it found the stop bills nothing behind it."""
    journal = Journal.open(tmp_path)
    request = a_request(sequence_ids=(1,))
    meter = journal.opened(request)
    meter.await_caps()
    journal.on_frame(frame_of((1, 3)))
    assert meter.completion_tokens == 0
    meter.cap(1, 3)
    journal.on_frame(frame_of((1, 9)))
    assert meter.completion_tokens == 3
    die(journal)
    [found] = left_behind(tmp_path)
    assert found.bill is not None
    assert found.bill.completion_tokens == 3


def test_tokens_after_a_stop_string_are_not_billed_even_after_a_kill(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    meter = journal.opened(a_request(sequence_ids=(1, 2)))
    journal.on_frame(frame_of((1, 8), (2, 3)))
    meter.cap(1, 5)
    journal.on_frame(frame_of((1, 9), (2, 4)))
    assert meter.completion_tokens == 9
    die(journal)
    [found] = left_behind(tmp_path)
    assert found.bill is not None
    assert found.bill.completion_tokens == 9


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("frame"), st.lists(st.integers(0, 5), min_size=1, max_size=4)),
        st.tuples(st.just("disconnect"), st.integers(0, 2)),
        st.tuples(st.just("cap"), st.integers(0, 5)),
        st.tuples(st.just("close"), st.integers(0, 2)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_a_replay_finds_what_the_meters_showed(
    tmp_path_factory: pytest.TempPathFactory, steps: Sequence[tuple[str, Any]]
) -> None:
    """Three streamed requests of two sequences each, any order of events, then a kill.

    The first of them asks two prompts, the others one twice.
    """
    directory = tmp_path_factory.mktemp("journal")
    journal = Journal.open(directory, max_segment_bytes=700)
    requests = [
        a_request(sequence_ids=(2 * n, 2 * n + 1), prompt_lengths=() if n else (6, 4))
        for n in range(3)
    ]
    meters = [journal.opened(request) for request in requests]
    generated = [0] * 6
    closed: set[int] = set()
    for kind, argument in steps:
        if kind == "frame":
            for sequence_id in argument:
                generated[sequence_id] += 1
            journal.on_frame(frame_of(*((each, generated[each]) for each in set(argument))))
        elif kind == "cap" and argument // 2 not in closed:
            meters[argument // 2].cap(argument, generated[argument])
        elif kind == "disconnect":
            meters[argument].disconnect()
        elif kind == "close" and argument not in closed:
            closed.add(argument)
            journal.closed(requests[argument].request_id, "stop")
    shown = {meter.opened.request_id: meter.usage() for meter in meters}
    die(journal)

    found = {each.request_id: each.bill for each in left_behind(directory)}

    assert found == {
        request_id: usage if usage.completion_tokens else None
        for request_id, usage in shown.items()
    }
