"""What of a base model an adapter may change: names and shapes, exported by the engine."""

from collections.abc import Iterator

import msgspec


class BaseShape(msgspec.Struct, frozen=True):
    """What of a base model an adapter may change."""

    # The served name.
    base_model: str
    # Linear layers that LoRA may target, by full path, e.g. "model.layers.0.self_attn.q_proj"
    # -> (in_features, out_features). The output layer is one of them where it can be served.
    modules: dict[str, tuple[int, int]]
    # Embeddings, by full path -> (num_embeddings, dim); that of token ids comes first.
    embeddings: dict[str, tuple[int, int]] = {}
    # What an adapter may bring whole, by full path -> shape: parameters of modules that treat each
    # token by itself, e.g. "model.norm.weight" or "model.layers.0.self_attn.q_proj.bias"
    parameters: dict[str, tuple[int, ...]] = {}
    # What no adapter may change: the weights of many experts, stacked in one parameter, by full
    # path -> shape, e.g. "model.layers.0.mlp.experts.down_proj" -> (8, 4096, 14336)
    experts: dict[str, tuple[int, ...]] = {}
    # The output layer's full path; None where it takes no adapter.
    output_layer: str | None = None
    # Whether the output layer's weights are those of the embedding.
    is_tied: bool = False

    @property
    def input_embedding(self) -> str | None:
        """The full path of the embedding that reads token ids."""
        return next(iter(self.embeddings), None)

    @property
    def tied_modules(self) -> tuple[str, str] | None:
        """(embedding, output layer) where they share their weights."""
        if self.is_tied and self.input_embedding and self.output_layer:
            return self.input_embedding, self.output_layer
        return None

    def expert_group(self, module: str) -> str | None:
        """The experts' own module where an adapter's module is one of them, or in one; else None.

        Trainers name each expert by its number where the base model stacks them all.
        """
        if not self.experts:
            return None
        groups = {path.rpartition(".")[0] for path in self.experts}
        parts = module.split(".")
        around = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        named = ".".join(parts[: parts.index("experts") + 1]) if "experts" in parts else None
        return next((path for path in around if path in groups), named)

    def num_tokens_of(self, parameter: str) -> int:
        """Rows of a parameter that has one for each token, which an adapter may add to; else 0."""
        module = parameter.rpartition(".")[0]
        if module in (self.input_embedding, self.output_layer):
            return self.parameters.get(parameter, (0,))[0]
        return 0

    def module_paths(self) -> Iterator[str]:
        """Yield the path of every module that an adapter may change."""
        yield from self.modules
        yield from self.embeddings
        yield from {path.rpartition(".")[0] for path in self.parameters}
