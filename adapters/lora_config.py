"""Read `adapter_config.json`: which modules PEFT adapts, at which rank and which scaling.

The meaning of each field is PEFT's own (0.21). A field that would change what the adapter computes
and that we do not serve becomes a finding; it is never dropped.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec

from adapters.errors import Finding, InvalidAdapter, UnreadableArtifact
from adapters.patterns import Ends, Pattern, PatternTable, tails

FILE_NAME = "adapter_config.json"
MAX_SIZE_BYTES = 4 << 20
MAX_RANK = 65_536
# Layers of trained tokens: models have one or two.
MAX_TOKEN_LAYERS = 64
ALL_LINEAR = "all-linear"

Number = TypeVar("Number", int, int | float)

# Ways to begin training that leave the base model's weights as they are. The others (pissa, olora,
# corda, loftq, lora_ga) train against a changed base, which no server has.
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")

_TYPES: dict[str, Any] = {
    "r": int,
    "lora_alpha": int | float,
    "use_rslora": bool,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, int | float] | None,
    "target_modules": list[str] | str | None,
    "exclude_modules": list[str] | str | None,
    "layers_to_transform": list[int] | int | None,
    "layers_pattern": list[str] | str | None,
    "base_model_name_or_path": str | None,
    "bias": Literal["none", "all", "lora_only"],
    "ensure_weight_tying": bool,
    # Whether the base stores its weights transposed, which the shapes of LoRA do not show.
    "fan_in_fan_out": bool,
    "modules_to_save": list[str] | None,
    "trainable_token_indices": list[int] | dict[str, list[int]] | None,
    "use_dora": bool,
    "parameter_tensors": dict[str, str] | None,
}

# Fields about training, provenance or the shape of PEFT's own process.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "ephemeral_gpu_offload",
        "eva_config",
        "inference_mode",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)

_NOT_SERVED = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "loftq_config": "LoftQ",
    "lora_bias": "a bias on lora_B",
    "megatron_config": "Megatron layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on bare parameters, such as those of experts,",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}

# What `Manifest.canonical_config` writes.
_CANONICAL_FIELDS = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "inference_mode",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
}
# Written only where they say something.
_CANONICAL_EXTRAS = {
    "bias",
    "fan_in_fan_out",
    "modules_to_save",
    "parameter_tensors",
    "trainable_token_indices",
    "use_dora",
}


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What a configuration says about the function that an adapter computes."""

    rank: int
    alpha: int | float
    use_rslora: bool
    rank_pattern: PatternTable[int]
    alpha_pattern: PatternTable[int | float]
    # Names, one pattern over the whole path, or None for every Linear but the output layer.
    target_modules: frozenset[str] | Pattern | None
    exclude_modules: frozenset[str] | Pattern
    # None means all.
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    # Whether we wrote it ourselves, so that every module is named in full.
    is_canonical: bool
    # What the trainer called the base model: a name or a path of theirs.
    base_model_name: str | None
    bias: str
    use_dora: bool
    is_transposed: bool
    # Ends of the paths of modules that the adapter brings whole.
    modules_to_save: Ends
    # Trained tokens in the order of their rows: of the input embedding, or by end of module path.
    token_ids: tuple[int, ...] | dict[str, tuple[int, ...]]
    # Whether a tied output layer is changed together with the embedding.
    is_tying: bool
    # Names of the tensors that replace parameters, where their own names do not tell; only
    # `Manifest.canonical_config` writes it.
    parameter_tensors: dict[str, str]

    def rank_of(self, *names: str) -> int:
        """The rank of a module, whose names are tried in turn."""
        return _first(self.rank_pattern, names, default=self.rank)

    def alpha_of(self, *names: str) -> int | float:
        return _first(self.alpha_pattern, names, default=self.alpha)

    def scaling_of(self, *names: str) -> float:
        rank = self.rank_of(*names)
        return self.alpha_of(*names) / (math.sqrt(rank) if self.use_rslora else rank)

    def renamed(self, resolve: Callable[[str], str]) -> "LoraConfig":
        """Return it with paths of modules as the base model has them; plain names stay."""
        ids = self.token_ids
        if isinstance(ids, dict):
            ids = {resolve(end) if "." in end else end: each for end, each in ids.items()}
        saved = Ends(resolve(end) if "." in end else end for end in self.modules_to_save.names)
        return dataclasses.replace(self, modules_to_save=saved, token_ids=ids)

    def targets(self, module: str, *, is_inner_linear: bool = True) -> bool:
        """Whether PEFT would put LoRA on the module at this path.

        `is_inner_linear`: it is a linear layer, and not the one that computes logits.
        """
        if _is_named(module, self.exclude_modules) or self._is_within_saved(module):
            return False
        if self.target_modules is None:
            return is_inner_linear
        if isinstance(self.target_modules, Pattern):
            return self.target_modules.matches(module)
        if module in self.target_modules:
            return True
        return _is_named(module, self.target_modules) and self._is_in_layers(module)

    def saves(self, module: str) -> bool:
        """Whether the module at this path, or one around it, is among `modules_to_save`."""
        around = [module[:place] for place, char in enumerate(module) if char == "."]
        return any(self.modules_to_save.find(path) for path in (module, *around))

    def token_ids_of(self, module: str) -> tuple[int, ...] | None:
        """Return the trained tokens of an embedding or output layer in the order of their rows."""
        if not isinstance(self.token_ids, dict):
            return self.token_ids or None
        end = Ends(self.token_ids).find(module)
        return self.token_ids[end] if end else None

    def _is_within_saved(self, module: str) -> bool:
        parts = module.split(".")
        ends = range(1, len(parts) + 1)
        within = (".".join(parts[begin:end]) for end in ends for begin in range(end))
        return any(path in self.modules_to_save.names for path in within)

    def _is_in_layers(self, module: str) -> bool:
        if self.layers_to_transform is None:
            return True
        index = _layer_index(module, self.layers_pattern)
        return index is not None and index in self.layers_to_transform


def _first(table: PatternTable[Number], names: tuple[str, ...], *, default: Number) -> Number:
    found = (table.find(name) for name in dict.fromkeys(names))
    return next((value for value in found if value is not None), default)


def _is_named(module: str, names: frozenset[str] | Pattern) -> bool:
    if isinstance(names, Pattern):
        return names.matches(module)
    return any(tail in names for tail in tails(module))


def _layer_index(module: str, containers: tuple[str, ...]) -> int | None:
    if not containers:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", module)
        return int(match[1]) if match else None
    for container in containers:
        if match := re.match(rf"(?:^|.*?\.){re.escape(container)}\.(\d+)\.", module):
            return int(match[1])
    return None


def parse(data: bytes) -> tuple[LoraConfig, list[Finding]]:
    """Return the configuration and what in it we do not serve.

    Raises UnreadableArtifact when it is not a JSON object, and InvalidAdapter when its fields
    cannot be understood at all.
    """
    fields = _decode(data)
    _require_lora(fields)
    config = _build(_typed(fields))
    is_literal = config.rank_pattern.is_literal and config.alpha_pattern.is_literal
    is_ours = _CANONICAL_FIELDS <= set(fields) <= _CANONICAL_FIELDS | _CANONICAL_EXTRAS
    config = dataclasses.replace(config, is_canonical=is_literal and is_ours)
    return config, _unserved(fields)


def _decode(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_SIZE_BYTES:
        raise _unreadable(f"is larger than {MAX_SIZE_BYTES} bytes")
    try:
        fields = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
        # Half a surrogate pair can be written in JSON, and can be sent to nobody.
        json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise _unreadable(f"is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise _unreadable("is not a JSON object")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("the same key appears twice in one object")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _unreadable(problem: str) -> UnreadableArtifact:
    return UnreadableArtifact(
        [
            Finding(
                code="config_unreadable",
                where=FILE_NAME,
                message=problem,
                fix="upload the file that PEFT's save_pretrained wrote",
            )
        ]
    )


def _require_lora(fields: dict[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        finding = Finding(
            code="peft_type_not_served",
            where="peft_type",
            message=f"is {fields.get('peft_type')!r}; only LORA adapters are served",
            fix="train a LoRA adapter with PEFT",
        )
        raise InvalidAdapter([finding])


def _typed(fields: dict[str, Any]) -> dict[str, Any]:
    # What PEFT assumes where an older version left a field out.
    typed: dict[str, Any] = {"r": 8, "lora_alpha": 8, "use_rslora": False, "bias": "none"}
    findings = []
    for name, kind in _TYPES.items():
        if name not in fields:
            continue
        try:
            typed[name] = msgspec.convert(fields[name], kind)
        except msgspec.ValidationError as error:
            findings.append(_wrong(name, str(error)))
    if fields.get("target_modules") is None:
        findings.append(_wrong("target_modules", "is missing: it names the adapted modules"))
    findings += _out_of_range(typed)
    if findings:
        raise InvalidAdapter(findings)
    return typed


def _wrong(field: str, problem: str) -> Finding:
    return Finding(
        code="config_field_invalid",
        where=field,
        message=problem,
        fix=f"correct `{field}` in {FILE_NAME}",
    )


def _out_of_range(typed: dict[str, Any]) -> list[Finding]:
    ranks = {"r": typed["r"], **_entries("rank_pattern", typed)}
    alphas = {"lora_alpha": typed["lora_alpha"], **_entries("alpha_pattern", typed)}
    findings = [
        _wrong(name, f"is no rank between 1 and {MAX_RANK}")
        for name, rank in ranks.items()
        if not 1 <= rank <= MAX_RANK
    ]
    findings += [
        _wrong(name, "is not a finite number")
        for name, alpha in alphas.items()
        if not -1e9 < alpha < 1e9
    ]
    if isinstance(typed.get("target_modules"), str) and typed.get("layers_to_transform"):
        findings.append(_wrong("layers_to_transform", "needs target_modules as a list of names"))
    findings += [
        _wrong(field, f"{name[:200]!r} is not a plain module name")
        for field in ("layers_pattern", "modules_to_save", "trainable_token_indices")
        for name in _names(typed.get(field))
        if not re.fullmatch(r"\w+(\.\w+)*", name)
    ]
    if len(_token_lists(typed.get("trainable_token_indices"))) > MAX_TOKEN_LAYERS:
        findings.append(_wrong("trainable_token_indices", f"names over {MAX_TOKEN_LAYERS} layers"))
    findings += [
        _wrong("trainable_token_indices", "has a token id that is negative or there twice")
        for ids in _token_lists(typed.get("trainable_token_indices"))
        if min(ids, default=0) < 0 or len(set(ids)) < len(ids)
    ]
    return findings


def _entries(field: str, typed: dict[str, Any]) -> dict[str, Any]:
    return {f"{field}[{key!r}]": value for key, value in (typed.get(field) or {}).items()}


def _names(value: list[str] | list[int] | dict[str, list[int]] | str | None) -> list[str]:
    """The module names in a field, which may hold something else instead."""
    if isinstance(value, str):
        return [value] if value else []
    return [name for name in value or () if isinstance(name, str)]


def _token_lists(value: list[int] | dict[str, list[int]] | None) -> list[list[int]]:
    return list(value.values()) if isinstance(value, dict) else [value or []]


def _build(typed: dict[str, Any]) -> LoraConfig:
    layers = typed.get("layers_to_transform")
    return LoraConfig(
        rank=typed["r"],
        alpha=typed["lora_alpha"],
        use_rslora=typed["use_rslora"],
        rank_pattern=_table("rank_pattern", typed.get("rank_pattern")),
        alpha_pattern=_table("alpha_pattern", typed.get("alpha_pattern")),
        target_modules=_targets(typed["target_modules"]),
        exclude_modules=_selection("exclude_modules", typed.get("exclude_modules") or ()),
        layers_to_transform=_layers(layers),
        layers_pattern=tuple(_names(typed.get("layers_pattern"))),
        is_canonical=False,
        base_model_name=typed.get("base_model_name_or_path"),
        bias=typed["bias"],
        use_dora=typed.get("use_dora", False),
        is_transposed=typed.get("fan_in_fan_out", False),
        modules_to_save=Ends(typed.get("modules_to_save") or ()),
        token_ids=_token_ids(typed.get("trainable_token_indices")),
        is_tying=typed.get("ensure_weight_tying", False),
        parameter_tensors=typed.get("parameter_tensors") or {},
    )


def _token_ids(
    value: list[int] | dict[str, list[int]] | None,
) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    if isinstance(value, dict):
        return {end: tuple(ids) for end, ids in value.items() if ids}
    return tuple(value or ())


def _table(field: str, entries: dict[str, Any] | None) -> PatternTable[Any]:
    return PatternTable((entries or {}).items(), field=field)


def _targets(value: list[str] | str) -> frozenset[str] | Pattern | None:
    if isinstance(value, str) and value.lower() == ALL_LINEAR:
        return None
    return _selection("target_modules", value)


def _selection(field: str, value: Sequence[str]) -> frozenset[str] | Pattern:
    return Pattern(value, field=field) if isinstance(value, str) else frozenset(value)


def _layers(value: list[int] | int | None) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    return frozenset([value] if isinstance(value, int) else value)


def _unserved(fields: dict[str, Any]) -> list[Finding]:
    findings = [
        _not_served(field, f"{what} is not served yet")
        for field, what in _NOT_SERVED.items()
        if not _is_default(fields.get(field))
    ]
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        findings.append(_not_served("task_type", "only CAUSAL_LM adapters are served"))
    if fields.get("init_lora_weights", True) not in _HARMLESS_INITS:
        findings.append(
            _not_served("init_lora_weights", "the adapter was trained against changed base weights")
        )
    known = {*_TYPES, *_HARMLESS, *_NOT_SERVED, "task_type", "init_lora_weights"}
    findings += [
        _not_served(field[:200], "is a field that this server does not know")
        for field, value in fields.items()
        if field not in known | {"peft_type"} and not _is_default(value)
    ]
    return findings


def _is_default(value: object) -> bool:
    """Whether a value says "not used" in the way that PEFT writes it."""
    return value is None or value is False or value in ({}, [])


def _not_served(field: str, problem: str) -> Finding:
    return Finding(
        code="field_not_served",
        where=field,
        message=problem,
        fix=f"train without `{field}`, or convert the adapter to plain LoRA",
    )
