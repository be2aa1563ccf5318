"""The fast operations equal their definitions, each in every implementation."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.batch import Batch, build
from engine.kernels import reference
from engine.kernels.choice import DENSE, Kernels, choose
from engine.kernels.cpu_lora import MIN_ROWS_OF_GEMM, CompiledLora
from engine.kernels.gpu_attention import GpuAttention
from engine.kernels.slot_weights import NOWHERE, AdapterLayout, SlotWeights
from engine.model.memory import DeviceMemory, LayerShape
from engine.scheduler import ScheduledSequence
from engine.sequence import NO_ADAPTER, Sequence

BLOCK_SIZE = 4
NUM_KV_HEADS, GROUP, HEAD_DIM = 2, 3, 8
COMPILED = choose(torch.device("cpu"), torch.float32)
# Computed tokens and new tokens of each sequence, single tokens first, by growing context.
MIXED = [(0, 1), (60, 1), (3, 1), (4, 1), (0, 9), (5, 6), (16, 2)]

every_implementation = pytest.mark.parametrize(
    "kernels", [pytest.param(DENSE, id="dense"), pytest.param(COMPILED, id="compiled")]
)


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


def memory_for(batch: Batch, *, head_dim: int = HEAD_DIM) -> DeviceMemory:
    """Two layers of which the tests use the second; all finite but the null block zero."""
    layer = LayerShape(NUM_KV_HEADS, head_dim, head_dim, torch.float32, None)
    memory = DeviceMemory(
        [layer, layer],
        num_blocks=int(batch.block_tables.max()),
        block_size=BLOCK_SIZE,
        device=torch.device("cpu"),
    )
    memory.keys[1][1:].normal_()
    memory.values[1][1:].normal_()
    return memory


def new_states(batch: Batch, *, head_dim: int = HEAD_DIM) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as models give them: heads before rows in memory."""
    return tuple(  # type: ignore[return-value] # three
        torch.randn(heads, batch.num_tokens, head_dim).transpose(0, 1)
        for heads in (NUM_KV_HEADS * GROUP, NUM_KV_HEADS, NUM_KV_HEADS)
    )


def attend(
    kernels: Kernels,
    batch: Batch,
    memory: DeviceMemory,
    states: tuple[Tensor, Tensor, Tensor],
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    query, key, value = states
    out = torch.full_like(query, float("nan"), memory_format=torch.contiguous_format)
    kernels.plan_attention(batch).attend(
        query,
        key,
        value,
        key_cache=memory.keys[1],
        value_cache=memory.values[1],
        out=out,
        scaling=0.3,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return out


def assert_attention_is_right(
    kernels: Kernels,
    batch: Batch,
    *,
    sliding_window: int | None,
    softcap: float | None,
    head_dim: int = HEAD_DIM,
) -> None:
    memory, states = memory_for(batch, head_dim=head_dim), new_states(batch, head_dim=head_dim)
    keys, values = memory.keys[1].clone(), memory.values[1].clone()
    found = attend(kernels, batch, memory, states, sliding_window=sliding_window, softcap=softcap)
    reference.write_kv(keys, states[1], batch.cache_rows)
    reference.write_kv(values, states[2], batch.cache_rows)
    assert torch.equal(memory.keys[1], keys), "keys went elsewhere than the block tables say"
    assert torch.equal(memory.values[1], values), "values went elsewhere"
    expected = reference.paged_attention(
        states[0],
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


@every_implementation
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sliding_window", [None, 1, 5, 1000])
@pytest.mark.parametrize("shape", [MIXED, [(0, 1)], [(0, 5)], [(7, 1), (7, 1)]])
@pytest.mark.parametrize("head_dim", [HEAD_DIM, 48])
def test_attention(
    kernels: Kernels,
    head_dim: int,
    shape: list[tuple[int, int]],
    sliding_window: int | None,
    softcap: float | None,
) -> None:
    """Rows of 48 are whole vectors, those of 8 are not."""
    torch.manual_seed(0)
    assert_attention_is_right(
        kernels,
        batch_of(shape),
        sliding_window=sliding_window,
        softcap=softcap,
        head_dim=head_dim,
    )


@pytest.mark.parametrize("sliding_window", [None, 7])
@pytest.mark.parametrize("head_dim", [HEAD_DIM, 64, 80])
def test_a_query_gives_bit_for_bit_the_same_in_one_step_as_in_many(
    head_dim: int, sliding_window: int | None
) -> None:
    """Compiled: a prompt as a whole, in parts, and token by token as one that decodes."""
    torch.manual_seed(0)
    length = 41
    batch = batch_of([(0, length)])
    memory, states = memory_for(batch, head_dim=head_dim), new_states(batch, head_dim=head_dim)
    whole = attend(COMPILED, batch, memory, states, sliding_window=sliding_window)
    for size in (1, 5, 16):
        parts = []
        for first in range(0, length, size):
            num = min(size, length - first)
            # The same blocks as the whole's.
            sequence = Sequence.unowned(
                list(range(length)), block_table=batch.block_tables[0].tolist()
            )
            sequence.num_computed_tokens = first
            part = build(
                [ScheduledSequence(sequence, num, is_sampled=True)],
                block_size=BLOCK_SIZE,
                device=torch.device("cpu"),
            )
            query, key, value = (each[first : first + num] for each in states)
            own = query, key, value
            parts.append(attend(COMPILED, part, memory, own, sliding_window=sliding_window))
        assert torch.equal(torch.cat(parts), whole)


@given(
    contexts=st.lists(st.integers(0, 70), min_size=1, max_size=9),
    chunks=st.lists(st.tuples(st.integers(0, 20), st.integers(2, 15)), max_size=3),
    sliding_window=st.none() | st.integers(1, 80),
)
@settings(max_examples=60, deadline=None)
def test_attention_of_any_batch(
    contexts: list[int], chunks: list[tuple[int, int]], sliding_window: int | None
) -> None:
    batch = batch_of([(context, 1) for context in contexts] + chunks)
    for kernels in (DENSE, COMPILED):
        assert_attention_is_right(kernels, batch, sliding_window=sliding_window, softcap=None)


@every_implementation
def test_attention_never_reads_what_others_left_behind_in_a_block(kernels: Kernels) -> None:
    batch = batch_of([(2, 1), (60, 1), (1, 2)])
    memory = memory_for(batch)
    used = {
        int(table[position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
        for table, context in zip(batch.block_tables, batch.host_context_lens, strict=True)
        for position in range(context)
    }
    for row in range(BLOCK_SIZE, (memory.num_blocks + 1) * BLOCK_SIZE):
        if row not in used:
            memory.keys[1][row // BLOCK_SIZE, row % BLOCK_SIZE] = float("nan")
            memory.values[1][row // BLOCK_SIZE, row % BLOCK_SIZE] = float("nan")
    assert bool(torch.isfinite(attend(kernels, batch, memory, new_states(batch))).all())


def test_layers_share_a_block_and_nothing_else() -> None:
    shapes = [LayerShape(2, 8, 4, torch.float32, None), LayerShape(1, 3, 8, torch.float32, None)]
    memory = DeviceMemory(shapes, num_blocks=3, block_size=5, device=torch.device("cpu"))
    views = [*memory.keys, *memory.values]
    for number, view in enumerate(views):
        view[2] = number
    assert all(bool((view[2] == number).all()) for number, view in enumerate(views))
    memory.move([(2, 3), (1, 2)])
    assert all(bool((view[3] == number).all()) for number, view in enumerate(views))


RANKS = {0: 3, 1: 8, 2: 1, 5: 40}
LONG = MIN_ROWS_OF_GEMM + 3
Adapters = dict[int, tuple[Tensor, Tensor]]


def weights_of(
    adapters: Adapters, *, affine: Adapters | None = None, num_slots: int = 8
) -> SlotWeights:
    """Module 1 of two is changed; lora_B is [out_features, rank], gain and shift [out_features]."""
    lora_A, lora_B = next(iter(adapters.values()))
    in_features, out_features = lora_A.shape[1], lora_B.shape[0]
    none = torch.empty(0, in_features), torch.empty(out_features, 0)
    weights = SlotWeights([(1, 1), (in_features, out_features)], num_slots=num_slots)
    for slot in {*adapters, *(affine or {})}:
        lora_A, lora_B = adapters.get(slot, none)
        gain_and_shift = (affine or {}).get(slot, ())
        parts = [lora_A.flatten(), lora_B.T.flatten(), *gain_and_shift]
        # Not at the beginning, and with something behind.
        memory = torch.cat([torch.randn(5), *parts, torch.randn(5)])
        starts = 5 + np.cumsum([0, *(part.numel() for part in parts)])
        layout = AdapterLayout(
            modules=np.array([1]),
            ranks=np.array([lora_A.shape[0]]),
            out_features=np.array([out_features]),
            starts_of_A=starts[:1],
            starts_of_B=starts[1:2],
            starts_of_gain=starts[2:3] if gain_and_shift else np.array([NOWHERE]),
            starts_of_shift=starts[3:4] if gain_and_shift else np.array([NOWHERE]),
        )
        weights.put(slot, memory, layout)
    return weights


def assert_lora_is_right(
    kernels: Kernels,
    adapters: Adapters,
    slots: list[tuple[int, int]],
    *,
    affine: Adapters | None = None,
) -> None:
    """`slots`: slot and number of rows of each sequence."""
    weights = weights_of(adapters, affine=affine)
    in_features, out_features = weights.features[1]
    batch = batch_of([(0, n) for _, n in slots], slots=[slot for slot, _ in slots])
    x, out = torch.randn(batch.num_tokens, in_features), torch.randn(batch.num_tokens, out_features)
    token_slots = torch.tensor([slot for slot, n in slots for _ in range(n)])
    expected = reference.affine(out, affine or {}, token_slots)
    expected = expected + reference.lora(x, adapters, token_slots)
    kernels.plan_lora(batch, weights).apply(out, x, module=1)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-5)


def random_adapters(ranks: dict[int, int], *, features: tuple[int, int]) -> Adapters:
    in_features, out_features = features
    return {
        slot: (torch.randn(rank, in_features), torch.randn(out_features, rank))
        for slot, rank in ranks.items()
    }


@every_implementation
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
def test_lora(kernels: Kernels, slots: list[tuple[int, int]]) -> None:
    """Slot 7 does not target this module."""
    torch.manual_seed(0)
    assert_lora_is_right(kernels, random_adapters(RANKS, features=(12, 20)), slots)


@every_implementation
@pytest.mark.parametrize("out_features", [1, 20, 70])
def test_gains_and_shifts(kernels: Kernels, out_features: int) -> None:
    """Slot 0 has both, 1 LoRA alone, 6 gains and shifts alone."""
    torch.manual_seed(0)
    slots = [(0, 1), (NO_ADAPTER, 1), (6, 1), (1, 1), (6, LONG), (0, LONG), (1, 3), (7, 2)]
    affine = {slot: (torch.randn(out_features), torch.randn(out_features)) for slot in (0, 6)}
    adapters = random_adapters({0: 3, 1: 8}, features=(12, out_features))
    assert_lora_is_right(kernels, adapters, slots, affine=affine)


@given(
    ranks=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    rows=st.lists(st.tuples(st.integers(-1, 6), st.integers(1, 40)), min_size=1, max_size=12),
    features=st.tuples(st.integers(1, 70), st.integers(1, 70)),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_lora_of_any_batch(
    ranks: list[int], rows: list[tuple[int, int]], features: tuple[int, int]
) -> None:
    adapters = random_adapters(dict(enumerate(ranks)), features=features)
    # A sequence of one token may not come after a longer one.
    rows = sorted((n, slot) for slot, n in rows)
    if all(slot == NO_ADAPTER for _, slot in rows):
        return
    for kernels in (DENSE, COMPILED):
        assert_lora_is_right(kernels, adapters, [(slot, n) for n, slot in rows])


@every_implementation
def test_an_overflow_in_one_row_stays_in_that_row(kernels: Kernels) -> None:
    adapters = {slot: (torch.ones(2, 4) * 1e20, torch.ones(3, 2)) for slot in (0, 1)}
    batch = batch_of([(0, 1), (0, 1), (0, 1)], slots=[0, NO_ADAPTER, 1])
    x = torch.tensor([[1e30] * 4, [1e30] * 4, [0.0] * 4])
    out = torch.zeros(3, 3)
    kernels.plan_lora(batch, weights_of(adapters)).apply(out, x, module=1)
    assert torch.isfinite(out).all(dim=-1).tolist() == [False, True, True]


def test_each_device_gets_the_kernels_that_are_made_for_it() -> None:
    assert COMPILED.plan_lora is CompiledLora
    assert choose(torch.device("cpu"), torch.bfloat16) is DENSE
    assert choose(torch.device("cuda"), torch.float32) is DENSE
    assert choose(torch.device("cuda"), torch.bfloat16).plan_attention is GpuAttention


def test_a_batch_of_the_base_model_alone_has_no_adapted_rows() -> None:
    assert len(batch_of(MIXED).slot_runs) == 0


def test_neighbours_with_one_slot_are_one_run() -> None:
    batch = batch_of([(0, 1), (0, 1), (0, 3)], slots=[4, 4, NO_ADAPTER])
    assert batch.slot_runs.tolist() == [[0, 2, 4]]
