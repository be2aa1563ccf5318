"""Adapters may know tokens that the base model does not; nobody else ever meets them."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from adapters.weights import AdapterWeights
from engine.errors import InvalidSequence
from engine.model.prepared import PreparedAdapter, arrange
from engine.protocol import SequenceState
from tests.model_lab import FolderSource, Lab, open_lab, serve

NUM_BASE, NUM_ADDED = 257, 3
PROMPT = [5, 42, 7, 99, 3]
WIDE, WIDE_IN, PLAIN = "all-linear", "patterned", "attention"


@pytest.fixture
def lab(model: str, adapters: FolderSource) -> Iterator[Lab]:
    """`WIDE` reads and writes added tokens, `WIDE_IN` only reads them."""
    with open_lab(model, adapters, num_blocks=400, max_num_batched_tokens=70) as lab:
        loaded, as_files_say = lab.core._loaded, lab.core._prepare

        def prepared(digest: str) -> PreparedAdapter:
            if digest not in (WIDE, WIDE_IN):
                return as_files_say(adapters.root / digest)
            torch.manual_seed(len(digest))
            paths = ["model.embed_tokens.weight", "lm_head.weight"]
            own = {path: loaded.targets.parameter(path) for path in paths}
            added = 0.2 * torch.randn(NUM_ADDED, 32)
            replaced = {
                path: torch.cat([base, added]) for path, base in own.items() if base is not None
            }
            if digest == WIDE_IN:
                del replaced["lm_head.weight"]
            weights = AdapterWeights(lora={}, replaced=replaced, tokens={})
            return arrange(weights, loaded.targets, dtype=loaded.dtype, max_rank=9)

        serve(lab, prepared)
        yield lab
        lab.assert_nothing_is_left()


def test_added_tokens_can_be_read_and_said(lab: Lab) -> None:
    prompt = [*PROMPT, NUM_BASE, NUM_BASE + 2]
    told = lab.generate(prompt, adapter=WIDE, logit_bias={NUM_BASE + 1: 100.0})
    assert told == [NUM_BASE + 1] * 8
    assert lab.generate(prompt, adapter=WIDE) != lab.generate(PROMPT, adapter=WIDE)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        # So hot that all tokens are about as likely.
        {"temperature": 1000.0, "seed": 3},
        {"temperature": 1000.0, "seed": 3, "top_k": 200},
        {"temperature": 1000.0, "seed": 4, "min_p": 0.01, "frequency_penalty": 1.0},
        {"repetition_penalty": 1.3, "logprobs": 3},
    ],
)
def test_nobody_else_says_them_and_all_answer_as_they_do_alone(
    lab: Lab, sampling: dict[str, Any]
) -> None:
    others = [None, PLAIN, WIDE_IN]
    alone = [lab.generate(PROMPT, adapter=name, max_tokens=60, **sampling) for name in others]
    keys = [lab.submit(PROMPT, adapter=name, max_tokens=60, **sampling) for name in others]
    beside = lab.submit(
        [*PROMPT, NUM_BASE], adapter=WIDE, max_tokens=60, logit_bias={NUM_BASE: 9.0}, **sampling
    )
    lab.run()
    found = [lab.answers[key].token_ids for key in keys]
    assert found == alone
    assert max(max(tokens) for tokens in found) < NUM_BASE
    assert lab.answers[beside].state is SequenceState.LENGTH


def test_rows_go_on_as_they_began_when_a_neighbours_prompt_makes_the_logits_wider(
    lab: Lab,
) -> None:
    sampling = {"temperature": 1.0, "seed": 5, "frequency_penalty": 1.0, "max_tokens": 30}
    alone = lab.generate(PROMPT, **sampling)
    key = lab.submit(PROMPT, **sampling)
    while len(lab.answers[key].token_ids) < 5:
        lab.step()
    # Of this one two steps tell about the prompt alone.
    lab.submit([NUM_BASE, *range(200)], adapter=WIDE, max_tokens=1, prompt_logprobs=1)
    lab.run()
    assert lab.answers[key].token_ids == alone


def test_an_adapter_without_logits_for_them_reads_them_alone(lab: Lab) -> None:
    prompt = [*PROMPT, NUM_BASE + 1]
    told = lab.generate(prompt, adapter=WIDE_IN, max_tokens=20, repetition_penalty=1.5)
    assert max(told) < NUM_BASE
    assert told != lab.generate(PROMPT, adapter=WIDE_IN, max_tokens=20, repetition_penalty=1.5)


@pytest.mark.parametrize(
    ("adapter", "changes"),
    [
        (PLAIN, {"prompt": [*PROMPT, NUM_BASE]}),
        (WIDE, {"prompt": [*PROMPT, NUM_BASE + NUM_ADDED]}),
        (WIDE, {"prompt": PROMPT, "generated": [2**31 - 1]}),
        (WIDE, {"prompt": PROMPT, "logit_bias": {NUM_BASE + NUM_ADDED: 1.0}}),
        (WIDE_IN, {"prompt": PROMPT, "logit_bias": {NUM_BASE: 1.0}}),
    ],
)
def test_a_token_that_its_adapter_does_not_know_fails_a_sequence_alone(
    lab: Lab, adapter: str, changes: dict[str, Any]
) -> None:
    expected = [lab.generate(PROMPT, adapter=name) for name in (None, PLAIN, WIDE)]
    keys = [lab.submit(PROMPT, adapter=name) for name in (None, PLAIN, WIDE)]
    unknown = lab.submit(adapter=adapter, **changes)
    lab.run()
    fault = lab.answers[unknown].last.fault
    assert fault is not None
    assert (fault.code, fault.is_retryable) == ("invalid_sequence", False)
    assert "from 0 to" in fault.message
    assert [lab.answers[key].token_ids for key in keys] == expected


@pytest.mark.parametrize("changes", [{"prompt": [2**31]}, {"logit_bias": {2**31: 1.0}}])
def test_what_no_adapter_can_know_is_refused_at_once(lab: Lab, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidSequence):
        lab.submit(**({"prompt": PROMPT, "adapter": WIDE} | changes))


def test_an_aborted_sequence_is_forgotten(lab: Lab) -> None:
    lab.core.abort(lab.submit([*PROMPT, NUM_BASE], adapter=WIDE))
    lab.run()
    assert lab.core._with_added_tokens == set()


def test_an_adapter_that_can_never_fit_says_how_large_it_is(
    model: str, adapters: FolderSource
) -> None:
    with open_lab(model, adapters, num_blocks=40, max_model_len=64) as lab:
        loaded = lab.core._loaded
        own = {"lm_head.weight": torch.randn(NUM_BASE, 32)}
        weights = AdapterWeights(lora={}, replaced=own, tokens={})
        serve(
            lab,
            lambda _: arrange(weights, loaded.targets, dtype=loaded.dtype, max_rank=9),
        )
        key = lab.submit(PROMPT, adapter=WIDE)
        lab.run()
        fault = lab.answers[key].last.fault
        assert fault is not None
        assert not fault.is_retryable
        assert re.search(r"has 33\d{3} bytes and takes 33 blocks .* may take 24", fault.message)
