"""Decode steps that are computed over tensors that stay where they are, as a recording is."""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine import batch as batches
from engine.batch import Batch
from engine.kernels.choice import on_gpu
from engine.kernels.gpu_fixed import NO_LORA, OWN_ROWS, SHARED_ROWS
from engine.replay import Compute, Replays, sizes_up_to
from engine.scheduler import ScheduledSequence
from engine.sequence import Sequence
from tests.model_lab import (
    Answer,
    FolderSource,
    Lab,
    adapt,
    following,
    num_ties,
    save_quietly,
    save_random_model,
)
from tests.parity.test_families import FAMILIES

PROMPTS = [[(37 * i + k) % 257 for i in range(length)] for k, length in enumerate((5, 17, 30, 9))]
MIXED = (None, "all-linear", "attention", None)
SHARED = ("all-linear",) * 3 + (None,)
NUM_TOKENS = 3


@pytest.fixture
def on_kernels_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.model.loader.choose", lambda device, dtype: on_gpu(device))


class Counted:
    """How many rows of which kind were replayed, and what was not."""

    def __init__(self, lab: Lab) -> None:
        replays = lab.core._runner._replays
        assert replays is not None
        self.replays, self.seen = replays, Counter[Any]()
        self._run, self._kind_of = replays.run, replays._fixed.kind_of
        replays.run = self.run  # type: ignore[method-assign]  # looks on, and does the same

    def run(self, batch: Batch) -> Tensor | None:
        logits = self._run(batch)
        self.seen[None if logits is None else self._kind_of(batch)] += 1
        return logits


def answers(lab: Lab, adapters: tuple[str | None, ...], **settings: Any) -> list[Answer]:
    """Of prompts of several lengths, the later ones beside those that decode already."""
    keys = []
    for prompt, adapter in zip(PROMPTS, adapters, strict=True):
        keys.append(lab.submit(prompt, adapter=adapter, max_tokens=NUM_TOKENS, **settings))
    lab.run()
    lab.assert_nothing_is_left()
    return [lab.answers[key] for key in keys]


def token_ids(found: list[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in found]


@pytest.fixture(scope="module")
def expected(model: str, adapters: FolderSource) -> dict[tuple[str | None, ...], list[list[int]]]:
    """By whose adapters they are: what the kernels for CPUs answer."""
    lab = Lab(model, adapters)
    with closing(lab.core):
        return {mix: token_ids(answers(lab, mix)) for mix in (MIXED, SHARED, (None,) * 4)}


@pytest.fixture
def lab(model: str, adapters: FolderSource, on_kernels_of_gpus: None) -> Iterator[Lab]:
    lab = Lab(model, adapters, max_num_seqs=6)
    with closing(lab.core):
        yield lab


def test_replayed_steps_answer_as_others_do_with_adapters_and_without(
    lab: Lab, expected: dict[tuple[str | None, ...], list[list[int]]]
) -> None:
    counted = Counted(lab)
    for mix, tokens in expected.items():
        assert token_ids(answers(lab, mix)) == tokens
    for kind in (NO_LORA, OWN_ROWS, SHARED_ROWS):
        assert counted.seen[kind] >= 2, f"hardly any step of kind {kind} was replayed"


def test_an_engine_that_records_nothing_launches_every_step(
    model: str, adapters: FolderSource, on_kernels_of_gpus: None
) -> None:
    lab = Lab(model, adapters, cuda_graphs=False)
    with closing(lab.core):
        assert lab.core._runner._replays is None


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_replays_what_transformers_generate(
    name: str, tmp_path: Path, on_kernels_of_gpus: None
) -> None:
    family = FAMILIES[name]
    path = save_random_model(family.config, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **family.frozen
    ).eval()
    lab = Lab(path, FolderSource(tmp_path), max_model_len=64, max_num_seqs=4, max_loras=0)
    with closing(lab.core):
        counted = Counted(lab)
        keys = [lab.submit(prompt, max_tokens=6) for prompt in PROMPTS]
        lab.run()
    assert counted.seen[NO_LORA] >= 4
    for prompt, key in zip(PROMPTS, keys, strict=True):
        found = lab.answers[key].token_ids
        num_ties(following(reference, prompt, found), found)


# Rows of nobody


def test_rows_of_nobody_change_no_block_and_no_row(lab: Lab) -> None:
    """Whatever number of rows is padded, and whatever they were before."""
    memory, replays = lab.core._memory, lab.core._runner._replays
    assert replays is not None
    lab.core._runner._replays = None
    fill(lab)
    blocks = memory._blocks[: memory.scratch_block]
    for num_rows in (5, 3, 1, 2):
        batch = decodes(num_rows)
        before = blocks.clone()
        alone, after = lab.core._runner.run(batch).clone(), blocks.clone()
        blocks.copy_(before)
        replayed = replays.run(batch)
        assert replayed is not None
        torch.testing.assert_close(replayed, alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(blocks, after, atol=1e-5, rtol=1e-5)


def fill(lab: Lab) -> None:
    """Let all blocks hold something, but for that of nobody."""
    torch.manual_seed(0)
    memory = lab.core._memory
    memory._blocks[1 : memory.scratch_block].normal_()


def decodes(num_rows: int) -> Batch:
    """Row i decodes after 3 · i + 1 tokens, in blocks of its own."""
    scheduled = []
    for row in range(num_rows):
        length = 3 * row + 2
        sequence = Sequence.unowned(
            [(5 * row + i) % 257 for i in range(length)],
            block_table=list(range(1 + 5 * row, 1 + 5 * row + -(-length // 4))),
        )
        sequence.num_computed_tokens = length - 1
        scheduled.append(ScheduledSequence(sequence, 1, is_sampled=True))
    return batches.build(scheduled, block_size=4, device=torch.device("cpu"))


# What is not replayed


@pytest.mark.parametrize(
    "asked",
    [{"prompt": [7], "pooling": "mean"}, {"prompt": [7, 8], "prompt_logprobs": 1, "max_tokens": 1}],
    ids=["a vector", "log-probabilities of the prompt"],
)
def test_what_is_more_than_a_decode_is_launched(lab: Lab, asked: dict[str, Any]) -> None:
    counted = Counted(lab)
    key = lab.submit(**asked)
    lab.run()
    assert lab.answers[key].is_complete
    assert not any(counted.seen[kind] for kind in (NO_LORA, OWN_ROWS, SHARED_ROWS))


def test_one_token_of_a_longer_prompt_is_no_decode() -> None:
    """Though it is a single row: nothing is sampled from it."""
    sequence = Sequence.unowned([1, 2, 3], block_table=[1])
    sequence.num_computed_tokens = 1
    scheduled = [ScheduledSequence(sequence, 1, is_sampled=False)]
    batch = batches.build(scheduled, block_size=4, device=torch.device("cpu"))
    assert not batch.wants_all_rows


def test_an_adapter_that_changes_more_than_lora_can_is_launched(
    model: str, tmp_path: Path, on_kernels_of_gpus: None
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "head": {"target_modules": ["lm_head"]},
        "norm": {
            "target_modules": ["q_proj"],
            "modules_to_save": ["post_attention_layernorm"],
        },
    }
    for name, lora in changes.items():
        save_quietly(adapt(model, seed=1, r=2, **lora), tmp_path / name)
    lab = Lab(model, FolderSource(tmp_path), max_num_seqs=4)
    with closing(lab.core):
        counted = Counted(lab)
        for adapter in changes:
            lab.generate(PROMPTS[0], adapter=adapter, max_tokens=2)
        assert set(counted.seen) == {None}


def test_contexts_that_are_longer_than_there_is_room_for_are_launched(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.kernels.gpu_attention.PART_POSITIONS", 4)
    counted = Counted(lab)
    lab.generate(PROMPTS[2] * 3, max_tokens=2)
    assert set(counted.seen) == {None}


# Recording


def test_a_step_takes_the_next_larger_size() -> None:
    assert sizes_up_to(1) == (1,)
    assert sizes_up_to(6) == (1, 2, 4, 6)
    assert sizes_up_to(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    for smaller, larger in itertools.pairwise(sizes_up_to(500)[3:]):
        assert larger - smaller <= max(8, smaller // 8)


def test_what_is_not_recorded_in_time_is_computed_as_a_larger_size(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays = some_replays(lab)
    recorded: list[Compute] = []

    def record(compute: Compute) -> Compute:
        recorded.append(compute)
        if len(recorded) == 3:
            monkeypatch.setattr("engine.replay.MAX_RECORDING_S", -1.0)
        return compute

    replays.record(record)
    assert replays.num_steps == len(recorded) == 3
    fill(lab)
    logits = replays.run(decodes(2))
    assert logits is not None
    torch.testing.assert_close(logits, lab.core._runner.run(decodes(2)), atol=1e-5, rtol=1e-5)


def test_a_model_that_cannot_be_recorded_is_served_all_the_same(lab: Lab) -> None:
    replays = some_replays(lab)

    def refuse(compute: Compute) -> Compute:
        raise RuntimeError("the host would have to wait")

    replays.record(refuse)
    assert replays.num_steps == 0
    assert replays.run(decodes(2)) is None


def some_replays(lab: Lab) -> Replays:
    kernels = lab.core._loaded.kernels
    assert kernels.fixed is not None
    return Replays(
        lab.core._loaded,
        kernels.fixed,
        lab.core._memory,
        max_num_seqs=6,
        max_context=lab.core.max_model_len,
        max_rank=9,
    )
