"""Counters of an engine process, and their text for a Prometheus scrape.

Counts what passes by on the event loop; knows no tenant and no adapter by name.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.protocol import EngineStatus, SequenceState
from engine.sequence import StepEvent


@dataclass(slots=True)
class Metrics:
    """Mutable: grows for the life of the process."""

    # Steps that had something to tell.
    steps: int = 0
    generated_tokens: int = 0
    finished: Counter[SequenceState] = field(default_factory=Counter)
    frames: int = 0
    sessions_given_up: int = 0

    def count_step(self, events: Sequence[StepEvent]) -> None:
        self.steps += 1
        self.generated_tokens += sum(len(event.token_ids) for event in events)
        self.finished.update(event.state for event in events if event.state.is_final)


def render(metrics: Metrics, status: EngineStatus) -> str:
    """Prometheus text format, version 0.0.4."""
    lines = [
        *_metric("steps_total", "counter", metrics.steps),
        *_metric("generated_tokens_total", "counter", metrics.generated_tokens),
        *_metric("frames_total", "counter", metrics.frames),
        *_metric("sessions_given_up_total", "counter", metrics.sessions_given_up),
        *_metric("running_sequences", "gauge", status.num_running),
        *_metric("waiting_sequences", "gauge", status.num_waiting),
        *_metric("kv_blocks", "gauge", status.num_blocks),
        *_metric("free_kv_blocks", "gauge", status.num_free_blocks),
        *_metric("resident_adapters", "gauge", len(status.resident_adapters)),
        "# TYPE manylora_engine_finished_sequences_total counter",
    ]
    for state in SequenceState:
        if state.is_final:
            labels = f'{{state="{state}"}}'
            count = metrics.finished[state]
            lines.append(f"manylora_engine_finished_sequences_total{labels} {count}")
    return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, value: int) -> tuple[str, str]:
    return f"# TYPE manylora_engine_{name} {kind}", f"manylora_engine_{name} {value}"
