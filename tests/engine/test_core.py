"""What the engine does with sequences, on a tiny random Llama with real PEFT adapters."""

import gc
import itertools
import json
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.errors import ArtifactMissing
from engine.batch import Batch
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import (
    ConfigurationError,
    ContextLengthExceeded,
    InvalidSequence,
    ProbeError,
)
from engine.protocol import SequenceState
from engine.scheduler import SampledToken, ScheduledSequence
from tests.engine.conftest import ADAPTERS
from tests.model_lab import FolderSource, Lab, open_lab

PROMPTS = [[(37 * i + k) % 257 for i in range(length)] for k, length in enumerate((5, 17, 30, 9))]
COLD, WARM = "all-linear", "attention"


@pytest.fixture
def lab(model: str, adapters: FolderSource) -> Iterator[Lab]:
    with open_lab(model, adapters) as lab:
        yield lab
        lab.assert_nothing_is_left()


@pytest.fixture
def cold_comes() -> threading.Event:
    """Set it and the adapter `COLD` arrives in the engine of `slow_lab`."""
    return threading.Event()


@pytest.fixture
def slow_lab(model: str, adapters: FolderSource, cold_comes: threading.Event) -> Iterator[Lab]:
    with open_lab(model, FolderSource(adapters.root, delays={COLD: cold_comes})) as lab:
        yield lab
        cold_comes.set()
        lab.assert_nothing_is_left()


# Batches change nothing


def test_tokens_do_not_depend_on_chunks_batches_or_preemption(
    model: str, adapters: FolderSource
) -> None:
    jobs: list[dict[str, Any]] = [
        {"prompt": PROMPTS[0], "max_tokens": 30},
        {"prompt": PROMPTS[1], "max_tokens": 30, "adapter": "all-linear"},
        {"prompt": PROMPTS[2], "max_tokens": 30, "temperature": 1.0, "seed": 3},
        {"prompt": PROMPTS[3], "max_tokens": 30, "adapter": "patterned", "seed": 4, "top_p": 0.9},
        {"prompt": PROMPTS[0], "max_tokens": 30, "adapter": "one-layer", "temperature": 2.0},
        {"prompt": PROMPTS[1], "max_tokens": 30, "frequency_penalty": 1.5, "min_p": 0.02},
    ]
    for job in jobs[3:]:
        job.setdefault("temperature", 1.0)
    with open_lab(model, adapters) as lab:
        alone = [lab.generate(**job) for job in jobs]
    # Beside the adapters blocks for less than two of the six sequences at full length.
    with open_lab(
        model,
        adapters,
        num_blocks=43,
        max_model_len=64,
        max_num_batched_tokens=8,
        max_num_seqs=8,
    ) as lab:
        keys = [lab.submit(**job) for job in jobs]
        num_running = []
        while lab.core.has_work() or lab.core.status().num_waiting:
            lab.step()
            num_running.append(lab.core.status().num_running)
        drops = [b for a, b in itertools.pairwise(num_running) if b < a]
        assert len(drops) > len(jobs), "nothing was preempted"
        assert [lab.answers[key].token_ids for key in keys] == alone
        lab.assert_nothing_is_left()


def test_generation_goes_on_after_what_an_earlier_attempt_delivered(lab: Lab) -> None:
    settings: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 11}
    whole = lab.generate(PROMPTS[1], **settings)
    key = lab.submit(PROMPTS[1], generated=whole[:5], **settings)
    lab.run()
    assert lab.answers[key].token_ids == whole[5:]
    assert lab.answers[key].last.generated_tokens == 12
    assert lab.answers[key].last.prompt_tokens == len(PROMPTS[1])


def test_a_resumed_sequence_that_was_complete_ends_at_once(lab: Lab) -> None:
    key = lab.submit(PROMPTS[0], generated=[1, 2, 3], max_tokens=3)
    assert [event.state for event in lab.step()] == [SequenceState.LENGTH]
    assert lab.answers[key].token_ids == []


def test_blocks_are_scattered_in_the_cache(model: str, adapters: FolderSource) -> None:
    """Ends in another order than starts leave holes, which later sequences fill."""
    with open_lab(model, adapters, num_blocks=24, max_loras=0) as lab:
        expected = lab.generate(PROMPTS[2], max_tokens=20)
        for length, prompt in zip((3, 19, 7, 1), PROMPTS, strict=True):
            lab.submit(prompt, max_tokens=length)
        lab.run()
        key = lab.submit(PROMPTS[2], max_tokens=20)
        lab.step()
        (running,) = lab.core._scheduler._running
        steps = {b - a for a, b in itertools.pairwise(running.block_table)}
        assert steps != {1}
        lab.run()
        assert lab.answers[key].token_ids == expected


# Ends


# Beginnings that are computed already


def test_a_conversation_that_goes_on_computes_its_past_only_once(lab: Lab) -> None:
    first = lab.generate(PROMPTS[2], adapter=WARM, max_tokens=12)
    longer = [*PROMPTS[2], *first, 7, 8, 9]
    again = lab.submit(longer, adapter=WARM, max_tokens=12)
    lab.run()
    # 41 tokens are computed, for the answer's last one was only sampled: ten full blocks of 4.
    assert lab.answers[again].last.cached_tokens == 40
    fresh = lab.submit(longer, adapter=WARM, max_tokens=12, salt=b"somebody else")
    lab.run()
    assert lab.answers[fresh].last.cached_tokens == 0
    assert lab.answers[again].token_ids == lab.answers[fresh].token_ids


def test_another_adapter_and_the_base_model_compute_for_themselves(lab: Lab) -> None:
    answers = {}
    for adapter in (WARM, COLD, None):
        key = lab.submit(PROMPTS[2], adapter=adapter)
        lab.run()
        assert lab.answers[key].last.cached_tokens == 0
        answers[adapter] = lab.answers[key].token_ids
    for adapter, expected in answers.items():
        key = lab.submit(PROMPTS[2], adapter=adapter)
        lab.run()
        assert lab.answers[key].last.cached_tokens == 28
        assert lab.answers[key].token_ids == expected


def test_preemption_does_not_count_as_a_find(model: str, adapters: FolderSource) -> None:
    with open_lab(
        model, adapters, num_blocks=20, max_num_batched_tokens=8, max_num_seqs=8, max_loras=0
    ) as lab:
        keys = [lab.submit(prompt, max_tokens=30) for prompt in PROMPTS]
        lab.run()
        assert [lab.answers[key].last.cached_tokens for key in keys] == [0] * len(PROMPTS)
        lab.assert_nothing_is_left()


def test_a_stop_token_ends_the_answer_and_is_delivered(lab: Lab) -> None:
    free = lab.generate(PROMPTS[0], max_tokens=8)
    stop = free[3]
    key = lab.submit(PROMPTS[0], max_tokens=8, stop_token_ids=(stop,))
    lab.run()
    answer = lab.answers[key]
    assert answer.token_ids == free[: free.index(stop) + 1]
    assert answer.state is SequenceState.STOPPED


def test_a_stop_token_does_not_come_before_min_tokens(lab: Lab) -> None:
    free = lab.generate(PROMPTS[0], max_tokens=8)
    key = lab.submit(PROMPTS[0], max_tokens=8, stop_token_ids=tuple(free), min_tokens=5)
    lab.run()
    found = lab.answers[key].token_ids
    assert len(found) >= 5
    assert not set(found[:5]) & set(free)


def test_an_answer_of_which_every_token_is_banned_fails_alone(lab: Lab) -> None:
    expected = lab.generate(PROMPTS[1])
    banned = lab.submit(PROMPTS[0], stop_token_ids=tuple(range(257)), min_tokens=1)
    fine = lab.submit(PROMPTS[1])
    lab.run()
    fault = lab.answers[banned].last.fault
    assert fault is not None
    assert (fault.code, fault.is_retryable) == ("no_token_left", False)
    assert "min_tokens" in fault.message
    assert lab.answers[fine].token_ids == expected


def test_max_tokens_ends_the_answer(lab: Lab) -> None:
    key = lab.submit(PROMPTS[0], max_tokens=3)
    lab.run()
    assert lab.answers[key].state is SequenceState.LENGTH
    assert [event.generated_tokens for event in lab.answers[key].events] == [1, 2, 3]


def test_an_abort_ends_a_sequence_wherever_it_stands(slow_lab: Lab) -> None:
    lab = slow_lab
    waiting = lab.submit(PROMPTS[0], adapter=COLD)
    running = lab.submit(PROMPTS[1], max_tokens=50)
    lab.step()
    lab.step()
    for key in (waiting, running):
        lab.core.abort(key)
    assert lab.core.has_work()
    states = {event.key: (event.state, event.generated_tokens) for event in lab.step()}
    assert states == {waiting: (SequenceState.ABORTED, 0), running: (SequenceState.ABORTED, 2)}
    lab.assert_nothing_is_left()
    lab.core.abort(running)
    assert lab.step() == []


def test_logprobs_come_with_their_tokens(lab: Lab) -> None:
    key = lab.submit(PROMPTS[0], max_tokens=4, logprobs=2)
    lab.run()
    answer = lab.answers[key]
    assert len(answer.logprobs) == 4
    for token_id, logprob in zip(answer.token_ids, answer.logprobs, strict=True):
        assert logprob.top[0] == (token_id, logprob.logprob)
        assert len(logprob.top) == 2


def test_the_time_of_all_steps_is_shared_among_their_sequences(lab: Lab) -> None:
    keys = [lab.submit(prompt, max_tokens=5) for prompt in PROMPTS]
    lab.run()
    shares = [lab.answers[key].last.engine_ns for key in keys]
    assert all(share > 0 for share in shares)
    assert shares[2] > shares[0], "the longest prompt took the largest share of the first step"


# Refusals


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"prompt": []}, InvalidSequence),
        ({"prompt": [257]}, InvalidSequence),
        ({"prompt": [-1]}, InvalidSequence),
        ({"max_tokens": 0}, InvalidSequence),
        ({"top_p": 0.0}, InvalidSequence),
        ({"top_k": -1}, InvalidSequence),
        ({"temperature": float("nan")}, InvalidSequence),
        ({"seed": 2**64}, InvalidSequence),
        ({"min_p": 1.01}, InvalidSequence),
        ({"presence_penalty": 2.1}, InvalidSequence),
        ({"frequency_penalty": float("nan")}, InvalidSequence),
        ({"repetition_penalty": 0.0}, InvalidSequence),
        ({"logit_bias": {257: 1.0}}, InvalidSequence),
        ({"logit_bias": {3: float("inf")}}, InvalidSequence),
        ({"min_tokens": 9, "max_tokens": 8}, InvalidSequence),
        ({"logprobs": -1}, InvalidSequence),
        ({"prompt_logprobs": 258}, InvalidSequence),
        ({"priority": 101}, InvalidSequence),
        ({"weight": 0.0}, InvalidSequence),
        ({"max_tokens": 252}, ContextLengthExceeded),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(
    lab: Lab, changes: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        lab.submit(**({"prompt": PROMPTS[0]} | changes))
    lab.assert_nothing_is_left()


def test_the_context_can_be_filled_to_the_last_token(lab: Lab) -> None:
    assert lab.core.max_model_len == 256
    key = lab.submit(PROMPTS[0] * 50, max_tokens=6)
    lab.run()
    assert lab.answers[key].state is SequenceState.LENGTH


def test_a_context_that_the_cache_cannot_hold_is_refused_at_start(
    model: str, adapters: FolderSource
) -> None:
    config = EngineConfig(
        model=model, served_name="base", max_model_len=200, num_blocks=10, block_size=4
    )
    with pytest.raises(ConfigurationError, match="holds 36 tokens"):
        EngineCore(config, adapter_source=adapters)


# What a step costs


def calls_of_a_decode_step(model: str, adapters: FolderSource, num_rows: int) -> Counter[str]:
    """Of Python, from the batch to the sampled tokens, in a step like the one before."""
    names = [None, "attention", "patterned", "one-layer"]
    with open_lab(model, adapters, num_blocks=600, max_num_seqs=num_rows) as lab:
        for name in names:
            lab.generate(PROMPTS[0], adapter=name, max_tokens=4)
        for row in range(num_rows):
            lab.submit(PROMPTS[0], adapter=names[row % 4], max_tokens=20, salt=bytes([row]))
        while min(len(answer.token_ids) for answer in lab.answers.values()) < 4:
            lab.step()
        compute, calls = lab.core._compute, Counter[str]()

        def count(frame: FrameType, event: str, _: object) -> None:
            if event == "call":
                calls[frame.f_code.co_qualname] += 1

        def compute_and_count(scheduled: list[ScheduledSequence]) -> list[SampledToken]:
            assert len(scheduled) == num_rows
            calls.clear()
            before = sys.getprofile()
            # A collection that happens to come now would call whoever asked to be told.
            gc.disable()
            sys.setprofile(count)
            try:
                return compute(scheduled)
            finally:
                sys.setprofile(before)
                gc.enable()

        lab.core._compute = compute_and_count  # type: ignore[method-assign] # an observer
        lab.step()
        lab.step()
        lab.core._compute = compute  # type: ignore[method-assign]
        lab.run()
    return calls


def test_a_decode_step_calls_no_python_for_each_row(model: str, adapters: FolderSource) -> None:
    few, many = (calls_of_a_decode_step(model, adapters, num_rows) for num_rows in (8, 32))
    assert few == many


# Memory that runs out in a step


def fail_above(lab: Lab, num_tokens: int, error: Exception) -> list[int]:
    """Let steps of more tokens fail; gives how many tokens each step had."""
    run, sizes = lab.core._runner.run, []

    def run_or_fail(batch: Batch, *, watch: Callable[[torch.Tensor], None] | None) -> torch.Tensor:
        sizes.append(batch.num_tokens)
        if batch.num_tokens > num_tokens:
            raise error
        return run(batch, watch=watch)

    lab.core._runner.run = run_or_fail  # type: ignore[method-assign, assignment] # the fault
    return sizes


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_a_step_that_runs_out_of_memory_is_taken_again_in_smaller_parts(
    lab: Lab, error: Exception
) -> None:
    expected = [lab.generate(prompt, adapter=WARM) for prompt in PROMPTS]
    sizes = fail_above(lab, 3, error)
    keys = [lab.submit(prompt, adapter=WARM, salt=b"again") for prompt in PROMPTS]
    lab.run()
    assert [lab.answers[key].token_ids for key in keys] == expected
    assert max(sizes) > 3


def test_a_sequence_for_which_no_step_is_small_enough_fails_alone(lab: Lab) -> None:
    sizes = fail_above(lab, 0, MemoryError())
    key = lab.submit(PROMPTS[0])
    lab.run()
    fault = lab.answers[key].last.fault
    assert fault is not None
    assert (fault.code, fault.is_retryable) == ("engine_out_of_memory", True)
    assert sizes[-1] == 1


def test_an_error_that_is_not_about_memory_is_not_taken_for_one(lab: Lab) -> None:
    fail_above(lab, 0, RuntimeError("CUDA error: an illegal memory access was encountered"))
    key = lab.submit(PROMPTS[0])
    with pytest.raises(RuntimeError, match="illegal"):
        lab.run()
    lab.core.abort(key)
    lab.step()


# Adapters


def test_more_adapters_than_slots_all_get_their_turn(model: str, adapters: FolderSource) -> None:
    with open_lab(model, adapters) as lab:
        expected = {name: lab.generate(PROMPTS[0], adapter=name) for name in ADAPTERS}
    with open_lab(model, adapters, max_loras=2) as lab:
        keys = [(name, lab.submit(PROMPTS[0], adapter=name)) for name in (*ADAPTERS, *ADAPTERS)]
        lab.run()
        assert len(lab.core.status().resident_adapters) == 2
        for name, key in keys:
            assert lab.answers[key].token_ids == expected[name], name
        lab.assert_nothing_is_left()


def test_adapters_answer_differently(lab: Lab) -> None:
    answers = {name: lab.generate(PROMPTS[2], adapter=name) for name in ADAPTERS}
    answers["base"] = lab.generate(PROMPTS[2])
    assert len({tuple(tokens) for tokens in answers.values()}) == len(answers)


def test_a_sequence_waiting_for_its_adapter_does_not_hold_up_the_others(
    slow_lab: Lab, cold_comes: threading.Event
) -> None:
    lab, has_come = slow_lab, threading.Event()
    wake, lab.core.wake = lab.core.wake, has_come.set
    slow = lab.submit(PROMPTS[0], adapter=COLD)
    quick = lab.submit(PROMPTS[1])
    while not (lab.answers[quick].events and lab.answers[quick].state.is_final):
        lab.step()
    assert lab.answers[slow].events == []
    assert lab.step() == []
    assert not lab.core.has_work()
    cold_comes.set()
    has_come.wait()
    assert lab.core.has_work()
    lab.core.wake = wake
    lab.run()
    assert lab.answers[slow].state is SequenceState.LENGTH


def test_those_who_keep_coming_do_not_starve_an_adapter_that_waits(
    model: str, adapters: FolderSource
) -> None:
    with open_lab(model, adapters, max_loras=1) as lab:
        lab.generate(PROMPTS[0], adapter=WARM)
        lab.submit(PROMPTS[0], adapter=WARM, max_tokens=20)
        lab.step()
        patient = lab.submit(PROMPTS[1], adapter=COLD, max_tokens=2)
        for _ in range(60):
            lab.submit(PROMPTS[3], adapter=WARM, max_tokens=20)
            lab.step()
            lab.core._adapter_loader._copier.submit(int).result()
        assert lab.answers[patient].events
        lab.run()
        lab.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("failure", "is_retryable"),
    [
        (ArtifactMissing("broken"), False),
        (FileNotFoundError("no such file"), False),
        (OSError("connection reset"), True),
        (RuntimeError("a store's own error"), True),
    ],
)
def test_an_adapter_that_fails_to_load_fails_its_own_sequences_alone(
    model: str, adapters: FolderSource, failure: Exception, is_retryable: bool
) -> None:
    source = FolderSource(adapters.root, failures={"broken": failure})
    with open_lab(model, source, max_loras=1) as lab:
        broken = [lab.submit(PROMPTS[0], adapter="broken") for _ in range(2)]
        others = [lab.submit(PROMPTS[0], adapter=WARM), lab.submit(PROMPTS[0])]
        lab.run()
        for key in broken:
            fault = lab.answers[key].last.fault
            assert lab.answers[key].state is SequenceState.FAILED
            assert fault is not None
            assert (fault.code, fault.is_retryable) == ("adapter_unavailable", is_retryable)
        for key in others:
            assert lab.answers[key].state is SequenceState.LENGTH
        lab.assert_nothing_is_left()


def test_an_adapter_above_the_largest_rank_is_not_served(
    model: str, adapters: FolderSource
) -> None:
    with open_lab(model, adapters, max_lora_rank=8) as lab:
        key = lab.submit(PROMPTS[0], adapter="patterned")
        lab.run()
        fault = lab.answers[key].last.fault
        assert fault is not None
        assert "rank 9" in fault.message
        assert not fault.is_retryable


def test_an_adapter_whose_numbers_overflow_fails_alone_and_leaves_nothing_behind(
    model: str, adapters: FolderSource, tmp_path: Path
) -> None:
    shutil.copytree(adapters.root, tmp_path, dirs_exist_ok=True)
    huge = tmp_path / "huge"
    shutil.copytree(tmp_path / COLD, huge)
    tensors = load_file(huge / "adapter_model.safetensors")
    save_file({k: v * 1e30 for k, v in tensors.items()}, huge / "adapter_model.safetensors")
    with open_lab(model, FolderSource(tmp_path), num_blocks=90) as lab:
        expected = [lab.generate(prompt, adapter=WARM) for prompt in PROMPTS]
        for name in ("huge", WARM):
            lab.generate(PROMPTS[0], adapter=name)
        poisoned = lab.submit(PROMPTS[2], adapter="huge")
        keys = [lab.submit(prompt, adapter=WARM) for prompt in PROMPTS[:2]]
        lab.run()
        fault = lab.answers[poisoned].last.fault
        assert fault is not None
        assert (fault.code, fault.is_retryable) == ("nan_logits", False)
        assert [lab.answers[key].token_ids for key in keys] == expected[:2]
        # These use the blocks that hold the other's NaN.
        assert [lab.generate(prompt, adapter=WARM) for prompt in PROMPTS] == expected
        lab.assert_nothing_is_left()


# Owners


def test_an_owner_that_is_held_back_stops_nobody_else(model: str, adapters: FolderSource) -> None:
    with open_lab(model, adapters, num_blocks=12, max_num_seqs=2, max_loras=0) as lab:
        expected = [lab.generate(prompt, max_tokens=10) for prompt in PROMPTS[:2]]
        held = [lab.submit(prompt, owner="slow", max_tokens=10) for prompt in PROMPTS[:2]]
        lab.step()
        lab.core.hold_back("slow", held=True)
        others = [lab.submit(prompt, owner="quick", max_tokens=10) for prompt in PROMPTS[:2]]
        while lab.core.has_work():
            lab.step()
        assert [lab.answers[key].token_ids for key in others] == expected
        assert [len(lab.answers[key].token_ids) for key in held] == [1, 1]
        lab.core.hold_back("slow", held=False)
        assert lab.core.has_work()
        lab.run()
        assert [lab.answers[key].token_ids for key in held] == expected
        lab.assert_nothing_is_left()


# Probes


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_good_adapter_passes_its_probe(lab: Lab, name: str) -> None:
    report = lab.core.probe(name)
    assert report.is_passed, report
    assert report.untouched_modules == []
    assert report.largest_relative_error < 1e-5
    assert report.logit_shift > 100 * report.noise
    assert lab.core.status().resident_adapters == ()


def test_a_probe_changes_nothing_for_running_sequences(lab: Lab) -> None:
    expected = lab.generate(PROMPTS[2], adapter=WARM)
    key = lab.submit(PROMPTS[2], adapter=WARM)
    lab.step()
    lab.core.probe(COLD)
    lab.run()
    assert lab.answers[key].token_ids == expected


def test_a_probe_finds_a_scaling_that_is_not_the_files(lab: Lab, adapters: FolderSource) -> None:
    bank = lab.core._loaded.bank
    install = bank.install

    def install_wrongly(slot: int, adapter: Any, *, memory: torch.Tensor) -> None:
        install(slot, adapter, memory=memory * 1.5)

    bank.install = install_wrongly  # type: ignore[method-assign] # the fault to be found
    report = lab.core.probe(COLD)
    assert not report.is_passed
    assert report.largest_relative_error > report.error_bound


def test_a_probe_finds_modules_that_the_adapter_leaves_as_they_are(
    model: str, adapters: FolderSource, tmp_path: Path
) -> None:
    folder = tmp_path / "half"
    shutil.copytree(adapters.root / WARM, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    silent = next(name for name in tensors if "layers.0.self_attn.v_proj.lora_B" in name)
    tensors[silent] = torch.zeros_like(tensors[silent])
    save_file(tensors, folder / "adapter_model.safetensors")
    with open_lab(model, FolderSource(tmp_path)) as lab:
        report = lab.core.probe("half")
        assert report.untouched_modules == ["model.layers.0.self_attn.v_proj"]
        assert not report.is_passed


def test_a_probe_of_what_cannot_be_read_says_so(
    model: str, adapters: FolderSource, tmp_path: Path
) -> None:
    source = FolderSource(tmp_path, failures={"far": OSError("connection reset")})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps({"r": 1}))
    with open_lab(model, source) as lab:
        with pytest.raises(ProbeError) as found:
            lab.core.probe("far")
        assert found.value.is_retryable
        with pytest.raises(ProbeError) as found:
            lab.core.probe("bad")
        assert not found.value.is_retryable
