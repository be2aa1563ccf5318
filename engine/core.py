"""The engine without its process: submit sequences, step, collect events.

One thread calls it, but for `prefetch`; `wake` is called from others. Knows nothing of workers,
frames or text.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from adapters.errors import AdapterError, StoreUnavailable
from engine import batch as batches
from engine import probe, runner, sampler
from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.errors import (
    AdapterMissing,
    AdapterUnavailable,
    ConfigurationError,
    ContextLengthExceeded,
    InvalidSequence,
    ProbeError,
)
from engine.model import loader, lora
from engine.model.attention import KVCache
from engine.model.loader import LoadedModel
from engine.model.lora import PreparedAdapter
from engine.protocol import MAX_PRIORITY, MIN_PRIORITY, ProbeReport, SamplingParams
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceKey, StepEvent
from engine.slots import AdapterLoader, SlotPool

logger = logging.getLogger(__name__)

# Tokens of one step: enough to fill the device, few enough that those who decode beside a long
# prompt don't notice. A CPU's GEMMs gain nothing beyond some hundred rows.
DEFAULT_STEP_TOKENS = {"cpu": 128, "cuda": 8192}


class AdapterSource(Protocol):
    """Where adapters come from; called in load threads."""

    def fetch(self, weights_digest: str) -> AbstractContextManager[Path]:
        """A folder with adapter_config.json and adapter_model.safetensors, pinned while inside."""


@dataclass(frozen=True, slots=True)
class CoreStatus:
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    # Weights digests, least recently used first.
    resident_adapters: tuple[str, ...]


class EngineCore:
    """Loads a model and runs sequences on it."""

    def __init__(self, config: EngineConfig, *, adapter_source: AdapterSource) -> None:
        """Raises ConfigurationError."""
        torch.set_num_threads(config.num_threads or os.cpu_count() or 1)
        loaded = loader.load(config)
        num_blocks = config.num_blocks or _num_blocks(config, loaded)
        self.base_shape = loaded.base_shape
        self.base_digest = loaded.base_digest
        self.vocab_size = loaded.vocab_size
        self.max_model_len = _fitting_length(config, loaded.max_model_len, num_blocks)
        self.device = str(loaded.device)
        self.dtype = str(loaded.dtype).removeprefix("torch.")
        # Called from a load thread when an adapter is ready or has failed.
        self.wake: Callable[[], None] = lambda: None

        self._loaded = loaded
        self._adapter_source = adapter_source
        self._max_lora_rank = config.max_lora_rank
        # One slot more than the pool has: probes wait for nobody.
        self._probe_slot = config.max_loras
        self._adapter_loader: AdapterLoader[PreparedAdapter] = AdapterLoader(
            self._read_adapter, on_result=lambda: self.wake()
        )
        self._blocks = BlockManager(num_blocks, block_size=config.block_size)
        self._slots = SlotPool(config.max_loras, start_load=self._adapter_loader.start)
        self._scheduler = Scheduler(
            self._blocks,
            self._slots,
            max_num_seqs=config.max_num_seqs,
            max_num_tokens=_step_tokens(config, loaded.device),
        )
        cache = KVCache(
            loaded.layers,
            num_blocks=num_blocks,
            block_size=config.block_size,
            device=loaded.device,
        )
        self._runner = Runner(loaded, cache)
        # A step found nothing to run, and nothing has changed since.
        self._is_stalled = False

    def submit(self, sequence: Sequence) -> None:
        """Raises InvalidSequence or ContextLengthExceeded; adapters fail later, in an event."""
        if sequence.key in self._scheduler:
            raise InvalidSequence(f"There is a sequence {sequence.key} already.")
        if not 0 < sequence.weight < math.inf:
            raise InvalidSequence("weight must be above 0 and finite.")
        if not MIN_PRIORITY <= sequence.priority <= MAX_PRIORITY:
            raise InvalidSequence(f"priority must be from {MIN_PRIORITY} to {MAX_PRIORITY}.")
        _check_sampling(sequence.sampling, self.vocab_size)
        if not sequence.num_prompt_tokens:
            raise InvalidSequence("prompt_token_ids is empty.")
        if not 0 <= min(sequence.token_ids) <= max(sequence.token_ids) < self.vocab_size:
            raise InvalidSequence(f"Token ids must be from 0 to {self.vocab_size - 1}.")
        if sequence.num_prompt_tokens + sequence.sampling.max_tokens > self.max_model_len:
            raise ContextLengthExceeded(
                f"The prompt has {sequence.num_prompt_tokens} tokens and max_tokens is "
                f"{sequence.sampling.max_tokens}: together more than the {self.max_model_len} "
                "of this engine."
            )
        self._scheduler.add(sequence)
        self._is_stalled = False

    def abort(self, key: SequenceKey) -> None:
        """The sequence's last event comes with the next step. An unknown key is no error."""
        self._scheduler.abort(key)
        self._is_stalled = False

    def hold_back(self, owner: str, *, held: bool) -> None:
        """Don't run this owner's sequences until released; others may take their blocks."""
        self._scheduler.hold_back(owner, held=held)
        self._is_stalled = False

    def has_work(self) -> bool:
        """Whether a step could do something now."""
        if self._scheduler.has_events or self._adapter_loader.has_results():
            return True
        return not self._is_stalled and bool(
            self._scheduler.num_running or self._scheduler.num_waiting
        )

    def step(self) -> list[StepEvent]:
        """Schedule, run, sample, commit. Empty when nothing could run or nothing was sampled."""
        started_ns = time.perf_counter_ns()
        self._take_loaded_adapters()
        scheduled = self._scheduler.schedule()
        self._is_stalled = not scheduled
        if not scheduled:
            return self._scheduler.take_events()
        batch = batches.build(
            scheduled, block_size=self._blocks.block_size, device=self._loaded.device
        )
        logits = self._runner.run(batch)
        ending = [item.sequence for item in scheduled if item.is_sampled]
        sampled = sampler.sample(
            logits, [s.sampling for s in ending], [s.num_tokens for s in ending]
        )
        elapsed_ns = time.perf_counter_ns() - started_ns
        self._scheduler.commit(scheduled, sampled, elapsed_ns=elapsed_ns)
        return self._scheduler.take_events()

    def status(self) -> CoreStatus:
        return CoreStatus(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_blocks=self._blocks.num_blocks,
            num_free_blocks=self._blocks.num_free_blocks,
            resident_adapters=self._slots.resident,
        )

    def prefetch(self, adapter_digest: str) -> None:
        """Bring an adapter's files near, so that a probe needs not wait for them. From any thread.

        Raises ProbeError where they can't be had.
        """
        with self._fetched(adapter_digest):
            pass

    def probe(self, adapter_digest: str) -> ProbeReport:
        """Blocks for a few forward passes. Raises ProbeError where the adapter can't be had."""
        with self._fetched(adapter_digest) as folder:
            return self._examine(folder, adapter_digest)

    def check_integrity(self) -> None:
        """Asserts that no block, slot or count has leaked."""
        self._scheduler.check_integrity()

    def close(self) -> None:
        """Wait for the load threads."""
        self._adapter_loader.close()

    # Adapters

    def _read_adapter(self, digest: str) -> PreparedAdapter | AdapterUnavailable:
        """Runs in a load thread."""
        try:
            with self._adapter_source.fetch(digest) as folder:
                return self._prepare(folder)
        except Exception as error:
            logger.warning("adapter_load_failed", extra={"digest": digest}, exc_info=True)
            return _unavailable(digest, error)

    def _prepare(self, folder: Path) -> PreparedAdapter:
        return lora.prepare(
            folder, self.base_shape, dtype=self._loaded.dtype, max_rank=self._max_lora_rank
        )

    def _take_loaded_adapters(self) -> None:
        for result in self._adapter_loader.take_results():
            if isinstance(result.outcome, AdapterUnavailable):
                self._slots.drop(result.digest)
                self._scheduler.fail_waiting_for(result.digest, result.outcome)
            else:
                slot = self._slots.set_resident(result.digest)
                self._loaded.bank.install(slot, result.outcome)

    @contextmanager
    def _fetched(self, digest: str) -> Iterator[Path]:
        try:
            with self._adapter_source.fetch(digest) as folder:
                yield folder
        except Exception as error:
            logger.warning("probe_failed", extra={"digest": digest}, exc_info=True)
            reason = _unavailable(digest, error)
            raise ProbeError(str(reason), is_retryable=reason.is_retryable) from error

    def _examine(self, folder: Path, digest: str) -> ProbeReport:
        bank, slot = self._loaded.bank, self._probe_slot
        bank.install(slot, self._prepare(folder))
        try:
            return probe.examine(
                folder, digest, slot=slot, loaded=self._loaded, runner=self._runner
            )
        finally:
            bank.clear(slot)


def _unavailable(digest: str, error: Exception) -> AdapterUnavailable:
    """Files that are missing or wrong stay so; whatever else failed may work the next time."""
    if isinstance(error, AdapterUnavailable):
        return error
    is_lasting = isinstance(error, AdapterError | FileNotFoundError)
    if is_lasting and not isinstance(error, StoreUnavailable):
        return AdapterMissing(f"The adapter {digest} cannot be loaded: {error}")
    return AdapterUnavailable(f"The adapter {digest} could not be loaded now.")


def _check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Raises InvalidSequence."""
    problems = {
        "max_tokens must be at least 1.": params.max_tokens >= 1,
        "seed must be from 0 to 2^64 - 1.": 0 <= params.seed < 2**64,
        "temperature must be finite and at least 0.": 0 <= params.temperature < math.inf,
        "top_p must be above 0 and at most 1.": 0 < params.top_p <= 1,
        "top_k must be at least 0.": params.top_k >= 0,
        f"logprobs must be from 0 to {vocab_size}.": 0 <= (params.logprobs or 0) <= vocab_size,
    }
    for problem, is_absent in problems.items():
        if not is_absent:
            raise InvalidSequence(problem)


# Sizes


def _step_tokens(config: EngineConfig, device: torch.device) -> int:
    budget = config.max_num_batched_tokens or DEFAULT_STEP_TOKENS[device.type]
    return max(budget, config.max_num_seqs)


def _num_blocks(config: EngineConfig, loaded: LoadedModel) -> int:
    num_blocks = runner.num_blocks_that_fit(
        loaded,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        kv_memory_bytes=config.kv_memory_bytes,
        gpu_memory_utilization=config.gpu_memory_utilization,
        lora_bytes=config.max_loras * _largest_adapter_bytes(config, loaded),
    )
    if num_blocks < 1:
        raise ConfigurationError(
            "No memory is left for the KV cache: raise kv_memory_bytes or gpu_memory_utilization, "
            "or lower max_loras or max_lora_rank."
        )
    return num_blocks


def _largest_adapter_bytes(config: EngineConfig, loaded: LoadedModel) -> int:
    num_features = sum(map(sum, loaded.base_shape.modules.values()))
    return num_features * config.max_lora_rank * loaded.dtype.itemsize


def _fitting_length(config: EngineConfig, max_model_len: int, num_blocks: int) -> int:
    """The longest sequence that the cache holds; one that was asked for must fit."""
    fitting = num_blocks * config.block_size
    if config.max_model_len is not None and fitting < max_model_len:
        raise ConfigurationError(
            f"The KV cache holds {fitting} tokens, max_model_len is {max_model_len}: lower it, or "
            "give the cache more memory."
        )
    return min(max_model_len, fitting)
