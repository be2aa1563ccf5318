"""The kernels for GPUs, interpreted on a CPU, equal their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels.choice import on_gpu
from engine.kernels.dense import DenseLora
from engine.kernels.gpu_lora import KINDS, GpuLora, MixedLora, list_work
from engine.replay import again
from engine.sequence import NO_ADAPTER
from tests.gpu_lab import (
    ATTENTION_CASES,
    BOUNDS,
    CPU,
    FIXED_CASES,
    LORA_CASES,
    ROW_CASES,
    AttentionCase,
    FixedCase,
    GateCase,
    LoraCase,
    NormCase,
    RotationCase,
    RowCase,
    adapters_of,
    attend,
    attention_error,
    batch_of,
    expected_lora,
    fixed_error,
    lora_error,
    memory_of,
    relative_error,
    row_error,
    states_of,
)

FULL = torch.float32
# numpy takes numbers of bfloat16 for whole ones: the interpreter multiplies them so.
HALF = torch.float16
every_dtype = pytest.mark.parametrize("dtype", [FULL, HALF], ids=["float32", "float16"])
at_random = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
for_long = settings(at_random, max_examples=400, derandomize=False)


@every_dtype
@pytest.mark.parametrize("case", LORA_CASES.values(), ids=LORA_CASES)
def test_lora(case: LoraCase, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert lora_error(case, device=CPU, dtype=dtype) < BOUNDS[dtype]


@every_dtype
@pytest.mark.parametrize("case", ATTENTION_CASES.values(), ids=ATTENTION_CASES)
def test_attention(case: AttentionCase, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert attention_error(case, device=CPU, dtype=dtype) < BOUNDS[dtype]


@every_dtype
@pytest.mark.parametrize("case", ROW_CASES.values(), ids=ROW_CASES)
def test_rows(case: RowCase, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert row_error(case, device=CPU, dtype=dtype) < BOUNDS[dtype]


@every_dtype
@pytest.mark.parametrize("case", FIXED_CASES.values(), ids=FIXED_CASES)
def test_fixed_launches(case: FixedCase, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert fixed_error(case, device=CPU, dtype=dtype, record=again) < BOUNDS[dtype]


def test_lora_of_single_rows_in_bfloat16() -> None:
    case = LORA_CASES["small: rows of their own, scaled and shifted"]
    dtype = torch.bfloat16
    assert lora_error(case, device=CPU, dtype=dtype) < BOUNDS[dtype]


# Shapes at random

some_loras = st.builds(
    LoraCase,
    # Sequences of one token come first.
    st.lists(st.tuples(st.integers(-1, 7), st.just(1) | st.integers(1, 90)), min_size=1, max_size=8)
    .filter(lambda rows: any(slot != NO_ADAPTER for slot, _ in rows))
    .map(lambda rows: tuple(sorted(rows, key=lambda row: row[1]))),
    st.dictionaries(st.integers(0, 7), st.integers(1, 256), min_size=1, max_size=6),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.frozensets(st.integers(0, 7), max_size=2),
)
some_attentions = st.builds(
    lambda decodes, chunks, **others: AttentionCase((*decodes, *chunks), **others),
    st.lists(st.tuples(st.integers(0, 90), st.just(1)), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 40), st.integers(2, 40)), max_size=3),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    key_dim=st.integers(1, 40),
    value_dim=st.integers(1, 40),
    block_size=st.sampled_from([1, 3, 4, 16]),
    sliding_window=st.none() | st.integers(1, 100),
    softcap=st.none() | st.just(2.0),
)
some_rows = (
    st.builds(
        NormCase,
        st.integers(1, 40),
        st.integers(1, 300),
        offset=st.sampled_from([0.0, 1.0]),
        has_residual=st.booleans(),
    )
    | st.builds(
        lambda half, rest, *heads: RotationCase(*heads, 2 * half + rest, 2 * half),
        st.integers(1, 40),
        st.integers(0, 30),
        st.integers(1, 9),
        st.integers(1, 9),
        st.integers(1, 9),
    )
    | st.builds(GateCase, st.integers(1, 9), st.integers(1, 1500), is_one=st.booleans())
)
some_decodes = st.builds(
    lambda contexts, padding, **others: FixedCase(
        len(contexts) + padding,
        AttentionCase(tuple((context, 1) for context in contexts), **others),
        max_context=max(contexts) + 1,
    ),
    st.lists(st.integers(0, 700), min_size=1, max_size=5),
    st.integers(0, 4),
    group=st.integers(1, 9),
    block_size=st.sampled_from([1, 3, 16]),
    sliding_window=st.none() | st.integers(1, 100),
) | st.builds(
    lambda slots, padding, ranks: FixedCase(
        len(slots) + padding,
        lora=LoraCase(tuple((slot, 1) for slot in slots), ranks),
        max_rank=max(ranks.values()),
    ),
    st.lists(st.integers(-1, 7), min_size=1, max_size=20).filter(lambda slots: max(slots) >= 0),
    st.integers(0, 4),
    st.dictionaries(st.integers(0, 7), st.integers(1, 70), min_size=1, max_size=6),
)


def assert_lora_is_right(case: LoraCase) -> None:
    assert lora_error(case, device=CPU, dtype=FULL) < BOUNDS[FULL]


def assert_attention_is_right(case: AttentionCase) -> None:
    assert attention_error(case, device=CPU, dtype=FULL) < BOUNDS[FULL]


@at_random
@given(some_loras)
def test_lora_of_any_batch(case: LoraCase) -> None:
    assert_lora_is_right(case)


@at_random
@given(some_attentions)
def test_attention_of_any_batch(case: AttentionCase) -> None:
    assert_attention_is_right(case)


@at_random
@given(some_rows)
def test_rows_of_any_shape(case: RowCase) -> None:
    assert row_error(case, device=CPU, dtype=FULL) < BOUNDS[FULL]


@at_random
@given(some_decodes)
def test_fixed_launches_of_any_batch(case: FixedCase) -> None:
    assert fixed_error(case, device=CPU, dtype=FULL, record=again) < BOUNDS[FULL]


@pytest.mark.slow
@for_long
@given(some_loras)
def test_lora_of_very_many_batches(case: LoraCase) -> None:
    assert_lora_is_right(case)


@pytest.mark.slow
@for_long
@given(some_attentions)
def test_attention_of_very_many_batches(case: AttentionCase) -> None:
    assert_attention_is_right(case)


@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 200)), min_size=1, max_size=12),
    ranks=st.lists(st.integers(0, 256), min_size=6, max_size=6),
)
@settings(max_examples=200, deadline=None)
def test_every_adapted_row_is_in_one_tile_and_every_rank_in_one_piece(
    rows: list[tuple[int, int]], ranks: list[int]
) -> None:
    ends = np.cumsum([number for _, number in rows])
    runs = np.array([(e - n, e, slot) for (slot, n), e in zip(rows, ends, strict=True)])
    work = list_work(runs, np.array(ranks), device=CPU)
    found, covered = {}, dict.fromkeys(range(len(work.tiles)), 0)
    for tile, first_rank in work.pieces.tolist():
        assert first_rank == covered[tile]
        covered[tile] += work.piece_ranks
    for tile, (first, end, slot) in enumerate(work.tiles.tolist()):
        assert 0 < end - first <= work.tile_rows
        assert ranks[slot] <= covered[tile] < ranks[slot] + work.piece_ranks
        found |= dict.fromkeys(work.rows[first:end].tolist(), slot)
    assert found == {row: slot for first, end, slot in runs.tolist() for row in range(first, end)}
    assert sorted(work.rows.tolist()) == list(range(int(ends[-1])))


# Plans


def test_one_adapter_with_many_rows_gets_gemms_and_few_rows_do_not() -> None:
    adapters = adapters_of({1: 4}, frozenset(), features=(8, 8), device=CPU, dtype=FULL)
    lora = GpuLora(CPU)
    assert isinstance(lora.plan(batch_of(((0, 40),), slots=[1]), adapters.weights), DenseLora)
    assert isinstance(lora.plan(batch_of(((0, 4),), slots=[1]), adapters.weights), MixedLora)


def test_modules_that_read_one_input_shrink_it_together_from_the_second_time_on() -> None:
    torch.manual_seed(0)
    lora = GpuLora(CPU)
    both = [
        adapters_of({0: 4, 1: 9}, frozenset(), features=(24, 40), device=CPU, dtype=FULL)
        for _ in range(2)
    ]
    # Two modules over one input: the second's entries beside the first's.
    weights = both[0].weights
    weights.features[0] = weights.features[1]
    weights.table[0] = both[1].weights.table[1]
    batch = batch_of(((0, 1), (0, 1), (0, 1)), slots=[0, 1, 0])
    x, out = torch.randn(3, 24), torch.randn(2, 3, 40)
    expected = [
        expected_lora(adapters, own, x, torch.tensor([0, 1, 0]))
        for adapters, own in zip(reversed(both), out, strict=True)
    ]
    answers, readers = [], []
    for _ in range(3):
        plan, own = lora.plan(batch, weights), out.clone()
        assert isinstance(plan, MixedLora)
        for module in range(2):
            plan.apply(own[module], x, module=module)
        answers.append(own)
        readers.append(plan._shrunk.modules)
    assert readers == [(1,), (0, 1), (0, 1)]
    assert relative_error(answers[0], torch.stack(expected)) < BOUNDS[FULL]
    assert all(torch.equal(answers[0], each) for each in answers[1:])


def test_an_input_in_the_place_of_another_is_not_taken_for_it() -> None:
    torch.manual_seed(0)
    adapters = adapters_of({0: 4, 1: 9}, frozenset(), features=(24, 40), device=CPU, dtype=FULL)
    plan = GpuLora(CPU).plan(batch_of(((0, 1), (0, 1)), slots=[0, 1]), adapters.weights)
    for _ in range(4):
        x, out = torch.randn(2, 24), torch.randn(2, 40)
        expected = expected_lora(adapters, out, x, torch.tensor([0, 1]))
        plan.apply(out, x, module=1)
        assert relative_error(out, expected) < BOUNDS[FULL]


def test_a_slot_that_gets_another_adapter_serves_that_one_from_the_next_step_on() -> None:
    torch.manual_seed(0)
    lora = GpuLora(CPU)
    batch = batch_of(((0, 1), (0, 1)), slots=[0, 1])
    adapters = adapters_of({0: 4, 1: 9}, frozenset(), features=(24, 40), device=CPU, dtype=FULL)
    for rank in (4, 30, 1):
        adapters.lora[0] = (torch.randn(rank, 24), torch.randn(40, rank))
        adapters.put(0)
        x, out = torch.randn(2, 24), torch.randn(2, 40)
        expected = expected_lora(adapters, out, x, torch.tensor([0, 1]))
        lora.plan(batch, adapters.weights).apply(out, x, module=1)
        assert relative_error(out, expected) < BOUNDS[FULL]
    adapters.weights.clear(0)
    before = out.clone()
    lora.plan(batch, adapters.weights).apply(out, x, module=1)
    assert torch.equal(out[0], before[0])


def test_warming_up_launches_all_kinds_and_changes_nothing() -> None:
    adapters = adapters_of({}, frozenset({0}), features=(24, 40), device=CPU, dtype=FULL)
    adapters.weights.clear(0)
    lora = GpuLora(CPU)
    lora.warm_up(adapters.weights, FULL)
    assert not lora._tables.entries.any()
    sizes = [(1, 3), (9, 3), (70, 3), (70, 20), (70, 256)]
    works = [
        list_work(np.array([[0, rows, 0], [rows, 2 * rows, 1]]), np.array([rank, 1]), device=CPU)
        for rows, rank in sizes
    ]
    assert {(work.tile_rows, work.piece_ranks) for work in works} == set(KINDS)


def test_an_overflow_in_one_row_stays_in_that_row() -> None:
    for rows in (1, 20):
        adapters = adapters_of({0: 2, 1: 2}, frozenset(), features=(4, 3), device=CPU, dtype=FULL)
        batch = batch_of(((0, rows), (0, rows)), slots=[0, 1])
        x, out = torch.zeros(2 * rows, 4), torch.zeros(2 * rows, 3)
        x[0] = float("nan")
        on_gpu(CPU).plan_lora(batch, adapters.weights).apply(out, x, module=1)
        assert torch.isfinite(out).all(dim=1).tolist() == [False] + [True] * (2 * rows - 1)


def test_what_a_sequence_gets_does_not_depend_on_who_else_is_in_the_batch() -> None:
    """To the bit: the parts of a context follow from its own length."""
    torch.manual_seed(0)
    case = AttentionCase(((700, 1), (20, 1), (600, 30)))
    batch = batch_of(case.shape)
    memory, states = memory_of(case, batch, FULL), states_of(case, batch, FULL)
    together = attend(on_gpu(CPU), case, batch, memory, states)
    # The last sequence again, by itself, over what the first time has written.
    alone = batch_of(((600, 30),))
    first, count = batch.query_starts[2], alone.block_tables.shape[1]
    blocks, own = batch.block_tables[2, :count], alone.block_tables[0]
    caches = memory_of(case, alone, FULL)
    for there, here in ((memory.keys[1], caches.keys[1]), (memory.values[1], caches.values[1])):
        here[own] = there[blocks]
    again = attend(on_gpu(CPU), case, alone, caches, tuple(part[first:] for part in states))
    assert torch.equal(again, together[first:])
