"""An answer's items while it grows, and the events that tell of them, in OpenAI's order.

A whole answer is its stream told at once: the same items come out of both.
"""

import itertools
from collections.abc import Callable

from gateway.api.responses.answer import (
    REASONS,
    FunctionCall,
    Logprob,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseObject,
    ResponseUsage,
    logprobs_of,
)
from gateway.api.responses.conversation import ItemStatus
from gateway.api.responses.events import (
    AnyEvent,
    ArgumentsDelta,
    ArgumentsDone,
    Completed,
    Created,
    ErrorEvent,
    Failed,
    Incomplete,
    InProgress,
    ItemAdded,
    ItemDone,
    PartAdded,
    PartDone,
    TextDelta,
    TextDone,
    ThoughtDelta,
    ThoughtDone,
)
from gateway.api.responses.request import ResponseRequest
from gateway.api.wire import openai_error
from gateway.choices import Delta
from gateway.errors import GatewayError
from gateway.generation import Generation
from gateway.prices import Bill
from gateway.tools.pieces import Arguments, CallBegins, Piece, Thought, Withdrawn, Words

Count = Callable[[], int]


class Writer:
    """Mutable: one response while it is made. Give it every delta, in order.

    What its methods return are the events so far untold.
    """

    def __init__(self, generation: Generation, data: ResponseRequest) -> None:
        self._generation = generation
        self._wants_logprobs = data.wants_logprobs
        # As it is told while there is no more to it.
        self._response = ResponseObject.begun(generation, data)
        self._count: Count = itertools.count().__next__
        self._is_told = False
        # Those that are whole; a call that was withdrawn is none of them.
        self._items: list[OutputItem] = []
        self._num_items = 0
        self._open: _Message | _Thoughts | _Call | None = None
        # Of tokens of which no text has come yet.
        self._logprobs: list[Logprob] = []

    def begin(self) -> list[AnyEvent]:
        """Once; nothing from then on."""
        if self._is_told:
            return []
        self._is_told = True
        return [
            Created(self._count(), self._response),
            InProgress(self._count(), self._response),
        ]

    def take(self, delta: Delta) -> list[AnyEvent]:
        events = self.begin()
        if self._wants_logprobs:
            codec = self._generation.codec
            self._logprobs += logprobs_of(codec, delta.token_ids, delta.logprobs)
        if delta.pieces is None:
            return events + (self._words(delta.text) if delta.text or self._logprobs else [])
        for piece in delta.pieces:
            events += self._read(piece)
        if delta.pieces:
            # Tokens of thoughts and calls: only words are told with theirs.
            self._logprobs.clear()
        return events

    def end(self, last: Delta, bill: Bill) -> tuple[ResponseObject, list[AnyEvent]]:
        """The whole response, after its last delta."""
        assert last.finish_reason is not None, "the last delta has one"
        status: ItemStatus = "incomplete" if last.finish_reason in REASONS else "completed"
        is_empty = not self._items and self._open is None
        has_rest = isinstance(self._open, _Message) and self._logprobs
        events = self._words("") if is_empty or has_rest else []
        events += self._close(status)
        whole = self._response.ended(
            self._items,
            finish_reason=last.finish_reason,
            stopped_by=last.stopped_by,
            usage=ResponseUsage.of(bill, reasoning_tokens=self._generation.reasoning_tokens),
        )
        kind = Completed if status == "completed" else Incomplete
        return whole, [*events, kind(self._count(), whole)]

    def fail(self, error: GatewayError) -> list[AnyEvent]:
        """There is no more to come. Clients of OpenAI's raise at the first of the two."""
        body = openai_error(error).error
        response = self._response.failed(self._items, error)
        return [
            *self.begin(),
            ErrorEvent(self._count(), body.code, body.message, body.param, body),
            Failed(self._count(), response),
        ]

    def _read(self, piece: Piece) -> list[AnyEvent]:
        match piece:
            case Words(text):
                return self._words(text)
            case Thought(text):
                return self._thoughts(text)
            case CallBegins():
                return self._call(piece)
            case Arguments(text=text):
                assert isinstance(self._open, _Call), "arguments follow their call"
                return [self._open.add(text)]
            case Withdrawn(text=text):
                return self._withdraw() + self._words(text)

    def _words(self, text: str) -> list[AnyEvent]:
        events: list[AnyEvent] = []
        logprobs = self._logprobs_of(text)
        if not isinstance(self._open, _Message):
            events += self._close("completed")
            self._open = _Message(self._id("msg"), self._next(), self._count)
            events += self._open.begin()
        return [*events, self._open.add(text, logprobs)]

    def _logprobs_of(self, words: str) -> list[Logprob]:
        """Of the untold those of words; behind another item its closing mark is before them."""
        found, self._logprobs = self._logprobs, []
        if isinstance(self._open, _Message) or not self._num_items:
            return found
        num_characters = 0
        for number, each in enumerate(reversed(found), start=1):
            num_characters += len(each.token)
            if num_characters >= len(words):
                return found[-number:]
        return found

    def _thoughts(self, text: str) -> list[AnyEvent]:
        events: list[AnyEvent] = []
        if not isinstance(self._open, _Thoughts):
            events += self._close("completed")
            self._open = _Thoughts(self._id("rs"), self._next(), self._count)
            events += self._open.begin()
        return [*events, self._open.add(text)]

    def _call(self, piece: CallBegins) -> list[AnyEvent]:
        events = self._close("completed")
        self._open = _Call(piece, self._id("fc"), self._next(), self._count)
        return events + self._open.begin()

    def _close(self, status: ItemStatus) -> list[AnyEvent]:
        if self._open is None:
            return []
        item, events = self._open.end(status)
        self._open = None
        self._items.append(item)
        return events

    def _withdraw(self) -> list[AnyEvent]:
        """What was told of it cannot be taken back: it ends incomplete, and is no item."""
        assert isinstance(self._open, _Call), "only the call under way is withdrawn"
        _, events = self._open.end("incomplete")
        self._open = None
        return events

    def _id(self, kind: str) -> str:
        return f"{kind}_{self._generation.request_id.hex}{self._num_items:02}"

    def _next(self) -> int:
        index, self._num_items = self._num_items, self._num_items + 1
        return index


class _Message:
    """Mutable: words under way."""

    def __init__(self, item_id: str, index: int, count: Count) -> None:
        self._id, self._index, self._count = item_id, index, count
        self._text = ""
        self._logprobs: list[Logprob] = []

    def begin(self) -> list[AnyEvent]:
        item = OutputMessage(self._id, "in_progress", [])
        return [
            ItemAdded(self._count(), self._index, item),
            PartAdded(self._count(), self._id, self._index, OutputText("", [])),
        ]

    def add(self, text: str, logprobs: list[Logprob]) -> AnyEvent:
        self._text += text
        self._logprobs += logprobs
        told = [each.told() for each in logprobs]
        return TextDelta(self._count(), self._id, self._index, text, told)

    def end(self, status: ItemStatus) -> tuple[OutputItem, list[AnyEvent]]:
        part = OutputText(self._text, self._logprobs)
        item = OutputMessage(self._id, status, [part])
        told = [each.told() for each in self._logprobs]
        return item, [
            TextDone(self._count(), self._id, self._index, self._text, told),
            PartDone(self._count(), self._id, self._index, part),
            ItemDone(self._count(), self._index, item),
        ]


class _Thoughts:
    """Mutable: thoughts under way."""

    def __init__(self, item_id: str, index: int, count: Count) -> None:
        self._id, self._index, self._count = item_id, index, count
        self._text = ""

    def begin(self) -> list[AnyEvent]:
        item = ReasoningItem(self._id, "in_progress", [])
        return [
            ItemAdded(self._count(), self._index, item),
            PartAdded(self._count(), self._id, self._index, ReasoningText("")),
        ]

    def add(self, text: str) -> AnyEvent:
        self._text += text
        return ThoughtDelta(self._count(), self._id, self._index, text)

    def end(self, status: ItemStatus) -> tuple[OutputItem, list[AnyEvent]]:
        part = ReasoningText(self._text)
        item = ReasoningItem(self._id, status, [part])
        return item, [
            ThoughtDone(self._count(), self._id, self._index, self._text),
            PartDone(self._count(), self._id, self._index, part),
            ItemDone(self._count(), self._index, item),
        ]


class _Call:
    """Mutable: a call under way."""

    def __init__(self, piece: CallBegins, item_id: str, index: int, count: Count) -> None:
        self._id, self._index, self._count = item_id, index, count
        self._call_id, self._name = piece.id, piece.name
        self._arguments = ""

    def begin(self) -> list[AnyEvent]:
        item = self._item("in_progress")
        return [ItemAdded(self._count(), self._index, item)]

    def add(self, text: str) -> AnyEvent:
        self._arguments += text
        return ArgumentsDelta(self._count(), self._id, self._index, text)

    def end(self, status: ItemStatus) -> tuple[OutputItem, list[AnyEvent]]:
        item = self._item(status)
        return item, [
            ArgumentsDone(self._count(), self._id, self._index, self._arguments),
            ItemDone(self._count(), self._index, item),
        ]

    def _item(self, status: ItemStatus) -> FunctionCall:
        return FunctionCall(self._id, status, self._call_id, self._name, self._arguments)
