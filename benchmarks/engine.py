"""How fast the engine alone is: no gateway, no HTTP, one process.

    python -m benchmarks.engine --model ~/.cache/manylora/models/SmolLM2-135M-Instruct
    python -m benchmarks.engine --shape llama-3.1-8b --device cuda --dtype bfloat16

Needs torch, transformers, safetensors and numpy, so it runs on a machine that has a GPU and little
else. What is compared runs in turns in one process: decode steps one by one, so that a ratio is of
two neighbouring steps, everything else round by round. Prompts are of random tokens, answers greedy
and of fixed length. Each adapter's tokens in a mixed batch are compared with those that it gives
alone, in the same run. Beside every figure stands the floor of `benchmarks/roofline.py`, measured
in the same run too.
"""

import argparse
import cProfile
import gc
import itertools
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from benchmarks.provenance import commit
from benchmarks.roofline import Machine, StepWork, floor_s, measure
from engine.config import EngineConfig, QuantizationName
from engine.core import EngineCore
from engine.kernels.quantised import BF16, FP8, GROUP_SIZE, INT4, INT8, INT8_DYNAMIC
from engine.protocol import SamplingParams, Submit
from engine.sequence import Sequence as EngineSequence
from engine.sequence import SequenceKey

SHAPES = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
}
# Files that stand for all adapters of a rank: what they hold changes no time.
NUM_FILES_PER_RANK = 16
PATIENCE_S = 120
PROFILED_STEPS = 16
NUM_PROFILED_FUNCTIONS = 25


# Adapters


@dataclass(frozen=True, slots=True)
class MadeUpAdapters:
    """Adapters "<rank>-<number>": as many names as are asked for, over a few files."""

    root: Path
    modules: dict[str, tuple[int, int]]
    base_model: str
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())

    @contextmanager
    def fetch(self, weights_digest: str) -> Iterator[Path]:
        rank, number = map(int, weights_digest.split("-"))
        folder = self.root / f"{rank}-{number % NUM_FILES_PER_RANK}"
        with self._lock:
            if not folder.exists():
                self._write(folder, rank, seed=number % NUM_FILES_PER_RANK)
        yield folder

    def forget(self, weights_digest: str) -> int:
        return 0

    def _write(self, folder: Path, rank: int, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, (in_features, out_features) in self.modules.items():
            prefix = f"base_model.model.{name}"
            lora_A = torch.randn(rank, in_features, generator=generator) / math.sqrt(in_features)
            lora_B = torch.randn(out_features, rank, generator=generator) * 0.05
            tensors[f"{prefix}.lora_A.weight"] = lora_A
            tensors[f"{prefix}.lora_B.weight"] = lora_B
        folder.mkdir(parents=True)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model,
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted({name.rsplit(".", 1)[-1] for name in self.modules}),
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")


# Driving an engine


@dataclass(slots=True)
class Timeline:
    """What one request saw; seconds on one clock."""

    submitted_s: float
    token_times_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    fault: str | None = None

    @property
    def first_token_s(self) -> float:
        return self.token_times_s[0] - self.submitted_s

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.token_times_s)]


class Driver:
    """One engine, stepped by hand."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._has_news = threading.Event()
        core.wake = self._has_news.set
        self._number = 0
        self._timelines: dict[SequenceKey, Timeline] = {}
        self._open: set[SequenceKey] = set()

    def submit(
        self, prompt: list[int], adapter: str | None, *, num_tokens: int, owner: str = "bench"
    ) -> Timeline:
        self._number += 1
        submit = Submit(
            sequence_id=self._number,
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0),
            adapter_digest=adapter,
            # No two share a beginning: the prefix cache would hide what is measured.
            cache_salt=self._number.to_bytes(8, "little"),
        )
        sequence = EngineSequence.from_submit(submit, worker_id=owner, worker_epoch=1)
        timeline = self._timelines[sequence.key] = Timeline(time.perf_counter())
        self._open.add(sequence.key)
        self.core.submit(sequence)
        return timeline

    @property
    def num_open(self) -> int:
        return len(self._open)

    def step(self) -> None:
        self._has_news.clear()
        events = self.core.step()
        now_s = time.perf_counter()
        for event in events:
            timeline = self._timelines[event.key]
            timeline.token_ids += event.token_ids
            timeline.token_times_s += [now_s] * len(event.token_ids)
            if event.state.is_final:
                self._open.remove(event.key)
                timeline.fault = None if event.fault is None else event.fault.message
        if not events and not self.core.has_work() and self._open:
            assert self._has_news.wait(PATIENCE_S), "the engine waits for nothing"

    def finish(self) -> None:
        while self._open:
            self.step()


@dataclass(slots=True)
class Mix:
    """One batch of requests, an owner of its own, so that it can be held back for the others."""

    name: str
    adapters: list[str | None]
    first_token_s: list[float] = field(default_factory=list)
    # Of each round: those of its decode steps.
    step_s: list[list[float]] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)

    @property
    def ranks(self) -> list[int]:
        """Of the distinct adapters"""
        return [int(each.split("-")[0]) for each in set(self.adapters) if each is not None]


def run_in_turns(
    driver: Driver, mixes: list[Mix], prompts: list[list[int]], *, num_tokens: int
) -> None:
    """All mixes at once, but each step is one mix's alone; they take turns, step by step."""
    running: dict[str, list[Timeline]] = {}
    for mix in mixes:
        turn_to(driver, mixes, mix)
        running[mix.name] = [
            driver.submit(prompt, adapter, num_tokens=num_tokens, owner=mix.name)
            for prompt, adapter in zip(prompts, mix.adapters, strict=True)
        ]
        while not all(timeline.token_ids for timeline in running[mix.name]):
            driver.step()
        mix.first_token_s += [timeline.first_token_s for timeline in running[mix.name]]
        mix.step_s.append([])
    while driver.num_open:
        for mix in mixes:
            is_full = all(len(t.token_ids) < num_tokens for t in running[mix.name])
            if any(len(t.token_ids) < num_tokens for t in running[mix.name]):
                turn_to(driver, mixes, mix)
                started_s = time.perf_counter()
                driver.step()
                if is_full:
                    mix.step_s[-1].append(time.perf_counter() - started_s)
    for mix in mixes:
        mix.token_ids = [timeline.token_ids for timeline in running[mix.name]]
        driver.core.hold_back(mix.name, held=False)


def turn_to(driver: Driver, mixes: list[Mix], chosen: Mix) -> None:
    for mix in mixes:
        driver.core.hold_back(mix.name, held=mix is not chosen)


def answer(driver: Driver, prompt: list[int], adapter: str | None, *, num_tokens: int) -> Timeline:
    """One request by itself, from the submit to the last token."""
    timeline = driver.submit(prompt, adapter, num_tokens=num_tokens)
    driver.finish()
    assert timeline.fault is None, timeline.fault
    return timeline


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def interval(values: list[float]) -> dict[str, float]:
    """Median, and the middle half."""
    return {
        "median": statistics.median(values),
        "low": quantile(values, 0.25),
        "high": quantile(values, 0.75),
    }


# The bench


class Bench:
    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self.arguments = arguments
        self.dice = random.Random(arguments.seed)
        self.device = torch.device(arguments.device)
        self.model = arguments.model or save_shape(
            arguments.shape, scratch / "model", device=self.device
        )
        self._scratch = scratch
        self.machine: Machine | None = None
        self.source: MadeUpAdapters | None = None

    def open(self, **settings: Any) -> Driver:
        # What an engine before this one held is free again.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        config = EngineConfig(
            model=str(self.model),
            served_name="base",
            device=self.arguments.device,
            dtype=self.arguments.dtype,
            max_model_len=self.arguments.max_model_len,
            memory_bytes=self.arguments.memory_mib * 1024**2 or None,
            **{"quantization": self.arguments.quantization, **settings},
        )
        driver = Driver(EngineCore(config, adapter_source=_Later(self)))
        if self.source is None:
            modules = self.adapted(driver)
            self.source = MadeUpAdapters(self._scratch / "adapters", modules, "base")
        if self.machine is None:
            self.machine = measure(self.device, getattr(torch, driver.core.dtype))
        return driver

    def adapted(self, driver: Driver) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the modules that adapters change."""
        linears = driver.core.base_shape.modules
        own = {name: name.rpartition(".")[2] for name in linears}
        # As PEFT's "all-linear" has it, which leaves the output layer out.
        wanted = set(self.arguments.modules or own.values()) - {"lm_head"}
        return {name: size for name, size in linears.items() if own[name] in wanted}

    def prompts(self, count: int) -> list[list[int]]:
        return [
            [self.dice.randrange(100, 40_000) for _ in range(self.arguments.prompt_tokens)]
            for _ in range(count)
        ]

    def decode_work(self, driver: Driver, *, batch: int, ranks: Sequence[int]) -> StepWork:
        """Of one decode step in the middle of the answers; `ranks` of the distinct adapters."""
        config = AutoConfig.from_pretrained(self.model)
        size = getattr(torch, driver.core.dtype).itemsize
        linears, adapted = driver.core.base_shape.modules.values(), self.adapted(driver).values()
        num_weights = sum(i * o for i, o in linears)
        num_lora = sum(rank * (i + o) for rank in ranks for i, o in adapted)
        rows_per_adapter = batch / max(1, len(ranks))
        heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        context = self.arguments.prompt_tokens + self.arguments.answer_tokens // 2
        num_cached = batch * context * 2 * heads * head_dim * config.num_hidden_layers
        weights = num_weights * bytes_of_weight(self.arguments.quantization, size)
        return StepWork(
            num_bytes=round(weights) + size * (num_lora + num_cached),
            num_operations=round(2 * (num_weights * batch + num_lora * rows_per_adapter)),
        )


def bytes_of_weight(quantization: str, size: int) -> float:
    """Of one number of the base model, with its share of a scale; `size` where it is kept whole."""
    for form in (BF16, INT8, INT4, INT8_DYNAMIC, FP8):
        if form.name == quantization:
            rows = torch.zeros(GROUP_SIZE, GROUP_SIZE)
            return sum(each.nbytes for each in form.encode(rows)) / rows.numel()
    return size


@dataclass(frozen=True, slots=True)
class _Later:
    """The bench's adapters, which are known once a model has been loaded."""

    bench: Bench

    @property
    def size_bytes(self) -> int:
        return 0

    @contextmanager
    def fetch(self, weights_digest: str) -> Iterator[Path]:
        assert self.bench.source is not None
        with self.bench.source.fetch(weights_digest) as folder:
            yield folder

    def forget(self, weights_digest: str) -> int:
        return 0


def save_shape(name: str, folder: Path, *, device: torch.device) -> Path:
    """Random weights, drawn on the device: no time depends on them."""
    config = LlamaConfig(**SHAPES[name])
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


def names(rank: int, count: int, *, first: int = 0) -> list[str]:
    return [f"{rank}-{first + number}" for number in range(count)]


def decode_batches(bench: Bench) -> list[dict[str, Any]]:
    """N adapters ÷ base only, and mixed ranks ÷ uniform, at several batch sizes."""
    arguments = bench.arguments
    # One mix decodes, all others are held back with what they have.
    driver = bench.open(
        max_loras=arguments.most_adapters + max(arguments.batch) + 1,
        max_num_seqs=max(arguments.batch),
    )
    rows = []
    for batch in arguments.batch:
        mixes = [Mix("base only", [None] * batch)]
        for count in (1, 8, 32, 128):
            if count <= arguments.most_adapters:
                pool = names(arguments.rank, count)
                mixes.append(Mix(f"{count} adapters", [pool[i % count] for i in range(batch)]))
        uniform = Mix(f"{batch} x rank 8", [*names(8, batch)])
        mixed = Mix(f"{batch - 1} x rank 8, 1 x rank 64", [*names(8, batch - 1), "64-0"])
        rows += compare_mixes(bench, driver, batch, [*mixes, uniform, mixed])
    driver.core.close()
    return rows


def compare_mixes(
    bench: Bench, driver: Driver, batch: int, mixes: list[Mix]
) -> list[dict[str, Any]]:
    num_tokens = bench.arguments.answer_tokens
    for mix in mixes:
        bring(driver, bench, [a for a in mix.adapters if a is not None])
    for _ in range(bench.arguments.rounds):
        prompts = bench.prompts(batch)
        run_in_turns(driver, mixes, prompts, num_tokens=num_tokens)
    rows = []
    for mix in mixes:
        base = mixes[-2] if mix is mixes[-1] else mixes[0]
        steps, base_steps = mix.step_s, base.step_s
        ratios = [
            theirs / ours
            for own_round, base_round in zip(steps, base_steps, strict=True)
            # From where all decode; who was first done with a prompt ends that earlier.
            for ours, theirs in zip(own_round, base_round, strict=False)
        ]
        times = [step for each in steps for step in each]
        work, base_work = (
            bench.decode_work(driver, batch=batch, ranks=each.ranks) for each in (mix, base)
        )
        assert bench.machine is not None
        floor = floor_s(work, bench.machine)
        row = {
            "batch": batch,
            "mix": mix.name,
            "measured_against": base.name,
            # Each decode step beside the other mix's step that ran next to it
            "ratio": interval(ratios),
            "ratio_of_medians": statistics.median(t for each in base_steps for t in each)
            / statistics.median(times),
            # What the ratio would be if bytes alone took time
            "byte_bound": base_work.num_bytes / work.num_bytes,
            "tokens_per_s": batch / statistics.median(times),
            "inter_token_ms": {
                "p50": 1e3 * quantile(times, 0.5),
                "p99": 1e3 * quantile(times, 0.99),
            },
            "floor_ms": 1e3 * floor,
            "share_of_floor": floor / statistics.median(times),
            "first_token_ms": {
                "p50": 1e3 * quantile(mix.first_token_s, 0.5),
                "p99": 1e3 * quantile(mix.first_token_s, 0.99),
            },
            "answers_that_differ_from_lone_ones": count_differences(bench, driver, mix, prompts),
            "answers_compared": len(compared(bench, batch)),
        }
        rows.append(row)
        print(
            f"batch {batch:>3}  {mix.name:<28} {row['tokens_per_s']:8.1f} tok/s  "
            f"step {row['inter_token_ms']['p50']:7.1f} ms (floor {row['floor_ms']:6.1f})  "
            f"÷ {base.name}: {row['ratio']['median']:.3f} (bytes: {row['byte_bound']:.3f})  "
            f"differing answers {row['answers_that_differ_from_lone_ones']}",
            flush=True,
        )
    return rows


def compared(bench: Bench, batch: int) -> range:
    return range(0, batch, max(1, batch // bench.arguments.checks))


def count_differences(bench: Bench, driver: Driver, mix: Mix, prompts: list[list[int]]) -> int:
    """How many of a few answers of the last round are not those that the adapter gives alone."""
    num_tokens = bench.arguments.answer_tokens
    return sum(
        answer(driver, prompts[i], mix.adapters[i], num_tokens=num_tokens).token_ids
        != mix.token_ids[i]
        for i in compared(bench, len(prompts))
    )


def recorded_steps(bench: Bench) -> list[dict[str, Any]]:
    """Decode steps that are replayed ÷ the same steps launched piece by piece, step by step.

    Two engines of one model share the device; where its kernels have nothing to record (on a CPU)
    they do the same.
    """
    arguments, rows = bench.arguments, []
    adapters = names(arguments.rank, min(8, arguments.most_adapters))
    drivers = [
        bench.open(
            cuda_graphs=is_recorded,
            gpu_memory_utilization=share,
            max_loras=len(adapters),
            max_num_seqs=max(arguments.batch),
        )
        for is_recorded, share in ((True, 0.45), (False, 0.9))
    ]
    for driver in drivers:
        bring(driver, bench, adapters)
    for batch in arguments.batch:
        mixes = {"base only": [None], f"{len(adapters)} adapters": adapters}
        for name, mix in mixes.items():
            times, answers = _step_in_turns(
                bench, drivers, [mix[i % len(mix)] for i in range(batch)]
            )
            replayed, launched = (statistics.median(each) for each in times)
            ratios = [ours / theirs for ours, theirs in zip(*times, strict=True)]
            row = {
                "batch": batch,
                "mix": name,
                "ratio": interval(ratios),
                "replayed_ms": 1e3 * replayed,
                "launched_ms": 1e3 * launched,
                "answers_that_differ": sum(a != b for a, b in zip(*answers, strict=True)),
            }
            rows.append(row)
            print(
                f"batch {batch:>3}  {name:<28} step replayed {1e3 * replayed:7.2f} ms, launched "
                f"{1e3 * launched:7.2f} ms  differing answers {row['answers_that_differ']}",
                flush=True,
            )
    for driver in drivers:
        driver.core.close()
    return rows


def _step_in_turns(
    bench: Bench, drivers: list[Driver], adapters: Sequence[str | None]
) -> tuple[list[list[float]], list[list[list[int]]]]:
    """Of each driver: the times of steps in which all decode, and the answers."""
    times: list[list[float]] = [[] for _ in drivers]
    for _ in range(bench.arguments.rounds):
        prompts, num_tokens = bench.prompts(len(adapters)), bench.arguments.answer_tokens
        jobs = list(zip(prompts, adapters, strict=True))
        told = [[d.submit(*job, num_tokens=num_tokens) for job in jobs] for d in drivers]
        for driver, timelines in zip(drivers, told, strict=True):
            while not all(timeline.token_ids for timeline in timelines):
                driver.step()
        # The first to answer ended a little earlier; while all decode, steps are alike.
        num_steps = num_tokens - max(len(t.token_ids) for each in told for t in each)
        for _ in range(num_steps):
            for own_times, driver in zip(times, drivers, strict=True):
                started_s = time.perf_counter()
                driver.step()
                own_times.append(time.perf_counter() - started_s)
        for driver in drivers:
            driver.finish()
    return times, [[timeline.token_ids for timeline in each] for each in told]


def decode_profile(bench: Bench) -> list[dict[str, Any]]:
    """What Python does in a decode step with eight adapters: calls and own time, by function.

    The profiler itself makes every call of Python dearer.
    """
    rows = []
    driver = bench.open(max_loras=8, max_num_seqs=max(bench.arguments.batch))
    pool = names(bench.arguments.rank, 8)
    bring(driver, bench, pool)
    for batch in bench.arguments.batch:
        timelines = [
            driver.submit(prompt, pool[i % 8], num_tokens=PROFILED_STEPS + 8)
            for i, prompt in enumerate(bench.prompts(batch))
        ]
        while not all(timeline.token_ids for timeline in timelines):
            driver.step()
        profile = cProfile.Profile()
        with profile:
            for _ in range(PROFILED_STEPS):
                driver.step()
        driver.finish()
        rows.append({"batch": batch, "functions": _costliest(profile)})
        print(f"batch {batch}: calls and own milliseconds of a decode step")
        for row in rows[-1]["functions"]:
            print(f"  {row['calls']:8.1f} {row['own_ms']:8.2f}  {row['function']}")
    driver.core.close()
    return rows


def _costliest(profile: cProfile.Profile) -> list[dict[str, Any]]:
    entries: list[Any] = profile.getstats()  # type: ignore[attr-defined]  # not in typeshed
    entries.sort(key=lambda entry: entry.inlinetime, reverse=True)
    return [
        {
            "function": _name(entry.code),
            "calls": entry.callcount / PROFILED_STEPS,
            "own_ms": 1e3 * entry.inlinetime / PROFILED_STEPS,
        }
        for entry in entries[:NUM_PROFILED_FUNCTIONS]
    ]


def _name(code: Any) -> str:
    if isinstance(code, str):
        return code
    return f"{Path(code.co_filename).name}:{code.co_qualname}"


# Working sets that are larger than the slots


def closed_loop(
    driver: Driver, jobs: list[tuple[list[int], str]], *, concurrency: int, num_tokens: int
) -> float:
    """Tokens per second with so many requests open at any time."""
    started_s = time.perf_counter()
    timelines = []
    waiting = iter(jobs)
    is_over = False
    while not is_over or driver.num_open:
        while not is_over and driver.num_open < concurrency:
            job = next(waiting, None)
            is_over = job is None
            if job is not None:
                timelines.append(driver.submit(*job, num_tokens=num_tokens))
        if driver.num_open:
            driver.step()
    faults = {t.fault for t in timelines} - {None}
    assert not faults, faults
    return len(jobs) * num_tokens / (time.perf_counter() - started_s)


def bring(driver: Driver, bench: Bench, adapters: list[str]) -> None:
    for adapter in sorted(set(adapters) - set(driver.core.status().resident_adapters)):
        answer(driver, bench.prompts(1)[0], adapter, num_tokens=1)


def working_sets(bench: Bench) -> list[dict[str, Any]]:
    """Slots for a part of the adapters in use ÷ slots for all of them."""
    arguments = bench.arguments
    num_slots = arguments.slots
    few = bench.open(max_loras=num_slots, max_num_seqs=arguments.concurrency)
    many = bench.open(max_loras=arguments.zipf_adapters, max_num_seqs=arguments.concurrency)
    weights = [1 / (place + 1) for place in range(arguments.zipf_adapters)]
    pool = names(arguments.rank, arguments.zipf_adapters)
    draws = {
        f"{4 * num_slots} adapters in turn": lambda n: [
            pool[i % (4 * num_slots)] for i in range(n)
        ],
        f"{arguments.zipf_adapters} adapters by Zipf 1.0": lambda n: bench.dice.choices(
            pool, weights, k=n
        ),
    }
    rows = []
    for name, draw in draws.items():
        ratios, rates = [], []
        for number in range(arguments.rounds + 1):
            adapters = draw(arguments.jobs)
            jobs = list(zip(bench.prompts(arguments.jobs), adapters, strict=True))
            bring(many, bench, adapters)
            both = []
            # The other one begins with what the round before has left there.
            for driver in (many, few):
                both.append(
                    closed_loop(
                        driver,
                        jobs,
                        concurrency=arguments.concurrency,
                        num_tokens=arguments.answer_tokens,
                    )
                )
            if number == 0:
                continue
            ratios.append(both[1] / both[0])
            rates.append(both)
        tiers = few.core.status().tiers
        rows.append(
            {
                "working_set": name,
                "slots": num_slots,
                "concurrency": arguments.concurrency,
                "all_resident_tokens_per_s": statistics.median(r[0] for r in rates),
                "tokens_per_s": statistics.median(r[1] for r in rates),
                "ratio": interval(ratios),
                "copies_to_the_device_so_far": tiers.num_copies,
                "reads_from_disk_so_far": tiers.num_reads,
            }
        )
        print(
            f"{num_slots} slots, {name}: {rows[-1]['tokens_per_s']:.1f} tok/s, all resident "
            f"{rows[-1]['all_resident_tokens_per_s']:.1f}, ratio {rows[-1]['ratio']['median']:.3f}",
            flush=True,
        )
    few.core.close()
    many.core.close()
    return rows


def cold_starts(bench: Bench) -> list[dict[str, Any]]:
    """The first token of an adapter that is on the host or on disk ÷ on the device."""
    arguments = bench.arguments
    driver = bench.open(max_loras=4, max_num_seqs=8)
    hosted = names(arguments.rank, 12)
    for adapter in hosted:
        answer(driver, bench.prompts(1)[0], adapter, num_tokens=2)
    times: dict[str, list[float]] = {"device": [], "host": [], "disk": []}
    for number in range(arguments.starts):
        # Asked for longest ago: in the host tier alone. Asked for just now: on the device.
        adapter = hosted[number % len(hosted)]
        fresh = f"{arguments.rank}-{1000 + number}"
        for place, name in (("host", adapter), ("device", adapter), ("disk", fresh)):
            is_resident = name in driver.core.status().resident_adapters
            assert is_resident == (place == "device"), f"{name} is not where it should be"
            timeline = answer(driver, bench.prompts(1)[0], name, num_tokens=2)
            times[place].append(timeline.first_token_s)
    driver.core.close()
    rows = []
    for place, values in times.items():
        ratios = [value / warm for value, warm in zip(values, times["device"], strict=True)]
        rows.append(
            {
                "adapter_is_on": place,
                "prompt_tokens": arguments.prompt_tokens,
                "first_token_ms": {
                    "p50": 1e3 * quantile(values, 0.5),
                    "p99": 1e3 * quantile(values, 0.99),
                },
                "ratio_to_device": interval(ratios),
            }
        )
        print(
            f"first token, adapter on {place}: p50 {rows[-1]['first_token_ms']['p50']:.1f} ms, "
            f"÷ device {rows[-1]['ratio_to_device']['median']:.3f}",
            flush=True,
        )
    return rows


def loads_beside_streams(bench: Bench) -> dict[str, Any]:
    """Gaps between the tokens of running streams, while cold or warm adapters are asked for."""
    arguments = bench.arguments
    driver = bench.open(max_loras=4, max_num_seqs=16)
    warm = names(arguments.rank, 1)[0]
    hosted = names(arguments.rank, 12, first=1)
    for adapter in (warm, *hosted):
        answer(driver, bench.prompts(1)[0], adapter, num_tokens=2)
    gaps: dict[str, list[float]] = {"warm": [], "cold": []}
    ratios = []
    for _ in range(arguments.rounds):
        p99 = {}
        for kind in ("warm", "cold"):
            answer(driver, bench.prompts(1)[0], warm, num_tokens=1)
            before = driver.core.status().tiers.num_copies
            own = stream_gaps(bench, driver, [warm] if kind == "warm" else hosted)
            loads = driver.core.status().tiers.num_copies - before
            assert (loads > 0) == (kind == "cold"), "not what was to be measured"
            gaps[kind] += own
            p99[kind] = quantile(own, 0.99)
        ratios.append(p99["cold"] / p99["warm"])
    driver.core.close()
    row = {
        "streams": 8,
        "inter_token_ms": {
            kind: {"p50": 1e3 * quantile(v, 0.5), "p99": 1e3 * quantile(v, 0.99)}
            for kind, v in gaps.items()
        },
        "p99_ratio_of_rounds": interval(ratios),
        "p99_ratio_of_all": quantile(gaps["cold"], 0.99) / quantile(gaps["warm"], 0.99),
    }
    print(f"others' inter-token p99 while adapters load ÷ not: {row['p99_ratio_of_all']:.3f}")
    return row


def stream_gaps(bench: Bench, driver: Driver, adapters: list[str]) -> list[float]:
    """Eight streams of the base model, and every few steps a short request for an adapter."""
    streams = [driver.submit(p, None, num_tokens=64) for p in bench.prompts(8)]
    turn = 0
    while any(len(s.token_ids) < 64 for s in streams):
        if turn % 6 == 0:
            prompt = bench.prompts(1)[0][:8]
            driver.submit(prompt, adapters[turn // 6 % len(adapters)], num_tokens=1)
        driver.step()
        turn += 1
    driver.finish()
    return [gap for s in streams for gap in s.gaps_s[8:]]


# The command


PARTS = {
    "decode": decode_batches,
    "recorded": recorded_steps,
    "profile": decode_profile,
    "working_sets": working_sets,
    "cold_starts": cold_starts,
    "loads_beside_streams": loads_beside_streams,
}


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments, Path(scratch))
        results = {name: part(bench) for name, part in PARTS.items() if name in arguments.parts}
        assert bench.machine is not None
        report = {
            "command": " ".join(["python -m benchmarks.engine", *portable(sys.argv[1:])]),
            "commit": commit(),
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "gpu": torch.cuda.get_device_name() if bench.device.type == "cuda" else None,
                **asdict(bench.machine),
            },
            "torch": torch.__version__,
            "model": Path(bench.model).name if arguments.model else arguments.shape,
            "rank": arguments.rank,
            "prompt_tokens": arguments.prompt_tokens,
            "answer_tokens": arguments.answer_tokens,
            "rounds": arguments.rounds,
            **results,
        }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text + "\n")


def portable(arguments: list[str]) -> list[str]:
    """As they would be written on any machine."""
    return [argument.replace(str(Path.home()), "~") for argument in arguments]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the engine alone.")
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="folder of a checkpoint")
    which.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto")
    add("--quantization", choices=get_args(QuantizationName), default="none")
    add("--memory-mib", type=int, default=0, help="for KV cache and adapters; 0: what fits")
    add("--max-model-len", type=int, default=1024)
    add("--batch", type=int, nargs="+", default=[8, 32])
    add("--rank", type=int, default=16)
    add("--most-adapters", type=int, default=128)
    add(
        "--modules", nargs="+", help="that adapters change, such as q_proj; all linears unless told"
    )
    add("--prompt-tokens", type=int, default=64)
    add("--answer-tokens", type=int, default=32)
    add("--rounds", type=int, default=7)
    add("--checks", type=int, default=4, help="answers per mix that are compared with lone ones")
    add("--slots", type=int, default=8)
    add("--concurrency", type=int, default=8)
    add("--zipf-adapters", type=int, default=500)
    add("--jobs", type=int, default=48, help="requests of one round of a working set")
    add("--starts", type=int, default=36)
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--seed", type=int, default=0)
    add("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
