"""Where the adapters of all slots lie in memory, module by module.

An adapter is one flat tensor; compiled loops find its parts by address, GEMMs by view. Knows slots,
modules and places. Knows nothing of digests, or of who uses a slot.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Ints = np.ndarray[tuple[int], np.dtype[np.int64]]
ADDRESS_OF_A, ADDRESS_OF_B, RANK = range(3)


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Where an adapter's modules lie in its flat tensor; one entry per module that it targets."""

    # Indices of modules, as in `SlotWeights.features`
    modules: Ints
    ranks: Ints
    # Elements from the beginning: [rank, in_features], and [rank, out_features] with the scaling
    starts_of_A: Ints
    starts_of_B: Ints
    num_elements: int


class SlotWeights:
    """Mutable; one thread."""

    def __init__(self, features: list[tuple[int, int]], *, num_slots: int) -> None:
        """`features`: in_features and out_features of each module."""
        self.features = features
        # [num_modules, num_slots, 3] int64; rank 0 where a slot does not target a module
        self.table = np.zeros((len(features), num_slots, 3), dtype=np.int64)
        self._table_address = self.table.ctypes.data
        self._memory: dict[int, Tensor] = {}
        self._layouts: dict[int, AdapterLayout] = {}
        # [num_modules, num_slots, 2] int64: as `AdapterLayout.starts_of_A` and `starts_of_B`
        self._starts = np.zeros((len(features), num_slots, 2), dtype=np.int64)

    def put(self, slot: int, memory: Tensor, layout: AdapterLayout) -> None:
        """`memory`: flat, at least `layout.num_elements`; it stays as it is until `clear`."""
        assert memory.is_contiguous(), "an adapter lies in one piece"
        self.clear(slot)
        self._memory[slot], self._layouts[slot] = memory, layout
        self._starts[layout.modules, slot, 0] = layout.starts_of_A
        self._starts[layout.modules, slot, 1] = layout.starts_of_B
        address, size = memory.data_ptr(), memory.element_size()
        self.table[layout.modules, slot, ADDRESS_OF_A] = address + size * layout.starts_of_A
        self.table[layout.modules, slot, ADDRESS_OF_B] = address + size * layout.starts_of_B
        self.table[layout.modules, slot, RANK] = layout.ranks

    def move(self, slot: int, memory: Tensor) -> None:
        """What the slot holds lies in `memory` now."""
        self.put(slot, memory, self._layouts[slot])

    def clear(self, slot: int) -> None:
        self.table[:, slot] = 0
        self._memory.pop(slot, None)
        self._layouts.pop(slot, None)

    def address_of(self, module: int) -> int:
        """Where `table[module]` lies."""
        return self._table_address + module * self.table.strides[0]

    def max_rank(self, slots: Ints) -> int:
        """The largest of any module in any of these slots."""
        return int(self.table[:, slots, RANK].max(initial=0))

    def pair(self, module: int, slot: int) -> tuple[Tensor, Tensor] | None:
        """lora_A [rank, in_features] and lora_B [rank, out_features]; None without a target."""
        rank = int(self.table[module, slot, RANK])
        if not rank:
            return None
        in_features, out_features = self.features[module]
        start_of_A, start_of_B = self._starts[module, slot].tolist()
        memory = self._memory[slot]
        return (
            torch.as_strided(
                memory, (rank, in_features), (in_features, 1), memory.storage_offset() + start_of_A
            ),
            torch.as_strided(
                memory,
                (rank, out_features),
                (out_features, 1),
                memory.storage_offset() + start_of_B,
            ),
        )
