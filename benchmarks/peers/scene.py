"""What every peer is asked: the same model, the same adapters, the same prompts.

Knows tokens and files. Knows nothing of servers.
"""

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path

import numpy as np
from jinja2 import Environment
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from benchmarks.serve import weights

HERE = Path(__file__).parent.parent
PROMPT_TOKENS = 128
RANK, ALPHA = 16, 32
# Strong enough that an adapter's greedy answer leaves the base model's within a few tokens.
UP_STD = 0.05
MODULES = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def cache_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "manylora" / "peers"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One user's turn in the model's chat template; `text` encodes to `token_ids` exactly."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    prompt: Prompt
    # Which of the scene's adapters; None is the base model.
    adapter: int | None


@dataclass(frozen=True, slots=True)
class Scene:
    model: Path
    # PEFT's folders, in their order; a peer that starts with none of them serves the base alone.
    adapters: tuple[Path, ...]


# Adapters


def make_adapters(model: Path, number: int) -> tuple[Path, ...]:
    """PEFT folders of random weights, the same on every machine; those that are there are kept."""
    folder = cache_folder() / "adapters" / f"rank-{RANK}-{UP_STD}"
    return tuple(_make_adapter(folder / f"a{seed}", model, seed) for seed in range(number))


def _make_adapter(folder: Path, model: Path, seed: int) -> Path:
    # Written last, so that a folder which has it is whole.
    config = folder / "adapter_config.json"
    if not config.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_tensors(model, seed), folder / "adapter_model.safetensors")
        config.write_text(json.dumps(_peft_config(model), indent=1))
    return folder


def _tensors(model: Path, seed: int) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(seed)
    facts = json.loads((model / "config.json").read_text())
    tensors = {}
    for layer, (block, names) in product(range(facts["num_hidden_layers"]), MODULES.items()):
        for name in names:
            inputs, outputs = _shape(facts, name)
            place = f"base_model.model.model.layers.{layer}.{block}.{name}"
            down = noise.standard_normal((RANK, inputs), dtype=np.float32) * inputs**-0.5
            up = noise.standard_normal((outputs, RANK), dtype=np.float32) * UP_STD
            tensors[f"{place}.lora_A.weight"] = down.astype(np.float32)
            tensors[f"{place}.lora_B.weight"] = up.astype(np.float32)
    return tensors


def _shape(facts: dict[str, int], module: str) -> tuple[int, int]:
    """Inputs and outputs."""
    hidden, inner = facts["hidden_size"], facts["intermediate_size"]
    heads, kv_heads = facts["num_attention_heads"], facts["num_key_value_heads"]
    return {
        "q_proj": (hidden, heads * facts["head_dim"]),
        "k_proj": (hidden, kv_heads * facts["head_dim"]),
        "v_proj": (hidden, kv_heads * facts["head_dim"]),
        "o_proj": (heads * facts["head_dim"], hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }[module]


def _peft_config(model: Path) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name for names in MODULES.values() for name in names],
    }


# Prompts


class Prompts:
    """Questions about passages of plain English, each of exactly PROMPT_TOKENS tokens.

    No two that one object gives are alike beyond the template's own beginning and the question, so
    a cache of prefixes finds no more in them than that.
    """

    def __init__(self, model: Path, *, seed: str) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        source = (model / "chat_template.jinja").read_text()
        self._template = Environment().from_string(source)  # noqa: S701 (no HTML)
        self._chance = random.Random(seed)
        self._questions = (HERE / "prompts.txt").read_text().splitlines()
        self._words = (HERE / "plain_english.txt").read_text().split()

    def draw(self, number: int) -> list[Prompt]:
        return [self._draw_one() for _ in range(number)]

    def _draw_one(self) -> Prompt:
        while True:
            start = self._chance.randrange(len(self._words) - PROMPT_TOKENS)
            question = self._chance.choice(self._questions)
            for end in range(start, start + PROMPT_TOKENS):
                prompt = self._render(" ".join(self._words[start:end]) + "\n\n" + question)
                if len(prompt.token_ids) == PROMPT_TOKENS:
                    return prompt
                if len(prompt.token_ids) > PROMPT_TOKENS:
                    break

    def _render(self, content: str) -> Prompt:
        text = self._template.render(
            messages=[{"role": "user", "content": content}], add_generation_prompt=True
        )
        return Prompt(text, tuple(self._tokenizer.encode(text, add_special_tokens=False).ids))


# What is asked


def mixed(prompts: Sequence[Prompt], *, num_adapters: int, mix: str, seed: str) -> list[Ask]:
    """Each prompt with an adapter: `even` gives all equally many, `zipf` the first ones more."""
    if num_adapters == 0:
        return [Ask(prompt, None) for prompt in prompts]
    chance = random.Random(seed)
    if mix == "even":
        chosen = [place % num_adapters for place in range(len(prompts))]
        chance.shuffle(chosen)
    else:
        shares = list(accumulate(weights("zipf:1.0", num_adapters)))
        chosen = chance.choices(range(num_adapters), cum_weights=shares, k=len(prompts))
    return [Ask(prompt, adapter) for prompt, adapter in zip(prompts, chosen, strict=True)]


def fingerprint(scene: Scene, prompts: Sequence[Prompt]) -> str:
    """Names a question to PEFT: other adapters or prompts have another."""
    content = hashlib.sha256(str([prompt.token_ids for prompt in prompts]).encode())
    for folder in scene.adapters:
        content.update((folder / "adapter_model.safetensors").read_bytes())
    return content.hexdigest()[:16]
