"""The fast operations equal their definitions."""

import itertools

import pytest
import torch
from torch import Tensor

from engine.batch import Batch, SlotRun, build
from engine.kernels import reference
from engine.kernels.cpu import MIN_ROWS_ALONE, AttentionPlan, Layout, LoraPlan, plan_lora
from engine.scheduler import ScheduledSequence
from engine.sequence import NO_ADAPTER, Sequence

BLOCK_SIZE = 4
NUM_KV_HEADS, GROUP, HEAD_DIM = 2, 3, 8
# Computed tokens and new tokens of each sequence, single tokens first, by growing context.
MIXED = [(0, 1), (3, 1), (4, 1), (60, 1), (0, 9), (5, 6), (16, 2)]


def batch_of(shape: list[tuple[int, int]], *, slots: list[int] | None = None) -> Batch:
    """Sequences whose blocks lie scattered and backwards."""
    total = sum(-(-(old + new) // BLOCK_SIZE) for old, new in shape)
    free = list(range(total, 0, -1))
    scheduled = []
    for index, (old, new) in enumerate(shape):
        num_blocks = -(-(old + new) // BLOCK_SIZE)
        table = [free.pop((7 * i + index) % len(free)) for i in range(num_blocks)]
        sequence = Sequence.unowned(list(range(old + new)), block_table=table)
        sequence.num_computed_tokens = old
        sequence.slot = NO_ADAPTER if slots is None else slots[index]
        scheduled.append(ScheduledSequence(sequence, new, is_sampled=True))
    return build(scheduled, block_size=BLOCK_SIZE, device=torch.device("cpu"))


def caches_for(batch: Batch) -> tuple[Tensor, Tensor]:
    num_blocks = int(batch.block_tables.max()) + 1
    shape = (num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    keys, values = torch.randn(*shape), torch.randn(*shape)
    keys[0], values[0] = 0, 0
    return keys, values


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sliding_window", [None, 1, 5, 1000])
@pytest.mark.parametrize("shape", [MIXED, [(0, 1)], [(0, 5)], [(7, 1), (7, 1)]])
def test_attention(
    shape: list[tuple[int, int]], sliding_window: int | None, softcap: float | None
) -> None:
    torch.manual_seed(0)
    batch = batch_of(shape)
    keys, values = caches_for(batch)
    query = torch.randn(batch.num_tokens, NUM_KV_HEADS * GROUP, HEAD_DIM)
    found = AttentionPlan(batch).attend(
        query, keys, values, scaling=0.3, sliding_window=sliding_window, softcap=softcap
    )
    expected = reference.paged_attention(
        query,
        keys,
        values,
        block_tables=batch.block_tables,
        query_starts=batch.query_starts,
        context_lens=batch.host_context_lens,
        scaling=0.3,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_attention_never_reads_what_others_left_behind_in_a_block() -> None:
    batch = batch_of([(2, 1), (60, 1), (1, 2)])
    keys, values = caches_for(batch)
    used = {
        int(table[position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
        for table, context in zip(batch.block_tables, batch.host_context_lens, strict=True)
        for position in range(context)
    }
    for row in range(BLOCK_SIZE, keys.shape[0] * BLOCK_SIZE):
        if row not in used:
            keys.view(-1, NUM_KV_HEADS, HEAD_DIM)[row] = float("nan")
            values.view(-1, NUM_KV_HEADS, HEAD_DIM)[row] = float("nan")
    query = torch.randn(batch.num_tokens, NUM_KV_HEADS * GROUP, HEAD_DIM)
    out = AttentionPlan(batch).attend(
        query, keys, values, scaling=1.0, sliding_window=None, softcap=None
    )
    assert bool(torch.isfinite(out).all())


def test_keys_and_values_go_where_the_block_tables_say() -> None:
    batch = batch_of(MIXED)
    found, _ = caches_for(batch)
    expected = found.clone()
    new = torch.randn(batch.num_tokens, NUM_KV_HEADS, HEAD_DIM)
    AttentionPlan(batch).write_kv(found, new)
    reference.write_kv(expected, new, batch.cache_rows)
    assert torch.equal(found, expected)


RANKS = {0: 3, 1: 8, 2: 1, 5: 40}
LONG = MIN_ROWS_ALONE + 3


@pytest.mark.parametrize(
    "slots",
    [
        [(0, 1), (1, 1), (NO_ADAPTER, 1), (2, 1), (0, 1)],
        [(5, 1), (0, LONG), (NO_ADAPTER, LONG), (1, 4), (5, LONG)],
        [(NO_ADAPTER, 1), (2, 1), (NO_ADAPTER, 1)],
        [(7, 2), (0, 1)],
        [(1, 1)],
    ],
)
@pytest.mark.parametrize("gap", [0, 100])
def test_lora(slots: list[tuple[int, int]], gap: int) -> None:
    """`gap`: unused columns between two adapters; slot 7 does not target this module."""
    torch.manual_seed(0)
    in_features, out_features = 12, 20
    adapters = {
        slot: (torch.randn(rank, in_features), torch.randn(out_features, rank))
        for slot, rank in RANKS.items()
    }
    pool_A, pool_B, layout = pooled(adapters, gap=gap)
    batch = batch_of([(0, n) for _, n in slots], slots=[slot for slot, _ in slots])
    plan = plan_lora(batch)
    assert isinstance(plan, LoraPlan)
    x, out = torch.randn(batch.num_tokens, in_features), torch.randn(batch.num_tokens, out_features)
    token_slots = torch.tensor([slot for slot, n in slots for _ in range(n)])
    expected = out + reference.lora(x, adapters, token_slots)
    plan.add(out, x, lora_A=pool_A, lora_B=pool_B, layout=layout)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def pooled(
    adapters: dict[int, tuple[Tensor, Tensor]], *, gap: int
) -> tuple[Tensor, Tensor, Layout]:
    """Pools as a module keeps them, with finite rubbish in the gaps."""
    widths = [lora_A.shape[0] + gap for lora_A, _ in adapters.values()]
    starts = [0, *itertools.accumulate(widths)]
    lora_A, lora_B = next(iter(adapters.values()))
    pool_A = torch.randn(starts[-1], lora_A.shape[1])
    pool_B = torch.randn(starts[-1], lora_B.shape[0])
    layout = []
    for first, (slot, (lora_A, lora_B)) in zip(starts, adapters.items(), strict=False):
        end = first + lora_A.shape[0]
        pool_A[first:end], pool_B[first:end] = lora_A, lora_B.T
        layout.append((slot, first, end))
    return pool_A, pool_B, tuple(layout)


def test_an_overflow_in_one_row_stays_in_that_row() -> None:
    adapters = {slot: (torch.ones(2, 4) * 1e20, torch.ones(3, 2)) for slot in (0, 1)}
    pool_A, pool_B, layout = pooled(adapters, gap=0)
    batch = batch_of([(0, 1), (0, 1), (0, 1)], slots=[0, NO_ADAPTER, 1])
    x = torch.tensor([[1e30] * 4, [1e30] * 4, [0.0] * 4])
    out = torch.zeros(3, 3)
    LoraPlan(batch).add(out, x, lora_A=pool_A, lora_B=pool_B, layout=layout)
    assert torch.isfinite(out).all(dim=-1).tolist() == [False, True, True]


def test_a_batch_of_the_base_model_alone_has_no_plan() -> None:
    assert plan_lora(batch_of(MIXED)) is None


def test_neighbours_with_one_slot_are_one_run() -> None:
    batch = batch_of([(0, 1), (0, 1), (0, 3)], slots=[4, 4, NO_ADAPTER])
    assert batch.slot_runs == (SlotRun(0, 2, 4), SlotRun(2, 5, NO_ADAPTER))
