"""The engine answers with the tokens of PEFT and transformers, on the real small model."""

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from adapters.demo.base_model import default_folder, fetch
from tests.model_lab import (
    FolderSource,
    following,
    load_with_peft,
    num_ties,
    open_lab,
    save_adapter,
)

NUM_TOKENS = 16
QUESTIONS = [
    "Why is the sky blue?",
    "Write one sentence about a lighthouse keeper who is afraid of the dark.",
    "Name three rivers in Africa and say, for each of them, through which countries it flows.",
    "Translate 'good morning' into French.",
]
ADAPTERS = {
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "all-linear": {"r": 2, "lora_alpha": 2, "target_modules": "all-linear", "use_rslora": True},
    "patterned": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["o_proj", "down_proj"],
        "rank_pattern": {"o_proj": 16},
        "layers_to_transform": list(range(3, 20)),
    },
}
B_STD = 0.02


@pytest.fixture(scope="module")
def model() -> str:
    return str(fetch(default_folder()))


@pytest.fixture(scope="module")
def prompts(model: str) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True
        )["input_ids"]
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def adapters(model: str, tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        save_adapter(model, root / name, seed=seed, std=B_STD, **settings)
    return FolderSource(root)


@pytest.fixture(scope="module")
def answers(
    model: str, adapters: FolderSource, prompts: list[list[int]]
) -> dict[str | None, list[int]]:
    """Of the base model (None) and each adapter, in one batch that is chunked and preempted."""
    asked: list[str | None] = [None, *ADAPTERS]
    with open_lab(
        model,
        adapters,
        block_size=8,
        # Little more than the prompts take beside two adapters.
        num_blocks=sum(map(len, prompts)) // 8 + 18,
        max_model_len=160,
        max_num_seqs=8,
        max_num_batched_tokens=20,
        max_loras=2,
        max_lora_rank=16,
    ) as lab:
        keys = {
            name: lab.submit(prompt, adapter=name, max_tokens=NUM_TOKENS)
            for name, prompt in zip(asked, prompts, strict=True)
        }
        lab.run()
        lab.assert_nothing_is_left()
        return {name: lab.answers[key].token_ids for name, key in keys.items()}


def references(model: str, adapters: FolderSource) -> Iterator[tuple[str | None, PreTrainedModel]]:
    yield None, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name in ADAPTERS:
        yield name, load_with_peft(model, adapters.root / name)


def test_a_mixed_batch_gives_each_the_tokens_that_it_would_get_alone(
    model: str,
    adapters: FolderSource,
    prompts: list[list[int]],
    answers: dict[str | None, list[int]],
) -> None:
    ties = 0
    for (name, reference), prompt in zip(references(model, adapters), prompts, strict=True):
        found = answers[name]
        ties += num_ties(following(reference, prompt, found), found)
    print(f"{ties} ties")
    assert len({tuple(tokens) for tokens in answers.values()}) == len(answers)


def test_every_adapter_passes_its_probe(model: str, adapters: FolderSource) -> None:
    with open_lab(model, adapters, max_model_len=64, max_lora_rank=16) as lab:
        for name in ADAPTERS:
            report = lab.core.probe(name)
            assert report.is_passed, report
