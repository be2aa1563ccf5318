"""Choose the engine that answers a request.

Knows which engines are reachable, what they serve and which adapters sit on them. Knows nothing of
tenants or money.
"""

import hashlib
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.client import EngineLink
from gateway.errors import Unavailable
from gateway.overload import WaitingRoom

# An engine with an adapter in a slot is preferred until it has so many times its share of the
# sequences: then the adapter spreads. Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with
# Bounded Loads" (2018), where a bound of 1.25 leaves almost everything where it belongs.
LOAD_BOUND = 1.25


@dataclass(frozen=True, slots=True)
class Replica:
    """An engine that has told what it serves."""

    link: EngineLink
    base_model_id: uuid.UUID
    base_model: str
    # Of the base model: requests for another one are not for this engine.
    revision: int = 1


class Router:
    """Mutable: the engines that have told what they serve, and what is known of each."""

    def __init__(self) -> None:
        # In the order in which they came.
        self._replicas: dict[EngineLink, Replica] = {}
        self._draining: set[EngineLink] = set()
        # Something new listens there, which has not told yet what it serves.
        self._doubted: set[EngineLink] = set()
        # Weights digests, by the last look and by what was sent there since.
        self._resident: dict[EngineLink, set[str]] = {}
        self._rooms: dict[EngineLink, WaitingRoom] = {}

    def attach(self, replica: Replica) -> None:
        """From now on the engine is chosen whenever its link is up, for what it serves now."""
        self._replicas[replica.link] = replica
        self._resident.setdefault(replica.link, set())
        self._draining.discard(replica.link)

    def drain(self, link: EngineLink) -> None:
        """From now on the engine is chosen for nothing that another one could answer."""
        self._draining.add(link)

    def doubt(self, link: EngineLink) -> None:
        """From now on the engine is chosen for nothing, until it is trusted again."""
        self._doubted.add(link)

    def trust(self, link: EngineLink) -> None:
        """What listens there serves what it is attached for."""
        self._doubted.discard(link)

    def detach(self, link: EngineLink) -> None:
        """The engine is gone. One that is not known is no error."""
        self._replicas.pop(link, None)
        self._resident.pop(link, None)
        self._rooms.pop(link, None)
        self._draining.discard(link)
        self._doubted.discard(link)

    def note_residents(self, link: EngineLink, digests: Iterable[str]) -> None:
        """What the engine said that its slots hold."""
        if link in self._resident:
            self._resident[link] = set(digests)

    def room(self, link: EngineLink) -> WaitingRoom:
        """Where requests wait that the engine was chosen for; who enters at once is counted."""
        return self._rooms.setdefault(link, WaitingRoom())

    @property
    def replicas(self) -> tuple[Replica, ...]:
        return tuple(self._replicas.values())

    @property
    def is_any_connected(self) -> bool:
        return any(map(self._is_there, self._replicas))

    def is_draining(self, link: EngineLink) -> bool:
        return link in self._draining

    def pick(
        self,
        base_model_id: uuid.UUID,
        *,
        revision: int | None = None,
        adapter_digest: str | None = None,
    ) -> EngineLink:
        """Return a connected engine of the base model, near the adapter if that is not too busy.

        One that drains answers what was resolved before, where no other serves that revision: so
        without a revision it is never chosen. Raises Unavailable when there is none.
        """
        links = [
            replica.link
            for replica in self._replicas.values()
            if replica.base_model_id == base_model_id
            and revision in (None, replica.revision)
            and self._is_there(replica.link)
        ]
        serving = [link for link in links if link not in self._draining]
        if not serving and revision is not None:
            serving = links
        if not serving:
            raise Unavailable("No engine is ready. Try again shortly.", retry_after_s=5)
        return serving[0] if len(serving) == 1 else self._share_out(serving, adapter_digest)

    def _is_there(self, link: EngineLink) -> bool:
        return link.is_connected and link not in self._doubted

    def _share_out(self, links: Sequence[EngineLink], adapter_digest: str | None) -> EngineLink:
        """The least busy of the near ones; of all where none is near, or those are too busy."""
        # Whoever waits is counted from its choice on, which is before it is a sequence.
        loads = {link: link.num_sequences + self.room(link).num_waiting for link in links}
        near: list[EngineLink] = []
        if adapter_digest is not None:
            most = LOAD_BOUND * (sum(loads.values()) + 1) / len(links)
            near = [
                link
                for link in links
                if adapter_digest in self._resident[link] and loads[link] < most
            ]
        chosen = min(near or links, key=lambda link: (loads[link], _rank(link, adapter_digest)))
        if adapter_digest is not None:
            self._resident[chosen].add(adapter_digest)
        return chosen


def _rank(link: EngineLink, adapter_digest: str | None) -> bytes:
    """The same in every gateway: all of them bring an adapter to one engine first."""
    return hashlib.sha256(f"{adapter_digest or ''}\n{link.address}".encode()).digest()
