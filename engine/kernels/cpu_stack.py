"""All layers of a step in one compiled loop.

Between the loops of `cpu_layers` a step goes back to Python some ninety times, and finds its caches
full of weights there. Here the threads go from layer to layer by themselves; what Python does is
done once for all of them. Knows addresses and sizes. Knows nothing of modules.
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from engine.kernels.cpu_attention import (
    ATTENTION_CALL,
    CompiledAttention,
    attend_rows,
    fetch_places,
    store_rows,
)
from engine.kernels.cpu_layers import (
    ENTER_CALL,
    LEAVE_CALL,
    CompiledLayer,
    Step,
    Workspace,
    enter_rows,
    leave_rows,
)
from engine.kernels.cpu_lora import CompiledLora
from engine.kernels.layer_parts import LayerCall, LayerParts
from engine.kernels.loops import barrier, call_at, loop, run
from engine.kernels.products import linear

# Addresses of the calls of all layers, those of a kind one behind the other.
_STACK_CALL = np.dtype([(name, np.int64) for name in ("enters", "attends", "leaves", "num_layers")])
_ENTER_BYTES, _ATTEND_BYTES, _LEAVE_BYTES = (
    call.itemsize for call in (ENTER_CALL, ATTENTION_CALL, LEAVE_CALL)
)
_enter_at, _attend_at, _leave_at = (
    call_at(call) for call in (ENTER_CALL, ATTENTION_CALL, LEAVE_CALL)
)


def _stack(pointer: Any) -> None:
    call = numba.carray(pointer, 1)[0]
    for layer in range(call.num_layers):
        attend = numba.carray(_attend_at(call.attends + layer * _ATTEND_BYTES), 1)[0]
        fetch_places(attend)
        enter_rows(numba.carray(_enter_at(call.enters + layer * _ENTER_BYTES), 1)[0])
        # Each thread those rows whose keys it has just turned.
        store_rows(attend)
        barrier()
        attend_rows(attend)
        barrier()
        leave_rows(numba.carray(_leave_at(call.leaves + layer * _LEAVE_BYTES), 1)[0])
        barrier()


_STACK = loop(_stack, _STACK_CALL)


class CompiledStack:
    """Neighbouring layers, each with the output of the one before. Mutable; one thread."""

    def __init__(self, layers: Sequence[CompiledLayer]) -> None:
        """Raises AssertionError for layers that differ in more than their weights."""
        first = layers[0]
        assert all((each.width, each.heads) == (first.width, first.heads) for each in layers)
        assert all(each.inner_width == first.inner_width for each in layers)
        self._layers = layers
        self._workspace = Workspace()
        self._enters = np.concatenate([each.enter_call for each in layers])
        self._leaves = np.concatenate([each.leave_call for each in layers])
        self._attends = np.zeros(len(layers), dtype=ATTENTION_CALL)
        self._call = np.zeros(1, dtype=_STACK_CALL)
        call = self._call[0]
        call["enters"], call["leaves"] = self._enters.ctypes.data, self._leaves.ctypes.data
        call["attends"], call["num_layers"] = self._attends.ctypes.data, len(layers)
        self._address: int = self._call.ctypes.data
        # What the calls were filled in from.
        self._known: tuple[Sequence[LayerCall], Sequence[Tensor]] = ((), ())

    def serves(self, plan: object) -> bool:
        """Whether its loop reads what this plan says."""
        return isinstance(plan, CompiledAttention)

    def run(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        plan: object,
        calls: Sequence[LayerCall],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        adapters: object,
    ) -> Tensor:
        """As `WholeStack.run`."""
        assert isinstance(plan, CompiledAttention)
        # A layer's output takes its input's place.
        out = hidden.clone(memory_format=torch.contiguous_format)
        first, workspace = self._layers[0], self._workspace
        step = Step(out.numel() // first.width, adapters, workspace)
        sizes = [heads * head_dim for heads, head_dim in first.heads]
        states = [
            workspace.take(name, step.num_rows * size)
            for name, size in zip(("query", "key", "value"), sizes, strict=True)
        ]
        attended = workspace.take("attended", step.num_rows * sizes[0])
        first.prepare_enter(self._enters, step, out.data_ptr(), states, cos=cos, sin=sin)
        first.prepare_leave(self._leaves, step, (attended, out.data_ptr(), out.data_ptr()))
        if calls is not self._known[0] or keys is not self._known[1]:
            self._read(calls, keys, values)
        self._attends["query"], self._attends["new_keys"], self._attends["new_values"] = states
        self._attends["out"] = attended
        (heads, head_dim), (kv_heads, _) = first.heads[:2]
        group = heads // kv_heads
        plan.describe(self._attends, group=group, key_dim=head_dim, value_dim=head_dim)
        run(_STACK, self._address)
        return out

    def _read(
        self, calls: Sequence[LayerCall], keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        """Fill in what does not change from step to step."""
        own, (heads, head_dim), (kv_heads, _) = self._attends, *self._layers[0].heads[:2]
        own["scaling"] = [call.scaling for call in calls]
        own["window"] = [call.sliding_window or 0 for call in calls]
        own["softcap"] = [call.softcap or 0.0 for call in calls]
        own["keys"] = [keys[call.layer].data_ptr() for call in calls]
        own["values"] = [values[call.layer].data_ptr() for call in calls]
        own["block_stride"] = [keys[call.layer].stride(0) for call in calls]
        own["query_row"], own["num_kv_heads"] = heads * head_dim, kv_heads
        own["new_key_row"] = own["new_value_row"] = kv_heads * head_dim
        own["group"] = heads // kv_heads
        for name in ("query_head", "new_key_head", "new_value_head", "key_dim", "value_dim"):
            own[name] = head_dim
        self._known = calls, keys


class CompiledLayers:
    """Makes the layers of one model."""

    def __init__(self) -> None:
        self._workspace = Workspace()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As `torch.nn.functional.linear`."""
        return linear(x, weight, bias)

    def layer(self, parts: LayerParts) -> CompiledLayer:
        """Raises AssertionError for parts that the loops cannot read."""
        return CompiledLayer(parts, self._workspace)

    def stack(self, layers: Sequence[object]) -> CompiledStack:
        """Raises AssertionError for layers that no loop can take together."""
        own = [layer for layer in layers if isinstance(layer, CompiledLayer)]
        assert len(own) == len(layers)
        return CompiledStack(own)

    def serves(self, adapters: object) -> bool:
        """Whether the loops do all that these adapters do."""
        return adapters is None or (isinstance(adapters, CompiledLora) and not adapters.is_affine)
