"""What an outbox has at hand after any series of frames and acknowledgements."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from engine.outbox import Outbox
from engine.protocol import FRAME_LENGTH, Frame, SequenceEvent, SequenceState

EPOCH = 3
# An acknowledgement of that number, or None for one more frame.
ACTIONS = st.lists(st.none() | st.integers(0, 60), max_size=60)


def event(number: int) -> SequenceEvent:
    return SequenceEvent(number, SequenceState.RUNNING, [number], 1, 0, number, 0)


def unpack(data: bytes) -> list[Frame]:
    frames = []
    while data:
        (size,) = FRAME_LENGTH.unpack_from(data)
        frames.append(msgspec.msgpack.decode(data[FRAME_LENGTH.size :][:size], type=Frame))
        data = data[FRAME_LENGTH.size + size :]
    return frames


@given(ACTIONS, st.integers(0, 20))
def test_all_that_is_not_acknowledged_is_at_hand_and_nothing_else(
    actions: list[int | None], begun_after: int
) -> None:
    outbox = Outbox(engine_epoch=EPOCH, after=begun_after, max_bytes=100)
    last = acknowledged = begun_after
    for number in actions:
        if number is None:
            last += 1
            outbox.append([event(last)], now_s=float(last))
        else:
            outbox.acknowledge(number)
            acknowledged = max(acknowledged, min(number, last))
    kept = [Frame(number, EPOCH, [event(number)]) for number in range(acknowledged + 1, last + 1)]
    assert unpack(outbox.packets_after(acknowledged)) == kept
    assert outbox.size_bytes == len(outbox.packets_after(acknowledged))
    assert outbox.is_full == (outbox.size_bytes >= 100)
    assert outbox.waiting_since_s == (acknowledged + 1 if kept else None)
    resumable = [n for n in range(last + 5) if outbox.can_resume(n)]
    assert resumable == list(range(acknowledged, last + 1))
    for number in resumable:
        assert unpack(outbox.packets_after(number)) == kept[number - acknowledged :]
        assert unpack(outbox.heartbeat(number)) == [Frame(number, EPOCH, [])]
