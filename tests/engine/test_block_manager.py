import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_manager import NULL_BLOCK, BlockManager, Window
from engine.sequence import Sequence

BLOCK_BYTES = 10


class Contents:
    """What lies in each block, as a device would have it."""

    def __init__(self) -> None:
        self.of_block: dict[int, object] = {}

    def move(self, moves: list[tuple[int, int]]) -> None:
        self.of_block |= {target: self.of_block.get(source) for source, target in moves}


def blocks_of(num: int, *, block_size: int, contents: Contents | None = None) -> BlockManager:
    return BlockManager(
        num,
        block_size=block_size,
        block_bytes=BLOCK_BYTES,
        move_blocks=(contents or Contents()).move,
    )


def sequence_of(num_tokens: int) -> Sequence:
    return Sequence.unowned([1] * num_tokens, block_table=[])


def compute(blocks: BlockManager, sequence: Sequence) -> Sequence:
    """Admit it, and do as a step does that computes all its tokens."""
    assert blocks.admit(sequence)
    compute_after_admission(blocks, sequence)
    return sequence


def compute_after_admission(blocks: BlockManager, sequence: Sequence) -> None:
    before, sequence.num_computed_tokens = sequence.num_computed_tokens, sequence.num_tokens
    blocks.name_full_blocks(sequence, num_computed_before=before)


def asking(token_ids: list[int], *, adapter: str | None = None, salt: bytes = b"") -> Sequence:
    sequence = Sequence.unowned(token_ids, block_table=[])
    sequence.adapter_digest, sequence.cache_salt = adapter, salt
    return sequence


def test_a_sequence_gets_as_many_blocks_as_its_tokens_need() -> None:
    blocks = blocks_of(4, block_size=4)
    sequence = sequence_of(9)
    assert blocks.grow(sequence)
    assert len(sequence.block_table) == 3
    sequence.token_ids += [1, 1, 1]
    assert blocks.grow(sequence)
    assert len(sequence.block_table) == 3


def test_what_does_not_fit_takes_nothing() -> None:
    blocks = blocks_of(2, block_size=4)
    sequence = sequence_of(9)
    assert not blocks.grow(sequence)
    assert sequence.block_table == []
    assert blocks.num_free_blocks == 2


def test_the_null_block_is_never_handed_out() -> None:
    blocks = blocks_of(3, block_size=1)
    sequence = sequence_of(3)
    assert blocks.grow(sequence)
    assert NULL_BLOCK not in sequence.block_table


def test_a_release_forgets_what_was_computed() -> None:
    blocks = blocks_of(3, block_size=4)
    sequence = sequence_of(9)
    blocks.grow(sequence)
    sequence.num_computed_tokens = 9
    blocks.release(sequence)
    assert (sequence.block_table, sequence.num_computed_tokens) == ([], 0)
    assert blocks.num_free_blocks == 3
    blocks.check_integrity([])


# Beginnings that are there already


def test_running_sequences_share_their_common_beginning() -> None:
    blocks = blocks_of(8, block_size=4)
    first = compute(blocks, asking([*range(8), 50]))
    second = asking([*range(8), 60])
    assert blocks.num_missing_blocks(second) == 1
    assert blocks.admit(second)
    assert second.num_computed_tokens == 8
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    blocks.check_integrity([first, second])


def test_what_ended_is_found_again() -> None:
    blocks = blocks_of(4, block_size=4)
    blocks.release(compute(blocks, asking([*range(9)])))
    assert blocks.num_free_blocks == 4
    again = asking([*range(9)])
    assert blocks.admit(again)
    assert again.num_computed_tokens == 8
    blocks.check_integrity([again])


def test_the_last_token_is_always_computed_for_its_logits_are_wanted() -> None:
    blocks = blocks_of(8, block_size=4)
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
    blocks = blocks_of(8, block_size=4)
    compute(blocks, asking([*range(9)], adapter="a", salt=b"one"))
    assert blocks.admit(other)
    assert other.num_computed_tokens == 0


def test_a_block_is_found_only_behind_its_own_beginning() -> None:
    blocks = blocks_of(8, block_size=2)
    compute(blocks, asking([1, 2, 3, 4, 5]))
    other = asking([9, 9, 3, 4, 5])
    assert blocks.admit(other)
    assert other.num_computed_tokens == 0


def test_what_was_used_last_is_kept_longest_and_ends_go_before_beginnings() -> None:
    blocks = blocks_of(4, block_size=2)
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
    blocks = blocks_of(8, block_size=4)
    poisoned = compute(blocks, asking([*range(9)]))
    blocks.disown(poisoned)
    blocks.release(poisoned)
    again = asking([*range(9)])
    assert blocks.admit(again)
    assert again.num_computed_tokens == 0
    blocks.check_integrity([again])


def test_what_is_shared_is_counted_once_when_room_is_short() -> None:
    blocks = blocks_of(4, block_size=4)
    first = compute(blocks, asking([*range(12), 50]))
    assert blocks.num_free_blocks == 0
    assert not blocks.admit(asking([*range(12), 60]))
    blocks.check_integrity([first])
    shared_only = asking([*range(12)])
    assert blocks.num_missing_blocks(shared_only) == 1
    assert not blocks.admit(shared_only)
    assert shared_only.block_table == []


def test_what_one_lacks_first_is_what_the_other_computes_next() -> None:
    blocks = blocks_of(16, block_size=4)
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
    blocks = blocks_of(16, block_size=4)
    first, second = (compute(blocks, asking([*range(8), token])) for token in (50, 60))
    assert blocks.num_freed_by(first) == 1
    blocks.release(second)
    assert blocks.num_freed_by(first) == 3


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 14), st.booleans()), max_size=40))
def test_no_history_of_admissions_and_releases_loses_or_doubles_a_block(
    history: list[tuple[int, int, bool]],
) -> None:
    blocks = blocks_of(6, block_size=2)
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


# Windows


def take(blocks: BlockManager, num_blocks: int) -> Window:
    window = blocks.take_window(num_blocks * BLOCK_BYTES)
    assert window is not None
    assert window.num_blocks == num_blocks
    return window


def test_a_window_has_as_many_blocks_as_its_bytes_need() -> None:
    blocks = blocks_of(9, block_size=4)
    assert [blocks.window_blocks(size) for size in (1, 10, 11, 90)] == [1, 1, 2, 9]
    take(blocks, 9)
    assert blocks.num_free_blocks == 0
    assert blocks.take_window(1) is None


def test_a_returned_window_is_free_for_anything() -> None:
    blocks = blocks_of(6, block_size=4)
    window = take(blocks, 6)
    sequence = sequence_of(4)
    assert not blocks.admit(sequence)
    blocks.return_window(window)
    assert blocks.admit(sequence)
    blocks.check_integrity([sequence])


def test_running_sequences_move_out_of_a_window_and_keep_what_they_have() -> None:
    contents = Contents()
    blocks = blocks_of(8, block_size=2, contents=contents)
    # Every other block is in use.
    sequences = [sequence_of(2) for _ in range(8)]
    for number, sequence in enumerate(sequences):
        sequence.token_ids[:] = [number, number]
        compute(blocks, sequence)
        contents.of_block[sequence.block_table[0]] = number
    staying, leaving = sequences[::2], sequences[1::2]
    for sequence in leaving:
        blocks.disown(sequence)
        blocks.release(sequence)
    window = take(blocks, 4)
    assert not {s.block_table[0] for s in staying} & set(window.blocks)
    assert [contents.of_block[s.block_table[0]] for s in staying] == [0, 2, 4, 6]
    blocks.check_integrity(staying)
    # They are still found by their names, where they are now.
    again = asking([0, 0, 0])
    blocks.release(staying[0])
    blocks.return_window(window)
    assert blocks.admit(again)
    assert again.num_computed_tokens == 2
    assert contents.of_block[again.block_table[0]] == 0


def test_a_window_takes_what_nobody_uses_before_it_moves_anybody() -> None:
    contents = Contents()
    blocks = blocks_of(8, block_size=2, contents=contents)
    idle, running = sequence_of(6), asking([7] * 6)
    compute(blocks, idle)
    compute(blocks, running)
    table = list(running.block_table)
    blocks.release(idle)
    take(blocks, 3)
    assert running.block_table == table
    assert contents.of_block == {}


def test_sequences_never_take_blocks_of_a_window() -> None:
    blocks = blocks_of(8, block_size=2)
    window = take(blocks, 5)
    sequence = sequence_of(6)
    assert blocks.admit(sequence)
    assert not set(sequence.block_table) & set(window.blocks)
    assert not blocks.admit(sequence_of(1))


def test_windows_move_together_where_free_blocks_are_no_neighbours() -> None:
    contents = Contents()
    blocks = blocks_of(9, block_size=2, contents=contents)
    last, middle, first = (take(blocks, 3) for _ in range(3))
    contents.of_block |= dict.fromkeys(middle.blocks, "middle")
    blocks.return_window(first)
    blocks.return_window(last)
    sequence = compute(blocks, asking([1] * 4))
    contents.of_block |= dict.fromkeys(sequence.block_table, "sequence")
    assert blocks.num_free_blocks == 4
    assert blocks.take_window(4 * BLOCK_BYTES) is None
    (moved,) = blocks.gather([middle]).values()
    assert {contents.of_block[block] for block in moved.blocks} == {"middle"}
    window = take(blocks, 4)
    assert not set(window.blocks) & set(moved.blocks)
    assert {contents.of_block[block] for block in sequence.block_table} == {"sequence"}
    blocks.check_integrity([sequence])


@given(st.lists(st.tuples(st.sampled_from("aaartg"), st.integers(1, 30)), max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_order_of_windows_and_sequences_keeps_everybodys_content(
    actions: list[tuple[str, int]],
) -> None:
    contents = Contents()
    blocks = blocks_of(20, block_size=2, contents=contents)
    sequences: list[Sequence] = []
    windows: list[Window] = []
    for number, (action, size) in enumerate(actions):
        if action == "a":
            sequence = asking([number] * size)
            if blocks.admit(sequence):
                compute_after_admission(blocks, sequence)
                for place, block in enumerate(sequence.block_table):
                    contents.of_block[block] = (number, place)
                sequences.append(sequence)
        elif action == "t":
            window = blocks.take_window(size * BLOCK_BYTES // 2)
            if window is not None:
                windows.append(window)
                contents.of_block |= dict.fromkeys(window.blocks, window)
        elif action == "g":
            staying = windows[: size % 2]
            moved = blocks.gather(window for window in windows if window not in staying)
            for old, new in moved.items():
                assert [contents.of_block[block] for block in new.blocks] == [old] * old.num_blocks
                contents.of_block |= dict.fromkeys(new.blocks, new)
            windows = [moved.get(window, window) for window in windows]
            num_free = blocks.num_free_blocks
            if num_free and not staying:
                blocks.return_window(take(blocks, num_free))
        elif sequences and size % 2:
            blocks.release(sequences.pop(size % len(sequences)))
        elif windows:
            blocks.return_window(windows.pop(size % len(windows)))
        blocks.check_integrity(sequences)
        for sequence in sequences:
            found = [contents.of_block[block] for block in sequence.block_table]
            assert found == [(sequence.token_ids[0], place) for place in range(len(found))]
        for window in windows:
            assert all(contents.of_block[block] == window for block in window.blocks)
    assert blocks.num_window_blocks == sum(window.num_blocks for window in windows)
