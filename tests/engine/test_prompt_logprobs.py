"""The log-probabilities of prompts: those of a plain forward pass, told once, whatever happens."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.protocol import SequenceState, TokenLogprob
from tests.model_lab import Answer, FolderSource, Lab, load_with_peft, open_lab

PROMPTS = [[(37 * i + k) % 257 for i in range(length)] for k, length in enumerate((5, 17, 30, 9))]
NUM_TOP = 3


def expected_logprobs(model: Any, prompt: list[int]) -> list[TokenLogprob]:
    with torch.inference_mode():
        table = torch.log_softmax(model(torch.tensor([prompt])).logits[0], dim=-1)
    told = []
    for row, token_id in zip(table[:-1], prompt[1:], strict=True):
        values, ids = row.topk(NUM_TOP)
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
        told.append(TokenLogprob(float(row[token_id]), top))
    return told


def told_once(answer: Answer) -> list[TokenLogprob]:
    """What the first event with a token told; no other may tell anything."""
    first = next(event for event in answer.events if event.token_ids)
    assert all(event.prompt_logprobs is None for event in answer.events if event is not first)
    assert first.prompt_logprobs is not None
    return first.prompt_logprobs


def assert_equal(found: list[TokenLogprob], expected: list[TokenLogprob]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [i for i, _ in ours.top] == [i for i, _ in theirs.top]
        values = [value for _, value in theirs.top]
        assert [value for _, value in ours.top] == pytest.approx(values, abs=1e-4)


@pytest.fixture(scope="module")
def expected(model: str) -> list[list[TokenLogprob]]:
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return [expected_logprobs(plain, prompt) for prompt in PROMPTS]


def tell(lab: Lab, prompt: list[int], **settings: Any) -> list[TokenLogprob]:
    key = lab.submit(prompt, prompt_logprobs=NUM_TOP, **settings)
    lab.run()
    return told_once(lab.answers[key])


def test_they_are_those_of_a_plain_forward_pass(
    model: str, adapters: FolderSource, expected: list[list[TokenLogprob]]
) -> None:
    with open_lab(model, adapters) as lab:
        for prompt, logprobs in zip(PROMPTS, expected, strict=True):
            assert_equal(tell(lab, prompt, temperature=2.0, logit_bias={1: 9.0}), logprobs)
        lab.assert_nothing_is_left()


def test_they_are_the_adapters_own(model: str, adapters: FolderSource) -> None:
    adapted = load_with_peft(model, Path(adapters.root / "all-linear"))
    with open_lab(model, adapters) as lab:
        found = tell(lab, PROMPTS[1], adapter="all-linear")
    assert_equal(found, expected_logprobs(adapted, PROMPTS[1]))


def test_chunks_and_neighbours_change_nothing(
    model: str, adapters: FolderSource, expected: list[list[TokenLogprob]]
) -> None:
    with open_lab(model, adapters, max_num_batched_tokens=7, max_num_seqs=7) as lab:
        keys = [lab.submit(prompt, prompt_logprobs=NUM_TOP) for prompt in PROMPTS]
        silent = [lab.submit(prompt) for prompt in PROMPTS]
        lab.run()
        for key, logprobs in zip(keys, expected, strict=True):
            assert_equal(told_once(lab.answers[key]), logprobs)
        for key in silent:
            assert {event.prompt_logprobs for event in lab.answers[key].events} == {None}


def test_they_are_computed_although_the_prefix_is_cached(
    model: str, adapters: FolderSource, expected: list[list[TokenLogprob]]
) -> None:
    with open_lab(model, adapters) as lab:
        tokens = lab.generate(PROMPTS[2])
        key = lab.submit(PROMPTS[2], prompt_logprobs=NUM_TOP)
        lab.run()
        assert_equal(told_once(lab.answers[key]), expected[2])
        assert lab.answers[key].token_ids == tokens
        assert lab.answers[key].last.cached_tokens == 0
        lab.assert_nothing_is_left()


def test_preemption_neither_repeats_nor_shortens_them(
    model: str, adapters: FolderSource, expected: list[list[TokenLogprob]]
) -> None:
    with open_lab(
        model, adapters, num_blocks=14, max_num_batched_tokens=8, max_num_seqs=8, max_loras=0
    ) as lab:
        keys = [lab.submit(p, prompt_logprobs=NUM_TOP, max_tokens=20) for p in PROMPTS]
        num_running = []
        while lab.core.has_work() or lab.core.status().num_waiting:
            lab.step()
            num_running.append(lab.core.status().num_running)
        drops = [b for a, b in itertools.pairwise(num_running) if b < a]
        assert len(drops) > len(keys), "nothing was preempted"
        for key, logprobs in zip(keys, expected, strict=True):
            assert_equal(told_once(lab.answers[key]), logprobs)
        lab.assert_nothing_is_left()


def test_a_prompt_that_is_preempted_half_way_goes_on_where_it_was(
    model: str, adapters: FolderSource, expected: list[list[TokenLogprob]]
) -> None:
    with open_lab(model, adapters, max_num_batched_tokens=8, max_num_seqs=8) as lab:
        key = lab.submit(PROMPTS[2], prompt_logprobs=NUM_TOP)
        lab.step()
        lab.step()
        (running,) = lab.core._scheduler._running
        assert 0 < len(running.prompt_logprobs or []) < len(PROMPTS[2]) - 1
        lab.core._scheduler._send_back(running)
        lab.run()
        assert_equal(told_once(lab.answers[key]), expected[2])


def test_who_goes_on_after_generated_tokens_has_been_told(
    model: str, adapters: FolderSource
) -> None:
    with open_lab(model, adapters) as lab:
        whole = lab.generate(PROMPTS[1], max_tokens=6, prompt_logprobs=NUM_TOP)
        key = lab.submit(PROMPTS[1], generated=whole[:2], max_tokens=6, prompt_logprobs=NUM_TOP)
        lab.run()
        assert lab.answers[key].token_ids == whole[2:]
        assert {event.prompt_logprobs for event in lab.answers[key].events} == {None}


def test_a_prompt_of_one_token_has_none(model: str, adapters: FolderSource) -> None:
    with open_lab(model, adapters) as lab:
        assert tell(lab, [5]) == []


def test_an_abort_half_way_through_the_prompt_tells_nothing(
    model: str, adapters: FolderSource
) -> None:
    with open_lab(model, adapters, max_num_batched_tokens=8, max_num_seqs=8) as lab:
        key = lab.submit(PROMPTS[2], prompt_logprobs=NUM_TOP)
        lab.step()
        lab.core.abort(key)
        lab.step()
        assert lab.answers[key].state is SequenceState.ABORTED
        assert lab.answers[key].last.prompt_logprobs is None
        lab.assert_nothing_is_left()
