"""What this gateway has to remember to bill exactly, written before anything is sent.

One record when a request is admitted, one per engine frame, one when the request ends; a replay of
them says what is owed. Each process writes a folder of its own under a lock; the folders of dead
processes on the same host are replayed by the living. Knows tokens and prices, no SQL, no HTTP.

A *streamed* request is billed for each token in a frame that was journalled while its client was
connected; where a stop string may end it, once the text up to that token was searched for one. An
answer that is not streamed is billed only if its end was journalled as sent, just before its body
was written. A request that wants no output is such an answer, and owes its prompts alone. A request
without one billable token is free: its hold is released and no usage event is written. A line of a
batch is settled together with its result, before its end is journalled: see `gateway.batches`.

The cost of a request while it waits for settlement is memory here, but no request begins without a
hold committed to the same database that settles it, so a database that is down stops the queue
from growing as soon as the requests in flight have ended.
"""

import contextlib
import datetime
import fcntl
import logging
import os
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from engine.protocol import Frame, SequenceEvent, SequenceState
from gateway.auth import Principal
from gateway.errors import JournalCorrupt, JournalFailed, JournalInUse
from gateway.limits import Admission
from gateway.prices import Bill, Price, bill
from gateway.registry import Target
from gateway.segments import Segments, find_segments, peek_records, read_records, sync_folder

logger = logging.getLogger(__name__)

# A file that is replayed in well under a second.
MAX_SEGMENT_BYTES = 1 << 24
# Outcomes that are not an answer's own finish reason.
ABORTED, FAILED = "abort", "error"


class Opened(msgspec.Struct, frozen=True, array_like=True, tag="opened"):
    """A request was admitted: all that its usage event will need besides the counts."""

    # Counts up within an epoch; the later records of the request name it by this.
    number: int
    request_id: uuid.UUID
    gateway_instance_id: uuid.UUID
    tenant_id: uuid.UUID
    api_key_id: uuid.UUID
    base_model_id: uuid.UUID
    adapter_id: uuid.UUID | None
    adapter_version_id: uuid.UUID | None
    version_digest: str | None
    price: Price
    endpoint: str
    is_streamed: bool
    # Known before the engine is asked, of all prompts together; each is billed once, however many
    # sequences answer it.
    prompt_tokens: int
    # Over all sequences; 0 where the request wants no output, only what its prompts make.
    max_output_tokens: int
    # What the hold pays for at admission.
    funded_output_tokens: int
    started_at: datetime.datetime
    sequence_ids: tuple[int, ...]
    # What the request's `user` field said.
    end_user: str | None = None
    # What it has in common with other attempts at it, and whether it came after one.
    attempt_digest: bytes | None = None
    is_retry: bool = False
    # Where there are several prompts: the sequences answer them in order, as many each.
    prompt_lengths: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        principal: Principal,
        target: Target,
        admission: Admission,
        *,
        endpoint: str,
        is_streamed: bool,
        prompt_tokens: int,
        sequence_ids: Sequence[int],
        end_user: str | None = None,
        attempt_digest: bytes | None = None,
        is_retry: bool = False,
        prompt_lengths: Sequence[int] = (),
    ) -> Self:
        assert principal.tenant_id is not None, "only tenants are billed"
        return cls(
            number=0,  # given by Journal.opened
            request_id=admission.request_id,
            gateway_instance_id=admission.gateway_instance_id,
            tenant_id=principal.tenant_id,
            api_key_id=principal.key_id,
            base_model_id=target.base_model_id,
            adapter_id=target.adapter_id,
            adapter_version_id=target.adapter_version_id,
            version_digest=target.version_digest,
            price=admission.price,
            endpoint=endpoint,
            is_streamed=is_streamed,
            prompt_tokens=prompt_tokens,
            max_output_tokens=admission.max_output_tokens,
            funded_output_tokens=admission.funded_output_tokens,
            started_at=admission.admitted_at,
            sequence_ids=tuple(sequence_ids),
            end_user=end_user,
            attempt_digest=attempt_digest,
            is_retry=is_retry,
            prompt_lengths=tuple(prompt_lengths),
        )


class Count(msgspec.Struct, frozen=True, array_like=True):
    """What one request may be billed for so far; the last one counts."""

    number: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    engine_ns: int


class Progress(msgspec.Struct, frozen=True, array_like=True, tag="progress"):
    """One engine frame: the counts of all streamed requests that it moved."""

    at: datetime.datetime
    counts: list[Count]


class Closed(msgspec.Struct, frozen=True, array_like=True, tag="closed"):
    """A request ended. Without a bill it was free."""

    number: int
    outcome: str
    finished_at: datetime.datetime
    bill: Bill | None


class Settled(msgspec.Struct, frozen=True, array_like=True, tag="settled"):
    """The database has these; a replay need not bring them again."""

    numbers: list[int]


Record = Opened | Progress | Closed | Settled

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


@dataclass(frozen=True, slots=True)
class Settlement:
    """A request that ended, as the database shall see it. Without a bill its hold is released."""

    opened: Opened
    outcome: str
    finished_at: datetime.datetime
    bill: Bill | None

    @property
    def request_id(self) -> uuid.UUID:
        return self.opened.request_id


class _SequenceCount:
    """Mutable: what the frames said of one sequence."""

    __slots__ = ("cached", "cap", "engine_ns", "generated")

    def __init__(self) -> None:
        self.generated = 0
        self.cached = 0
        self.engine_ns = 0
        # Filled by `Meter.cap` where a stop string may end the sequence: how far it did not.
        self.cap: int | None = None

    @property
    def billable(self) -> int:
        return self.generated if self.cap is None else min(self.generated, self.cap)


class Meter:
    """Mutable: the counts of one running request, as far as they are journalled.

    Grows with the journal's frames. Belongs to the event loop's thread.
    """

    def __init__(self, opened: Opened, journal: "Journal") -> None:
        self.opened = opened
        self.is_connected = True
        self._journal = journal
        self._sequences = {sequence_id: _SequenceCount() for sequence_id in opened.sequence_ids}
        # What almost every request has; None where there are several.
        self._only = next(iter(self._sequences.values())) if len(self._sequences) == 1 else None
        self._count = Count(opened.number, 0, 0, 0, 0)
        # What its hold pays for; grows with the heartbeats.
        self.funded_output_tokens = opened.funded_output_tokens
        # Whether tokens beyond that are counted, because no budget stands against them.
        self.is_budgeted = False

    @property
    def prompt_tokens(self) -> int:
        return self._count.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        return self._count.cached_tokens

    @property
    def completion_tokens(self) -> int:
        return self._count.completion_tokens

    @property
    def engine_ns(self) -> int:
        return self._count.engine_ns

    def disconnect(self) -> None:
        """The client is gone: nothing that comes from now on is counted."""
        self.is_connected = False

    def await_caps(self) -> None:
        """Count no token before `cap` has let it pass: a stop string may come before it."""
        for sequence in self._sequences.values():
            sequence.cap = 0

    def cap(self, sequence_id: int, num_tokens: int) -> None:
        """No stop string ended this sequence before its n-th token; later ones are not billed yet.

        Raises JournalFailed.
        """
        if not self.is_connected:
            return
        self._sequences[sequence_id].cap = num_tokens
        self._journal.record_progress([self])

    def fund(self, output_tokens: int, *, is_budgeted: bool) -> None:
        """The hold pays for so many output tokens now; those that waited for it are counted.

        Raises JournalFailed.
        """
        # A heartbeat that had nothing to ask for was told nothing of budgets.
        is_news = output_tokens > self.funded_output_tokens
        self.is_budgeted = is_budgeted or (self.is_budgeted and not is_news)
        self.funded_output_tokens = max(self.funded_output_tokens, output_tokens)
        if self.is_connected:
            self._journal.record_progress([self])

    def usage(self) -> Bill:
        """Counts and cost so far; the same that a replay would find for a streamed request."""
        return _bill(self.opened, self._count)

    def apply(self, event: SequenceEvent) -> None:
        """Take over one event. Its counters are cumulative, so applying it twice does no harm."""
        sequence = self._sequences[event.sequence_id]
        if event.generated_tokens > sequence.generated:
            sequence.generated = event.generated_tokens
        sequence.cached = event.cached_tokens
        if event.engine_ns > sequence.engine_ns:
            sequence.engine_ns = event.engine_ns

    def latest(self) -> Count:
        """What the events so far add up to, whether journalled or not."""
        if self._only is not None:
            return self._latest_of_one(self._only)
        sequences = self._sequences.values()
        prompt_tokens, cached_tokens = self._prompts_begun(list(sequences))
        return Count(
            self.opened.number,
            prompt_tokens,
            cached_tokens,
            self._payable(sum(each.billable for each in sequences)),
            sum(each.engine_ns for each in sequences) if prompt_tokens else 0,
        )

    def _prompts_begun(self, sequences: Sequence[_SequenceCount]) -> tuple[int, int]:
        """Tokens of the prompts to which an answer has begun, and how many of them were cached.

        Of several sequences that answer one prompt the first computes it and the others find it
        cached: it was computed once, and is billed as that one found it.
        """
        lengths = self.opened.prompt_lengths or (self.opened.prompt_tokens,)
        num_answers = len(sequences) // len(lengths)
        prompt_tokens = cached_tokens = 0
        for place, length in enumerate(lengths):
            answers = sequences[place * num_answers : (place + 1) * num_answers]
            found = [each.cached for each in answers if each.billable]
            if found:
                prompt_tokens += length
                cached_tokens += min(length, *found)
        return prompt_tokens, cached_tokens

    def _latest_of_one(self, sequence: _SequenceCount) -> Count:
        """On the way of every token."""
        number, billable = self.opened.number, sequence.billable
        if not billable:
            return Count(number, 0, 0, 0, 0)
        prompt = self.opened.prompt_tokens
        return Count(
            number,
            prompt,
            min(prompt, sequence.cached),
            self._payable(billable),
            sequence.engine_ns,
        )

    def _payable(self, num_tokens: int) -> int:
        return min(num_tokens, self.funded_output_tokens) if self.is_budgeted else num_tokens

    def commit(self, count: Count) -> None:
        """The journal has this count."""
        self._count = count

    def is_moved_by(self, count: Count) -> bool:
        """Whether money moves; engine time alone is not worth a record."""
        known = self._count
        return (
            count.completion_tokens != known.completion_tokens
            or count.prompt_tokens != known.prompt_tokens
            or count.cached_tokens != known.cached_tokens
        )


class PromptMeter(Meter):
    """Of a request that wants no output: it owes its prompts, all together, once all are read.

    Each sequence is a prompt of its own.
    """

    def __init__(self, opened: Opened, journal: "Journal") -> None:
        super().__init__(opened, journal)
        self._unread = set(opened.sequence_ids)

    def apply(self, event: SequenceEvent) -> None:
        """Take over the last event of a sequence: there is no other."""
        super().apply(event)
        if event.state is SequenceState.STOPPED:
            self._unread.discard(event.sequence_id)

    def latest(self) -> Count:
        number, prompt = self.opened.number, self.opened.prompt_tokens
        if self._unread:
            return Count(number, 0, 0, 0, 0)
        sequences = self._sequences.values()
        cached = sum(each.cached for each in sequences)
        return Count(
            number, prompt, min(prompt, cached), 0, sum(each.engine_ns for each in sequences)
        )


def _bill(opened: Opened, count: Count) -> Bill:
    return bill(
        opened.price,
        prompt_tokens=count.prompt_tokens,
        cached_tokens=count.cached_tokens,
        completion_tokens=count.completion_tokens,
        engine_ns=count.engine_ns,
    )


class Journal:
    """Mutable: the records of one gateway process and the meters of its running requests."""

    def __init__(
        self, folder: Path, lock: "FolderLock", *, instance_id: uuid.UUID, max_segment_bytes: int
    ) -> None:
        self.instance_id = instance_id
        self.epoch = lock.epoch
        self._directory = folder.parent
        self._lock = lock
        self._segments = Segments(folder, lock.epoch, max_segment_bytes=max_segment_bytes)
        self._num_opened = 0
        self._meters: dict[uuid.UUID, Meter] = {}
        # All links of a process count together: an id names one sequence on one engine.
        self._by_sequence: dict[int, Meter] = {}
        # Closed and not yet in the database.
        self._unsettled: dict[uuid.UUID, Settlement] = {}
        # Segment in which each request that is open or unsettled began.
        self._segment_of: dict[uuid.UUID, int] = {}
        self._num_pinned: Counter[int] = Counter()
        self._leftovers: list[Leftover] = []

    @classmethod
    def open(
        cls,
        directory: Path,
        instance_id: uuid.UUID | None = None,
        *,
        max_segment_bytes: int = MAX_SEGMENT_BYTES,
    ) -> "Journal":
        """Begin a new epoch of an instance's journal.

        Without an instance id it goes on as an instance of this host that is not running, or as a
        new one. Raises JournalInUse when the instance runs elsewhere.
        """
        lock = _claim(directory, instance_id)
        return cls(
            lock.folder,
            lock,
            instance_id=uuid.UUID(lock.folder.name),
            max_segment_bytes=max_segment_bytes,
        )

    def find_leftovers(self) -> list["Leftover"]:
        """What earlier lives of this journal and dead siblings on this host left behind.

        Changes nothing here, so a thread may call it; `take_over` must have the answer. Raises
        JournalCorrupt for damage in this instance's own files; a damaged sibling is left alone.
        """
        known = {leftover.folder for leftover in self._leftovers}
        found = []
        for folder in _instance_folders(self._directory):
            if folder in known:
                continue
            if folder == self._lock.folder:
                found.append(_read_leftover(folder, lock=None, before_epoch=self.epoch))
            else:
                found += _adopt(folder)
        return [leftover for leftover in found if leftover.unsettled]

    def take_over(self, leftovers: Sequence["Leftover"]) -> list[Settlement]:
        """Make leftovers this process's affair: `settled` must name each of these requests."""
        self._leftovers += leftovers
        return [each for leftover in leftovers for each in leftover.unsettled.values()]

    def opened(self, record: Opened) -> Meter:
        """Remember an admitted request, before its first frame can come. Raises JournalFailed."""
        self._num_opened += 1
        record = msgspec.structs.replace(record, number=self._num_opened)
        segment = self._append(record)
        meter = Meter(record, self) if record.max_output_tokens else PromptMeter(record, self)
        self._meters[record.request_id] = meter
        self._by_sequence.update(dict.fromkeys(record.sequence_ids, meter))
        self._segment_of[record.request_id] = segment
        self._num_pinned[segment] += 1
        return meter

    def on_frame(self, frame: Frame) -> None:
        """Count a frame and write it down; call it before any of its tokens is used.

        Raises JournalFailed; the meters then stand where the journal stands.
        """
        # In the order of their events.
        moved: dict[Meter, None] = {}
        for event in frame.events:
            meter = self._by_sequence.get(event.sequence_id)
            if meter is not None and meter.is_connected:
                meter.apply(event)
                moved[meter] = None
        self.record_progress(moved)

    def record_progress(self, meters: Iterable[Meter]) -> None:
        latest = [(meter, meter.latest()) for meter in meters]
        counts = [
            count
            for meter, count in latest
            if meter.opened.is_streamed and meter.is_moved_by(count)
        ]
        if counts:
            self._append(Progress(datetime.datetime.now(datetime.UTC), counts))
        for meter, count in latest:
            meter.commit(count)

    def closed(self, request_id: uuid.UUID, outcome: str, *, sent: bool = True) -> Settlement:
        """A request ended; the bill in the answer is final.

        Raises JournalFailed; the request then stays open here, and the next start settles it.
        """
        meter, settlement = self._meters[request_id], self.ending(request_id, outcome, sent=sent)
        self._append(Closed(meter.opened.number, outcome, settlement.finished_at, settlement.bill))
        del self._meters[request_id]
        for sequence_id in meter.opened.sequence_ids:
            del self._by_sequence[sequence_id]
        self._unsettled[request_id] = settlement
        return settlement

    def ending(self, request_id: uuid.UUID, outcome: str, *, sent: bool = True) -> Settlement:
        """What `closed` would say now; nothing is written."""
        meter = self._meters[request_id]
        return Settlement(
            opened=meter.opened,
            outcome=outcome,
            finished_at=datetime.datetime.now(datetime.UTC),
            bill=meter.usage() if _is_billed(meter, outcome, sent=sent) else None,
        )

    def settled(self, request_ids: Collection[uuid.UUID]) -> None:
        """The database has these: forget them, and drop the files that nobody needs any more."""
        numbers = []
        for request_id in request_ids:
            settlement = self._unsettled.pop(request_id, None)
            if settlement is not None:
                numbers.append(settlement.opened.number)
                self._num_pinned[self._segment_of.pop(request_id)] -= 1
        self._num_pinned = +self._num_pinned
        self._segments.drop_before(min(self._num_pinned, default=self._segments.number))
        if numbers:
            # Only spares the next start some work, so a full disk is no reason to stop here.
            with contextlib.suppress(JournalFailed):
                self._append(Settled(numbers))
        for leftover in self._leftovers:
            leftover.settled(request_ids)
        self._leftovers = [each for each in self._leftovers if each.unsettled]

    def open_meters(self) -> list[Meter]:
        return list(self._meters.values())

    def find_meter(self, request_id: uuid.UUID) -> Meter | None:
        """The meter of a request that is open."""
        return self._meters.get(request_id)

    def known_request_ids(self) -> set[uuid.UUID]:
        """All requests whose settlement is this journal's affair."""
        known = self._meters.keys() | self._unsettled.keys()
        return known.union(*(leftover.unsettled for leftover in self._leftovers))

    def sync(self) -> None:
        """Make what was written survive a loss of power. Blocks; made for a thread."""
        self._segments.sync()

    def close(self) -> None:
        """End this epoch. Its files stay if anything in them is not settled."""
        self._segments.close(keep=bool(self._segment_of))
        for leftover in self._leftovers:
            leftover.release()
        self._lock.release()

    def _append(self, record: Record) -> int:
        return self._segments.append(_encoder.encode(record))


def _is_billed(meter: Meter, outcome: str, *, sent: bool) -> bool:
    if not meter.completion_tokens and not meter.prompt_tokens:
        return False
    if meter.opened.is_streamed:
        return True
    return sent and meter.is_connected and outcome != FAILED


@dataclass(slots=True)
class Leftover:
    """Mutable: what dead processes left in one folder, until the database has all of it."""

    folder: Path
    paths: list[Path]
    unsettled: dict[uuid.UUID, Settlement]
    # None where the folder is this process's own.
    lock: "FolderLock | None"

    def settled(self, request_ids: Collection[uuid.UUID]) -> None:
        for request_id in request_ids:
            self.unsettled.pop(request_id, None)
        if not self.unsettled:
            for path in self.paths:
                path.unlink(missing_ok=True)
            self.release()

    def release(self) -> None:
        if self.lock is not None:
            self.lock.release()


def replay(records: Iterable[Record]) -> list[Settlement]:
    """What the records of one epoch leave to be settled, in the order of admission."""
    opened: dict[int, Opened] = {}
    counts: dict[int, tuple[Count, datetime.datetime]] = {}
    closed: dict[int, Closed] = {}
    for record in records:
        match record:
            case Opened():
                opened[record.number] = record
            case Progress():
                counts.update({count.number: (count, record.at) for count in record.counts})
            case Closed():
                closed[record.number] = record
            case Settled():
                for number in record.numbers:
                    opened.pop(number, None)
    return [
        _end_of(request, closed.get(number), counts.get(number))
        for number, request in opened.items()
    ]


@dataclass(frozen=True, slots=True)
class Told:
    """What a journal says of a request that ended."""

    settlement: Settlement
    # Whether the journal says that the database has it.
    is_settled: bool


def survey(directory: Path) -> list[Told]:
    """Every request that the journals of this host saw end; the files stay as they are.

    Raises JournalCorrupt.
    """
    if not directory.is_dir():
        return []
    return [
        told
        for folder in _instance_folders(directory)
        for paths in find_segments(folder).values()
        for told in _ended([_decoder.decode(raw) for path in paths for raw in peek_records(path)])
    ]


def _ended(records: Sequence[Record]) -> list[Told]:
    opened = {record.number: record for record in records if isinstance(record, Opened)}
    settled = {
        number for record in records if isinstance(record, Settled) for number in record.numbers
    }
    return [
        Told(_end_of(opened[record.number], record, None), record.number in settled)
        for record in records
        if isinstance(record, Closed) and record.number in opened
    ]


def _end_of(
    opened: Opened, closed: Closed | None, last: tuple[Count, datetime.datetime] | None
) -> Settlement:
    if closed is not None:
        return Settlement(opened, closed.outcome, closed.finished_at, closed.bill)
    if last is None or not last[0].completion_tokens:
        return Settlement(opened, ABORTED, opened.started_at, None)
    return Settlement(opened, ABORTED, last[1], _bill(opened, last[0]))


def _read_leftover(folder: Path, *, lock: "FolderLock | None", before_epoch: int) -> Leftover:
    unsettled: dict[uuid.UUID, Settlement] = {}
    read: list[Path] = []
    for epoch, paths in find_segments(folder).items():
        if epoch < before_epoch:
            settlements = replay(_records_of(paths))
            unsettled.update((each.request_id, each) for each in settlements)
            read += paths
    leftover = Leftover(folder, read, unsettled, lock)
    leftover.settled(())
    return leftover


def _records_of(paths: Sequence[Path]) -> list[Record]:
    records: list[Record] = []
    for path in paths:
        raw = read_records(path, is_last=path == paths[-1])
        records += [_decoder.decode(record) for record in raw.records]
    return records


def _adopt(folder: Path) -> list[Leftover]:
    """Take over the files of a sibling that is dead; nothing if it lives or left none."""
    if not find_segments(folder):
        return []
    lock = FolderLock.take(folder)
    if lock is None:
        return []
    try:
        return [_read_leftover(folder, lock=lock, before_epoch=1 << 63)]
    except (JournalCorrupt, OSError):
        # A sibling's damage must not stop this process; its own start reports it too.
        logger.exception("journal_of_sibling_unreadable", extra={"folder": str(folder)})
        lock.release()
        return []


def _instance_folders(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir() and _is_uuid(path.name))


def _is_uuid(name: str) -> bool:
    try:
        return str(uuid.UUID(name)) == name
    except ValueError:
        return False


def _claim(directory: Path, instance_id: uuid.UUID | None) -> "FolderLock":
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if instance_id is not None:
        lock = _take_own(directory, instance_id)
        if lock is None:
            raise JournalInUse(f"Another process writes to {directory / str(instance_id)}.")
        return lock.begin_epoch()
    while True:
        for folder in _instance_folders(directory):
            lock = FolderLock.take(folder)
            if lock is not None:
                return lock.begin_epoch()
        lock = _take_own(directory, uuid.uuid4())
        # Another process that looks for a folder may have found the new one first.
        if lock is not None:
            return lock.begin_epoch()


def _take_own(directory: Path, instance_id: uuid.UUID) -> "FolderLock | None":
    folder = directory / str(instance_id)
    folder.mkdir(mode=0o700, exist_ok=True)
    return FolderLock.take(folder)


class FolderLock:
    """Mutable: the right to write in one instance's folder; the kernel takes it back at death.

    The lock file holds the epoch. It is never deleted, so no two processes can lock two of them.
    """

    def __init__(self, folder: Path, fd: int) -> None:
        self.folder = folder
        # Filled by `begin_epoch`.
        self.epoch = 0
        self._fd = fd

    @classmethod
    def take(cls, folder: Path) -> "FolderLock | None":
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return cls(folder, fd)

    def begin_epoch(self) -> "FolderLock":
        self.epoch = int(os.pread(self._fd, 32, 0) or b"0") + 1
        # Fixed width, so that the new number covers the old one.
        os.pwrite(self._fd, b"%020d" % self.epoch, 0)
        os.fsync(self._fd)
        sync_folder(self.folder)
        return self

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
