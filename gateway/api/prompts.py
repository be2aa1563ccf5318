"""What an answer tells besides its text: its prompt, and the tokens of both.

The spelling is vLLM's. Decides nothing.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from engine.protocol import TokenLogprob
from gateway.api.answer import WholeAnswer
from gateway.choices import Delta
from gateway.errors import InvalidRequest
from gateway.text import TextCodec

T = TypeVar("T")
# Log-probabilities, alternatives included, that are spelled in a few milliseconds.
MAX_SPELLED_HERE = 4096


class PromptLogprob(msgspec.Struct, frozen=True):
    """How likely a token was at its place in the prompt."""

    logprob: float
    # From 1, among all tokens; null where it is none of those that were asked for.
    rank: int | None
    decoded_token: str


# By token id, for each place of the prompt; null for the first, of which nothing can be said.
PromptLogprobs = list[dict[int, PromptLogprob] | None]


def check_prompt_logprobs(asked: int | None, *, is_streamed: bool) -> None:
    """Raises InvalidRequest where no chunk could carry them."""
    if asked is not None and is_streamed:
        raise InvalidRequest(
            "'prompt_logprobs' cannot be streamed: leave it out, or 'stream'.",
            param="prompt_logprobs",
        )


async def spelled(make: Callable[[], T], told: Sequence[TokenLogprob] | None) -> T:
    """What `make` makes of what was told of a prompt; off the event loop where that is much."""
    num_told = len(told) * (1 + len(told[0].top)) if told else 0
    return make() if num_told <= MAX_SPELLED_HERE else await asyncio.to_thread(make)


def prompt_logprobs(
    codec: TextCodec, prompt: Sequence[int], told: Sequence[TokenLogprob], *, num_top: int
) -> PromptLogprobs:
    """`told` begins with the second token, and may tell more than `num_top` of each place."""

    def at(token_id: int, found: TokenLogprob) -> dict[int, PromptLogprob]:
        own = {token_id: PromptLogprob(found.logprob, None, codec.token_text(token_id))}
        return own | {
            other: PromptLogprob(logprob, rank, codec.token_text(other))
            for rank, (other, logprob) in enumerate(found.top[:num_top], start=1)
        }

    return [None, *(at(*each) for each in zip(prompt[1:], told, strict=True))]


def told_token_ids(answer: Delta | WholeAnswer) -> list[int]:
    """With the one that ended it."""
    end = [] if answer.end_token_id is None else [answer.end_token_id]
    return [*answer.token_ids, *end]
