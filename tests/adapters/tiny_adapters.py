"""Real adapters for the tests: PEFT makes them on a tiny Llama with random weights."""

import hashlib
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
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from adapters import manifest
from adapters.manifest import Manifest
from adapters.store import ArtifactStore
from adapters.validate import BaseShape, Limits

BASE = "tiny-llama"
LIMITS = Limits(max_rank=64, max_size_bytes=1 << 20, max_added_tokens=8)


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

    def read(self, base_shape: BaseShape | None = None) -> Manifest:
        config = self.config_path.read_bytes()
        return manifest.read(config, self.weights_path, base_model=BASE, base_shape=base_shape)

    @property
    def weights_sha256(self) -> str:
        return hashlib.sha256(self.weights_path.read_bytes()).hexdigest()

    async def put(self, store: ArtifactStore, base_shape: BaseShape | None = None) -> str:
        """Store it, and return its digest."""
        one = self.read(base_shape)
        await store.put_adapter(
            one.weights_digest,
            one.canonical_config(),
            self.weights_path,
            weights_sha256=self.weights_sha256,
        )
        return one.weights_digest

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


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    """A model of random weights, the same ones each time."""
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def tiny_gpt2() -> GPT2LMHeadModel:
    """A model with biases, whose linear layers store their weights transposed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4))


def shape_of(model: PreTrainedModel) -> BaseShape:
    """What an adapter may change of a model, as the engine would export it."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    return BaseShape(
        base_model=BASE,
        modules={
            name: (module.in_features, module.out_features)
            if isinstance(module, torch.nn.Linear)
            else (module.nx, module.nf)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D)
        },
        embeddings={names[embedding]: tuple(embedding.weight.shape)},
        parameters={
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if ".wpe." not in name
        },
        output_layer=names[output],
        is_tied=output.weight is embedding.weight,
    )


def save_random(
    folder: Path,
    *,
    model: PreTrainedModel | None = None,
    dtype: torch.dtype = torch.float32,
    save_embedding_layers: bool | str = "auto",
    **options: Any,
) -> Saved:
    """Save a LoRA adapter of which neither A nor B is zero, and all that trains is random."""
    options = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **options}
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model or tiny_llama(), config).to(dtype)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.1
        adapted.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return Saved(folder)
