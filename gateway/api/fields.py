"""The fields that the routes of generations have in common, and those that are refused by name.

A field that is known but not served is accepted where its value changes nothing.
"""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

import msgspec

from gateway.auth import PRIORITY, Principal
from gateway.errors import InvalidRequest, NotAllowed
from gateway.prices import Bill

# The greatest number that the engine keeps of anything: no id of a token and no count is above it.
MAX_NUMBER = 2**31 - 1

Temperature = Annotated[float, msgspec.Meta(ge=0, le=2)]
TopP = Annotated[float, msgspec.Meta(gt=0, le=1)]
TopK = Annotated[int, msgspec.Meta(ge=-1, le=MAX_NUMBER)]
MinP = Annotated[float, msgspec.Meta(ge=0, le=1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, msgspec.Meta(gt=0)]
Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=MAX_NUMBER)]
TokenIds = Annotated[list[TokenId], msgspec.Meta(max_length=1_000_000)]
# By token id.
LogitBias = Annotated[dict[TokenId, Bias], msgspec.Meta(max_length=1024)]
MinTokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_NUMBER)]
NumTokens = Annotated[int, msgspec.Meta(ge=1, le=MAX_NUMBER)]
StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], msgspec.Meta(max_length=16)]
# Nano-USD, as an integer: the unit of every amount in this API.
MaxCost = Annotated[int, msgspec.Meta(ge=1, le=10**18)]
Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
User = Annotated[str, msgspec.Meta(max_length=512)]
# OpenAI's own bound; over all prompts of a request here.
MAX_ANSWERS = 128
NumAnswers = Annotated[int, msgspec.Meta(ge=1, le=MAX_ANSWERS)]
NumLogprobs = Annotated[int, msgspec.Meta(ge=0, le=20)]
# OpenAI's own bounds.
Metadata = Annotated[
    dict[Annotated[str, msgspec.Meta(max_length=64)], Annotated[str, msgspec.Meta(max_length=512)]],
    msgspec.Meta(max_length=16),
]
TemplateVariables = Annotated[dict[str, Any], msgspec.Meta(max_length=64)]
ServiceTier = Literal["auto", "default", "flex", "priority", "fast"]
ServedTier = Literal["default", "flex", "priority"]

# Known fields that are not served, with the values beside null that change nothing: what the API
# that they come from does where nothing is said.
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    # OpenAI's
    "access_programs": (),
    "allowed_callers": (["direct"],),
    "audio": (),
    "background": (False,),
    "background_options": ({}, {"completion_window": "soonest"}),
    "caller": ({"type": "direct"},),
    "context": ("auto",),
    "context_management": ([],),
    "conversation": (),
    "defer_loading": (False,),
    "dimensions": (),
    "effort": (),
    "encrypted_content": (),
    "function_call": ("none",),
    "functions": ([],),
    "generate_summary": (),
    "image": ({}, {"context_compression": "auto"}),
    "max_tool_calls": (),
    "modalities": (["text"],),
    "mode": ("standard",),
    "moderation": (),
    "namespace": (),
    "output_schema": (),
    "phase": ("final_answer",),
    "prediction": (),
    "previous_response_id": (),
    "prompt_cache_options": ({}, {"mode": "implicit"}),
    "prompt_cache_retention": ("in_memory",),
    "reasoning_effort": (),
    "store": (False,),
    "suffix": (),
    "truncation": ("disabled",),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "documents": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "priority": (0,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}


@cache
def _not_served(kind: type[msgspec.Struct]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    return tuple(
        (name, NEUTRAL_VALUES[name]) for name in kind.__struct_fields__ if name in NEUTRAL_VALUES
    )


def refuse_unserved(body: msgspec.Struct, *, place: str = "") -> None:
    """Raise InvalidRequest naming the first field whose value would have to change the answer."""
    for name, neutral in _not_served(type(body)):
        value = getattr(body, name)
        if value is not None and value not in neutral:
            raise not_served(f"{place}{name}")


def not_served(param: str) -> InvalidRequest:
    return InvalidRequest(f"'{param}' is not supported with this value: leave it out.", param=param)


# OpenAI's tiers as classes of the engine's, which are strict: the least goes first.
_CLASSES: Mapping[str, tuple[ServedTier, int]] = {
    "auto": ("default", 0),
    "default": ("default", 0),
    "flex": ("flex", 10),
    "priority": ("priority", -10),
    "fast": ("priority", -10),
}


def served_tier(asked: ServiceTier | None) -> ServedTier | None:
    """What an answer says; nothing to those who said nothing."""
    return None if asked is None else _CLASSES[asked][0]


def priority_of(asked: ServiceTier | None, principal: Principal) -> int:
    """Raises NotAllowed where the key may not go before others."""
    priority = _CLASSES[asked or "auto"][1]
    if priority < 0 and PRIORITY not in principal.scopes:
        raise NotAllowed(
            f"'service_tier' {asked!r} needs a key with the scope {PRIORITY!r}, which operators"
            " give: leave it out.",
            param="service_tier",
        )
    return priority


# Where nothing is said they are true, so it is false that says something.
_TRUE_BY_DEFAULT = frozenset(
    {"add_generation_prompt", "parallel_tool_calls", "skip_special_tokens"}
)


def given_fields(body: msgspec.Struct) -> frozenset[str]:
    """The names of the fields that the client gave; null and a switch left as it is are as if it
    had not."""
    given = msgspec.structs.asdict(body).items()
    return frozenset(
        name
        for name, value in given
        if value is not None and value is not (name in _TRUE_BY_DEFAULT)
    )


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream tells besides the text."""

    include_usage: bool | None = None
    # Padding against traffic analysis: accepted, and chunks are not padded.
    include_obfuscation: bool | None = None


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    # Those that the model thought with before its answer.
    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """What an answer used and cost: the same numbers that its usage event keeps."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    # Nano-USD.
    cost_nano: int
    # Of models that think before they answer.
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, bill: Bill, *, reasoning_tokens: int | None = None) -> "Usage":
        details = (
            msgspec.UNSET if reasoning_tokens is None else CompletionTokensDetails(reasoning_tokens)
        )
        return cls(
            prompt_tokens=bill.prompt_tokens,
            completion_tokens=bill.completion_tokens,
            total_tokens=bill.prompt_tokens + bill.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(bill.cached_tokens),
            cost_nano=bill.cost_nano,
            completion_tokens_details=details,
        )


def end_user(user: str | None) -> str | None:
    """Whom the request is made for. Raises InvalidRequest for what no report could show."""
    if user and not user.isprintable():
        raise InvalidRequest("'user' may have no control characters.", param="user")
    return user or None


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())
