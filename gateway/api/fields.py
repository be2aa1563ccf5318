"""The fields that chat and completions have in common, and those that are refused by name.

A field that is known but not served is accepted where its value changes nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from gateway.errors import InvalidRequest
from gateway.prices import Bill

Temperature = Annotated[float, msgspec.Meta(ge=0, le=2)]
TopP = Annotated[float, msgspec.Meta(gt=0, le=1)]
TopK = Annotated[int, msgspec.Meta(ge=-1)]
MinP = Annotated[float, msgspec.Meta(ge=0, le=1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, msgspec.Meta(gt=0)]
Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]
# By token id.
LogitBias = Annotated[dict[Annotated[int, msgspec.Meta(ge=0)], Bias], msgspec.Meta(max_length=1024)]
MinTokens = Annotated[int, msgspec.Meta(ge=0)]
NumTokens = Annotated[int, msgspec.Meta(ge=1)]
StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], msgspec.Meta(max_length=16)]
# Nano-USD, as an integer: the unit of every amount in this API.
MaxCost = Annotated[int, msgspec.Meta(ge=1, le=10**18)]
Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
User = Annotated[str, msgspec.Meta(max_length=512)]
TokenIds = Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(max_length=1_000_000)]

# Known fields that are not served, with the values that change nothing.
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None,),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}


def refuse_unserved(body: msgspec.Struct, *, place: str = "") -> None:
    """Raise InvalidRequest naming the first field whose value would have to change the answer."""
    for name in body.__struct_fields__:
        neutral = NEUTRAL_VALUES.get(name)
        value = getattr(body, name)
        if neutral is not None and not any(value == other for other in neutral):
            raise InvalidRequest(
                f"'{place}{name}' is not supported with this value: leave it out.",
                param=f"{place}{name}",
            )


def given_fields(body: msgspec.Struct) -> frozenset[str]:
    """The names of the fields that the client gave; null and false are as if it had not."""
    given = msgspec.structs.asdict(body).items()
    return frozenset(name for name, value in given if value is not None and value is not False)


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
