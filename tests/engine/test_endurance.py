"""Whatever comes, in whatever order: nothing leaks, nothing waits for ever, no token differs."""

import random
from typing import Any

import pytest

from engine.protocol import SequenceState
from engine.sequence import SequenceKey
from tests.engine.conftest import ADAPTERS
from tests.model_lab import FolderSource, Lab, open_lab

NUM_ACTIONS = 150
OWNERS = ("one", "two", "three")


def random_job(dice: random.Random) -> dict[str, Any]:
    return {
        "prompt": [dice.randrange(257) for _ in range(dice.choice((1, 4, 9, 30)))],
        "adapter": dice.choice((None, "broken", *ADAPTERS)),
        "max_tokens": dice.choice((1, 3, 15)),
        "temperature": dice.choice((0.0, 1.0)),
        "seed": dice.randrange(1000),
        "top_k": dice.choice((0, 5)),
    }


def act(lab: Lab, dice: random.Random, jobs: dict[SequenceKey, dict[str, Any]]) -> None:
    """One thing that workers do, then a step."""
    action = dice.choice(("submit", "submit", "abort", "hold", "release", "step", "step"))
    if action == "submit":
        job = random_job(dice)
        jobs[lab.submit(owner=dice.choice(OWNERS), **job)] = job
    elif action == "abort" and jobs:
        lab.core.abort(dice.choice(list(jobs)))
    elif action in ("hold", "release"):
        lab.core.hold_back(dice.choice(OWNERS), held=action == "hold")
    lab.step()


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_events_ends_well(model: str, adapters: FolderSource, seed: int) -> None:
    source = FolderSource(adapters.root, failures={"broken": OSError("connection reset")})
    dice = random.Random(seed)
    jobs: dict[SequenceKey, dict[str, Any]] = {}
    with open_lab(
        model,
        source,
        num_blocks=37,
        max_model_len=48,
        max_num_seqs=4,
        max_num_batched_tokens=10,
        max_loras=2,
    ) as lab:
        for _ in range(NUM_ACTIONS):
            act(lab, dice, jobs)
        for owner in OWNERS:
            lab.core.hold_back(owner, held=False)
        lab.run()
        lab.assert_nothing_is_left()
    with open_lab(model, source) as alone:
        for key, job in jobs.items():
            answer = lab.answers[key]
            if answer.state is SequenceState.LENGTH:
                assert answer.token_ids == alone.generate(**job)
            elif answer.state is SequenceState.ABORTED:
                assert len(answer.token_ids) == answer.last.generated_tokens
            else:
                assert job["adapter"] == "broken"
