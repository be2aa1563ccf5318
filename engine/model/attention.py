"""The attention function that transformers' models call, and the cache that it reads and writes.

What it needs of a step travels as the forward keyword argument `paged`, through the model's own
code; nothing is kept in globals. Knows layers and their caches. Knows nothing of sequences.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from engine.batch import Batch
from engine.errors import UnsupportedModel
from engine.kernels.cpu import AttentionPlan

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


@dataclass(frozen=True, slots=True)
class LayerCall:
    """How one layer calls its attention, beside the tensors."""

    layer: int
    scaling: float
    sliding_window: int | None
    softcap: float | None


class LayerAttention(Protocol):
    """What `paged` must be."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, call: LayerCall) -> Tensor:
        """query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads,
        head_dim] of the new tokens. Gives [num_tokens, num_heads, value_dim]."""


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


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps for each position."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    sliding_window: int | None

    @property
    def bytes_per_token(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class Recorder:
    """Attends to one fresh sequence without a cache, and notes each layer's shape."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, call: LayerCall) -> Tensor:
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


class KVCache:
    """Keys and values of all layers, in blocks; one more than `num_blocks`, for the null block."""

    def __init__(
        self,
        layers: Iterable[LayerShape],
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        # Of each layer: [num_blocks + 1, block_size, num_kv_heads, head_dim]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for layer in layers:
            shape = (num_blocks + 1, block_size, layer.num_kv_heads)
            for caches, dim in ((self.keys, layer.key_dim), (self.values, layer.value_dim)):
                # Not zeroed as a whole: the system gives a host's pages as blocks are first used.
                cache = torch.empty(*shape, dim, dtype=layer.dtype, device=device)
                # Padding reads the null block.
                cache[0].zero_()
                caches.append(cache)


@dataclass(frozen=True, slots=True)
class PagedStep:
    """One step's plan over the cache."""

    cache: KVCache
    plan: AttentionPlan

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, call: LayerCall) -> Tensor:
        keys, values = self.cache.keys[call.layer], self.cache.values[call.layer]
        self.plan.write_kv(keys, key)
        self.plan.write_kv(values, value)
        return self.plan.attend(
            query,
            keys,
            values,
            scaling=call.scaling,
            sliding_window=call.sliding_window,
            softcap=call.softcap,
        )


def forward(model: PreTrainedModel, batch: Batch, cache: KVCache) -> Tensor:
    """[num_sampled, vocab_size] float32: the logits of the batch's `logit_rows`."""
    logits: Tensor = model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        logits_to_keep=batch.logit_rows,
        paged=PagedStep(cache, AttentionPlan(batch)),
    ).logits
    return logits[0].float()
