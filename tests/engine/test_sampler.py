"""How tokens are chosen, by the definitions in `engine.kernels.reference` and by transformers."""

import gc
import math
import sys
from collections import Counter
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.errors import InvalidLogits, NoTokenLeft
from engine.kernels import reference
from engine.protocol import SamplingParams, Submit
from engine.sampling.draws import MIN_CANDIDATES
from engine.sampling.noise import gumbel_noise, mixed_seeds, streams
from engine.sampling.sampler import Sampler
from engine.scheduler import SampledToken, ScheduledSequence
from engine.sequence import Sequence

VOCAB_SIZE = 12 * MIN_CANDIDATES
CPU = torch.device("cpu")


def params_of(**changes: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 1000} | changes))


def sequence_of(
    params: SamplingParams, *, prompt: list[int] | None = None, generated: list[int] | None = None
) -> Sequence:
    submit = Submit(
        sequence_id=1,
        prompt_token_ids=prompt or [1, 2, 3],
        sampling=params,
        generated_token_ids=generated or [],
    )
    return Sequence.from_submit(submit, worker_id="worker", worker_epoch=1)


def scheduled(sequences: list[Sequence]) -> list[ScheduledSequence]:
    return [ScheduledSequence(s, s.num_uncomputed_tokens, is_sampled=True) for s in sequences]


def sample(
    logits: Tensor, sequences: list[Sequence], sampler: Sampler | None = None
) -> list[SampledToken]:
    return (sampler or Sampler()).sample(logits, scheduled(sequences))


def sample_params(logits: Tensor, params: list[SamplingParams]) -> list[SampledToken]:
    return sample(logits, [sequence_of(p) for p in params])


def random_logits(num_rows: int, *, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * 3


def draw(logits: Tensor, *, num_draws: int, **params: Any) -> list[int]:
    """The tokens of `num_draws` seeds, all from the same row."""
    rows = [params_of(seed=seed, **params) for seed in range(num_draws)]
    return [s.token_id for s in sample_params(logits.expand(num_draws, -1), rows)]


def noise_start(seed: int, position: int) -> Tensor:
    return streams(mixed_seeds([seed], device=CPU), torch.tensor([position]))


# Noise


def test_the_noise_is_that_of_the_definition() -> None:
    seeds, positions = [0, 1, 2**64 - 1], [0, 5, 40_000]
    starts = streams(mixed_seeds(seeds, device=CPU), torch.tensor(positions))
    found = gumbel_noise(starts, torch.arange(50)[None])
    expected = [
        [reference.gumbel_noise(seed, position, i) for i in range(50)]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_the_noise_has_the_gumbel_distribution() -> None:
    noise = gumbel_noise(noise_start(3, 4), torch.arange(200_000)[None]).double()
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - 1.6449) < 0.03
    assert bool(torch.isfinite(noise).all())


def test_another_position_or_seed_draws_anew() -> None:
    logits = random_logits(1).expand(50, -1)
    params = params_of(seed=1)
    rows = [sequence_of(params, prompt=[1] * (1 + length)) for length in range(50)]
    assert len({s.token_id for s in sample(logits, rows)}) > 5
    assert len(set(draw(logits[:1], num_draws=50))) > 5


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    num_draws = 4000
    tokens = torch.tensor(draw(logits, num_draws=num_draws, temperature=1.5))
    found = torch.bincount(tokens, minlength=4) / num_draws
    torch.testing.assert_close(found, torch.softmax(logits[0] / 1.5, dim=0), atol=0.03, rtol=0)


# The definition


@st.composite
def some_params(draw: st.DrawFn, *, vocab_size: int) -> SamplingParams:
    token_id = st.integers(0, vocab_size - 1)
    return SamplingParams(
        max_tokens=1000,
        seed=draw(st.integers(0, 2**64 - 1)),
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.35, 1e-6])),
        top_k=draw(st.sampled_from([0, 1, 7, vocab_size - 1, 10 * vocab_size])),
        min_p=draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.7, -1.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.4, -2.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.6])),
        logit_bias=draw(st.dictionaries(token_id, st.floats(-9, 9, width=32), max_size=3)),
        stop_token_ids=tuple(draw(st.lists(token_id, max_size=4))),
        min_tokens=draw(st.integers(0, 6)),
        logprobs=draw(st.sampled_from([None, 0, 3])),
    )


@st.composite
def some_sequences(draw: st.DrawFn, *, vocab_size: int = 40) -> list[Sequence]:
    tokens = st.lists(st.integers(0, vocab_size - 1), max_size=8)
    return [
        sequence_of(
            draw(some_params(vocab_size=vocab_size)),
            prompt=[draw(st.integers(0, vocab_size - 1)), *draw(tokens)],
            generated=draw(tokens),
        )
        for _ in range(draw(st.integers(1, 6)))
    ]


def defined_token(logits: Tensor, sequence: Sequence) -> int:
    end = sequence.num_prompt_tokens
    return reference.sampled_token(
        logits,
        sequence.sampling,
        prompt=sequence.token_ids[:end],
        generated=sequence.token_ids[end:],
    )


@settings(max_examples=150, deadline=None)
@given(sequences=some_sequences(), seed=st.integers(0, 1000))
def test_every_step_of_a_mixed_batch_is_the_definition_row_by_row(
    sequences: list[Sequence], seed: int
) -> None:
    sampler = Sampler()
    for step in range(4):
        logits = random_logits(len(sequences), vocab_size=40, seed=seed + step)
        found = sample(logits, sequences, sampler)
        for row, sequence in enumerate(sequences):
            assert found[row].token_id == defined_token(logits[row], sequence), sequence.sampling
            sequence.token_ids.append(found[row].token_id)


@settings(max_examples=50, deadline=None)
@given(sequences=some_sequences(), seed=st.integers(0, 1000), data=st.data())
def test_who_else_comes_and_goes_changes_nothing(
    sequences: list[Sequence], seed: int, data: st.DataObject
) -> None:
    together, alone = Sampler(), [Sampler() for _ in sequences]
    for step in range(5):
        rows = data.draw(st.permutations(range(len(sequences))))
        rows = rows[: data.draw(st.integers(1, len(rows)))]
        logits = random_logits(len(sequences), vocab_size=40, seed=seed + step)
        found = sample(logits[rows], [sequences[row] for row in rows], together)
        for row, token in zip(rows, found, strict=True):
            assert sample(logits[row : row + 1], [sequences[row]], alone[row]) == [token]
            sequences[row].token_ids.append(token.token_id)


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    logits = random_logits(7)
    rows = [
        params_of(seed=1),
        params_of(seed=2, top_k=5),
        params_of(seed=3, top_p=0.8),
        params_of(temperature=0.0),
        params_of(seed=5, top_k=2000, top_p=0.99, temperature=2.0),
        params_of(seed=6, temperature=0.7),
        params_of(seed=7, temperature=9.0, top_p=0.95),
    ]
    together = [s.token_id for s in sample_params(logits, rows)]
    alone = [sample_params(logits[i : i + 1], [rows[i]])[0].token_id for i in range(7)]
    assert together == alone


def test_the_logits_stay_as_they_are() -> None:
    logits = random_logits(2)
    before = logits.clone()
    sample_params(logits, [params_of(logit_bias={1: 5.0}), params_of(temperature=0.5)])
    torch.testing.assert_close(logits, before, rtol=0, atol=0)


def test_parameters_cross_the_wire() -> None:
    params = params_of(logit_bias={3: -1.5, 100_000: 2.0}, min_p=0.1, stop_token_ids=(1, 2))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


# Greedy


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = random_logits(4)
    samples = sample_params(logits, [params_of(temperature=0.0, seed=i) for i in range(4)])
    assert [s.token_id for s in samples] == logits.argmax(dim=-1).tolist()


def test_a_temperature_next_to_zero_takes_the_likeliest_too() -> None:
    logits = random_logits(1)
    for temperature in (1e-300, 1e-40, 1e-6):
        assert set(draw(logits, num_draws=3, temperature=temperature)) == {int(logits.argmax())}


@pytest.mark.parametrize("bias", [{}, {9: 0.5}])
def test_of_equal_logits_the_lowest_id_is_taken(bias: dict[int, float]) -> None:
    logits = torch.zeros(1, 50)
    logits[0, [7, 20, 30]] = 2.0
    (found,) = sample_params(logits, [params_of(temperature=0.0, logit_bias=bias)])
    assert found.token_id == 7


# Limits


@pytest.mark.parametrize(
    "limits",
    [
        {"top_k": 3},
        {"top_p": 0.3},
        {"temperature": 0.5, "top_k": 40, "top_p": 0.9},
        {"top_k": 1},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"min_p": 0.1, "top_k": 20, "top_p": 0.8},
        # These need more candidates than are sorted at first.
        {"top_k": MIN_CANDIDATES + 10},
        {"top_k": 10 * MIN_CANDIDATES, "top_p": 0.999},
        {"temperature": 8.0, "top_p": 0.9},
        {"temperature": 20.0, "min_p": 0.3},
    ],
)
def test_nothing_outside_of_the_limits_is_drawn(limits: dict[str, Any]) -> None:
    logits = random_logits(1)
    params = params_of(**limits)
    allowed = set(reference.kept_tokens((logits[0] / params.temperature).tolist(), params))
    tokens = draw(logits, num_draws=300, **limits)
    assert set(tokens) <= allowed
    assert len(set(tokens)) > min(len(allowed) / 2, 30)


def transformers_scores(logits: Tensor, params: SamplingParams, token_ids: list[int]) -> Tensor:
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(params.repetition_penalty)])
    chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    scores: Tensor = chain(torch.tensor([token_ids]), logits)
    return scores[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.15},
        {"repetition_penalty": 1.8},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 0.5},
    ],
)
def test_the_same_tokens_are_kept_as_by_transformers(changes: dict[str, Any]) -> None:
    logits, prompt = random_logits(1, vocab_size=30), [3, 11, 11, 29]
    params = params_of(**changes)
    scores = transformers_scores(logits, params, prompt)
    num_draws = 3000
    rows = [sequence_of(params_of(seed=i, **changes), prompt=prompt) for i in range(num_draws)]
    tokens = Counter(s.token_id for s in sample(logits.expand(num_draws, -1), rows))
    kept = set(torch.isfinite(scores).nonzero()[:, 0].tolist())
    assert set(tokens) <= kept
    probabilities = torch.softmax(scores, dim=-1)
    for token_id in kept:
        share = tokens[token_id] / num_draws
        assert share == pytest.approx(float(probabilities[token_id]), abs=0.035)


def test_of_equal_logits_the_lower_ids_are_kept() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    assert set(draw(logits, num_draws=60, top_k=3)) == {0, 1, 2}


def test_limits_wider_than_the_vocabulary_limit_nothing() -> None:
    logits = random_logits(1, vocab_size=10)
    assert draw(logits, num_draws=20, top_k=500) == draw(logits, num_draws=20)


def test_tokens_that_the_model_rules_out_are_never_drawn() -> None:
    logits = torch.full((1, VOCAB_SIZE), -math.inf)
    logits[0, [5, 900, 2000]] = torch.tensor([1.0, 2.0, 1.5])
    for limits in ({}, {"top_k": 500}, {"top_p": 0.999}, {"min_p": 0.01}):
        assert set(draw(logits, num_draws=60, **limits)) == {5, 900, 2000}


# Penalties, biases and bans


def greedy_run(logits: Tensor, num_tokens: int, **params: Any) -> list[int]:
    """What one row says where the logits are always the same."""
    sequence, sampler = sequence_of(params_of(temperature=0.0, **params), prompt=[0]), Sampler()
    for _ in range(num_tokens):
        (found,) = sample(logits[None], [sequence], sampler)
        sequence.token_ids.append(found.token_id)
    return sequence.token_ids[1:]


def test_penalties_count_what_was_generated_step_by_step() -> None:
    logits = torch.tensor([8.5, 5.0, 4.0, 2.5])
    # The prompt's token 0 pays from its first repetition in the answer only.
    assert greedy_run(logits, 5, presence_penalty=2.0) == [0, 0, 0, 0, 0]
    assert greedy_run(logits, 5, frequency_penalty=2.0) == [0, 0, 1, 0, 2]
    assert greedy_run(logits, 4, frequency_penalty=2.0, presence_penalty=2.0) == [0, 1, 0, 2]
    assert greedy_run(logits, 3, repetition_penalty=2.0) == [1, 0, 0]


def test_the_count_of_a_token_is_reached_by_resubmission_too() -> None:
    logits = random_logits(1, vocab_size=20)[0]
    params = {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.1}
    whole = greedy_run(logits, 8, **params)
    sequence = sequence_of(params_of(temperature=0.0, **params), prompt=[0], generated=whole[:5])
    assert sample(logits[None], [sequence])[0].token_id == whole[5]


def test_a_bias_makes_and_unmakes_the_likeliest() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0])
    assert greedy_run(logits, 1, logit_bias={2: 2.5}) == [2]
    assert greedy_run(logits, 1, logit_bias={0: -100.0, 1: -100.0}) == [2]


def test_no_stop_token_comes_before_min_tokens() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0])
    # Ids beyond the vocabulary can't come anyway.
    found = greedy_run(logits, 4, stop_token_ids=(0, 0, 77, 1), min_tokens=2)
    assert found == [2, 2, 0, 0]


def test_a_ban_outweighs_a_bias() -> None:
    logits = torch.tensor([3.0, 2.0])
    settings = {"logit_bias": {0: 100.0}, "stop_token_ids": (0,), "min_tokens": 1}
    assert greedy_run(logits, 2, **settings) == [1, 0]


# Rows that fail


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"logit_bias": {3: 1.0}, "logprobs": 2}])
def test_a_row_that_is_not_finite_is_invalid_and_alone_so(
    poison: float, settings: dict[str, Any]
) -> None:
    logits = random_logits(3)
    rows = [params_of(seed=i, **settings) for i in range(3)]
    expected = sample_params(logits, rows)
    logits[1, 17] = poison
    found = sample_params(logits, rows)
    assert isinstance(found[1].error, InvalidLogits)
    assert [found[0], found[2]] == [expected[0], expected[2]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_in_which_every_token_is_banned_fails_alone(temperature: float) -> None:
    logits = random_logits(2, vocab_size=3)
    banned = params_of(temperature=temperature, stop_token_ids=(0, 1, 2), min_tokens=1)
    failed, fine = sample_params(logits, [banned, params_of(temperature=temperature)])
    assert isinstance(failed.error, NoTokenLeft)
    assert fine == sample_params(logits[1:], [params_of(temperature=temperature)])[0]


# Log-probabilities


def test_logprobs_are_those_of_the_models_own_distribution() -> None:
    logits = random_logits(3)
    changed = {"temperature": 0.3, "top_k": 2, "logit_bias": {1: 50.0}, "logprobs": 4}
    rows = [params_of(**changed), params_of(), params_of(logprobs=0)]
    wide, without, narrow = sample_params(logits, rows)
    table = torch.log_softmax(logits, dim=-1)
    assert without.logprob is None
    assert wide.logprob is not None
    assert narrow.logprob is not None
    assert wide.token_id == 1
    assert wide.logprob.logprob == pytest.approx(float(table[0, 1]))
    assert narrow.logprob.logprob == pytest.approx(float(table[2, narrow.token_id]))
    values, token_ids = table[0].topk(4)
    assert [token_id for token_id, _ in wide.logprob.top] == token_ids.tolist()
    assert [value for _, value in wide.logprob.top] == pytest.approx(values.tolist())
    assert narrow.logprob.top == []


@pytest.mark.parametrize("num_top", [3, 10, 60])
def test_of_equal_alternatives_the_lower_ids_are_told_first(num_top: int) -> None:
    logits = torch.zeros(1, 60)
    (found,) = sample_params(logits, [params_of(logprobs=num_top)])
    assert found.logprob is not None
    assert [token_id for token_id, _ in found.logprob.top] == list(range(num_top))


# What a step costs


def num_calls_of_a_repeated_step(num_rows: int, kinds: list[dict[str, Any]]) -> Counter[str]:
    """Calls by kind in `sample` where the rows are those of the step before."""
    rows = [sequence_of(params_of(**kinds[row % len(kinds)])) for row in range(num_rows)]
    logits, sampler = random_logits(num_rows), Sampler()
    for sequence, first in zip(rows, sample(logits, rows, sampler), strict=True):
        sequence.token_ids.append(first.token_id)
    items = scheduled(rows)
    calls: Counter[str] = Counter()

    def count(_frame: object, event: str, _argument: object) -> None:
        calls[event] += 1

    before = sys.getprofile()
    # A collection that happens to come now would call whoever asked to be told.
    gc.disable()
    sys.setprofile(count)
    try:
        sampler.sample(logits, items)
    finally:
        sys.setprofile(before)
        gc.enable()
    return calls


@pytest.mark.parametrize(
    "kinds",
    [
        [{"temperature": 0.0}],
        [{"temperature": 1.0}],
        [{"temperature": 1.0, "top_k": 40, "top_p": 0.5, "min_p": 0.1}],
        [
            {"temperature": 0.0, "repetition_penalty": 1.2},
            {"presence_penalty": 0.5, "frequency_penalty": 0.5, "top_k": 5},
            {"logit_bias": {3: 1.0}, "stop_token_ids": (1,), "min_tokens": 9},
            {"temperature": 0.0},
        ],
    ],
    ids=["greedy", "drawn", "limited", "mixed"],
)
def test_thirty_two_rows_take_as_many_calls_as_eight(kinds: list[dict[str, Any]]) -> None:
    few, many = (num_calls_of_a_repeated_step(num_rows, kinds) for num_rows in (8, 32))
    assert few == many


def test_an_all_greedy_batch_computes_little_more_than_its_argmax() -> None:
    rows = [sequence_of(params_of(temperature=0.0)) for _ in range(8)]
    logits, sampler = random_logits(8), Sampler()
    sample(logits, rows, sampler)
    for sequence in rows:
        sequence.token_ids.append(1)
    with torch.profiler.profile(record_shapes=True) as profile:
        sample(logits, rows, sampler)
    whole = [list(logits.shape)]
    readers = [e.name for e in profile.events() if e.input_shapes and e.input_shapes[:1] == whole]
    # What says how the same numbers lie; a copy would be one more.
    views = {"slice", "as_strided", "detach", "resolve_conj", "resolve_neg", "to"}
    # The argmax itself is numpy's. One number of each row is looked at again.
    assert [name for name in readers if name.removeprefix("aten::") not in views] == [
        "aten::gather"
    ]
