"""What a layer of the usual form is made of, and what it asks of attention, for kernels."""

from dataclasses import dataclass

from torch import Tensor

from engine.kernels.slot_weights import SlotWeights


@dataclass(frozen=True, slots=True)
class Product:
    """A linear layer, and which of the adapters' modules it is."""

    # [out_features, in_features] float32, or codes of as many rows
    weight: Tensor
    bias: Tensor | None
    module: int | None
    in_features: int
    # Of codes: their format's name, and what else they need
    format: str | None = None
    scales: Tensor | None = None

    @property
    def out_features(self) -> int:
        return len(self.weight)


@dataclass(frozen=True, slots=True)
class Norm:
    """`reference.rms_norm`."""

    weight: Tensor
    eps: float
    offset: float


@dataclass(frozen=True, slots=True)
class LayerParts:
    # Before attention, and before the MLP
    norms: tuple[Norm, Norm]
    query: Product
    key: Product
    value: Product
    after: Product
    gate: Product
    up: Product
    down: Product
    head_dim: int
    # None where there are no adapters
    weights: SlotWeights | None


@dataclass(frozen=True, slots=True)
class LayerCall:
    """How one layer calls its attention, beside the tensors."""

    layer: int
    scaling: float
    sliding_window: int | None
    softcap: float | None
