"""Keep prepared adapters in the host's memory, from where a device has them at once.

Least recently used first to go, by bytes. Knows digests and sizes; what an adapter is, and who
waits for it, others know.
"""

from collections import OrderedDict
from collections.abc import Container
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """An adapter that is ready to be copied to a device."""

    @property
    def size_bytes(self) -> int: ...


Adapter = TypeVar("Adapter", bound=Sized)


class HostTier(Generic[Adapter]):
    """Adapters by digest. Mutable; one thread."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self.num_evictions = 0
        # Least recently used first.
        self._held: OrderedDict[str, Adapter] = OrderedDict()

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(self._held)

    def __contains__(self, digest: str) -> bool:
        return digest in self._held

    def get(self, digest: str) -> Adapter | None:
        """The adapter, which counts as used by this."""
        adapter = self._held.get(digest)
        if adapter is not None:
            self._held.move_to_end(digest)
        return adapter

    def put(self, digest: str, adapter: Adapter) -> None:
        """Take an adapter in, whatever it weighs; `trim` brings the tier back under its limit."""
        assert digest not in self._held, "read twice"
        self._held[digest] = adapter
        self.size_bytes += adapter.size_bytes

    def trim(self, *, keep: Container[str]) -> None:
        """Let the least recently used go until the rest fits; what is in `keep` stays anyhow."""
        if self.size_bytes <= self.max_bytes:
            return
        for digest in [digest for digest in self._held if digest not in keep]:
            self.forget(digest)
            self.num_evictions += 1
            if self.size_bytes <= self.max_bytes:
                return

    def forget(self, digest: str) -> int:
        """Gives how many bytes came free."""
        adapter = self._held.pop(digest, None)
        freed_bytes = 0 if adapter is None else adapter.size_bytes
        self.size_bytes -= freed_bytes
        return freed_bytes

    def check_integrity(self) -> None:
        held = sum(adapter.size_bytes for adapter in self._held.values())
        assert self.size_bytes == held, f"{self.size_bytes} bytes said, {held} bytes held"
