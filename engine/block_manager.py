"""Hand out blocks of the KV cache, take them back, and find again what they still hold.

A block holds the keys and values of `block_size` positions, in all layers. Full ones are named by
what they hold; sequences with the same beginning share them, and a block that nobody uses keeps its
content until it is needed for something else, least recently used first. Knows block numbers and
counts. Knows nothing of tensors, slots or whose turn it is.
"""

from collections import OrderedDict
from collections.abc import Iterable

from engine.prefix_cache import block_name, extend_hashes
from engine.sequence import Sequence

# Always zero and never handed out: padding reads it, so that padding is never another's NaN.
NULL_BLOCK = 0


class BlockManager:
    """Blocks 1 .. num_blocks; a sequence's blocks may lie anywhere. Mutable; one thread."""

    def __init__(self, num_blocks: int, *, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
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
        sequence.block_table.clear()
        sequence.num_computed_tokens = 0
        sequence.num_found_blocks = 0

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        expected = [0] * (self.num_blocks + 1)
        for sequence in holders:
            for block in sequence.block_table:
                expected[block] += 1
        assert expected[NULL_BLOCK] == 0, "the null block was handed out"
        assert expected == self._num_references, "reference counts differ from the block tables"
        unused = [block for block in range(1, self.num_blocks + 1) if not expected[block]]
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
        """The last token is left out: its logits are wanted."""
        return (sequence.num_tokens - 1) // self.block_size

    def _forget_content(self, block: int) -> None:
        name = self._hash_of.pop(block, None)
        if name is not None:
            del self._block_of[name]
