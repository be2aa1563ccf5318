"""A configuration is understood as PEFT understands it, or each field that is not is named."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from adapters import lora_config
from adapters.errors import InvalidAdapter, UnreadableArtifact
from tests.adapters.tiny_adapters import Saved

SMALLEST: dict[str, Any] = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}

PATHS = [
    "q_proj",
    "lm_head",
    "layers.1.q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.self_attn.xq_proj",
    "model.layers.1.experts.0.q_proj",
    "model.layers.2.mlp.up_proj",
    "transformer.h.2.attn.q_proj",
]


def config_bytes(**fields: Any) -> bytes:
    return msgspec.json.encode({**SMALLEST, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": ["self_attn.q_proj", "up_proj"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": [7]},
        {"target_modules": r".*\.(q|up)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["self_attn.q_proj"]},
        {"exclude_modules": r".*layers\.1.*"},
        {"layers_to_transform": [1, 2]},
        {"layers_to_transform": 1},
        {"layers_to_transform": []},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"layers_to_transform": [2], "layers_pattern": ["layers", "transformer.h"]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        {"modules_to_save": ["self_attn"]},
        {"modules_to_save": ["layers.1", "_proj"]},
    ],
)
def test_targets_are_those_that_peft_would_adapt(fields: dict[str, Any]) -> None:
    ours, findings = lora_config.parse(config_bytes(**fields))
    peft = PeftLoraConfig(**{**SMALLEST, **fields})
    assert findings == []
    for path in PATHS:
        assert ours.targets(path) == bool(check_target_module_exists(peft, path)), path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alora_invocation_tokens", [5]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("lora_bias", True),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("megatron_config", {"a": 1}),
        ("loftq_config", {"loftq_bits": 4}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("task_type", "SEQ_CLS"),
        ("use_qalora", True),
        ("use_bdlora", {"target_modules_bd_a": ["q_proj"]}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("monteclora_config", {"num_samples": 8}),
        ("velora_config", {"num_groups": 32}),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "loftq"),
        ("invented_next_year", {"a": 1}),
        ("invented_next_year", 0.5),
    ],
)
def test_a_field_that_is_not_served_is_named(field: str, value: Any) -> None:
    _, findings = lora_config.parse(config_bytes(**{field: value}))
    assert [(f.code, f.where) for f in findings] == [("field_not_served", field)]
    assert field in findings[0].fix


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "eva"),
        ("eva_config", {"rho": 2.0}),
        ("lora_dropout", 0.1),
        ("runtime_config", {"ephemeral_gpu_offload": False}),
        ("task_type", None),
        ("invented_next_year", None),
        ("invented_next_year", False),
        ("invented_next_year", []),
    ],
)
def test_a_field_that_changes_nothing_is_accepted(field: str, value: Any) -> None:
    assert lora_config.parse(config_bytes(**{field: value}))[1] == []


@pytest.mark.parametrize(
    ("field", "value", "where"),
    [
        ("r", 0, "r"),
        ("r", "8", "r"),
        ("r", True, "r"),
        ("r", 8.0, "r"),
        ("r", 10**400, "r"),
        ("lora_alpha", "16", "lora_alpha"),
        ("lora_alpha", 1e300, "lora_alpha"),
        ("use_rslora", 1, "use_rslora"),
        ("rank_pattern", {"q_proj": -1}, "rank_pattern['q_proj']"),
        ("alpha_pattern", ["q_proj"], "alpha_pattern"),
        ("target_modules", None, "target_modules"),
        ("target_modules", [1], "target_modules"),
        ("layers_pattern", "(a+)+", "layers_pattern"),
        ("layers_to_transform", "all", "layers_to_transform"),
        ("bias", "some", "bias"),
        ("bias", None, "bias"),
        ("use_dora", "yes", "use_dora"),
        ("modules_to_save", "lm_head", "modules_to_save"),
        ("modules_to_save", [".*"], "modules_to_save"),
        ("trainable_token_indices", [1, -1], "trainable_token_indices"),
        ("trainable_token_indices", [1, 1], "trainable_token_indices"),
        ("trainable_token_indices", {"embed_tokens": [1, "2"]}, "trainable_token_indices"),
        ("trainable_token_indices", {"embed.*": [1]}, "trainable_token_indices"),
        ("trainable_token_indices", {f"e{n}": [1] for n in range(65)}, "trainable_token_indices"),
        ("ensure_weight_tying", 1, "ensure_weight_tying"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(field: str, value: Any, where: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        lora_config.parse(config_bytes(**{field: value}))
    assert [f.where for f in caught.value.findings] == [where]


def test_all_fields_that_make_no_sense_are_told_at_once() -> None:
    with pytest.raises(InvalidAdapter) as caught:
        lora_config.parse(config_bytes(r="a", lora_alpha="b", use_rslora="c"))
    assert {f.where for f in caught.value.findings} == {"r", "lora_alpha", "use_rslora"}


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_hostile_pattern_is_refused_by_the_name_of_its_field(field: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        lora_config.parse(config_bytes(**{field: {r"(?=a)": 4}}))
    assert [f.where for f in caught.value.findings] == [field]


def test_a_list_of_modules_to_save_without_end_costs_little_for_each_module() -> None:
    names = [f"m{number}" for number in range(200_000)]
    config, _ = lora_config.parse(config_bytes(modules_to_save=[*names, "norm"]))
    saved = [config.saves(f"model.layers.{number}.input_layernorm") for number in range(1000)]
    assert all(saved)
    assert not config.saves("model.layers.0.self_attn")


def test_another_kind_of_adapter_is_refused_by_name() -> None:
    with pytest.raises(InvalidAdapter, match="LOHA"):
        lora_config.parse(config_bytes(peft_type="LOHA"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"r": NaN}',
        b'{"r": 1, "r": 2}',
        b'{"\\ud800": 1}',
        b"9" * 5000,
        b" " * (lora_config.MAX_SIZE_BYTES + 1),
    ],
)
def test_what_is_no_json_object_is_unreadable(data: bytes) -> None:
    with pytest.raises(UnreadableArtifact) as caught:
        lora_config.parse(data)
    assert [f.code for f in caught.value.findings] == ["config_unreadable"]


def test_peft_s_own_default_configuration_has_no_findings(
    save_adapter: Callable[..., Saved],
) -> None:
    config, findings = lora_config.parse(save_adapter().config_path.read_bytes())
    assert findings == []
    assert (config.rank, config.alpha) == (4, 16)
