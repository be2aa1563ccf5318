"""A connection gets every frame of its session, whatever the clock does meanwhile."""

from engine.outbox import Outbox
from engine.protocol import Frame
from engine.sessions import Session
from tests.engine.test_outbox import EPOCH, event, unpack


class _LateNews(Session):
    """A frame comes in the very moment in which the patience for it ends."""

    async def wait(self, timeout_s: float) -> bool:
        self.outbox.append([event(1)], now_s=0.0)
        return False


async def test_a_frame_that_comes_with_the_heartbeat_is_not_taken_for_one() -> None:
    outbox = Outbox(engine_epoch=EPOCH, after=0, max_bytes=1000)
    session = _LateNews("worker", 1, outbox=outbox)
    frames = aiter(session.attach(after=0, heartbeat_s=1.0))
    assert unpack(await anext(frames)) == [Frame(0, EPOCH, [])]
    assert unpack(await anext(frames)) == [Frame(1, EPOCH, [event(1)])]


async def test_frames_that_were_there_before_the_end_are_still_sent() -> None:
    outbox = Outbox(engine_epoch=EPOCH, after=0, max_bytes=1000)
    session = Session("worker", 1, outbox=outbox)
    frames = session.attach(after=0, heartbeat_s=1.0)
    outbox.append([event(1)], now_s=0.0)
    session.is_closed = True
    assert [unpack(packets) async for packets in frames] == [[Frame(1, EPOCH, [event(1)])]]
