from engine.block_manager import NULL_BLOCK, BlockManager
from engine.sequence import Sequence


def sequence_of(num_tokens: int) -> Sequence:
    return Sequence.unowned([1] * num_tokens, block_table=[])


def test_a_sequence_gets_as_many_blocks_as_its_tokens_need() -> None:
    blocks = BlockManager(4, block_size=4)
    sequence = sequence_of(9)
    assert blocks.grow(sequence)
    assert len(sequence.block_table) == 3
    sequence.token_ids += [1, 1, 1]
    assert blocks.grow(sequence)
    assert len(sequence.block_table) == 3


def test_what_does_not_fit_takes_nothing() -> None:
    blocks = BlockManager(2, block_size=4)
    sequence = sequence_of(9)
    assert not blocks.grow(sequence)
    assert sequence.block_table == []
    assert blocks.num_free_blocks == 2


def test_the_null_block_is_never_handed_out() -> None:
    blocks = BlockManager(3, block_size=1)
    sequence = sequence_of(3)
    assert blocks.grow(sequence)
    assert NULL_BLOCK not in sequence.block_table


def test_a_release_forgets_what_was_computed() -> None:
    blocks = BlockManager(3, block_size=4)
    sequence = sequence_of(9)
    blocks.grow(sequence)
    sequence.num_computed_tokens = 9
    blocks.release(sequence)
    assert (sequence.block_table, sequence.num_computed_tokens) == ([], 0)
    assert blocks.num_free_blocks == 3
    blocks.check_integrity([])
