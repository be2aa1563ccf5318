"""The words that a gateway worker and an engine exchange.

    POST /v1/commands   `CommandBatch`, one per event-loop tick of the worker
    GET  /v1/frames     ?worker=&epoch=&after=&resume=0|1: one long response of `Frame`s
    GET  /v1/info       `EngineInfo`
    GET  /v1/status     `EngineStatus`
    POST /v1/probe      `ProbeRequest` -> `ProbeReport`
    POST /v1/warm       `WarmRequest` -> `AdapterPlace`, when the adapter is there
    POST /v1/pin        `PinRequest` -> `AdapterPlace`, when it is there or has to wait long
    POST /v1/unpin      `UnpinRequest` -> `AdapterPlace`
    POST /v1/forget     `ForgetRequest` -> `ForgetReport`
    GET  /health        200 while the engine thread lives; the one route that needs no secret

All bodies are msgpack, those of refusals too (`EngineProblem`). On the frames response each frame
is preceded by its length as 4 bytes, little endian. With resume=1 the frames after `after` follow,
or 410 says that they are gone and that the worker's sequences are aborted; with resume=0 all that
the worker had running is aborted and numbering goes on after `after`. A secret travels as
`Authorization: Bearer`.

Imports no torch: the gateway reads this module.
"""

import enum
import struct
from typing import Literal

import msgspec

from adapters.base_shape import BaseShape
from adapters.text_bundle import PoolingKind

PROTOCOL_VERSION = 5
FRAME_LENGTH = struct.Struct("<I")
MSGPACK = "application/msgpack"
# Largest body that an engine reads: a batch of a few million token ids.
MAX_BODY_BYTES = 32 * 1024**2
# An address is this followed by the path of a socket, or http://host:port.
UNIX_PREFIX = "unix:"
# The most urgent class and the least.
MIN_PRIORITY, MAX_PRIORITY = -100, 100


def bearer(secret: str) -> str:
    """The Authorization header of a secret. Raises ValueError, which does not show the secret."""
    if not secret or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise ValueError("the engine's secret must be visible ASCII characters without spaces")
    return f"Bearer {secret}"


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How the tokens of one sequence are chosen.

    On the model's logits, in this order: the sequence's grammar; repetition_penalty,
    frequency_penalty and presence_penalty, logit_bias, the ban on stop tokens before min_tokens;
    then temperature; then top_k, top_p within what top_k leaves, and min_p. With temperature 0 the
    likeliest is taken, of equals the lowest id. The noise of the token at position p depends on
    (seed, p) alone, so batch, preemption and replica change nothing.

    EOS ids are in `stop_token_ids` unless the caller wants them ignored: leaving them out is
    ignoring them. Several answers to one prompt are as many submits, each with a seed of its own.
    """

    # Most tokens to generate, those of an earlier attempt (`generated_token_ids`) included; 0 of a
    # prompt that is pooled.
    max_tokens: int
    # 64-bit unsigned; the gateway draws one when the client named none.
    seed: int = 0
    # 0 means greedy.
    temperature: float = 1.0
    top_p: float = 1.0
    # 0 means no limit.
    top_k: int = 0
    # Only tokens with at least this share of the likeliest one's probability; 0 means no limit.
    min_p: float = 0.0
    # Taken off the logit of a token that was generated before, once, and once for each time.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # Divides the logit of a token of the prompt or the answer, or multiplies a negative one.
    repetition_penalty: float = 1.0
    # Token id -> what is added to its logit.
    logit_bias: dict[int, float] = {}
    # No stop token is chosen before this many generated, those of an earlier attempt included.
    min_tokens: int = 0
    # Generation ends with the first of these; it is delivered and counted like any other token.
    stop_token_ids: tuple[int, ...] = ()
    # How many alternatives to report beside each token's own log-probability; None reports neither.
    logprobs: int | None = None
    # As `logprobs` for each prompt token but the first, told with the first token that is
    # generated; an attempt that goes on after an earlier one's tokens does not tell them again.
    prompt_logprobs: int | None = None


GrammarKind = Literal["json_schema", "regex", "lark"]


class Grammar(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an answer has to look like: no token is chosen after which it no longer could.

    An end-of-text token may come once the answer is whole, and must come once nothing else may:
    this goes before `min_tokens`. Whoever submits it has tried it within bounded time, for some
    that are short take minutes.
    """

    kind: GrammarKind
    # A JSON schema; a regular expression in Rust's syntax; a grammar in Lark's.
    text: str
    # Of the tokenizer that turns the tokens into text: the adapter's own, or the base model's.
    text_bundle_digest: str


class Submit(
    msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, tag="submit"
):
    """Start a sequence."""

    # Chosen by the worker, growing within its epoch: one that is not higher than all before came
    # in a batch that was sent twice, and is passed over.
    sequence_id: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    # Weights digest of the adapter, 64 hexadecimal digits; None is the base model alone.
    adapter_digest: str | None = None
    # Of the adapter's probe: what is loaded must have it. None where no probe told one.
    adapter_fingerprint: str | None = None
    # Tokens that an earlier attempt delivered: generation goes on after them.
    generated_token_ids: list[int] = []
    # Separates the KV prefixes of those who must not share them.
    cache_salt: bytes = b""
    # Whose turn it is: opaque here, the tenant in the gateway.
    fairness_key: str = ""
    weight: float = 1.0
    # Of what waits, the least goes first, as in vLLM and in Unix: -1 is more urgent than 0. Strict,
    # so what is less urgent may wait for as long as more urgent work keeps coming.
    priority: int = 0
    # None leaves the answer free.
    grammar: Grammar | None = None
    # None generates. Otherwise no token is, and the last event has the prompt's vector. A mean is
    # of the states of all tokens, so it finds none in the prefix cache, and leaves its own there.
    pooling: PoolingKind | None = None


class Abort(
    msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, tag="abort"
):
    """End a sequence within one step; one that has ended already is not an error."""

    sequence_id: int


Command = Submit | Abort


class CommandBatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that one worker has to say in one event-loop tick."""

    worker_id: str
    # Grows with each start of the worker; a new epoch replaces the old and aborts its sequences.
    worker_epoch: int
    # Number of the last frame that the worker has taken over; the engine forgets up to here.
    acknowledged: int
    commands: list[Command]


class SequenceState(enum.StrEnum):
    """Where a sequence stands after the step that a frame tells of."""

    RUNNING = "running"
    STOPPED = "stop"
    LENGTH = "length"
    ABORTED = "abort"
    FAILED = "error"

    def __init__(self, word: str) -> None:
        # No property: it is asked for several times for each token.
        self.is_final = word != "running"


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural log-probability of a token and of the likeliest alternatives at its place.

    Taken from the model's own distribution, before all that `SamplingParams` does to it.
    """

    logprob: float
    # (token id, log-probability), likeliest first.
    top: list[tuple[int, float]] = []


class SequenceFault(msgspec.Struct, frozen=True, array_like=True):
    """Why a sequence ended with `FAILED`."""

    # e.g. "adapter_unavailable", "adapter_corrupted", "adapter_quarantined", "nan_logits",
    # "context_length_exceeded", "engine_out_of_memory", "invalid_grammar", "grammar_too_complex"
    code: str
    message: str
    # Whether the same submit may succeed later or elsewhere.
    is_retryable: bool


class SequenceEvent(msgspec.Struct, frozen=True, array_like=True):
    """What one step did to one sequence. Counters are cumulative: applying twice does no harm."""

    sequence_id: int
    state: SequenceState
    # New since the last event of this sequence.
    token_ids: list[int]
    prompt_tokens: int
    # How many of the prompt tokens came from the prefix cache.
    cached_tokens: int
    # All generated so far, those of an earlier attempt included.
    generated_tokens: int
    # This sequence's share of the time of all its steps.
    engine_ns: int
    # One for each of `token_ids`, where asked for.
    logprobs: list[TokenLogprob] | None = None
    fault: SequenceFault | None = None
    # Of the prompt tokens but the first, where asked for; in one event only.
    prompt_logprobs: list[TokenLogprob] | None = None
    # From the submit until the adapter sat in a slot; 0 where it did at once, or none is used.
    adapter_wait_ns: int = 0
    # Of a prompt that was pooled: float32, little endian, scaled to length one.
    vector: bytes | None = None


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """All that happened to one worker's sequences in one engine step.

    Steps that end faster than the engine can tell of them share a frame: then a sequence has an
    event of each of them, in order.

    Numbers grow by one within a (worker, epoch), from 1, over reconnects too. A heartbeat is a
    frame without events that repeats the last number; one goes out each second in which nothing
    else does.
    """

    number: int
    # Changes with each start of the engine; sequences of another engine epoch are gone.
    engine_epoch: int
    events: list[SequenceEvent]


class EngineInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine serves; constant for the life of the process."""

    protocol_version: int
    engine_epoch: int
    # The served name of the base model.
    base_model: str
    # SHA-256 over the model's configuration and the names, dtypes and shapes of its tensors.
    base_digest: str
    # Digest of the exported text bundle, to be read from the store.
    text_bundle_digest: str
    # Most tokens of prompt and answer together.
    max_model_len: int
    vocab_size: int
    max_loras: int
    max_lora_rank: int
    device: str
    dtype: str
    base_shape: BaseShape


class TierReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the adapter tiers hold, and what has moved through them since the engine's start."""

    # From disk into host memory.
    num_reads: int
    num_read_bytes: int
    # From host memory into slots.
    num_copies: int
    num_copied_bytes: int
    # Reads and copies that came to nothing.
    num_load_failures: int
    # Adapters that were not in memory what their probe, or an earlier load, had found.
    num_fingerprint_mismatches: int
    num_slot_evictions: int
    num_host_evictions: int
    disk_bytes: int
    host_bytes: int
    device_bytes: int


class EngineStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an engine is doing now."""

    engine_epoch: int
    is_healthy: bool
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    # Those in which adapters lie.
    num_adapter_blocks: int
    # Weights digests of the adapters that sit in a slot, and of those in host memory.
    resident_adapters: list[str]
    hosted_adapters: list[str]
    # Those that an operator wants to stay in a slot, whether they are there yet or not.
    pinned_adapters: list[str]
    # Those that failed several times and are refused for a while.
    quarantined_adapters: list[str]
    tiers: TierReport
    # How long all sequences that have ended waited for their adapters, together.
    adapter_wait_ms: int


class EngineProblem(msgspec.Struct, frozen=True):
    """The body of every refusal of a call as a whole."""

    code: str
    message: str


Tier = Literal["host", "device"]


class WarmRequest(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """Bring an adapter near without a sequence: into host memory, or on into a slot.

    It is given what is free and what idles unwanted. Refused where it cannot be loaded, or where
    no room came free for it in a while.
    """

    adapter_digest: str
    to: Tier = "device"
    # As in `Submit.adapter_fingerprint`.
    fingerprint: str | None = None


class PinRequest(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """Bring an adapter into a slot and let it stay there until it is unpinned or forgotten.

    One slot is always left to the others, and one that fits in no other way takes a pinned one's
    place for as long as it is used. Refused where the adapter cannot be loaded.
    """

    adapter_digest: str
    # As in `Submit.adapter_fingerprint`.
    fingerprint: str | None = None


class UnpinRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Let an adapter go when another needs its place; one that is not pinned is no error."""

    adapter_digest: str


class ForgetRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Unpin an adapter and let it leave slot, host memory and disk, once no sequence uses it."""

    adapter_digest: str


class AdapterPlace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where an adapter is now."""

    adapter_digest: str
    is_resident: bool
    is_hosted: bool
    is_pinned: bool


class ForgetReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What came free at once."""

    adapter_digest: str
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    # Whether sequences or loads still use it: what they hold comes free when they end.
    is_in_use: bool


class ProbeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Run fixed prompts with an adapter, between steps, and measure it."""

    adapter_digest: str


class ProbeCoverage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much of an adapter a probe has seen."""

    # "lora", "dora", "parameters" and "tokens" -> modules; one may be of several kinds.
    num_modules_by_kind: dict[str, int]
    # Numbers in the adapter's tensors.
    num_parameters: int
    # 0 without LoRA.
    min_rank: int
    max_rank: int
    # |W' - W| / |W| of what takes the place of a module's weights W; biases do not count.
    largest_relative_norm: float
    median_relative_norm: float


class ProbeReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What running fixed prompts with an adapter showed.

    Errors are relative: |module output - fp32 recomputation| / |recomputation|.
    """

    weights_digest: str
    num_modules: int
    largest_relative_error: float
    error_bound: float
    # Largest change of a logit against the base model alone, and what noise alone would give.
    logit_shift: float
    noise: float
    # Modules that the adapter targets and that no prompt reached, or whose output did not change.
    untouched_modules: list[str]
    is_passed: bool
    # Of the adapter's values as they were prepared; whatever loads it later compares.
    fingerprint: str | None = None
    # None in reports of engines that did not tell.
    coverage: ProbeCoverage | None = None
