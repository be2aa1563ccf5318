"""What adapters change in a step beside LoRA: retrained parameters, embeddings, added tokens.

While a step runs, each module that one of its adapters changes is hooked: rows of that adapter are
computed again with what is its own. Other modules, and all other steps, know nothing of it.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engine.batch import Batch, Ints
from engine.model.prepared import ModuleParts, Part, PreparedAdapter
from engine.model.quantised import QuantisedLinear
from engine.model.targets import Target, Targets, Vocabulary


@dataclass(frozen=True, slots=True)
class _Change:
    """`ModuleParts` as views into an adapter's memory."""

    # The module itself, but for the parameters that are the adapter's own
    twin: nn.Module | None
    # As `TokenParts`: ids and rows
    tokens: tuple[Tensor, Tensor] | None
    # As `EmbeddingParts`: lora_A and lora_B, and the gain
    lora: tuple[Tensor, Tensor] | None
    gain: Tensor | None

    @classmethod
    def of(cls, parts: ModuleParts, memory: Tensor, module: nn.Module) -> "_Change":
        tokens, own = parts.tokens, parts.embedding
        return cls(
            twin=_twin(module, parts.replaced, memory) if parts.replaced else None,
            tokens=(tokens.token_ids.integers_of(memory), tokens.rows.of(memory))
            if tokens
            else None,
            lora=(own.lora_A.of(memory), own.lora_B.of(memory)) if own else None,
            gain=own.gain.of(memory) if own and own.gain else None,
        )


def _twin(module: nn.Module, replaced: Mapping[str, Part], memory: Tensor) -> nn.Module:
    own = {name: part.of(memory) for name, part in replaced.items()}
    if isinstance(module, QuantisedLinear) and "weight" in own:
        return module.with_whole(own)
    # With the parameters in the memo they are shared, not copied.
    twin = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    for name, value in own.items():
        setattr(twin, name, nn.Parameter(value, requires_grad=False))
    return twin


@dataclass(frozen=True, slots=True)
class _Slot:
    # By module path; the parts are kept for the day that the memory moves.
    parts: Mapping[str, ModuleParts]
    changes: Mapping[str, _Change]
    vocabulary: Vocabulary


@dataclass(slots=True)
class _Rows:
    """Which rows of a module's input belong to which changes, for one step."""

    target: Target
    # Of a wide output layer: how many columns it must have.
    num_columns: int
    # Of the embedding of token ids: these, where the model was given others in their place.
    token_ids: Tensor | None
    # First row, number of rows, what changes them
    changes: list[tuple[int, int, _Change]] = field(default_factory=list)

    def __call__(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0] if self.token_ids is None else self.token_ids.view(args[0].shape)
        out = _widened(output, self.num_columns)
        for start, num_rows, change in self.changes:
            own_x, own_out = (t.narrow(self.target.token_dim, start, num_rows) for t in (x, out))
            self._apply(own_x, own_out, change)
        return out

    def _apply(self, x: Tensor, out: Tensor, change: _Change) -> None:
        if change.twin is not None:
            own = change.twin(x)
            out[..., : own.shape[-1]] = own
        if self.target.is_embedding:
            self._embed(x, out, change)
        elif change.tokens is not None:
            token_ids, rows = change.tokens
            out[..., token_ids] = x @ rows.T

    def _embed(self, ids: Tensor, out: Tensor, change: _Change) -> None:
        scale = self.target.embed_scale
        if change.tokens is not None:
            token_ids, rows = change.tokens
            places = torch.searchsorted(token_ids, ids).clamp_(max=len(token_ids) - 1)
            is_own = token_ids[places] == ids
            out[:] = torch.where(is_own[..., None], rows[places] * scale, out)
        if change.gain is not None:
            out.mul_(change.gain)
        if change.lora is not None:
            lora_A, lora_B = change.lora
            out.add_((lora_A[ids] @ lora_B) * scale)


def _widened(out: Tensor, num_columns: int) -> Tensor:
    if out.shape[-1] >= num_columns:
        return out
    wide = out.new_zeros(*out.shape[:-1], num_columns)
    wide[..., : out.shape[-1]] = out
    return wide


class ModuleChanges:
    """Those of all slots. Mutable; one thread."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._slots: dict[int, _Slot] = {}
        self._handles: list[RemovableHandle] = []

    def put(self, slot: int, adapter: PreparedAdapter, memory: Tensor) -> None:
        self.clear(slot)
        if adapter.modules:
            changes = self._changes(adapter.modules, memory)
            self._slots[slot] = _Slot(adapter.modules, changes, adapter.vocabulary)

    def move(self, slot: int, memory: Tensor) -> None:
        if slot in self._slots:
            own = self._slots[slot]
            self._slots[slot] = replace(own, changes=self._changes(own.parts, memory))

    def clear(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def vocabulary(self, slot: int) -> Vocabulary:
        own = self._slots.get(slot)
        return self._targets.vocabulary if own is None else own.vocabulary

    def _changes(self, parts: Mapping[str, ModuleParts], memory: Tensor) -> dict[str, _Change]:
        by_name = self._targets.by_name
        return {
            name: _Change.of(part, memory, by_name[name].module) for name, part in parts.items()
        }

    # A step

    def are_any(self, batch: Batch) -> bool:
        """Whether an adapter of this step changes anything."""
        return not self._slots.keys().isdisjoint(batch.slot_runs[:, 2].tolist())

    def begin(self, batch: Batch) -> None:
        """Hook what the adapters of this step change, until `end`."""
        if not self.are_any(batch):
            return
        for name, rows in self._rows_by_module(batch).items():
            # First, so that whoever else looks at the output sees what it has become.
            module = self._targets.by_name[name].module
            self._handles.append(module.register_forward_hook(rows, prepend=True))

    def end(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def input_ids(self, batch: Batch) -> Tensor:
        """The batch's, with others in place of those that the base model does not know."""
        num_ids = self._targets.vocabulary.num_input_ids
        is_any_wide = self._joined(batch.slot_runs).num_input_ids > num_ids
        return batch.input_ids.clamp(max=num_ids - 1) if is_any_wide else batch.input_ids

    def fitted(self, logits: Tensor, batch: Batch) -> Tensor:
        """Wide enough for all ids of the step's adapters; -inf for what a row's own has not.

        logits: [num_logits, at least the base model's].
        """
        base, joined = self._targets.vocabulary, self._joined(batch.logit_slot_runs)
        if joined == base:
            return logits
        num_ids = torch.full((logits.shape[0], 1), base.num_output_ids)
        for start, end, slot in batch.logit_slot_runs.tolist():
            num_ids[start:end] = self.vocabulary(slot).num_output_ids
        # Penalties count the tokens of a prompt among these columns.
        width = max(joined.num_input_ids, joined.num_output_ids)
        columns = torch.arange(width, device=logits.device)
        is_unknown = columns >= num_ids.to(logits.device)
        return _widened(logits, width).masked_fill(is_unknown, -torch.inf)

    def _joined(self, runs: Ints) -> Vocabulary:
        joined = self._targets.vocabulary
        for slot in self._slots.keys() & set(runs[:, 2].tolist()):
            joined = joined.joined(self._slots[slot].vocabulary)
        return joined

    def _rows_by_module(self, batch: Batch) -> dict[str, _Rows]:
        found: dict[str, _Rows] = {}
        for start, end, name, change in self._changed_runs(batch):
            if name not in found:
                found[name] = self._no_rows(name, batch)
            found[name].changes.append((start, end - start, change))
        return found

    def _changed_runs(self, batch: Batch) -> Iterator[tuple[int, int, str, _Change]]:
        output_layer = self._targets.output_layer
        for runs, is_output in ((batch.slot_runs, False), (batch.logit_slot_runs, True)):
            for start, end, slot in runs.tolist():
                changes = self._slots[slot].changes if slot in self._slots else {}
                for name, change in changes.items():
                    if (name == output_layer) is is_output:
                        yield start, end, name, change

    def _no_rows(self, name: str, batch: Batch) -> _Rows:
        is_way_in = name == self._targets.input_embedding
        num_columns = 0
        if name == self._targets.output_layer:
            num_columns = self._joined(batch.logit_slot_runs).num_output_ids
        return _Rows(
            target=self._targets.by_name[name],
            num_columns=num_columns,
            token_ids=batch.input_ids if is_way_in else None,
        )
