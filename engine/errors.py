"""What can go wrong in the engine, as one tree.

EngineError
├── ConfigurationError         the engine cannot start like this
│   └── UnsupportedModel       the engine would compute this model wrongly
├── SequenceError              one sequence cannot run, or run on; the others never notice
│   ├── InvalidSequence
│   ├── ContextLengthExceeded
│   ├── InvalidGrammar
│   ├── GrammarTooComplex      known only once it is used
│   ├── GrammarUnavailable     the tokenizer that it needs cannot be had now
│   ├── AdapterUnavailable     may come back
│   ├── AdapterMissing         will not come back by itself
│   ├── AdapterCorrupted       is not what its probe found; is read anew later
│   ├── AdapterQuarantined     failed again and again; is tried again later
│   ├── InvalidLogits
│   │   └── InvalidStates      of a prompt that is pooled
│   ├── NoTokenLeft
│   └── OutOfMemory            may go through when less runs beside it
├── ProbeError                 a probe could not be run; says nothing about the adapter
├── LinkRefused                the engine refuses a worker's call as a whole, with an HTTP status
│   ├── MalformedCall
│   ├── SecretMismatch
│   ├── NotConnected
│   ├── StaleEpoch
│   ├── FramesGone
│   ├── TooManyPins            an operator wants more adapters to stay than can
│   ├── NoRoom                 an adapter that no sequence waits for found no place for a while
│   └── EngineStopped
└── LinkError                  what a worker sees of a link or a stream that broke
    ├── EngineLost
    ├── EngineUnreachable
    ├── EngineRefused
    └── SlowConsumer
"""

from engine.protocol import SequenceFault


class EngineError(Exception):
    """The engine failed."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.__doc__)


class ConfigurationError(EngineError):
    """The engine cannot start with this configuration."""


class UnsupportedModel(ConfigurationError):
    """This model's code does not let the engine compute it correctly."""


class SequenceError(EngineError):
    """A sequence cannot be run."""

    code = "engine_error"
    is_retryable = False

    def fault(self) -> SequenceFault:
        return SequenceFault(code=self.code, message=str(self), is_retryable=self.is_retryable)


class InvalidSequence(SequenceError):
    """The sequence asks for something that makes no sense."""

    code = "invalid_sequence"


class ContextLengthExceeded(SequenceError):
    """Prompt and answer do not fit into the model's context."""

    code = "context_length_exceeded"


class InvalidGrammar(SequenceError):
    """The grammar cannot be used."""

    code = "invalid_grammar"


class GrammarTooComplex(SequenceError):
    """The grammar takes too long to follow: simplify it."""

    code = "grammar_too_complex"


class GrammarUnavailable(SequenceError):
    """The tokenizer that the grammar needs could not be loaded now."""

    code = "grammar_unavailable"
    is_retryable = True


class AdapterUnavailable(SequenceError):
    """The adapter could not be loaded now."""

    code = "adapter_unavailable"
    is_retryable = True


class AdapterMissing(AdapterUnavailable):
    """The adapter's files are missing or unusable."""

    is_retryable = False


class AdapterCorrupted(AdapterUnavailable):
    """What was loaded is not the adapter that was probed."""

    code = "adapter_corrupted"


class AdapterQuarantined(SequenceError):
    """The adapter failed several times and is not used for a while."""

    code = "adapter_quarantined"
    is_retryable = True


class InvalidLogits(SequenceError):
    """The model gave NaN or infinite logits for this sequence."""

    code = "nan_logits"


class InvalidStates(InvalidLogits):
    """The model gave NaN or infinite hidden states for this sequence."""


class NoTokenLeft(SequenceError):
    """Grammar, penalties, logit_bias and min_tokens leave no token to choose: relax them."""

    code = "no_token_left"


class OutOfMemory(SequenceError):
    """The device had not enough memory left for even the smallest step of this sequence."""

    code = "engine_out_of_memory"
    is_retryable = True


class ProbeError(EngineError):
    """The probe could not be run."""

    def __init__(self, message: str | None = None, *, is_retryable: bool = False) -> None:
        super().__init__(message)
        self.is_retryable = is_retryable


class LinkRefused(EngineError):
    """The engine refuses this call."""

    status = 409
    code = "refused"


class MalformedCall(LinkRefused):
    """The body or the query of this call cannot be read."""

    status, code = 400, "malformed"


class SecretMismatch(LinkRefused):
    """The secret is missing or is not the engine's."""

    status, code = 401, "secret_mismatch"


class NotConnected(LinkRefused):
    """This worker has no session here: read /v1/frames first."""

    code = "not_connected"


class StaleEpoch(LinkRefused):
    """A later start of this worker has taken its place."""

    code = "stale_epoch"


class FramesGone(LinkRefused):
    """The frames asked for are gone, and so are this worker's sequences."""

    status, code = 410, "frames_gone"


class TooManyPins(LinkRefused):
    """One slot must be left to adapters that are not pinned: unpin another first."""

    code = "too_many_pins"


class NoRoom(LinkRefused):
    """No room came free for the adapter: what could make it is in use. Try again later."""

    status, code = 503, "no_room"


class EngineStopped(LinkRefused):
    """The engine's thread has ended."""

    status, code = 503, "engine_stopped"


class LinkError(EngineError):
    """The link to the engine failed."""

    is_retryable = True


class EngineLost(LinkError):
    """The engine is gone or has forgotten this sequence; it can be submitted again."""


class EngineUnreachable(LinkError):
    """The engine does not answer."""


class EngineRefused(LinkError):
    """The engine refused a call; says why."""

    is_retryable = False

    def __init__(self, message: str | None = None, *, code: str = "refused") -> None:
        super().__init__(message)
        self.code = code


class SlowConsumer(LinkError):
    """Events of this sequence were not taken in time; it was aborted."""

    is_retryable = False
