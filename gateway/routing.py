"""Choose the engine that answers a request.

Knows which engines are reachable and what they serve. Knows nothing of tenants or money.
"""

import uuid
from dataclasses import dataclass

from engine.client import EngineLink
from gateway.errors import Unavailable


@dataclass(frozen=True, slots=True)
class Replica:
    """An engine that has told what it serves."""

    link: EngineLink
    base_model_id: uuid.UUID
    base_model: str


class Router:
    """Mutable: the engines of one base model that have told what they serve."""

    def __init__(self) -> None:
        self._replicas: list[Replica] = []

    def attach(self, replica: Replica) -> None:
        """From now on the engine is chosen whenever its link is up."""
        self._replicas.append(replica)

    @property
    def replicas(self) -> tuple[Replica, ...]:
        return tuple(self._replicas)

    @property
    def is_any_connected(self) -> bool:
        return any(replica.link.is_connected for replica in self._replicas)

    def pick(self) -> EngineLink:
        """Return a connected engine.

        Raises Unavailable when none is.
        """
        for replica in self._replicas:
            if replica.link.is_connected:
                return replica.link
        raise Unavailable("No engine is ready. Try again shortly.", retry_after_s=5)
