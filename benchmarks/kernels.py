"""How near the kernels for GPUs come to what the GPU's memory and arithmetic allow.

    python -m benchmarks.kernels [--output FILE]

Each line is one kernel at a shape of Llama-3.1-8B in bfloat16: the bytes that it must move (every
input read once, every output written once), its operations, the time that the measured rates of a
large copy and of a large matrix product allow (the larger of the two), and the time that it took.
Every kernel runs over as many layers' data as no cache holds, captured in one graph, so that no
launch is waited for; the median of several replays counts. Without a CUDA device the bytes and
operations are printed and nothing is measured: no time of a CPU says anything about these kernels.
"""

import argparse
import functools
import json
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from benchmarks.roofline import Machine, StepWork, floor_s, measure
from engine.batch import Batch, build
from engine.kernels import gpu_rows
from engine.kernels.choice import LoraPlan, on_gpu
from engine.kernels.slot_weights import NOWHERE, AdapterLayout, SlotWeights
from engine.model.memory import DeviceMemory, LayerShape
from engine.scheduler import ScheduledSequence
from engine.sequence import NO_ADAPTER, Sequence

DTYPE, SIZE = torch.bfloat16, 2
COPY_BYTES = 1 << 31
NUM_ROUNDS = 25
# Layers whose data together are larger than a GPU's caches.
NUM_LAYERS = 4
HIDDEN, KEYS, WIDE = 4096, 1024, 14336
# in_features and out_features of the modules that read one input
INPUTS = {
    "q, k, v": [(HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS)],
    "o": [(HIDDEN, HIDDEN)],
    "gate, up": [(HIDDEN, WIDE), (HIDDEN, WIDE)],
    "down": [(WIDE, HIDDEN)],
}
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    # Of one layer
    work: StepWork
    # Makes the data on the device; what it gives runs one layer.
    make: Callable[[torch.device], Callable[[int], None]]


# LoRA


def lora_cases() -> Iterator[Case]:
    """Rows of each slot, one entry for each sequence."""
    mixes = {
        "64 rows, 64 adapters": [(slot, 1) for slot in range(64)],
        "64 rows, 8 adapters": [(row % 8, 1) for row in range(64)],
        "64 rows, 1 adapter": [(0, 1)] * 64,
        "2048 rows, 4 adapters": [(slot, 512) for slot in range(4)],
    }
    for mix, rows in mixes.items():
        for rank in (8, 16, 64):
            for inputs, features in INPUTS.items():
                name = f"LoRA of {inputs}: {mix} of rank {rank}"
                yield Case(name, lora_work(rows, features, rank), lora(rows, features, rank))


def lora_work(rows: list[tuple[int, int]], features: list[tuple[int, int]], rank: int) -> StepWork:
    num_rows, num_adapters = sum(n for _, n in rows), len({slot for slot, _ in rows})
    num_weights = sum(rank * (i + o) for i, o in features)
    # The input once, each output read and written.
    num_states = num_rows * (features[0][0] + 2 * sum(o for _, o in features))
    return StepWork(
        num_bytes=SIZE * (num_adapters * num_weights + num_states),
        num_operations=2 * num_rows * num_weights,
    )


def lora(
    rows: list[tuple[int, int]], features: list[tuple[int, int]], rank: int
) -> Callable[[torch.device], Callable[[int], None]]:
    def make(device: torch.device) -> Callable[[int], None]:
        weights = random_slots({slot for slot, _ in rows}, features, rank, device)
        batch = batch_of([(0, n) for _, n in rows], [slot for slot, _ in rows], device)
        kernels = on_gpu(device)
        xs = [random(device, batch.num_tokens, features[0][0]) for _ in range(NUM_LAYERS)]
        outs = [[random(device, batch.num_tokens, o) for _, o in features] for _ in xs]

        def run(plan: LoraPlan, layer: int) -> None:
            for place, out in enumerate(outs[layer]):
                plan.apply(out, xs[layer], module=layer * len(features) + place)

        # A first step, from which it is known who reads what together.
        first = kernels.plan_lora(batch, weights)
        for layer in range(NUM_LAYERS):
            run(first, layer)
        return functools.partial(run, kernels.plan_lora(batch, weights))

    return make


def random_slots(
    slots: set[int], features: list[tuple[int, int]], rank: int, device: torch.device
) -> SlotWeights:
    modules = features * NUM_LAYERS
    weights = SlotWeights(modules, num_slots=len(slots))
    sizes = np.array([[rank * i, rank * o] for i, o in modules])
    starts = (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)
    nowhere = np.full(len(modules), NOWHERE)
    layout = AdapterLayout(
        modules=np.arange(len(modules)),
        ranks=np.full(len(modules), rank),
        out_features=np.array([o for _, o in modules]),
        starts_of_A=starts[:, 0],
        starts_of_B=starts[:, 1],
        starts_of_gain=nowhere,
        starts_of_shift=nowhere,
    )
    for slot in slots:
        # Small, for the same outputs are added to in every round.
        weights.put(slot, random(device, int(sizes.sum())) * 1e-3, layout)
    return weights


# Attention


def attention_cases() -> Iterator[Case]:
    """Computed and new tokens of each sequence."""
    mixes = {
        "64 sequences decode at 1024": [(1023, 1)] * 64,
        "64 sequences decode at 128 to 4096": [(128 * (n % 32 + 1) - 1, 1) for n in range(64)],
        "8 sequences decode at 8192": [(8191, 1)] * 8,
        "1 sequence decodes at 32768": [(32767, 1)],
        "a prompt of 2048": [(0, 2048)],
        "512 more of a prompt of 8192": [(7680, 512)],
        "32 sequences decode at 1024 beside a prompt of 1024": [(1023, 1)] * 32 + [(0, 1024)],
    }
    for name, shape in mixes.items():
        yield Case(f"attention: {name}", attention_work(shape), attention(shape))


def attention_work(shape: list[tuple[int, int]]) -> StepWork:
    cached = sum(old + new for old, new in shape) * NUM_KV_HEADS
    new_rows = sum(new for _, new in shape)
    # Each query meets all positions up to its own, for scores and for values.
    pairs = sum(new * old + new * (new + 1) // 2 for old, new in shape)
    return StepWork(
        # Query and output; keys and values that are read; new ones, read and written.
        num_bytes=SIZE * HEAD_DIM * (2 * new_rows * (NUM_HEADS + 2 * NUM_KV_HEADS) + 2 * cached),
        num_operations=4 * pairs * NUM_HEADS * HEAD_DIM,
    )


def attention(shape: list[tuple[int, int]]) -> Callable[[torch.device], Callable[[int], None]]:
    def make(device: torch.device) -> Callable[[int], None]:
        batch = batch_of(shape, [NO_ADAPTER] * len(shape), device)
        layer = LayerShape(NUM_KV_HEADS, HEAD_DIM, HEAD_DIM, DTYPE, None)
        memory = DeviceMemory(
            [layer] * NUM_LAYERS,
            num_blocks=int(batch.block_tables.max()),
            block_size=BLOCK_SIZE,
            device=device,
        )
        for cache in (*memory.keys, *memory.values):
            cache.normal_()
        query, key, value = (
            random(device, batch.num_tokens, heads, HEAD_DIM)
            for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
        )
        out, plan = torch.empty_like(query), on_gpu(device).plan_attention(batch)

        def run(layer: int) -> None:
            plan.attend(
                query,
                key,
                value,
                key_cache=memory.keys[layer],
                value_cache=memory.values[layer],
                out=out,
                scaling=HEAD_DIM**-0.5,
                sliding_window=None,
                softcap=None,
            )

        return run

    return make


# Rows


def row_cases() -> Iterator[Case]:
    """What a layer does to a decode step's rows between its GEMMs, and to a prompt's."""
    for num_rows in (64, 2048):
        own = num_rows * HIDDEN
        heads = num_rows * (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM
        angles, wide = 2 * num_rows * HEAD_DIM, num_rows * WIDE
        # A sum and its norm: two inputs, two outputs, the weight.
        norm = StepWork(num_bytes=SIZE * (4 * own + HIDDEN), num_operations=5 * own)
        yield Case(f"norm of a sum: {num_rows} rows", norm, norms(num_rows))
        rope = StepWork(num_bytes=SIZE * (2 * heads + angles), num_operations=3 * heads)
        yield Case(f"RoPE: {num_rows} rows", rope, rotations(num_rows))
        gate = StepWork(num_bytes=SIZE * 3 * wide, num_operations=5 * wide)
        yield Case(f"gate: {num_rows} rows", gate, gates(num_rows))


def norms(num_rows: int) -> Callable[[torch.device], Callable[[int], None]]:
    def make(device: torch.device) -> Callable[[int], None]:
        layers = [random(device, 2, num_rows, HIDDEN) for _ in range(NUM_LAYERS)]
        weight = random(device, HIDDEN)

        def run(layer: int) -> None:
            gpu_rows.add_rms_norm(*layers[layer], weight, eps=1e-5, offset=0.0)

        return run

    return make


def rotations(num_rows: int) -> Callable[[torch.device], Callable[[int], None]]:
    def make(device: torch.device) -> Callable[[int], None]:
        heads = (NUM_HEADS, NUM_KV_HEADS)
        layers = [
            [random(device, num_rows, number, HEAD_DIM) for number in heads]
            for _ in range(NUM_LAYERS)
        ]
        cos, sin = random(device, 2, num_rows, HEAD_DIM)

        def run(layer: int) -> None:
            gpu_rows.rotate(*layers[layer], cos, sin)

        return run

    return make


def gates(num_rows: int) -> Callable[[torch.device], Callable[[int], None]]:
    def make(device: torch.device) -> Callable[[int], None]:
        layers = [random(device, 2, num_rows, WIDE) for _ in range(NUM_LAYERS)]

        def run(layer: int) -> None:
            gpu_rows.silu_mul(*layers[layer])

        return run

    return make


# What is common


def random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, device=device)


def batch_of(shape: list[tuple[int, int]], slots: list[int], device: torch.device) -> Batch:
    """Blocks lie scattered."""
    counts = [-(-(old + new) // BLOCK_SIZE) for old, new in shape]
    free = [1 + block for block in torch.randperm(sum(counts)).tolist()]
    scheduled = []
    for (old, new), slot, count in zip(shape, slots, counts, strict=True):
        table = [free.pop() for _ in range(count)]
        sequence = Sequence.unowned([0] * (old + new), block_table=table)
        sequence.num_computed_tokens, sequence.slot = old, slot
        scheduled.append(ScheduledSequence(sequence, new, is_sampled=True))
    return build(scheduled, block_size=BLOCK_SIZE, device=device)


def median_s(run: Callable[[], None]) -> float:
    """Of a replay of what `run` launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
    torch.cuda.synchronize()
    times = []
    for _ in range(NUM_ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bytes_per_s(device: torch.device) -> float:
    """Read and written bytes of a large copy, both counted."""
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * COPY_BYTES / median_s(copy)


def measure_machine(device: torch.device) -> Machine:
    """As `benchmarks.roofline`, with the rate of a copy in place of that of a reader."""
    read = asdict(measure(device, DTYPE))
    return Machine(**(read | {"read_bytes_per_s": copy_bytes_per_s(device)}))


def row_of(case: Case, machine: Machine | None, device: torch.device) -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": case.name, **asdict(case.work)}
    if machine is None:
        return row
    run = case.make(device)

    def layers() -> None:
        for layer in range(NUM_LAYERS):
            run(layer)

    taken, floor = median_s(layers) / NUM_LAYERS, floor_s(case.work, machine)
    return row | {
        "floor_us": 1e6 * floor,
        "median_us": 1e6 * taken,
        "share_of_floor": floor / taken,
        "share_of_copy_bandwidth": case.work.num_bytes / taken / machine.read_bytes_per_s,
    }


def show(row: dict[str, Any]) -> None:
    told = f"{row['num_bytes'] / 1e6:9.2f} MB {row['num_operations'] / 1e9:9.2f} GFLOP"
    if "median_us" in row:
        told += f"  floor {row['floor_us']:8.1f} us  took {row['median_us']:8.1f} us"
        told += f"  {row['share_of_floor']:5.2f} of the floor"
    print(f"{row['kernel']:<78} {told}", flush=True)


def commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the kernels for GPUs.")
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    machine = measure_machine(device) if has_gpu else None
    rows = []
    for case in (*lora_cases(), *attention_cases(), *row_cases()):
        rows.append(row_of(case, machine, device))
        show(rows[-1])
    if machine is None:
        print("There is no CUDA device here: floors and times are not measured.")
    report = {
        "command": "python -m benchmarks.kernels",
        "commit": commit(),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "machine": None if machine is None else asdict(machine),
        "layers": NUM_LAYERS,
        "rows": rows,
    }
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
