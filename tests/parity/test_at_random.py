"""Whatever an engine is set to and asked for, it answers as PEFT and transformers do.

Drawn settings, adapters and prompts, on a tiny random Llama: in batches of many adapters, with
prompts in chunks, found beginnings and preemptions, tokens and log-probabilities are those of the
adapter's own model, alone. So it is with every implementation of the operations, the definition
among them. Knows nothing of how they compute.
"""

from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.kernels.choice import Kernels
from engine.protocol import SequenceState
from tests.engine.conftest import ADAPTERS
from tests.kernel_lab import COMPILED, DEFINED, DENSE, INTERPRETED
from tests.model_lab import (
    Alone,
    Answer,
    FolderSource,
    Lab,
    WatchedLab,
    assert_told,
    load_with_peft,
    num_ties,
    open_lab,
    save_adapter,
    save_random_model,
    tiny_llama_config,
)

ASKED: tuple[str | None, ...] = (None, *ADAPTERS)
VOCAB_SIZE = 257
MAX_MODEL_LEN, MAX_TOKENS = 72, 32
# The largest adapter takes the memory of 58.
ADAPTER_TOKENS = 60
NUM_WAVES = 4
NUM_TOP = 4


# What is asked


@dataclass(frozen=True, slots=True)
class Job:
    prompt: list[int]
    adapter: str | None
    max_tokens: int
    logprobs: int
    prompt_logprobs: int | None
    # The less urgent make room.
    priority: int


def draw_settings(draw: Random) -> dict[str, Any]:
    """Memory for the longest sequence beside the largest adapter, and for little more."""
    block_size = draw.choice((1, 2, 3, 4, 16))
    num_tokens = MAX_MODEL_LEN + ADAPTER_TOKENS + draw.randrange(20)
    max_num_seqs = draw.randint(4, 10)
    return {
        "block_size": block_size,
        "num_blocks": -(-num_tokens // block_size) + 1,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_seqs + draw.choice((0, 8, 200)),
        "max_loras": draw.randint(1, len(ADAPTERS) - 1),
    }


def draw_job(draw: Random, earlier: list[tuple[Job, Answer]], asked: tuple[str | None, ...]) -> Job:
    """A new prompt, or the beginning of a conversation and how it might go on."""
    prompt, adapter = [], draw.choice(asked)
    if earlier and draw.random() < 0.7:
        job, answer = draw.choice(earlier)
        prompt = [*job.prompt, *answer.token_ids]
        prompt = prompt[: draw.choice((len(job.prompt), len(prompt), draw.randint(1, len(prompt))))]
        adapter = draw.choice((job.adapter, job.adapter, adapter))
    num_new = draw.randint(0, 6) if prompt else draw.randint(1, 30)
    prompt += [draw.randrange(VOCAB_SIZE) for _ in range(num_new)]
    return Job(
        prompt=prompt[: MAX_MODEL_LEN - MAX_TOKENS],
        adapter=adapter,
        max_tokens=draw.choice((1, draw.randint(2, MAX_TOKENS), MAX_TOKENS)),
        logprobs=draw.randint(0, NUM_TOP),
        prompt_logprobs=draw.choice((None, None, None, NUM_TOP)),
        priority=draw.choice((0, 0, 1)),
    )


# What happens


def ask(lab: Lab, draw: Random, asked: tuple[str | None, ...]) -> list[tuple[Job, Answer]]:
    """In waves, of which some come while the ones before are under way."""
    jobs: list[tuple[Job, Answer]] = []
    for _ in range(NUM_WAVES):
        for _ in range(draw.randint(3, 8)):
            job = draw_job(draw, jobs, asked)
            jobs.append((job, lab.answers[lab.submit(**asdict(job))]))
        if draw.random() < 0.4:
            lab.run()
        for _ in range(draw.randrange(24)):
            lab.step()
    lab.run()
    lab.assert_nothing_is_left()
    return jobs


# What comes out


def compare(job: Job, answer: Answer, alone: Alone) -> int:
    """The number of ties."""
    assert answer.state is SequenceState.LENGTH, answer.last.fault
    found, start = answer.token_ids, len(job.prompt)
    rows = alone.logprobs([*job.prompt, *found])
    assert_told(answer.logprobs, found, rows[start - 1 : -1], num_top=job.logprobs)
    told = [e.prompt_logprobs for e in answer.events if e.prompt_logprobs is not None]
    assert len(told) == (job.prompt_logprobs is not None)
    for logprobs in told:
        assert_told(logprobs, job.prompt[1:], rows[: start - 1], num_top=NUM_TOP)
    return num_ties(rows[start - 1 : -1], found)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = tiny_llama_config(vocab_size=VOCAB_SIZE)
    return save_random_model(config, tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module")
def adapters(model: str, tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        save_adapter(model, root / name, seed=seed, **settings)
    return FolderSource(root)


@pytest.fixture(scope="module")
def alone(model: str, adapters: FolderSource) -> dict[str | None, Alone]:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found: dict[str | None, Alone] = {None: Alone(base)}
    for name in ADAPTERS:
        found[name] = Alone(load_with_peft(model, adapters.root / name))
    return found


@pytest.mark.parametrize(
    ("kernels", "seeds"),
    [
        pytest.param(COMPILED, range(6), id="compiled"),
        pytest.param(DENSE, range(6), id="dense"),
        # Row by row in Python.
        pytest.param(DEFINED, range(2), id="defined"),
        pytest.param(INTERPRETED, range(2), id="interpreted", marks=pytest.mark.slow),
    ],
)
def test_each_gets_what_its_adapter_says_alone(
    kernels: Kernels,
    seeds: range,
    model: str,
    adapters: FolderSource,
    alone: dict[str | None, Alone],
) -> None:
    seen, ties = Counter[str](), 0
    for seed in seeds:
        draw = Random(seed)
        settings = draw_settings(draw)
        print(f"seed {seed}: {settings}")
        lab = WatchedLab(model, adapters, **settings)
        with closing(lab.core):
            lab.core._runner._loaded = replace(lab.core._loaded, kernels=kernels)
            jobs = ask(lab, draw, ASKED)
        ties += sum(compare(job, answer, alone[job.adapter]) for job, answer in jobs)
        seen += lab.seen
        seen["found"] += sum(answer.last.cached_tokens > 0 for _, answer in jobs)
        seen["answers"] += len(jobs)
    print(f"{seen}, {ties} ties")
    for event in ("mixed", "chunked", "preempted", "unloaded", "found"):
        assert seen[event] >= len(seeds), f"there was hardly any {event}"


@pytest.mark.parametrize("seed", range(3))
def test_an_engine_without_adapters_answers_as_transformers_do(
    seed: int, model: str, adapters: FolderSource, alone: dict[str | None, Alone]
) -> None:
    draw = Random(seed)
    with open_lab(model, adapters, **(draw_settings(draw) | {"max_loras": 0})) as lab:
        jobs = ask(lab, draw, (None,))
    ties = sum(compare(job, answer, alone[None]) for job, answer in jobs)
    print(f"{ties} ties")
