"""What an adapter changes, taken from PEFT's own modules while they are in memory.

Knows how PEFT wraps a model. Knows nothing of files.
"""

from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from adapters.validate import BaseShape
from adapters.weights import AdapterWeights, LoraModule, TrainedTokens

ADAPTER = "default"
# What PEFT's wrappers put into the path of a parameter.
WRAPPINGS = {"base_layer", "token_adapter", "original_module"}


def weights_of(adapted: peft.PeftModel, base: nn.Module, shape: BaseShape) -> AdapterWeights:
    """`base`: the model without an adapter."""
    model: Any = adapted.base_model.model
    lora, replaced, tokens = {}, _changed(model, base), {}
    for wrapped, module in model.named_modules():
        name = _path(wrapped)
        if isinstance(module, LoraLayer):
            lora[name] = _lora(name, module)
        elif isinstance(module, ModulesToSaveWrapper):
            own = module.modules_to_save[ADAPTER].named_parameters()
            replaced |= {f"{name}.{key}": parameter.detach() for key, parameter in own}
        elif isinstance(module, TrainableTokensWrapper):
            tokens[name] = _tokens(module.token_adapter)
    for name in tokens:
        # Rows behind the base model's are the adapter's own.
        replaced.pop(f"{name}.weight", None)
    return AdapterWeights(
        lora=lora,
        replaced={path: own for path, own in replaced.items() if path in shape.parameters},
        tokens=tokens,
    )


def _path(wrapped: str) -> str:
    """As the base model has it."""
    return ".".join(part for part in wrapped.split(".") if part not in WRAPPINGS)


def _lora(name: str, module: Any) -> LoraModule:
    is_embedding = ADAPTER in module.lora_embedding_A
    pair = (
        (module.lora_embedding_A[ADAPTER], module.lora_embedding_B[ADAPTER])
        if is_embedding
        else (module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight)
    )
    has_dora = ADAPTER in module.lora_magnitude_vector
    return LoraModule(
        name=name,
        lora_A=pair[0].detach(),
        lora_B=pair[1].detach(),
        scaling=module.scaling[ADAPTER],
        magnitude=module.lora_magnitude_vector[ADAPTER].weight.detach() if has_dora else None,
    )


def _tokens(layer: Any) -> TrainedTokens:
    token_ids, order = torch.tensor(layer.token_indices[ADAPTER]).sort()
    return TrainedTokens(token_ids, layer.trainable_tokens_delta[ADAPTER].detach()[order])


def _changed(model: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """Parameters of the base model itself that training has changed, such as biases."""
    before = dict(base.named_parameters(remove_duplicate=False))
    found = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        own = _path(path)
        if own in before and not torch.equal(before[own], parameter):
            found[own] = parameter.detach()
    return found
