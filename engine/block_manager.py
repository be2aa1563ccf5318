"""Hand out blocks of the device's memory, take them back, and find again what they still hold.

A block holds the keys and values of `block_size` positions, in all layers. Full ones are named by
what they hold; sequences with the same beginning share them, and a block that nobody uses keeps its
content until it is needed for something else, least recently used first. An adapter gets a window
of neighbouring blocks, from which keys and values move away: they may lie anywhere (the pages that
S-LoRA shares between both, Sheng et al., MLSys 2024, but each adapter in one piece). Knows block
numbers and counts. Knows nothing of tensors, slots or whose turn it is.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from engine.prefix_cache import block_name, extend_hashes
from engine.sequence import Sequence

# Always zero and never handed out: padding reads it, so that padding is never another's NaN.
NULL_BLOCK = 0


# To move the block of a running sequence costs more than to lose what no one uses now.
_COST_OF_MOVE, _COST_OF_LOSS = 4, 1


@dataclass(frozen=True, slots=True)
class Window:
    """Blocks first .. first + num_blocks - 1."""

    first: int
    num_blocks: int

    @property
    def blocks(self) -> range:
        return range(self.first, self.first + self.num_blocks)


class BlockManager:
    """Blocks 1 .. num_blocks; a sequence's blocks may lie anywhere. Mutable; one thread."""

    def __init__(
        self,
        num_blocks: int,
        *,
        block_size: int,
        block_bytes: int,
        move_blocks: Callable[[list[tuple[int, int]]], None],
    ) -> None:
        """`move_blocks` copies the contents of blocks (from, to), all at once."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._block_bytes = block_bytes
        self._move_blocks = move_blocks
        self._holders: dict[Sequence, None] = {}
        self._windows: set[Window] = set()
        # Used by nobody: those that hold nothing first, then the others, least recently used first.
        self._free = OrderedDict.fromkeys(range(1, num_blocks + 1))
        self._num_references = [0] * (num_blocks + 1)
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_missing_blocks(self, sequence: Sequence) -> int:
        """How many free blocks `sequence` would take for all tokens that it has now."""
        shared = [] if sequence.block_table else self._cached_blocks(sequence)
        return self._num_missing(sequence, shared)

    def num_freed_by(self, sequence: Sequence) -> int:
        """How many blocks nobody would use if `sequence` gave its own back."""
        return sum(self._num_references[block] == 1 for block in sequence.block_table)

    def first_missing_name(self, sequence: Sequence) -> bytes | None:
        """The first full block that a sequence without blocks would have to compute itself.

        It looks on from where it ended the last time, so asking in each step costs little. None
        where nothing is left to be found.
        """
        while sequence.num_found_blocks < self._num_findable(sequence):
            name = block_name(sequence, sequence.num_found_blocks, block_size=self.block_size)
            if name not in self._block_of:
                return name
            sequence.num_found_blocks += 1
        return None

    def name_under_way(self, sequence: Sequence) -> bytes | None:
        """The full block that a running sequence computes next, if it has one."""
        index = sequence.num_computed_tokens // self.block_size
        if (index + 1) * self.block_size > sequence.num_tokens:
            return None
        return block_name(sequence, index, block_size=self.block_size)

    def admit(self, sequence: Sequence) -> bool:
        """Give a sequence without blocks all that it needs, or nothing at all and False.

        Blocks that hold its beginning already are among them; their tokens count as computed.
        """
        assert not sequence.block_table, "admitted twice"
        shared = self._cached_blocks(sequence)
        if self._num_missing(sequence, shared) > len(self._free):
            return False
        for block in shared:
            self._num_references[block] += 1
            self._free.pop(block, None)
            sequence.block_table.append(block)
        sequence.num_computed_tokens = len(sequence.block_table) * self.block_size
        has_grown = self.grow(sequence)
        assert has_grown, "there were blocks enough"
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Give `sequence` fresh blocks for its further tokens, or nothing at all and False."""
        num_missing = self._num_missing(sequence, [])
        if num_missing > len(self._free):
            return False
        self._holders[sequence] = None
        for _ in range(num_missing):
            block, _ = self._free.popitem(last=False)
            self._forget_content(block)
            self._num_references[block] = 1
            sequence.block_table.append(block)
        return True

    def name_full_blocks(self, sequence: Sequence, *, num_computed_before: int) -> None:
        """Let others find the blocks that were filled since `num_computed_before`."""
        first = num_computed_before // self.block_size
        end = sequence.num_computed_tokens // self.block_size
        if first == end:
            return
        hashes = extend_hashes(sequence, end, block_size=self.block_size)
        for block, name in zip(sequence.block_table[first:end], hashes[first:], strict=True):
            # Where two computed the same at once, the first one's stays the one that is found.
            if name not in self._block_of:
                self._block_of[name] = block
                self._hash_of[block] = name

    def disown(self, sequence: Sequence) -> None:
        """Nobody shall find this sequence's blocks: what they hold may be wrong."""
        for block in sequence.block_table:
            self._forget_content(block)

    def release(self, sequence: Sequence) -> None:
        """Take all blocks back. Named ones may be found again until they are used for others."""
        # The end first: a chain is of use only from its beginning.
        for block in reversed(sequence.block_table):
            self._num_references[block] -= 1
            if self._num_references[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)
        self._holders.pop(sequence, None)
        sequence.block_table.clear()
        sequence.num_computed_tokens = 0
        sequence.num_found_blocks = 0

    # Windows

    @property
    def num_window_blocks(self) -> int:
        return sum(window.num_blocks for window in self._windows)

    def window_blocks(self, size_bytes: int) -> int:
        """How many neighbouring blocks hold so many bytes."""
        return -(-size_bytes // self._block_bytes)

    def take_window(self, size_bytes: int) -> Window | None:
        """None where too few blocks are free now, or too few of them lie between other windows."""
        num_blocks = self.window_blocks(size_bytes)
        if num_blocks > len(self._free):
            return None
        window = self._cheapest_window(num_blocks)
        if window is not None:
            self._move_away(window)
            self._windows.add(window)
        return window

    def gather(self, movable: Iterable[Window]) -> dict[Window, Window]:
        """Move these windows together, towards the last block; gives where each of them went.

        What is free lies in one piece then, but for windows that may not move.
        """
        moving, moved = set(movable), {}
        end = self.num_blocks + 1
        for window in sorted(self._windows, key=lambda w: w.first, reverse=True):
            if window in moving:
                target = Window(end - window.num_blocks, window.num_blocks)
                if target != window:
                    self._shift(window, target)
                    moved[window] = target
                window = target
            end = window.first
        return moved

    def return_window(self, window: Window) -> None:
        self._windows.remove(window)
        for block in window.blocks:
            self._free[block] = None
            self._free.move_to_end(block, last=False)

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        holders = list(holders)
        expected = [0] * (self.num_blocks + 1)
        for sequence in holders:
            for block in sequence.block_table:
                expected[block] += 1
        assert expected[NULL_BLOCK] == 0, "the null block was handed out"
        assert expected == self._num_references, "reference counts differ from the block tables"
        assert {s for s in holders if s.block_table} == self._holders.keys()
        lent = [block for window in self._windows for block in window.blocks]
        assert len(lent) == len(set(lent)), "two windows overlap"
        assert not any(expected[block] or block in self._hash_of for block in lent)
        unused = [block for block in range(1, self.num_blocks + 1) if not expected[block]]
        unused = sorted(set(unused) - set(lent))
        assert sorted(self._free) == unused, "a block is lost, or free twice"
        assert {name: block for block, name in self._hash_of.items()} == self._block_of

    def _num_missing(self, sequence: Sequence, shared: list[int]) -> int:
        """Without those of `shared` that others use already; the rest of it lies among the free."""
        num_missing = self.num_blocks_for(sequence.num_tokens) - len(sequence.block_table)
        return num_missing - sum(self._num_references[block] > 0 for block in shared)

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """The longest known beginning."""
        num_findable, found = self._num_findable(sequence), []
        for name in extend_hashes(sequence, num_findable, block_size=self.block_size):
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def _num_findable(self, sequence: Sequence) -> int:
        """Tokens whose logits are wanted are left out: those must be computed."""
        return sequence.num_skippable_tokens // self.block_size

    def _forget_content(self, block: int) -> None:
        name = self._hash_of.pop(block, None)
        if name is not None:
            del self._block_of[name]

    def _cheapest_window(self, num_blocks: int) -> Window | None:
        """Where the least has to move or is lost; the last of equals, so that windows gather."""
        cost = np.zeros(self.num_blocks + 1, dtype=np.int64)
        cost[list(self._hash_of)] = _COST_OF_LOSS
        cost[np.array(self._num_references) > 0] = _COST_OF_MOVE
        # More than all others together: never chosen.
        barrier = _COST_OF_MOVE * (self.num_blocks + 1)
        for window in self._windows:
            cost[window.first : window.first + window.num_blocks] = barrier
        ends = np.concatenate([[0], np.cumsum(cost[1:])])
        # [i]: of the window that begins with block i + 1
        totals = ends[num_blocks:] - ends[:-num_blocks]
        best = len(totals) - 1 - int(np.argmin(totals[::-1]))
        return Window(best + 1, num_blocks) if totals[best] < barrier else None

    def _move_away(self, window: Window) -> None:
        for block in window.blocks:
            self._free.pop(block, None)
        moves = []
        for block in window.blocks:
            if self._num_references[block]:
                target, _ = self._free.popitem(last=False)
                moves.append((block, target))
            else:
                self._forget_content(block)
        if moves:
            self._move_blocks(moves)
            self._follow(dict(moves))

    def _shift(self, window: Window, target: Window) -> None:
        """Whatever lies in the way changes places with the window."""
        entered = [block for block in target.blocks if block not in window.blocks]
        left = [block for block in window.blocks if block not in target.blocks]
        place_of = dict(zip(entered, left, strict=True))
        displaced = [b for b in entered if self._num_references[b] or b in self._hash_of]
        self._move_blocks(
            [
                *zip(window.blocks, target.blocks, strict=True),
                *((block, place_of[block]) for block in displaced),
            ]
        )
        self._free = OrderedDict.fromkeys(place_of.get(block, block) for block in self._free)
        self._follow(place_of)
        self._windows.remove(window)
        self._windows.add(target)

    def _follow(self, target_of: dict[int, int]) -> None:
        """All that points to a block points to where it has moved."""
        for sequence in self._holders:
            sequence.block_table[:] = [target_of.get(b, b) for b in sequence.block_table]
        for block, target in target_of.items():
            self._forget_content(target)
            self._num_references[target] = self._num_references[block]
            self._num_references[block] = 0
            name = self._hash_of.pop(block, None)
            if name is not None:
                self._hash_of[target] = name
                self._block_of[name] = target
