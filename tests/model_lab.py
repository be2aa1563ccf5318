"""Small checkpoints, adapters and an engine to drive, for the engine and the parity tests."""

import shutil
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from adapters import manifest
from adapters.base_shape import BaseShape
from adapters.demo.base_model import default_folder, fetch
from adapters.errors import ArtifactMissing
from adapters.text_bundle import PoolingKind, TextBundle
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.model.loader import LoadedModel
from engine.model.prepared import PreparedAdapter, prepare
from engine.protocol import (
    Grammar,
    SamplingParams,
    SequenceState,
    Submit,
    TokenLogprob,
)
from engine.sequence import Sequence, SequenceKey, StepEvent

WORKER = "worker"
# Below this gap between its two likeliest tokens the reference itself could have chosen either.
TIE_GAP = 1e-3
# Of log-probabilities.
ATOL = 1e-4
# For an adapter that is being read from disk, on a machine with much else to do.
PATIENCE_S = 60


# Models and adapters


def save_speaking_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A tiny random Llama with the small real model's tokenizer and templates."""
    save_random_model(tiny_llama_config(vocab_size=49152, **changes), folder, seed=seed)
    for file in fetch(default_folder()).glob("*token*"):
        shutil.copy(file, folder)
    return folder


def tiny_llama_config(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return LlamaConfig(**(sizes | changes))


def save_random_model(
    config: PretrainedConfig, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> str:
    """Weights large enough that tokens depend on what came before; the folder as a string."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.normal_(std=0.15)
    model.generation_config.eos_token_id = None
    model.to(dtype).save_pretrained(folder)
    return str(folder)


def save_adapter(model: str, folder: Path, *, seed: int, std: float = 0.1, **lora: Any) -> None:
    """An adapter as PEFT writes it, with a B that is not zero."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with _peft_as_it_is():
        adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    adapted.save_pretrained(folder)


def train_a_little(adapted: peft.PeftModel, *, seed: int) -> peft.PeftModel:
    """Move all that the adapter trains, some of which begins as zero or as the base model's."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                std = 0.1 if "lora_" in name else 0.3 * float(parameter.std()) + 0.02
                parameter.add_(std * torch.randn_like(parameter))
    return adapted.eval()


def adapt(model: str, *, seed: int, num_added_tokens: int = 0, **lora: Any) -> peft.PeftModel:
    """The model with a trained adapter, as PEFT computes it."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if num_added_tokens:
        num_tokens = base.config.vocab_size + num_added_tokens
        base.resize_token_embeddings(num_tokens, mean_resizing=False)
    with warnings.catch_warnings():
        # It warns of what is asked for here: tied layers that are trained apart.
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
    return train_a_little(adapted, seed=seed)


def save_quietly(adapted: peft.PeftModel, folder: Path) -> None:
    """It warns that embeddings are saved where they were changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)


def serve(lab: "Lab", prepared: Callable[[str], PreparedAdapter]) -> None:
    """Let the engine have its adapters, by digest, from memory instead of from their files."""
    lab.core._prepare = lambda folder, **_: prepared(folder.name)  # type: ignore[method-assign] # on purpose


def store(folder: Path, base_shape: BaseShape) -> None:
    """Let a folder that PEFT wrote have the configuration that intake keeps."""
    config, weights = (folder / name for name in (manifest.CONFIG_FILE, manifest.WEIGHTS_FILE))
    read = manifest.read(
        config.read_bytes(), weights, base_model=base_shape.base_model, base_shape=base_shape
    )
    assert not read.findings
    assert not read.leftovers
    config.write_bytes(read.canonical_config())


def adapter_bytes(folder: Path, loaded: LoadedModel) -> int:
    """What the adapter takes on the device."""
    prepared = prepare(
        folder,
        loaded.targets,
        base_model=loaded.base_shape.base_model,
        dtype=loaded.dtype,
        max_rank=64,
    )
    return prepared.size_bytes


def load_with_peft(model: str | PreTrainedModel, folder: Path) -> peft.PeftModel:
    base = model
    if isinstance(model, str):
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with _peft_as_it_is():
        return peft.PeftModel.from_pretrained(base, folder).eval()


@contextmanager
def _peft_as_it_is() -> Iterator[None]:
    """PEFT still asks transformers for a name that is going away."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        yield


@dataclass(slots=True)
class FolderSource:
    """Adapters by the name of their folder, from a store that may be slow or in trouble."""

    root: Path
    failures: dict[str, Exception] = field(default_factory=dict)
    # An adapter that is named here comes when its event is set.
    delays: dict[str, threading.Event] = field(default_factory=dict)
    forgotten: list[str] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.root.rglob("*.safetensors"))

    @contextmanager
    def fetch(self, weights_digest: str) -> Iterator[Path]:
        if weights_digest in self.delays:
            self.delays[weights_digest].wait()
        if weights_digest in self.failures:
            raise self.failures[weights_digest]
        yield self.root / weights_digest

    def forget(self, weights_digest: str) -> int:
        self.forgotten.append(weights_digest)
        return 0


# Driving an engine


@dataclass(slots=True)
class Answer:
    """All that an engine said about one sequence."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    events: list[StepEvent] = field(default_factory=list)

    @property
    def last(self) -> StepEvent:
        return self.events[-1]

    @property
    def state(self) -> SequenceState:
        return self.last.state

    @property
    def vector(self) -> Tensor:
        """The one that the last event told; no other may tell any."""
        assert self.state is SequenceState.STOPPED, self.last.fault
        told = [event.vector for event in self.events if event.vector is not None]
        assert told == [self.last.vector]
        return torch.frombuffer(bytearray(told[0]), dtype=torch.float32)

    @property
    def is_complete(self) -> bool:
        return bool(self.events) and self.state.is_final


class Lab:
    """An engine, and the answers that came out of it so far."""

    def __init__(
        self,
        model: str,
        source: FolderSource,
        *,
        bundles: Mapping[str, TextBundle] = MappingProxyType({}),
        **settings: Any,
    ) -> None:
        """`bundles`: text bundles by their digests, for sequences with a grammar."""
        sizes: dict[str, Any] = {
            "block_size": 4,
            "num_blocks": 160,
            "num_threads": 1,
            "max_lora_rank": 9,
        }
        config = EngineConfig(model=model, served_name="base", **(sizes | settings))
        self.core = EngineCore(
            config, adapter_source=source, bundle_of=lambda digest: _bundle(bundles, digest)
        )
        self.answers: dict[SequenceKey, Answer] = {}
        self._num_submitted = 0
        self._has_news = threading.Event()
        self.core.wake = self._has_news.set

    def submit(
        self,
        prompt: list[int],
        *,
        adapter: str | None = None,
        fingerprint: str | None = None,
        owner: str = WORKER,
        generated: list[int] | None = None,
        fairness_key: str = "",
        weight: float = 1.0,
        priority: int = 0,
        salt: bytes = b"",
        grammar: Grammar | None = None,
        pooling: PoolingKind | None = None,
        **sampling: Any,
    ) -> SequenceKey:
        self._num_submitted += 1
        usual = {"max_tokens": 8, "temperature": 0.0} if pooling is None else {"max_tokens": 0}
        params = SamplingParams(**(usual | sampling))
        submit = Submit(
            sequence_id=self._num_submitted,
            prompt_token_ids=prompt,
            sampling=params,
            adapter_digest=adapter,
            adapter_fingerprint=fingerprint,
            generated_token_ids=generated or [],
            fairness_key=fairness_key,
            weight=weight,
            priority=priority,
            cache_salt=salt,
            grammar=grammar,
            pooling=pooling,
        )
        sequence = Sequence.from_submit(submit, worker_id=owner, worker_epoch=1)
        self.core.submit(sequence)
        self.answers[sequence.key] = Answer()
        return sequence.key

    def step(self) -> list[StepEvent]:
        events = self.core.step()
        for event in events:
            answer = self.answers[event.key]
            answer.token_ids += event.token_ids
            answer.logprobs += event.logprobs or []
            answer.events.append(event)
        self.core.check_integrity()
        return events

    def run(self) -> None:
        """Until every sequence has ended; sleeps as the engine's thread does."""
        self.run_while(lambda: not self._all_complete())

    def run_while(self, is_wanting: Callable[[], bool]) -> None:
        while is_wanting():
            self._has_news.clear()
            self.step()
            if not self.core.has_work() and is_wanting():
                assert self._has_news.wait(PATIENCE_S), "nothing can run, and nothing will come"

    def _all_complete(self) -> bool:
        return all(answer.is_complete for answer in self.answers.values())

    def generate(self, prompt: list[int], **settings: Any) -> list[int]:
        key = self.submit(prompt, **settings)
        self.run()
        return self.answers[key].token_ids

    def assert_nothing_is_left(self) -> None:
        status = self.core.status()
        assert (status.num_running, status.num_waiting) == (0, 0)
        assert status.num_free_blocks + status.num_adapter_blocks == status.num_blocks
        self.core.check_integrity()


def _bundle(bundles: Mapping[str, TextBundle], digest: str) -> TextBundle:
    if digest not in bundles:
        raise ArtifactMissing(digest)
    return bundles[digest]


class WatchedLab(Lab):
    """Counts what steps do to the sequences that run."""

    def __init__(self, model: str, source: FolderSource, **settings: Any) -> None:
        super().__init__(model, source, **settings)
        self.seen = Counter[str]()
        self._computed: dict[Sequence, int] = {}
        self._resident: set[str] = set()

    def step(self) -> list[StepEvent]:
        events = super().step()
        before, resident = self._computed, set(self.core.status().resident_adapters)
        now = {s: s.num_computed_tokens for s in self.core._scheduler._running}
        ended = {event.key for event in events if event.state.is_final}
        advanced = {s.adapter_digest for s, count in now.items() if count > before.get(s, 0)}
        self.seen["mixed"] += len(advanced) > 1
        self.seen["chunked"] += sum(
            s.num_uncomputed_tokens > 1 and before.get(s, 0) < count for s, count in now.items()
        )
        self.seen["preempted"] += sum(s not in now and s.key not in ended for s in before)
        self.seen["unloaded"] += len(self._resident - resident)
        self._computed, self._resident = now, resident
        return events


@contextmanager
def open_lab(model: str, source: FolderSource, **settings: Any) -> Iterator[Lab]:
    lab = Lab(model, source, **settings)
    try:
        yield lab
    finally:
        lab.core.close()


# The reference


@torch.inference_mode()
def following(model: Any, prompt: list[int], found: list[int]) -> Tensor:
    """[num_tokens, vocab_size]: the logits from which transformers take each token of an answer."""
    rows: Tensor = model(torch.tensor([prompt + found])).logits[0, len(prompt) - 1 : -1]
    return rows


def num_ties(rows: Tensor, found: list[int]) -> int:
    """How often another token was as likely; fails where a token is not the likeliest.

    `rows`: the reference's logits or log-probabilities, from which each token comes. Greedy
    generation is nothing else, and one pass shows it for all tokens, beyond a tie too.
    """
    best, likeliest = rows.max(-1)
    gaps = best - rows[torch.arange(len(found)), found]
    for place, gap in enumerate(gaps.tolist()):
        assert gap < TIE_GAP, f"token {place} differs, where the gap is {gap}: {found}"
    return int((likeliest != torch.tensor(found)).sum())


@torch.inference_mode()
def pooled_reference(model: Any, prompt: list[int], pooling: PoolingKind) -> Tensor:
    """What transformers' own hidden states come to: [hidden_size], of length one."""
    states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
    pooled = states.double().mean(0) if pooling == "mean" else states[-1].double()
    return (pooled / pooled.norm()).float()


class Alone:
    """One adapter's own model, or the base model; no batch, no cache, no engine."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.inference_mode()
    def logprobs(self, tokens: list[int]) -> Tensor:
        """[num_tokens, vocab_size], of what follows each."""
        return torch.log_softmax(self.model(torch.tensor([tokens])).logits[0], dim=-1)


def assert_told(told: list[TokenLogprob], tokens: list[int], rows: Tensor, *, num_top: int) -> None:
    for logprob, token_id, row in zip(told, tokens, rows, strict=True):
        assert logprob.logprob == pytest.approx(float(row[token_id]), abs=ATOL)
        values = [value for _, value in logprob.top]
        assert values == pytest.approx(row.topk(num_top).values.tolist(), abs=ATOL)
        # Of two that are as likely, either may come first.
        assert values == pytest.approx([float(row[i]) for i, _ in logprob.top], abs=ATOL)
