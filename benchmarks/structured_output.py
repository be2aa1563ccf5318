"""What it costs to hold answers to a form: to compile a grammar, and to mask a step.

    python -m benchmarks.structured_output [--output benchmarks/results/structured-output.json]

Each schema is compiled as the engine compiles it, with the real small model's tokenizer, and as the
gateway tries it, over bytes. Then answers are drawn from what the masks leave, each allowed token
as likely as any other, which leads into more corners of a grammar than a model would. Timed are the
processor's, not the wall's, nanoseconds of each mask; a mask is computed once for each token.

`apply` is what the sampler adds to a step for a batch of rows with grammars: masks, their way to
the device and into the logits, without the model.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters.demo.base_model import default_folder
from adapters.text_bundle import TextBundle
from benchmarks.provenance import commit
from engine import grammar
from engine.grammar import GrammarWalk
from engine.model import text_bundle
from engine.protocol import SamplingParams
from engine.sampling.masks import Masks
from engine.sequence import Sequence

NUM_ANSWERS = 20
MAX_TOKENS = 200
BATCHES = (1, 8, 32, 64)
NUM_STEPS = 50

_WORD = {"type": "string", "pattern": "^[a-z]{1,8}$"}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    required = list(properties)
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


_LINE = _object({"sku": _WORD, "quantity": {"type": "integer", "minimum": 1, "maximum": 99}})
SCHEMAS: dict[str, dict[str, Any]] = {
    "any object": {"type": "object"},
    "person": _object({"name": {"type": "string"}, "age": {"type": "integer"}}),
    "order": _object({"id": _WORD, "lines": {"type": "array", "items": _LINE, "maxItems": 20}}),
    "free text of 2,000 characters": {"type": "string", "maxLength": 2000},
    "date and time": {"type": "string", "format": "date-time"},
    "100 properties": _object({f"property_{n}": {"type": "number"} for n in range(100)}),
    "union of 20 objects": {
        "anyOf": [_object({"kind": {"const": f"k{n}"}, f"f{n}": _WORD}) for n in range(20)]
    },
    "enum of 5,000 words": {"enum": [f"value {n * 7919 % 100_003}" for n in range(5000)]},
    "tree": {
        "$defs": {
            "node": _object(
                {"value": _WORD, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}}
            )
        },
        "$ref": "#/$defs/node",
    },
}


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one schema."""

    schema: str
    size_bytes: int
    compile_ms: float
    trial_ms: float
    num_masks: int
    mask_p50_us: float
    mask_p99_us: float
    mask_max_us: float


class Bench:
    def __init__(self, bundle: TextBundle) -> None:
        from llguidance import LLTokenizer

        started_ns = time.perf_counter_ns()
        self.tokenizer = grammar.tokenizer_of(
            bundle.tokenizer_json,
            vocab_size=bundle.vocab_size,
            eos_token_ids=list(bundle.eos_token_ids),
        )
        self.tokenizer_ms = (time.perf_counter_ns() - started_ns) / 1e6
        self.bytes = LLTokenizer("byte")
        self.vocab_size = bundle.vocab_size
        self.eos_token_ids = bundle.eos_token_ids

    def walk(self, text: str) -> GrammarWalk:
        start = grammar.compiled("json_schema", text, self.tokenizer)
        return GrammarWalk(start, vocab_size=self.vocab_size)

    def measure(self, name: str, schema: dict[str, Any]) -> Cost:
        text = json.dumps(schema)
        compile_ms = _cpu_ms(lambda: grammar.compiled("json_schema", text, self.tokenizer))
        trial_ms = _cpu_ms(lambda: grammar.fault_of("json_schema", text, self.bytes))
        masks_ns = [ns for seed in range(NUM_ANSWERS) for ns in self._answer(text, seed)]
        masks_us = sorted(ns / 1000 for ns in masks_ns)
        return Cost(
            schema=name,
            size_bytes=len(text),
            compile_ms=round(compile_ms, 2),
            trial_ms=round(trial_ms, 2),
            num_masks=len(masks_us),
            mask_p50_us=round(statistics.median(masks_us), 1),
            mask_p99_us=round(masks_us[int(0.99 * len(masks_us))], 1),
            mask_max_us=round(masks_us[-1], 1),
        )

    def _answer(self, text: str, seed: int) -> list[int]:
        """CPU nanoseconds of each mask of an answer, which is drawn from what they leave."""
        rng, walk, token_ids = random.Random(seed), self.walk(text), list[int]()
        mask, taken_ns = np.zeros(walk.num_mask_bytes, dtype=np.uint8), []
        while len(token_ids) < MAX_TOKENS:
            walk.catch_up(token_ids, first=0)
            started_ns = time.thread_time_ns()
            walk.write_mask(mask.ctypes.data)
            taken_ns.append(time.thread_time_ns() - started_ns)
            token_id = int(rng.choice(np.flatnonzero(np.unpackbits(mask, bitorder="little"))))
            if token_id in self.eos_token_ids:
                break
            token_ids.append(token_id)
        return taken_ns

    def apply_ms(self, num_rows: int) -> float:
        """Wall time that a step of so many rows with grammars takes longer."""
        text = json.dumps(SCHEMAS["order"])
        sequences = [_sequence(self.walk(text)) for _ in range(num_rows)]
        logits = torch.zeros((num_rows, self.vocab_size))
        masks = Masks.of(sequences, vocab_size=self.vocab_size, device=logits.device)
        assert masks is not None
        places = torch.arange(num_rows)
        times_ms = []
        for _ in range(NUM_STEPS):
            started_ns = time.perf_counter_ns()
            faults = masks.fill()
            masks.apply_(logits, places)
            times_ms.append((time.perf_counter_ns() - started_ns) / 1e6)
            assert not faults
        return round(statistics.median(times_ms), 3)


def _sequence(walk: GrammarWalk) -> Sequence:
    sequence = Sequence.unowned([0], block_table=[])
    sequence.walk, sequence.sampling = walk, SamplingParams(max_tokens=1)
    return sequence


def _cpu_ms(work: Callable[[], object]) -> float:
    times_ns = []
    for _ in range(5):
        started_ns = time.process_time_ns()
        work()
        times_ns.append(time.process_time_ns() - started_ns)
    return statistics.median(times_ns) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    output: Path | None = parser.parse_args().output
    from llguidance import get_version

    bench = Bench(text_bundle.export(str(default_folder())))
    costs = [bench.measure(name, schema) for name, schema in SCHEMAS.items()]
    print(f"{'schema':32}{'compile':>10}{'trial':>10}{'mask p50':>11}{'p99':>10}{'max':>10}")
    for cost in costs:
        print(
            f"{cost.schema:32}{cost.compile_ms:7.2f} ms{cost.trial_ms:7.2f} ms"
            f"{cost.mask_p50_us:8.1f} us{cost.mask_p99_us:7.1f} us{cost.mask_max_us:7.1f} us"
        )
    steps = {str(num_rows): bench.apply_ms(num_rows) for num_rows in BATCHES}
    print("a step takes longer by", *(f"{ms} ms for {rows} rows" for rows, ms in steps.items()))
    results = {
        "machine": platform.machine(),
        "num_threads": torch.get_num_threads(),
        "model": default_folder().name,
        "library": get_version(),
        "commit": commit(),
        "tokenizer_ms": round(bench.tokenizer_ms, 1),
        "schemas": [asdict(cost) for cost in costs],
        "step_ms_by_rows": steps,
    }
    if output is not None:
        output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
