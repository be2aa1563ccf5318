"""Whatever of a base model PEFT trains, we read from its files as PEFT does."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from adapters import validate, weights
from adapters.manifest import is_canonical
from adapters.weights import AdapterWeights, LoraModule
from tests.adapters.tiny_adapters import (
    BASE,
    LIMITS,
    Saved,
    save_random,
    shape_of,
    tiny_gpt2,
    tiny_llama,
)

ATOL = 1e-4


def untied() -> PreTrainedModel:
    return tiny_llama()


def tied() -> PreTrainedModel:
    return tiny_llama(tie_word_embeddings=True)


def biased() -> PreTrainedModel:
    return tiny_llama(attention_bias=True)


def grown() -> PreTrainedModel:
    return _grown(tiny_llama())


def grown_tied() -> PreTrainedModel:
    return _grown(tiny_llama(tie_word_embeddings=True))


def _grown(model: PreTrainedModel) -> PreTrainedModel:
    model.resize_token_embeddings(51, mean_resizing=False)
    return model


# What was trained, on which model, with which options, and the features that are told of it.
FEATURES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], set[str]]] = {
    "dora": (untied, {"use_dora": True}, {"dora"}),
    "dora with rslora": (untied, {"use_dora": True, "use_rslora": True}, {"dora", "rslora"}),
    "dora on biases": (biased, {"use_dora": True, "bias": "lora_only"}, {"dora", "bias"}),
    "dora on transposed weights": (
        tiny_gpt2,
        {"use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"dora"},
    ),
    "transposed weights": (
        tiny_gpt2,
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        set(),
    ),
    "all biases": (biased, {"bias": "all"}, {"bias"}),
    "all biases, norms' too": (
        tiny_gpt2,
        {"bias": "all", "target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"bias"},
    ),
    "biases of targets": (biased, {"bias": "lora_only"}, {"bias"}),
    "biases of a model without": (untied, {"bias": "all"}, set()),
    "biases beside modules to save": (
        biased,
        {"bias": "all", "modules_to_save": ["k_proj"]},
        {"bias", "modules_to_save"},
    ),
    "lora on the output layer": (
        untied,
        {"target_modules": ["q_proj", "lm_head"]},
        {"lm_head", "modules_to_save"},
    ),
    "lora on a tied output layer": (
        tied,
        {"target_modules": ["q_proj", "lm_head"]},
        {"lm_head", "modules_to_save"},
    ),
    "lora on the output layer alone": (
        untied,
        {"target_modules": ["lm_head"], "save_embedding_layers": False},
        {"lm_head"},
    ),
    "lora on an embedding": (
        untied,
        {"target_modules": ["q_proj", "embed_tokens"], "save_embedding_layers": False},
        {"embedding"},
    ),
    "lora on a tied embedding": (
        tied,
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"embedding", "modules_to_save"},
    ),
    "dora on an embedding": (
        untied,
        {"target_modules": ["embed_tokens"], "use_dora": True},
        {"embedding", "dora", "modules_to_save"},
    ),
    "dora on the output layer": (
        tied,
        {"target_modules": ["lm_head"], "use_dora": True, "save_embedding_layers": False},
        {"lm_head", "dora"},
    ),
    "norms": (untied, {"modules_to_save": ["norm"]}, {"modules_to_save"}),
    "a module of modules": (untied, {"modules_to_save": ["layers.1.mlp"]}, {"modules_to_save"}),
    "a whole embedding": (untied, {"modules_to_save": ["embed_tokens"]}, {"modules_to_save"}),
    "a whole embedding of two tied": (
        tied,
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save"},
    ),
    "both of two tied": (
        tied,
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save"},
    ),
    "both, kept tied": (
        tied,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save"},
    ),
    "tokens": (untied, {"trainable_token_indices": [40, 3, 7]}, {"trainable_tokens"}),
    "tokens, tied": (tied, {"trainable_token_indices": [40, 3, 7]}, {"trainable_tokens"}),
    "tokens of both layers": (
        untied,
        {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [7]}},
        {"trainable_tokens"},
    ),
    "tokens of both layers, tied": (
        tied,
        {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [5, 3]}},
        {"trainable_tokens"},
    ),
    "different tokens of tied layers": (
        tied,
        {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [7]}},
        {"trainable_tokens"},
    ),
    "added tokens": (
        grown,
        {"save_embedding_layers": True},
        {"modules_to_save", "added_tokens"},
    ),
    "added tokens, tied": (
        grown_tied,
        {"save_embedding_layers": True},
        {"modules_to_save", "added_tokens"},
    ),
    "added tokens in modules to save": (
        grown,
        {"save_embedding_layers": True, "modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save", "added_tokens"},
    ),
    "added tokens in one of two tied": (
        grown_tied,
        {"save_embedding_layers": True, "modules_to_save": ["embed_tokens"]},
        {"modules_to_save", "added_tokens"},
    ),
    "added tokens, trained alone": (
        grown,
        {"save_embedding_layers": True, "trainable_token_indices": [48, 49, 50]},
        {"modules_to_save", "added_tokens", "trainable_tokens"},
    ),
    "added tokens, trained alone, tied": (
        grown_tied,
        {"save_embedding_layers": True, "trainable_token_indices": [50, 48, 49]},
        {"modules_to_save", "added_tokens", "trainable_tokens"},
    ),
    "added tokens below lora": (
        grown,
        {"save_embedding_layers": True, "target_modules": ["embed_tokens", "lm_head"]},
        {"modules_to_save", "added_tokens", "embedding", "lm_head"},
    ),
    "everything": (
        biased,
        {
            "use_dora": True,
            "use_rslora": True,
            "bias": "all",
            "target_modules": ["q_proj", "up_proj", "lm_head"],
            "rank_pattern": {"up_proj": 2},
            "alpha_pattern": {"q_proj": 3},
            "modules_to_save": ["norm"],
            "trainable_token_indices": [1],
            "save_embedding_layers": False,
        },
        {
            *("dora", "rslora", "bias", "lm_head", "rank_pattern", "alpha_pattern"),
            *("modules_to_save", "trainable_tokens"),
        },
    ),
}
# The adapter's model has the tokens that it adds; the base model has not.
BASES = {grown: untied, grown_tied: tied}


class Case:
    """An adapter that PEFT saved, and the model that it is for."""

    def __init__(self, name: str, saved: Saved) -> None:
        self.trained_on, _, self.features = FEATURES[name]
        self.saved = saved
        self.base_shape = shape_of(BASES.get(self.trained_on, self.trained_on)())

    def by_peft(self) -> Tensor:
        return _logits(_loaded_by_peft(self.trained_on(), self.saved))

    def load(self) -> AdapterWeights:
        return weights.load(self.saved.folder, base_model=BASE, dtype=torch.float32)

    def store(self) -> None:
        config = self.saved.read(self.base_shape).canonical_config()
        self.saved.config_path.write_bytes(config)


@pytest.fixture(params=FEATURES)
def case(request: pytest.FixtureRequest, tmp_path: Any) -> Case:
    trained_on, options, _ = FEATURES[request.param]
    return Case(request.param, save_random(tmp_path / "adapter", model=trained_on(), **options))


def test_what_is_loaded_computes_what_peft_computes(case: Case) -> None:
    expected = case.by_peft()
    case.store()
    ours = _logits(_rebuilt(case.trained_on(), case.load()))
    assert (ours - _logits(case.trained_on())).abs().max() > 100 * ATOL
    torch.testing.assert_close(ours, expected, atol=ATOL, rtol=0)


def test_what_peft_saves_has_no_findings(case: Case) -> None:
    found = case.saved.read(case.base_shape)
    assert found.leftovers == {}
    assert validate.check(found, case.base_shape, limits=LIMITS) == []
    assert validate.check_values(case.saved.weights_path, found) == []
    assert set(found.features) == case.features


def test_the_canonical_configuration_is_the_same_adapter_to_peft_and_to_us(case: Case) -> None:
    before, expected = case.saved.read(case.base_shape), case.by_peft()
    case.store()
    config = case.saved.config_path.read_bytes()
    assert is_canonical(config)
    torch.testing.assert_close(case.by_peft(), expected, atol=0, rtol=0)

    for again in (case.saved.read(), case.saved.read(case.base_shape)):
        assert again.weights_digest == before.weights_digest
        assert again.canonical_config() == config
        assert again.leftovers == {}
    assert case.saved.read(case.base_shape).num_parameters == before.num_parameters
    assert validate.check(case.saved.read(case.base_shape), case.base_shape, limits=LIMITS) == []


def _loaded_by_peft(model: PreTrainedModel, saved: Saved) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, saved.folder)


def _logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.arange(model.get_input_embeddings().weight.shape[0])[None]
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=tokens).logits
    return logits


def _rebuilt(model: PreTrainedModel, loaded: AdapterWeights) -> PreTrainedModel:
    """The model with everything that was loaded worked into its weights, no two of them tied."""
    own = {name: p.data.clone() for name, p in model.named_parameters(remove_duplicate=False)}
    embedding = next(name for name, m in model.named_modules() if m is model.get_input_embeddings())
    transposed = set() if isinstance(model, LlamaForCausalLM) else {"attn", "mlp"}
    for name, parameter in loaded.replaced.items():
        own[name] = parameter.clone()
    for name, tokens in loaded.tokens.items():
        own[f"{name}.weight"][tokens.token_ids] = tokens.rows
    for name, lora in loaded.lora.items():
        weight = own[f"{name}.weight"]
        is_transposed = name == embedding or bool(transposed & set(name.split(".")))
        own[f"{name}.weight"] = _with_lora(weight.T if is_transposed else weight, lora)
        if is_transposed:
            own[f"{name}.weight"] = own[f"{name}.weight"].T
    for name, value in own.items():
        module, _, parameter = name.rpartition(".")
        setattr(model.get_submodule(module), parameter, torch.nn.Parameter(value))
    return model


def _with_lora(weight: Tensor, lora: LoraModule) -> Tensor:
    """[out_features, in_features]"""
    changed = weight + lora.scaling * lora.lora_B @ lora.lora_A
    if lora.magnitude is None:
        return changed
    return changed * (lora.magnitude / changed.norm(dim=1))[:, None]
