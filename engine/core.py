"""The engine without its process: submit sequences, step, collect events.

One thread calls it, but for `prefetch` and `forget_files`; `wake` is called from others. Knows
nothing of workers, frames or text.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import torch

from adapters.errors import ArtifactMissing
from adapters.text_bundle import TextBundle
from engine import batch as batches
from engine import probe, runner
from engine.adapter_loader import AdapterLoader, Pace, unavailable
from engine.block_manager import BlockManager, Window
from engine.breaker import Breaker
from engine.compilation import Compiler
from engine.config import EngineConfig
from engine.errors import (
    AdapterCorrupted,
    AdapterUnavailable,
    ConfigurationError,
    ContextLengthExceeded,
    InvalidSequence,
    OutOfMemory,
    ProbeError,
    SequenceError,
)
from engine.fingerprints import Fingerprints, fingerprint_of
from engine.host_tier import HostTier
from engine.kernels.threads import compute_alone, dismiss_helpers
from engine.model import loader, pooling, prepared
from engine.model.loader import LoadedModel
from engine.model.memory import DeviceMemory
from engine.model.prepared import PreparedAdapter
from engine.model.targets import Vocabulary
from engine.protocol import (
    MAX_PRIORITY,
    MIN_PRIORITY,
    AdapterPlace,
    ProbeReport,
    SamplingParams,
    TierReport,
)
from engine.replay import Replays
from engine.runner import Runner
from engine.sampling.sampler import Sampler
from engine.scheduler import SampledToken, ScheduledSequence, Scheduler
from engine.sequence import Sequence, SequenceKey, StepEvent
from engine.slots import Freed, SlotPool
from engine.wishes import Wish, Wishes

logger = logging.getLogger(__name__)

# Tokens of a step: enough to fill the device. A CPU's GEMMs gain nothing beyond some hundred rows.
DEFAULT_STEP_TOKENS = {"cpu": 128, "cuda": 8192}
# Of prompts, in a step that others wait for: so few that a CPU's takes less than twice as long.
TOKENS_BESIDE_DECODES = {"cpu": 20, "cuda": 8192}


# Of an adapter that is not here yet.
ANY_VOCABULARY = Vocabulary(2**31, 2**31)
# How torch says that the host has no memory left; a device has an error of its own.
NO_HOST_MEMORY = "can't allocate memory"


def no_bundles(digest: str) -> TextBundle:
    """Of an engine that has no store."""
    raise ArtifactMissing(digest)


class AdapterSource(Protocol):
    """Where adapters come from; called in load threads."""

    def fetch(self, weights_digest: str) -> AbstractContextManager[Path]:
        """A folder with adapter_config.json and adapter_model.safetensors, pinned while inside."""

    def forget(self, weights_digest: str) -> int:
        """Give up what is kept near of an adapter, once nobody reads it.

        Gives the bytes that came free at once.
        """

    @property
    def size_bytes(self) -> int:
        """What it keeps near, on the local disk."""


@dataclass(frozen=True, slots=True)
class CoreStatus:
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    # Those in which adapters lie.
    num_adapter_blocks: int
    # Weights digests, least recently used first.
    resident_adapters: tuple[str, ...]
    hosted_adapters: tuple[str, ...]
    # Whether they are in a slot yet or not, in order of coming.
    pinned_adapters: tuple[str, ...]
    quarantined_adapters: tuple[str, ...]
    tiers: TierReport


class EngineCore:
    """Loads a model and runs sequences on it."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        adapter_source: AdapterSource,
        bundle_of: Callable[[str], TextBundle] = no_bundles,
    ) -> None:
        """`bundle_of` reads a text bundle by its digest, in a thread, for sequences with a grammar;
        raises AdapterError where it can't be had.

        Raises ConfigurationError.
        """
        torch.set_num_threads(config.num_threads or os.cpu_count() or 1)
        loaded = loader.load(config)
        num_blocks = config.num_blocks or _num_blocks(config, loaded)
        self.base_shape = loaded.base_shape
        self.base_digest = loaded.base_digest
        self.vocab_size = loaded.vocab_size
        self.max_model_len = _fitting_length(config, loaded, num_blocks)
        self.device = str(loaded.device)
        self.dtype = str(loaded.dtype).removeprefix("torch.")
        # Called from a load thread when an adapter is ready or has failed.
        self.wake: Callable[[], None] = lambda: None

        self._loaded = loaded
        self._adapter_source = adapter_source
        self._max_lora_rank = config.max_lora_rank
        # One slot more than the pool has: probes wait for nobody.
        self._probe_slot = config.max_loras
        memory = DeviceMemory(
            loaded.layers,
            num_blocks=num_blocks,
            block_size=config.block_size,
            device=loaded.device,
        )
        self._memory = memory
        self._runner = Runner(loaded, memory, self._recorded(config))
        self._sampler = Sampler()
        self._breaker = Breaker()
        self._fingerprints = Fingerprints()
        # Windows are looked at beside what computes.
        self._checks = torch.Stream(loaded.device) if loaded.device.type == "cuda" else None
        self._blocks = BlockManager(
            num_blocks,
            block_size=config.block_size,
            block_bytes=memory.block_bytes,
            move_blocks=memory.move,
        )
        self._adapter_loader: AdapterLoader[PreparedAdapter, Window] = AdapterLoader(
            self._read_adapter,
            self._runner.copy_slice,
            check_copy=self._check_copy,
            max_bytes_per_s=config.max_load_bytes_per_s,
            on_result=lambda: self.wake(),
        )
        self._slots: SlotPool[PreparedAdapter, Window] = SlotPool(
            config.max_loras,
            memory=self._blocks,
            # Beside all adapters the longest sequence has its place.
            max_blocks=num_blocks - self._blocks.num_blocks_for(self.max_model_len),
            host=HostTier(config.host_memory_bytes),
            loads=self._adapter_loader,
            bank=self._runner,
        )
        self._scheduler = Scheduler(
            self._blocks,
            self._slots,
            max_num_seqs=config.max_num_seqs,
            max_num_tokens=_step_tokens(config, loaded.device),
            max_tokens_beside_decodes=(
                config.max_num_batched_tokens or TOKENS_BESIDE_DECODES[loaded.device.type]
            ),
        )
        self._wishes = Wishes(self._slots)
        self._compiler = Compiler(bundle_of, on_result=lambda: self.wake())
        # Those that name token ids which the base model does not know, and wait for their adapter.
        self._with_added_tokens: set[SequenceKey] = set()
        # A step found nothing to run, and nothing has changed since.
        self._is_stalled = False
        # Steps may run in another thread than this.
        dismiss_helpers()

    def _recorded(self, config: EngineConfig) -> Replays | None:
        if not config.cuda_graphs:
            return None
        return runner.recorded(
            self._loaded,
            self._memory,
            max_num_seqs=config.max_num_seqs,
            max_context=self.max_model_len,
            max_rank=config.max_lora_rank if config.max_loras else 0,
        )

    def submit(self, sequence: Sequence) -> None:
        """Raises InvalidSequence, ContextLengthExceeded, AdapterQuarantined or AdapterCorrupted.

        Adapters that can't be loaded fail later, in an event.
        """
        if sequence.key in self._scheduler or sequence.key in self._compiler:
            raise InvalidSequence(f"There is a sequence {sequence.key} already.")
        if not 0 < sequence.weight < math.inf:
            raise InvalidSequence("weight must be above 0 and finite.")
        if not MIN_PRIORITY <= sequence.priority <= MAX_PRIORITY:
            raise InvalidSequence(f"priority must be from {MIN_PRIORITY} to {MAX_PRIORITY}.")
        _check_wish(sequence, self.vocab_size)
        if not sequence.num_prompt_tokens:
            raise InvalidSequence("prompt_token_ids is empty.")
        is_vocabulary_known = sequence.adapter_digest is None
        _check_tokens(
            sequence, self._loaded.targets.vocabulary if is_vocabulary_known else ANY_VOCABULARY
        )
        if sequence.num_prompt_tokens + sequence.sampling.max_tokens > self.max_model_len:
            raise ContextLengthExceeded(
                f"The prompt has {sequence.num_prompt_tokens} tokens and max_tokens is "
                f"{sequence.sampling.max_tokens}: together more than the {self.max_model_len} "
                "of this engine."
            )
        if sequence.adapter_digest is not None:
            self._certify(sequence.adapter_digest, sequence.adapter_fingerprint)
        self._breaker.admit(sequence.adapter_digest, sequence.key)
        if sequence.grammar is None or sequence.ending().is_final:
            self._enqueue(sequence)
        else:
            self._compiler.start(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        self._scheduler.add(sequence)
        if sequence.adapter_digest is not None and sequence.key in self._scheduler:
            self._note_added_tokens(sequence)
        self._is_stalled = False

    def abort(self, key: SequenceKey) -> None:
        """The sequence's last event comes with the next step. An unknown key is no error."""
        if (sequence := self._compiler.give_up(key)) is not None:
            self._scheduler.add(sequence)
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
        if self._compiler.has_results():
            return True
        return not self._is_stalled and bool(
            self._scheduler.num_running or self._scheduler.num_waiting or self._wishes.are_open
        )

    def step(self) -> list[StepEvent]:
        """Schedule, run, sample, commit. Empty when nothing could run or nothing was sampled."""
        started_ns = time.perf_counter_ns()
        self._take_loaded_adapters()
        self._take_compiled_grammars()
        scheduled = self._scheduler.schedule()
        self._wishes.pursue()
        if self._with_added_tokens:
            scheduled = [item for item in scheduled if self._knows_tokens(item.sequence)]
        # A sequence that has just failed may have left room.
        self._is_stalled = not scheduled and not self._scheduler.has_events
        if not scheduled:
            return self._take_events()
        try:
            sampled = self._compute(scheduled)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            # The error's frames hold the step's tensors.
            error.__traceback__ = None
            self._retreat(scheduled)
        else:
            elapsed_ns = time.perf_counter_ns() - started_ns
            self._scheduler.commit(scheduled, sampled, elapsed_ns=elapsed_ns)
        return self._take_events()

    def _compute(self, scheduled: list[ScheduledSequence]) -> list[SampledToken]:
        batch = batches.build(
            scheduled, block_size=self._blocks.block_size, device=self._loaded.device
        )
        pooled = [item for item in scheduled if item.sequence.pool is not None]
        watch = partial(pooling.pool, batch=batch, scheduled=scheduled) if pooled else None
        return self._sampler.sample(self._runner.run(batch, watch=watch), scheduled)

    def _take_compiled_grammars(self) -> None:
        for sequence, outcome in self._compiler.take_results():
            if isinstance(outcome, SequenceError):
                self._scheduler.add(sequence)
                self._scheduler.fail(sequence.key, outcome)
            else:
                sequence.walk = outcome
                self._enqueue(sequence)

    def _retreat(self, scheduled: list[ScheduledSequence]) -> None:
        """Nothing of the step counts: do less in the next one."""
        logger.warning("step_out_of_memory", extra={"num_sequences": len(scheduled)})
        if self._loaded.device.type == "cuda":
            torch.cuda.empty_cache()
        if not self._scheduler.retreat(scheduled):
            self._scheduler.fail(scheduled[0].sequence.key, OutOfMemory())

    def _take_events(self) -> list[StepEvent]:
        events = self._scheduler.take_events()
        self._breaker.observe(events)
        if self._with_added_tokens:
            self._with_added_tokens -= {event.key for event in events if event.state.is_final}
        return events

    def _note_added_tokens(self, sequence: Sequence) -> None:
        """Remember a sequence with token ids that the adapter, once it is here, must know."""
        try:
            _check_tokens(sequence, self._loaded.targets.vocabulary)
        except InvalidSequence:
            self._with_added_tokens.add(sequence.key)

    def _knows_tokens(self, sequence: Sequence) -> bool:
        """Whether the adapter, now that it is resident, does; else the sequence fails."""
        if sequence.key not in self._with_added_tokens:
            return True
        self._with_added_tokens.remove(sequence.key)
        try:
            _check_tokens(sequence, self._runner.vocabulary(sequence.slot))
        except InvalidSequence as error:
            self._scheduler.fail(sequence.key, error)
            return False
        return True

    def status(self) -> CoreStatus:
        return CoreStatus(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + self._compiler.num_waiting,
            num_blocks=self._blocks.num_blocks,
            num_free_blocks=self._blocks.num_free_blocks,
            num_adapter_blocks=self._blocks.num_window_blocks,
            resident_adapters=self._slots.resident,
            hosted_adapters=self._slots.hosted,
            pinned_adapters=self._slots.pinned,
            quarantined_adapters=self._breaker.quarantined,
            tiers=self._slots.report(disk_bytes=self._adapter_source.size_bytes),
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

    # What operators want

    def warm(self, wish: Wish, *, fingerprint: str | None) -> None:
        """Bring an adapter near in the coming steps.

        Raises AdapterQuarantined or AdapterCorrupted.
        """
        self._breaker.check(wish.adapter_digest)
        self._certify(wish.adapter_digest, fingerprint)
        self._wishes.add(wish)
        self._is_stalled = False

    def give_up(self, wish: Wish) -> None:
        """Nobody waits for it any more."""
        self._wishes.drop(wish)

    def pin(self, adapter_digest: str) -> None:
        """Let an adapter stay in a slot, and come there when there is room. Raises TooManyPins.

        One that turns out not to load is not pinned any more.
        """
        self._slots.pin(adapter_digest)
        self._is_stalled = False

    def unpin(self, adapter_digest: str) -> AdapterPlace:
        self._slots.unpin(adapter_digest)
        self._is_stalled = False
        return self.place_of(adapter_digest)

    def forget(self, adapter_digest: str) -> Freed:
        """Let an adapter leave slot and host memory, once no sequence uses it."""
        self._is_stalled = False
        return self._slots.forget(adapter_digest)

    def forget_files(self, adapter_digest: str) -> int:
        """Remove an adapter's files from the disk tier; gives their bytes. From any thread."""
        return self._adapter_source.forget(adapter_digest)

    def place_of(self, adapter_digest: str) -> AdapterPlace:
        return AdapterPlace(
            adapter_digest=adapter_digest,
            is_resident=self._slots.is_near(adapter_digest, "device"),
            is_hosted=adapter_digest in self._slots.hosted,
            is_pinned=adapter_digest in self._slots.pinned,
        )

    def check_integrity(self) -> None:
        """Asserts that no block, slot or count has leaked."""
        self._scheduler.check_integrity()

    def close(self) -> None:
        """Wait for the threads."""
        self._compiler.close()
        self._adapter_loader.close()

    # Adapters

    def _read_adapter(self, digest: str, pace: Pace) -> PreparedAdapter:
        """Runs in a load thread."""
        compute_alone()
        with self._adapter_source.fetch(digest) as folder:
            adapter = self._prepare(folder, before_bytes=pace.take)
        try:
            self._fingerprints.check(digest, fingerprint_of(adapter.values))
        except AdapterCorrupted:
            # What the next read finds comes from the store, and is verified on its way.
            self._adapter_source.forget(digest)
            raise
        return adapter

    def _check_copy(self, digest: str, adapter: PreparedAdapter, window: Window) -> None:
        """Runs in a load thread. Raises AdapterCorrupted."""
        memory = self._memory.window(window.first, window.num_blocks)
        with self._checks or nullcontext():
            found = fingerprint_of(memory[: len(adapter.values)])
        self._fingerprints.check(digest, found)

    def _certify(self, digest: str, fingerprint: str | None) -> None:
        """Raises AdapterCorrupted."""
        if fingerprint is None:
            return
        try:
            self._fingerprints.certify(digest, fingerprint)
        except AdapterCorrupted:
            self._condemn(digest)
            raise

    def _prepare(
        self, folder: Path, *, before_bytes: Callable[[int], None] = lambda num_bytes: None
    ) -> PreparedAdapter:
        return prepared.prepare(
            folder,
            self._loaded.targets,
            base_model=self.base_shape.base_model,
            dtype=self._loaded.dtype,
            max_rank=self._max_lora_rank,
            is_pinned=self._loaded.device.type == "cuda",
            before_bytes=before_bytes,
        )

    def _take_loaded_adapters(self) -> None:
        for result in self._adapter_loader.take_results():
            fault = self._slots.take(result)
            if fault is not None:
                self._give_up_adapter(result.digest, fault)

    def _give_up_adapter(self, digest: str, fault: AdapterUnavailable) -> None:
        self._slots.unpin(digest)
        self._scheduler.fail_waiting_for(digest, fault)
        self._wishes.fail(digest, fault)
        if isinstance(fault, AdapterCorrupted):
            self._condemn(digest)
        elif fault.is_retryable:
            # What is missing is no fault of what serves it, and costs nobody else anything.
            self._breaker.record_fault(digest)

    def _condemn(self, digest: str) -> None:
        """What is in memory is not the adapter: use none of it again."""
        self._breaker.quarantine(digest, reason="is not what its probe found")
        self._slots.forget(digest)

    @contextmanager
    def _fetched(self, digest: str) -> Iterator[Path]:
        try:
            with self._adapter_source.fetch(digest) as folder:
                yield folder
        except Exception as error:
            logger.warning("probe_failed", extra={"digest": digest}, exc_info=True)
            reason = unavailable(digest, error)
            raise ProbeError(str(reason), is_retryable=reason.is_retryable) from error

    def _examine(self, folder: Path, digest: str) -> ProbeReport:
        bank, slot = self._loaded.bank, self._probe_slot
        adapter = self._prepare(folder)
        bank.install(slot, adapter, memory=adapter.values.to(self._loaded.device))
        try:
            report = probe.examine(
                folder, digest, slot=slot, loaded=self._loaded, runner=self._runner
            )
            return msgspec.structs.replace(report, fingerprint=fingerprint_of(adapter.values))
        finally:
            bank.clear(slot)


def _check_tokens(sequence: Sequence, vocabulary: Vocabulary) -> None:
    """Raises InvalidSequence where it names a token that is not known."""
    ids, num_ids = sequence.token_ids, vocabulary.num_input_ids
    if not 0 <= min(ids) <= max(ids) < num_ids:
        raise InvalidSequence(f"Token ids must be from 0 to {num_ids - 1}.")
    num_ids = vocabulary.num_output_ids
    if not all(0 <= token_id < num_ids for token_id in sequence.sampling.logit_bias):
        raise InvalidSequence(f"logit_bias must name token ids from 0 to {num_ids - 1}.")


def _is_out_of_memory(error: Exception) -> bool:
    is_named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_named or NO_HOST_MEMORY in str(error)


def _check_wish(sequence: Sequence, vocab_size: int) -> None:
    """Raises InvalidSequence."""
    if sequence.pool is None:
        _check_sampling(sequence.sampling, vocab_size)
    elif (
        sequence.sampling != SamplingParams(max_tokens=0)
        or sequence.num_generated_tokens
        or sequence.grammar is not None
    ):
        raise InvalidSequence(
            "With pooling no token is generated: max_tokens must be 0, and all else that is about"
            " an answer left out."
        )


def _check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Raises InvalidSequence."""
    problems = {
        "max_tokens must be at least 1.": params.max_tokens >= 1,
        "seed must be from 0 to 2^64 - 1.": 0 <= params.seed < 2**64,
        "temperature must be finite and at least 0.": 0 <= params.temperature < math.inf,
        "top_p must be above 0 and at most 1.": 0 < params.top_p <= 1,
        "top_k must be at least 0.": params.top_k >= 0,
        "min_p must be from 0 to 1.": 0 <= params.min_p <= 1,
        "presence_penalty must be from -2 to 2.": -2 <= params.presence_penalty <= 2,
        "frequency_penalty must be from -2 to 2.": -2 <= params.frequency_penalty <= 2,
        "repetition_penalty must be finite and above 0.": 0 < params.repetition_penalty < math.inf,
        "logit_bias must have values from -100 to 100.": all(
            -100 <= bias <= 100 for bias in params.logit_bias.values()
        ),
        "min_tokens must be from 0 to max_tokens.": 0 <= params.min_tokens <= params.max_tokens,
        f"logprobs must be from 0 to {vocab_size}.": 0 <= (params.logprobs or 0) <= vocab_size,
        f"prompt_logprobs must be from 0 to {vocab_size}.": (
            0 <= (params.prompt_logprobs or 0) <= vocab_size
        ),
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
        memory_bytes=config.memory_bytes,
        gpu_memory_utilization=config.gpu_memory_utilization,
        adapter_bytes=config.max_loras * _largest_adapter_bytes(config, loaded),
    )
    if num_blocks < 1:
        raise ConfigurationError(
            "No memory is left for the KV cache and adapters: raise memory_bytes or "
            "gpu_memory_utilization."
        )
    return num_blocks


def _largest_adapter_bytes(config: EngineConfig, loaded: LoadedModel) -> int:
    num_elements = prepared.num_elements(
        np.array(list(loaded.base_shape.modules.values())), config.max_lora_rank
    )
    return num_elements * loaded.dtype.itemsize


def _fitting_length(config: EngineConfig, loaded: LoadedModel, num_blocks: int) -> int:
    """The longest sequence: one that was asked for, or what fits beside the largest adapter."""
    num_left = num_blocks
    if config.max_loras:
        block_bytes = runner.block_bytes(loaded, block_size=config.block_size)
        is_asked_for = config.max_model_len is not None
        num_left -= 1 if is_asked_for else -(-_largest_adapter_bytes(config, loaded) // block_bytes)
    fitting = num_left * config.block_size
    if fitting < 1 or (config.max_model_len is not None and fitting < loaded.max_model_len):
        raise ConfigurationError(
            f"The memory holds {max(0, fitting)} tokens beside adapters, max_model_len is "
            f"{loaded.max_model_len}: lower it or max_lora_rank, or raise memory_bytes."
        )
    return min(loaded.max_model_len, fitting)
