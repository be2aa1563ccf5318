"""How fast a step could be: what this machine's memory and arithmetic allow.

    python -m benchmarks.roofline [--device cpu] [--dtype float32]

Measures the rate at which memory is read and the best rate of a large matrix product, then divides
a step's bytes and operations by them. A floor is the larger of the two times: it assumes that both
overlap completely and that nothing else costs anything, so no engine reaches it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

NUM_ROUNDS = 7
# Far more than any cache holds.
READ_BYTES = 1 << 29
GEMM_SIZE = {"cpu": 1536, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured."""

    device: str
    dtype: str
    num_threads: int
    read_bytes_per_s: float
    operations_per_s: float


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step cannot do without."""

    # Weights, adapters and cached positions that it must read once.
    num_bytes: int
    # A multiplication and an addition are two.
    num_operations: int


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Medians of several rounds."""
    return Machine(
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        num_threads=torch.get_num_threads(),
        read_bytes_per_s=READ_BYTES / _median_s(_read(device, dtype), device),
        operations_per_s=2 * GEMM_SIZE[device.type] ** 3 / _median_s(_gemm(device, dtype), device),
    )


def floor_s(work: StepWork, machine: Machine) -> float:
    return max(
        work.num_bytes / machine.read_bytes_per_s,
        work.num_operations / machine.operations_per_s,
    )


def _read(device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    numbers = torch.ones(READ_BYTES // dtype.itemsize, dtype=dtype, device=device)
    return numbers.max


def _gemm(device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    size = GEMM_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def _median_s(operation: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(NUM_ROUNDS + 1):
        started_s = time.perf_counter()
        operation()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started_s)
    # The first one pays for memory and set-up.
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what this machine allows.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="default: float32 on CPU, bfloat16 on CUDA")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = arguments.dtype or {"cpu": "float32", "cuda": "bfloat16"}[device.type]
    print(json.dumps(asdict(measure(device, getattr(torch, name))), indent=2))


if __name__ == "__main__":
    main()
