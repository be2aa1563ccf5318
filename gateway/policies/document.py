"""A tenant's policy, as operators write it and as it is kept."""

from typing import Annotated, Literal

import msgspec

RuleName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$(?!\n)")]
PatternSource = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
ParameterNames = Annotated[
    list[Annotated[str, msgspec.Meta(max_length=64)]], msgspec.Meta(max_length=64)
]
NumTokens = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
# Streams wait in a bounded queue while they are judged: longer than this, it could overflow.
TimeoutMs = Annotated[int, msgspec.Meta(ge=10, le=5000)]
Direction = Literal["input", "output"]


class DenyRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A regular expression of RE2's, under the name that refusals and counts say."""

    name: RuleName
    pattern: PatternSource


DenyRules = Annotated[list[DenyRule], msgspec.Meta(max_length=64)]


class ModerationHook(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A server that is sent texts and says whether they may pass.

    It gets a POST of `{"tenant", "model", "direction", "text", "request_id"}`, signed as all
    webhooks are, and answers `{"allow": true}`, or false with a `reason` that the client is told.
    """

    url: str
    # What happens where it does not answer in time, or not like this: pass, or refuse with a 503.
    on_failure: Literal["open", "closed"]
    check: Annotated[list[Direction], msgspec.Meta(min_length=1, max_length=2)]
    timeout_ms: TimeoutMs = 2000
    # A stream is held back until so much more of it is there, and judged with all that was before.
    window_chars: Annotated[int, msgspec.Meta(ge=100, le=100_000)] = 1000


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything is optional: what is left out is not restricted."""

    # Asking for more is refused; who asks for nothing gets at most this.
    max_output_tokens: NumTokens | None = None
    max_prompt_tokens: NumTokens | None = None
    # Fields of a request. `model`, `messages` and `prompt` need not be named, and cannot be denied.
    allowed_parameters: ParameterNames | None = None
    denied_parameters: ParameterNames = []
    deny_input: DenyRules = []
    deny_output: DenyRules = []
    # The longest match of an output rule that is caught for sure before any of it is sent; so many
    # characters of each stream are held back.
    window_chars: Annotated[int, msgspec.Meta(ge=16, le=4096)] = 256
    moderation: ModerationHook | None = None
