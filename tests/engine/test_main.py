"""The engine as a process: the real model behind the real link."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import manifest, text_bundle
from adapters.store import ArtifactStore
from engine.config import SECRET_VARIABLE
from engine.errors import EngineLost, EngineRefused
from engine.process import main
from engine.protocol import SequenceState
from tests.engine.echo_engine import DEADLINE_S, collect, greedy, link, tokens_of, until
from tests.model_lab import following, num_ties, save_speaking_model

MODEL = Path("~/.cache/manylora/models/SmolLM2-135M-Instruct").expanduser()
ADAPTER = Path(__file__).parents[2] / "adapters" / "demo" / "sql"
NUM_TOKENS = 12
START_S = 240


@dataclass
class Process:
    """`python -m engine` in a folder of its own."""

    folder: Path
    arguments: tuple[str, ...] = ()
    model: Path = MODEL
    lines: list[str] = field(default_factory=list)
    is_ready: threading.Event = field(default_factory=threading.Event)

    @property
    def address(self) -> str:
        return f"unix:{self.folder / 'engine.sock'}"

    @property
    def store_url(self) -> str:
        return (self.folder / "store").as_uri()

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "engine", "--model", str(self.model)),
            *("--listen", self.address),
            *("--store-url", self.store_url, "--cache-dir", str(self.folder / "cache")),
            *("--num-threads", "1", "--memory-mib", "160", *self.arguments),
        ]

    def start(self) -> subprocess.Popen[str]:
        self.is_ready.clear()
        process = subprocess.Popen(
            self.command(),
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        threading.Thread(target=self._listen, args=[process], daemon=True).start()
        return process

    def start_and_wait(self) -> subprocess.Popen[str]:
        process = self.start()
        assert self.is_ready.wait(START_S), self.lines
        assert process.poll() is None, self.lines
        return process

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self.lines.append(line)
                if "ready:" in line:
                    self.is_ready.set()
        # Or it ended, and nobody has to wait any more.
        self.is_ready.set()


def end(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(DEADLINE_S)


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ml-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for those whom its words do not concern."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return save_speaking_model(folder, max_position_embeddings=8192)


@pytest.fixture(scope="module")
def engine_process() -> Iterator[Process]:
    folder = Path(tempfile.mkdtemp(prefix="ml-"))
    made = Process(folder)
    process = made.start_and_wait()
    yield made
    end(process)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    questions = ("List all users older than 30.", "Why is the sky blue?")
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for question in questions
    ]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
async def test_base_and_adapter_answer_together_as_they_do_alone(
    engine_process: Process, prompts: list[list[int]]
) -> None:
    described = manifest.read(
        (ADAPTER / manifest.CONFIG_FILE).read_bytes(),
        ADAPTER / manifest.WEIGHTS_FILE,
        base_model=MODEL.name,
    )
    digest = described.weights_digest
    await ArtifactStore(engine_process.store_url).put_adapter(
        digest,
        described.canonical_config(),
        ADAPTER / manifest.WEIGHTS_FILE,
        weights_sha256="0" * 64,
    )
    async with link(engine_process.address) as worker:
        streams = [
            worker.submit(prompt, sampling=greedy(NUM_TOKENS), adapter_digest=adapter)
            for prompt in prompts
            for adapter in (None, digest)
        ]
        answers = [tokens_of(await collect(stream)) for stream in streams]
        assert (await worker.status()).resident_adapters == [digest]
        report = await worker.probe(digest)
        assert report.is_passed, report
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    check(model, prompts, answers[0::2])
    check(PeftModel.from_pretrained(model, ADAPTER), prompts, answers[1::2])


def check(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> None:
    """Against what the model itself would say."""
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == NUM_TOKENS
        assert num_ties(following(model, prompt, answer), answer) == 0


async def test_an_adapter_that_is_not_stored_fails_its_own_calls_alone(
    engine_process: Process, prompts: list[list[int]]
) -> None:
    async with link(engine_process.address) as worker:
        bad = worker.submit(prompts[0], sampling=greedy(4), adapter_digest="ab" * 32)
        good = worker.submit(prompts[0], sampling=greedy(4))
        assert (await collect(bad))[-1].state is SequenceState.FAILED
        assert len(tokens_of(await collect(good))) == 4
        with pytest.raises(EngineRefused):
            await worker.probe("ab" * 32)
        assert len(tokens_of(await collect(worker.submit(prompts[0], sampling=greedy(2))))) == 2


async def test_the_text_bundle_is_in_the_store(engine_process: Process) -> None:
    async with link(engine_process.address) as worker:
        info = await worker.info()
    bundle = await ArtifactStore(engine_process.store_url).get_bundle(info.text_bundle_digest)
    assert text_bundle.digest(bundle) == info.text_bundle_digest
    assert (info.base_model, info.vocab_size) == (MODEL.name, bundle.vocab_size)
    assert info.max_model_len <= bundle.context_length
    assert "model.layers.0.self_attn.q_proj" in info.base_shape.modules


async def test_after_a_kill_the_same_socket_serves_again(folder: Path, tiny: Path) -> None:
    made = Process(folder, model=tiny)
    first = made.start_and_wait()
    async with link(made.address) as worker:
        stream = worker.submit([1, 2], sampling=greedy(8_000))
        await anext(stream)
        first.kill()
        first.wait()
        with pytest.raises(EngineLost):
            await collect(stream)
        second = made.start_and_wait()
        await until(lambda: worker.is_connected)
        assert len(tokens_of(await collect(worker.submit([1, 2], sampling=greedy(3))))) == 3
    assert end(second) == 0
    assert not (folder / "engine.sock").exists()


def test_the_engine_ends_with_the_process_that_started_it(folder: Path, tiny: Path) -> None:
    made = Process(folder, model=tiny)
    starter = (
        "import os, subprocess, sys\n"
        "os.environ['MANYLORA_PARENT_PID'] = str(os.getpid())\n"
        "child = subprocess.Popen(sys.argv[1:], stderr=sys.stderr)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", starter, *made.command()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stderr is not None
    parent.stdout.readline()
    for line in parent.stderr:
        if "ready:" in line:
            break
    parent.kill()
    # The pipe ends when the engine, which shares it, has ended too.
    parent.stderr.read()
    parent.stdout.close()
    parent.stderr.close()
    parent.wait()
    assert not (folder / "engine.sock").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--max-num-seqs", "0"), "max_num_seqs"),
        (("--listen", "http://127.0.0.1:1"), "MANYLORA_ENGINE_SECRET"),
        (("--listen", "nowhere"), "nowhere"),
        (("--model", "/nonexistent/model"), "/nonexistent/model"),
        (("--store-url", "ftp://x"), "ftp://x"),
        (("--max-model-len", "many"), "--max-model-len"),
        (("--quantization", "awq"), "--quantization"),
        (("--quantization", "fp8", "--device", "cpu"), "'fp8', which needs a CUDA device"),
        (("--fast",), "--fast"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_is_loaded(
    folder: Path,
    arguments: tuple[str, ...],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    command = Process(folder, arguments=arguments).command()
    try:
        code = main(command[command.index("--model") :])
    except SystemExit as refused:
        code = refused.code
    assert code == 2
    assert reason in capsys.readouterr().err
    assert not (folder / "engine.sock").exists()
