"""What CPUs compute of a layer in loops of ours equals its definition, and keeps rows apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.batch import Batch, build
from engine.kernels import cpu_rows, reference
from engine.kernels.cpu_attention import CompiledAttention
from engine.kernels.cpu_layers import CompiledLayer
from engine.kernels.cpu_lora import CompiledLora
from engine.kernels.cpu_stack import CompiledLayers
from engine.kernels.dense import DenseAttention
from engine.kernels.layer_parts import LayerCall, LayerParts, Norm, Product
from engine.kernels.products import linear
from engine.kernels.quantised import Format
from engine.kernels.quantised_cpu import FORMATS
from engine.kernels.slot_weights import NOWHERE, AdapterLayout, SlotWeights
from engine.scheduler import ScheduledSequence
from engine.sequence import NO_ADAPTER, Sequence

WIDTH, INNER_WIDTH, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS = 64, 96, 16, 4, 1
SHAPES = {
    "query": (NUM_HEADS * HEAD_DIM, WIDTH),
    "key": (NUM_KV_HEADS * HEAD_DIM, WIDTH),
    "value": (NUM_KV_HEADS * HEAD_DIM, WIDTH),
    "after": (WIDTH, NUM_HEADS * HEAD_DIM),
    "gate": (INNER_WIDTH, WIDTH),
    "up": (INNER_WIDTH, WIDTH),
    "down": (WIDTH, INNER_WIDTH),
}
# Slot 2 leaves every other module as it is.
RANKS = {0: 3, 1: 16, 2: 9}


# Products and rows


@given(
    num_rows=st.integers(1, 15),
    in_features=st.integers(1, 9).map(lambda n: 16 * n),
    out_features=st.integers(1, 70),
    has_bias=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_a_product_is_what_torch_says_and_a_row_gives_the_same_whoever_is_beside_it(
    num_rows: int, in_features: int, out_features: int, has_bias: bool
) -> None:
    x, weight = torch.randn(num_rows, in_features), torch.randn(out_features, in_features)
    bias = torch.randn(out_features) if has_bias else None
    found = linear(x, weight, bias)
    torch.testing.assert_close(
        found, torch.nn.functional.linear(x, weight, bias), atol=1e-4, rtol=1e-5
    )
    alone = [linear(row[None], weight, bias)[0] for row in x]
    assert torch.equal(found, torch.stack(alone))


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("shape", [(300, 576, 100), (64, 1536, 53), (81, 1024, 4)])
def test_rows_that_are_multiplied_in_groups_are_what_each_is_alone(
    shape: tuple[int, int, int], num_threads: int
) -> None:
    """More of them than stay near a core at once."""
    num_rows, in_features, out_features = shape
    x, weight = torch.randn(num_rows, in_features), torch.randn(out_features, in_features)
    with threads(num_threads):
        found = linear(x, weight, None)
        alone = [linear(row[None], weight, None)[0] for row in x]
    expected = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)
    assert torch.equal(found, torch.stack(alone))


@contextmanager
def threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [2, 3, 7])
@pytest.mark.parametrize("num_rows", [5, 40])
def test_threads_that_help_each_other_leave_no_column_out(num_rows: int, num_threads: int) -> None:
    """More of them than there are cores, so that some come late to every product."""
    x, weight, bias = torch.randn(num_rows, 64), torch.randn(1000, 64), torch.randn(1000)
    with threads(1):
        expected = linear(x, weight, bias)
    with threads(num_threads):
        for _ in range(20):
            assert torch.equal(linear(x, weight, bias), expected)


def test_a_product_that_the_loops_cannot_take_is_refused() -> None:
    with pytest.raises(AssertionError, match="whole vectors"):
        linear(torch.randn(2, 20), torch.randn(4, 20), None)


def test_rows_are_normed_turned_and_gated_as_defined() -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, 33), torch.randn(5, 33), torch.randn(33)
    settings = {"eps": 1e-5, "offset": 1.0}
    expected = reference.rms_norm(x + residual, weight, **settings)
    total, normed = cpu_rows.add_rms_norm(x, residual, weight, **settings)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, expected)
    torch.testing.assert_close(cpu_rows.rms_norm(total, weight, **settings), expected)
    # Heads before rows in memory, and a part that is not turned.
    query, key = (torch.randn(heads, 5, 24).transpose(0, 1) for heads in (4, 2))
    cos, sin = torch.randn(5, 16), torch.randn(5, 16)
    for found, states in zip(cpu_rows.rotate(query, key, cos, sin), (query, key), strict=True):
        torch.testing.assert_close(found, reference.rotate(states, cos, sin))
    gate, up = torch.randn(5, 80).chunk(2, dim=1)
    torch.testing.assert_close(cpu_rows.silu_mul(gate, up), reference.silu_mul(gate, up))


def test_a_gate_is_right_as_far_as_floats_reach_and_nan_stays_nan() -> None:
    gate = torch.tensor([[-1e30, -100.0, -87.5, -20.0, -1e-6, 0.0, 1e-6, 20.0, 89.0, 1e30]])
    up = torch.full_like(gate, 2.0)
    torch.testing.assert_close(cpu_rows.silu_mul(gate, up), reference.silu_mul(gate, up))
    gate = torch.tensor([[1.0, torch.nan, 2.0] * 9])
    assert torch.equal(cpu_rows.silu_mul(gate, gate).isnan(), gate.isnan())


# Layers


@dataclass(frozen=True, slots=True)
class Layer:
    parts: LayerParts
    weights: SlotWeights
    # By slot, then by product: lora_A and lora_B [out_features, rank]
    adapters: dict[int, dict[str, tuple[Tensor, Tensor]]]


def random_layer(
    form: Format | None = None, *, seed: int = 0, weights: SlotWeights | None = None
) -> Layer:
    """`weights`: where its adapters are put, in place of another layer's."""
    torch.manual_seed(seed)
    weights = weights or SlotWeights([shape[::-1] for shape in SHAPES.values()], num_slots=4)
    adapters = {slot: put_adapter(weights, slot, rank) for slot, rank in RANKS.items()}
    products = {
        name: random_product(shape, module, form)
        for module, (name, shape) in enumerate(SHAPES.items())
    }
    norms = Norm(torch.randn(WIDTH), 1e-5, 0.0), Norm(torch.randn(WIDTH), 1e-5, 1.0)
    return Layer(
        LayerParts(norms, **products, head_dim=HEAD_DIM, weights=weights), weights, adapters
    )


def random_product(shape: tuple[int, int], module: int, form: Format | None) -> Product:
    weight, bias = torch.randn(shape) / 8, torch.randn(shape[0])
    if form is None:
        return Product(weight, bias, module, in_features=shape[1])
    codes, scales = form.codes_of(weight)
    return Product(codes, bias, module, in_features=shape[1], format=form.name, scales=scales)


def put_adapter(weights: SlotWeights, slot: int, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    every = 2 if slot == 2 else 1
    modules = {name: index for index, name in enumerate(SHAPES) if index % every == 0}
    pairs = {
        name: (torch.randn(rank, SHAPES[name][1]) / 8, torch.randn(SHAPES[name][0], rank) / 8)
        for name in modules
    }
    flat = [part.flatten() for lora_A, lora_B in pairs.values() for part in (lora_A, lora_B.T)]
    starts = np.cumsum([0, *(len(part) for part in flat)])
    nowhere = np.full(len(modules), NOWHERE)
    layout = AdapterLayout(
        modules=np.array(list(modules.values())),
        ranks=np.full(len(modules), rank),
        out_features=np.array([SHAPES[name][0] for name in modules]),
        starts_of_A=starts[:-1:2],
        starts_of_B=starts[1::2],
        starts_of_gain=nowhere,
        starts_of_shift=nowhere,
    )
    weights.put(slot, torch.cat(flat), layout)
    return pairs


def batch_of(slots: list[tuple[int, int]]) -> Batch:
    """`slots`: slot and number of rows of each sequence, single rows first."""
    scheduled = []
    for slot, num_rows in slots:
        sequence = Sequence.unowned(list(range(num_rows)), block_table=[1] * num_rows)
        sequence.slot = slot
        scheduled.append(ScheduledSequence(sequence, num_rows, is_sampled=True))
    return build(scheduled, block_size=1, device=torch.device("cpu"))


def computed(
    layer: Layer,
    x: Tensor,
    angles: Tensor,
    slots: list[tuple[int, int]],
    made: CompiledLayer | None = None,
) -> Tensor:
    """With the query in place of what attention gives; `made`: of the layer, to be used again."""
    made = made or CompiledLayers().layer(layer.parts)
    batch = batch_of(slots)
    adapters = CompiledLora(batch, layer.weights) if len(batch.slot_runs) else None
    query, key, value = made.enter(x, angles.cos(), angles.sin(), adapters=adapters)
    attended = query + key + value
    return made.leave(attended, x, adapters=adapters)


def defined(layer: Layer, x: Tensor, angles: Tensor, slots: list[tuple[int, int]]) -> Tensor:
    parts, token_slots = layer.parts, torch.tensor([s for s, n in slots for _ in range(n)])

    def product(name: str, rows: Tensor) -> Tensor:
        one: Product = getattr(parts, name)
        pairs = {slot: own[name] for slot, own in layer.adapters.items() if name in own}
        if one.format is None:
            out = rows @ one.weight.T
        else:
            assert one.scales is not None
            form = FORMATS[one.format]
            own = rows if form.rounded is None else form.rounded(rows)
            out = own @ form.decode(one.weight, one.scales).T
        return out + one.bias + reference.lora(rows, pairs, token_slots)

    def normed(rows: Tensor, norm: Norm) -> Tensor:
        return reference.rms_norm(rows, norm.weight, eps=norm.eps, offset=norm.offset)

    rows = normed(x, parts.norms[0])
    states = [product(name, rows).view(len(x), -1, HEAD_DIM) for name in ("query", "key", "value")]
    query, key = (reference.rotate(each, angles.cos(), angles.sin()) for each in states[:2])
    total = x + product("after", (query + key + states[2]).flatten(1))
    rows = normed(total, parts.norms[1])
    gated = reference.silu_mul(product("gate", rows), product("up", rows))
    return total + product("down", gated)


BATCHES = [
    [(NO_ADAPTER, 1)],
    [(1, 1)],
    [(0, 1), (1, 1), (NO_ADAPTER, 1), (2, 1), (0, 1), (3, 1)],
    [(1, 1)] * 9 + [(0, 40), (NO_ADAPTER, 7), (2, 13)],
]


@pytest.mark.parametrize("slots", BATCHES)
def test_a_layer_in_loops_is_what_its_parts_say_adapters_included(
    slots: list[tuple[int, int]],
) -> None:
    """Slot 3 holds nothing."""
    layer = random_layer()
    num_rows = sum(n for _, n in slots)
    x, angles = torch.randn(num_rows, WIDTH), torch.randn(num_rows, HEAD_DIM)
    expected = defined(layer, x, angles, slots)
    torch.testing.assert_close(computed(layer, x, angles, slots), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slots", BATCHES)
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_layer_of_few_bits_is_what_its_parts_say(
    form: Format, slots: list[tuple[int, int]]
) -> None:
    layer = random_layer(form)
    num_rows = sum(n for _, n in slots)
    x, angles = torch.randn(num_rows, WIDTH), torch.randn(num_rows, HEAD_DIM)
    found, expected = (each(layer, x, angles, slots) for each in (computed, defined))
    # Where rows are rounded, what float32's last bit decides may become another code.
    bound = 1e-5 if form.rounded is None else 5e-3
    error = torch.linalg.vector_norm(found - expected, dim=1)
    assert bool((error <= bound * torch.linalg.vector_norm(expected, dim=1)).all())


@pytest.mark.parametrize("form", [None, *FORMATS.values()], ids=["whole", *FORMATS])
def test_a_row_of_a_layer_gives_bit_for_bit_what_it_gives_alone(form: Format | None) -> None:
    layer = random_layer(form)
    slots = [(slot, 1) for slot in (0, 1, NO_ADAPTER, 2, 0, 1, 1)]
    x, angles = torch.randn(len(slots), WIDTH), torch.randn(len(slots), HEAD_DIM)
    together = computed(layer, x, angles, slots)
    for row, slot in enumerate(slots):
        own = slice(row, row + 1)
        assert torch.equal(computed(layer, x[own], angles[own], [slot]), together[own])


@pytest.mark.parametrize("num_threads", [2, 5])
@pytest.mark.parametrize("form", [None, *FORMATS.values()], ids=["whole", *FORMATS])
@pytest.mark.parametrize("slots", BATCHES[2:])
def test_a_layer_gives_the_same_whoever_of_the_threads_is_late(
    slots: list[tuple[int, int]], form: Format | None, num_threads: int
) -> None:
    """With adapters and without, one after the other in the same layer."""
    layer = random_layer(form)
    num_rows = sum(n for _, n in slots)
    x, angles = torch.randn(num_rows, WIDTH), torch.randn(num_rows, HEAD_DIM)
    batches = [slots, [(NO_ADAPTER, n) for _, n in slots]]
    made = CompiledLayers().layer(layer.parts)
    with threads(1):
        expected = [computed(layer, x, angles, each, made) for each in batches]
    with threads(num_threads):
        for _ in range(10):
            for batch, own in zip(batches, expected, strict=True):
                assert torch.equal(computed(layer, x, angles, batch, made), own)


def test_a_layer_whose_rows_are_no_whole_vectors_is_not_made() -> None:
    layer = random_layer()
    odd = Product(torch.randn(WIDTH, 20), None, None, in_features=20)
    parts = {name: getattr(layer.parts, name) for name in SHAPES} | {"down": odd}
    with pytest.raises(AssertionError):
        CompiledLayers().layer(
            LayerParts(layer.parts.norms, **parts, head_dim=HEAD_DIM, weights=None)
        )


# Layers at once


def decoded(
    layers: list[Layer],
    calls: list[LayerCall],
    slots: list[int],
    *,
    at_once: bool,
    prompt: int = 1,
) -> list[Tensor]:
    """What comes out of the last layer in each of a few steps, every row a sequence of its own.

    `prompt`: how many new tokens the last sequence has in each of them.
    """
    torch.manual_seed(1)
    kernels = CompiledLayers()
    made = [kernels.layer(layer.parts) for layer in layers]
    stack = kernels.stack(made)
    num_blocks = 1 + len(slots) * NUM_STEPS * prompt
    keys, values = (
        [torch.zeros(num_blocks, 1, NUM_KV_HEADS, HEAD_DIM) for _ in calls] for _ in range(2)
    )
    found = []
    for step in range(NUM_STEPS):
        batch = decoding(slots, num_before=step, prompt=prompt)
        plan = CompiledAttention(batch)
        # All layers have the same adapters.
        adapters = CompiledLora(batch, layers[0].weights) if len(batch.slot_runs) else None
        x = torch.randn(batch.num_tokens, WIDTH)
        angles = torch.randn(batch.num_tokens, HEAD_DIM)
        if at_once:
            assert stack.serves(plan)
            positions = angles.cos(), angles.sin()
            x = stack.run(
                x,
                *positions,
                plan=plan,
                calls=calls,
                keys=keys,
                values=values,
                adapters=adapters,
            )
        else:
            for own, call in zip(made, calls, strict=True):
                states = own.enter(x, angles.cos(), angles.sin(), adapters=adapters)
                attended = torch.empty_like(states[0])
                plan.attend(
                    *states,
                    key_cache=keys[call.layer],
                    value_cache=values[call.layer],
                    out=attended,
                    scaling=call.scaling,
                    sliding_window=call.sliding_window,
                    softcap=call.softcap,
                )
                x = own.leave(attended, x, adapters=adapters)
        found.append(x)
    return found


def decoding(slots: list[int], *, num_before: int, prompt: int) -> Batch:
    """A new token of each sequence, `prompt` ones of the last, in blocks of one token."""
    scheduled = []
    for number, slot in enumerate(slots):
        num_new = prompt if number == len(slots) - 1 else 1
        end = (num_before + 1) * num_new
        table = [1 + number * NUM_STEPS + place for place in range(end)]
        sequence = Sequence.unowned(list(range(end)), block_table=table)
        sequence.slot, sequence.num_computed_tokens = slot, num_before * num_new
        scheduled.append(ScheduledSequence(sequence, num_new, is_sampled=True))
    return build(scheduled, block_size=1, device=torch.device("cpu"))


NUM_STEPS = 5
# The places of layers among the caches need not be their order.
CALLS = [
    LayerCall(layer=1, scaling=0.25, sliding_window=None, softcap=None),
    LayerCall(layer=0, scaling=0.5, sliding_window=3, softcap=None),
    LayerCall(layer=2, scaling=0.25, sliding_window=None, softcap=5.0),
]


@pytest.mark.parametrize("form", [None, *FORMATS.values()], ids=["whole", *FORMATS])
@pytest.mark.parametrize(
    ("slots", "prompt"),
    [
        ([NO_ADAPTER], 1),
        ([1], 1),
        ([0, 1, 1, NO_ADAPTER, 2], 1),
        ([NO_ADAPTER] * 3, 1),
        ([0, 1, 2, NO_ADAPTER] * 5, 1),
        ([NO_ADAPTER], 9),
        ([0, NO_ADAPTER, 1], 40),
    ],
)
def test_layers_at_once_give_bit_for_bit_what_they_give_one_by_one(
    slots: list[int], prompt: int, form: Format | None
) -> None:
    weights = random_layer().weights
    layers = [random_layer(form, seed=seed, weights=weights) for seed in range(3)]
    with threads(1):
        by_itself = decoded(layers, CALLS, slots, at_once=False, prompt=prompt)
    with threads(3):
        at_once = decoded(layers, CALLS, slots, at_once=True, prompt=prompt)
    for found, expected in zip(at_once, by_itself, strict=True):
        assert torch.equal(found, expected)


def test_what_is_planned_by_others_is_not_for_all_layers_at_once() -> None:
    kernels = CompiledLayers()
    stack = kernels.stack([kernels.layer(random_layer().parts)] * 3)
    batch = batch_of([(NO_ADAPTER, 1), (NO_ADAPTER, 4)])
    assert stack.serves(CompiledAttention(batch))
    assert not stack.serves(DenseAttention(batch))
