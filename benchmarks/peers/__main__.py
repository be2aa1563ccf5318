"""Run peers in turns on the same questions, and keep what came of it.

    python -m benchmarks.peers --peers manylora vllm-1 --concurrency 1 8 32 --adapters 0 8 --pairs 6

For each number of adapters the peers named are started together, asked what PEFT has answered, and
then measured one after another, the order turned round in every other pair. Those that answer
wrongly are not measured. While one is measured the others wait; what the rest of the machine does
meanwhile is recorded, and a run beside which too much went on is dropped and repeated. Results are
added to those that the file has.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from adapters.demo.base_model import default_folder
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.manylora import Manylora
from benchmarks.peers.openvino import OpenVino
from benchmarks.peers.peer import Peer
from benchmarks.peers.quiet import Quiet
from benchmarks.peers.results import Results
from benchmarks.peers.runner import Plan, Runner
from benchmarks.peers.scene import PROMPT_TOKENS, RANK
from benchmarks.peers.transformers_peft import Generate
from benchmarks.peers.transformers_serve import TransformersServe
from benchmarks.peers.vllm_cpu import Vllm
from benchmarks.provenance import commit
from benchmarks.serve import machine

ALL: Sequence[Peer] = (
    *(Manylora(precision) for precision in ("fp32", "bf16", "int8", "int8-dynamic", "int4")),
    Generate(),
    TransformersServe(),
    *(Vllm(cores) for cores in (1, 2)),
    *(LlamaCpp(kind) for kind in ("F32", "Q8_0", "Q4_1")),
    OpenVino(),
)
PEERS = {peer.name: peer for peer in ALL}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="Run peers in turns on the same questions.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--peers", nargs="+", choices=PEERS, required=True, help="all of them run at once")
    add("--adapters", nargs="+", type=int, default=[0, 8, 32], help="0 is the base model alone")
    add("--mixes", nargs="+", choices=["even", "zipf"], default=["even", "zipf"])
    add("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    add("--requests-per-client", type=int, default=2)
    add("--new-tokens", type=int, default=128)
    add("--pairs", type=int, default=6, help="six are the fewest for an interval of 95 %%")
    add("--model", type=Path, default=default_folder(), help="folder of SmolLM2-135M-Instruct")
    add("--hold", metavar="COMMAND", help="keeps others off while what it is given to run runs")
    add("--hold-s", type=float, default=60, help="after which a next run lets others in between")
    add("--output", type=Path, required=True)
    return parser.parse_args(arguments)


def plan_of(options: argparse.Namespace) -> Plan:
    return Plan(
        model=options.model,
        peers=[PEERS[name] for name in options.peers],
        numbers_of_adapters=options.adapters,
        mixes=options.mixes,
        concurrencies=options.concurrency,
        requests_per_client=options.requests_per_client,
        new_tokens=options.new_tokens,
        num_pairs=options.pairs,
    )


def facts_of(options: argparse.Namespace) -> dict[str, object]:
    """Where the numbers come from, and the command for the same on another machine."""
    chosen = {
        "--peers": options.peers,
        "--adapters": options.adapters,
        "--mixes": options.mixes,
        "--concurrency": options.concurrency,
        "--requests-per-client": [options.requests_per_client],
        "--new-tokens": [options.new_tokens],
        "--pairs": [options.pairs],
    }
    words = [str(word) for name, values in chosen.items() for word in (name, *values)]
    return {
        "command": " ".join(["python -m benchmarks.peers", *words]),
        "commit": commit(),
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "prompt_tokens": PROMPT_TOKENS,
        "rank": RANK,
    }


def main() -> int:
    options = parse()
    # So that peers are stopped then as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))
    quiet = Quiet(options.hold, most_s=options.hold_s)
    Runner(plan_of(options), Results(options.output, facts_of(options)), quiet=quiet).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
