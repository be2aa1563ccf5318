"""What a quantised base costs in quality, and what it saves in memory and time.

    python -m benchmarks.quantised --model ~/.cache/manylora/models/SmolLM2-135M-Instruct

Each quantisation reads `plain_english.txt` with the model that serves, in pieces of equal length.
Perplexity is taken over all tokens that follow another of their piece; agreement is the share of
these places where the likeliest next token is that of the model without quantisation. What memory a
model takes, and took at most while it was loaded, is measured in a process of its own, which counts
what the process had before as nobody's. For the speed all models are open at once in one process
and decode in turns, a round of one after a round of the other, so that a ratio is of neighbours.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from adapters.errors import ArtifactMissing
from benchmarks.engine import Driver, commit, interval, portable
from engine import batch as batches
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.model.loader import LoadedModel, load
from engine.model.memory import DeviceMemory
from engine.model.quantised import QuantisedLinear
from engine.runner import Runner
from engine.scheduler import ScheduledSequence
from engine.sequence import Sequence

TEXT = Path(__file__).with_name("plain_english.txt")
PIECE_TOKENS = 512
BLOCK_SIZE = 16
# What is compared with.
WHOLE = "none"
STATUS = Path("/proc/self/status")
MEBIBYTE = 1024**2


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model made of the text."""

    perplexity: float
    # The likeliest token at each place.
    likeliest: list[int]


class NoAdapters:
    """No adapter is asked for here."""

    size_bytes = 0

    @contextmanager
    def fetch(self, weights_digest: str) -> Iterator[Path]:
        raise ArtifactMissing(weights_digest)
        yield Path()

    def forget(self, weights_digest: str) -> int:
        return 0


def config_of(arguments: argparse.Namespace, quantization: Any) -> EngineConfig:
    return EngineConfig(
        model=str(arguments.model),
        served_name="base",
        device=arguments.device,
        dtype=arguments.dtype,
        quantization=quantization,
        max_model_len=1024,
        max_loras=0,
        num_threads=arguments.num_threads,
        memory_bytes=arguments.memory_mib * MEBIBYTE,
    )


# Quality


def read_text(loaded: LoadedModel, pieces: list[list[int]]) -> Reading:
    losses, likeliest = [], []
    for piece in pieces:
        logits = logits_of(loaded, piece)
        following = torch.tensor(piece[1:], device=logits.device)
        losses.append(torch.nn.functional.cross_entropy(logits, following, reduction="none"))
        likeliest += logits.argmax(dim=-1).tolist()
    return Reading(math.exp(float(torch.cat(losses).double().mean())), likeliest)


def logits_of(loaded: LoadedModel, piece: list[int]) -> torch.Tensor:
    """[tokens - 1, vocabulary]: of what follows each token but the last."""
    num_blocks = -(-len(piece) // BLOCK_SIZE)
    sequence = Sequence.unowned(piece, block_table=list(range(1, num_blocks + 1)))
    # Logits of all positions are wanted.
    sequence.prompt_logprobs = []
    memory = DeviceMemory(
        loaded.layers, num_blocks=num_blocks, block_size=BLOCK_SIZE, device=loaded.device
    )
    item = ScheduledSequence(sequence, len(piece), is_sampled=False)
    return Runner(loaded, memory).run(
        batches.build([item], block_size=BLOCK_SIZE, device=loaded.device)
    )


def pieces_of(model: Path) -> list[list[int]]:
    token_ids = AutoTokenizer.from_pretrained(model)(TEXT.read_text())["input_ids"]
    starts = range(0, len(token_ids) - 1, PIECE_TOKENS)
    return [token_ids[start : start + PIECE_TOKENS] for start in starts]


def quality(arguments: argparse.Namespace) -> dict[str, Any]:
    pieces = pieces_of(arguments.model)
    readings = {}
    for name in (WHOLE, *arguments.quantizations):
        torch.set_num_threads(arguments.num_threads or os.cpu_count() or 1)
        readings[name] = read_text(load(config_of(arguments, name)), pieces)
    whole = readings[WHOLE]
    found: dict[str, Any] = {"num_tokens": sum(map(len, pieces)), "piece_tokens": PIECE_TOKENS}
    for name, reading in readings.items():
        pairs = zip(reading.likeliest, whole.likeliest, strict=True)
        found[name] = {
            "perplexity": round(reading.perplexity, 4),
            "perplexity_ratio": round(reading.perplexity / whole.perplexity, 5),
            "top1_agreement": round(sum(a == b for a, b in pairs) / len(whole.likeliest), 5),
        }
    return found


# Memory


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: memory_of(arguments, name) for name in (WHOLE, *arguments.quantizations)}


def memory_of(arguments: argparse.Namespace, quantization: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.quantised", "--model", str(arguments.model)]
    command += ["--device", arguments.device, "--dtype", arguments.dtype]
    run = subprocess.run(
        [*command, "--load-only", quantization], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(run.stdout)
    return found


def load_only(arguments: argparse.Namespace) -> dict[str, float]:
    """Of a process that has loaded nothing yet: MiB of weights, and of the process beyond that."""
    before = _resident_mib()
    loaded = load(config_of(arguments, arguments.load_only))
    after = _resident_mib()
    quantised = [m for m in loaded.model.modules() if isinstance(m, QuantisedLinear)]
    codes = {p for m in quantised for p in (m.codes, m.scales)}
    weights = set(loaded.model.parameters())
    return {
        "weights_mib": _mib(weights),
        "of_these_quantised_mib": _mib(codes),
        "process_after_load_mib": round(after["VmRSS"] - before["VmRSS"], 1),
        "process_at_most_mib": round(after["VmHWM"] - before["VmRSS"], 1),
    }


def _mib(tensors: set[Any]) -> float:
    return round(sum(tensor.nbytes for tensor in tensors) / MEBIBYTE, 1)


def _resident_mib() -> dict[str, float]:
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return {name: int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")}


# Speed


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    names = (WHOLE, *arguments.quantizations)
    drivers = {
        name: Driver(EngineCore(config_of(arguments, name), adapter_source=NoAdapters()))
        for name in names
    }
    text = [token_id for piece in pieces_of(arguments.model) for token_id in piece]
    length, found = arguments.prompt_tokens, {}
    for batch in arguments.batch:
        prompts = [text[97 * i : 97 * i + length] for i in range(batch)]
        rates: dict[str, list[float]] = {name: [] for name in names}
        for round_number in range(arguments.rounds + 1):
            for name, driver in drivers.items():
                rate = decode_rate(driver, prompts, num_tokens=arguments.answer_tokens)
                # The first round warms up.
                if round_number:
                    rates[name].append(rate)
        found[str(batch)] = {
            name: {
                "tokens_per_s": interval(own),
                "over_none": interval([a / b for a, b in zip(own, rates[WHOLE], strict=True)]),
            }
            for name, own in rates.items()
        }
    for driver in drivers.values():
        driver.core.close()
    return found


def decode_rate(driver: Driver, prompts: list[list[int]], *, num_tokens: int) -> float:
    """Tokens a second of all together, once each has its first."""
    timelines = [driver.submit(prompt, None, num_tokens=num_tokens) for prompt in prompts]
    driver.finish()
    times_s = sorted({at for timeline in timelines for at in timeline.token_times_s})
    first_s = max(timeline.token_times_s[0] for timeline in timelines)
    steps = [(a, b) for a, b in pairwise(times_s) if a >= first_s]
    num_decoded = sum(at > first_s for each in timelines for at in each.token_times_s)
    return num_decoded / sum(b - a for a, b in steps)


PARTS = {"quality": quality, "memory": memory, "speed": speed}


def main() -> None:
    arguments = parse()
    if arguments.load_only is not None:
        print(json.dumps(load_only(arguments)))
        return
    report = {
        "command": " ".join(["python -m benchmarks.quantised", *portable(sys.argv[1:])]),
        "commit": commit(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
        "torch": torch.__version__,
        "model": arguments.model.name,
        **{name: part(arguments) for name, part in PARTS.items() if name in arguments.parts},
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare quantised bases with the whole one.")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a checkpoint")
    add("--quantizations", nargs="*", default=["bf16", "int8", "int4", "int8-dynamic"])
    add("--device", default="cpu")
    add("--dtype", default="auto")
    add("--num-threads", type=int)
    add("--memory-mib", type=int, default=256, help="of KV cache, for each model")
    add("--batch", type=int, nargs="+", default=[1, 8, 32])
    add("--prompt-tokens", type=int, default=64)
    add("--answer-tokens", type=int, default=32)
    add("--rounds", type=int, default=5)
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--load-only", help=argparse.SUPPRESS)
    add("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
