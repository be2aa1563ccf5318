"""Compile the kernels for a GPU that is not there, and tell what they would take of it.

    TRITON_INTERPRET=0 python -m tests.gpu_compiler [--arch 90] [--dtype bfloat16] [NAME ...]

NAME: parts of names of configurations in `tests/gpu_lab.py`; "8B" are shapes of Llama-3.1-8B. One
JSON line for each kernel that a configuration launches. Nothing runs: a CPU's tensors stand for a
GPU's.
"""

import argparse
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from engine.kernels.choice import on_gpu
from tests.gpu_lab import (
    ATTENTION_CASES,
    CPU,
    LORA_CASES,
    ROW_CASES,
    AttentionCase,
    GateCase,
    LoraCase,
    NormCase,
    RotationCase,
    RowCase,
    adapters_of,
    attend,
    batch_of,
    memory_of,
    row_error,
    states_of,
)

HEADS = {"num_kv_heads": 8, "group": 4, "key_dim": 128, "value_dim": 128, "block_size": 16}
LORAS = LORA_CASES | {
    "8B: a row each": LoraCase(((0, 1), (1, 1)), {0: 16, 1: 8}, (4096, 4096)),
    "8B: down of a row each": LoraCase(((0, 1), (1, 1)), {0: 16, 1: 8}, (14336, 4096)),
    "8B: small tiles": LoraCase(((0, 9), (1, 9)), {0: 16, 1: 8}, (4096, 14336)),
    "8B: large tiles": LoraCase(((0, 99), (1, 99)), {0: 64, 1: 8}, (4096, 4096)),
}
ATTENTIONS = ATTENTION_CASES | {
    "8B: decode and prefill": AttentionCase(((600, 1), (0, 40)), **HEADS),
}
ROWS: dict[str, RowCase] = ROW_CASES | {
    "8B: norm": NormCase(64, 4096, has_residual=True),
    "8B: RoPE": RotationCase(64, 32, 8, 128, 128),
    "8B: gate": GateCase(64, 14336),
}


class AbsentGpu:
    """What Triton asks of a driver before it launches anything."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def watch(arch: int) -> list[Any]:
    """Where every kernel that is launched from now on will be found, compiled and not run."""
    triton.runtime.driver.set_active(AbsentGpu(arch))
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_alone(self: Any, *args: Any, grid: Any, warmup: bool, **others: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **others))

    JITFunction.run = compile_alone
    return compiled


def launch_lora(case: LoraCase, dtype: torch.dtype) -> None:
    adapters = adapters_of(case.ranks, case.affine, features=case.features, device=CPU, dtype=dtype)
    shape = tuple((0, number) for _, number in case.rows)
    batch = batch_of(shape, slots=[slot for slot, _ in case.rows])
    x, out = (torch.randn(batch.num_tokens, size).to(dtype) for size in case.features)
    on_gpu(CPU).plan_lora(batch, adapters.weights).apply(out, x, module=1)


def launch_attention(case: AttentionCase, dtype: torch.dtype) -> None:
    batch = batch_of(case.shape, block_size=case.block_size)
    memory, states = memory_of(case, batch, dtype), states_of(case, batch, dtype)
    attend(on_gpu(CPU), case, batch, memory, states)


def launch_rows(case: RowCase, dtype: torch.dtype) -> None:
    # Nothing is computed: what is found is not what is expected.
    with contextlib.suppress(AssertionError):
        row_error(case, device=CPU, dtype=dtype)


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    for name, lora in LORAS.items():
        yield f"LoRA, {name}", lambda lora=lora: launch_lora(lora, dtype)
    for name, attention in ATTENTIONS.items():
        yield f"attention, {name}", lambda attention=attention: launch_attention(attention, dtype)
    for name, rows in ROWS.items():
        yield f"rows, {name}", lambda rows=rows: launch_rows(rows, dtype)


def described(case: str, kernel: Any) -> dict[str, Any]:
    ptx = kernel.asm["ptx"]
    # Bytes of each thread's loads, and of its copies to shared memory
    loads = [
        (int(vector or 1) * int(bits) // 8)
        for vector, bits in re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.[bu](\d+)", ptx)
    ]
    copies = [
        int(size, 16)
        for size in re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, 0x([0-9a-f]+)", ptx)
    ]
    return {
        "case": case,
        "kernel": kernel.name,
        "shared_bytes": kernel.metadata.shared,
        "load_bytes": sorted(set(loads)),
        "copy_bytes": sorted(set(copies)),
        "uses_tensor_cores": "mma" in ptx,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels for a GPU.")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    compiled = watch(arguments.arch)
    for case, launch in launches(getattr(torch, arguments.dtype)):
        if not arguments.names or any(name in case for name in arguments.names):
            launch()
            for kernel in compiled:
                print(json.dumps(described(case, kernel)), flush=True)
            compiled.clear()


if __name__ == "__main__":
    main()
