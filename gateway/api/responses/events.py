"""The events of a streamed response. Knows their spelling, and nothing of their order."""

from typing import Literal

import msgspec

from gateway.api.responses.answer import (
    OutputItem,
    OutputText,
    ReasoningText,
    ResponseObject,
    ToldLogprob,
)
from gateway.api.wire import OpenAIErrorBody


class Event(msgspec.Struct, frozen=True):
    """Something that happened to a response; `type` is also the name under which it is sent."""

    # From 0, without gaps.
    sequence_number: int


class LifeEvent(Event, frozen=True):
    """The response as it stands, at its beginning and at its end."""

    response: ResponseObject
    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]


class ItemEvent(Event, frozen=True):
    """An item that has begun, or is whole."""

    output_index: int
    item: OutputItem
    type: Literal["response.output_item.added", "response.output_item.done"]


class PartEvent(Event, frozen=True):
    """A part of an item that has begun, or is whole; items with parts have one."""

    item_id: str
    output_index: int
    part: OutputText | ReasoningText
    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int = 0


class TextDelta(Event, frozen=True):
    item_id: str
    output_index: int
    delta: str
    # Of the tokens in it; empty where nobody asked.
    logprobs: list[ToldLogprob]
    content_index: int = 0
    type: Literal["response.output_text.delta"] = "response.output_text.delta"


class TextDone(Event, frozen=True):
    item_id: str
    output_index: int
    text: str
    logprobs: list[ToldLogprob]
    content_index: int = 0
    type: Literal["response.output_text.done"] = "response.output_text.done"


class ThoughtDelta(Event, frozen=True):
    item_id: str
    output_index: int
    delta: str
    content_index: int = 0
    type: Literal["response.reasoning_text.delta"] = "response.reasoning_text.delta"


class ThoughtDone(Event, frozen=True):
    item_id: str
    output_index: int
    text: str
    content_index: int = 0
    type: Literal["response.reasoning_text.done"] = "response.reasoning_text.done"


class ArgumentsDelta(Event, frozen=True):
    item_id: str
    output_index: int
    delta: str
    type: Literal["response.function_call_arguments.delta"] = (
        "response.function_call_arguments.delta"
    )


class ArgumentsDone(Event, frozen=True):
    item_id: str
    output_index: int
    arguments: str
    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"


class ErrorEvent(Event, frozen=True):
    """What went wrong, as OpenAI documents it and, in `error`, as its clients look for it."""

    code: str | None
    message: str
    param: str | None
    error: OpenAIErrorBody
    type: Literal["error"] = "error"


AnyEvent = (
    LifeEvent
    | ItemEvent
    | PartEvent
    | TextDelta
    | TextDone
    | ThoughtDelta
    | ThoughtDone
    | ArgumentsDelta
    | ArgumentsDone
    | ErrorEvent
)
