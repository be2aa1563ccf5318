"""What operators want near though no sequence waits for it.

A wish ends when its adapter is where it was wanted, or cannot come; a pin stays until it is taken
back. Both take only what is free or idles unwanted. Knows digests and tiers. Who may be evicted,
and how an adapter comes nearer, the slots know.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from engine.errors import SequenceError
from engine.protocol import Tier


class Tiers(Protocol):
    """What brings adapters nearer: `engine.slots.SlotPool`."""

    @property
    def absent_pins(self) -> tuple[str, ...]:
        """Pinned adapters that are not in a slot yet."""

    def is_near(self, digest: str, tier: Tier) -> bool: ...
    def bring(self, digest: str, tier: Tier) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Wish:
    """Compared by identity: two may want the same."""

    adapter_digest: str
    to: Tier
    # Called once, with None when the adapter is there.
    on_end: Callable[[SequenceError | None], None]


class Wishes:
    """Mutable; one thread."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        # In order of coming.
        self._open: dict[Wish, None] = {}

    @property
    def are_open(self) -> bool:
        return bool(self._open) or bool(self._tiers.absent_pins)

    def add(self, wish: Wish) -> None:
        self._open[wish] = None

    def drop(self, wish: Wish) -> None:
        """Nobody waits for it any more. One that has ended already is no error."""
        self._open.pop(wish, None)

    def fail(self, digest: str, fault: SequenceError) -> None:
        """The adapter does not come."""
        for wish in [wish for wish in self._open if wish.adapter_digest == digest]:
            self._end(wish, fault)

    def pursue(self) -> None:
        """Ask for what is not there yet, after all sequences of a pass, and tell of what is."""
        for digest in self._tiers.absent_pins:
            self._tiers.bring(digest, "device")
        for wish in list(self._open):
            if self._tiers.is_near(wish.adapter_digest, wish.to):
                self._end(wish, None)
            else:
                self._tiers.bring(wish.adapter_digest, wish.to)

    def _end(self, wish: Wish, fault: SequenceError | None) -> None:
        del self._open[wish]
        wish.on_end(fault)
