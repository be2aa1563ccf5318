"""Real adapters for the tests: PEFT makes them on a tiny Llama with random weights."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapters import manifest
from adapters.manifest import Manifest
from adapters.validate import Limits

BASE = "tiny-llama"
LIMITS = Limits(max_rank=64, max_size_bytes=1 << 20)


@dataclass(frozen=True)
class Saved:
    """An adapter as PEFT saved it; the methods spoil or rename parts of it."""

    folder: Path

    @property
    def config_path(self) -> Path:
        return self.folder / "adapter_config.json"

    @property
    def weights_path(self) -> Path:
        return self.folder / "adapter_model.safetensors"

    def read(self) -> Manifest:
        return manifest.read(self.config_path.read_bytes(), self.weights_path, base_model=BASE)

    def edit_config(self, **fields: Any) -> None:
        config = msgspec.json.decode(self.config_path.read_bytes())
        self.config_path.write_bytes(msgspec.json.encode({**config, **fields}))

    def edit_tensors(self, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
        tensors = load_file(self.weights_path)
        edit(tensors)
        save_file(tensors, self.weights_path)

    def as_peft_loads_it(self) -> dict[str, LoraLayer]:
        """The LoRA layers by module path after PEFT has loaded this folder on a new base."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(tiny_llama(), self.folder)
        layers = model.get_base_model().named_modules()
        return {name: layer for name, layer in layers if isinstance(layer, LoraLayer)}


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def save_random(folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Saved:
    """Save a LoRA adapter of which neither A nor B is zero."""
    options = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **options}
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        get_peft_model(tiny_llama(), config).to(dtype).save_pretrained(folder)
    return Saved(folder)
