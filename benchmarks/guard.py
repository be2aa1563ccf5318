"""Has a commit made the engine slower? Two commits in turns, in minutes.

    python -m benchmarks.guard --model ~/.cache/manylora/models/SmolLM2-135M-Instruct main HEAD

Each commit is checked out into a folder of its own and loads the model in a process of its own;
then the two decode in turns, a few steps each, the first one changing places, so that whatever
else the machine does meets both. A pair of neighbouring turns gives one ratio. Reports the median
ratio of step times, new ÷ old, with a 95 % interval from resampled pairs (Efron, "Bootstrap
Methods", 1979), and whether both answered with the same tokens. Exits with 1 where a whole interval
lies above 1 + tolerance: then it is slower, whatever the noise.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

# Of each: rows, and how many adapters of rank 16 they share.
MIXES = {"base only, 1 row": (1, 0), "base only, 8 rows": (8, 0), "8 adapters, 8 rows": (8, 8)}
PROMPT_TOKENS, STEPS_PER_TURN = 48, 8
NUM_RESAMPLINGS = 2000


# In a process of one of the commits: only what both have


def decode_on_command(model: str) -> None:
    """Reads the name of a mix from stdin, and writes its step times and tokens to stdout."""
    from benchmarks.engine import Driver, MadeUpAdapters, Mix, names, run_in_turns
    from engine.config import EngineConfig
    from engine.core import EngineCore

    with tempfile.TemporaryDirectory() as scratch:
        settings = {"device": "cpu", "max_model_len": 512, "max_loras": 9, "max_num_seqs": 8}
        config = EngineConfig(model=model, served_name="base", **settings)
        adapters = MadeUpAdapters(Path(scratch), {}, "base")
        core = EngineCore(config, adapter_source=adapters)
        linears = {k: v for k, v in core.base_shape.modules.items() if "lm_head" not in k}
        adapters.modules.update(linears)
        driver, dice = Driver(core), random.Random(0)
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            rows, num_adapters = MIXES[json.loads(line)]
            pool = names(16, num_adapters) or [None]
            mix = Mix("guard", [pool[row % len(pool)] for row in range(rows)])
            prompts = [
                [dice.randrange(100, 40_000) for _ in range(PROMPT_TOKENS)] for _ in range(rows)
            ]
            run_in_turns(driver, [mix], prompts, num_tokens=STEPS_PER_TURN + 1)
            print(json.dumps([mix.step_s[-1], mix.token_ids]), flush=True)
        core.close()


# Comparing


@dataclass(slots=True)
class Side:
    """One commit's process."""

    process: "subprocess.Popen[str]"

    def read(self) -> list[object]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("One of the engines has ended: see its error above.")
        found: list[object] = json.loads(line)
        return found

    def turn(self, mix: str) -> tuple[float, object]:
        """The median step's seconds, and the tokens."""
        assert self.process.stdin is not None
        print(json.dumps(mix), file=self.process.stdin, flush=True)
        times, tokens = self.read()
        assert isinstance(times, list)
        return statistics.median(times), tokens


@contextmanager
def side(commit: str, folder: Path, *, model: str) -> Iterator[Side]:
    """The engine of a commit, loaded."""
    git = ["git", "worktree"]
    subprocess.run([*git, "add", "--detach", "--quiet", str(folder), commit], check=True)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", f"{LAUNCH}({model!r})", str(Path(__file__).resolve())],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            try:
                own = Side(process)
                own.read()
                yield own
            finally:
                process.kill()
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


# The folder that the process runs in comes first, so this file finds that commit's engine.
LAUNCH = (
    "import importlib.util as u, sys; s = u.spec_from_file_location('guard', sys.argv[1]);"
    " m = u.module_from_spec(s); sys.modules['guard'] = m; s.loader.exec_module(m);"
    " m.decode_on_command"
)


def compare(old: Side, new: Side, mix: str, *, pairs: int) -> dict[str, object]:
    """One row of the report. The first pair warms up."""
    ratios, times, are_same = [], [], True
    for number in range(pairs + 1):
        order = (old, new) if number % 2 else (new, old)
        found = {id(each): each.turn(mix) for each in order}
        (old_s, old_tokens), (new_s, new_tokens) = found[id(old)], found[id(new)]
        are_same = are_same and old_tokens == new_tokens
        if number:
            ratios.append(new_s / old_s)
            times.append((old_s, new_s))
    low, high = interval(ratios)
    return {
        "mix": mix,
        "old_ms": 1e3 * statistics.median(old_s for old_s, _ in times),
        "new_ms": 1e3 * statistics.median(new_s for _, new_s in times),
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "same_tokens": are_same,
    }


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Of their median: 95 %."""
    dice = random.Random(0)
    medians = sorted(
        statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(NUM_RESAMPLINGS)
    )
    return medians[NUM_RESAMPLINGS // 40], medians[-1 - NUM_RESAMPLINGS // 40]


def main() -> int:
    arguments = parse()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = str(arguments.model.expanduser())
        old, new = (
            stack.enter_context(side(commit, scratch / name, model=model))
            for name, commit in (("old", arguments.old), ("new", arguments.new))
        )
        rows = [compare(old, new, mix, pairs=arguments.pairs) for mix in MIXES]
    for row in rows:
        print(
            "{mix:20} {old_ms:7.1f} -> {new_ms:7.1f} ms, ratio {ratio:.3f} "
            "({low:.3f} to {high:.3f}), same tokens: {same_tokens}".format(**row)
        )
    slower = [row["mix"] for row in rows if float(str(row["low"])) > 1 + arguments.tolerance]
    print(f"slower: {', '.join(map(str, slower))}" if slower else "not slower")
    return 1 if slower else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the engine of two commits.")
    add = parser.add_argument
    add("old", help="a commit, branch or tag")
    add("new")
    add("--model", type=Path, required=True, help="folder of a checkpoint")
    add("--pairs", type=int, default=12)
    add("--tolerance", type=float, default=0.03, help="of a slowdown that is none")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
