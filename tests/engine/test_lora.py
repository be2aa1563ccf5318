"""Adapters in a model: equal to PEFT, and as large as their ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from adapters.weights import AdapterWeights, TrainedTokens
from engine import batch as batches
from engine.batch import Batch
from engine.config import EngineConfig
from engine.errors import AdapterMissing
from engine.kernels.cpu_lora import CompiledLora
from engine.kernels.slot_weights import SlotWeights
from engine.model import prepared
from engine.model.loader import LoadedModel, load
from engine.model.memory import DeviceMemory
from engine.model.prepared import PreparedAdapter
from engine.model.targets import Vocabulary
from engine.runner import Runner
from engine.scheduler import ScheduledSequence
from engine.sequence import NO_ADAPTER, Sequence
from tests.engine.conftest import ADAPTERS
from tests.model_lab import FolderSource, adapt, load_with_peft
from tests.parity.peft_weights import weights_of

PROMPT = [(37 * i) % 257 for i in range(40)]


@pytest.fixture
def loaded(model: str) -> LoadedModel:
    return load(EngineConfig(model=model, served_name="base"))


def prepare(loaded: LoadedModel, folder: Path) -> PreparedAdapter:
    return prepared.prepare(
        folder, loaded.targets, base_model="base", dtype=loaded.dtype, max_rank=64
    )


def install(loaded: LoadedModel, slot: int, folder: Path) -> None:
    adapter = prepare(loaded, folder)
    loaded.bank.install(slot, adapter, memory=adapter.values)


def run(loaded: LoadedModel, slots: list[int]) -> torch.Tensor:
    """[num_slots, vocab_size]: the last logits of PROMPT by each slot, in one batch."""
    scheduled = [
        ScheduledSequence(
            Sequence.unowned(list(PROMPT), block_table=[index + 1], slot=slot),
            len(PROMPT),
            is_sampled=True,
        )
        for index, slot in enumerate(slots)
    ]
    memory = DeviceMemory(loaded.layers, num_blocks=len(slots), block_size=64, device=loaded.device)
    batch = batches.build(scheduled, block_size=64, device=loaded.device)
    return Runner(loaded, memory).run(batch)


@torch.inference_mode()
def peft_logits(model: str, folder: Path) -> torch.Tensor:
    logits: torch.Tensor = load_with_peft(model, folder)(torch.tensor([PROMPT])).logits[0, -1]
    return logits


def test_every_adapter_in_one_batch_equals_peft_alone(
    loaded: LoadedModel, model: str, adapters: FolderSource
) -> None:
    for slot, name in enumerate(ADAPTERS):
        install(loaded, slot, adapters.root / name)
    found = run(loaded, [*range(len(ADAPTERS)), NO_ADAPTER])
    for slot, name in enumerate(ADAPTERS):
        expected = peft_logits(model, adapters.root / name)
        torch.testing.assert_close(found[slot], expected, atol=2e-4, rtol=1e-4)
        assert not torch.allclose(found[slot], found[-1], atol=1e-2)


def test_a_slot_that_is_filled_again_holds_nothing_of_the_old_adapter(
    loaded: LoadedModel, adapters: FolderSource
) -> None:
    install(loaded, 0, adapters.root / "attention")
    expected = run(loaded, [0])
    install(loaded, 0, adapters.root / "all-linear")
    assert not torch.allclose(run(loaded, [0]), expected, atol=1e-2)
    install(loaded, 0, adapters.root / "attention")
    torch.testing.assert_close(run(loaded, [0]), expected)


def test_a_cleared_slot_answers_as_the_base_model(
    loaded: LoadedModel, adapters: FolderSource
) -> None:
    expected = run(loaded, [NO_ADAPTER])
    install(loaded, 0, adapters.root / "all-linear")
    loaded.bank.clear(0)
    torch.testing.assert_close(run(loaded, [0]), expected)


def test_an_adapter_is_as_large_as_its_ranks(loaded: LoadedModel, adapters: FolderSource) -> None:
    """Each part but for the rest of its last line of memory."""
    for name in ADAPTERS:
        adapter = prepare(loaded, adapters.root / name)
        names = list(loaded.base_shape.modules)
        sizes = [
            int(rank) * features
            for module, rank in zip(adapter.layout.modules, adapter.layout.ranks, strict=True)
            for features in loaded.base_shape.modules[names[module]]
        ]
        assert 0 <= adapter.values.numel() - sum(sizes) < prepared.ALIGNMENT * len(sizes)


class Recorder(TorchDispatchMode):
    """Notes every operation that torch dispatches, with the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(x.shape) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        self.operations.append((str(func), shapes))
        return func(*args, **(kwargs or {}))


def operations(loaded: LoadedModel, slots: list[int]) -> list[tuple[str, list[tuple[int, ...]]]]:
    with Recorder() as recorder:
        run(loaded, slots)
    return recorder.operations


def test_a_step_without_an_adapter_runs_exactly_the_operations_of_an_engine_without_lora(
    model: str, loaded: LoadedModel, adapters: FolderSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_lora = load(EngineConfig(model=model, served_name="base", max_loras=0))
    install(loaded, 0, adapters.root / "all-linear")
    plans: list[Batch] = []
    plan = CompiledLora.__init__

    def count(made: CompiledLora, batch: Batch, weights: SlotWeights) -> None:
        plans.append(batch)
        plan(made, batch, weights)

    # Nothing computes LoRA without a plan.
    monkeypatch.setattr(CompiledLora, "__init__", count)
    base_rows = [NO_ADAPTER, NO_ADAPTER]
    assert operations(loaded, base_rows) == operations(without_lora, base_rows)
    assert plans == []
    assert operations(loaded, [NO_ADAPTER, 0]) != operations(without_lora, base_rows)
    assert plans


def test_what_others_change_beside_lora_costs_a_plain_step_nothing(
    model: str, loaded: LoadedModel, adapters: FolderSource
) -> None:
    install(loaded, 0, adapters.root / "all-linear")
    plain = operations(loaded, [NO_ADAPTER, 0])
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = adapt(
        model,
        seed=1,
        target_modules=["q_proj", "lm_head"],
        use_dora=True,
        modules_to_save=["norm"],
        trainable_token_indices=[3],
    )
    other = prepared.arrange(
        weights_of(adapted, base, loaded.base_shape), loaded.targets, dtype=loaded.dtype, max_rank=9
    )
    loaded.bank.install(1, other, memory=other.values)
    assert operations(loaded, [NO_ADAPTER, 0]) == plain
    assert operations(loaded, [NO_ADAPTER, 1]) != plain
    # What hooks there were are gone.
    assert operations(loaded, [NO_ADAPTER, 0]) == plain


def test_an_adapter_that_moves_takes_all_of_itself_along(model: str, loaded: LoadedModel) -> None:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = adapt(
        model,
        seed=2,
        target_modules=["q_proj", "down_proj"],
        use_dora=True,
        modules_to_save=["norm", "lm_head"],
        trainable_token_indices=[0, 37, 74],
    )
    own = weights_of(adapted, base, loaded.base_shape)
    adapter = prepared.arrange(own, loaded.targets, dtype=loaded.dtype, max_rank=9)
    memory = adapter.values.clone()
    loaded.bank.install(0, adapter, memory=memory)
    expected = run(loaded, [0])
    moved = torch.cat([torch.randn(128), adapter.values])[128:]
    loaded.bank.move(0, memory=moved)
    memory.fill_(torch.nan)
    torch.testing.assert_close(run(loaded, [0]), expected)


def weights(**parts: Any) -> AdapterWeights:
    return AdapterWeights(**({"lora": {}, "replaced": {}, "tokens": {}} | parts))


def tokens(*ids: int, dim: int = 32) -> TrainedTokens:
    return TrainedTokens(torch.tensor(ids), torch.randn(len(ids), dim))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"replaced": {"model.nothing.weight": torch.ones(3)}}, "no parameter 'model.nothing"),
        ({"replaced": {"model.norm.weight": torch.ones(3)}}, "do not fit the parameter"),
        ({"replaced": {"model.norm.weight": torch.ones(33)}}, "more rows"),
        ({"replaced": {"lm_head.weight": torch.ones(256, 32)}}, "do not fit the parameter"),
        ({"tokens": {"model.norm": tokens(1)}}, "no module 'model.norm' that tokens"),
        ({"tokens": {"lm_head": tokens(1, dim=31)}}, "tokens do not fit"),
        ({"tokens": {"lm_head": tokens(257, 259)}}, "leave a gap"),
        ({"replaced": {"model.norm.weight": torch.full((32,), torch.nan)}}, "not finite"),
    ],
)
def test_what_does_not_fit_the_model_is_named(
    loaded: LoadedModel, parts: dict[str, Any], reason: str
) -> None:
    with pytest.raises(AdapterMissing, match=reason):
        prepared.arrange(weights(**parts), loaded.targets, dtype=loaded.dtype, max_rank=9)


def test_parameters_that_are_the_base_models_own_take_no_memory(loaded: LoadedModel) -> None:
    own = loaded.targets.parameter("model.embed_tokens.weight")
    assert own is not None
    adapter = prepared.arrange(
        weights(replaced={"model.embed_tokens.weight": own.clone()}),
        loaded.targets,
        dtype=loaded.dtype,
        max_rank=9,
    )
    assert (adapter.values.numel(), dict(adapter.modules)) == (prepared.ALIGNMENT, {})


def test_an_adapter_tells_which_tokens_it_knows(loaded: LoadedModel) -> None:
    wide = torch.randn(260, 32)
    adapter = prepared.arrange(
        weights(replaced={"model.embed_tokens.weight": wide}, tokens={"lm_head": tokens(5, 257)}),
        loaded.targets,
        dtype=loaded.dtype,
        max_rank=9,
    )
    assert adapter.vocabulary == Vocabulary(num_input_ids=260, num_output_ids=258)
    assert loaded.targets.vocabulary == Vocabulary(num_input_ids=257, num_output_ids=257)
