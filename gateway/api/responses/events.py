"""The events of a streamed response. Knows their spelling, and nothing of their order."""

import msgspec

from gateway.api.responses.answer import (
    OutputItem,
    OutputText,
    ReasoningText,
    ResponseObject,
    ToldLogprob,
)
from gateway.api.sse import named_event
from gateway.api.wire import OpenAIErrorBody


class Event(msgspec.Struct, frozen=True):
    """Something that happened to a response; its `type` is also the name under which it is sent."""

    # From 0, without gaps.
    sequence_number: int


class LifeEvent(Event, frozen=True):
    """The response as it stands."""

    response: ResponseObject


class Created(LifeEvent, frozen=True, tag="response.created"): ...


class InProgress(LifeEvent, frozen=True, tag="response.in_progress"): ...


class Completed(LifeEvent, frozen=True, tag="response.completed"): ...


class Incomplete(LifeEvent, frozen=True, tag="response.incomplete"): ...


class Failed(LifeEvent, frozen=True, tag="response.failed"): ...


class ItemAdded(Event, frozen=True, tag="response.output_item.added"):
    output_index: int
    item: OutputItem


class ItemDone(Event, frozen=True, tag="response.output_item.done"):
    output_index: int
    item: OutputItem


class PartEvent(Event, frozen=True):
    """The part of an item: those that have parts have one."""

    item_id: str
    output_index: int
    part: OutputText | ReasoningText
    content_index: int = 0


class PartAdded(PartEvent, frozen=True, tag="response.content_part.added"): ...


class PartDone(PartEvent, frozen=True, tag="response.content_part.done"): ...


class TextDelta(Event, frozen=True, tag="response.output_text.delta"):
    item_id: str
    output_index: int
    delta: str
    # Of the tokens in it; empty where nobody asked.
    logprobs: list[ToldLogprob]
    content_index: int = 0


class TextDone(Event, frozen=True, tag="response.output_text.done"):
    item_id: str
    output_index: int
    text: str
    logprobs: list[ToldLogprob]
    content_index: int = 0


class ThoughtDelta(Event, frozen=True, tag="response.reasoning_text.delta"):
    item_id: str
    output_index: int
    delta: str
    content_index: int = 0


class ThoughtDone(Event, frozen=True, tag="response.reasoning_text.done"):
    item_id: str
    output_index: int
    text: str
    content_index: int = 0


class ArgumentsDelta(Event, frozen=True, tag="response.function_call_arguments.delta"):
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(Event, frozen=True, tag="response.function_call_arguments.done"):
    item_id: str
    output_index: int
    arguments: str


class ErrorEvent(Event, frozen=True, tag="error"):
    """What went wrong, as OpenAI documents it and, in `error`, as its clients look for it."""

    code: str | None
    message: str
    param: str | None
    error: OpenAIErrorBody


AnyEvent = (
    Created
    | InProgress
    | Completed
    | Incomplete
    | Failed
    | ItemAdded
    | ItemDone
    | PartAdded
    | PartDone
    | TextDelta
    | TextDone
    | ThoughtDelta
    | ThoughtDone
    | ArgumentsDelta
    | ArgumentsDone
    | ErrorEvent
)


def spelled(event: Event) -> bytes:
    return named_event(str(event.__struct_config__.tag), event)
