"""Adapters in a model: equal to PEFT, and as wide as their ranks."""

from pathlib import Path

import pytest
import torch

from engine import batch as batches
from engine.config import EngineConfig
from engine.kernels.cpu import LoraPlan
from engine.model import lora
from engine.model.attention import KVCache
from engine.model.loader import LoadedModel, load
from engine.model.lora import LoraLinear
from engine.runner import Runner
from engine.scheduler import ScheduledSequence
from engine.sequence import NO_ADAPTER, Sequence
from tests.engine.conftest import ADAPTERS
from tests.model_lab import FolderSource, load_with_peft

PROMPT = [(37 * i) % 257 for i in range(40)]


@pytest.fixture
def loaded(model: str) -> LoadedModel:
    return load(EngineConfig(model=model, served_name="base"))


def prepare(loaded: LoadedModel, folder: Path) -> lora.PreparedAdapter:
    return lora.prepare(folder, loaded.base_shape, dtype=loaded.dtype, max_rank=64)


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
    cache = KVCache(loaded.layers, num_blocks=len(slots), block_size=64, device=loaded.device)
    batch = batches.build(scheduled, block_size=64, device=loaded.device)
    return Runner(loaded, cache).run(batch)


@torch.inference_mode()
def peft_logits(model: str, folder: Path) -> torch.Tensor:
    logits: torch.Tensor = load_with_peft(model, folder)(torch.tensor([PROMPT])).logits[0, -1]
    return logits


def test_every_adapter_in_one_batch_equals_peft_alone(
    loaded: LoadedModel, model: str, adapters: FolderSource
) -> None:
    for slot, name in enumerate(ADAPTERS):
        loaded.bank.install(slot, prepare(loaded, adapters.root / name))
    found = run(loaded, [*range(len(ADAPTERS)), NO_ADAPTER])
    for slot, name in enumerate(ADAPTERS):
        expected = peft_logits(model, adapters.root / name)
        torch.testing.assert_close(found[slot], expected, atol=2e-4, rtol=1e-4)
        assert not torch.allclose(found[slot], found[-1], atol=1e-2)


def test_a_slot_that_is_filled_again_holds_nothing_of_the_old_adapter(
    loaded: LoadedModel, adapters: FolderSource
) -> None:
    loaded.bank.install(0, prepare(loaded, adapters.root / "attention"))
    expected = run(loaded, [0])
    loaded.bank.install(0, prepare(loaded, adapters.root / "all-linear"))
    assert not torch.allclose(run(loaded, [0]), expected, atol=1e-2)
    loaded.bank.install(0, prepare(loaded, adapters.root / "attention"))
    torch.testing.assert_close(run(loaded, [0]), expected)


def test_a_cleared_slot_answers_as_the_base_model(
    loaded: LoadedModel, adapters: FolderSource
) -> None:
    expected = run(loaded, [NO_ADAPTER])
    loaded.bank.install(0, prepare(loaded, adapters.root / "all-linear"))
    loaded.bank.clear(0)
    torch.testing.assert_close(run(loaded, [0]), expected)


def pool_width(module: LoraLinear) -> int:
    return module._lora_A.shape[0]


def test_a_module_holds_as_many_columns_as_the_ranks_of_its_adapters(
    loaded: LoadedModel, adapters: FolderSource
) -> None:
    for slot, name in enumerate(ADAPTERS):
        loaded.bank.install(slot, prepare(loaded, adapters.root / name))
    widths = {
        "model.layers.0.self_attn.q_proj": 3 + 8 + 9,
        "model.layers.1.self_attn.q_proj": 3 + 8 + 4,
        "model.layers.0.mlp.up_proj": 3 + 1,
        "model.layers.0.mlp.gate_proj": 3,
        "model.layers.1.mlp.gate_proj": 3 + 2,
    }
    for name, width in widths.items():
        assert pool_width(loaded.bank.module(name)) == width, name


def test_room_that_an_adapter_leaves_is_used_again(
    loaded: LoadedModel, adapters: FolderSource
) -> None:
    prepared = {name: prepare(loaded, adapters.root / name) for name in ADAPTERS}
    expected = {}
    for name, adapter in prepared.items():
        loaded.bank.install(0, adapter)
        expected[name] = run(loaded, [0])[0]
    for turn in range(12):
        names = [list(ADAPTERS)[(turn + 2 * slot) % 5] for slot in range(3)]
        slot = turn % 3
        loaded.bank.install(slot, prepared[names[slot]])
        torch.testing.assert_close(run(loaded, [slot])[0], expected[names[slot]])
    module = loaded.bank.module("model.layers.0.self_attn.q_proj")
    assert pool_width(module) <= 3 * max(3, 8, 9)


def test_a_batch_of_the_base_model_alone_runs_no_lora_operation(
    loaded: LoadedModel, adapters: FolderSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded.bank.install(0, prepare(loaded, adapters.root / "all-linear"))
    calls: list[str] = []
    monkeypatch.setattr(LoraPlan, "add", lambda *_, **__: calls.append("add"))
    run(loaded, [NO_ADAPTER, NO_ADAPTER])
    assert calls == []
    run(loaded, [NO_ADAPTER, 0])
    assert calls
