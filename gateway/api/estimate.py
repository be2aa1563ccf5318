"""POST /v1/estimate: what a request would take and cost at most, without making it."""

from typing import Annotated, Any

import msgspec
from litestar import post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from gateway.api.chat import ChatMessage, conversation
from gateway.api.fields import MaxCost, NumAnswers, NumTokens, TokenIds
from gateway.api.tools import ToolChoice, Tools, asked_toolbox
from gateway.auth import Principal
from gateway.errors import GatewayError, InvalidRequest, LimitReached
from gateway.inference import Inference
from gateway.prompts import Prompt, TokenPrompt


class EstimateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The part of a request that its price depends on: `messages` or `prompt`, not both."""

    model: str
    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)] | None = None
    prompt: str | TokenIds | None = None
    # The model is told of them in the prompt, unless it may call none.
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    # The rest of the context where it is left out.
    max_tokens: NumTokens | None = None
    max_cost: MaxCost | None = None
    n: NumAnswers | None = None


class WhyNot(msgspec.Struct, frozen=True):
    """The error that the request would get now."""

    status: int
    code: str | None
    message: str
    rule: dict[str, Any] | None


class EstimateView(msgspec.Struct, frozen=True):
    """Money is nano-USD. By the time that the request is made, the answer may be another."""

    model: str
    prompt_tokens: int
    # Of all answers together.
    max_output_tokens: int
    # What the prompt alone costs at most, and with all of the output.
    prompt_cost_nano: int
    max_cost_nano: int
    would_be_admitted: bool
    why_not: WhyNot | None
    # Whether the adapter is ready on an engine; null where none could be asked, true for a base.
    is_resident: bool | None


@post(
    "/v1/estimate",
    scope="inference",
    status_code=200,
    tags=["limits"],
    summary="Say what a request would cost at most",
    request_max_body_size=16 << 20,
)
async def estimate(
    data: JSONBody[EstimateRequest],
    principal: NamedDependency[Principal],
    inference: NamedDependency[Inference],
) -> EstimateView:
    """Nothing is charged, held or billed. The count of prompt tokens is exact."""
    found = await inference.estimate(
        principal,
        model=data.model,
        prompt=_prompt(data),
        tools=asked_toolbox(data.tools, data.tool_choice),
        max_tokens=data.max_tokens,
        max_cost_nano=data.max_cost,
        num_choices=data.n or 1,
    )
    refusal = found.refusal
    return EstimateView(
        model=data.model,
        prompt_tokens=found.prompt_tokens,
        max_output_tokens=found.max_output_tokens,
        prompt_cost_nano=found.prompt_cost_nano,
        max_cost_nano=found.max_cost_nano,
        would_be_admitted=refusal is None,
        why_not=None if refusal is None else _why_not(refusal),
        is_resident=found.is_resident,
    )


def _why_not(refusal: GatewayError) -> WhyNot:
    rule = refusal.rule if isinstance(refusal, LimitReached) else None
    return WhyNot(refusal.status, refusal.code, refusal.message, dict(rule) if rule else None)


def _prompt(data: EstimateRequest) -> Prompt:
    if (data.messages is None) == (data.prompt is None):
        raise InvalidRequest("Give 'messages' or 'prompt': one of them.", param="messages")
    if data.messages is not None:
        return conversation(data.messages)
    if data.tools:
        raise InvalidRequest("'tools' belong to 'messages': leave them out.", param="tools")
    if not data.prompt:
        raise InvalidRequest("'prompt' is empty: give at least one token.", param="prompt")
    return data.prompt if isinstance(data.prompt, str) else TokenPrompt(data.prompt)
