"""The kernels for GPUs, compiled and on a GPU, equal their definitions.

Goes through the configurations that `tests/engine/test_gpu_kernels.py` interprets, in both 16-bit
dtypes, and through shapes that an interpreter would take hours for.
"""

import os

import pytest
import torch

from engine.kernels.choice import HALF, on_gpu
from engine.kernels.gpu_lora import GpuLora
from engine.replay import CudaGraphs, again
from tests.gpu_lab import (
    ATTENTION_CASES,
    BOUNDS,
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
    fixed_error,
    lora_error,
    memory_of,
    row_error,
    states_of,
)

IS_COMPILED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") == "0"
pytestmark = pytest.mark.skipif(not IS_COMPILED, reason="needs a GPU: see benchmarks/gpu.sh")
GPU = torch.device("cuda")
every_dtype = pytest.mark.parametrize("dtype", HALF, ids=str)
LARGE_LORAS = {
    "64 rows of 8 adapters": LoraCase(
        tuple((slot % 8, 1) for slot in range(64)), dict.fromkeys(range(8), 16), (4096, 4096)
    ),
    "down of 8 distinct": LoraCase(
        tuple((slot, 1) for slot in range(8)), dict.fromkeys(range(8), 16), (14336, 4096)
    ),
    "prompts of four adapters": LoraCase(
        tuple((slot, 200) for slot in range(4)), {0: 8, 1: 16, 2: 64, 3: 128}, (4096, 1024)
    ),
}
LARGE_ATTENTIONS = {
    "8B shape": AttentionCase(
        ((1023, 1), (4000, 1), (100, 1), (0, 300), (1500, 200)),
        num_kv_heads=8,
        group=4,
        key_dim=128,
        value_dim=128,
        block_size=16,
    ),
    "wide heads, capped, with a window": AttentionCase(
        ((2000, 1), (300, 150)),
        num_kv_heads=4,
        group=2,
        key_dim=256,
        value_dim=256,
        block_size=16,
        sliding_window=1000,
        softcap=50.0,
    ),
}
LARGE_ROWS = {
    "norm of a sum, 8B shape": NormCase(2048, 4096, has_residual=True),
    "RoPE, 8B shape": RotationCase(2048, 32, 8, 128, 128),
    "gate, 8B shape": GateCase(512, 14336),
}


@every_dtype
@pytest.mark.parametrize("case", (LORA_CASES | LARGE_LORAS).values(), ids=LORA_CASES | LARGE_LORAS)
def test_lora(case: LoraCase, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert lora_error(case, device=GPU, dtype=dtype) < BOUNDS[dtype]


@every_dtype
@pytest.mark.parametrize(
    "case",
    (ATTENTION_CASES | LARGE_ATTENTIONS).values(),
    ids=ATTENTION_CASES | LARGE_ATTENTIONS,
)
def test_attention(case: AttentionCase, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert attention_error(case, device=GPU, dtype=dtype) < BOUNDS[dtype]


@every_dtype
@pytest.mark.parametrize("case", FIXED_CASES.values(), ids=FIXED_CASES)
def test_launches_that_are_recorded(case: FixedCase, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Without torch's own pool no memory can be had while something is recorded.
    is_pooled = "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ
    record = CudaGraphs() if is_pooled else again
    assert fixed_error(case, device=GPU, dtype=dtype, record=record) < BOUNDS[dtype]


@every_dtype
@pytest.mark.parametrize("case", (ROW_CASES | LARGE_ROWS).values(), ids=ROW_CASES | LARGE_ROWS)
def test_rows(case: RowCase, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert row_error(case, device=GPU, dtype=dtype) < BOUNDS[dtype]


@pytest.mark.parametrize("case", LARGE_LORAS.values(), ids=LARGE_LORAS)
def test_the_same_step_gives_the_same_bits(case: LoraCase) -> None:
    features, dtype = case.features, torch.bfloat16
    adapters = adapters_of(case.ranks, case.affine, features=features, device=GPU, dtype=dtype)
    batch = batch_of(
        tuple((0, number) for _, number in case.rows),
        slots=[slot for slot, _ in case.rows],
        device=GPU,
    )
    x, out = (torch.randn(batch.num_tokens, size, device=GPU, dtype=dtype) for size in features)
    lora, answers = GpuLora(GPU), []
    for _ in range(20):
        answers.append(out.clone())
        lora.plan(batch, adapters.weights).apply(answers[-1], x, module=1)
    assert all(torch.equal(answers[0], each) for each in answers)


def test_the_same_attention_gives_the_same_bits() -> None:
    case, dtype = LARGE_ATTENTIONS["8B shape"], torch.bfloat16
    batch = batch_of(case.shape, block_size=case.block_size, device=GPU)
    memory, states = memory_of(case, batch, dtype), states_of(case, batch, dtype)
    answers = [attend(on_gpu(GPU), case, batch, memory, states) for _ in range(20)]
    assert all(torch.equal(answers[0], each) for each in answers)
