"""What an engine did, written down by the engine itself before it tells anybody.

One line for each sequence that it was given and one for each step, each in a single write to a file
that is only ever appended to: what was written survives `kill -9` of the writer. Knows nothing of
frames, journals or bills.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.sequence import Sequence, SequenceKey, StepEvent


def traced(core: Any, path: Path) -> Any:
    """The core, which from now on writes down what it does."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(line: Any) -> None:
        # The first newline parts it from what a killed writer may have left unfinished.
        os.write(file, f"\n{json.dumps(line)}\n".encode())

    submit, step = core.submit, core.step

    def traced_submit(sequence: Sequence) -> None:
        write({"given": sequence.key, "prompt": sequence.token_ids})
        submit(sequence)

    def traced_step() -> list[StepEvent]:
        events: list[StepEvent] = step()
        if events:
            write({"step": [[e.key, e.token_ids, e.generated_tokens, e.state] for e in events]})
        return events

    core.submit, core.step = traced_submit, traced_step
    return core


@dataclass
class Traced:
    """One sequence as the engine knew it."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    # How many tokens there were after each step that made some.
    marks: list[int] = field(default_factory=list)
    is_finished: bool = False


def read_trace(path: Path) -> tuple[dict[SequenceKey, Traced], int]:
    """All sequences by their keys, and how many lines were cut short by a kill."""
    found: dict[SequenceKey, Traced] = {}
    num_torn = 0
    for line in path.read_bytes().splitlines():
        if not line:
            continue
        try:
            said = json.loads(line)
        except ValueError:
            num_torn += 1
            continue
        if "given" in said:
            key = tuple(said["given"])
            assert key not in found, "an engine takes each sequence once"
            found[key] = Traced(said["prompt"])
        for key, token_ids, generated, state in said.get("step", ()):
            _follow(found[tuple(key)], token_ids, generated, state)
    return found, num_torn


def _follow(sequence: Traced, token_ids: list[int], generated: int, state: str) -> None:
    assert not sequence.is_finished, "nothing comes after the end"
    sequence.tokens += token_ids
    assert generated == len(sequence.tokens), "the engine's counters are its tokens"
    if token_ids:
        sequence.marks.append(generated)
    sequence.is_finished = state in ("stopped", "length")
