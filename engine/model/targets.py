"""Find what of a model adapters may change, and prove by running that rows do not meet there.

A module can be computed with another adapter's parameters row by row where its output for a token
depends on that token alone. Knows models. Knows nothing of adapters in particular.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.validate import BaseShape
from engine.model.quantised import QuantisedLinear

# |a row alone - the row among others| / |the row|. GEMMs of other sizes round otherwise, by up to
# 1e-2 in bfloat16; a module in which tokens meet is off by about 1.
MAX_MIXING = 0.05
# Rows of the longest prompt that are computed again alone.
CHECKED_ROWS = (2, 4)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """How many token ids are known."""

    # As input: rows of the embedding.
    num_input_ids: int
    # As output: logits.
    num_output_ids: int

    def joined(self, other: "Vocabulary") -> "Vocabulary":
        return Vocabulary(
            max(self.num_input_ids, other.num_input_ids),
            max(self.num_output_ids, other.num_output_ids),
        )


@dataclass(frozen=True, slots=True)
class Target:
    """A module of the base model that treats each token by itself."""

    name: str
    module: nn.Module
    # Which dimension of its input and output counts tokens.
    token_dim: int

    @property
    def is_linear(self) -> bool:
        return type(self.module) in (nn.Linear, Conv1D, QuantisedLinear)

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.module, nn.Embedding)

    @property
    def rows(self) -> Tensor:
        """[out_features, in_features], or of an embedding [num_embeddings, dim]: its weight.

        Of a quantised layer what its codes stand for, in float32, made anew each time.
        """
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return self.rows_of(weight)

    def rows_of(self, weight: Tensor) -> Tensor:
        """As `rows`, of a weight in this one's place."""
        is_transposed = isinstance(self.module, Conv1D) or getattr(
            self.module, "is_transposed", False
        )
        return weight.T if is_transposed else weight

    def tile(self, first: int, end: int) -> Tensor:
        """Some of `rows`."""
        if isinstance(self.module, QuantisedLinear):
            return self.module.rows(first, end)
        return self.rows[first:end]

    @property
    def shape(self) -> tuple[int, int]:
        """Of `rows`."""
        if isinstance(self.module, QuantisedLinear):
            return self.module.out_features, self.module.in_features
        num_rows, num_columns = self.rows.shape
        return num_rows, num_columns

    @property
    def features(self) -> tuple[int, int]:
        """in_features and out_features, or num_embeddings and dim."""
        first, second = self.shape
        return (first, second) if self.is_embedding else (second, first)

    @property
    def embed_scale(self) -> float | Tensor:
        """What an embedding multiplies its rows by; 1 for most."""
        scale: float | Tensor = getattr(self.module, "embed_scale", 1)
        return scale.to(self.rows.dtype) if torch.is_tensor(scale) else scale

    def rounding(self, x: Tensor) -> Tensor | None:
        """As `QuantisedLinear.rounding`."""
        return self.module.rounding(x) if isinstance(self.module, QuantisedLinear) else None

    def parameter(self, name: str) -> Tensor | None:
        """The module's own, as adapters know it."""
        if isinstance(self.module, QuantisedLinear) and name == "weight":
            return self.module.weight
        return self.module.get_parameter(name) if name in self.parameter_shapes else None

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """By name in the module, those that an adapter may replace."""
        own = {key: tuple(p.shape) for key, p in self.module.named_parameters(recurse=False)}
        if not isinstance(self.module, QuantisedLinear):
            return own
        is_transposed = self.module.is_transposed
        shape = self.shape[::-1] if is_transposed else self.shape
        return {"weight": shape} | {key: own[key] for key in own.keys() & {"bias"}}


@dataclass(frozen=True, slots=True)
class Targets:
    """All that adapters may change, by path, as the base model has it."""

    by_name: Mapping[str, Target]
    # By path: parameters that stack the weights of many experts, which no adapter may change.
    experts: Mapping[str, Tensor]
    # Paths of the embedding that token ids go through, and of the layer that gives the logits;
    # None where adapters can't have these.
    input_embedding: str | None
    output_layer: str | None
    # The base model's.
    vocabulary: Vocabulary
    is_tied: bool

    @property
    def linears(self) -> dict[str, Target]:
        return {name: target for name, target in self.by_name.items() if target.is_linear}

    @property
    def embeddings(self) -> dict[str, Target]:
        return {name: target for name, target in self.by_name.items() if target.is_embedding}

    def parameter(self, path: str) -> Tensor | None:
        """The base model's own, by its path."""
        module, _, name = path.rpartition(".")
        target = self.by_name.get(module)
        return target.parameter(name) if target and name else None

    def shape(self, base_model: str) -> BaseShape:
        """`base_model`: the served name."""
        return BaseShape(
            base_model=base_model,
            modules={name: target.features for name, target in self.linears.items()},
            # That of token ids first.
            embeddings={
                name: target.features
                for name, target in sorted(
                    self.embeddings.items(), key=lambda item: item[0] != self.input_embedding
                )
            },
            parameters={
                f"{target.name}.{name}": shape
                for target in self.by_name.values()
                for name, shape in target.parameter_shapes.items()
            },
            experts={path: tuple(weights.shape) for path, weights in self.experts.items()},
            output_layer=self.output_layer,
            is_tied=self.is_tied,
        )


@dataclass(slots=True)
class _Calls:
    """What one module was called with while some prompts ran."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    # Whether each call had one tensor and gave one.
    are_simple: bool = True

    def note(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        if len(args) == 1 and not kwargs and torch.is_tensor(args[0]) and torch.is_tensor(output):
            self.inputs.append(args[0])
            self.outputs.append(output)
        else:
            self.are_simple = False


class Watch:
    """Notes the calls of the modules that have parameters, and no parts, while prompts run."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._calls: dict[str, _Calls] = {}
        self._handles = []
        for name, module in model.named_modules():
            has_parts = any(True for _ in module.children())
            if not has_parts and any(True for _ in module.parameters()):
                calls = self._calls[name] = _Calls()
                self._handles.append(module.register_forward_hook(calls.note, with_kwargs=True))

    def end(self, lengths: list[int]) -> Targets:
        """`lengths`: of the prompts that ran meanwhile, one after the other."""
        for handle in self._handles:
            handle.remove()
        by_name = {}
        for name, calls in self._calls.items():
            module = self._model.get_submodule(name)
            token_dim = _token_dim(calls, lengths)
            if token_dim is None or not _keeps_tokens_apart(module, calls, token_dim):
                continue
            target = Target(name, module, token_dim)
            if not target.is_embedding or _looks_up(target, calls):
                by_name[name] = target
        return _targets(self._model, by_name)


def _token_dim(calls: _Calls, lengths: list[int]) -> int | None:
    """Where tokens are counted; None unless each prompt was one call with just its own tokens."""
    if not calls.are_simple or len(calls.inputs) != len(lengths):
        return None
    for dim, lead in ((1, (1,)), (0, ()), (2, (1, 1))):
        if all(
            tensor.shape[: dim + 1] == (*lead, length)
            for tensors in (calls.inputs, calls.outputs)
            for tensor, length in zip(tensors, lengths, strict=True)
        ):
            return dim
    return None


def _keeps_tokens_apart(module: nn.Module, calls: _Calls, token_dim: int) -> bool:
    start, end = CHECKED_ROWS
    x, among_others = (
        tensor.narrow(token_dim, start, end - start)
        for tensor in (calls.inputs[-1], calls.outputs[-1])
    )
    alone: Tensor = module(x)
    error = torch.linalg.vector_norm((alone - among_others).float())
    return bool(error <= MAX_MIXING * torch.linalg.vector_norm(among_others.float()))


def _looks_up(target: Target, calls: _Calls) -> bool:
    """Whether the embedding is a row of its weight for each id, scaled at most."""
    if calls.inputs[-1].is_floating_point():
        return False
    rows = target.rows[calls.inputs[-1]] * target.embed_scale
    return rows.shape == calls.outputs[-1].shape and torch.equal(rows, calls.outputs[-1])


def _targets(model: PreTrainedModel, by_name: dict[str, Target]) -> Targets:
    untyped: Any = model
    ways_in, ways_out = untyped.get_input_embeddings(), untyped.get_output_embeddings()
    output_layer, num_input_ids = _name_of(ways_out, by_name), ways_in.num_embeddings
    num_output_ids = by_name[output_layer].features[1] if output_layer else num_input_ids
    return Targets(
        by_name=by_name,
        experts=_experts(model, by_name),
        input_embedding=_name_of(ways_in, by_name),
        output_layer=output_layer,
        vocabulary=Vocabulary(num_input_ids, num_output_ids),
        is_tied=_is_tied(ways_in, ways_out),
    )


def _is_tied(way_in: Any, way_out: Any) -> bool:
    if isinstance(way_out, QuantisedLinear):
        return way_out.is_tied
    return way_out is not None and way_out.weight is way_in.weight


def _experts(model: nn.Module, by_name: dict[str, Target]) -> dict[str, Tensor]:
    """What has a third dimension, and belongs to no module in which each token is by itself."""
    return {
        path: parameter
        for path, parameter in model.named_parameters()
        if parameter.dim() == 3 and path.rpartition(".")[0] not in by_name
    }


def _name_of(module: nn.Module | None, by_name: dict[str, Target]) -> str | None:
    return next((name for name, target in by_name.items() if target.module is module), None)
