from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import reference
from engine.protocol import SamplingParams
from engine.sampler import MIN_CANDIDATES, gumbel_noise, sample
from engine.sampler import _stream as stream

VOCAB_SIZE = 3 * MIN_CANDIDATES


def params_of(**changes: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 1} | changes))


def random_logits(num_rows: int, *, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * 3


def draw(logits: Tensor, *, num_draws: int, **params: Any) -> list[int]:
    """The tokens of `num_draws` seeds, all from the same row."""
    rows = [params_of(seed=seed, **params) for seed in range(num_draws)]
    samples = sample(logits.expand(num_draws, -1), rows, [7] * num_draws)
    return [s.token_id for s in samples]


def reference_limits(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> set[int]:
    """The tokens that temperature, then top_k, then top_p leave, straight from their meaning."""
    scaled = logits / temperature
    order = sorted(range(len(scaled)), key=lambda i: (-float(scaled[i]), i))
    order = order[: top_k or None]
    probabilities = torch.softmax(scaled[order].double(), dim=0)
    kept, mass = set(), 0.0
    for token_id, probability in zip(order, probabilities.tolist(), strict=True):
        if mass >= top_p and kept:
            break
        kept.add(token_id)
        mass += probability
    return kept


def test_the_noise_is_that_of_the_definition() -> None:
    seeds, positions = [0, 1, 2**64 - 1], [0, 5, 40_000]
    starts = [stream(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    found = gumbel_noise(torch.tensor(starts), torch.arange(50)[None])
    expected = [
        [reference.gumbel_noise(seed, position, i) for i in range(50)]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_the_noise_has_the_gumbel_distribution() -> None:
    noise = gumbel_noise(torch.tensor([stream(3, 4)]), torch.arange(200_000)[None]).double()
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - 1.6449) < 0.03
    assert bool(torch.isfinite(noise).all())


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = random_logits(4)
    samples = sample(logits, [params_of(temperature=0.0, seed=i) for i in range(4)], [1] * 4)
    assert [s.token_id for s in samples] == logits.argmax(dim=-1).tolist()


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    logits = random_logits(6)
    rows = [
        params_of(seed=1),
        params_of(seed=2, top_k=5),
        params_of(seed=3, top_p=0.8),
        params_of(temperature=0.0),
        params_of(seed=5, top_k=2000, top_p=0.99, temperature=2.0),
        params_of(seed=6, temperature=0.7),
    ]
    together = [s.token_id for s in sample(logits, rows, range(6))]
    alone = [sample(logits[i : i + 1], [rows[i]], [i])[0].token_id for i in range(6)]
    assert together == alone


def test_another_position_or_seed_draws_anew() -> None:
    logits = random_logits(1).expand(50, -1)
    by_position = sample(logits, [params_of(seed=1)] * 50, range(50))
    assert len({s.token_id for s in by_position}) > 5
    assert len(set(draw(logits[:1], num_draws=50))) > 5


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    num_draws = 4000
    tokens = torch.tensor(draw(logits, num_draws=num_draws, temperature=1.5))
    found = torch.bincount(tokens, minlength=4) / num_draws
    torch.testing.assert_close(found, torch.softmax(logits[0] / 1.5, dim=0), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 3, 1.0),
        (1.0, 0, 0.3),
        (0.5, 40, 0.9),
        (1.0, 1, 1.0),
        (1.0, 0, 1e-6),
        # These need more candidates than are sorted at first.
        (1.0, MIN_CANDIDATES + 10, 1.0),
        (8.0, 0, 0.9),
    ],
)
def test_nothing_outside_of_the_limits_is_drawn(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = random_logits(1)
    allowed = reference_limits(logits[0], temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = draw(logits, num_draws=300, temperature=temperature, top_k=top_k, top_p=top_p)
    assert set(tokens) <= allowed
    assert len(set(tokens)) > min(len(allowed) / 2, 50)


def test_of_equal_logits_the_lower_ids_are_kept() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    assert set(draw(logits, num_draws=60, top_k=3)) == {0, 1, 2}


def test_limits_wider_than_the_vocabulary_limit_nothing() -> None:
    logits = random_logits(1, vocab_size=10)
    assert draw(logits, num_draws=20, top_k=500) == draw(logits, num_draws=20)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_invalid_and_alone_so(poison: float) -> None:
    logits = random_logits(3)
    expected = [s.token_id for s in sample(logits, [params_of(seed=i) for i in range(3)], [1] * 3)]
    logits[1, 17] = poison
    found = sample(logits, [params_of(seed=i) for i in range(3)], [1] * 3)
    assert [s.is_valid for s in found] == [True, False, True]
    assert [found[0].token_id, found[2].token_id] == [expected[0], expected[2]]


def test_logprobs_are_those_of_the_models_own_distribution() -> None:
    logits = random_logits(3)
    rows = [params_of(temperature=0.3, top_k=2, logprobs=4), params_of(), params_of(logprobs=0)]
    wide, without, narrow = sample(logits, rows, [1] * 3)
    table = torch.log_softmax(logits, dim=-1)
    assert without.logprob is None
    assert wide.logprob is not None
    assert narrow.logprob is not None
    assert wide.logprob.logprob == pytest.approx(float(table[0, wide.token_id]))
    assert narrow.logprob.logprob == pytest.approx(float(table[2, narrow.token_id]))
    values, token_ids = table[0].topk(4)
    assert [token_id for token_id, _ in wide.logprob.top] == token_ids.tolist()
    assert [value for _, value in wide.logprob.top] == pytest.approx(values.tolist())
    assert narrow.logprob.top == []
