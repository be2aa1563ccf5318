"""Vectors are those of transformers' and PEFT's hidden states, on the real small model.

In one batch with generations and with each other's adapters, in chunks, short and long.
"""

from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.demo.base_model import default_folder, fetch
from adapters.text_bundle import PoolingKind
from engine.sequence import SequenceKey
from tests.model_lab import (
    FolderSource,
    Lab,
    load_with_peft,
    open_lab,
    pooled_reference,
    save_adapter,
)

KINDS: tuple[PoolingKind, ...] = get_args(PoolingKind)
ADAPTERS = {
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "all-linear": {"r": 2, "lora_alpha": 2, "target_modules": "all-linear", "use_rslora": True},
}
TEXTS = [
    "A river.",
    "The lighthouse keeper counts the ships that pass, and those that do not come back.",
    " ".join(f"Verse {number}: the sea was grey, and nobody spoke of it." for number in range(12)),
]
NUM_TOKENS = 12
MAX_NUM_BATCHED_TOKENS = 48
ATOL = 1e-5

Asked = dict[tuple[str | None, int, PoolingKind], SequenceKey]


@pytest.fixture(scope="module")
def model() -> str:
    return str(fetch(default_folder()))


@pytest.fixture(scope="module")
def prompts(model: str) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def adapters(model: str, tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        save_adapter(model, root / name, seed=seed, std=0.02, **settings)
    return FolderSource(root)


def ask(lab: Lab, prompts: list[list[int]]) -> Asked:
    return {
        (adapter, number, kind): lab.submit(prompt, adapter=adapter, pooling=kind)
        for adapter in (None, *ADAPTERS)
        for number, prompt in enumerate(prompts)
        for kind in KINDS
    }


def test_vectors_are_those_of_each_adapter_alone_whatever_shares_their_batch(
    model: str, adapters: FolderSource, prompts: list[list[int]]
) -> None:
    assert len(prompts[-1]) > 3 * MAX_NUM_BATCHED_TOKENS
    sizes = {"max_model_len": 1024, "num_blocks": 2048, "block_size": 16, "max_lora_rank": 16}
    with open_lab(
        model, adapters, max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS, max_num_seqs=16, **sizes
    ) as lab:
        generating = {
            name: lab.submit(prompts[1], adapter=name, max_tokens=NUM_TOKENS)
            for name in (None, *ADAPTERS)
        }
        asked = ask(lab, prompts)
        lab.run()
        lab.assert_nothing_is_left()
        vectors = {name: lab.answers[key].vector for name, key in asked.items()}
        tokens = {name: lab.answers[key].token_ids for name, key in generating.items()}
    with open_lab(model, adapters, **sizes) as lab:
        for name in tokens:
            alone = lab.generate(prompts[1], adapter=name, max_tokens=NUM_TOKENS)
            assert tokens[name] == alone
    largest = 0.0
    for adapter in (None, *ADAPTERS):
        reference = (
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            if adapter is None
            else load_with_peft(model, Path(adapters.root / adapter))
        )
        for number, prompt in enumerate(prompts):
            for kind in KINDS:
                expected = pooled_reference(reference, prompt, kind)
                difference = float((vectors[adapter, number, kind] - expected).abs().max())
                largest = max(largest, difference)
                assert difference < ATOL, (adapter, number, kind)
    print(f"largest difference of a number in a vector of length one: {largest:.1e}")
