"""One piece of device memory for keys, values and adapters, in blocks.

A block holds the keys and values of `block_size` positions in all layers, or a part of an adapter:
what the one does not need, the other can have. Knows layers and places. Knows nothing of who uses a
block, or of what an adapter is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.host_memory import empty_pages

# Elements; a block begins with a line of any device's cache.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps for each position."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    sliding_window: int | None

    @property
    def elements_per_token(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)


def block_elements(layers: Sequence[LayerShape], *, block_size: int) -> int:
    used = block_size * sum(layer.elements_per_token for layer in layers)
    return -(-used // ALIGNMENT) * ALIGNMENT


class DeviceMemory:
    """Blocks 1 .. num_blocks; before them the null block, all zero, which padding reads.

    Behind them lies `scratch_block`, into which rows of nobody are written.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        (dtype,) = {layer.dtype for layer in layers}
        self.num_blocks = num_blocks
        self.scratch_block = num_blocks + 1
        self.block_size = block_size
        size = block_elements(layers, block_size=block_size)
        place = empty_pages if device.type == "cpu" else partial(torch.empty, device=device)
        self._blocks = place((num_blocks + 2) * size, dtype=dtype).view(-1, size)
        self._blocks[0].zero_()
        # Of each layer: [num_blocks + 2, block_size, num_kv_heads, head_dim]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        start = 0
        for layer in layers:
            for caches, dim in ((self.keys, layer.key_dim), (self.values, layer.value_dim)):
                caches.append(self._view(start, layer.num_kv_heads, dim))
                start += block_size * layer.num_kv_heads * dim

    @property
    def device(self) -> torch.device:
        return self._blocks.device

    @property
    def block_bytes(self) -> int:
        return self._blocks.shape[1] * self._blocks.element_size()

    def window(self, first: int, num_blocks: int) -> Tensor:
        """[num_blocks * elements of a block]: neighbouring blocks as one flat tensor."""
        assert first > 0, "the null block belongs to nobody"
        return self._blocks[first : first + num_blocks].view(-1)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to), all at once."""
        ends = torch.tensor(moves, device=self._blocks.device)
        self._blocks[ends[:, 1]] = self._blocks[ends[:, 0]]

    def _view(self, start: int, num_heads: int, dim: int) -> Tensor:
        shape = (self._blocks.shape[0], self.block_size, num_heads, dim)
        return self._blocks.as_strided(
            shape, (self._blocks.shape[1], num_heads * dim, dim, 1), start
        )
