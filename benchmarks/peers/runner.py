"""Start peers, let PEFT judge them, and measure in turns those that answer rightly.

Knows nothing of any one peer, of tables or of plots.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.load import expect_lengths
from benchmarks.peers.peer import Peer, PeerFailed, Running
from benchmarks.peers.quiet import Quiet
from benchmarks.peers.results import Results
from benchmarks.peers.scene import (
    PROMPT_TOKENS,
    Ask,
    Prompts,
    Scene,
    make_adapters,
    mixed,
)
from benchmarks.peers.truth import NUM_TOKENS, Truth, ask_peft
from benchmarks.peers.watch import Use, between, memory_bytes, read_clock
from benchmarks.serve import summarise

NUM_TRUTH_PROMPTS = 2
IDLE_LOOK_S = 2.0
# Share of all cores that others may use beside a run that counts.
MAX_FOREIGN = 0.06
NUM_TRIES = 3
WARM_UP_PROMPTS, WARM_UP_TOKENS = 8, 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured."""

    model: Path
    peers: Sequence[Peer]
    # Each a scene of its own, for which all peers are started anew; 0 is the base model alone.
    numbers_of_adapters: Sequence[int]
    # "even", "zipf": how requests choose among adapters.
    mixes: Sequence[str]
    concurrencies: Sequence[int]
    requests_per_client: int
    new_tokens: int
    num_pairs: int


@dataclass(frozen=True, slots=True)
class Place:
    """Which measurement: all but the peer."""

    mix: str
    concurrency: int
    pair: int


class Runner:
    def __init__(self, plan: Plan, results: Results, *, quiet: Quiet) -> None:
        self._plan = plan
        self._results = results
        self._quiet = quiet

    def run(self) -> None:
        for peer in self._plan.peers:
            say(f"{peer.name}: installing what is missing")
            peer.install()
            facts = {"title": peer.title, "precision": peer.precision, "versions": peer.versions()}
            self._results.know(peer.name, facts)
        for number in self._plan.numbers_of_adapters:
            self._run_scene(Scene(self._plan.model, make_adapters(self._plan.model, number)))

    def _run_scene(self, scene: Scene) -> None:
        truth = ask_peft(scene, Prompts(scene.model, seed="truth").draw(NUM_TRUTH_PROMPTS))
        with contextlib.ExitStack() as stack:
            stack.callback(self._quiet.end)
            right: list[tuple[Peer, Running]] = []
            for peer in self._plan.peers:
                try:
                    if (running := self._admit(stack, peer, scene, truth)) is not None:
                        right.append((peer, running))
                except PeerFailed as failure:
                    self._add("checks", peer, scene, {"failed": str(failure)[-1000:]})
            for pair in range(self._plan.num_pairs):
                self._run_pair(right[:: -1 if pair % 2 else 1], scene, pair)

    # A peer that has to be started and judged

    def _admit(
        self, stack: contextlib.ExitStack, peer: Peer, scene: Scene, truth: Truth
    ) -> Running | None:
        """One that runs and answers rightly, or None."""
        if not peer.serves(scene):
            self._add("checks", peer, scene, {"cannot": True})
            return None
        self._quiet.begin()
        running = self._start(stack, peer, scene)
        return running if self._judge(peer, running, scene, truth) else None

    def _start(self, stack: contextlib.ExitStack, peer: Peer, scene: Scene) -> Running:
        """Note what the start took, up to a first token, and what it does when nobody asks."""
        running = stack.enter_context(peer.start(scene))
        (prompt,) = Prompts(scene.model, seed="start").draw(1)
        running.answer([Ask(prompt, None)], concurrency=1, new_tokens=1)
        start_s = running.child.age_s
        running.child.look()
        time.sleep(IDLE_LOOK_S)
        before = read_clock(running.child.pid)
        time.sleep(IDLE_LOOK_S)
        idle = between(before, read_clock(running.child.pid)).own
        row = {
            "start_s": round(start_s, 2),
            "idle_cores": round(idle * (os.cpu_count() or 1), 3),
            "peak_bytes": running.child.most_bytes,
        }
        self._add("starts", peer, scene, row)
        return running

    def _judge(self, peer: Peer, running: Running, scene: Scene, truth: Truth) -> bool:
        """All that PEFT was asked, in batches as large as they will be. It warms up as well."""
        answers = running.answer(
            truth.asks(), concurrency=max(self._plan.concurrencies), new_tokens=NUM_TOKENS
        )
        expect_lengths(answers, prompt_tokens=PROMPT_TOKENS, new_tokens=NUM_TOKENS)
        errors = sorted({answer.error for answer in answers if answer.error is not None})
        texts = [answer.text for answer in answers]
        verdict = truth.judge(texts, precision=peer.precision)
        self._add("checks", peer, scene, {**asdict(verdict), "errors": errors[:3]})
        self._warm_up(running, scene)
        return verdict.is_right and not errors

    def _warm_up(self, running: Running, scene: Scene) -> None:
        prompts = Prompts(scene.model, seed="warm").draw(WARM_UP_PROMPTS)
        asks = mixed(prompts, num_adapters=len(scene.adapters), mix="even", seed="warm")
        running.answer(asks, concurrency=WARM_UP_PROMPTS, new_tokens=WARM_UP_TOKENS)

    # Measuring

    def _run_pair(self, order: Sequence[tuple[Peer, Running]], scene: Scene, pair: int) -> None:
        for mix in self._plan.mixes if scene.adapters else ["base"]:
            for concurrency in self._plan.concurrencies:
                for peer, running in order:
                    self._measure(peer, running, scene, Place(mix, concurrency, pair))

    def _measure(self, peer: Peer, running: Running, scene: Scene, place: Place) -> None:
        """Until a run had the machine to itself, or often enough; every try is kept."""
        for attempt in range(NUM_TRIES):
            asks = self._asks(scene, place, attempt)
            self._quiet.begin()
            row, use = self._measure_once(running, asks, place.concurrency)
            is_dropped = use.foreign > MAX_FOREIGN
            self._add(
                "runs", peer, scene, {**asdict(place), **row, **asdict(use), "dropped": is_dropped}
            )
            if not is_dropped:
                return

    def _measure_once(
        self, running: Running, asks: Sequence[Ask], concurrency: int
    ) -> tuple[dict[str, Any], Use]:
        before = read_clock(running.child.pid)
        answers = running.answer(asks, concurrency=concurrency, new_tokens=self._plan.new_tokens)
        after = read_clock(running.child.pid)
        expect_lengths(answers, prompt_tokens=PROMPT_TOKENS, new_tokens=self._plan.new_tokens)
        wall_s = after.wall_s - before.wall_s
        row = {**asdict(summarise(answers, wall_s)), "bytes": memory_bytes(running.child.pid)}
        return row, between(before, after)

    def _asks(self, scene: Scene, place: Place, attempt: int) -> list[Ask]:
        """The same for all peers; never the same again, so that no cache has seen them."""
        seed = f"{len(scene.adapters)} {place} {attempt}"
        number = place.concurrency * self._plan.requests_per_client
        prompts = Prompts(scene.model, seed=seed).draw(number)
        return mixed(prompts, num_adapters=len(scene.adapters), mix=place.mix, seed=seed)

    def _add(self, kind: str, peer: Peer, scene: Scene, row: dict[str, Any]) -> None:
        known = {"peer": peer.name, "adapters": len(scene.adapters), **row}
        self._results.add(kind, known)
        say(" ".join(f"{name}={value}" for name, value in known.items() if value))


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)
