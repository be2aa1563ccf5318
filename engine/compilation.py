"""Compile the grammars of sequences in threads, beside the steps, and remember what was compiled.

A sequence waits here until it can be scheduled. Knows sequences and text bundles. Knows nothing of
schedules or logits.
"""

import hashlib
import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapters.errors import AdapterError
from adapters.text_bundle import TextBundle
from engine import grammar
from engine.adapter_loader import step_aside
from engine.errors import GrammarUnavailable, InvalidGrammar, SequenceError
from engine.grammar import GrammarWalk
from engine.protocol import Grammar
from engine.sequence import Sequence, SequenceKey

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

# One that is slow, or that waits for the store, leaves the other to everybody else.
NUM_THREADS = 2
# A tokenizer of 128,000 tokens takes some 50 MB, most grammars some 100 kB.
MAX_VOCABULARIES = 8
MAX_GRAMMARS = 256

# Grammar's digest and that of the text bundle.
_GrammarKey = tuple[bytes, str]


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    tokenizer: "LLTokenizer"
    vocab_size: int


@dataclass(frozen=True, slots=True)
class _Compiled:
    start: "LLMatcher"
    vocab_size: int


@dataclass(slots=True)
class Compiler:
    """Gives each sequence with a grammar its walk. All but the threads' own is one thread's.

    `bundle_of` reads a text bundle, in a thread; raises AdapterError where it can't be had.
    `on_result` is called in a thread when `take_results` has something to tell.
    """

    bundle_of: Callable[[str], TextBundle]
    on_result: Callable[[], None]
    _threads: ThreadPoolExecutor = field(init=False)
    _results: "queue.SimpleQueue[tuple[Sequence, GrammarWalk | SequenceError]]" = field(
        default_factory=queue.SimpleQueue
    )
    _waiting: dict[SequenceKey, Sequence] = field(default_factory=dict)
    # The least used first. Those that are being compiled are here too; failures are not kept.
    _grammars: "OrderedDict[_GrammarKey, Future[_Compiled]]" = field(default_factory=OrderedDict)
    # By what they are made of, for several bundles may differ in their templates alone.
    _vocabularies: OrderedDict[bytes, _Vocabulary] = field(default_factory=OrderedDict)
    # The threads share the vocabularies.
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(
            NUM_THREADS, thread_name_prefix="grammar", initializer=step_aside
        )

    def __contains__(self, key: SequenceKey) -> bool:
        return key in self._waiting

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def has_results(self) -> bool:
        return not self._results.empty()

    def start(self, sequence: Sequence) -> None:
        """The sequence comes back with one of the next `take_results`."""
        assert sequence.grammar is not None
        self._waiting[sequence.key] = sequence
        future = self._future(sequence.grammar)
        future.add_done_callback(lambda done: self._finish(sequence, done))

    def give_up(self, key: SequenceKey) -> Sequence | None:
        """Nobody waits for this one any more; None where it does not wait here."""
        return self._waiting.pop(key, None)

    def take_results(self) -> list[tuple[Sequence, GrammarWalk | SequenceError]]:
        """Those that can be scheduled, and those that never can."""
        taken = []
        while self.has_results():
            sequence, outcome = self._results.get()
            if self._waiting.pop(sequence.key, None) is not None:
                taken.append((sequence, outcome))
        return taken

    def close(self) -> None:
        """Wait for what is being compiled."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _future(self, wanted: Grammar) -> "Future[_Compiled]":
        content = f"{wanted.kind}\n{wanted.text}".encode(errors="surrogatepass")
        key = hashlib.sha256(content).digest(), wanted.text_bundle_digest
        future = self._grammars.get(key)
        if future is None or (future.done() and future.exception() is not None):
            future = self._grammars[key] = self._threads.submit(self._compile, wanted)
            if len(self._grammars) > MAX_GRAMMARS:
                self._grammars.popitem(last=False)
        self._grammars.move_to_end(key)
        return future

    # Called in a thread, or at once where the grammar is known

    def _finish(self, sequence: Sequence, done: "Future[_Compiled]") -> None:
        if done.cancelled():
            return
        outcome: GrammarWalk | SequenceError
        try:
            made = done.result()
            outcome = GrammarWalk(made.start, vocab_size=made.vocab_size)
            outcome.catch_up(sequence.token_ids, first=sequence.num_prompt_tokens)
        except SequenceError as error:
            outcome = error
        except Exception:
            # Ours or the library's: the sequence must not wait for ever.
            logger.exception("grammar_failed")
            outcome = GrammarUnavailable("The grammar could not be compiled.")
        self._results.put((sequence, outcome))
        self.on_result()

    # All below runs in a thread.

    def _compile(self, wanted: Grammar) -> _Compiled:
        try:
            vocabulary = self._vocabulary(wanted.text_bundle_digest)
        except AdapterError as error:
            raise GrammarUnavailable(f"The model's tokenizer cannot be read: {error}") from error
        start = grammar.compiled(wanted.kind, wanted.text, vocabulary.tokenizer)
        return _Compiled(start, vocabulary.vocab_size)

    def _vocabulary(self, text_bundle_digest: str) -> _Vocabulary:
        bundle = self.bundle_of(text_bundle_digest)
        if not bundle.eos_token_ids:
            raise InvalidGrammar("This model has no token that ends an answer.")
        facts = repr((bundle.vocab_size, bundle.eos_token_ids)).encode()
        content = hashlib.sha256(facts + bundle.tokenizer_json).digest()
        with self._lock:
            found = self._vocabularies.get(content)
            if found is None:
                tokenizer = grammar.tokenizer_of(
                    bundle.tokenizer_json,
                    vocab_size=bundle.vocab_size,
                    eos_token_ids=list(bundle.eos_token_ids),
                )
                found = self._vocabularies[content] = _Vocabulary(tokenizer, bundle.vocab_size)
            self._vocabularies.move_to_end(content)
            while len(self._vocabularies) > MAX_VOCABULARIES:
                self._vocabularies.popitem(last=False)
        return found
