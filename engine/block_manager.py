"""Hand out blocks of the KV cache and take them back.

A block holds the keys and values of `block_size` positions of one sequence, in all layers. Knows
block numbers and counts. Knows nothing of tensors, slots or whose turn it is.
"""

from collections import deque
from collections.abc import Iterable

from engine.sequence import Sequence

# Always zero and never handed out: padding reads it, so that padding is never another's NaN.
NULL_BLOCK = 0


class BlockManager:
    """Blocks 1 .. num_blocks; a sequence's blocks may lie anywhere."""

    def __init__(self, num_blocks: int, *, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(1, num_blocks + 1))
        self._num_references = [0] * (num_blocks + 1)

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_missing_blocks(self, sequence: Sequence) -> int:
        """How many blocks `sequence` still needs for all tokens that it has now."""
        return self.num_blocks_for(sequence.num_tokens) - len(sequence.block_table)

    def grow(self, sequence: Sequence) -> bool:
        """Give `sequence` blocks for all its tokens, or nothing at all and False."""
        num_missing = self.num_missing_blocks(sequence)
        if num_missing > len(self._free):
            return False
        for _ in range(num_missing):
            block = self._free.popleft()
            self._num_references[block] = 1
            sequence.block_table.append(block)
        return True

    def release(self, sequence: Sequence) -> None:
        """Take all blocks back; what was computed in them is forgotten."""
        for block in sequence.block_table:
            self._num_references[block] -= 1
            if self._num_references[block] == 0:
                self._free.append(block)
        sequence.block_table.clear()
        sequence.num_computed_tokens = 0

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        expected = [0] * (self.num_blocks + 1)
        for sequence in holders:
            for block in sequence.block_table:
                expected[block] += 1
        assert expected[NULL_BLOCK] == 0, "the null block was handed out"
        assert expected == self._num_references, "reference counts differ from the block tables"
        unused = [block for block in range(1, self.num_blocks + 1) if not expected[block]]
        assert sorted(self._free) == unused, "a block is lost, or free twice"
