"""Kernels take over what a model's own code does to rows, where they do the same."""

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from engine.batch import build
from engine.kernels.choice import Kernels, RowKernels, choose, on_gpu
from engine.kernels.layer_parts import LayerCall
from engine.model import attention
from engine.model.attention import PagedStep, Recorder
from engine.model.fusing import fuse
from engine.model.memory import DeviceMemory, LayerShape
from engine.scheduler import ScheduledSequence
from engine.sequence import Sequence
from tests.model_lab import tiny_llama_config

PROMPT = torch.tensor([[(7 + 61 * i) % 257 for i in range(10)]])
SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
NORMS = {"input_layernorm": 2, "post_attention_layernorm": 2, "norm": 1}
PARTS = NORMS | {"self_attn": 2, "mlp": 2}
LAYERS = {"0": 1, "1": 1}
# What is fused of each, by the last part of its path
FAMILIES: dict[str, tuple[Any, dict[str, int]]] = {
    "llama": (tiny_llama_config(), PARTS | LAYERS),
    "phi3": (transformers.Phi3Config(**SIZES), PARTS | LAYERS),
    # Its weights are what they differ from one, its gate is no SiLU, its layers have more norms.
    "gemma2": (
        transformers.Gemma2Config(**SIZES, head_dim=12),
        NORMS | {"self_attn": 2, "pre_feedforward_layernorm": 2, "post_feedforward_layernorm": 2},
    ),
    # Its layers scale what they add.
    "granite": (transformers.GraniteConfig(**SIZES, residual_multiplier=0.5), PARTS),
    # It turns neighbours, not halves, and its norms take the mean away.
    "cohere": (transformers.CohereConfig(**SIZES), {"mlp": 2}),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    attention.register()
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.set_attn_implementation(attention.ATTENTION_NAME)
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    return model


def run(model: Any) -> Tensor:
    positions = torch.arange(PROMPT.shape[1])[None]
    out = model(input_ids=PROMPT, position_ids=positions, use_cache=False, paged=Recorder())
    logits: Tensor = out.logits
    return logits


@pytest.fixture
def kernels() -> RowKernels:
    rows = on_gpu(torch.device("cpu")).rows
    assert rows is not None
    return rows


@pytest.fixture(params=["Triton", "loops"])
def either(request: pytest.FixtureRequest) -> Kernels:
    device = torch.device("cpu")
    return on_gpu(device) if request.param == "Triton" else choose(device, torch.float32)


def test_a_family_is_fused_where_the_kernels_do_the_same_and_nowhere_else(
    family: str, either: Kernels
) -> None:
    config, expected = FAMILIES[family]
    model = random_model(config)
    before = run(model)
    assert either.rows is not None
    fused = fuse(model, either.rows, partial(run, model), whole=either.layers)
    assert Counter(path.rpartition(".")[2] for path in fused) == expected
    torch.testing.assert_close(run(model), before, atol=2e-5, rtol=1e-4)


def test_a_norm_with_a_weight_of_its_own_in_a_copy_reads_that_weight(kernels: RowKernels) -> None:
    """As an adapter's is that retrained the norm."""
    model = random_model(tiny_llama_config())
    own = model.model.norm
    x = torch.randn(1, 3, 32)
    expected = 2 * own(x)
    fuse(model, kernels, partial(run, model))
    twin = copy.deepcopy(own)
    twin.weight.mul_(2)
    torch.testing.assert_close(twin(x), expected)
    torch.testing.assert_close(own(x), expected / 2)


def test_who_changes_what_a_norm_gives_is_heard(either: Kernels) -> None:
    """As adapters do for a step of theirs, and none for the next."""
    model = random_model(tiny_llama_config())
    norm = model.model.layers[0].post_attention_layernorm
    inputs: list[Tensor] = []

    def twice(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        inputs.append(args[0])
        return 2 * out

    def changed() -> Tensor:
        handle = norm.register_forward_hook(twice)
        logits = run(model)
        handle.remove()
        return logits

    plain, expected = run(model), changed()
    assert either.rows is not None
    fuse(model, either.rows, partial(run, model), whole=either.layers)
    torch.testing.assert_close(changed(), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(inputs[1], inputs[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(run(model), plain, atol=2e-5, rtol=1e-4)


def test_kernels_that_are_wrong_replace_nothing(kernels: RowKernels) -> None:
    class Wrong:
        def __getattr__(self, name: str) -> Any:
            def slightly_more(*args: Any, **others: Any) -> Any:
                found = getattr(kernels, name)(*args, **others)
                return (
                    tuple(1.001 * x for x in found) if isinstance(found, tuple) else 1.001 * found
                )

            return slightly_more

    model = random_model(tiny_llama_config())
    assert fuse(model, Wrong(), partial(run, model)) == []  # type: ignore[arg-type]  # made of kernels


def test_a_layer_whose_attention_is_called_otherwise_than_it_seems_keeps_its_own_code(
    kernels: RowKernels,
) -> None:
    """A window that its code takes from elsewhere would be lost without a trace."""
    whole = choose(torch.device("cpu"), torch.float32).layers
    sizes = SIZES | {"head_dim": 16}
    for window, is_whole in ((None, True), (3, False)):
        model = random_model(transformers.MistralConfig(**sizes, sliding_window=window))
        fuse(model, kernels, partial(run, model), whole=whole)
        forwards = [type(vars(layer)["forward"].__func__) for layer in model.model.layers]
        assert {forward.__name__ == "_LayerInLoops" for forward in forwards} == {is_whole}


def decoded(model: Any, layers: list[LayerShape]) -> Tensor:
    """The logits of two sequences' second tokens."""
    memory = DeviceMemory(layers, num_blocks=4, block_size=4, device=torch.device("cpu"))
    for length in (1, 2):
        sequences = [
            Sequence.unowned(list(range(start, start + length)), block_table=[block])
            for start, block in ((9, 1), (42, 2))
        ]
        for sequence in sequences:
            sequence.num_computed_tokens = length - 1
        scheduled = [ScheduledSequence(each, 1, is_sampled=True) for each in sequences]
        batch = build(scheduled, block_size=4, device=torch.device("cpu"))
        plan = choose(torch.device("cpu"), torch.float32).plan_attention(batch)
        logits = attention.forward(
            model, batch, input_ids=batch.input_ids, memory=memory, plan=plan
        )
    return logits


class Doubling(nn.Module):
    """A Llama that doubles what each layer gives."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.model
        self.lm_head = model.lm_head

    def forward(self, input_ids: Tensor, position_ids: Tensor, paged: Any, **_: Any) -> Any:
        hidden = self.model.embed_tokens(input_ids)
        positions = self.model.rotary_emb(hidden, position_ids)
        for layer in self.model.layers:
            hidden = 2 * layer(hidden, position_embeddings=positions, paged=paged)
        return CausalLMOutput(logits=self.lm_head(self.model.norm(hidden)))


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets each layer that attends by itself."""
    layers: list[int] = []
    attend = PagedStep.attend

    def noted(step: PagedStep, *states: Tensor, call: LayerCall) -> Tensor:
        layers.append(call.layer)
        return attend(step, *states, call=call)

    monkeypatch.setattr(PagedStep, "attend", noted)
    return layers


@pytest.mark.parametrize("kind", [lambda model: model, Doubling])
def test_steps_that_decode_run_all_layers_at_once_where_each_takes_what_the_last_one_gave(
    kind: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, kernels = random_model(tiny_llama_config()), choose(torch.device("cpu"), torch.float32)
    recorder = Recorder()
    plain(input_ids=PROMPT, use_cache=False, paged=recorder)
    layers, model = [recorder.layers[index] for index in range(2)], kind(plain)
    expected = decoded(model, layers)
    assert kernels.rows is not None
    fuse(model, kernels.rows, partial(run, model), whole=kernels.layers)
    attending = one_by_one(monkeypatch)
    torch.testing.assert_close(decoded(model, layers), expected, atol=2e-5, rtol=1e-4)
    assert attending == ([] if model is plain else [0, 1] * 2)


def test_whoever_listens_to_a_layer_or_its_parts_hears_them_in_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, kernels = random_model(tiny_llama_config()), choose(torch.device("cpu"), torch.float32)
    recorder = Recorder()
    model(input_ids=PROMPT, use_cache=False, paged=recorder)
    layers = [recorder.layers[index] for index in range(2)]
    assert kernels.rows is not None
    fuse(model, kernels.rows, partial(run, model), whole=kernels.layers)
    expected = decoded(model, layers)
    attending = one_by_one(monkeypatch)
    heard: list[nn.Module] = []
    for listened in (model.model.layers[1], model.model.layers[0].mlp):
        handle = listened.register_forward_hook(lambda module, *_: heard.append(module))
        torch.testing.assert_close(decoded(model, layers), expected, atol=2e-5, rtol=1e-4)
        handle.remove()
        assert heard == [listened] * 2
        assert attending == [0, 1] * 2
        heard.clear()
        attending.clear()


@pytest.mark.parametrize(
    ("config", "is_straight"),
    [
        (tiny_llama_config(), True),
        (transformers.Qwen2Config(**SIZES), True),
        # Its code scales what the embedding gives.
        (transformers.GraniteConfig(**SIZES, embedding_multiplier=3.0), False),
    ],
    ids=["llama", "qwen2", "granite"],
)
def test_a_body_that_only_hands_on_what_its_parts_give_goes_from_part_to_part(
    config: Any, is_straight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kernels = random_model(config), choose(torch.device("cpu"), torch.float32)
    recorder = Recorder()
    model(input_ids=PROMPT, use_cache=False, paged=recorder)
    layers = [recorder.layers[index] for index in range(2)]
    expected = decoded(model, layers)
    assert kernels.rows is not None
    fuse(model, kernels.rows, partial(run, model), whole=kernels.layers)
    asked: list[nn.Module] = []
    for layer in model.model.layers:
        call = layer.forward
        monkeypatch.setattr(
            layer,
            "forward",
            lambda *args, call=call, layer=layer, **kwargs: (
                asked.append(layer) or call(*args, **kwargs)
            ),
        )
    torch.testing.assert_close(decoded(model, layers), expected, atol=2e-5, rtol=1e-4)
    assert asked == ([] if is_straight else list(model.model.layers) * 2)
    # What only the model's own code can answer, it answers.
    run(model)
    told = model(input_ids=PROMPT, use_cache=False, paged=Recorder(), output_hidden_states=True)
    assert len(told.hidden_states) == 3
