"""A linear layer whose weight is kept in fewer bits, while all that is around it is not.

Adapters are trained beside whole weights: to whoever asks, the layer's weight is the float32 that
its codes stand for. Knows a layer and its form. Knows nothing of adapters, or of checkpoints.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.kernels.quantised import Format

# What has a weight of that kind.
Linear = nn.Linear | Conv1D


class QuantisedLinear(nn.Module):
    """Stands where a `Linear` stood."""

    def __init__(
        self, layer: Linear, weight: Tensor, *, form: Format, is_tied: bool = False
    ) -> None:
        """`weight` in the order that the layer's own has; `is_tied`: it was the embedding's too."""
        super().__init__()
        self._form = form
        self.is_transposed = isinstance(layer, Conv1D)
        self.is_tied = is_tied
        rows = weight.T if self.is_transposed else weight
        self.out_features, self.in_features = rows.shape
        codes, scales = form.codes_of(rows)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = layer.bias

    @property
    def format_name(self) -> str:
        return self._form.name

    @property
    def weight(self) -> Tensor:
        """float32, in the order of the layer that stood here; made anew each time."""
        rows = self.rows(0, self.out_features)
        return rows.T if self.is_transposed else rows

    def rows(self, first: int, end: int) -> Tensor:
        """float32 [end - first, in_features]: some rows of the weight that the codes stand for."""
        return self._form.rows_of(self.codes, self.scales, first=first, end=end)

    def rounding(self, x: Tensor) -> Tensor | None:
        """What the product adds to x before it multiplies, in float32; None where it adds nothing.

        x: [..., in_features].
        """
        if self._form.rounded is None:
            return None
        rows = x.reshape(-1, self.in_features)
        return (self._form.rounded(rows) - rows.float()).view(x.shape)

    def with_whole(self, parameters: Mapping[str, Tensor]) -> nn.Module:
        """The layer as it was, with another weight, and bias if there is one in `parameters`."""
        make: Any = Conv1D  # has no types
        whole: Any = make(1, 1) if self.is_transposed else nn.Linear(1, 1)
        own = {"weight": parameters["weight"], "bias": parameters.get("bias", self.bias)}
        for name, value in own.items():
            parameter = None if value is None else nn.Parameter(value, requires_grad=False)
            setattr(whole, name, parameter)
        if self.is_transposed:
            # It asks itself for its width.
            whole.nf = self.out_features
        assert isinstance(whole, nn.Module)
        return whole

    def forward(self, x: Tensor) -> Tensor:
        out = self._form.product(x.reshape(-1, self.in_features), self.codes, self.scales)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)
