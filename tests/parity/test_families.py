"""Each family of models answers as transformers does, and with adapters as PEFT does.

Tiny random weights under a family's own code, with what is particular to it in play: windows that
are crossed, capped scores, fused projections, experts, RoPE that changes with the context. Short
and long prompts share batches, in chunks, with found beginnings and preemptions. With
`--write-results` what was measured goes to benchmarks/results/families.json.
"""

import json
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from adapters.text_bundle import PoolingKind
from engine.config import EngineConfig
from engine.kernels.choice import Kernels
from engine.model.loader import LoadedModel, load
from engine.protocol import SequenceState
from engine.runner import block_bytes
from tests.kernel_lab import COMPILED, DEFINED, DENSE, INTERPRETED
from tests.model_lab import (
    ATOL,
    Alone,
    Answer,
    FolderSource,
    WatchedLab,
    adapter_bytes,
    assert_told,
    load_with_peft,
    num_ties,
    pooled_reference,
    save_adapter,
    save_random_model,
    store,
)

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "families.json"
ADAPTER, BASE = "adapter", None
WINDOW, TRAINED_LEN = 8, 32
MAX_MODEL_LEN, NUM_TOKENS, BLOCK_SIZE = 64, 12, 4
NUM_TOP = 3
# The first stays in every window and in every trained context until it decodes.
LENGTHS = (5, 45, 21)
PROMPTS = [[(37 * i + 5 * k + 3) % 257 for i in range(length)] for k, length in enumerate(LENGTHS)]

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ONE_KEY_HEAD = SIZES | {"num_key_value_heads": 1}
NO_GROUPS = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
# Scores of these small models are about 1 apart.
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0}


ROPE_THETA = 1e4


def rope_of(rope_type: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": ROPE_THETA} | settings}


def ntk_theta(length: int, *, trained: int, factor: float, head_dim: int) -> float:
    """The base that `dynamic` RoPE takes for a context of that length."""
    stretch: float = (factor * length / trained - (factor - 1)) ** (head_dim / (head_dim - 2))
    return ROPE_THETA * stretch


def rope_by_layer_type(full: float, sliding: float) -> dict[str, Any]:
    thetas = {"full_attention": full, "sliding_attention": sliding}
    return {
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": theta} for name, theta in thetas.items()
        }
    }


@dataclass(frozen=True, slots=True)
class Family:
    config: PretrainedConfig
    # What a family has that others have not, and that is in play here.
    traits: tuple[str, ...] = ()
    target_modules: list[str] | str = "all-linear"
    # Settings that take one of these away each.
    without: tuple[dict[str, Any], ...] = ()
    # The same function in words that `generate` computes alike for every length, where the
    # family's own depend on the longest sequence at hand.
    frozen: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama": Family(
        transformers.LlamaConfig(**SIZES, head_dim=12, attention_bias=True, mlp_bias=True),
        ("head_dim that is not hidden_size / heads", "biases"),
    ),
    "llama, multi-query": Family(
        transformers.LlamaConfig(**ONE_KEY_HEAD, tie_word_embeddings=True),
        ("one key head", "tied embeddings"),
    ),
    "mistral": Family(
        transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
        ("sliding window",),
        without=({"sliding_window": None},),
    ),
    "qwen2": Family(
        transformers.Qwen2Config(
            **SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
        ),
        ("biases of query, key and value", "sliding window in one layer of two"),
        without=({"layer_types": ["full_attention"] * 2}, {"sliding_window": WINDOW - 1}),
    ),
    "qwen3": Family(
        transformers.Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True),
        ("norms of queries and keys", "tied embeddings"),
    ),
    "gemma2": Family(
        transformers.Gemma2Config(
            **SIZES, head_dim=12, sliding_window=WINDOW, query_pre_attn_scalar=20, **CAPS
        ),
        ("soft-caps", "query scaling", "sliding window in one layer of two"),
        without=(
            {"layer_types": ["full_attention"] * 2},
            {"query_pre_attn_scalar": 12},
            {"attn_logit_softcapping": None},
        ),
    ),
    "gemma3_text": Family(
        transformers.Gemma3TextConfig(
            **SIZES | {"num_hidden_layers": 3},
            head_dim=12,
            sliding_window=WINDOW,
            query_pre_attn_scalar=20,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        ("two RoPE bases", "query scaling", "sliding window in two layers of three"),
        without=(
            {"sliding_window": WINDOW - 1},
            {"query_pre_attn_scalar": 12},
            rope_by_layer_type(1e6, 1e6),
            rope_by_layer_type(1e4, 1e4),
        ),
    ),
    "phi3": Family(
        transformers.Phi3Config(**SIZES, sliding_window=WINDOW),
        ("fused projections", "sliding window"),
        without=({"sliding_window": None},),
    ),
    "gpt_neox": Family(
        transformers.GPTNeoXConfig(**NO_GROUPS),
        ("fused projections", "parallel residual", "RoPE on a part of each head"),
    ),
    "gpt2": Family(
        transformers.GPT2Config(
            vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1,
            eos_token_id=2, scale_attn_by_inverse_layer_idx=True,
        ),
        ("transposed weights", "learned positions", "scaling by layer"),
        without=({"scale_attn_by_inverse_layer_idx": False},),
    ),
    "mixtral": Family(
        transformers.MixtralConfig(**SIZES, num_local_experts=4, sliding_window=WINDOW),
        ("experts", "sliding window"),
        without=({"sliding_window": None},),
        target_modules=ATTENTION,
    ),
    "qwen3_moe": Family(
        transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, moe_intermediate_size=24, head_dim=12),
        ("experts", "norms of queries and keys"),
        target_modules=ATTENTION,
    ),
    "olmoe": Family(
        transformers.OlmoeConfig(**SIZES, **EXPERTS),
        ("experts", "norms of queries and keys"),
        target_modules=ATTENTION,
    ),
    "deepseek_v3": Family(
        transformers.DeepseekV3Config(
            **SIZES | {"num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=24, n_group=1, topk_group=1, kv_lora_rank=16, q_lora_rank=16,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, first_k_dense_replace=1,
        ),
        ("latent attention", "values of another size than keys", "experts"),
        target_modules=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    ),
}  # fmt: skip
LONG = {"long_factor": [4.0, 3.0, 2.0, 5.0], "original_max_position_embeddings": TRAINED_LEN}
FAMILIES |= {
    "llama, dynamic RoPE": Family(
        transformers.LlamaConfig(
            **SIZES | {"max_position_embeddings": TRAINED_LEN}, **rope_of("dynamic", factor=2.0)
        ),
        ("RoPE that changes with the context",),
        without=(rope_of("default"),),
        frozen={"max_position_embeddings": 128}
        | rope_of(
            "default",
            rope_theta=ntk_theta(MAX_MODEL_LEN, trained=TRAINED_LEN, factor=2.0, head_dim=8),
        ),
    ),
    "phi3, longrope": Family(
        transformers.Phi3Config(
            **SIZES,
            original_max_position_embeddings=TRAINED_LEN,
            **rope_of("longrope", short_factor=[1.0, 1.1, 1.2, 1.3], **LONG),
        ),
        ("RoPE that changes with the context", "fused projections"),
        without=(rope_of("default"),),
        frozen=rope_of("longrope", short_factor=LONG["long_factor"], **LONG),
    ),
    "qwen2, yarn": Family(
        transformers.Qwen2Config(
            **SIZES,
            **rope_of("yarn", factor=4.0, original_max_position_embeddings=TRAINED_LEN),
        ),
        ("RoPE of more than the trained context",),
        without=(rope_of("default"),),
    ),
    "llama, llama3 RoPE": Family(
        transformers.LlamaConfig(
            **SIZES,
            **rope_of(
                "llama3",
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=TRAINED_LEN,
            ),
        ),
        ("RoPE of more than the trained context",),
        without=(rope_of("default"),),
    ),
}


class Case:
    """A family's model and adapter, and the models of transformers and PEFT beside them."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.family = name, FAMILIES[name]
        self.path = save_random_model(self.family.config, folder / "model")
        self.source = FolderSource(folder)
        save_adapter(
            self.path,
            folder / ADAPTER,
            seed=1,
            r=4,
            lora_alpha=6,
            target_modules=self.family.target_modules,
            fan_in_fan_out=name == "gpt2",
        )
        self.loaded = self.load()
        store(folder / ADAPTER, self.loaded.base_shape)
        self.models = {
            BASE: Alone(self.reference()),
            ADAPTER: Alone(load_with_peft(self.reference(), folder / ADAPTER)),
        }

    def load(self, **settings: Any) -> LoadedModel:
        settings = {"max_model_len": MAX_MODEL_LEN} | settings
        return load(EngineConfig(model=self.path, served_name="base", **settings))

    def reference(self, **settings: Any) -> Any:
        """transformers' own model, with other settings than its checkpoint names."""
        settings = self.family.frozen | settings
        return AutoModelForCausalLM.from_pretrained(
            self.path, dtype=torch.float32, attn_implementation="eager", **settings
        ).eval()

    def lab(self, kernels: Kernels) -> WatchedLab:
        """With memory for the adapter, the longest sequence and little more."""
        size_bytes = adapter_bytes(self.source.root / ADAPTER, self.loaded)
        num_blocks = -(-size_bytes // block_bytes(self.loaded, block_size=BLOCK_SIZE))
        lab = WatchedLab(
            self.path,
            self.source,
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks + 2 * MAX_MODEL_LEN // BLOCK_SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=6,
            max_num_batched_tokens=16,
            max_loras=2,
        )
        lab.core._runner._loaded = replace(lab.core._loaded, kernels=kernels)
        return lab

    def compare(self, adapter: str | None, prompt: list[int], answer: Answer) -> int:
        """The number of ties; fails where anything is not as the reference has it."""
        assert answer.state is SequenceState.LENGTH, answer.last.fault
        alone, found = self.models[adapter], answer.token_ids
        rows = alone.logprobs([*prompt, *found])[len(prompt) - 1 : -1]
        assert_told(answer.logprobs, found, rows, num_top=NUM_TOP)
        return num_ties(rows, found)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("family"))


@dataclass(slots=True)
class Measured:
    """One line of the table."""

    family: str
    traits: tuple[str, ...]
    num_target_modules: int
    num_greedy_tokens: int = 0
    num_ties: int = 0
    largest_module_error: float = 0.0


def ask(lab: WatchedLab) -> list[tuple[str | None, list[int], Any]]:
    """Short and long, of the base model and of the adapter, and then the same beginnings again."""
    # Brought first: on a busy machine it would come when the base model's answers are over.
    lab.submit(PROMPTS[0][:2], adapter=ADAPTER, max_tokens=1)
    lab.run()
    asked = []
    for ending in ([], [3], [4, 5]):
        for prompt in PROMPTS:
            for adapter in (BASE, ADAPTER):
                own = [*prompt, *ending]
                key = lab.submit(own, adapter=adapter, max_tokens=NUM_TOKENS, logprobs=NUM_TOP)
                asked.append((adapter, own, key))
        for _ in range(9):
            lab.step()
    lab.run()
    lab.assert_nothing_is_left()
    return asked


@pytest.mark.parametrize(
    "kernels",
    [
        pytest.param(COMPILED, id="compiled"),
        pytest.param(DENSE, id="dense"),
        pytest.param(DEFINED, id="defined"),
        pytest.param(INTERPRETED, id="interpreted", marks=pytest.mark.slow),
    ],
)
def test_a_family_answers_with_the_tokens_of_transformers_and_peft(
    case: Case, kernels: Kernels, request: pytest.FixtureRequest
) -> None:
    lab = case.lab(kernels)
    with closing(lab.core):
        asked = ask(lab)
        report = lab.core.probe(ADAPTER)
    row = Measured(case.name, case.family.traits, report.num_modules)
    row.largest_module_error = report.largest_relative_error
    for adapter, prompt, key in asked:
        answer = lab.answers[key]
        lab.seen["found"] += answer.last.cached_tokens > 0
        row.num_greedy_tokens += NUM_TOKENS
        row.num_ties += case.compare(adapter, prompt, answer)
    for event in ("mixed", "chunked", "preempted", "found"):
        assert lab.seen[event], f"there was no {event}"
    assert report.is_passed, report
    if kernels is COMPILED and request.config.getoption("--write-results"):
        write(row)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_family_pools_the_hidden_states_of_transformers_and_peft(
    case: Case, pooling: PoolingKind
) -> None:
    lab = case.lab(COMPILED)
    with closing(lab.core):
        asked = [
            (adapter, prompt, lab.submit(prompt, adapter=adapter, pooling=pooling))
            for prompt in PROMPTS
            for adapter in (BASE, ADAPTER)
        ]
        lab.run()
        lab.assert_nothing_is_left()
    for adapter, prompt, key in asked:
        expected = pooled_reference(case.models[adapter].model, prompt, pooling)
        torch.testing.assert_close(lab.answers[key].vector, expected, atol=1e-5, rtol=0)


def test_what_is_particular_to_the_family_changes_its_answers(case: Case) -> None:
    """Otherwise nothing above would have been proved."""
    expected = case.models[BASE].logprobs(PROMPTS[1])
    for without in case.family.without:
        other = Alone(case.reference(**without)).logprobs(PROMPTS[1])
        assert float((other - expected).abs().max()) > 100 * ATOL, without


def test_a_family_passes_the_check_in_half_precision(case: Case) -> None:
    loaded = case.load(dtype="bfloat16")
    assert loaded.layers == tuple(replace(one, dtype=loaded.dtype) for one in case.loaded.layers)


def write(row: Measured) -> None:
    """Put a family's line into the file, in place of the one that it had."""
    old = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = [one for one in old if one["family"] != row.family]
    found = {
        "command": "pytest tests/parity/test_families.py --write-results",
        "versions": {name: version(name) for name in ("peft", "torch", "transformers")},
        "windows": WINDOW,
        "prompt_lengths": LENGTHS,
        "rows": [*rows, asdict(row)],
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
