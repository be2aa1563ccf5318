"""Lay an adapter out as the device will have it: one flat piece of memory, as large as it must be.

Knows what an adapter changes and what the base model has there. Knows nothing of slots or digests.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adapters import weights
from adapters.weights import AdapterWeights, LoraModule, TrainedTokens
from engine.errors import AdapterMissing
from engine.kernels.slot_weights import NOWHERE, AdapterLayout
from engine.model.targets import Target, Targets, Vocabulary

Matrix = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

# Elements; each part of an adapter begins with a line of any device's cache.
ALIGNMENT = 64
# Rows of a base weight whose norms are taken at once, so that no second weight comes to be.
TILE_SIZE = 512


@dataclass(frozen=True, slots=True)
class Part:
    """Where one tensor of an adapter lies in its flat memory."""

    start: int
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return int(np.prod(self.shape))

    def of(self, memory: Tensor) -> Tensor:
        return memory[self.start : self.start + self.num_elements].view(self.shape)

    def integers_of(self, memory: Tensor) -> Tensor:
        """Of a part that holds int64, a number in 8 bytes of the memory's elements."""
        size = 8 // memory.element_size()
        return memory[self.start : self.start + size * self.num_elements].view(torch.int64)


@dataclass(frozen=True, slots=True)
class TokenParts:
    """An adapter's own rows of an embedding or of the output layer."""

    # [num_tokens] int64, ascending
    token_ids: Part
    # [num_tokens, dim]
    rows: Part


@dataclass(frozen=True, slots=True)
class EmbeddingParts:
    """LoRA on an embedding; with DoRA the gain is in lora_B already, and beside it."""

    # [num_embeddings, rank]: a row for each id, to be looked up
    lora_A: Part
    # [rank, dim], scaled
    lora_B: Part
    # [dim]
    gain: Part | None


@dataclass(frozen=True, slots=True)
class ModuleParts:
    """What an adapter does in a module beside `AdapterLayout`, one after the other."""

    # By their names in the module.
    replaced: Mapping[str, Part]
    tokens: TokenParts | None = None
    embedding: EmbeddingParts | None = None


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """An adapter on the host, laid out as the device will have it."""

    # [num_elements] in the model's dtype
    values: Tensor
    # LoRA, gains and shifts of linear layers.
    layout: AdapterLayout
    # By module path.
    modules: Mapping[str, ModuleParts]
    # The base model's, and what the adapter adds to it.
    vocabulary: Vocabulary

    @property
    def size_bytes(self) -> int:
        return self.values.nbytes


def prepare(
    folder: Path,
    targets: Targets,
    *,
    base_model: str,
    dtype: torch.dtype,
    max_rank: int,
    is_pinned: bool = False,
    before_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> PreparedAdapter:
    """Read an adapter for `LoraBank.install`. Raises AdapterMissing where it does not fit.

    `base_model`: the served name. `is_pinned`: into memory that a GPU copies from while it
    computes. `before_bytes` is called before each piece of work with its size, and may wait.
    """
    loaded = weights.load(folder, base_model=base_model, dtype=torch.float32)
    return arrange(
        loaded,
        targets,
        dtype=dtype,
        max_rank=max_rank,
        is_pinned=is_pinned,
        before_bytes=before_bytes,
    )


def arrange(
    loaded: AdapterWeights,
    targets: Targets,
    *,
    dtype: torch.dtype,
    max_rank: int,
    is_pinned: bool = False,
    before_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> PreparedAdapter:
    """As `prepare`, of weights in float32."""
    adapter = _Adapter(loaded, targets)
    adapter.check(max_rank=max_rank)
    plan = _Plan(dtype)
    layout = _plan_linears(adapter, plan, before_bytes=before_bytes)
    modules = {
        name: _plan_module(adapter, name, plan, before_bytes=before_bytes)
        for name in adapter.other_modules
    }
    return PreparedAdapter(
        values=plan.filled(is_pinned=is_pinned, before_bytes=before_bytes),
        layout=layout,
        modules=modules,
        vocabulary=adapter.vocabulary,
    )


def num_elements(features: Matrix, rank: int) -> int:
    """Of an adapter that targets modules of `features` [num_modules, 2], all with one rank."""
    # With DoRA or a bias, a gain and a shift for each output.
    sizes = np.concatenate([features * rank, features[:, 1:], features[:, 1:]], axis=1)
    return int(_aligned(sizes).sum())


def _aligned(size: Matrix) -> Matrix:
    return -(-size // ALIGNMENT) * ALIGNMENT


class _Plan:
    """Gives each part its place, then puts all of them there. Mutable."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._parts: list[tuple[Part, Tensor, Tensor | float]] = []
        # By identity; those in `_parts` stay alive.
        self._shared: dict[int, Part] = {}
        self.num_elements = 0

    def place(self, tensor: Tensor, factor: Tensor | float = 1.0) -> Part:
        """For the tensor times the factor, which it is multiplied with when its turn comes."""
        part = Part(self.num_elements, tuple(tensor.shape))
        self._parts.append((part, tensor, factor))
        size_bytes = tensor.numel() * (
            self._dtype.itemsize if tensor.is_floating_point() else tensor.itemsize
        )
        self.num_elements += int(_aligned(np.array(-(-size_bytes // self._dtype.itemsize))))
        return part

    def share(self, tensor: Tensor) -> Part:
        """As `place`, once for a tensor that two tied modules have in common."""
        if id(tensor) not in self._shared:
            self._shared[id(tensor)] = self.place(tensor)
        return self._shared[id(tensor)]

    def filled(self, *, is_pinned: bool, before_bytes: Callable[[int], None]) -> Tensor:
        # Whatever is in a slot has a place.
        size = max(self.num_elements, ALIGNMENT)
        values = torch.zeros(size, dtype=self._dtype, pin_memory=is_pinned)
        for part, tensor, factor in self._parts:
            before_bytes(tensor.nbytes)
            if not tensor.is_floating_point():
                part.integers_of(values).copy_(tensor)
                continue
            # Computed in float32, rounded once.
            part.of(values).copy_(tensor * factor)
            if not torch.isfinite(part.of(values)).all():
                raise AdapterMissing(f"The adapter is not finite as {self._dtype}.")
        return values


class _Adapter:
    """An adapter's weights beside the base model's."""

    def __init__(self, loaded: AdapterWeights, targets: Targets) -> None:
        self.lora, self.tokens, self.targets = loaded.lora, loaded.tokens, targets
        # Trainers save embeddings whole that nobody has trained.
        self.replaced = {
            path: tensor
            for path, tensor in loaded.replaced.items()
            if not _is_the_same(tensor, targets.parameter(path))
        }
        self.vocabulary = Vocabulary(
            self._num_ids(targets.input_embedding, targets.vocabulary.num_input_ids),
            self._num_ids(targets.output_layer, targets.vocabulary.num_output_ids),
        )

    def _num_ids(self, module: str | None, num_base_ids: int) -> int:
        weight = self.replaced.get(f"{module}.weight")
        num_ids = num_base_ids if weight is None else weight.shape[0]
        for token_id in self.tokens[module].token_ids.tolist() if module in self.tokens else ():
            # Ids behind the base model's are known one after the other.
            num_ids += token_id == num_ids
        return num_ids

    @property
    def linear_modules(self) -> Iterator[str]:
        """Those with LoRA, a gain or a shift, in the order of `Targets.linears`."""
        for name in self.targets.linears:
            if name in self.lora or self._has_shift(name):
                yield name

    @property
    def other_modules(self) -> Iterator[str]:
        for name, target in self.targets.by_name.items():
            has_lora = target.is_embedding and name in self.lora
            if has_lora or name in self.tokens or self.replaced_in(name):
                yield name

    def replaced_in(self, module: str) -> dict[str, Tensor]:
        """By name, what the module is computed with instead of its own parameters."""
        if self._has_shift(module):
            return {}
        paths = [path for path in self.replaced if path.rpartition(".")[0] == module]
        return {path.rpartition(".")[2]: self.replaced[path] for path in paths}

    def _has_shift(self, module: str) -> bool:
        """Whether the adapter brings a linear layer's bias, and not its weight."""
        target = self.targets.by_name.get(module)
        has_bias, has_weight = (f"{module}.{name}" in self.replaced for name in ("bias", "weight"))
        return target is not None and target.is_linear and has_bias and not has_weight

    def rows(self, target: Target) -> Tensor:
        """[out_features, in_features], or [num_embeddings, dim]: the weight under the LoRA."""
        replaced = self.replaced.get(f"{target.name}.weight")
        return target.rows if replaced is None else target.rows_of(replaced)

    def shape(self, target: Target) -> tuple[int, int]:
        """Of `rows`, without making them."""
        replaced = self.replaced.get(f"{target.name}.weight")
        num_rows, num_columns = target.shape if replaced is None else target.rows_of(replaced).shape
        return num_rows, num_columns

    # Gains and shifts

    def gain(self, target: Target, before_bytes: Callable[[int], None]) -> Tensor | None:
        """magnitude / |W + scaling · B A|, row by row; None without DoRA."""
        module = self.lora.get(target.name)
        if module is None or module.magnitude is None:
            return None
        weight = self.rows(target)
        weight = weight.T if target.is_embedding else weight
        return module.magnitude / _row_norms(weight, module, before_bytes)

    def affine(
        self, target: Target, before_bytes: Callable[[int], None]
    ) -> tuple[Tensor, Tensor] | None:
        """gain and shift of a linear layer: out = gain * (W x + b) + shift = gain * W x + own b."""
        gain = self.gain(target, before_bytes)
        if gain is None and not self._has_shift(target.name):
            return None
        base = self._bias(target)
        own = self.replaced.get(f"{target.name}.bias", base)
        if f"{target.name}.weight" in self.replaced:
            base = own  # the module is computed with both
        gain = torch.ones(self.shape(target)[0]) if gain is None else gain
        return gain, own - gain * base

    def _bias(self, target: Target) -> Tensor:
        bias = self.targets.parameter(f"{target.name}.bias")
        return torch.zeros(()) if bias is None else bias.float().cpu()

    # What does not fit

    def check(self, *, max_rank: int) -> None:
        """Raises AdapterMissing."""
        for module in self.lora.values():
            self._check_lora(module, max_rank)
        for path, tensor in self.replaced.items():
            self._check_replaced(path, tensor)
        for name, tokens in self.tokens.items():
            self._check_tokens(name, tokens)

    def _check_tokens(self, name: str, tokens: TrainedTokens) -> None:
        target = self.targets.by_name.get(name)
        is_way_out = name == self.targets.output_layer
        if target is None or not (target.is_embedding or is_way_out):
            raise AdapterMissing(f"The base model has no module {name!r} that tokens may be of.")
        num_rows, dim = target.shape
        if tokens.rows.shape != (len(tokens.token_ids), dim):
            raise AdapterMissing(f"The adapter's tokens do not fit the module {name!r}.")
        if self.targets.parameter(f"{name}.bias") is not None:
            # PEFT leaves the bias out, of other tokens too.
            raise AdapterMissing(f"Tokens of {name!r} are not served: it has a bias.")
        # After a gap there would be ids that nobody knows.
        num_ids = self._num_ids(name, num_rows)
        if len(tokens.token_ids) and int(tokens.token_ids.max()) >= num_ids:
            raise AdapterMissing(f"The adapter's tokens leave a gap in {name!r}.")

    def _check_lora(self, module: LoraModule, max_rank: int) -> None:
        target = self.targets.by_name.get(module.name)
        if target is None or not (target.is_linear or target.is_embedding):
            raise AdapterMissing(
                f"The base model has no module {module.name!r} that LoRA may target."
            )
        num_rows, num_columns = self.shape(target)
        features = (num_rows, num_columns) if target.is_embedding else (num_columns, num_rows)
        rank = module.lora_A.shape[0]
        magnitudes = features[1] if module.magnitude is None else module.magnitude.shape[0]
        found = (module.lora_A.shape[1], module.lora_B.shape[0], magnitudes)
        if found != (*features, features[1]) or module.lora_B.shape[1] != rank:
            raise AdapterMissing(f"The adapter's shapes do not fit the module {module.name!r}.")
        if rank > max_rank:
            raise AdapterMissing(
                f"The adapter has rank {rank} in {module.name!r}; this engine serves up to "
                f"{max_rank}."
            )

    def _check_replaced(self, path: str, tensor: Tensor) -> None:
        base = self.targets.parameter(path)
        if base is None:
            raise AdapterMissing(f"The base model has no parameter {path!r} that may be replaced.")
        module = path.rpartition(".")[0]
        may_grow = module in (self.targets.input_embedding, self.targets.output_layer)
        num_rows = tensor.shape[0] if tensor.dim() else 0
        if tensor.shape[1:] != base.shape[1:] or num_rows < base.shape[0]:
            raise AdapterMissing(f"The adapter's shapes do not fit the parameter {path!r}.")
        if num_rows > base.shape[0] and not may_grow:
            raise AdapterMissing(f"The parameter {path!r} has more rows than the base model's.")


def _is_the_same(tensor: Tensor, base: Tensor | None) -> bool:
    if base is None or tensor.shape != base.shape:
        return False
    return torch.equal(tensor.to(base), base)


def _row_norms(weight: Tensor, module: LoraModule, before_bytes: Callable[[int], None]) -> Tensor:
    """[out_features]: |W + scaling · B A| of each row, without building the sum.

    |w|² + 2 scaling · (W Aᵀ) ⊙ B + scaling² · (B (A Aᵀ)) ⊙ B, each summed over its row. weight:
    [out_features, in_features], wherever it is.
    """
    lora_A, lora_B = module.lora_A.to(weight.device), module.lora_B.to(weight.device)
    overlap = lora_A @ lora_A.T
    squares = []
    for first in range(0, weight.shape[0], TILE_SIZE):
        tile = weight[first : first + TILE_SIZE].float()
        before_bytes(tile.nbytes)
        own_B = lora_B[first : first + TILE_SIZE]
        crossed = 2 * (tile @ lora_A.T) + module.scaling * (own_B @ overlap)
        added = (crossed * own_B).sum(dim=1, dtype=torch.float64)
        squares.append(tile.square().sum(dim=1, dtype=torch.float64) + module.scaling * added)
    return torch.cat(squares).clamp(min=0).sqrt().float().cpu()


# Places


def _plan_linears(
    adapter: _Adapter, plan: _Plan, *, before_bytes: Callable[[int], None]
) -> AdapterLayout:
    index_of = {name: index for index, name in enumerate(adapter.targets.linears)}
    entries = []
    for name in adapter.linear_modules:
        target = adapter.targets.by_name[name]
        affine = adapter.affine(target, before_bytes)
        lora_A, lora_B, factor = _factors(adapter, target, affine and affine[0])
        starts = [plan.place(lora_A).start, plan.place(lora_B, factor).start]
        starts += [NOWHERE] * 2 if affine is None else [plan.place(part).start for part in affine]
        entries.append([index_of[name], lora_A.shape[0], lora_B.shape[1], *starts])
    columns = np.ascontiguousarray(np.array(entries, dtype=np.int64).reshape(-1, 7).T)
    return AdapterLayout(*columns)


def _factors(
    adapter: _Adapter, target: Target, gain: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | float]:
    """lora_A [rank, in_features], lora_B [rank, out_features], and what to multiply that with."""
    module = adapter.lora.get(target.name)
    if module is None:
        num_rows, num_columns = adapter.shape(target)
        return torch.empty(0, num_columns), torch.empty(0, num_rows), 1.0
    factor = module.scaling if gain is None else module.scaling * gain
    return module.lora_A, module.lora_B.T, factor


def _plan_module(
    adapter: _Adapter, name: str, plan: _Plan, *, before_bytes: Callable[[int], None]
) -> ModuleParts:
    target, tokens = adapter.targets.by_name[name], adapter.tokens.get(name)
    embedding = None
    if target.is_embedding and name in adapter.lora:
        gain = adapter.gain(target, before_bytes)
        lora_A, lora_B, factor = _factors(adapter, target, gain)
        embedding = EmbeddingParts(
            lora_A=plan.place(lora_A.T),
            lora_B=plan.place(lora_B, factor),
            gain=None if gain is None else plan.place(gain),
        )
    return ModuleParts(
        replaced={key: plan.share(part) for key, part in adapter.replaced_in(name).items()},
        tokens=None
        if tokens is None
        else TokenParts(plan.share(tokens.token_ids), plan.share(tokens.rows)),
        embedding=embedding,
    )
