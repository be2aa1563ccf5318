"""Adapters on a quantised base are computed as PEFT computes them on what its codes stand for."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig

from engine import batch as batches
from engine.config import EngineConfig
from engine.model.loader import LoadedModel, load
from engine.model.memory import DeviceMemory
from engine.model.prepared import prepare
from engine.model.quantised import QuantisedLinear
from engine.probe import examine
from engine.runner import Runner
from engine.scheduler import ScheduledSequence
from engine.sequence import NO_ADAPTER, Sequence
from tests.model_lab import (
    save_quietly,
    save_random_model,
    store,
    tiny_llama_config,
    train_a_little,
)

VOCAB_SIZE = 257
PROMPT = [(37 * i + 5) % VOCAB_SIZE for i in range(29)]
# Of the largest logit. Where inputs are rounded, float32's last bit decides some of the roundings.
MAX_ERROR = {"bf16": 1e-4, "int8": 1e-4, "int4": 1e-4, "int8-dynamic": 3e-2}

SIZES = {"hidden_size": 64, "intermediate_size": 96}
MODELS: dict[str, PretrainedConfig] = {
    "llama": tiny_llama_config(**SIZES, attention_bias=True, tie_word_embeddings=False),
    "gpt2": GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=128,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    ),
}
NAMES = {
    "llama": ("q_proj", "o_proj", "down_proj", "embed_tokens"),
    "gpt2": ("c_attn", "c_proj", "c_fc", "wte"),
}


def features(family: str) -> dict[str, dict[str, Any]]:
    attention, output, mlp, embedding = NAMES[family]
    some = [attention, output, mlp]
    return {
        "LoRA": {"target_modules": some},
        "DoRA": {"target_modules": some, "use_dora": True},
        "bias": {"target_modules": [attention], "bias": "all"},
        "DoRA and bias": {"target_modules": some, "use_dora": True, "bias": "all"},
        "output layer": {"target_modules": ["lm_head", attention]},
        "output layer, DoRA": {"target_modules": ["lm_head"], "use_dora": True},
        "embedding": {"target_modules": [embedding, attention]},
        "retrained linear layer": {"target_modules": [attention], "modules_to_save": [mlp]},
        "retrained output layer": {"target_modules": [attention], "modules_to_save": ["lm_head"]},
        "trained tokens": {"target_modules": [attention], "trainable_token_indices": [5, 42]},
    }


def whole(path: str, quantization: Any) -> Any:
    """The model as transformers has it, with the weights that the codes stand for."""
    settings = {"served_name": "base", "quantization": quantization, "max_loras": 0}
    quantised = load(EngineConfig(model=path, **settings)).model
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for name, module in quantised.named_modules():
        if isinstance(module, QuantisedLinear):
            layer = model.get_submodule(name)
            layer.weight = nn.Parameter(module.weight.contiguous())
            if quantization == "int8-dynamic":
                layer.register_forward_pre_hook(
                    lambda _, args, own=module: (args[0] + own.rounding(args[0]),)
                )
    return model


class Family:
    """A quantised model in the engine; PEFT's own models over the same weights, by feature."""

    def __init__(self, name: str, quantization: str, folder: Path) -> None:
        self.path = save_random_model(MODELS[name], folder)
        self.max_error = MAX_ERROR[quantization]
        self.base = whole(self.path, quantization)
        self.folders: dict[str, Path] = {}
        self.adapted: dict[str, peft.PeftModel] = {}
        for seed, (feature, settings) in enumerate(features(name).items()):
            if quantization == "int8-dynamic" and "modules_to_save" in settings:
                # A layer of the adapter's own rounds nothing; PEFT's copy would.
                continue
            own = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings
            base = whole(self.path, quantization)
            with warnings.catch_warnings():
                # It warns of what is asked for here.
                warnings.simplefilter("ignore")
                adapted = peft.get_peft_model(base, peft.LoraConfig(**own))
            adapted = train_a_little(adapted, seed=seed)
            self.adapted[feature], self.folders[feature] = adapted, folder / str(seed)
            save_quietly(adapted, self.folders[feature])
        settings = {"served_name": "base", "max_loras": len(self.adapted)}
        self.loaded = load(EngineConfig(model=self.path, quantization=quantization, **settings))  # type: ignore[arg-type]  # from a table
        for slot, own_folder in enumerate(self.folders.values()):
            store(own_folder, self.loaded.base_shape)
            adapter = prepare(
                own_folder,
                self.loaded.targets,
                base_model="base",
                dtype=self.loaded.dtype,
                max_rank=8,
            )
            self.loaded.bank.install(slot, adapter, memory=adapter.values)

    def slot(self, feature: str) -> int:
        return list(self.folders).index(feature)


@pytest.fixture(scope="module", params=[(n, q) for n in MODELS for q in MAX_ERROR], ids="-".join)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    name, quantization = request.param
    return Family(name, quantization, tmp_path_factory.mktemp("model"))


def logits_of(loaded: LoadedModel, slots: list[int]) -> list[torch.Tensor]:
    """Of the whole prompt with each of these adapters, all in one step: [num_tokens, columns]."""
    sequences = [
        Sequence.unowned(list(PROMPT), block_table=[index + 1], slot=slot)
        for index, slot in enumerate(slots)
    ]
    for sequence in sequences:
        sequence.prompt_logprobs = []
    memory = DeviceMemory(loaded.layers, num_blocks=len(slots), block_size=32, device=loaded.device)
    items = [ScheduledSequence(s, len(PROMPT), is_sampled=True) for s in sequences]
    logits = Runner(loaded, memory).run(batches.build(items, block_size=32, device=loaded.device))
    last, others = logits[: len(slots)], logits[len(slots) :].chunk(len(slots))
    return [torch.cat([own, end[None]]) for own, end in zip(others, last, strict=True)]


@torch.inference_mode()
def error_of(found: torch.Tensor, model: Any) -> float:
    expected = model(torch.tensor([PROMPT])).logits[0]
    return float((found - expected).abs().max() / expected.abs().max())


def test_each_feature_alone_is_computed_as_peft_computes_it(family: Family) -> None:
    bound = family.max_error
    (found,) = logits_of(family.loaded, [NO_ADAPTER])
    assert error_of(found, family.base) < bound
    for feature, adapted in family.adapted.items():
        (found,) = logits_of(family.loaded, [family.slot(feature)])
        assert error_of(found, adapted) < bound, feature


def test_all_features_in_one_batch_are_what_they_are_alone(family: Family) -> None:
    models = {NO_ADAPTER: family.base} | dict(enumerate(family.adapted.values()))
    found = logits_of(family.loaded, list(models))
    for own, model in zip(found, models.values(), strict=True):
        assert error_of(own, model) < family.max_error


def test_a_probe_finds_nothing_wrong(family: Family) -> None:
    loaded = family.loaded
    memory = DeviceMemory(loaded.layers, num_blocks=1, block_size=8, device=loaded.device)
    runner = Runner(loaded, memory)
    for feature, folder in family.folders.items():
        report = examine(folder, "digest", slot=family.slot(feature), loaded=loaded, runner=runner)
        assert report.is_passed, (feature, report)
