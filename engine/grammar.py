"""What an answer has to look like, and which tokens keep it so.

Compiles grammars with `llguidance` (Brzozowski's derivatives for words, Earley's parser above
them), which is imported at their first use: the core runs without it. Imports no torch, because
the gateway tries grammars here before it takes them. Knows nothing of batches, threads or HTTP.
"""

import re
import time
from typing import TYPE_CHECKING

from engine.errors import GrammarTooComplex, InvalidGrammar
from engine.protocol import GrammarKind

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# About what other servers take; five thousand words to choose from fit in.
MAX_GRAMMAR_CHARACTERS = 128 * 1024
# Between the words of JSON: nothing, one space, or a new line with its indentation. Any style that
# a model has learnt, and none in which it could go on for ever without saying anything.
JSON_WHITESPACE = r"\n {0,32}| "
# Masks of usual schemas take 20 us each, and 5 ms where the limits end them. A whole batch waits
# for the slowest, so nobody may be slow for long: of a processor, for each token and once.
MAX_MASK_NS_PER_TOKEN = 1_000_000
MAX_MASK_BURST_NS = 50_000_000
# Of what the library says, which may go on for pages.
MAX_REASON_CHARACTERS = 300
_DETAILS = re.compile(r"\s*<(?:backtrace|state|non-verbose/?)>")
# What it says of itself, and what that means to others.
_MEANINGS = {
    "panic": "it is too large",
    "too big": "it is too large",
    "too many expressions": "it is too large",
    "fuel exhausted": "it is too large",
    "NoExtensionBias": "no text satisfies it",
    "coerce_one_of": "the alternatives of a oneOf may overlap: use anyOf, or give each a const",
    "retrieving it failed": "a $ref leads out of the schema",
}


def limits() -> "LLParserLimits":
    """A quarter of the library's own and less: these are for one program, not for many tenants."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=400_000,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        # Each takes one or two kB, in each sequence.
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        # Would look at the whole vocabulary before the first token.
        precompute_large_lexemes=False,
        # They would quote the answer.
        verbose_errors=False,
    )


def tokenizer_of(
    tokenizer_json: bytes, *, vocab_size: int, eos_token_ids: list[int]
) -> "LLTokenizer":
    """Raises InvalidGrammar where grammars can't be followed with this tokenizer."""
    from llguidance import LLTokenizer

    text = tokenizer_json.decode()
    # Anything but JSON would be taken for the name of a file.
    if not text.lstrip().startswith("{"):
        raise InvalidGrammar("The model's tokenizer cannot be read.")
    try:
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=eos_token_ids)
    except ValueError as error:
        raise InvalidGrammar(
            f"This model's tokenizer cannot be used with a grammar: {_short(str(error))}"
        ) from error


def compiled(kind: GrammarKind, text: str, tokenizer: "LLTokenizer") -> "LLMatcher":
    """Where every answer begins; to be copied. Raises InvalidGrammar.

    Holds up no other thread, but may take very long: its limits count what it makes, not what it
    looks at.
    """
    from llguidance import LLMatcher

    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise InvalidGrammar(
            f"It has {len(text)} characters, above the {MAX_GRAMMAR_CHARACTERS} that are taken."
        )
    try:
        grammar = _spelled(kind, text)
    except ValueError as error:
        raise InvalidGrammar(_short(str(error))) from error
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
    if matcher.is_error():
        raise InvalidGrammar(_short(matcher.get_error()))
    return matcher


def _spelled(kind: GrammarKind, text: str) -> str:
    from llguidance import LLMatcher

    match kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(
                text,
                overrides={
                    "lenient": False,
                    "coerce_one_of": False,
                    "whitespace_flexible": True,
                    "whitespace_pattern": JSON_WHITESPACE,
                },
            )
        case "regex":
            return LLMatcher.grammar_from_regex(text)
        case "lark":
            return LLMatcher.grammar_from_lark(text)


def _short(reason: str) -> str:
    """The library's reason without its own state, in one line."""
    reason = " ".join(_DETAILS.split(reason)[0].split())
    for sign, meaning in _MEANINGS.items():
        if sign in reason:
            return meaning
    return reason[:MAX_REASON_CHARACTERS]


class GrammarWalk:
    """How far one sequence has come in its grammar. Mutable; the sampler's alone once it runs.

    Catches up with what the sequence has generated when it is next asked, so it does not matter
    whether a step counted, or who generated the first tokens.
    """

    def __init__(self, start: "LLMatcher", *, vocab_size: int) -> None:
        self._matcher = start.deep_copy()
        self._num_consumed = 0
        self._cpu_ns = 0
        # One bit a token, in words of 32, as the library wants it.
        self.num_mask_bytes = -(-vocab_size // 32) * 4

    def catch_up(self, token_ids: list[int], *, first: int) -> None:
        """Take what was generated since the last time: `token_ids` from `first` on.

        Raises InvalidGrammar where it is not what the grammar allows.
        """
        new = token_ids[first + self._num_consumed :]
        self._num_consumed += len(new)
        if new and not self._matcher.consume_tokens(new):
            raise InvalidGrammar("The tokens that were generated before do not fit it.")

    def write_mask(self, address: int) -> None:
        """Set `num_mask_bytes` there: the lowest bit of the first byte stands for token 0.

        Raises GrammarTooComplex.
        """
        started_ns = time.thread_time_ns()
        self._matcher.unsafe_compute_mask_ptr(address, self.num_mask_bytes)
        self._cpu_ns += time.thread_time_ns() - started_ns
        if self._matcher.is_error():
            raise GrammarTooComplex(
                f"The grammar became too complex after {self._num_consumed} tokens:"
                f" {_short(self._matcher.get_error())}"
            )
        if self._cpu_ns > MAX_MASK_BURST_NS + self._num_consumed * MAX_MASK_NS_PER_TOKEN:
            raise GrammarTooComplex


def fault_of(kind: GrammarKind, text: str, tokenizer: "LLTokenizer") -> str | None:
    """Compile a grammar and ask it for the first token; tells what is wrong with it."""
    try:
        matcher = compiled(kind, text, tokenizer)
    except InvalidGrammar as error:
        return str(error)
    matcher.compute_bitmask()
    return _short(matcher.get_error()) if matcher.is_error() else None
