"""An engine whose decode steps are replayed answers as one that launches them."""

import os
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig

from tests.model_lab import FolderSource, Lab, save_adapter, save_random_model, tiny_llama_config

IS_COMPILED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") == "0"
pytestmark = pytest.mark.skipif(not IS_COMPILED, reason="needs a GPU: see benchmarks/gpu.sh")
# As many as a step has at most: a GEMM of another number of rows may round otherwise.
PROMPTS = [[(37 * i + k) % 257 for i in range(length)] for k, length in enumerate((5, 17, 30, 9))]
MIXES = {
    "base only": (None,) * 4,
    "distinct adapters": ("one", "two", None, "scaled"),
    "shared adapters": ("one", "one", "one", None),
}


def lab_of(model: str, folder: Path, *, cuda_graphs: bool) -> Lab:
    return Lab(
        model,
        FolderSource(folder),
        device="cuda",
        dtype="bfloat16",
        max_num_seqs=4,
        cuda_graphs=cuda_graphs,
    )


def answers(lab: Lab, adapters: tuple[str | None, ...]) -> list[list[int]]:
    keys = [
        lab.submit(prompt, adapter=adapter, max_tokens=24)
        for prompt, adapter in zip(PROMPTS, adapters, strict=True)
    ]
    lab.run()
    return [lab.answers[key].token_ids for key in keys]


def test_replayed_steps_give_the_tokens_of_launched_ones(tmp_path: Path) -> None:
    model = save_random_model(tiny_llama_config(hidden_size=64), tmp_path / "model")
    save_adapter(model, tmp_path / "one", seed=1, r=3, target_modules="all-linear")
    save_adapter(model, tmp_path / "two", seed=2, r=8, target_modules=["q_proj", "v_proj"])
    save_adapter(model, tmp_path / "scaled", seed=3, r=4, target_modules=["o_proj"], use_dora=True)
    found = {}
    for cuda_graphs in (True, False):
        lab = lab_of(model, tmp_path, cuda_graphs=cuda_graphs)
        with closing(lab.core):
            replays = lab.core._runner._replays
            assert (replays is not None) is cuda_graphs
            if replays is not None:
                # Sizes 1, 2 and 4; without adapters, and in two ways with them.
                assert replays.num_steps == 9
            found[cuda_graphs] = {name: answers(lab, mix) for name, mix in MIXES.items()}
    assert found[True] == found[False]


def test_a_model_whose_host_asks_the_device_is_served_launch_by_launch(tmp_path: Path) -> None:
    """Which experts a step needs is known to the device alone."""
    sizes = tiny_llama_config(hidden_size=64).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    config = MixtralConfig(
        **{name: sizes[name] for name in names},
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = save_random_model(config, tmp_path / "model")
    lab = lab_of(model, tmp_path, cuda_graphs=True)
    with closing(lab.core):
        assert all(len(tokens) == 24 for tokens in answers(lab, MIXES["base only"]))
