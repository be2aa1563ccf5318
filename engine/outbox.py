"""The frames of one gateway worker that it has not acknowledged.

Numbers and encodes them, keeps them for a worker that reconnects, and knows when they take too
much room. Knows nothing of sockets, threads, or what an event means.
"""

from collections import deque
from dataclasses import dataclass
from itertools import islice

import msgspec

from engine.protocol import FRAME_LENGTH, Frame, SequenceEvent


@dataclass(frozen=True, slots=True)
class _Packet:
    data: bytes
    appended_at_s: float


class Outbox:
    """Numbers run from `after` + 1; all between `acknowledged` and `last_number` are at hand."""

    def __init__(self, *, engine_epoch: int, after: int, max_bytes: int) -> None:
        self.acknowledged = after
        self.size_bytes = 0
        self._engine_epoch = engine_epoch
        self._max_bytes = max_bytes
        self._packets: deque[_Packet] = deque()
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def last_number(self) -> int:
        return self.acknowledged + len(self._packets)

    @property
    def is_full(self) -> bool:
        return self.size_bytes >= self._max_bytes

    @property
    def has_room(self) -> bool:
        """Half empty again, so that holding back and letting go do not alternate each step."""
        return self.size_bytes <= self._max_bytes // 2

    @property
    def waiting_since_s(self) -> float | None:
        """When the oldest frame that is not acknowledged was added."""
        return self._packets[0].appended_at_s if self._packets else None

    def append(self, events: list[SequenceEvent], *, now_s: float) -> None:
        data = self._encode(self.last_number + 1, events)
        self._packets.append(_Packet(data, now_s))
        self.size_bytes += len(data)

    def acknowledge(self, number: int) -> None:
        """Forget all up to `number`; one that was never sent counts as the last."""
        while self._packets and self.acknowledged < number:
            self.size_bytes -= len(self._packets.popleft().data)
            self.acknowledged += 1

    def can_resume(self, after: int) -> bool:
        return self.acknowledged <= after <= self.last_number

    def packets_after(self, number: int) -> bytes:
        """All frames later than `number`, each with its length before it."""
        first = max(number - self.acknowledged, 0)
        return b"".join(packet.data for packet in islice(self._packets, first, None))

    def heartbeat(self, position: int) -> bytes:
        """An empty frame for a reader that has been given all frames up to `position`.

        Under any later number it would stand for a frame that the reader has yet to get.
        """
        return self._encode(position, [])

    def _encode(self, number: int, events: list[SequenceEvent]) -> bytes:
        body = self._encoder.encode(Frame(number, self._engine_epoch, events))
        return FRAME_LENGTH.pack(len(body)) + body
