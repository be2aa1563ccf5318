"""Everything that PEFT can train into an adapter is computed as PEFT computes it.

Each feature alone, and all of them in one batch: with prompts in chunks, found beginnings and
preemptions, on models that tie their embeddings and on models that don't. With `--write-results`
what was measured goes to benchmarks/results/peft-parity.json.
"""

import json
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from engine import batch as batches
from engine.config import EngineConfig
from engine.kernels.choice import DENSE, Kernels, choose
from engine.model.loader import LoadedModel, load
from engine.model.memory import DeviceMemory
from engine.model.prepared import PreparedAdapter, prepare
from engine.probe import examine
from engine.protocol import SequenceState
from engine.runner import Runner, block_bytes
from engine.scheduler import ScheduledSequence
from engine.sequence import NO_ADAPTER, Sequence
from tests.model_lab import (
    FolderSource,
    WatchedLab,
    adapt,
    following,
    num_ties,
    save_quietly,
    save_random_model,
    store,
    tiny_llama_config,
)

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "peft-parity.json"
VOCAB_SIZE, NUM_ADDED = 257, 3
MAX_ERROR = 1e-4
BASE = "the base model"
MAX_RANK = 8
MAX_NUM_SEQS = 8
NUM_TOKENS = 16
BLOCK_SIZE, MAX_MODEL_LEN = 4, 64
PROMPT = [(37 * i + 5) % VOCAB_SIZE for i in range(29)]

MODELS: dict[str, PretrainedConfig] = {
    "llama": tiny_llama_config(attention_bias=True),
    "llama, tied": tiny_llama_config(tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    ),
    "gpt2, tied": transformers.GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    ),
}


@dataclass(frozen=True, slots=True)
class Names:
    """How a family calls its modules."""

    attention: str
    output: str
    mlp: list[str]
    norm: str
    embedding: str
    layers: str
    others: tuple[str, ...] = ()


LLAMA = Names("q_proj", "o_proj", ["up_proj", "down_proj"], "norm", "embed_tokens", "layers")
GPT2 = Names("c_attn", "attn.c_proj", ["c_fc", "mlp.c_proj"], "ln_f", "wte", "h", others=("wpe",))


def features(names: Names) -> dict[str, dict[str, Any]]:
    some = [names.attention, *names.mlp]
    return {
        "LoRA": {"target_modules": some},
        "all-linear": {"target_modules": "all-linear"},
        "rsLoRA": {"target_modules": some, "use_rslora": True},
        "patterns": {
            "target_modules": some,
            "rank_pattern": {names.attention: 7, names.mlp[0]: 1},
            "alpha_pattern": {names.mlp[1]: 20},
        },
        "one layer": {
            "target_modules": some,
            "layers_to_transform": [1],
            "layers_pattern": names.layers,
        },
        "exclusions": {"target_modules": some, "exclude_modules": [names.mlp[0]]},
        "DoRA": {"target_modules": [*some, names.output], "use_dora": True},
        "bias, all": {"target_modules": [names.attention], "bias": "all"},
        "bias, LoRA alone": {"target_modules": some, "bias": "lora_only"},
        "DoRA and bias": {"target_modules": some, "use_dora": True, "bias": "all"},
        "output layer": {"target_modules": ["lm_head"]},
        "output layer, DoRA": {"target_modules": ["lm_head", names.attention], "use_dora": True},
        "embedding": {"target_modules": [names.embedding, *names.others]},
        "embedding, DoRA": {
            "target_modules": [names.embedding, *names.others, names.attention],
            "use_dora": True,
        },
        "embedding and output layer": {"target_modules": [names.embedding, "lm_head"]},
        "retrained norm": {"target_modules": some, "modules_to_save": [names.norm]},
        "retrained linear layer": {
            "target_modules": [names.attention],
            "modules_to_save": [names.mlp[0]],
        },
        "retrained embedding": {
            "target_modules": [names.attention],
            "modules_to_save": [names.embedding],
        },
        "retrained output layer": {
            "target_modules": [names.attention],
            "modules_to_save": ["lm_head"],
        },
        "trained tokens": {
            "target_modules": [names.attention],
            "trainable_token_indices": [5, 42, 200],
        },
        "added tokens": {
            "target_modules": [names.attention],
            "modules_to_save": [names.embedding, "lm_head"],
            "num_added_tokens": NUM_ADDED,
        },
    }


UNTIED = {
    "trained tokens, in and out": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 42], "lm_head": [7, 42, 200]},
    },
}
TIED = {
    "added trained tokens": {
        "trainable_token_indices": [5, VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2],
        "num_added_tokens": NUM_ADDED,
    },
}


def features_of(family: str) -> dict[str, dict[str, Any]]:
    names = GPT2 if family.startswith("gpt2") else LLAMA
    found = features(names)
    is_tied = "tied" in family
    found["everything"] = {
        # DoRA on a tied output layer is beyond PEFT where tokens are trained.
        "target_modules": [
            names.attention,
            names.output,
            names.mlp[1],
            *([] if is_tied else ["lm_head"]),
        ],
        "use_dora": True,
        "use_rslora": True,
        "bias": "all",
        "modules_to_save": [names.norm, names.mlp[0]],
        "trainable_token_indices": {names.embedding: [5, 42]},
    }
    if not is_tied:
        return found | UNTIED
    added = {name: {"target_modules": [names.attention], **own} for name, own in TIED.items()}
    return found | added


class Family:
    """A model, and PEFT's own models of it by feature; in the engine each has a slot."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.path = save_random_model(MODELS[name], folder)
        self.base = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()
        self.adapted: dict[str, peft.PeftModel] = {}
        for seed, (feature, settings) in enumerate(features_of(name).items()):
            settings = {"r": 4, "lora_alpha": 6} | settings
            self.adapted[feature] = adapt(self.path, seed=seed, **settings)
        for number, adapted in enumerate(self.adapted.values()):
            save_quietly(adapted, folder / str(number))
        self.source = FolderSource(folder)
        self.loaded = self._load()

    def _load(self) -> LoadedModel:
        loaded = load(
            EngineConfig(model=self.path, served_name="base", max_loras=len(self.adapted))
        )
        for slot in range(len(self.adapted)):
            store(self.source.root / str(slot), loaded.base_shape)
            adapter = self.prepared(slot, loaded)
            loaded.bank.install(slot, adapter, memory=adapter.values)
        return loaded

    @property
    def num_blocks(self) -> int:
        """For the largest adapter, the longest sequence, and little more."""
        prepared = [self.prepared(slot, self.loaded) for slot in range(len(self.adapted))]
        largest = max(adapter.size_bytes for adapter in prepared)
        num_blocks = -(-largest // block_bytes(self.loaded, block_size=BLOCK_SIZE))
        return num_blocks + 2 * MAX_MODEL_LEN // BLOCK_SIZE

    def prepared(self, slot: int, loaded: LoadedModel) -> PreparedAdapter:
        return prepare(
            self.source.root / str(slot),
            loaded.targets,
            base_model="base",
            dtype=loaded.dtype,
            max_rank=MAX_RANK,
        )

    def prompt_of(self, feature: str) -> list[int]:
        """With all that the adapter knows beside the base model."""
        settings = features_of(self.name)[feature]
        trained = settings.get("trainable_token_indices") or []
        trained = trained.get("embed_tokens", []) if isinstance(trained, dict) else trained
        num_tokens = VOCAB_SIZE + settings.get("num_added_tokens", 0)
        return [*PROMPT, *trained, *range(VOCAB_SIZE, num_tokens), 11]

    def rows(self) -> dict[str | None, tuple[int, list[int], Any]]:
        """Of each feature, and of the base model: slot, prompt and PEFT's own model."""
        own = {
            feature: (slot, self.prompt_of(feature), adapted)
            for slot, (feature, adapted) in enumerate(self.adapted.items())
        }
        return {**own, None: (NO_ADAPTER, PROMPT, self.base)}


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp("model"))


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence: whose, what, and how many of its tokens the first of two steps computes."""

    slot: int
    prompt: list[int]
    num_first: int


def logits_of(loaded: LoadedModel, rows: list[Row]) -> list[Tensor]:
    """Of each row [num_tokens, vocabulary], in two steps that all rows share."""
    sequences = []
    for index, row in enumerate(rows):
        sequence = Sequence.unowned(list(row.prompt), block_table=[index + 1], slot=row.slot)
        # Logits of all positions are wanted.
        sequence.prompt_logprobs = []
        sequences.append(sequence)
    memory = DeviceMemory(loaded.layers, num_blocks=len(rows), block_size=64, device=loaded.device)
    runner, found = Runner(loaded, memory), [list[Tensor]() for _ in rows]
    for is_last in (False, True):
        items = [
            ScheduledSequence(
                sequence,
                sequence.num_uncomputed_tokens if is_last else row.num_first,
                is_sampled=is_last,
            )
            for sequence, row in zip(sequences, rows, strict=True)
        ]
        items.sort(key=lambda item: item.num_tokens > 1)
        logits = runner.run(batches.build(items, block_size=64, device=loaded.device))
        sampled = logits[: len(items)] if is_last else logits[:0]
        of_prompts = logits[len(sampled) :].split([len(item.scored_positions) for item in items])
        for place, item in enumerate(items):
            own = found[sequences.index(item.sequence)]
            own += [of_prompts[place], sampled[place : place + 1]]
            item.sequence.num_computed_tokens += item.num_tokens
    return [torch.cat(_as_wide(parts)) for parts in found]


def _as_wide(parts: list[Tensor]) -> list[Tensor]:
    """The same columns in all; a step without added tokens has fewer."""
    width = max(part.shape[1] for part in parts)
    pad = torch.nn.functional.pad
    return [pad(part, (0, width - part.shape[1]), value=-torch.inf) for part in parts]


@torch.inference_mode()
def error_of(found: Tensor, prompt: list[int], model: Any) -> float:
    """Largest difference to PEFT's logits, by the largest of these."""
    expected = model(torch.tensor([prompt])).logits[0]
    assert bool(torch.isneginf(found[:, expected.shape[1] :]).all()), "a token that is not its own"
    return float((found[:, : expected.shape[1]] - expected).abs().max() / expected.abs().max())


IMPLEMENTATIONS = {"compiled": choose(torch.device("cpu"), torch.float32), "dense": DENSE}


@dataclass(slots=True)
class Measured:
    """One line of the table."""

    model: str
    feature: str
    error_alone: float = 0.0
    error_in_the_mixed_batch: float = 0.0
    num_greedy_tokens: int = 0
    num_ties: int = 0


def measure_logits(family: Family, kernels: Kernels, table: dict[str, Measured]) -> None:
    loaded, rows = replace(family.loaded, kernels=kernels), family.rows()
    for feature, (slot, prompt, model) in rows.items():
        (found,) = logits_of(loaded, [Row(slot, prompt, len(prompt) - 1)])
        name = feature or BASE
        own = table.setdefault(name, Measured(family.name, name))
        own.error_alone = max(own.error_alone, error_of(found, prompt, model))
    # Some in chunks, some at their last token; neighbours and strangers.
    mixed = [
        Row(slot, prompt, len(prompt) - (1, 7, 1, 20)[place % 4])
        for place, (slot, prompt, _) in enumerate(rows.values())
    ]
    for found, own, (_, prompt, model) in zip(
        logits_of(loaded, mixed), table.values(), rows.values(), strict=True
    ):
        error = error_of(found, prompt, model)
        own.error_in_the_mixed_batch = max(own.error_in_the_mixed_batch, error)


def measure_tokens(family: Family, table: dict[str, Measured]) -> Counter[str]:
    """In an engine with little memory and few slots; gives what happened on the way."""
    lab = WatchedLab(
        family.path,
        family.source,
        block_size=BLOCK_SIZE,
        num_blocks=family.num_blocks,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=24,
        max_loras=5,
        max_lora_rank=MAX_RANK,
    )
    digests = {feature: str(number) for number, feature in enumerate(family.adapted)}
    models = {digests.get(feature or ""): model for feature, (_, _, model) in family.rows().items()}
    with closing(lab.core):
        asked = []

        def ask(feature: str | None, prompt: list[int], max_tokens: int) -> None:
            adapter = digests.get(feature or "")
            key = lab.submit(prompt, adapter=adapter, max_tokens=max_tokens)
            asked.append((feature, prompt, key))

        for feature, (_, prompt, _) in family.rows().items():
            # Equal beginnings are computed once.
            for variant in (prompt, [*prompt, 3], [*prompt[:-1], 4, 5]):
                ask(feature, variant, NUM_TOKENS)
        lab.run()
        # How many of those run together is for the loads to say, but these are of one adapter,
        # and more than the memory holds.
        for first in range(MAX_NUM_SEQS):
            prompt = [first, *PROMPT]
            ask("everything", prompt, MAX_MODEL_LEN - len(prompt))
        lab.run()
        lab.assert_nothing_is_left()
    for feature, prompt, key in asked:
        answer, model = lab.answers[key], models[digests.get(feature or "")]
        assert answer.state is SequenceState.LENGTH, (feature, answer.last.fault)
        lab.seen["found"] += answer.last.cached_tokens > 0
        own = table[feature or BASE]
        own.num_greedy_tokens += len(answer.token_ids)
        own.num_ties += num_ties(following(model, prompt, answer.token_ids), answer.token_ids)
    return lab.seen


def test_every_feature_is_computed_as_peft_does(
    family: Family, request: pytest.FixtureRequest
) -> None:
    table: dict[str, Measured] = {}
    for kernels in IMPLEMENTATIONS.values():
        measure_logits(family, kernels, table)
    for own in table.values():
        errors = own.error_alone, own.error_in_the_mixed_batch
        assert max(errors) <= MAX_ERROR, own
    seen = measure_tokens(family, table)
    for event in ("mixed", "chunked", "preempted", "unloaded", "found"):
        assert seen[event], f"there was no {event}"
    if request.config.getoption("--write-results"):
        write(table)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_feature_passes_its_probe(family: Family, dtype: Any) -> None:
    loaded = load(EngineConfig(model=family.path, served_name="base", dtype=dtype))
    memory = DeviceMemory(loaded.layers, num_blocks=1, block_size=4, device=loaded.device)
    for number, feature in enumerate(family.adapted):
        adapter = family.prepared(number, loaded)
        loaded.bank.install(0, adapter, memory=adapter.values)
        folder = family.source.root / str(number)
        report = examine(folder, feature, slot=0, loaded=loaded, runner=Runner(loaded, memory))
        assert report.is_passed, (feature, report)
        assert report.coverage is not None
        assert report.coverage.median_relative_norm > 0


def write(table: dict[str, Measured]) -> None:
    """Put a model's lines into the file, in place of those that it had."""
    names = {measured.model for measured in table.values()}
    old = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = [row for row in old if row["model"] not in names]
    rows += [asdict(measured) for measured in table.values()]
    found = {
        "command": "pytest tests/parity/test_peft_features.py --write-results",
        "versions": {name: version(name) for name in ("peft", "torch", "transformers")},
        "bound": MAX_ERROR,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
