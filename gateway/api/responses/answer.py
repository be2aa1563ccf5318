"""The response object: its items, what it used and cost, and the words of its request.

Knows the spelling alone. How the items come about is `writer`'s affair.
"""

import datetime
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from engine.protocol import TokenLogprob
from gateway.api.fields import ServedTier, served_tier
from gateway.api.responses.conversation import ItemStatus
from gateway.api.responses.request import (
    FunctionTool,
    Reasoning,
    ResponseRequest,
    TextOptions,
    ToolChoice,
)
from gateway.api.structured import PlainFormat
from gateway.choices import FinishReason, StoppedBy
from gateway.errors import GatewayError
from gateway.generation import Generation
from gateway.prices import Bill
from gateway.text import TextCodec

ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]
ErrorCode = Literal["invalid_prompt", "rate_limit_exceeded", "server_error"]
# Of the ends that leave an answer incomplete.
REASONS: dict[FinishReason, Literal["max_output_tokens", "content_filter"]] = {
    "length": "max_output_tokens",
    "content_filter": "content_filter",
}


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class Logprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]

    def told(self) -> "ToldLogprob":
        """As events have it."""
        others = [ToldTopLogprob(other.token, other.logprob) for other in self.top_logprobs]
        return ToldLogprob(self.token, self.logprob, others)


class ToldTopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float


class ToldLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    top_logprobs: list[ToldTopLogprob]


class OutputText(msgspec.Struct, frozen=True, tag="output_text"):
    text: str
    # Empty where nobody asked.
    logprobs: list[Logprob]
    # Nothing is looked up, so there is nothing to cite.
    annotations: tuple[()] = ()


class ReasoningText(msgspec.Struct, frozen=True, tag="reasoning_text"):
    text: str


class OutputMessage(msgspec.Struct, frozen=True, tag="message"):
    id: str
    status: ItemStatus
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class FunctionCall(msgspec.Struct, frozen=True, tag="function_call"):
    """A call for the client to make; what it gives comes back under `call_id`."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    # JSON; whole where the status is `completed`.
    arguments: str


class ReasoningItem(msgspec.Struct, frozen=True, tag="reasoning"):
    """What the model thought before its answer."""

    id: str
    status: ItemStatus
    content: list[ReasoningText]
    summary: tuple[()] = ()


OutputItem = OutputMessage | FunctionCall | ReasoningItem


class InputTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int
    # No price has any: what is cached is paid for when it is found.
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True):
    # Those that the model thought with before its answer.
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True):
    """What a response used and cost: the same numbers that its usage event keeps."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    # Nano-USD.
    cost_nano: int

    @classmethod
    def of(cls, bill: Bill, *, reasoning_tokens: int | None) -> "ResponseUsage":
        return cls(
            input_tokens=bill.prompt_tokens,
            input_tokens_details=InputTokensDetails(bill.cached_tokens),
            output_tokens=bill.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens or 0),
            total_tokens=bill.prompt_tokens + bill.completion_tokens,
            cost_nano=bill.cost_nano,
        )


class IncompleteDetails(msgspec.Struct, frozen=True):
    reason: Literal["max_output_tokens", "content_filter"]


class ResponseError(msgspec.Struct, frozen=True):
    code: ErrorCode
    message: str

    @classmethod
    def of(cls, error: GatewayError) -> "ResponseError":
        """OpenAI has few codes here; the event before it says ours."""
        if error.type == "invalid_request_error":
            return cls("invalid_prompt", error.message)
        return cls("rate_limit_exceeded" if error.status == 429 else "server_error", error.message)


class ResponseObject(msgspec.Struct, frozen=True):
    """OpenAI's response; `usage` also says what it cost."""

    id: str
    created_at: int
    model: str
    status: ResponseStatus
    output: list[OutputItem]
    # What was asked for; null and the empty where nothing was said.
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    prompt_cache_key: str | None
    reasoning: Reasoning
    safety_identifier: str | None
    temperature: float | None
    text: TextOptions
    tool_choice: ToolChoice
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float | None
    user: str | None
    # Null until the answer is there.
    completed_at: int | None = None
    usage: ResponseUsage | None = None
    # Why it is incomplete, or has failed.
    incomplete_details: IncompleteDetails | None = None
    error: ResponseError | None = None
    # Nothing is stored, so nothing can be gone on with or waited for.
    background: Literal[False] = False
    conversation: None = None
    max_tool_calls: None = None
    previous_response_id: None = None
    prompt: None = None
    truncation: Literal["disabled"] = "disabled"
    object: Literal["response"] = "response"
    service_tier: ServedTier | msgspec.UnsetType = msgspec.UNSET
    # Ours: what ended the answer, where that was money.
    stopped_by: StoppedBy | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def begun(cls, generation: Generation, data: ResponseRequest) -> "ResponseObject":
        """Before there is anything of it."""
        wanted = data.text.format if data.text else None
        return cls(
            id=f"resp_{generation.request_id.hex}",
            created_at=int(generation.created.timestamp()),
            model=data.model,
            status="in_progress",
            output=[],
            instructions=data.instructions,
            max_output_tokens=data.max_output_tokens,
            metadata=data.metadata or {},
            parallel_tool_calls=data.parallel_tool_calls is not False,
            prompt_cache_key=data.prompt_cache_key,
            reasoning=data.reasoning or Reasoning(),
            safety_identifier=data.safety_identifier,
            temperature=data.temperature,
            text=TextOptions(wanted or PlainFormat()),
            tool_choice=data.tool_choice or "auto",
            tools=data.tools or [],
            top_logprobs=data.top_logprobs or 0,
            top_p=data.top_p,
            user=data.user,
            service_tier=served_tier(data.service_tier) or msgspec.UNSET,
        )

    def ended(
        self,
        output: Sequence[OutputItem],
        *,
        finish_reason: FinishReason,
        stopped_by: StoppedBy | None,
        usage: ResponseUsage,
    ) -> "ResponseObject":
        reason = REASONS.get(finish_reason)
        now = int(datetime.datetime.now(datetime.UTC).timestamp())
        return msgspec.structs.replace(
            self,
            status="completed" if reason is None else "incomplete",
            output=list(output),
            completed_at=now if reason is None else None,
            incomplete_details=None if reason is None else IncompleteDetails(reason),
            stopped_by=stopped_by or msgspec.UNSET,
            usage=usage,
        )

    def failed(self, output: Sequence[OutputItem], error: GatewayError) -> "ResponseObject":
        return msgspec.structs.replace(
            self, status="failed", output=list(output), error=ResponseError.of(error)
        )


def logprobs_of(
    codec: TextCodec, token_ids: Iterable[int], found: Iterable[TokenLogprob]
) -> list[Logprob]:
    return [
        Logprob(
            token=codec.token_text(token_id),
            logprob=each.logprob,
            bytes=codec.token_bytes(token_id),
            top_logprobs=[
                TopLogprob(codec.token_text(other), logprob, codec.token_bytes(other))
                for other, logprob in each.top
            ],
        )
        for token_id, each in zip(token_ids, found, strict=True)
    ]
