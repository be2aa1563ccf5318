"""Let kernels do what a model's own code does to rows between its GEMMs, where they do the same.

Nothing is believed of a module's name. Whatever looks like a norm, a gate, a layer, a linear layer
or an attention with RoPE is tried on what it is really called with, in one run of the model, and
what gives the module's own results is put in place of its `forward`. Anything else goes on as it
was. Knows modules. Knows nothing of sequences.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from engine.kernels.choice import LayerKernels, LoraPlan, RowKernels, WholeLayer, WholeStack
from engine.kernels.layer_parts import LayerCall, LayerParts, Norm, Product
from engine.model.lora import LoraBank, LoraLinear
from engine.model.quantised import QuantisedLinear

# ‖fused - own‖ / ‖own‖. The model's own code rounds after each of its operations, ours once.
BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# The same where inputs of layers are rounded: what differs by float32's last bit may fall on either
# side of a step, of which a row has 127.
ROUNDED_BOUND = 5e-3
# What modules may come to that only look like what they are tried as.
MISFITS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# What models call RoPE's function.
ROTATION = "apply_rotary_pos_emb"
# Of a weight as it is, and of one that is kept as what it differs from one.
NORM_OFFSETS = (0.0, 1.0)

# A module's `forward`, with the module as its first argument
Forward = Callable[..., Any]


def fuse(
    model: nn.Module,
    kernels: RowKernels,
    run: Callable[[], object],
    *,
    whole: LayerKernels | None = None,
    is_rounded: bool = False,
) -> list[str]:
    """The paths of the modules whose `forward` was replaced. `run` runs the model a few tokens.

    `whole`: for linear layers, and for layers that can be had in fewer pieces than their parts.
    `is_rounded`: whether the inputs of its linear layers are.
    """
    bound = ROUNDED_BOUND if is_rounded else 0.0
    if whole is not None:
        _replace_fitting(model, partial(_linears, whole), run, bound=bound)
    fused = _replace_fitting(model, partial(_parts, kernels), run, bound=bound)
    # A layer is known by its parts.
    fused += _replace_fitting(model, partial(_layers, whole), run, bound=bound)
    if whole is not None:
        _join_layers(model, whole, run)
    return fused


def _replace_fitting(
    model: nn.Module,
    candidates_for: Callable[[nn.Module], Iterable[Forward]],
    run: Callable[[], object],
    *,
    bound: float,
) -> list[str]:
    trials = {
        name: _Trial(list(candidates_for(module)), bound) for name, module in model.named_modules()
    }
    trials = {name: trial for name, trial in trials.items() if trial.candidates}
    handles = [
        model.get_submodule(name).register_forward_hook(trial, with_kwargs=True)
        for name, trial in trials.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    fitting = {name: trial.candidates[0] for name, trial in trials.items() if trial.is_passed}
    for name, forward in fitting.items():
        module = model.get_submodule(name)
        # A method of the module, so that a copy of the module has one of its own.
        setattr(module, "forward", MethodType(forward, module))  # noqa: B010 a method, to mypy
    return list(fitting)


@dataclass(slots=True)
class _Trial:
    """Of these are left those that give what the module gives."""

    candidates: list[Forward]
    # Where it is above that of the dtype
    bound: float
    was_called: bool = False

    @property
    def is_passed(self) -> bool:
        return self.was_called and bool(self.candidates)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self.was_called = True
        self.candidates = [
            forward
            for forward in self.candidates
            if self._gives(forward, module, args, kwargs, output)
        ]

    def _gives(
        self,
        forward: Forward,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        expected: Any,
    ) -> bool:
        try:
            found = forward(module, *args, **kwargs)
        except MISFITS:
            return False
        found, expected = (
            each[0] if isinstance(each, tuple) else each for each in (found, expected)
        )
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return False
        bound = max(self.bound, BOUNDS[expected.dtype])
        error = torch.linalg.vector_norm(found.float() - expected.float())
        return bool(error <= bound * torch.linalg.vector_norm(expected.float()))


# Linear layers


def _linears(kernels: LayerKernels, module: nn.Module) -> Iterator[Forward]:
    if type(module) is nn.Linear:
        yield _Linear(kernels)


@dataclass(frozen=True, slots=True)
class _Linear:
    kernels: LayerKernels

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        return self.kernels.linear(x, module.weight, module.bias)


# Norms, gates and RoPE


def _parts(kernels: RowKernels, module: nn.Module) -> Iterator[Forward]:
    yield from _norms(kernels, module)
    children = {name for name, _ in module.named_children()}
    if {"gate_proj", "up_proj", "down_proj"} <= children:
        yield _Gated(kernels)
    if {"gate_up_proj", "down_proj"} <= children:
        yield _GatedAtOnce(kernels)
    yield from _with_rotation(kernels, module)


def _norms(kernels: RowKernels, module: nn.Module) -> Iterator[Forward]:
    dims = {name: parameter.dim() for name, parameter in module.named_parameters()}
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if dims == {"weight": 1} and isinstance(eps, float):
        for offset in NORM_OFFSETS:
            yield _Norm(kernels, eps, offset)


@dataclass(frozen=True, slots=True)
class _Norm:
    kernels: RowKernels
    eps: float
    offset: float

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, module.weight, eps=self.eps, offset=self.offset)

    def of_sum(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and its norm."""
        return self.kernels.add_rms_norm(x, residual, weight, eps=self.eps, offset=self.offset)


@dataclass(frozen=True, slots=True)
class _Gated:
    kernels: RowKernels

    def __call__(self, module: Any, x: Tensor) -> Any:
        return module.down_proj(_silu_mul(module.gate_proj(x), module.up_proj(x), self.kernels))


@dataclass(frozen=True, slots=True)
class _GatedAtOnce:
    kernels: RowKernels

    def __call__(self, module: Any, x: Tensor) -> Any:
        gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
        return module.down_proj(_silu_mul(gate, up, self.kernels))


def _silu_mul(gate: Tensor, up: Tensor, kernels: RowKernels) -> Tensor:
    return kernels.silu_mul(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape)


def _with_rotation(kernels: RowKernels, module: nn.Module) -> Iterator[Forward]:
    """The module's own code, in which one name means another function."""
    own = type(module).forward
    if isinstance(own, FunctionType) and ROTATION in own.__code__.co_names:
        names = own.__globals__ | {ROTATION: partial(_rotated, kernels)}
        code, defaults, cells = own.__code__, own.__defaults__, own.__closure__
        forward = FunctionType(code, names, own.__name__, defaults, cells)
        forward.__kwdefaults__ = own.__kwdefaults__
        yield forward


def _rotated(
    kernels: RowKernels, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """query, key: [1, heads, num_tokens, head_dim]; cos, sin: [1, num_tokens, dims]."""
    turned = kernels.rotate(query[0].transpose(0, 1), key[0].transpose(0, 1), cos[0], sin[0])
    return turned[0].transpose(0, 1)[None], turned[1].transpose(0, 1)[None]


# Layers


def _layers(whole: LayerKernels | None, module: nn.Module) -> Iterator[Forward]:
    """Those with one norm before each of their two parts, and nothing else on the way."""
    parts = dict(module.named_children())
    if {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"} <= parts.keys():
        norm, mlp = _fused(parts["post_attention_layernorm"]), _fused(parts["mlp"])
        if isinstance(norm, _Norm) and isinstance(mlp, _Gated | _GatedAtOnce):
            if whole is not None:
                yield from _in_loops(whole, module, _Layer(norm))
            yield _Layer(norm)


def _fused(module: nn.Module) -> Any:
    """What replaces the module's `forward`, if anything does."""
    return getattr(vars(module).get("forward"), "__func__", None)


@dataclass(frozen=True, slots=True)
class _Layer:
    # The one between attention and MLP
    norm: _Norm

    def __call__(self, layer: Any, hidden_states: Tensor, **others: Any) -> Any:
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **others)
        norm = layer.post_attention_layernorm
        if norm._forward_hooks:
            # An adapter of this step has a norm of its own.
            total = hidden_states + attended
            normed = norm(total)
        else:
            total, normed = self.norm.of_sum(attended, hidden_states, norm.weight)
        return total + layer.mlp(normed)


# Layers in fewer pieces than their parts

_LAYER_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_PARTS = ("gate_proj", "up_proj", "down_proj")


def _in_loops(kernels: LayerKernels, layer: Any, by_parts: _Layer) -> Iterator[Forward]:
    """Such as have a part of their own for each product, and nothing else with parameters."""
    linears = _linears_of(layer)
    is_rotated = isinstance(_fused(layer.self_attn), FunctionType)
    norms = [_fused(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    if linears is None or not is_rotated or not all(isinstance(norm, _Norm) for norm in norms):
        return
    try:
        made, call = kernels.layer(_parts_of(layer, linears, norms)), _call_of(layer.self_attn)
    except MISFITS:
        return
    watchers = [
        hooks
        for module in layer.modules()
        if module is not layer
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
    ]
    yield _LayerInLoops(kernels, made, call, by_parts, _bank_of(linears), watchers)


def _linears_of(layer: Any) -> dict[str, nn.Module] | None:
    """By name. None where there is one too many, or too few."""
    attention, mlp = dict(layer.self_attn.named_children()), dict(layer.mlp.named_children())
    if attention.keys() != set(_ATTENTION_PARTS) or not mlp.keys() >= set(_MLP_PARTS):
        return None
    others = [part for name, part in mlp.items() if name not in _MLP_PARTS]
    others += [part for name, part in layer.named_children() if name not in _LAYER_PARTS]
    has_others = any(True for part in others for _ in part.parameters())
    linears = {name: (attention | mlp)[name] for name in (*_ATTENTION_PARTS, *_MLP_PARTS)}
    return linears if not has_others and all(map(_is_linear, linears.values())) else None


def _is_linear(linear: nn.Module) -> bool:
    own = _base_of(linear)
    return type(own) is nn.Linear or (isinstance(own, QuantisedLinear) and not own.is_transposed)


def _base_of(linear: Any) -> Any:
    return linear.base if isinstance(linear, LoraLinear) else linear


def _bank_of(linears: Mapping[str, nn.Module]) -> LoraBank | None:
    (bank,) = {each.bank if isinstance(each, LoraLinear) else None for each in linears.values()}
    return bank


def _parts_of(layer: Any, linears: Mapping[str, Any], norms: list[Any]) -> LayerParts:
    own = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
    first, second = (
        Norm(weight, norm.eps, norm.offset) for weight, norm in zip(own, norms, strict=True)
    )
    query, key, value, after, gate, up, down = map(_product_of, linears.values())
    bank = _bank_of(linears)
    return LayerParts(
        (first, second),
        query,
        key,
        value,
        after,
        gate,
        up,
        down,
        head_dim=layer.self_attn.head_dim,
        weights=None if bank is None else bank.weights,
    )


def _call_of(attention: Any) -> LayerCall:
    return LayerCall(
        layer=attention.layer_idx,
        scaling=attention.scaling,
        sliding_window=getattr(attention, "sliding_window", None),
        softcap=None,
    )


def _product_of(linear: Any) -> Product:
    base, module = _base_of(linear), linear.index if isinstance(linear, LoraLinear) else None
    if isinstance(base, QuantisedLinear):
        return Product(
            base.codes,
            base.bias,
            module,
            in_features=base.in_features,
            format=base.format_name,
            scales=base.scales,
        )
    return Product(base.weight, base.bias, module, in_features=base.in_features)


@dataclass(frozen=True, slots=True)
class _LayerInLoops:
    kernels: LayerKernels
    made: WholeLayer
    # As its attention calls, but for a window, which may be another one now
    call: LayerCall
    # For steps in which anybody listens to a part, or adapters do more than the loops do.
    by_parts: _Layer
    bank: LoraBank | None
    # The hooks of all parts
    watchers: list[Mapping[int, Any]]
    # Of the layers that can run at once, and whether this is the first of them
    chain: "_Chain | None" = None
    leads: bool = False

    @property
    def adapters(self) -> LoraPlan | None:
        return None if self.bank is None else self.bank.plan

    def serves(self) -> bool:
        """Whether this step can do without its parts."""
        return not any(self.watchers) and self.kernels.serves(self.adapters)

    def __call__(
        self,
        layer: Any,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        paged: Any = None,
        **others: Any,
    ) -> Any:
        chain = self.chain
        if chain is not None:
            if hidden_states is chain.result:
                return hidden_states
            if self.leads:
                chain.result = None
                if chain.serves(paged):
                    assert position_embeddings is not None, "there is no RoPE"
                    chain.result = chain.pass_through(
                        hidden_states, position_embeddings, paged=paged
                    )
                    return chain.result
        if not self.serves():
            return self.by_parts(
                layer,
                hidden_states,
                position_embeddings=position_embeddings,
                paged=paged,
                **others,
            )
        assert position_embeddings is not None, "there is no RoPE"
        adapters = self.adapters
        states = self.made.enter(hidden_states, *position_embeddings, adapters=adapters)
        has_window = self.call.sliding_window is not None
        call = _call_of(layer.self_attn) if has_window else self.call
        attended = paged.attend(*states, call=call)
        return self.made.leave(attended, hidden_states, adapters=adapters)


# All layers at once


@dataclass(slots=True)
class _Chain:
    """Layers of which the first may do the work of all: the others hand on what it gave."""

    stack: WholeStack
    first: _LayerInLoops
    attentions: list[Any]
    # As these call, but for windows, which may be others now
    known_calls: list[LayerCall]
    # The hooks of all layers, and of the others' parts
    watchers: list[Mapping[int, Any]]
    result: Tensor | None = None

    def serves(self, paged: Any) -> bool:
        """Whether this step can do without its layers."""
        return not any(self.watchers) and self.first.serves() and paged.serves(self.stack)

    def pass_through(
        self, hidden: Tensor, positions: tuple[Tensor, Tensor], *, paged: Any
    ) -> Tensor:
        """What the last layer gives, in a step that it serves."""
        found: Tensor = paged.pass_through(
            self.stack, hidden, positions, self._calls(), self.first.adapters
        )
        return found

    def _calls(self) -> Sequence[LayerCall]:
        """The very same object where nothing has changed for certain."""
        if all(call.sliding_window is None for call in self.known_calls):
            return self.known_calls
        return [_call_of(attention) for attention in self.attentions]


class _Call(NamedTuple):
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def received(self) -> tuple[Any, ...]:
        return *self.args, *self.kwargs.values()


def _calls_of(modules: Iterable[nn.Module], run: Callable[[], object]) -> list[_Call]:
    """In the order in which they end."""
    calls: list[_Call] = []
    handles = [
        module.register_forward_hook(lambda *call: calls.append(_Call(*call)), with_kwargs=True)
        for module in modules
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _join_layers(model: nn.Module, kernels: LayerKernels, run: Callable[[], object]) -> None:
    for body in list(model.modules()):
        for layers in body.children():
            if isinstance(layers, nn.ModuleList) and len(layers) > 1:
                own = [_fused(layer) for layer in layers]
                if all(isinstance(each, _LayerInLoops) for each in own) and _follow(layers, run):
                    _join(kernels, layers, own)
                    _shorten(body, layers, run)


def _follow(layers: nn.ModuleList, run: Callable[[], object]) -> bool:
    """Whether each is called, once and in order, with what the one before gave, and with no more
    than all of them get."""
    calls = _calls_of(layers, run)
    return [call.module for call in calls] == list(layers) and all(
        len(args) == 1
        and args[0] is before.output
        and others.keys() == before.kwargs.keys()
        and all(others[name] is before.kwargs[name] for name in ("position_embeddings", "paged"))
        for before, (_, args, others, _) in pairwise(calls)
    )


def _join(kernels: LayerKernels, layers: nn.ModuleList, own: Sequence[_LayerInLoops]) -> None:
    try:
        stack = kernels.stack([each.made for each in own])
    except MISFITS:
        return
    hooks = [each for layer in layers for each in (layer._forward_hooks, layer._forward_pre_hooks)]
    watchers = [*hooks, *(each for one in own[1:] for each in one.watchers)]
    attentions = [layer.self_attn for layer in layers]
    chain = _Chain(stack, own[0], attentions, [each.call for each in own], watchers)
    for layer, each in zip(layers, own, strict=True):
        joined = replace(each, chain=chain, leads=each is own[0])
        setattr(layer, "forward", MethodType(joined, layer))  # noqa: B010 a method, to mypy


# From token ids to the last norm


@dataclass(frozen=True, slots=True)
class _Body:
    """Where the model's own code calls one part after the other, and nothing else.

    Beside all layers at once, its checks and wrappers took a millisecond of each step.
    """

    own: Forward
    embed: nn.Module
    rotary: nn.Module
    norm: nn.Module
    chain: _Chain
    output: type[ModelOutput]

    def __call__(
        self,
        body: Any,
        *,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        paged: Any = None,
        **others: Any,
    ) -> Any:
        is_usual = input_ids is not None and paged is not None and not any(others.values())
        if not is_usual or not self.chain.serves(paged):
            return self.own(input_ids=input_ids, position_ids=position_ids, paged=paged, **others)
        hidden = self.embed(input_ids)
        positions = self.rotary(hidden, position_ids)
        states = self.chain.pass_through(hidden, positions, paged=paged)
        return self.output(last_hidden_state=self.norm(states))


def _shorten(body: nn.Module, layers: nn.ModuleList, run: Callable[[], object]) -> None:
    """Go from part to part where the model's own code hands on the very objects that these give."""
    first, parts = _fused(layers[0]), [part for part in body.children() if part is not layers]
    calls = _calls_of([*parts, layers[0], layers[-1], body], run)
    is_usual = len(parts) == 3 and len(calls) == 6 and calls[-1].module is body
    if not is_usual or [call.module for call in calls[2:4]] != [layers[0], layers[-1]]:
        return
    embed, rotary, entered, left, norm, whole = calls
    given, output = whole.kwargs, whole.output
    if (
        first.chain is not None
        and {"input_ids", "position_ids", "paged"} <= given.keys()
        and _are(embed.received, given["input_ids"])
        and _are(rotary.received, embed.output, given["position_ids"])
        and entered.args[0] is embed.output
        and entered.kwargs["position_embeddings"] is rotary.output
        and entered.kwargs["paged"] is given["paged"]
        and _are(norm.received, left.output)
        and isinstance(output, ModelOutput)
        and output.keys() == {"last_hidden_state"}
        and output["last_hidden_state"] is norm.output
    ):
        straight = _Body(
            body.forward, embed.module, rotary.module, norm.module, first.chain, type(output)
        )
        setattr(body, "forward", MethodType(straight, body))  # noqa: B010 a method, to mypy


def _are(found: Sequence[object], *expected: object) -> bool:
    return len(found) == len(expected) and all(map(operator.is_, found, expected))
