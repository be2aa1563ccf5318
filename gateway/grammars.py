"""Try what clients want their answers to look like, before anything is held or computed.

A grammar is a stranger's program: a line of it may take minutes and gigabytes to compile. So it is
read and compiled in `gateway.template_worker` first, under a clock and a memory limit. Nobody has
two tried at once, and what is known is not tried again. Knows nothing of models.
"""

import asyncio
import hashlib
import logging
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from weakref import WeakValueDictionary

from engine.grammar import MAX_GRAMMAR_CHARACTERS
from gateway.errors import GatewayError, InvalidRequest, LimitReached, Unavailable
from gateway.template_worker import Examine, Examined, GrammarForm
from gateway.templates import MAX_STOPS, STOPS_WINDOW_S, History, Lost, Worker

logger = logging.getLogger(__name__)

NUM_WORKERS = 2
# Schemas of five thousand words, or of a thousand required properties, take a tenth of it.
MAX_CPU_S = 0.5
# Last resort for a worker that neither answers nor uses its processor.
PATIENCE_S = 30.0
MAX_WAITING = 64
# Each up to 128 kB.
MAX_VERDICTS = 256
MAX_HISTORIES = 4096


class InvalidGrammar(InvalidRequest):
    """What the answer has to look like cannot be followed."""

    code = "invalid_grammar"


class InvalidSchema(InvalidGrammar):
    """The JSON schema cannot be followed."""

    code = "invalid_json_schema"


@dataclass(frozen=True, slots=True)
class AskedGrammar:
    """What a client wants its answer to look like."""

    form: GrammarForm
    text: str
    # The field that says so.
    param: str


class Grammars:
    """The workers, and what they found. `close` it in the loop that used it."""

    def __init__(self, *, max_cpu_s: float = MAX_CPU_S) -> None:
        self._max_cpu_s = max_cpu_s
        self._workers = [Worker("grammar") for _ in range(NUM_WORKERS)]
        self._idle: asyncio.Queue[Worker] = asyncio.Queue()
        for worker in self._workers:
            self._idle.put_nowait(worker)
        # By what was asked, the least used first.
        self._verdicts: OrderedDict[bytes, Examined] = OrderedDict()
        # Held by the one of a caller's that is being tried.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._num_waiting = Counter[str]()
        self._histories: OrderedDict[str, History] = OrderedDict()

    async def examine(self, asked: AskedGrammar, *, caller: str) -> Examined:
        """The grammar as the engine takes it; `caller` takes turns with others.

        Raises InvalidGrammar, LimitReached where too many of this caller's wait or had to be
        stopped, Unavailable where no worker can be had.
        """
        if len(asked.text) > MAX_GRAMMAR_CHARACTERS:
            raise _refusal(
                asked,
                f"it has {len(asked.text)} characters, above the {MAX_GRAMMAR_CHARACTERS} that"
                " are taken",
            )
        key = hashlib.sha256(f"{asked.form}\n{asked.text}".encode()).digest()
        verdict = self._verdicts.get(key) or await self._in_turn(key, asked, caller=caller)
        self._verdicts[key] = verdict
        self._verdicts.move_to_end(key)
        if len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)
        if verdict.fault is not None:
            raise _refusal(asked, verdict.fault)
        return verdict

    async def close(self) -> None:
        """End the workers."""
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    async def _in_turn(self, key: bytes, asked: AskedGrammar, *, caller: str) -> Examined:
        if self._num_waiting[caller] >= MAX_WAITING:
            raise _later(f"{MAX_WAITING} of your grammars wait to be tried", wait_s=1)
        turn = self._turns.setdefault(caller, asyncio.Lock())
        self._num_waiting[caller] += 1
        try:
            async with turn:
                # The one before may have been the same.
                return self._verdicts.get(key) or await self._try(asked, caller=caller)
        finally:
            self._num_waiting[caller] -= 1
            if not self._num_waiting[caller]:
                del self._num_waiting[caller]

    async def _try(self, asked: AskedGrammar, *, caller: str) -> Examined:
        history = self._history(caller)
        if refused_for_s := history.refused_for_s(time.monotonic()):
            raise _later(
                f"{MAX_STOPS} of your grammars had to be stopped within {STOPS_WINDOW_S:.0f} s",
                wait_s=int(refused_for_s) + 1,
            )
        worker = await self._idle.get()
        try:
            answer = await worker.ask(
                Examine(asked.form, asked.text, self._max_cpu_s), patience_s=PATIENCE_S
            )
        except Lost as lost:
            history.stopped(time.monotonic())
            logger.warning("grammar_stopped", extra={"caller": caller, "why": str(lost)})
            return Examined("regex", "", fault=f"it was stopped while it was compiled: it {lost}")
        except OSError as error:
            logger.warning("grammar_worker_failed", extra={"reason": str(error)})
            raise Unavailable from error
        finally:
            self._idle.put_nowait(worker)
        assert isinstance(answer, Examined)
        return answer

    def _history(self, caller: str) -> History:
        history = self._histories.setdefault(caller, History())
        self._histories.move_to_end(caller)
        if len(self._histories) > MAX_HISTORIES:
            self._histories.popitem(last=False)
        return history


def _refusal(asked: AskedGrammar, reason: str) -> InvalidGrammar:
    kind = InvalidSchema if asked.form in ("json_schema", "calls") else InvalidGrammar
    return kind(f"'{asked.param}' cannot be followed: {reason}.", param=asked.param)


def _later(reason: str, *, wait_s: int) -> GatewayError:
    error = LimitReached(f"{reason}: try again in {wait_s} s.")
    error.headers["retry-after"] = str(wait_s)
    return error
