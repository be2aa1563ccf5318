"""LoRA beside a model's linear layers: many adapters at once, each row its own.

An adapter is one flat piece of memory, as large as its ranks make it. Knows slots and modules.
Knows nothing of digests or sequences.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from adapters import weights
from adapters.validate import BaseShape
from adapters.weights import LoraModule
from engine.errors import AdapterMissing
from engine.kernels.choice import LoraPlan
from engine.kernels.slot_weights import AdapterLayout, SlotWeights

Matrix = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

# Elements; each part of an adapter begins with a line of any device's cache.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """An adapter on the host, laid out as the device will have it."""

    # [num_elements] in the model's dtype; of each module lora_A, then lora_B transposed and scaled
    values: Tensor
    layout: AdapterLayout

    @property
    def size_bytes(self) -> int:
        return self.values.nbytes


def prepare(
    folder: Path,
    base_shape: BaseShape,
    *,
    dtype: torch.dtype,
    max_rank: int,
    is_pinned: bool = False,
    before_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> PreparedAdapter:
    """Read an adapter for `LoraBank.install`. Raises AdapterMissing where it does not fit.

    `is_pinned`: into memory that a GPU copies from while it computes. `before_bytes` is called
    before each piece of work with its size, and may wait.
    """
    loaded = weights.load(folder, base_model=base_shape.base_model, dtype=torch.float32).lora
    for module in loaded.values():
        _check(module, base_shape, max_rank=max_rank)
    layout = _layout(loaded, base_shape)
    values = torch.zeros(layout.num_elements, dtype=dtype, pin_memory=is_pinned)
    starts = zip(
        loaded.values(), layout.starts_of_A.tolist(), layout.starts_of_B.tolist(), strict=True
    )
    for module, start_of_A, start_of_B in starts:
        before_bytes(module.lora_A.nbytes + module.lora_B.nbytes)
        _put(values, start_of_A, module.lora_A)
        # Scaled in float32, then rounded once.
        _put(values, start_of_B, (module.lora_B.float() * module.scaling).T)
    if not torch.isfinite(values).all():
        raise AdapterMissing(f"The adapter is not finite as {dtype}.")
    return PreparedAdapter(values, layout)


def _check(module: LoraModule, base_shape: BaseShape, *, max_rank: int) -> None:
    features = base_shape.modules.get(module.name)
    if features is None:
        raise AdapterMissing(f"The base model has no module {module.name!r} that LoRA may target.")
    rank = module.lora_A.shape[0]
    if (module.lora_A.shape[1], module.lora_B.shape[0]) != features:
        raise AdapterMissing(f"The adapter's shapes do not fit the module {module.name!r}.")
    if rank > max_rank:
        raise AdapterMissing(
            f"The adapter has rank {rank} in {module.name!r}; this engine serves up to {max_rank}."
        )


def num_elements(features: Matrix, rank: int) -> int:
    """Of an adapter that targets modules of `features` [num_modules, 2], all with one rank."""
    return int(_part_sizes(features, rank).sum())


def _part_sizes(features: Matrix, ranks: Matrix | int) -> Matrix:
    """[num_modules, 2]: elements of lora_A and lora_B, each up to the next line."""
    return -(-features * ranks // ALIGNMENT) * ALIGNMENT


def _layout(loaded: Mapping[str, LoraModule], base_shape: BaseShape) -> AdapterLayout:
    index_of = {name: index for index, name in enumerate(base_shape.modules)}
    ranks = np.array([module.lora_A.shape[0] for module in loaded.values()], dtype=np.int64)
    features = np.array([base_shape.modules[name] for name in loaded], dtype=np.int64)
    sizes = _part_sizes(features, ranks[:, None])
    ends = np.cumsum(sizes.flatten())
    starts = (ends - sizes.flatten()).reshape(-1, 2)
    return AdapterLayout(
        modules=np.array([index_of[name] for name in loaded], dtype=np.int64),
        ranks=ranks,
        starts_of_A=starts[:, 0],
        starts_of_B=starts[:, 1],
        num_elements=int(ends[-1]),
    )


def _put(values: Tensor, start: int, part: Tensor) -> None:
    values[start : start + part.numel()].view(part.shape).copy_(part)


class LoraLinear(nn.Module):
    """A linear layer and the adapters that target it."""

    def __init__(self, base: nn.Linear, bank: "LoraBank", *, index: int) -> None:
        super().__init__()
        self.base = base
        self._bank = bank
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        plan = self._bank.plan
        if plan is not None:
            plan.add(
                out.view(-1, out.shape[-1]),
                x.reshape(-1, x.shape[-1]),
                module=self._index,
            )
        return out


class LoraBank:
    """All LoRA modules of a model, and what their slots hold. Mutable; one thread."""

    def __init__(self, targets: Mapping[str, tuple[int, int]], *, num_slots: int) -> None:
        """`targets`: in_features and out_features of the modules by name."""
        self._names = tuple(targets)
        self._modules: dict[str, LoraLinear] = {}
        self.weights = SlotWeights(list(targets.values()), num_slots=num_slots)
        # Of the step that runs now; set by the runner. None: the base model alone.
        self.plan: LoraPlan | None = None

    def wrap(self, model: nn.Module) -> None:
        """Put a LoraLinear in place of each of the model's target modules."""
        for index, name in enumerate(self._names):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            self._modules[name] = LoraLinear(linear, self, index=index)
            model.set_submodule(name, self._modules[name])

    def install(self, slot: int, adapter: PreparedAdapter, *, memory: Tensor) -> None:
        """Let a slot be `adapter`, whose values `memory` holds on the device until `clear`."""
        self.weights.put(slot, memory, adapter.layout)

    def move(self, slot: int, *, memory: Tensor) -> None:
        """What the slot holds lies in `memory` now."""
        self.weights.move(slot, memory)

    def clear(self, slot: int) -> None:
        self.weights.clear(slot)

    def module(self, name: str) -> LoraLinear:
        return self._modules[name]
