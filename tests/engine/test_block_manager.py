import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_manager import NULL_BLOCK, BlockManager
from engine.sequence import Sequence


def sequence_of(num_tokens: int) -> Sequence:
    return Sequence.unowned([1] * num_tokens, block_table=[])


def compute(blocks: BlockManager, sequence: Sequence) -> Sequence:
    """Admit it, and do as a step does that computes all its tokens."""
    assert blocks.admit(sequence)
    before, sequence.num_computed_tokens = sequence.num_computed_tokens, sequence.num_tokens
    blocks.name_full_blocks(sequence, num_computed_before=before)
    return sequence


def asking(token_ids: list[int], *, adapter: str | None = None, salt: bytes = b"") -> Sequence:
    sequence = Sequence.unowned(token_ids, block_table=[])
    sequence.adapter_digest, sequence.cache_salt = adapter, salt
    return sequence


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


# Beginnings that are there already


def test_running_sequences_share_their_common_beginning() -> None:
    blocks = BlockManager(8, block_size=4)
    first = compute(blocks, asking([*range(8), 50]))
    second = asking([*range(8), 60])
    assert blocks.num_missing_blocks(second) == 1
    assert blocks.admit(second)
    assert second.num_computed_tokens == 8
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    blocks.check_integrity([first, second])


def test_what_ended_is_found_again() -> None:
    blocks = BlockManager(4, block_size=4)
    blocks.release(compute(blocks, asking([*range(9)])))
    assert blocks.num_free_blocks == 4
    again = asking([*range(9)])
    assert blocks.admit(again)
    assert again.num_computed_tokens == 8
    blocks.check_integrity([again])


def test_the_last_token_is_always_computed_for_its_logits_are_wanted() -> None:
    blocks = BlockManager(8, block_size=4)
    compute(blocks, asking([*range(8)]))
    again = asking([*range(8)])
    assert blocks.admit(again)
    assert again.num_computed_tokens == 4


@pytest.mark.parametrize(
    "other",
    [
        asking([*range(9)], adapter="b", salt=b"one"),
        asking([*range(9)], salt=b"one"),
        asking([*range(9)], adapter="a", salt=b"two"),
        asking([*range(9)], adapter="a"),
        asking([9, *range(1, 9)], adapter="a", salt=b"one"),
    ],
    ids=["another adapter", "no adapter", "another tenant", "no salt", "another first token"],
)
def test_nobody_finds_what_another_adapter_or_tenant_has_computed(other: Sequence) -> None:
    blocks = BlockManager(8, block_size=4)
    compute(blocks, asking([*range(9)], adapter="a", salt=b"one"))
    assert blocks.admit(other)
    assert other.num_computed_tokens == 0


def test_a_block_is_found_only_behind_its_own_beginning() -> None:
    blocks = BlockManager(8, block_size=2)
    compute(blocks, asking([1, 2, 3, 4, 5]))
    other = asking([9, 9, 3, 4, 5])
    assert blocks.admit(other)
    assert other.num_computed_tokens == 0


def test_what_was_used_last_is_kept_longest_and_ends_go_before_beginnings() -> None:
    blocks = BlockManager(4, block_size=2)
    old, new = asking([1, 2, 3, 4]), asking([5, 6, 7, 8])
    for sequence in (old, new):
        blocks.release(compute(blocks, sequence))
    blocks.release(compute(blocks, asking([9])))
    # One block was needed: the end of the older one.
    for token_ids, num_found in (([5, 6, 7, 8, 0], 4), ([1, 2, 3, 4, 0], 2)):
        again = asking(token_ids)
        assert blocks.admit(again)
        assert again.num_computed_tokens == num_found
        blocks.release(again)


def test_disowned_blocks_are_never_found() -> None:
    blocks = BlockManager(8, block_size=4)
    poisoned = compute(blocks, asking([*range(9)]))
    blocks.disown(poisoned)
    blocks.release(poisoned)
    again = asking([*range(9)])
    assert blocks.admit(again)
    assert again.num_computed_tokens == 0
    blocks.check_integrity([again])


def test_what_is_shared_is_counted_once_when_room_is_short() -> None:
    blocks = BlockManager(4, block_size=4)
    first = compute(blocks, asking([*range(12), 50]))
    assert blocks.num_free_blocks == 0
    assert not blocks.admit(asking([*range(12), 60]))
    blocks.check_integrity([first])
    shared_only = asking([*range(12)])
    assert blocks.num_missing_blocks(shared_only) == 1
    assert not blocks.admit(shared_only)
    assert shared_only.block_table == []


def test_what_one_lacks_first_is_what_the_other_computes_next() -> None:
    blocks = BlockManager(16, block_size=4)
    first, second = asking([*range(12), 50]), asking([*range(12), 60, 61])
    assert blocks.admit(first)
    for num_computed in (0, 4, 8):
        first.num_computed_tokens = num_computed
        blocks.name_full_blocks(first, num_computed_before=max(0, num_computed - 4))
        assert blocks.first_missing_name(second) == blocks.name_under_way(first) is not None
    first.num_computed_tokens = 12
    blocks.name_full_blocks(first, num_computed_before=8)
    assert blocks.first_missing_name(second) is None
    assert blocks.name_under_way(first) is None


def test_only_blocks_that_nobody_shares_come_free() -> None:
    blocks = BlockManager(16, block_size=4)
    first, second = (compute(blocks, asking([*range(8), token])) for token in (50, 60))
    assert blocks.num_freed_by(first) == 1
    blocks.release(second)
    assert blocks.num_freed_by(first) == 3


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 14), st.booleans()), max_size=40))
def test_no_history_of_admissions_and_releases_loses_or_doubles_a_block(
    history: list[tuple[int, int, bool]],
) -> None:
    blocks = BlockManager(6, block_size=2)
    running: list[Sequence] = []
    for kind, num_tokens, releases in history:
        sequence = asking([kind] * num_tokens, salt=bytes([kind % 2]))
        if blocks.num_missing_blocks(sequence) <= blocks.num_free_blocks:
            running.append(compute(blocks, sequence))
        elif not blocks.admit(sequence):
            assert sequence.block_table == []
        if releases and running:
            blocks.release(running.pop(num_tokens % len(running)))
        blocks.check_integrity(running)
