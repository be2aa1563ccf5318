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
# Where an adapter has no such part.
NOWHERE = -1


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Where an adapter's modules lie in its flat tensor; one entry per module that it changes."""

    # Indices of modules, as in `SlotWeights.features`
    modules: Ints
    # 0 for a module that it only scales and shifts
    ranks: Ints
    # As in `SlotWeights.features`, or more where the adapter adds outputs of its own
    out_features: Ints
    # Elements from the beginning: [rank, in_features], and [rank, out_features] with the scaling
    starts_of_A: Ints
    starts_of_B: Ints
    # Both [out_features]; both NOWHERE where the module is neither scaled nor shifted
    starts_of_gain: Ints
    starts_of_shift: Ints

    @property
    def affine(self) -> Ints:
        """Which entries are scaled and shifted."""
        return np.flatnonzero(self.starts_of_gain != NOWHERE)


class SlotWeights:
    """Mutable; one thread."""

    def __init__(self, features: list[tuple[int, int]], *, num_slots: int) -> None:
        """`features`: in_features and out_features of each module."""
        self.features = features
        # [num_modules, num_slots, 3] int64; rank 0 where a slot does not target a module
        self.table = np.zeros((len(features), num_slots, 3), dtype=np.int64)
        self._table_address = self.table.ctypes.data
        # [num_modules, num_slots, 2] int64: addresses of gain and shift, 0 for none
        self.affine_table = np.zeros((len(features), num_slots, 2), dtype=np.int64)
        self._affine_address = self.affine_table.ctypes.data
        # [num_slots] int64: another number whenever something else lies in a slot, or elsewhere
        self.versions = np.zeros(num_slots, dtype=np.int64)
        self._memory: dict[int, Tensor] = {}
        self._layouts: dict[int, AdapterLayout] = {}
        # Of each slot: which entry of its layout is a module's
        self._entries: dict[int, dict[int, int]] = {}
        # Slots that scale or shift anything
        self._affine_slots: set[int] = set()

    def put(self, slot: int, memory: Tensor, layout: AdapterLayout) -> None:
        """`memory`: flat, with all parts of the layout in it; it stays as it is until `clear`."""
        assert memory.is_contiguous(), "an adapter lies in one piece"
        self.clear(slot)
        self._memory[slot], self._layouts[slot] = memory, layout
        self._entries[slot] = {
            module: entry for entry, module in enumerate(layout.modules.tolist())
        }
        address, size = memory.data_ptr(), memory.element_size()
        self.table[layout.modules, slot, ADDRESS_OF_A] = address + size * layout.starts_of_A
        self.table[layout.modules, slot, ADDRESS_OF_B] = address + size * layout.starts_of_B
        self.table[layout.modules, slot, RANK] = layout.ranks
        affine = layout.affine
        if len(affine):
            starts = np.stack([layout.starts_of_gain[affine], layout.starts_of_shift[affine]], 1)
            self.affine_table[layout.modules[affine], slot] = address + size * starts
            self._affine_slots.add(slot)

    def move(self, slot: int, memory: Tensor) -> None:
        """What the slot holds lies in `memory` now."""
        self.put(slot, memory, self._layouts[slot])

    def clear(self, slot: int) -> None:
        self.versions[slot] += 1
        self.table[:, slot] = 0
        self.affine_table[:, slot] = 0
        for kept in (self._memory, self._layouts, self._entries):
            kept.pop(slot, None)
        self._affine_slots.discard(slot)

    def address_of(self, module: int) -> int:
        """Where `table[module]` lies."""
        return self._table_address + module * self.table.strides[0]

    def affine_address_of(self, module: int) -> int:
        """Where `affine_table[module]` lies."""
        return self._affine_address + module * self.affine_table.strides[0]

    def max_rank(self, slots: Ints) -> int:
        """The largest of any module in any of these slots."""
        return int(self.table[:, slots, RANK].max(initial=0))

    def affine_modules(self, slots: Ints) -> frozenset[int]:
        """Those that any of these slots scales or shifts."""
        if self._affine_slots.isdisjoint(slots.tolist()):
            return frozenset()
        is_affine = self.affine_table[:, slots, 0].any(axis=1)
        return frozenset(np.flatnonzero(is_affine).tolist())

    def pair(self, module: int, slot: int) -> tuple[Tensor, Tensor] | None:
        """lora_A [rank, in_features] and lora_B [rank, out_features]; None without a target."""
        rank = int(self.table[module, slot, RANK])
        if not rank:
            return None
        layout, entry = self._layouts[slot], self._entries[slot][module]
        lora_A = self._view(slot, layout.starts_of_A[entry], (rank, self.features[module][0]))
        lora_B = self._view(slot, layout.starts_of_B[entry], (rank, layout.out_features[entry]))
        return lora_A, lora_B

    def affine(self, module: int, slot: int) -> tuple[Tensor, Tensor] | None:
        """gain and shift, both [out_features]; None where the slot neither scales nor shifts."""
        if not self.affine_table[module, slot, 0]:
            return None
        layout, entry = self._layouts[slot], self._entries[slot][module]
        shape = (layout.out_features[entry],)
        gain = self._view(slot, layout.starts_of_gain[entry], shape)
        return gain, self._view(slot, layout.starts_of_shift[entry], shape)

    def _view(self, slot: int, start: int, shape: tuple[int, ...]) -> Tensor:
        memory = self._memory[slot]
        strides = (shape[1], 1) if len(shape) == 2 else (1,)
        return torch.as_strided(memory, shape, strides, memory.storage_offset() + int(start))
