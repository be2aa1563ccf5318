"""Configurations of the kernels for GPUs, and what each must give, on any device.

The tests that interpret the kernels on a CPU and those that run them compiled on a GPU go through
the same ones. Needs no more than torch, transformers, triton, numpy, safetensors and msgspec.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch, build
from engine.kernels import reference
from engine.kernels.choice import AttentionPlan, FixedPlans, Kernels, RowKernels, on_gpu
from engine.kernels.slot_weights import NOWHERE, AdapterLayout, SlotWeights
from engine.model.memory import DeviceMemory, LayerShape
from engine.replay import Buffers, Record
from engine.scheduler import ScheduledSequence
from engine.sequence import NO_ADAPTER, Sequence

CPU = torch.device("cpu")
# ‖found - expected‖ / ‖expected‖, the reference in float32 over the same rounded numbers. Eight and
# eleven bits of a 16-bit number's fraction, and the sums of tensor cores in float32.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@dataclass(frozen=True, slots=True)
class LoraCase:
    # Slot and number of rows of each sequence, single rows first
    rows: tuple[tuple[int, int], ...]
    # By slot
    ranks: dict[int, int]
    features: tuple[int, int] = (48, 80)
    # Slots that scale and shift
    affine: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class AttentionCase:
    # Computed and new tokens of each sequence, single new ones first
    shape: tuple[tuple[int, int], ...]
    num_kv_heads: int = 2
    group: int = 3
    key_dim: int = 16
    value_dim: int = 16
    block_size: int = 4
    sliding_window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class NormCase:
    num_rows: int
    num_columns: int
    offset: float = 0.0
    has_residual: bool = False


@dataclass(frozen=True, slots=True)
class RotationCase:
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    # As many of the first dims are turned.
    num_dims: int


@dataclass(frozen=True, slots=True)
class GateCase:
    num_rows: int
    num_columns: int
    # Whether gate and up are halves of one product.
    is_one: bool = False


@dataclass(frozen=True, slots=True)
class FixedCase:
    """Decoding rows among more of them, which nobody has."""

    size: int
    # Single new tokens alone; and longer contexts than any here
    attention: AttentionCase | None = None
    max_context: int = 64
    # Single rows alone; and a larger rank than any here
    lora: LoraCase | None = None
    max_rank: int = 40


RowCase = NormCase | RotationCase | GateCase
DISTINCT = tuple((slot, 1) for slot in range(5))
# Names say what is particular; those with "small" finish in seconds under a memory checker.
LORA_CASES = {
    "small: one row": LoraCase(((1, 1),), {1: 8}),
    "small: rows of their own": LoraCase(
        (*DISTINCT, (NO_ADAPTER, 1), (0, 1)), {0: 3, 1: 8, 2: 1, 3: 16, 4: 40}
    ),
    "small: rows of their own, scaled and shifted": LoraCase(
        (*DISTINCT, (NO_ADAPTER, 1)), {0: 3, 1: 8, 3: 16}, affine=frozenset({0, 4})
    ),
    "small: a slot without this module": LoraCase(((7, 1), (0, 1), (1, 1)), {0: 4, 1: 5}),
    "small: ragged features": LoraCase(((0, 1), (1, 1), (2, 3)), {0: 4, 1: 5, 2: 9}, (33, 71)),
    "small: small tiles": LoraCase(
        ((0, 1), (1, 1), (0, 1), (0, 1), (1, 17), (2, 9), (NO_ADAPTER, 5)), {0: 3, 1: 20, 2: 70}
    ),
    "small: small tiles, scaled and shifted": LoraCase(
        ((0, 1), (1, 20), (2, 9)), {0: 3, 1: 20}, affine=frozenset({1, 2})
    ),
    "small: large tiles of rank 16": LoraCase(((0, 1), (1, 66), (2, 70)), {0: 16, 1: 8, 2: 5}),
    "large tiles of rank 32": LoraCase(((0, 1), (1, 130), (2, 70)), {0: 3, 1: 32, 2: 17}),
    "large tiles of rank 64": LoraCase(((0, 1), (1, 66), (2, 64)), {0: 3, 1: 64, 2: 1}),
    "large tiles of rank 256": LoraCase(((0, 65), (1, 66)), {0: 256, 1: 100}),
    "large tiles, scaled and shifted": LoraCase(
        ((0, 65), (1, 66)), {0: 10}, affine=frozenset({0, 1})
    ),
    "rows of rank 256": LoraCase(((0, 1), (1, 1), (2, 1)), {0: 256, 1: 255, 2: 1}, (256, 256)),
    "inputs in several sums, rows": LoraCase(((0, 1), (1, 1)), {0: 8, 1: 16}, (2080, 96)),
    "inputs in several sums, small tiles": LoraCase(((0, 4), (1, 9)), {0: 8, 1: 24}, (2080, 96)),
    "inputs in several sums, large tiles": LoraCase(((0, 64), (1, 80)), {0: 8, 1: 24}, (2080, 96)),
}
MIXED = ((0, 1), (60, 1), (3, 1), (4, 1), (0, 9), (5, 6), (16, 2))
ATTENTION_CASES = {
    "small: one token": AttentionCase(((0, 1),)),
    "small: one prompt": AttentionCase(((0, 5),)),
    "small: everything": AttentionCase(MIXED),
    "small: window of 1": AttentionCase(MIXED, sliding_window=1),
    "small: window of 5": AttentionCase(MIXED, sliding_window=5),
    "small: window that nothing reaches": AttentionCase(MIXED, sliding_window=1000),
    "small: capped": AttentionCase(MIXED, softcap=2.0),
    "small: capped, with a window": AttentionCase(MIXED, softcap=2.0, sliding_window=7),
    "no groups": AttentionCase(MIXED, group=1),
    "one key head": AttentionCase(MIXED, num_kv_heads=1, group=20),
    "head of 12": AttentionCase(MIXED, key_dim=12, value_dim=12),
    "keys wider than values": AttentionCase(MIXED, key_dim=24, value_dim=8),
    "heads of 64, blocks of 16": AttentionCase(
        MIXED, group=4, key_dim=64, value_dim=64, block_size=16
    ),
    "heads of 128, blocks of 16": AttentionCase(
        ((70, 1), (20, 70)), group=4, key_dim=128, value_dim=128, block_size=16
    ),
    "heads of 256": AttentionCase(((70, 1), (0, 40)), group=2, key_dim=256, value_dim=256),
    "a context in parts": AttentionCase(((1100, 1), (511, 1), (512, 1), (900, 7))),
    "a context in parts, with a window": AttentionCase(
        ((1100, 1), (600, 1), (900, 7)), sliding_window=40, block_size=16
    ),
    "a prompt in many tiles": AttentionCase(((30, 1), (13, 130)), block_size=16),
}
ROW_CASES: dict[str, RowCase] = {
    "small: norm of one row": NormCase(1, 48),
    "small: norm of narrow rows": NormCase(37, 12, offset=1.0),
    "small: norm of a sum": NormCase(5, 70, has_residual=True),
    "small: norm of a sum, offset": NormCase(3, 64, offset=1.0, has_residual=True),
    "norm of wide rows": NormCase(3, 4096),
    "norm of a sum of wide rows": NormCase(2, 2880, has_residual=True),
    "small: RoPE of one token": RotationCase(1, 4, 2, 12, 12),
    "small: RoPE": RotationCase(7, 6, 3, 16, 16),
    "small: RoPE of some dims": RotationCase(5, 4, 4, 20, 8),
    "RoPE of heads of 128": RotationCase(3, 32, 8, 128, 128),
    "RoPE of 96 dims of 128": RotationCase(2, 5, 1, 128, 96),
    "small: gate": GateCase(3, 48),
    "small: gate, halves of one product": GateCase(4, 33, is_one=True),
    "wide gate": GateCase(2, 2500),
}
SHARED = tuple((slot, 1) for slot in (0, 0, 0, 1, 1, 1, 1, 1, 1, NO_ADAPTER))
DECODES = ((0, 1), (60, 1), (3, 1), (4, 1), (16, 1))
FIXED_CASES = {
    "small: rows of their own among 8": FixedCase(
        8, lora=LoraCase(((0, 1), (4, 1), (NO_ADAPTER, 1), (1, 1)), {0: 3, 1: 8, 4: 40})
    ),
    "small: rows of their own, all of 3": FixedCase(
        3, lora=LoraCase(((0, 1), (7, 1), (1, 1)), {0: 3, 1: 16}, affine=frozenset({1, 7}))
    ),
    "small: shared adapters among 16": FixedCase(16, lora=LoraCase(SHARED, {0: 3, 1: 20})),
    "small: shared adapters, scaled and shifted": FixedCase(
        10, lora=LoraCase(SHARED, {0: 3, 1: 20}, affine=frozenset({0}))
    ),
    "one adapter in more rows than a tile has": FixedCase(
        72, lora=LoraCase(((2, 1),) * 70, {2: 5})
    ),
    "small: decodes among 8": FixedCase(8, AttentionCase(DECODES)),
    "small: decodes, all of 5": FixedCase(5, AttentionCase(DECODES, sliding_window=5)),
    "small: decodes that are capped": FixedCase(8, AttentionCase(DECODES, softcap=2.0)),
    "many heads of one key head": FixedCase(8, AttentionCase(DECODES, num_kv_heads=1, group=20)),
    "decodes in parts": FixedCase(
        4, AttentionCase(((1100, 1), (511, 1), (512, 1)), block_size=16), max_context=1200
    ),
    "small: decodes in one part, where there may be more": FixedCase(
        8, AttentionCase(DECODES), max_context=1200
    ),
}


def batch_of(
    shape: tuple[tuple[int, int], ...],
    *,
    slots: list[int] | None = None,
    block_size: int = 4,
    device: torch.device = CPU,
) -> Batch:
    """`shape`: computed and new tokens of each sequence; their blocks lie scattered."""
    counts = [-(-(old + new) // block_size) for old, new in shape]
    free = [1 + block for block in torch.randperm(sum(counts)).tolist()]
    scheduled = []
    for index, ((old, new), count) in enumerate(zip(shape, counts, strict=True)):
        table = [free.pop() for _ in range(count)]
        sequence = Sequence.unowned(list(range(old + new)), block_table=table)
        sequence.num_computed_tokens = old
        sequence.slot = NO_ADAPTER if slots is None else slots[index]
        scheduled.append(ScheduledSequence(sequence, new, is_sampled=True))
    return build(scheduled, block_size=block_size, device=device)


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.cpu().float(), expected.cpu().float()
    assert bool(torch.isfinite(found).all()), "something was not written, or is not a number"
    size = float(expected.norm())
    return float((found - expected).norm()) / size if size else float(found.norm())


# LoRA

Pairs = dict[int, tuple[Tensor, Tensor]]


@dataclass(slots=True)
class Adapters:
    """All slots of one module in one memory, each part where a line begins."""

    lora: Pairs
    affine: Pairs
    features: tuple[int, int]
    weights: SlotWeights = field(init=False)

    def __post_init__(self) -> None:
        self.weights = SlotWeights([(1, 1), self.features], num_slots=8)

    def put(self, slot: int) -> None:
        in_features, out_features = self.features
        none = torch.empty(0, in_features), torch.empty(out_features, 0)
        lora_A, lora_B = self.lora.get(slot, none)
        parts = [lora_A, lora_B.T, *self.affine.get(slot, ())]
        starts = np.cumsum([64, *(-(-part.numel() // 64) * 64 for part in parts)])
        a_tensor = next(iter((*self.lora.values(), *self.affine.values())))[0]
        memory = torch.full((int(starts[-1]) + 64,), float("nan")).to(a_tensor)
        for start, part in zip(starts[:-1], parts, strict=True):
            memory[start : start + part.numel()] = part.flatten()
        is_affine = slot in self.affine
        layout = AdapterLayout(
            modules=np.array([1]),
            ranks=np.array([lora_A.shape[0]]),
            out_features=np.array([out_features]),
            starts_of_A=starts[:1],
            starts_of_B=starts[1:2],
            starts_of_gain=starts[2:3] if is_affine else np.array([NOWHERE]),
            starts_of_shift=starts[3:4] if is_affine else np.array([NOWHERE]),
        )
        self.weights.put(slot, memory, layout)


def adapters_of(
    ranks: dict[int, int],
    affine: frozenset[int],
    *,
    features: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Adapters:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype)

    in_features, out_features = features
    adapters = Adapters(
        {
            slot: (random(rank, in_features) / in_features**0.5, random(out_features, rank))
            for slot, rank in ranks.items()
        },
        {slot: (random(out_features), random(out_features)) for slot in affine},
        features,
    )
    for slot in {*ranks, *affine}:
        adapters.put(slot)
    return adapters


def on_cpu(pairs: Pairs) -> Pairs:
    return {slot: (one.float().cpu(), other.float().cpu()) for slot, (one, other) in pairs.items()}


def expected_lora(adapters: Adapters, out: Tensor, x: Tensor, token_slots: Tensor) -> Tensor:
    out, x = out.float().cpu(), x.float().cpu()
    found = reference.affine(out, on_cpu(adapters.affine), token_slots)
    if adapters.lora:
        found = found + reference.lora(x, on_cpu(adapters.lora), token_slots)
    return found


def lora_error(case: LoraCase, *, device: torch.device, dtype: torch.dtype) -> float:
    """Of rows with adapters and without; a row without one has to stay as it is, to the bit."""
    adapters = adapters_of(
        case.ranks, case.affine, features=case.features, device=device, dtype=dtype
    )
    batch = batch_of(
        tuple((0, number) for _, number in case.rows),
        slots=[slot for slot, _ in case.rows],
        device=device,
    )
    x, out = (torch.randn(batch.num_tokens, size).to(device, dtype) for size in case.features)
    token_slots = torch.tensor([slot for slot, number in case.rows for _ in range(number)])
    before, expected = out.clone(), expected_lora(adapters, out, x, token_slots)
    on_gpu(device).plan_lora(batch, adapters.weights).apply(out, x, module=1)
    is_base = (token_slots == NO_ADAPTER).to(device)
    assert torch.equal(out[is_base], before[is_base]), "a row of the base model was changed"
    return relative_error(out, expected)


# Attention


def memory_of(case: AttentionCase, batch: Batch, dtype: torch.dtype) -> DeviceMemory:
    """Two layers, of which the second is used; NaN wherever no sequence of the batch has been."""
    layer = LayerShape(case.num_kv_heads, case.key_dim, case.value_dim, dtype, None)
    memory = DeviceMemory(
        [layer, layer],
        num_blocks=int(batch.block_tables.max()),
        block_size=case.block_size,
        device=batch.block_tables.device,
    )
    for cache in (memory.keys[1], memory.values[1]):
        cache.fill_(float("nan"))
        for table, context in zip(batch.block_tables, batch.host_context_lens, strict=True):
            positions = torch.arange(context, device=table.device)
            blocks = table[positions // case.block_size]
            new = torch.randn(context, *cache.shape[2:]).to(cache)
            cache[blocks, positions % case.block_size] = new
    return memory


def states_of(case: AttentionCase, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key and value as models give them: heads before rows in memory."""
    heads = (case.num_kv_heads * case.group, case.num_kv_heads, case.num_kv_heads)
    dims = (case.key_dim, case.key_dim, case.value_dim)
    device = batch.block_tables.device
    return tuple(
        torch.randn(number, batch.num_tokens, dim).to(device, dtype).transpose(0, 1)
        for number, dim in zip(heads, dims, strict=True)
    )


def attend(
    kernels: Kernels,
    case: AttentionCase,
    batch: Batch,
    memory: DeviceMemory,
    states: tuple[Tensor, ...],
) -> Tensor:
    out = states[0].new_full((*states[0].shape[:2], case.value_dim), float("nan"))
    launch_attention(kernels.plan_attention(batch), case, memory, states, out)
    return out


def launch_attention(
    plan: AttentionPlan,
    case: AttentionCase,
    memory: DeviceMemory,
    states: tuple[Tensor, ...],
    out: Tensor,
) -> None:
    query, key, value = states
    plan.attend(
        query,
        key,
        value,
        key_cache=memory.keys[1],
        value_cache=memory.values[1],
        out=out,
        scaling=case.key_dim**-0.5,
        sliding_window=case.sliding_window,
        softcap=case.softcap,
    )


def attention_error(case: AttentionCase, *, device: torch.device, dtype: torch.dtype) -> float:
    batch = batch_of(case.shape, block_size=case.block_size, device=device)
    memory, states = memory_of(case, batch, dtype), states_of(case, batch, dtype)
    keys, values = memory.keys[1].clone(), memory.values[1].clone()
    found = attend(on_gpu(device), case, batch, memory, states)
    cache_rows = batch.cache_rows.cpu()
    for cache, written, new in (
        (keys, memory.keys[1], states[1]),
        (values, memory.values[1], states[2]),
    ):
        reference.write_kv(cache, new, cache_rows)
        assert torch.equal(cache.nan_to_num(7), written.nan_to_num(7)), "not where it belongs"
    return relative_error(found, expected_attention(case, batch, states[0], keys, values))


def expected_attention(
    case: AttentionCase, batch: Batch, query: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    return reference.paged_attention(
        query.float().cpu(),
        keys.float().cpu(),
        values.float().cpu(),
        block_tables=batch.block_tables.cpu(),
        query_starts=batch.query_starts,
        context_lens=batch.host_context_lens,
        scaling=case.key_dim**-0.5,
        sliding_window=case.sliding_window,
        softcap=case.softcap,
    )


# Fixed launches


def fixed_error(
    case: FixedCase, *, device: torch.device, dtype: torch.dtype, record: Record
) -> float:
    """What is recorded over rows of nobody, replayed over the case's; the others stay finite."""
    if case.lora is not None:
        return _fixed_lora_error(case, case.lora, device=device, dtype=dtype, record=record)
    assert case.attention is not None
    return _fixed_attention_error(case, case.attention, device=device, dtype=dtype, record=record)


def _fixed(
    case: FixedCase, batch: Batch, memory: DeviceMemory, weights: SlotWeights
) -> tuple[FixedPlans, Buffers]:
    fixed = on_gpu(memory.device).fixed
    assert fixed is not None
    buffers = Buffers(memory, max_num_seqs=case.size, max_context=case.max_context)
    plans = fixed.plan(
        buffers.batch_of(case.size),
        weights,
        kind=fixed.kind_of(batch),
        max_context=case.max_context,
        max_rank=case.max_rank,
    )
    assert plans.take(buffers.batch_of(case.size))
    return plans, buffers


def _fixed_lora_error(
    case: FixedCase, lora: LoraCase, *, device: torch.device, dtype: torch.dtype, record: Record
) -> float:
    adapters = adapters_of(
        lora.ranks, lora.affine, features=lora.features, device=device, dtype=dtype
    )
    slots = [slot for slot, _ in lora.rows]
    batch = batch_of(((0, 1),) * len(slots), slots=slots, device=device)
    memory = memory_of(AttentionCase(((0, 1),)), batch, dtype)
    x, out = (torch.randn(case.size, size).to(device, dtype) for size in lora.features)
    token_slots = torch.tensor(slots + [NO_ADAPTER] * (case.size - len(slots)))
    before, expected = out.clone(), expected_lora(adapters, out, x, token_slots)
    plans, _ = _fixed(case, batch, memory, adapters.weights)

    def compute() -> None:
        plan = plans.lora()
        assert plan is not None
        plan.apply(out, x, module=1)

    replay = record(compute)
    assert torch.equal(out, before), "rows of nobody were changed"
    assert plans.take(batch)
    replay()
    is_base = (token_slots == NO_ADAPTER).to(device)
    assert torch.equal(out[is_base], before[is_base]), "a row of the base model was changed"
    return relative_error(out, expected)


def _fixed_attention_error(
    case: FixedCase,
    attention: AttentionCase,
    *,
    device: torch.device,
    dtype: torch.dtype,
    record: Record,
) -> float:
    batch = batch_of(attention.shape, block_size=attention.block_size, device=device)
    memory = memory_of(attention, batch, dtype)
    num_rows = batch.num_tokens
    whole = batch_of(((0, 1),) * case.size, device=device)
    states = states_of(attention, whole, dtype)
    keys, values = memory.keys[1].clone(), memory.values[1].clone()
    plans, buffers = _fixed(case, batch, memory, SlotWeights([], num_slots=1))
    out = states[0].new_full((*states[0].shape[:2], attention.value_dim), float("nan"))
    replay = record(lambda: launch_attention(plans.attention(), attention, memory, states, out))
    assert plans.take(batch)
    buffers.take(batch, size=case.size)
    out.fill_(float("nan"))
    replay()
    cache_rows = batch.cache_rows.cpu()
    for cache, written, new in (
        (keys, memory.keys[1], states[1]),
        (values, memory.values[1], states[2]),
    ):
        reference.write_kv(cache, new[:num_rows], cache_rows)
        own, found = cache[: memory.scratch_block], written[: memory.scratch_block]
        assert torch.equal(own.nan_to_num(7), found.nan_to_num(7)), "not where it belongs"
    assert bool(torch.isfinite(out).all()), "rows of nobody are no numbers"
    query = states[0][:num_rows]
    return relative_error(out[:num_rows], expected_attention(attention, batch, query, keys, values))


# Rows


def row_error(case: RowCase, *, device: torch.device, dtype: torch.dtype) -> float:
    kernels = on_gpu(device).rows
    assert kernels is not None
    found, expected = _ROWS[type(case)](case, kernels, Drawn(device, dtype))
    return max(relative_error(*pair) for pair in zip(found, expected, strict=True))


@dataclass(frozen=True, slots=True)
class Drawn:
    device: torch.device
    dtype: torch.dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.device, self.dtype)


Results = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


def normed(case: NormCase, kernels: RowKernels, draw: Drawn) -> Results:
    x, residual = (draw(1, case.num_rows, case.num_columns) for _ in range(2))
    weight, settings = draw(case.num_columns), {"eps": 1e-5, "offset": case.offset}
    if not case.has_residual:
        found = kernels.rms_norm(x, weight, **settings)
        return (found,), (reference.rms_norm(x.float(), weight, **settings),)
    sums = (x.float() + residual.float()).to(x.dtype)
    found = kernels.add_rms_norm(x, residual, weight, **settings)
    return found, (sums, reference.rms_norm(sums.float(), weight, **settings))


def rotated(case: RotationCase, kernels: RowKernels, draw: Drawn) -> Results:
    heads = (case.num_heads, case.num_kv_heads)
    query, key = (draw(number, case.num_tokens, case.head_dim).transpose(0, 1) for number in heads)
    cos, sin = (draw(case.num_tokens, case.num_dims) for _ in range(2))
    expected = tuple(reference.rotate(x.float(), cos, sin) for x in (query, key))
    return kernels.rotate(query, key, cos, sin), expected


def gated(case: GateCase, kernels: RowKernels, draw: Drawn) -> Results:
    whole = draw(case.num_rows, 2 * case.num_columns)
    gate, up = whole.chunk(2, dim=1)
    if not case.is_one:
        gate, up = gate.contiguous(), up.contiguous()
    return (kernels.silu_mul(gate, up),), (reference.silu_mul(gate.float(), up.float()),)


_ROWS: dict[type[Any], Callable[..., Results]] = {
    NormCase: normed,
    RotationCase: rotated,
    GateCase: gated,
}
