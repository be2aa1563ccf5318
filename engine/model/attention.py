"""The attention function that transformers' models call.

What it needs of a step travels as the forward keyword argument `paged`, through the model's own
code; nothing is kept in globals. Knows layers. Knows nothing of sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from engine.batch import Batch
from engine.errors import UnsupportedModel
from engine.kernels.choice import AttentionPlan, LoraPlan, WholeStack
from engine.kernels.layer_parts import LayerCall
from engine.model.memory import DeviceMemory, LayerShape

ATTENTION_NAME = "manylora_paged"
# What models pass along that changes nothing for one flat causal batch.
HARMLESS_ARGUMENTS = frozenset(
    {
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "use_cache",
    }
)


class LayerAttention(Protocol):
    """What `paged` must be."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, call: LayerCall) -> Tensor:
        """query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads,
        head_dim] of the new tokens. Gives [num_tokens, num_heads, value_dim]."""

    def serves(self, stack: WholeStack) -> bool:
        """Whether it can attend within the stack's loops."""

    def pass_through(
        self,
        stack: WholeStack,
        hidden: Tensor,
        positions: tuple[Tensor, Tensor],
        calls: Sequence[LayerCall],
        adapters: LoraPlan | None,
    ) -> Tensor:
        """What comes out of the last layer of a stack that it serves."""


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    paged: LayerAttention | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query: [1, num_heads, num_tokens, head_dim]; gives [1, num_tokens, num_heads, value_dim]."""
    if paged is None:
        raise UnsupportedModel("The model's code does not hand keyword arguments on to attention.")
    unknown = {k for k, v in others.items() if v is not None} - HARMLESS_ARGUMENTS
    if unknown or dropout:
        raise UnsupportedModel(f"The model's attention uses {sorted(unknown) or 'dropout'}.")
    if attention_mask is not None:
        raise UnsupportedModel("The model's code builds a mask of its own.")
    if is_causal is False:
        raise UnsupportedModel("The model's attention looks ahead.")
    layer = module.layer_idx
    assert isinstance(layer, int)
    call = LayerCall(
        layer=layer,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    out = paged.attend(_rows(query), _rows(key), _rows(value), call=call)
    return out[None], None


def register() -> None:
    """Make `ATTENTION_NAME` known to transformers. It gets no mask: none is registered for it."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)


def _rows(states: Tensor) -> Tensor:
    """[1, heads, num_tokens, dim] -> [num_tokens, heads, dim]"""
    return states[0].transpose(0, 1)


class Recorder:
    """Attends to one fresh sequence without a cache, and notes each layer's shape."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}
        self._calls: dict[int, LayerCall] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, call: LayerCall) -> Tensor:
        # Windows and caps change nothing here: who calls in another's place must call alike.
        assert self._calls.setdefault(call.layer, call) == call
        self.layers[call.layer] = LayerShape(
            num_kv_heads=key.shape[1],
            key_dim=key.shape[2],
            value_dim=value.shape[2],
            dtype=key.dtype,
            sliding_window=call.sliding_window,
        )
        return scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            is_causal=True,
            scale=call.scaling,
            enable_gqa=True,
        )[0].transpose(0, 1)

    def serves(self, _: WholeStack) -> bool:
        """Never: each layer's attention is wanted."""
        return False


@dataclass(frozen=True, slots=True)
class PagedStep:
    """One step's plan over the blocks."""

    memory: DeviceMemory
    plan: AttentionPlan

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, call: LayerCall) -> Tensor:
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        self.plan.attend(
            query,
            key,
            value,
            key_cache=self.memory.keys[call.layer],
            value_cache=self.memory.values[call.layer],
            out=out,
            scaling=call.scaling,
            sliding_window=call.sliding_window,
            softcap=call.softcap,
        )
        return out

    def serves(self, stack: WholeStack) -> bool:
        return stack.serves(self.plan)

    def pass_through(
        self,
        stack: WholeStack,
        hidden: Tensor,
        positions: tuple[Tensor, Tensor],
        calls: Sequence[LayerCall],
        adapters: LoraPlan | None,
    ) -> Tensor:
        return stack.run(
            hidden,
            *positions,
            plan=self.plan,
            calls=calls,
            keys=self.memory.keys,
            values=self.memory.values,
            adapters=adapters,
        )


def forward(
    model: PreTrainedModel,
    batch: Batch,
    *,
    input_ids: Tensor,
    memory: DeviceMemory,
    plan: AttentionPlan,
) -> Tensor:
    """[num_logits, vocab_size]: the logits of the batch's `logit_rows`, in the model's dtype.

    input_ids: [num_tokens], the batch's, but for ids that the model itself does not know.
    """
    logits: Tensor = model(
        input_ids=input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        # 0 is all of them, as they lie.
        logits_to_keep=0 if batch.wants_all_rows else batch.logit_rows,
        paged=PagedStep(memory, plan),
    ).logits
    return logits[0]
