"""Choose the implementation of the operations that fits a device.

Each computes what `reference` defines. Knows devices and dtypes. Knows nothing of how it is done.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.batch import Batch
from engine.errors import ConfigurationError
from engine.kernels import quantised, threads
from engine.kernels.dense import DenseAttention, DenseLora
from engine.kernels.layer_parts import LayerCall, LayerParts
from engine.kernels.quantised import Format
from engine.kernels.slot_weights import SlotWeights

# What tensor cores take; float32 has no advantage of kernels that are tiled for them.
HALF = (torch.float16, torch.bfloat16)
# Ada and Hopper.
MIN_FP8_CAPABILITY = (8, 9)
# Quantisations that a GPU has no use for, and what to do there.
ON_CPU_ALONE = {
    "bf16": "set dtype to 'bfloat16'",
    "int8-dynamic": "use 'fp8', 'int8' or 'int4'",
}


class AttentionPlan(Protocol):
    """Which positions each new token of a step sees."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_cache: Tensor,
        value_cache: Tensor,
        out: Tensor,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> None:
        """As `reference.write_kv` of key and value, then `reference.paged_attention` into `out`."""


class LoraPlan(Protocol):
    """Which rows of a step meet which adapters."""

    def apply(self, out: Tensor, x: Tensor, *, module: int) -> None:
        """out = affine(out) + lora(x), as `reference.affine` and `reference.lora`.

        x: [num_tokens, in_features]; out: [num_tokens, out_features], changed in place.
        """


class FixedPlans(Protocol):
    """Plans for all decode steps of one number of rows, which launch the same in each."""

    def take(self, batch: Batch) -> bool:
        """Plan for `batch`, which has as many rows or fewer; the others see themselves alone.

        False where it reads more than there is room for, and nothing is planned.
        """

    def attention(self) -> AttentionPlan:
        """Of the batch that was taken last."""

    def lora(self) -> LoraPlan | None:
        """As `attention`. None for plans without adapters."""


class FixedKernels(Protocol):
    """Makes such plans."""

    # First that of steps without adapters, then one for each way to compute those with any.
    kinds: tuple[int, ...]

    def kind_of(self, batch: Batch) -> int:
        """How this batch's adapters are computed."""

    def plan(
        self, batch: Batch, weights: SlotWeights, *, kind: int, max_context: int, max_rank: int
    ) -> FixedPlans:
        """`batch`: tensors that stay where they are, with one new token in each row."""


class RowKernels(Protocol):
    """What a model does to rows between its GEMMs, in place of its own code."""

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float, offset: float) -> Tensor:
        """`reference.rms_norm`."""

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        """x + residual, and `reference.rms_norm` of it."""

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """`reference.rotate` of both."""

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """`reference.silu_mul`."""


class WholeLayer(Protocol):
    """A layer around its attention; the adapters are those of the step."""

    def enter(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, *, adapters: LoraPlan | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, [num_rows, heads, head_dim] each.

        hidden: [..., num_rows, width]; cos, sin: [..., num_rows, dims], before them ones alone.
        """

    def leave(self, attended: Tensor, hidden: Tensor, *, adapters: LoraPlan | None) -> Tensor:
        """The layer's output, in the shape of its input `hidden`.

        attended: [num_rows, heads, head_dim]; hidden: [..., num_rows, width].
        """


class WholeStack(Protocol):
    """Neighbouring layers with their attention, each with the output of the one before."""

    def serves(self, plan: AttentionPlan) -> bool:
        """Whether it attends as this plan does."""

    def run(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        plan: AttentionPlan,
        calls: Sequence[LayerCall],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        adapters: LoraPlan | None,
    ) -> Tensor:
        """The last layer's output, in the shape of the first one's input `hidden`.

        As `WholeLayer`; `calls`: one for each layer; keys and values: the caches, by their places.
        """


class LayerKernels(Protocol):
    """What a model does from one attention to the next, products included."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`torch.nn.functional.linear`."""

    def layer(self, parts: LayerParts) -> WholeLayer:
        """Raises AssertionError for parts that it has no loops for."""

    def stack(self, layers: Sequence[WholeLayer]) -> WholeStack:
        """Of its own layers. Raises AssertionError for such as it has no loop for."""

    def serves(self, adapters: LoraPlan | None) -> bool:
        """Whether its layers do all that these adapters do."""


def _is_warm(weights: SlotWeights, dtype: torch.dtype) -> None:
    """Nothing is compiled ahead."""


@dataclass(frozen=True, slots=True)
class Kernels:
    plan_attention: Callable[[Batch], AttentionPlan]
    # For batches with at least one adapter.
    plan_lora: Callable[[Batch, SlotWeights], LoraPlan]
    # Before any slot is in use: what is left to be done for LoRA, so that no step waits for it.
    warm_up_lora: Callable[[SlotWeights, torch.dtype], None] = _is_warm
    # None where the model's own code does as well.
    rows: RowKernels | None = None
    # None where there are no such loops.
    layers: LayerKernels | None = None
    # None where nothing is gained by launching the same in each step.
    fixed: FixedKernels | None = None


@dataclass(frozen=True, slots=True)
class Formats:
    """What becomes of a model's weights."""

    linears: Format
    # Of the layer that gives the logits, which every token is chosen by; None leaves it as it is.
    output_layer: Format | None


def _dense_lora(batch: Batch, weights: SlotWeights) -> LoraPlan:
    return DenseLora(batch.slot_runs, weights)


DENSE = Kernels(DenseAttention, _dense_lora)


def choose(device: torch.device, dtype: torch.dtype) -> Kernels:
    if device.type == "cuda" and dtype in HALF and importlib.util.find_spec("triton") is not None:
        return on_gpu(device)
    if device.type != "cpu" or dtype is not torch.float32 or not _can_compile():
        return DENSE
    # Not at the top: a GPU's machine needs no compiler for CPUs.
    from engine.kernels import cpu_rows
    from engine.kernels.cpu_attention import CompiledAttention
    from engine.kernels.cpu_lora import CompiledLora
    from engine.kernels.cpu_stack import CompiledLayers

    return Kernels(CompiledAttention, CompiledLora, rows=cpu_rows, layers=CompiledLayers())


def on_gpu(device: torch.device) -> Kernels:
    """Triton's kernels; on a CPU they run where Triton interprets them."""
    # Not at the top: a CPU's machine needs no compiler for GPUs.
    from engine.kernels import gpu_rows
    from engine.kernels.gpu_attention import GpuAttention
    from engine.kernels.gpu_fixed import GpuFixed
    from engine.kernels.gpu_lora import GpuLora

    lora = GpuLora(device)
    return Kernels(
        GpuAttention, lora.plan, lora.warm_up, rows=gpu_rows, fixed=GpuFixed(lora, device)
    )


def choose_formats(name: str, device: torch.device, dtype: torch.dtype | None) -> Formats | None:
    """By the name of a quantisation; None for "none". `dtype`: None where the checkpoint decides.

    Raises ConfigurationError where the device has no arithmetic for it.
    """
    if name == "none":
        return None
    if name == "fp8":
        _require_fp8(device)
        return Formats(quantised.FP8, None)
    if name in ON_CPU_ALONE and device.type != "cpu":
        raise ConfigurationError(
            f"quantization is {name!r}, which only a CPU serves, but device is {str(device)!r}: "
            f"{ON_CPU_ALONE[name]}."
        )
    formats = _formats(device, dtype)
    return Formats(formats[name], formats["int8" if name == "int4" else name])


def _formats(device: torch.device, dtype: torch.dtype | None) -> dict[str, Format]:
    if device.type != "cpu" or dtype is not torch.float32 or not _can_compile():
        own = (quantised.BF16, quantised.INT8, quantised.INT4, quantised.INT8_DYNAMIC)
        return {form.name: form for form in own}
    # As in `choose`.
    from engine.kernels import quantised_cpu

    return quantised_cpu.FORMATS


def _require_fp8(device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigurationError(
            f"quantization is 'fp8', which needs a CUDA device, but device is {str(device)!r}: "
            "use 'bf16', 'int8', 'int4' or 'int8-dynamic'."
        )
    if torch.cuda.get_device_capability(device) < MIN_FP8_CAPABILITY:
        raise ConfigurationError(
            "quantization is 'fp8', but this GPU multiplies no such numbers: use 'int8' or 'int4'."
        )


def _can_compile() -> bool:
    return importlib.util.find_spec("numba") is not None and threads.find_runtime() is not None
