"""Tell what each tensor of an adapter is for: a half of LoRA, a parameter, trained tokens, or none.

Reads names alone. Whether shapes and numbers fit is for `validate` to say.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from adapters.base_shape import BaseShape
from adapters.lora_config import LoraConfig
from adapters.names import ModuleNames, Part, TensorName, parse
from adapters.tensor_file import TensorEntry


@dataclass(frozen=True, slots=True)
class LoraEntry:
    """The LoRA of one module: y = W x + scaling * B A x, and with DoRA its rows' norms."""

    rank: int
    alpha: int | float
    scaling: float
    # The path that the module had where it was trained, which the configuration's patterns mean.
    trained_as: str
    # [rank, in_features]; of an embedding [rank, num_embeddings]
    lora_A: TensorEntry
    # [out_features, rank]; of an embedding [dim, rank]
    lora_B: TensorEntry
    is_embedding: bool = False
    # [out_features] or [dim]: DoRA's trained norms
    magnitude: TensorEntry | None = None

    def tensors(self) -> Iterator[tuple[str, TensorEntry]]:
        """Yield each tensor with PEFT's name for it, in the order of the digest."""
        yield ("lora_embedding_A" if self.is_embedding else "lora_A.weight"), self.lora_A
        yield ("lora_embedding_B" if self.is_embedding else "lora_B.weight"), self.lora_B
        if self.magnitude:
            yield "lora_magnitude_vector", self.magnitude


@dataclass(frozen=True, slots=True)
class TokensEntry:
    """Rows of an embedding or an output layer that the adapter brings itself."""

    # In the order of the rows.
    token_ids: tuple[int, ...]
    # [num_tokens, dim]
    rows: TensorEntry


@dataclass(frozen=True, slots=True)
class Parts:
    """All that an adapter changes, by where it changes it, and the tensors that change nothing."""

    # With the base model's own paths of modules.
    config: LoraConfig
    # By module path.
    lora: dict[str, LoraEntry]
    # By parameter path, e.g. "lm_head.weight".
    replaced: dict[str, TensorEntry]
    # By module path.
    tokens: dict[str, TokensEntry]
    # Tensors that PEFT wrote twice: the name of one that is not used, of one that is.
    copies: tuple[tuple[str, str], ...]
    # What would go unused: name -> why, as the code of a finding.
    leftovers: dict[str, str]


def sort(
    tensors: dict[str, TensorEntry], config: LoraConfig, base_shape: BaseShape | None = None
) -> Parts:
    """Return what the tensors of a file are for.

    Without a base model, names are taken as they are, or as a canonical configuration has them.
    """
    return _Sorter(tensors, config, base_shape).sort()


class _Sorter:
    """Takes tensors out of `_found` until none is left, or what is left has no use."""

    def __init__(
        self, tensors: dict[str, TensorEntry], config: LoraConfig, base_shape: BaseShape | None
    ) -> None:
        names = ModuleNames(base_shape.module_paths() if base_shape else _listed(config))
        self._tensors = tensors
        self._config = config.renamed(names.resolve)
        self._base_shape = base_shape
        self._found: dict[TensorName, TensorEntry] = {}
        self._trained_as: dict[str, str] = {}
        self._copies: list[tuple[str, str]] = []
        self._leftovers: dict[str, str] = {}
        self._find(names)

    def sort(self) -> Parts:
        lora = {module: entry for module in self._modules() if (entry := self._lora(module))}
        tokens = self._tokens()
        replaced = self._replaced()
        for name, unused in self._found.items():
            self._leftovers[unused.name] = _why_unused(name, lora)
        copies = tuple(self._copies)
        return Parts(self._config, lora, replaced, tokens, copies, self._leftovers)

    def _find(self, names: ModuleNames) -> None:
        for name in sorted(self._tensors):
            meaning = parse(name)
            if meaning is None:
                self._leftovers[name] = "unused_tensor"
                continue
            module = names.resolve(meaning.module)
            self._trained_as.setdefault(module, meaning.module)
            meaning = TensorName(module, meaning.part, meaning.parameter)
            if meaning in self._found:
                self._leftovers[name] = "duplicate_tensor"
            else:
                self._found[meaning] = self._tensors[name]

    def _modules(self) -> list[str]:
        return sorted({name.module for name in self._found})

    def _take(self, module: str, part: Part) -> TensorEntry | None:
        return self._found.pop(TensorName(module, part), None)

    def _has(self, module: str, *parts: Part) -> bool:
        return all(TensorName(module, part) in self._found for part in parts)

    def _lora(self, module: str) -> LoraEntry | None:
        config = self._config
        is_embedding = self._has(module, Part.EMBEDDING_A, Part.EMBEDDING_B)
        sides = (Part.EMBEDDING_A, Part.EMBEDDING_B) if is_embedding else (Part.LORA_A, Part.LORA_B)
        if not self._has(module, *sides):
            return None
        halves = [self._found.pop(TensorName(module, side)) for side in sides]
        # The second name is the one that a canonical configuration has.
        names = (self._trained_as[module], module)
        return LoraEntry(
            rank=config.rank_of(*names),
            alpha=config.alpha_of(*names),
            scaling=config.scaling_of(*names),
            trained_as=names[0],
            lora_A=halves[0],
            lora_B=halves[1],
            is_embedding=is_embedding,
            magnitude=self._take(module, Part.MAGNITUDE) if config.use_dora else None,
        )

    def _tokens(self) -> dict[str, TokensEntry]:
        tokens = {}
        for module in self._modules():
            token_ids = self._config.token_ids_of(module) if self._takes_tokens(module) else None
            if token_ids and (rows := self._take(module, Part.TOKENS)):
                tokens[module] = TokensEntry(token_ids, rows)
        return tokens | self._tied_tokens(tokens)

    def _takes_tokens(self, module: str) -> bool:
        """A list of token ids is the input embedding's, and the output layer's where it is tied."""
        if isinstance(self._config.token_ids, dict) or self._base_shape is None:
            return True
        return module in (self._base_shape.tied_modules or (self._base_shape.input_embedding,))

    def _tied_tokens(self, tokens: dict[str, TokensEntry]) -> dict[str, TokensEntry]:
        """An output layer that shares the embedding's weights shares its trained tokens."""
        for source, target in self._tied_pairs(tokens):
            wanted = self._config.token_ids_of(target)
            if source not in tokens or wanted not in (None, tokens[source].token_ids):
                continue
            if target in tokens:
                self._copies.append((tokens[target].rows.name, tokens[source].rows.name))
            return {target: tokens[source]}
        return {}

    def _tied_pairs(self, tokens: dict[str, TokensEntry]) -> Iterator[tuple[str, str]]:
        if self._base_shape:
            if self._base_shape.tied_modules:
                yield self._base_shape.tied_modules
            return
        # A canonical configuration names both.
        listed = self._config.token_ids if isinstance(self._config.token_ids, dict) else {}
        yield from ((s, target) for target in listed if target not in tokens for s in tokens)

    def _replaced(self) -> dict[str, TensorEntry]:
        own: dict[str, TensorEntry] = {}
        for part in (Part.PARAMETER, Part.SAVED):
            for name in [name for name in self._found if name.part is part]:
                entry = self._found.pop(name)
                path = f"{name.module}.{name.parameter}"
                if path in own:
                    self._copies.append((entry.name, own[path].name))
                own.setdefault(path, entry)
        for name in [name for name in self._found if name.part is Part.ORIGINAL]:
            if f"{name.module}.{name.parameter}" in own:
                del self._found[name]
        shared = {
            path: self._tensors[name]
            for path, name in self._config.parameter_tensors.items()
            if name in self._tensors and not self._base_shape
        }
        return self._with_tied({**shared, **own})

    def _with_tied(self, replaced: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
        """Where the base model ties two layers, a tensor that PEFT loads into one is in both."""
        if not (self._base_shape and self._base_shape.tied_modules):
            return replaced
        pair = self._base_shape.tied_modules
        loose = [f"{m}.weight" for m in pair if not self._config.saves(m)]
        loose = [path for path in loose if path in replaced]
        both = [replaced[path] for m in pair if (path := f"{m}.weight") in replaced]
        if len(both) == 2 and (len(loose) == 2 or self._config.is_tying):
            self._copies.append((both[1].name, both[0].name))
        if len(both) == 1 and loose:
            return replaced | {f"{module}.weight": both[0] for module in pair}
        return replaced


def _listed(config: LoraConfig) -> Iterator[str]:
    """All modules that a canonical configuration names, which are all that the adapter changes."""
    if not config.is_canonical:
        return
    if isinstance(config.target_modules, frozenset):
        yield from config.target_modules
    yield from config.modules_to_save.names
    if isinstance(config.token_ids, dict):
        yield from config.token_ids
    yield from {path.rpartition(".")[0] for path in config.parameter_tensors}


def _why_unused(name: TensorName, lora: dict[str, LoraEntry]) -> str:
    if name.part in (Part.LORA_A, Part.LORA_B, Part.EMBEDDING_A, Part.EMBEDDING_B):
        return "missing_pair" if name.module not in lora else "unused_tensor"
    is_for_lora = name.part is Part.MAGNITUDE and name.module in lora
    return "not_configured" if is_for_lora or name.part is Part.TOKENS else "unused_tensor"
