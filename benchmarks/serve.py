"""Load an OpenAI-compatible server and say how it did.

    python benchmarks/serve.py --url http://127.0.0.1:8000/v1 --key ml_... --models base,acme-sql
    python benchmarks/serve.py --demo .manylora/demo.json --concurrency 8

Requests are drawn once (prompts, models), then sent either by a number of clients that each wait
for their answer, or at a Poisson rate that waits for nobody. Tokens are counted by the server's own
usage; times are the client's. With --sequential-baseline the same requests are also answered one
after another by plain transformers generate() in this process, in turns with the server.
Knows nothing of what is behind the URL.
"""

import argparse
import asyncio
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).parent
ANSWER_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Target:
    """A model as a client names it, and the key that may."""

    model: str
    key: str | None


@dataclass(frozen=True, slots=True)
class Request:
    target: Target
    prompt: str


@dataclass(slots=True)
class Answer:
    """What one request came to; times are seconds since it was sent."""

    model: str
    # When each piece of text arrived.
    arrivals_s: list[float] = field(default_factory=list)
    total_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    text: str = ""
    error: str | None = None

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Summary:
    requests: int
    errors: dict[str, int]
    wall_s: float
    prompt_tokens: int
    completion_tokens: int
    tokens_per_s: float
    requests_per_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    latency_p50_ms: float | None
    latency_p99_ms: float | None


def summarise(answers: Sequence[Answer], wall_s: float) -> Summary:
    good = [answer for answer in answers if answer.error is None]
    first = [answer.arrivals_s[0] for answer in good if answer.arrivals_s]
    gaps = [gap for answer in good for gap in answer.gaps_s]
    totals = [answer.total_s for answer in good]
    completion_tokens = sum(answer.completion_tokens for answer in good)
    return Summary(
        requests=len(answers),
        errors=dict(Counter(answer.error for answer in answers if answer.error is not None)),
        wall_s=round(wall_s, 3),
        prompt_tokens=sum(answer.prompt_tokens for answer in good),
        completion_tokens=completion_tokens,
        tokens_per_s=round(completion_tokens / wall_s, 2),
        requests_per_s=round(len(good) / wall_s, 3),
        ttft_p50_ms=percentile_ms(first, 50),
        ttft_p99_ms=percentile_ms(first, 99),
        itl_p50_ms=percentile_ms(gaps, 50),
        itl_p99_ms=percentile_ms(gaps, 99),
        latency_p50_ms=percentile_ms(totals, 50),
        latency_p99_ms=percentile_ms(totals, 99),
    )


def percentile_ms(values_s: Sequence[float], percent: int) -> float | None:
    """The smallest value that `percent` per cent of all do not exceed."""
    if not values_s:
        return None
    ranked = sorted(values_s)
    return round(ranked[max(-(-percent * len(ranked) // 100), 1) - 1] * 1000, 2)


# Requests


def draw(
    targets: Sequence[Target], prompts: Sequence[str], *, number: int, mix: str, seed: int
) -> list[Request]:
    """The same arguments draw the same requests."""
    chance = random.Random(seed)
    chosen = chance.choices(targets, weights=weights(mix, len(targets)), k=number)
    return [Request(target, chance.choice(prompts)) for target in chosen]


def weights(mix: str, number: int) -> list[float]:
    """Uniform, or Zipf: the k-th model of the list in proportion to 1 / k^s."""
    name, _, exponent = mix.partition(":")
    if name == "uniform" and not exponent:
        return [1.0] * number
    if name == "zipf":
        return [rank ** -float(exponent or 1) for rank in range(1, number + 1)]
    raise SystemExit(f"--mix must be uniform or zipf:<exponent>: {mix!r}")


# The server


async def ask(http: httpx.AsyncClient, request: Request, *, max_tokens: int) -> Answer:
    answer = Answer(request.target.model)
    started_s = time.perf_counter()
    try:
        await stream_into(answer, http, request, max_tokens=max_tokens, started_s=started_s)
    except httpx.HTTPError as error:
        answer.error = type(error).__name__
    answer.total_s = time.perf_counter() - started_s
    return answer


async def stream_into(
    answer: Answer, http: httpx.AsyncClient, request: Request, *, max_tokens: int, started_s: float
) -> None:
    body = {
        "model": request.target.model,
        "messages": [{"role": "user", "content": request.prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    key = request.target.key
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    async with http.stream("POST", "chat/completions", json=body, headers=headers) as response:
        if response.is_error:
            answer.error = f"status {response.status_code}"
            return
        answer.error = "no usage"
        async for line in response.aiter_lines():
            if line.startswith("data:") and not line.endswith("[DONE]"):
                take(answer, json.loads(line[5:]), time.perf_counter() - started_s)


def take(answer: Answer, chunk: dict[str, Any], now_s: float) -> None:
    if "error" in chunk:
        answer.error = f"stream error {chunk['error'].get('code')}"
        return
    choices = chunk.get("choices") or [{}]
    if piece := choices[0].get("delta", {}).get("content"):
        answer.arrivals_s.append(now_s)
        answer.text += piece
    if usage := chunk.get("usage"):
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.completion_tokens = usage["completion_tokens"]
        if answer.error == "no usage":
            answer.error = None


Ask = Callable[[Request], Coroutine[Any, Any, Answer]]


async def in_turn(requests: Sequence[Request], ask_one: Ask, *, concurrency: int) -> list[Answer]:
    """Closed loop: each of `concurrency` clients sends its next request after its last answer."""
    waiting = iter(enumerate(requests))
    answers: dict[int, Answer] = {}

    async def client() -> None:
        for place, request in waiting:
            answers[place] = await ask_one(request)

    async with asyncio.TaskGroup() as clients:
        for _ in range(concurrency):
            clients.create_task(client())
    return [answers[place] for place in range(len(requests))]


async def at_rate(
    requests: Sequence[Request], ask_one: Ask, *, rate: float, seed: int
) -> list[Answer]:
    """Open loop: requests leave at Poisson times, however slow the answers are."""
    chance = random.Random(seed)
    async with asyncio.TaskGroup() as tasks:
        sent = []
        for request in requests:
            sent.append(tasks.create_task(ask_one(request)))
            await asyncio.sleep(chance.expovariate(rate))
    return [task.result() for task in sent]


async def run_server(requests: Sequence[Request], options: argparse.Namespace) -> list[Answer]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=options.url, limits=limits, timeout=ANSWER_TIMEOUT_S, trust_env=False
    ) as http:

        async def ask_one(request: Request) -> Answer:
            return await ask(http, request, max_tokens=options.max_tokens)

        if options.rate is not None:
            return await at_rate(requests, ask_one, rate=options.rate, seed=options.seed)
        return await in_turn(requests, ask_one, concurrency=options.concurrency)


# The baseline


class Sequential:
    """Plain transformers generate(), one request after another; adapters through PEFT."""

    def __init__(self, folder: Path, adapters: dict[str, Path]) -> None:
        # Only here, so that a server elsewhere can be loaded without torch.
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self._adapters = adapters
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, path in adapters.items():
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(path, adapter_name=name)
            else:
                self._model = PeftModel.from_pretrained(self._model, path, adapter_name=name)

    def answer(self, request: Request, *, max_tokens: int) -> Answer:
        answer = Answer(request.target.model)
        started_s = time.perf_counter()
        prompt = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": request.prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with self._torch.inference_mode(), self._as(request.target.model):
            output = self._model.generate(**prompt, max_new_tokens=max_tokens, do_sample=False)
        answer.prompt_tokens = prompt["input_ids"].shape[1]
        answer.completion_tokens = output.shape[1] - answer.prompt_tokens
        answer.total_s = time.perf_counter() - started_s
        answer.text = self._tokenizer.decode(
            output[0, answer.prompt_tokens :], skip_special_tokens=True
        )
        return answer

    def _as(self, model: str) -> Any:
        """The context in which the model is that adapter, or none."""
        if model in self._adapters:
            self._model.set_adapter(model)
            return nullcontext()
        return self._model.disable_adapter() if self._adapters else nullcontext()


# The report


def show(title: str, summary: Summary, by_model: dict[str, Summary]) -> None:
    print(f"\n{title}")
    columns = {
        "tokens_per_s": "tok/s",
        "requests_per_s": "req/s",
        "ttft_p50_ms": "TTFT p50 ms",
        "ttft_p99_ms": "p99",
        "itl_p50_ms": "ITL p50 ms",
        "itl_p99_ms": "p99",
        "latency_p50_ms": "latency p50 ms",
    }
    print(f"  {'':28}{'requests':>9}{'tokens':>8}" + "".join(f"{h:>15}" for h in columns.values()))
    for name, each in [("all", summary), *sorted(by_model.items())]:
        cells = ["-" if (value := getattr(each, c)) is None else f"{value:.2f}" for c in columns]
        print(
            f"  {name:28.28}{each.requests:>9}{each.completion_tokens:>8}"
            + "".join(f"{cell:>15}" for cell in cells)
        )
    for error, count in summary.errors.items():
        print(f"  {count} failed: {error}")


def by_model(answers: Sequence[Answer], wall_s: float) -> dict[str, Summary]:
    names = {answer.model for answer in answers}
    return {
        name: summarise([answer for answer in answers if answer.model == name], wall_s)
        for name in names
    }


def machine() -> dict[str, str]:
    """Where the numbers come from."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", "HEAD"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": f"{len(names)} x {names[0]}" if names else platform.processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def report(options: argparse.Namespace, targets: Sequence[Target], **results: Any) -> None:
    settings = {
        name: value.name if isinstance(value, Path) else value
        for name, value in vars(options).items()
        # A key is nobody's business.
        if name not in ("key", "json", "demo")
    }
    content = {
        "machine": machine(),
        "settings": {**settings, "models": [target.model for target in targets]},
        **results,
    }
    options.json.write_text(json.dumps(content, indent=1, default=str) + "\n")


# The command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Load an OpenAI-compatible server and say how it did.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--url", help="of the API, with /v1")
    add("--key", help="API key")
    add("--models", help="names, separated by commas; the first is the most popular under zipf")
    add("--demo", type=Path, help="demo.json of `make up`: takes URL, keys and models from there")
    add("--mix", default="uniform", help="uniform or zipf:<exponent> (default: uniform)")
    add("--concurrency", type=int, default=8, help="clients that wait for their answers")
    add("--rate", type=float, help="requests per second at Poisson times, instead of clients")
    add("--requests", type=int, default=64)
    add("--max-tokens", type=int, default=128)
    add("--prompts", type=Path, default=HERE / "prompts.txt", help="one a line")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write everything here too")
    add("--sequential-baseline", type=Path, metavar="MODEL_FOLDER")
    add("--adapters", nargs="*", default=[], metavar="MODEL=FOLDER", help="for the baseline")
    add("--rounds", type=int, default=1, help="server and baseline take turns so many times")
    options = parser.parse_args(arguments)
    if options.demo is None and not (options.url and options.models):
        parser.error("give --url and --models, or --demo")
    for name in ("concurrency", "requests", "max_tokens", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.rate is not None and options.rate <= 0:
        parser.error("--rate must be above 0")
    return options


def read_targets(options: argparse.Namespace) -> list[Target]:
    """Also sets options.url where the demo's file knows it."""
    named = options.models.split(",") if options.models else []
    if options.demo is None:
        return [Target(name, options.key) for name in named]
    demo = json.loads(options.demo.read_text())
    options.url = options.url or demo["base_url"]
    tenants = list(demo["tenants"].values())
    targets = [Target(name, tenant["key"]) for tenant in tenants for name in tenant["adapters"]]
    targets.append(Target(demo["base_model"], tenants[0]["key"]))
    known = {target.model: target for target in targets}
    if unknown := [name for name in named if name not in known]:
        raise SystemExit(f"--models: {options.demo} has no {', '.join(unknown)}")
    return [known[name] for name in named] or targets


def read_adapters(options: argparse.Namespace) -> dict[str, Path]:
    pairs = [pair.partition("=") for pair in options.adapters]
    if any(not separator for _, separator, _ in pairs):
        raise SystemExit("--adapters takes MODEL=FOLDER")
    return {name: Path(folder) for name, _, folder in pairs}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    targets = read_targets(options)
    prompts = [line for line in options.prompts.read_text().splitlines() if line.strip()]
    requests = draw(targets, prompts, number=options.requests, mix=options.mix, seed=options.seed)
    baseline = None
    if options.sequential_baseline is not None:
        baseline = Sequential(options.sequential_baseline, read_adapters(options))
    warm_up(targets, prompts, options, baseline)
    rounds = [measure(requests, options, baseline) for _ in range(options.rounds)]
    ratios = [r["ratio"] for r in rounds if "ratio" in r]
    results: dict[str, Any] = {"rounds": rounds}
    if ratios:
        results["median_ratio"] = statistics.median(ratios)
        print(f"\nserver / sequential, tokens per second, median: {results['median_ratio']:.2f}")
    if options.json is not None:
        report(options, targets, **results)
    return 1 if any(r["server"]["errors"] for r in rounds) else 0


def warm_up(
    targets: Sequence[Target],
    prompts: Sequence[str],
    options: argparse.Namespace,
    baseline: Sequential | None,
) -> None:
    """One short answer of each model, not measured: adapters get loaded, caches get allocated."""
    short = argparse.Namespace(**{**vars(options), "max_tokens": 4, "rate": None})
    requests = [Request(target, prompts[0]) for target in targets]
    asyncio.run(run_server(requests, short))
    if baseline is not None:
        for request in requests:
            baseline.answer(request, max_tokens=4)


def measure(
    requests: Sequence[Request], options: argparse.Namespace, baseline: Sequential | None
) -> dict[str, Any]:
    """One round: the server, and then the baseline while the server rests."""
    started_s = time.perf_counter()
    answers = asyncio.run(run_server(requests, options))
    wall_s = time.perf_counter() - started_s
    served, each = summarise(answers, wall_s), by_model(answers, wall_s)
    show(f"server  {options.url}", served, each)
    result: dict[str, Any] = {
        "server": asdict(served),
        "by_model": {name: asdict(summary) for name, summary in each.items()},
    }
    if baseline is not None:
        started_s = time.perf_counter()
        alone = [baseline.answer(request, max_tokens=options.max_tokens) for request in requests]
        sequential = summarise(alone, time.perf_counter() - started_s)
        show("sequential generate()", sequential, {})
        result["sequential"] = asdict(sequential)
        result["ratio"] = round(served.tokens_per_s / sequential.tokens_per_s, 3)
        pairs = zip(answers, alone, strict=True)
        result["same_text"] = sum(mine.text == theirs.text for mine, theirs in pairs)
        print(
            f"  server / sequential: {result['ratio']:.2f};"
            f" the same greedy text for {result['same_text']} of {len(requests)}"
        )
    return result


if __name__ == "__main__":
    sys.exit(main())
