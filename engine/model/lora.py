"""LoRA beside a model's linear layers: many adapters at once, each row its own.

Knows slots and modules. Knows nothing of digests or sequences.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from engine.batch import Batch, Ints
from engine.kernels.choice import Kernels, LoraPlan
from engine.kernels.dense import DenseLora
from engine.kernels.slot_weights import SlotWeights
from engine.model.changes import ModuleChanges
from engine.model.prepared import PreparedAdapter
from engine.model.targets import Targets, Vocabulary


class LoraLinear(nn.Module):
    """A linear layer and the adapters that target it."""

    def __init__(self, base: nn.Module, bank: "LoraBank", *, index: int) -> None:
        super().__init__()
        self.base = base
        self.bank = bank
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        plan = self.plan
        if plan is not None:
            plan.apply(
                out.view(-1, out.shape[-1]),
                x.reshape(-1, x.shape[-1]),
                module=self.index,
            )
        return out

    @property
    def plan(self) -> LoraPlan | None:
        return self.bank.plan


class OutputLinear(LoraLinear):
    """The output layer, which sees the rows alone whose logits are wanted."""

    @property
    def plan(self) -> LoraPlan | None:
        return self.bank.output_plan


class LoraBank:
    """All that adapters change in a model, and what their slots hold. Mutable; one thread."""

    def __init__(self, targets: Targets, *, num_slots: int) -> None:
        self._targets = targets
        self._modules: dict[str, LoraLinear] = {}
        linears = targets.linears
        self.weights = SlotWeights(
            [each.features for each in linears.values()], num_slots=num_slots
        )
        self.changes = ModuleChanges(targets)
        self._output_index = (
            list(linears).index(targets.output_layer) if targets.output_layer else None
        )
        # Of the step that runs now. None: the base model alone.
        self.plan: LoraPlan | None = None
        self.output_plan: LoraPlan | None = None

    def wrap(self, model: nn.Module) -> None:
        """Put a LoraLinear in place of each of the model's linear layers."""
        for index, (name, target) in enumerate(self._targets.linears.items()):
            kind = OutputLinear if name == self._targets.output_layer else LoraLinear
            self._modules[name] = kind(target.module, self, index=index)
            model.set_submodule(name, self._modules[name])

    # Slots

    def install(self, slot: int, adapter: PreparedAdapter, *, memory: Tensor) -> None:
        """Let a slot be `adapter`, whose values `memory` holds on the device until `clear`."""
        self.weights.put(slot, memory, adapter.layout)
        self.changes.put(slot, adapter, memory)

    def move(self, slot: int, *, memory: Tensor) -> None:
        """What the slot holds lies in `memory` now."""
        self.weights.move(slot, memory)
        self.changes.move(slot, memory)

    def clear(self, slot: int) -> None:
        self.weights.clear(slot)
        self.changes.clear(slot)

    def vocabulary(self, slot: int) -> Vocabulary:
        """The token ids that the slot's adapter knows."""
        return self.changes.vocabulary(slot)

    def module(self, name: str) -> nn.Module:
        """What gives the output of the module at this path, adapters included."""
        return self._modules.get(name, self._targets.by_name[name].module)

    # A step

    def begin(self, batch: Batch, kernels: Kernels) -> None:
        """Let the adapters of the batch be served, until `end`."""
        if not len(batch.slot_runs):
            # The base model runs as if there were no adapters at all.
            return
        self.plan = kernels.plan_lora(batch, self.weights)
        if self._changes_output(batch.logit_slot_runs):
            # Few rows and many columns, which an adapter may have more of: one GEMM for each.
            self.output_plan = DenseLora(batch.logit_slot_runs, self.weights)
        self.changes.begin(batch)

    @contextmanager
    def served(self, plan: LoraPlan | None) -> Iterator[None]:
        """Let `plan` be that of the step inside, whose adapters do nothing else."""
        self.plan = plan
        try:
            yield
        finally:
            self.plan = None

    def is_lora_alone(self, batch: Batch) -> bool:
        """Whether the batch's adapters do nothing but LoRA, in layers before the output."""
        runs = batch.slot_runs
        return not (self.changes.are_any(batch) or self._changes_output(runs))

    def end(self) -> None:
        self.plan = self.output_plan = None
        self.changes.end()

    def _changes_output(self, runs: Ints) -> bool:
        index, slots = self._output_index, runs[:, 2]
        if index is None:
            return False
        own = (self.weights.table[index, slots], self.weights.affine_table[index, slots])
        return any(bool(part.any()) for part in own)
