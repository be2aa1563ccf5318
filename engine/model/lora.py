"""LoRA in place of a model's linear layers: many adapters at once, each row its own.

A module's adapters lie one after another in a pool that is as wide as the sum of their ranks, so an
adapter costs what its rank costs. Knows slots and modules. Knows nothing of digests or sequences.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from adapters import weights
from adapters.validate import BaseShape
from engine.errors import AdapterMissing
from engine.kernels.cpu import Layout, LoraPlan


@dataclass(frozen=True, slots=True)
class PreparedModule:
    """One module's share of an adapter, on the host, in the model's dtype."""

    # [rank, in_features]
    lora_A: Tensor
    # [rank, out_features]: transposed, with the scaling inside
    lora_B: Tensor


PreparedAdapter = Mapping[str, PreparedModule]


def prepare(
    folder: Path, base_shape: BaseShape, *, dtype: torch.dtype, max_rank: int
) -> PreparedAdapter:
    """Read an adapter for `LoraBank.install`. Raises AdapterMissing where it does not fit."""
    loaded = weights.load(folder, base_model=base_shape.base_model, dtype=torch.float32)
    return {
        name: _prepare_module(module, base_shape, dtype=dtype, max_rank=max_rank)
        for name, module in loaded.items()
    }


def _prepare_module(
    module: weights.LoraModule, base_shape: BaseShape, *, dtype: torch.dtype, max_rank: int
) -> PreparedModule:
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
    # Scaled in float32, then rounded once.
    scaled = (module.lora_B.float() * module.scaling).T.to(dtype).contiguous()
    lora_A = module.lora_A.to(dtype).contiguous()
    if not (torch.isfinite(scaled).all() and torch.isfinite(lora_A).all()):
        raise AdapterMissing(f"The adapter is not finite as {dtype} in {module.name!r}.")
    return PreparedModule(lora_A, scaled)


class LoraLinear(nn.Module):
    """A linear layer and the adapters that target it."""

    def __init__(self, base: nn.Linear, bank: "LoraBank") -> None:
        super().__init__()
        self.base = base
        self._bank = bank
        # [pool, in_features] and [pool, out_features]; the pool grows when an adapter needs it to
        self._lora_A = base.weight.new_zeros(0, base.in_features)
        self._lora_B = base.weight.new_zeros(0, base.out_features)
        self._layout: Layout = ()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        plan = self._bank.plan
        if plan is not None and self._layout:
            plan.add(
                out.view(-1, out.shape[-1]),
                x.reshape(-1, x.shape[-1]),
                lora_A=self._lora_A,
                lora_B=self._lora_B,
                layout=self._layout,
            )
        return out

    def put(self, slot: int, module: PreparedModule) -> None:
        rank = module.lora_A.shape[0]
        first = self._first_gap(rank)
        if first is None:
            first = self._repack(rank)
        self._lora_A[first : first + rank].copy_(module.lora_A)
        self._lora_B[first : first + rank].copy_(module.lora_B)
        self._layout = tuple(sorted((*self._layout, (slot, first, first + rank))))

    def clear(self, slot: int) -> None:
        self._layout = tuple(entry for entry in self._layout if entry[0] != slot)

    def _first_gap(self, rank: int) -> int | None:
        """Where `rank` columns of the pool are unused."""
        start = 0
        for _, first, end in sorted(self._layout, key=lambda entry: entry[1]):
            if first - start >= rank:
                return start
            start = end
        return start if self._lora_A.shape[0] - start >= rank else None

    def _repack(self, extra_rank: int) -> int:
        """Close the gaps and make room for `extra_rank` more; gives where they begin."""
        entries = sorted(self._layout, key=lambda entry: entry[1])
        old = torch.tensor([c for _, first, end in entries for c in range(first, end)])
        num_used = len(old)
        capacity = max(num_used + extra_rank, self._lora_A.shape[0])
        for name in ("_lora_A", "_lora_B"):
            pool: Tensor = getattr(self, name)
            grown = pool.new_zeros(capacity, pool.shape[1])
            if num_used:
                grown[:num_used] = pool[old.to(pool.device)]
            setattr(self, name, grown)
        layout, start = [], 0
        for slot, first, end in entries:
            layout.append((slot, start, start + end - first))
            start += end - first
        self._layout = tuple(sorted(layout))
        return num_used


class LoraBank:
    """All LoRA modules of a model. Mutable; one thread."""

    def __init__(self) -> None:
        self._modules: dict[str, LoraLinear] = {}
        self._names_of_slot: dict[int, tuple[str, ...]] = {}
        # Of the step that runs now; set by the runner. None: the base model alone.
        self.plan: LoraPlan | None = None

    def wrap(self, model: nn.Module, names: list[str]) -> None:
        """Put a LoraLinear in place of each of the model's linear layers `names`."""
        for name in names:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            self._modules[name] = LoraLinear(linear, self)
            model.set_submodule(name, self._modules[name])

    def install(self, slot: int, adapter: PreparedAdapter) -> None:
        """Put an adapter into a slot, in place of what was there."""
        self.clear(slot)
        for name, module in adapter.items():
            self._modules[name].put(slot, module)
        self._names_of_slot[slot] = tuple(adapter)

    def clear(self, slot: int) -> None:
        for name in self._names_of_slot.pop(slot, ()):
            self._modules[name].clear(slot)

    def module(self, name: str) -> LoraLinear:
        return self._modules[name]
