"""A tiny random Llama and five real PEFT adapters for it."""

from pathlib import Path

import pytest

from tests.model_lab import FolderSource, save_adapter, save_random_model, tiny_llama_config

ADAPTERS = {
    "all-linear": {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"},
    "attention": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank-stabilised": {"r": 4, "lora_alpha": 4, "target_modules": ["o_proj"], "use_rslora": True},
    "one-layer": {
        "r": 2,
        "lora_alpha": 8,
        "target_modules": ["gate_proj", "down_proj"],
        "layers_to_transform": [1],
    },
    "patterned": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 9, "up_proj": 1},
        "alpha_pattern": {"k_proj": 20},
    },
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_random_model(tiny_llama_config(), tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def adapters(model: str, tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    """Digests are the names in `ADAPTERS`."""
    root: Path = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        save_adapter(model, root / name, seed=seed, **settings)
    return FolderSource(root)
