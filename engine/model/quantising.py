"""Quantise a checkpoint's linear layers while it is read, a tensor at a time.

No more than one layer is ever whole in memory. Embeddings, norms and biases stay as they are; an
output layer that is tied to the embedding gets codes of its own. Knows transformers' way of
loading. Knows nothing of what becomes of the model.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from engine.errors import ConfigurationError, UnsupportedModel
from engine.kernels.choice import Formats
from engine.kernels.quantised import Format
from engine.model.quantised import QuantisedLinear

METHOD = "manylora"


def read(name: str, formats: Formats, **settings: Any) -> PreTrainedModel:
    """As `AutoModelForCausalLM.from_pretrained`.

    Raises ConfigurationError for a form that the model's shapes do not fit, and UnsupportedModel.
    """
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(_Quantiser)
    model = AutoModelForCausalLM.from_pretrained(
        name, quantization_config=_Request(formats), **settings
    )
    assert isinstance(model, PreTrainedModel)
    quantiser: Any = model.hf_quantizer
    # So that its configuration is told as any other's.
    quantiser.remove_quantization_config(model)
    _quantise_the_rest(model, formats)
    return model


class _Request(QuantizationConfigMixin):
    """What `from_pretrained` hands on to the quantiser."""

    # Its own type is an enumeration of transformers' own methods.
    quant_method: Any = METHOD

    def __init__(self, formats: Formats) -> None:
        self.formats = formats

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "format": self.formats.linears.name}


class _Quantiser(HfQuantizer):
    """Tells transformers which tensors are quantised as they come, and how."""

    is_trainable = False

    def is_serializable(self) -> bool:
        return False

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        name, parameter = param_name.rpartition(".")[::2]
        if parameter != "weight" or _is_tied(model, param_name):
            return False
        layer = model.get_submodule(name)
        return is_linear(layer) and self._format_of(model, layer) is not None

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(self)

    def quantise(self, model: nn.Module, name: str, weight: Tensor) -> None:
        layer: Any = model.get_submodule(name)
        form = self._format_of(model, layer)
        assert form is not None
        model.set_submodule(name, QuantisedLinear(layer, weight, form=form))

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        for path, parameter in model.named_parameters():
            if "experts" in path and parameter.dim() == 3:
                raise UnsupportedModel(
                    f"A quantised base is not served for models of experts, whose weights are "
                    f"stacked as in {path!r}: start it with quantization 'none'."
                )
        for name, layer in _linears(model):
            form = self._format_of(model, layer)
            fault = None if form is None else form.fault_of(*_features(layer))
            if form is not None and fault:
                raise ConfigurationError(
                    f"quantization {form.name!r} does not fit the layer {name!r}: {fault}."
                )

    def _format_of(self, model: Any, layer: nn.Module) -> Format | None:
        assert isinstance(self.quantization_config, _Request)
        return _format_of(model, layer, self.quantization_config.formats)


class _Quantise(ConversionOps):
    """Puts a quantised layer into the model, in the place of one whose weight has come."""

    def __init__(self, quantiser: _Quantiser) -> None:
        self._quantiser = quantiser

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **place: Any,
    ) -> dict[str, list[Tensor]]:
        """Gives nothing that is still to be put anywhere."""
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        path = place["full_layer_name"]
        self._quantiser.quantise(place["model"], path.removesuffix(".weight"), weight)
        if place["missing_keys"] is not None:
            place["missing_keys"].discard(path)
        return {}


def is_linear(layer: nn.Module) -> bool:
    return type(layer) in (nn.Linear, Conv1D)


def _linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, layer) for name, layer in model.named_modules() if is_linear(layer))


def _features(layer: Any) -> tuple[int, int]:
    first, second = layer.weight.shape
    return (first, second) if isinstance(layer, Conv1D) else (second, first)


def _format_of(model: Any, layer: nn.Module, formats: Formats) -> Format | None:
    is_output_layer = layer is model.get_output_embeddings()
    return formats.output_layer if is_output_layer else formats.linears


def _is_tied(model: Any, parameter: str) -> bool:
    tied = model.all_tied_weights_keys
    return parameter in tied or parameter in tied.values()


def _quantise_the_rest(model: Any, formats: Formats) -> None:
    """What was no tensor of its own in the checkpoint: tied weights."""
    embedding = model.get_input_embeddings().weight
    for name, layer in list(_linears(model)):
        form = _format_of(model, layer, formats)
        if form is not None:
            is_tied = layer.weight is embedding
            own = QuantisedLinear(layer, layer.weight, form=form, is_tied=is_tied)
            model.set_submodule(name, own)
