"""Choose the engine that answers a request.

Knows which engines are reachable and how loaded they are. Knows nothing of tenants or money.
"""

from engine.client import EngineLink
from gateway.errors import Unavailable


class Router:
    """Mutable: the engines of one base model that have told what they serve."""

    def __init__(self) -> None:
        self._links: list[EngineLink] = []

    def attach(self, link: EngineLink) -> None:
        """From now on the engine is chosen whenever its link is up."""
        self._links.append(link)

    @property
    def is_any_connected(self) -> bool:
        return any(link.is_connected for link in self._links)

    def pick(self) -> EngineLink:
        """Return a connected engine.

        Raises Unavailable when none is.
        """
        for link in self._links:
            if link.is_connected:
                return link
        raise Unavailable("No engine is ready. Try again shortly.", retry_after_s=5)
