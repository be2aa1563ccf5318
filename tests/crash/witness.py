"""Whether every tenant was billed for exactly its tokens, by witnesses that are not the ledger.

Four accounts of the same requests are compared, each written by somebody else:

trace      what the engine sampled, by the engine, before anybody was told
journals   what a gateway had written down when it died, read here by other code than its own
clients    what was asked and what was shown, token by token, by those who read it
events     the bills

"Tokens billed = billable tokens" is an equality in the journals: a token is billable when its frame
was journalled while its client was connected, so each bill has to be what the journals add up to by
the rule, no matter who was killed when. That the journals tell the truth is proved from both sides.
No request may owe a token that the engine did not sample, and every mark must be the engine's count
after one of its steps, or where a stop ended the answer. And nobody may have been shown a token
that is not on its bill. Where a client saw its answer's end, all four must agree to the token.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from engine.sequence import SequenceKey
from tests.crash.clients import Ask, Attempt
from tests.crash.journals import Counts, Entry
from tests.crash.trace import Traced
from tests.crash.traced_words import word


@dataclass(frozen=True)
class Event:
    """A row of usage_events."""

    request_id: str
    tenant: str
    end_user: str
    outcome: str
    counts: Counts
    cost_nano: int


@dataclass
class Court:
    entries: dict[str, Entry]
    trace: dict[SequenceKey, Traced]
    attempts: list[Attempt]
    events: dict[str, Event]
    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def judge(self) -> list[str]:
        """What does not fit together."""
        asks = {attempt.ask.user: attempt.ask for attempt in self.attempts}
        for entry in self.entries.values():
            self._judge_entry(entry, asks.get(entry.end_user or ""))
        for event in self.events.values():
            self._judge_event(event, asks)
        by_user: defaultdict[str, list[Attempt]] = defaultdict(list)
        for attempt in self.attempts:
            by_user[attempt.ask.user].append(attempt)
            self._judge_attempt(attempt)
        for user, attempts in by_user.items():
            self._judge_ask(user, attempts)
        return self.problems

    def _expect(self, is_right: bool, what: str, subject: Any) -> None:
        if not is_right:
            self.problems.append(f"{what}: {subject}")

    def _judge_entry(self, entry: Entry, ask: Ask | None) -> None:
        """The bill is what the journal adds up to, and the engine made what the journal says."""
        owed, event = entry.owed, self.events.get(entry.request_id)
        about = (entry, event)
        self.counts["requests journalled"] += 1
        self.counts["requests cut off by a kill"] += not entry.is_closed
        self.counts["tokens owed"] += owed.completion if owed else 0
        self.counts["tokens billed"] += event.counts.completion if event else 0
        self._expect((event.counts if event else None) == owed, "billed is not owed", about)
        if entry.is_closed and entry.is_streamed:
            self._expect(entry.sent == owed, "closed with another sum than its marks", about)
        sequences = [self.trace[key] for key in entry.sequences if key in self.trace]
        for count in [*entry.marks, *([entry.sent] if entry.sent else [])]:
            self._expect(count.prompt == entry.prompt_tokens, "prompt not billed once", about)
            ends = [ask.num_tokens] if ask is not None and ask.stop_at is not None else []
            made = [mark for sequence in sequences for mark in sequence.marks]
            self._expect(count.completion in [*made, *ends], "no step ended there", about)
            self._expect(count.completion <= max(made, default=0), "never sampled", about)
        for sequence in sequences:
            self.counts["tokens sampled"] += len(sequence.tokens)
            is_right = len(sequence.prompt) == entry.prompt_tokens
            self._expect(is_right, "another prompt was computed", about)
            if ask is not None and ask.prompt is not None:
                self._expect(sequence.prompt == ask.prompt, "another request's sequence", about)

    def _judge_event(self, event: Event, asks: dict[str, Ask]) -> None:
        ask = asks.get(event.end_user)
        self.counts["bills"] += 1
        self._expect(event.request_id in self.entries, "billed out of nothing", event)
        self._expect(event.outcome != "lost", "given up though its journal was there", event)
        if ask is None:
            # Asked of a gateway that was killed before it could be connected to? Never.
            self._expect(False, "nobody asked", event)
            return
        self._expect(event.tenant == ask.tenant, "another tenant's bill", (event, ask))
        is_right = event.counts.completion <= ask.num_tokens
        self._expect(is_right, "more than was asked for", (event, ask))

    def _judge_attempt(self, attempt: Attempt) -> None:
        """What was shown is on the bill, and the sum that was shown is the bill."""
        event = self.events.get(attempt.request_id or "")
        about = (attempt, event, self.entries.get(attempt.request_id or ""))
        self.counts["attempts"] += 1
        if attempt.status != 200:
            self._expect(event is None, "billed though refused", about)
            return
        self._expect(attempt.stopped_by is None, "stopped for money that is there", about)
        if attempt.ask.prompt is not None:
            expected = [word(token) for token in _answer(attempt.ask, len(attempt.words))]
            self._expect(attempt.words == expected, "shown another's tokens", about)
        if event is None:
            # A whole answer that is kept by its name and whose gateway died before it was billed.
            is_free = attempt.is_replayed and not attempt.ask.is_streamed
            self._expect(is_free or attempt.num_shown == 0, "shown and not billed", about)
            self._expect(is_free or not attempt.is_done, "answered and not billed", about)
            return
        self.counts["tokens shown"] += 0 if attempt.is_replayed else attempt.num_shown
        self._expect(event.end_user == attempt.ask.user, "another request's id", about)
        billed = event.counts.completion
        self._expect(attempt.num_shown <= billed, "shown more than is billed", about)
        if attempt.usage is not None:
            told = attempt.usage, attempt.cost_nano
            self._expect(told == (event.counts, event.cost_nano), "told another sum", about)
        if attempt.is_done:
            self._expect(billed == attempt.ask.num_tokens, "not what was asked for", about)
            unseen = attempt.finish_reason == "stop"
            self._expect(attempt.num_shown == billed - unseen, "not all was shown", about)
        elif attempt.error is not None:
            self._expect(attempt.num_shown == billed, "billed more than was delivered", about)

    def _judge_ask(self, user: str, attempts: list[Attempt]) -> None:
        """No attempt is billed twice, and a whole answer with a name once, whoever asks again."""
        billed = [event for event in self.events.values() if event.end_user == user]
        may_be = [a for a in attempts if not a.is_replayed and a.status in (200, None)]
        about = (billed, attempts)
        self._expect(len(billed) <= len(may_be), "billed more often than asked", about)
        ask = attempts[0].ask
        if ask.name is not None and not ask.is_streamed:
            self._expect(len(billed) <= 1, "a named answer billed twice", about)


def _answer(ask: Ask, num_tokens: int) -> Iterator[int]:
    """The first tokens that the engine of words gives to this prompt."""
    assert ask.prompt is not None
    for place in range(num_tokens):
        yield ask.prompt[place % len(ask.prompt)]
