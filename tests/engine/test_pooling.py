"""The vectors of prompts: those of a plain forward pass, whatever happens beside them."""

import gc
import itertools
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters.text_bundle import PoolingKind
from engine.errors import ContextLengthExceeded, InvalidSequence
from engine.model import pooling as pooling_of_models
from engine.pool import Pool
from engine.protocol import Grammar, SequenceState
from tests.model_lab import FolderSource, Lab, load_with_peft, open_lab, pooled_reference

PROMPTS = [[(37 * i + k) % 257 for i in range(length)] for k, length in enumerate((5, 17, 30, 1))]
KINDS: tuple[PoolingKind, ...] = get_args(PoolingKind)
LONG = 2
# Of vectors of length one.
ATOL = 1e-5

Expected = dict[PoolingKind, list[Tensor]]


@pytest.fixture(scope="module")
def expected(model: str) -> Expected:
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return {kind: [pooled_reference(plain, p, kind) for p in PROMPTS] for kind in KINDS}


def pool(lab: Lab, prompt: list[int], kind: PoolingKind, **settings: Any) -> Tensor:
    key = lab.submit(prompt, pooling=kind, **settings)
    lab.run()
    return lab.answers[key].vector


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_a_plain_forward_pass(
    model: str, adapters: FolderSource, expected: Expected, kind: PoolingKind
) -> None:
    with open_lab(model, adapters) as lab:
        for prompt, vector in zip(PROMPTS, expected[kind], strict=True):
            assert_equal(pool(lab, prompt, kind), vector)
        lab.assert_nothing_is_left()


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_the_adapters_own(model: str, adapters: FolderSource, kind: PoolingKind) -> None:
    with open_lab(model, adapters) as lab:
        for name in ("all-linear", "one-layer"):
            adapted = load_with_peft(model, Path(adapters.root / name))
            found = pool(lab, PROMPTS[1], kind, adapter=name)
            assert_equal(found, pooled_reference(adapted, PROMPTS[1], kind))


@pytest.mark.parametrize("step_tokens", [1, 7, 128])
def test_chunks_and_neighbours_change_nothing_and_neighbours_notice_nothing(
    model: str, adapters: FolderSource, expected: Expected, step_tokens: int
) -> None:
    with open_lab(model, adapters) as lab:
        alone = [lab.generate(prompt) for prompt in PROMPTS]
    sizes = {"max_num_batched_tokens": step_tokens, "max_num_seqs": min(step_tokens, 7)}
    with open_lab(model, adapters, **sizes) as lab:
        asked = [
            (lab.submit(prompt, pooling=kind), expected[kind][number])
            for number, prompt in enumerate(PROMPTS)
            for kind in KINDS
        ]
        generating = [lab.submit(prompt) for prompt in PROMPTS]
        lab.submit(PROMPTS[0], adapter="attention", pooling="mean")
        lab.run()
        for key, vector in asked:
            assert_equal(lab.answers[key].vector, vector)
        assert [lab.answers[key].token_ids for key in generating] == alone
        assert all(lab.answers[key].last.vector is None for key in generating)
        lab.assert_nothing_is_left()


def test_a_mean_takes_nothing_from_the_prefix_cache_and_leaves_its_own_there(
    model: str, adapters: FolderSource, expected: Expected
) -> None:
    with open_lab(model, adapters) as lab:
        tokens = lab.generate(PROMPTS[LONG])
        for kind, is_found in (("mean", False), ("last", True)):
            key = lab.submit(PROMPTS[LONG], pooling=kind)
            lab.run()
            assert_equal(lab.answers[key].vector, expected[kind][LONG])
            assert (lab.answers[key].last.cached_tokens > 0) is is_found
    with open_lab(model, adapters) as lab:
        pool(lab, PROMPTS[LONG], "mean")
        key = lab.submit(PROMPTS[LONG])
        lab.run()
        assert lab.answers[key].last.cached_tokens > 0
        assert lab.answers[key].token_ids == tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_is_preempted_half_way_comes_to_the_same(
    model: str, adapters: FolderSource, expected: Expected, kind: PoolingKind
) -> None:
    with open_lab(model, adapters, max_num_batched_tokens=8, max_num_seqs=8) as lab:
        key = lab.submit(PROMPTS[LONG], pooling=kind)
        lab.step()
        lab.step()
        (running,) = lab.core._scheduler._running
        assert 0 < running.num_computed_tokens < len(PROMPTS[LONG])
        lab.core._scheduler._send_back(running)
        lab.run()
        assert_equal(lab.answers[key].vector, expected[kind][LONG])
        lab.assert_nothing_is_left()


def test_a_step_that_ran_out_of_memory_after_pooling_counts_no_state_twice(
    model: str, adapters: FolderSource, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooling, num_faults = pooling_of_models.pool, itertools.count()

    def pool_and_fail(*states: Any, **step: Any) -> None:
        pooling(*states, **step)
        if next(num_faults) in (1, 4):
            raise torch.OutOfMemoryError

    monkeypatch.setattr(pooling_of_models, "pool", pool_and_fail)
    with open_lab(model, adapters, max_num_batched_tokens=16, max_num_seqs=8) as lab:
        asked = [(number, kind) for number in range(len(PROMPTS)) for kind in KINDS]
        keys = [lab.submit(PROMPTS[number], pooling=kind) for number, kind in asked]
        lab.run()
        for key, (number, kind) in zip(keys, asked, strict=True):
            assert_equal(lab.answers[key].vector, expected[kind][number])
        lab.assert_nothing_is_left()


def test_who_has_few_blocks_gets_all_vectors_all_the_same(
    model: str, adapters: FolderSource, expected: Expected
) -> None:
    sizes = {"num_blocks": 14, "max_num_batched_tokens": 8, "max_num_seqs": 8, "max_loras": 0}
    with open_lab(model, adapters, **sizes) as lab:
        asked = [(number, kind) for number in range(len(PROMPTS)) for kind in KINDS]
        keys = [lab.submit(PROMPTS[number], pooling=kind) for number, kind in asked]
        others = [lab.submit(prompt, max_tokens=20) for prompt in PROMPTS]
        lab.run()
        for key, (number, kind) in zip(keys, asked, strict=True):
            assert_equal(lab.answers[key].vector, expected[kind][number])
        assert {lab.answers[key].state for key in others} == {SequenceState.LENGTH}
        lab.assert_nothing_is_left()


def test_states_that_are_no_numbers_fail_their_own_prompt_alone(
    model: str, adapters: FolderSource, expected: Expected
) -> None:
    with open_lab(model, adapters, max_num_batched_tokens=8, max_num_seqs=8) as lab:
        bad, good = (lab.submit(PROMPTS[n], pooling="mean") for n in (1, LONG))
        lab.step()
        broken = next(s for s in lab.core._scheduler._sequences.values() if s.key == bad)
        assert broken.pool is not None
        broken.pool.add(np.full(32, np.nan), end=broken.num_computed_tokens)
        lab.run()
        fault = lab.answers[bad].last.fault
        assert fault is not None
        assert fault.code == "nan_logits"
        assert_equal(lab.answers[good].vector, expected["mean"][LONG])
        lab.assert_nothing_is_left()


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 1},
        {"logprobs": 0},
        {"prompt_logprobs": 1},
        {"generated": [5]},
        {"grammar": Grammar("regex", "a", "00" * 32)},
    ],
)
def test_what_is_about_an_answer_is_refused(
    model: str, adapters: FolderSource, wrong: dict[str, Any]
) -> None:
    with open_lab(model, adapters) as lab, pytest.raises(InvalidSequence, match="pooling"):
        lab.submit(PROMPTS[0], pooling="mean", **wrong)


def test_a_prompt_as_long_as_the_context_is_pooled_and_a_longer_one_refused(
    model: str, adapters: FolderSource
) -> None:
    with open_lab(model, adapters, max_model_len=16, max_loras=0) as lab:
        with pytest.raises(ContextLengthExceeded):
            lab.submit([1] * 17, pooling="mean")
        assert len(pool(lab, [1] * 16, "mean")) == 32
        lab.assert_nothing_is_left()


def test_nothing_is_kept_of_a_prompt_that_has_ended(model: str, adapters: FolderSource) -> None:
    with open_lab(model, adapters, max_num_batched_tokens=8, max_num_seqs=8) as lab:
        keys = [lab.submit(prompt, pooling="mean") for prompt in PROMPTS]
        lab.step()
        assert any(type(each) is Pool for each in gc.get_objects())
        lab.core.abort(keys[LONG])
        lab.run()
        assert lab.answers[keys[LONG]].state is SequenceState.ABORTED
        gc.collect()
        assert not any(type(each) is Pool for each in gc.get_objects())
        assert not lab.core._loaded.model.base_model._forward_hooks
        lab.assert_nothing_is_left()


@given(st.lists(st.integers(0, 9), min_size=1), st.data())
def test_chunks_in_any_order_of_repeats_add_each_position_once(
    sizes: list[int], data: st.DataObject
) -> None:
    """A preempted prompt begins again, anywhere before what was summed."""
    num_tokens = sum(sizes) + 1
    mean, first = Pool("mean"), 0
    for size in [*sizes, 1]:
        chunk = range(data.draw(st.integers(0, first)), first + size)
        places = mean.wanted(chunk, num_tokens=num_tokens)
        if places:
            mean.add(np.array([len(places), sum(places)], dtype=float), end=places.stop)
        first = chunk.stop
        assert mean.num_skippable_tokens(num_tokens) == min(first, num_tokens - 1)
    found = np.frombuffer(mean.vector() or b"", dtype="<f4")
    total = np.array([num_tokens, num_tokens * (num_tokens - 1) / 2])
    np.testing.assert_allclose(found, total / np.linalg.norm(total), rtol=1e-6)
