"""What the final hidden states of one prompt have come to so far, and the vector that they make.

Knows numbers and positions. Knows nothing of models, tensors or chunks' neighbours.
"""

import numpy as np

from adapters.text_bundle import PoolingKind

# [hidden_size]; wider than the states themselves, because thousands of them are added up.
States = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
# What goes over the wire.
WIRE_DTYPE = np.dtype("<f4")


class Pool:
    """Mutable: grows chunk by chunk, and keeps what it has when its sequence is preempted."""

    __slots__ = ("_kind", "_num_summed", "_states")

    def __init__(self, kind: PoolingKind) -> None:
        self._kind = kind
        # Of a mean: so many of the first positions are in the sum.
        self._num_summed = 0
        self._states: States | None = None

    def num_skippable_tokens(self, num_tokens: int) -> int:
        """Of how many of the first tokens no state is wanted any more; never of the very last."""
        return min(self._num_summed, num_tokens - 1) if self._kind == "mean" else num_tokens - 1

    def wanted(self, chunk: range, *, num_tokens: int) -> range:
        """The positions of a chunk whose states it lacks; `num_tokens` are in the prompt."""
        if self._kind == "mean":
            return range(max(chunk.start, self._num_summed), chunk.stop)
        return chunk[-1:] if chunk.stop == num_tokens else range(0)

    def add(self, states: States, *, end: int) -> None:
        """`states`: the sum of those that were wanted of a chunk which ends before position `end`.

        They may be no numbers: `vector` tells.
        """
        if self._kind == "mean" and self._states is not None:
            with np.errstate(invalid="ignore", over="ignore"):
                self._states += states
        else:
            self._states = states.copy()
        self._num_summed = end

    def vector(self) -> bytes | None:
        """The states together, scaled to length one; None where they are no numbers.

        A sum scaled so is the mean scaled so. Zeros stay zeros.
        """
        assert self._states is not None, "no chunk was added"
        if not np.isfinite(self._states).all():
            return None
        length = float(np.linalg.norm(self._states)) or 1.0
        return (self._states / length).astype(WIRE_DTYPE).tobytes()
