"""Counters of an engine process, and their text for a Prometheus scrape.

Counts what passes by on the event loop; knows no tenant and no adapter by name.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from engine.protocol import EngineStatus, SequenceState, TierReport
from engine.sequence import StepEvent


@dataclass(slots=True)
class Metrics:
    """Mutable: grows for the life of the process."""

    # Steps that had something to tell.
    steps: int = 0
    generated_tokens: int = 0
    finished: Counter[SequenceState] = field(default_factory=Counter)
    # Of the sequences that have ended, together.
    adapter_wait_ns: int = 0
    frames: int = 0
    sessions_given_up: int = 0

    def count_step(self, events: Sequence[StepEvent]) -> None:
        self.steps += 1
        for event in events:
            self.generated_tokens += len(event.token_ids)
            if event.state.is_final:
                self.finished[event.state] += 1
                self.adapter_wait_ns += event.adapter_wait_ns


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
        *_metric("adapter_blocks", "gauge", status.num_adapter_blocks),
        *_metric("resident_adapters", "gauge", len(status.resident_adapters)),
        *_metric("hosted_adapters", "gauge", len(status.hosted_adapters)),
        *_metric("pinned_adapters", "gauge", len(status.pinned_adapters)),
        *_metric("quarantined_adapters", "gauge", len(status.quarantined_adapters)),
        *_metric("adapter_wait_seconds_total", "counter", metrics.adapter_wait_ns / 1e9),
        *_tiers(status.tiers),
        *_labelled(
            "finished_sequences_total",
            "counter",
            {f'state="{s}"': metrics.finished[s] for s in SequenceState if s.is_final},
        ),
    ]
    return "\n".join(lines) + "\n"


def _tiers(tiers: TierReport) -> Iterator[str]:
    yield from _metric("adapter_reads_total", "counter", tiers.num_reads)
    yield from _metric("adapter_read_bytes_total", "counter", tiers.num_read_bytes)
    yield from _metric("adapter_copies_total", "counter", tiers.num_copies)
    yield from _metric("adapter_copied_bytes_total", "counter", tiers.num_copied_bytes)
    yield from _metric("adapter_load_failures_total", "counter", tiers.num_load_failures)
    mismatches = tiers.num_fingerprint_mismatches
    yield from _metric("adapter_fingerprint_mismatches_total", "counter", mismatches)
    evictions = {'tier="slot"': tiers.num_slot_evictions, 'tier="host"': tiers.num_host_evictions}
    yield from _labelled("adapter_evictions_total", "counter", evictions)
    sizes = {
        'tier="disk"': tiers.disk_bytes,
        'tier="host"': tiers.host_bytes,
        'tier="device"': tiers.device_bytes,
    }
    yield from _labelled("adapter_tier_bytes", "gauge", sizes)


def _metric(name: str, kind: str, value: float) -> tuple[str, str]:
    return f"# TYPE manylora_engine_{name} {kind}", f"manylora_engine_{name} {value}"


def _labelled(name: str, kind: str, values: Mapping[str, int]) -> Iterator[str]:
    yield f"# TYPE manylora_engine_{name} {kind}"
    for label, value in values.items():
        yield f"manylora_engine_{name}{{{label}}} {value}"
