"""Load a transformers model and refuse what would be computed wrongly.

After `load` every target module takes adapters, attention is paged, and a small batch has been
compared with the model's own eager code. Knows models. Knows nothing of requests.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from adapters.validate import BaseShape
from engine import batch as batches
from engine.config import DtypeName, EngineConfig, QuantizationName
from engine.errors import ConfigurationError, UnsupportedModel
from engine.host_memory import empty_pages, give_back
from engine.kernels.choice import Formats, Kernels, choose, choose_formats
from engine.model import attention, families, fusing, quantising
from engine.model.attention import Recorder
from engine.model.lora import LoraBank
from engine.model.memory import DeviceMemory, LayerShape
from engine.model.targets import Targets, Watch
from engine.scheduler import ScheduledSequence
from engine.sequence import Sequence

logger = logging.getLogger(__name__)

# |paged - eager| / |eager - its mean| of the logits. Measured on SmolLM2-135M: 1e-5, 0.02 and 0.12,
# for each 16-bit layer rounds its sums in another order; with a softmax scale that is off by a
# third: 1.5.
LOGIT_BOUNDS = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.4}
# The same where inputs of layers are rounded, to int8 or fp8: what differs by float32's last bit
# may fall on either side of a step.
ROUNDED_LOGIT_BOUND = 0.4
# Configuration fields that say nothing about the function that the model computes.
VOLATILE_FIELDS = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})
# Of a CPU's caches.
LINE_BYTES = 64
CHECK_BLOCK_SIZE = 4
CHECK_BLOCKS = 3
# Sliding windows are this narrow while the model is checked, so that few tokens cross them.
CHECK_WINDOW = 3
# What a model's code may come to where attention is not what it was written for.
MODEL_FAILURES = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: PreTrainedModel
    bank: LoraBank
    kernels: Kernels
    layers: tuple[LayerShape, ...]
    # What adapters may change; `base_shape` tells it to others.
    targets: Targets
    base_shape: BaseShape
    base_digest: str
    max_model_len: int
    vocab_size: int
    device: torch.device
    dtype: torch.dtype


def load(config: EngineConfig) -> LoadedModel:
    """Raises ConfigurationError, or UnsupportedModel with the reason."""
    attention.register()
    device = _device(config.device)
    dtype = _dtype(config.dtype, device)
    known_dtype = dtype if isinstance(dtype, torch.dtype) else None
    formats = choose_formats(config.quantization, device, known_dtype)
    model = _read(config.model, device, dtype, formats=formats)
    _check_dtype(formats, model.dtype)
    text_config = model.config.get_text_config()
    max_model_len = _max_model_len(config.max_model_len, text_config)
    _freeze_rotary_frequencies(model, max_model_len)
    base_digest = _digest(model, config.quantization)
    vocab_size = _vocab_size(model)
    prompts = _check_prompts(vocab_size)
    with _model_failures(), _narrow_windows(model):
        targets, expected = _run_eager(model, prompts)
    # One slot more than adapters: probes wait for nobody.
    bank = LoraBank(targets, num_slots=config.max_loras + 1)
    if config.max_loras:
        bank.wrap(model)
    kernels = choose(device, model.dtype)
    with _model_failures():
        layers = _record_layers(model, prompts[0], text_config)
        with _narrow_windows(model):
            _check_windows(layers, _record_layers(model, prompts[0], text_config), text_config)
            if kernels.rows is not None:
                _fuse(model, prompts[1], kernels, is_rounded=_is_rounded(formats))
            found = _run_paged(model, layers, prompts, kernels)
    _compare(found, expected, bound=_logit_bound(formats, model.dtype))
    if config.max_loras:
        kernels.warm_up_lora(bank.weights, model.dtype)
    return LoadedModel(
        model=model,
        bank=bank,
        kernels=kernels,
        layers=layers,
        targets=targets,
        base_shape=targets.shape(config.served_name),
        base_digest=base_digest,
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        device=device,
        dtype=model.dtype,
    )


# Reading


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"There is no device {name!r}.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device is 'cuda', but torch finds no CUDA device: use 'cpu'.")
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"device must be 'cpu' or 'cuda': {name!r}")
    return device


def _dtype(name: DtypeName, device: torch.device) -> torch.dtype | str:
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    return "auto" if device.type == "cuda" else torch.float32


def _read(
    name: str, device: torch.device, dtype: torch.dtype | str, *, formats: Formats | None
) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(name)
        families.check(config)
        settings = {"config": config, "dtype": dtype, "attn_implementation": "eager"}
        if formats is None:
            model: Any = AutoModelForCausalLM.from_pretrained(name, **settings)
        else:
            model = quantising.read(name, formats, **settings)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"The model {name!r} cannot be loaded: {error}") from error
    assert isinstance(model, PreTrainedModel)
    module: nn.Module = model
    module.to(device).eval().requires_grad_(False)
    if device.type == "cpu":
        _let_go_of_checkpoint(module)
    return model


def _let_go_of_checkpoint(module: nn.Module) -> None:
    """Copy all weights, one behind the other, into pages of our own: large ones, where there are.

    Pages of a file are small, and a step that reads all weights from them takes a fifth longer. So
    no view holds the whole file in memory either.
    """
    parameters = list(module.parameters())
    ends = list(accumulate(_whole_lines(parameter.nbytes) for parameter in parameters))
    pages = empty_pages(ends[-1], dtype=torch.uint8)
    for parameter, end in zip(parameters, ends, strict=True):
        begin = end - _whole_lines(parameter.nbytes)
        own = pages[begin : begin + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = own.copy_(parameter.data)
    # What was read to be quantised.
    give_back()


def _whole_lines(num_bytes: int) -> int:
    """So many bytes, up to where a line of the cache begins."""
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES


def _check_dtype(formats: Formats | None, dtype: torch.dtype) -> None:
    if formats and formats.linears.name == "fp8" and dtype is not torch.bfloat16:
        raise ConfigurationError(
            f"quantization is 'fp8', whose products are bfloat16, but the model is {dtype}: "
            "set dtype to 'bfloat16'."
        )


def _vocab_size(model: PreTrainedModel) -> int:
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    return embeddings.num_embeddings


def _max_model_len(wanted: int | None, text_config: Any) -> int:
    """Its own limit where none is wanted. With `dynamic` RoPE more may be wanted."""
    own: int | None = getattr(text_config, "max_position_embeddings", None)
    if own is None and wanted is None:
        raise ConfigurationError("The model names no context length: give max_model_len.")
    limit = own and int(own * _stretch(text_config))
    if limit is not None and wanted is not None and wanted > limit:
        raise ConfigurationError(
            f"max_model_len is {wanted}, but the model's own limit is {limit}."
        )
    return wanted or own or 0


def _stretch(text_config: Any) -> float:
    """How many times its trained context a model can read, by the RoPE of its configuration."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    factor: float = rope.get("factor", 1.0) if "dynamic" in rope.get("rope_type", "") else 1.0
    return factor


def _freeze_rotary_frequencies(model: nn.Module, max_model_len: int) -> None:
    """Let `longrope` and `dynamic` RoPE take the frequencies of the longest context, once.

    Their code picks frequencies by the largest position in the batch, which in a flat batch is
    another sequence's.
    """
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, str) and _is_moving(rope_type):
            _visit_longest(module, max_model_len)
            setattr(module, "rope_type", "frozen")  # noqa: B010 nn.Module types hide it
        elif isinstance(rope_type, dict) and any(map(_is_moving, rope_type.values())):
            raise UnsupportedModel("Its RoPE changes with the context, layer type by layer type.")


def _is_moving(rope_type: str) -> bool:
    return rope_type == "longrope" or "dynamic" in rope_type


@torch.no_grad()
def _visit_longest(rotary: nn.Module, max_model_len: int) -> None:
    device = next(rotary.buffers()).device
    rotary(torch.zeros(1, device=device), torch.tensor([[max_model_len - 1]], device=device))


def _digest(model: PreTrainedModel, quantization: QuantizationName) -> str:
    """SHA-256 over the configuration, the names, dtypes and shapes of all tensors, and what these
    were quantised to: formats that are stored alike answer differently."""
    fields = {k: v for k, v in model.config.to_dict().items() if k not in VOLATILE_FIELDS}
    tensors = sorted(
        (name, str(tensor.dtype), list(tensor.shape)) for name, tensor in model.state_dict().items()
    )
    parts = [fields, tensors] if quantization == "none" else [fields, tensors, quantization]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


# Checking


@contextmanager
def _narrow_windows(model: nn.Module) -> Iterator[None]:
    """Let all sliding windows be `CHECK_WINDOW` wide, in configurations and in layers."""
    holders: dict[int, Any] = {
        id(holder): holder
        for module in model.modules()
        for holder in (module, getattr(module, "config", None))
        if isinstance(getattr(holder, "sliding_window", None), int)
    }
    before = [(holder, holder.sliding_window) for holder in holders.values()]
    try:
        for holder, _ in before:
            holder.sliding_window = CHECK_WINDOW
        yield
    finally:
        for holder, window in before:
            holder.sliding_window = window


@contextmanager
def _model_failures() -> Iterator[None]:
    """Raises UnsupportedModel where the model's own code fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        # Says nothing about the model.
        raise
    except MODEL_FAILURES as error:
        reason = f"{type(error).__name__}: {error}"
        raise UnsupportedModel(f"Its code fails in the check at load: {reason}") from error


def _check_prompts(vocab_size: int) -> list[list[int]]:
    """Two fixed prompts that end in the middle of a block, far apart in the vocabulary."""
    return [[(7 + 7919 * i) % vocab_size for i in range(n)] for n in (5, 10)]


@torch.inference_mode()
def _run_eager(model: PreTrainedModel, prompts: list[list[int]]) -> tuple[Targets, list[Tensor]]:
    """What adapters may change, and the last logits of each prompt."""
    watch = Watch(model)
    logits = [_last_logits(model, prompt) for prompt in prompts]
    return watch.end([len(prompt) for prompt in prompts]), logits


def _last_logits(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    ids = torch.tensor([prompt], device=model.device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -1]
    return logits.float()


@torch.inference_mode()
def _record_layers(
    model: PreTrainedModel, prompt: list[int], text_config: Any
) -> tuple[LayerShape, ...]:
    model.set_attn_implementation(attention.ATTENTION_NAME)
    recorder = _run_recorded(model, prompt)
    num_layers = text_config.num_hidden_layers
    if sorted(recorder.layers) != list(range(num_layers)):
        raise UnsupportedModel("Some of its layers do not call the attention function.")
    return tuple(recorder.layers[index] for index in range(num_layers))


def _run_recorded(model: PreTrainedModel, prompt: list[int]) -> Recorder:
    recorder = Recorder()
    ids = torch.tensor([prompt], device=model.device)
    positions = torch.arange(len(prompt), device=model.device)[None]
    model(input_ids=ids, position_ids=positions, use_cache=False, paged=recorder)
    return recorder


@torch.inference_mode()
def _fuse(model: PreTrainedModel, prompt: list[int], kernels: Kernels, *, is_rounded: bool) -> None:
    assert kernels.rows is not None
    fused = fusing.fuse(
        model,
        kernels.rows,
        lambda: _run_recorded(model, prompt),
        whole=kernels.layers,
        is_rounded=is_rounded,
    )
    logger.info("modules_fused", extra={"num_modules": len(fused)})


def _check_windows(
    layers: tuple[LayerShape, ...], narrow: tuple[LayerShape, ...], text_config: Any
) -> None:
    """A window must reach the attention function: in the model's own mask it would be lost.

    `narrow`: the same layers while all windows are `CHECK_WINDOW` wide.
    """
    types = getattr(text_config, "layer_types", None)
    window = getattr(text_config, "sliding_window", None)
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * len(layers)
    for layer, layer_type in zip(layers, types, strict=True):
        if layer_type == "sliding_attention" and layer.sliding_window is None:
            raise UnsupportedModel("Its sliding window does not reach the attention function.")
    for layer, checked in zip(layers, narrow, strict=True):
        if checked.sliding_window != (layer.sliding_window and CHECK_WINDOW):
            raise UnsupportedModel("Its sliding window comes from a place that no check reaches.")


@torch.inference_mode()
def _run_paged(
    model: PreTrainedModel,
    layers: tuple[LayerShape, ...],
    prompts: list[list[int]],
    kernels: Kernels,
) -> list[Tensor]:
    """The last logits of each prompt, over two mixed steps and scattered blocks."""
    # Odd blocks and even ones, backwards.
    sequences = [
        Sequence.unowned(prompt, block_table=list(range(2 * CHECK_BLOCKS - parity, 0, -2)))
        for parity, prompt in enumerate(prompts)
    ]
    memory = DeviceMemory(
        layers, num_blocks=2 * CHECK_BLOCKS, block_size=CHECK_BLOCK_SIZE, device=model.device
    )

    def run(*rows: tuple[Sequence, int]) -> Tensor:
        scheduled = [ScheduledSequence(s, num_tokens, is_sampled=True) for s, num_tokens in rows]
        batch = batches.build(scheduled, block_size=CHECK_BLOCK_SIZE, device=model.device)
        plan = kernels.plan_attention(batch)
        ids = batch.input_ids
        logits = attention.forward(model, batch, input_ids=ids, memory=memory, plan=plan)
        return logits.float()

    # First all but 2 tokens of the one and all but 1 of the other, then a decode and a chunk.
    first, second = sequences
    run((first, first.num_tokens - 2), (second, second.num_tokens - 1))
    first.num_computed_tokens = first.num_tokens - 2
    second.num_computed_tokens = second.num_tokens - 1
    logits = run((second, 1), (first, 2))
    return [logits[1], logits[0]]


def _is_rounded(formats: Formats | None) -> bool:
    """Whether inputs of layers are."""
    return formats is not None and formats.linears.rounded is not None


def _logit_bound(formats: Formats | None, dtype: torch.dtype) -> float:
    return max(LOGIT_BOUNDS[dtype], ROUNDED_LOGIT_BOUND if _is_rounded(formats) else 0.0)


def _compare(found: list[Tensor], expected: list[Tensor], *, bound: float) -> None:
    for ours, eager in zip(found, expected, strict=True):
        spread = torch.linalg.vector_norm(eager - eager.mean())
        error = float(torch.linalg.vector_norm(ours - eager) / spread)
        if not error <= bound:
            raise UnsupportedModel(
                f"Paged attention moves its logits by {error:.2g} of their spread; {bound} allowed."
            )
