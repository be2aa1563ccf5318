"""A policy, ready to be asked: all that can be decided here, without asking anybody.

A prompt is read message by message, each with its parts joined, whoever it is by; one that came as
token ids is read as their text. What a chat template writes around and between messages is not
read: it is the model's, the same for every request, and no client chose it.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gateway.errors import ContentRefused, PolicyViolation
from gateway.policies.document import Policy
from gateway.policies.patterns import Pattern, compile_input, compile_output, first_hit

# What every request has.
ALWAYS_ALLOWED = frozenset({"model", "messages", "prompt", "input", "instructions"})
# Fields of /v1/responses by what a chat calls them: who names the one means both.
OLDER_NAMES: Mapping[str, str] = {
    "include": "logprobs",
    "max_output_tokens": "max_tokens",
    "text": "response_format",
}
# What they tell would spell the text that is held back.
SPELLING_FIELDS = frozenset({"include", "logprobs", "return_token_ids"})
MAX_TOKENS_FIELDS = frozenset({"max_tokens", "max_completion_tokens", "max_output_tokens"})
# Instructions times characters up to which a search stays on the event loop: 4 ms at worst.
MAX_WORK_HERE = 1_000_000


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as its policy sees it."""

    # The names of the fields that the client gave.
    fields: frozenset[str]
    # "messages", "prompt" or "input"
    prompt_field: str
    # Of the longest, where there are several.
    num_prompt_tokens: int
    # What the answer may have at most, by the client's word or, where it said none, by default.
    max_tokens: int
    # The prompt's messages, worked out where somebody reads them.
    texts: Callable[[], Sequence[str]]


class Rules:
    """A policy whose patterns are compiled."""

    def __init__(self, policy: Policy) -> None:
        """Raises InvalidPolicy."""
        self.policy = policy
        self._deny_input = compile_input(policy.deny_input)
        self.deny_output: tuple[Pattern, ...] = compile_output(
            policy.deny_output, window_chars=policy.window_chars
        )
        self._num_instructions = sum(each.num_instructions for each in self._deny_input)
        # One thread at most for the long prompts of a tenant: the others' tokens need them too.
        self._turn = asyncio.Semaphore()

    async def check(self, asked: Asked) -> int:
        """How many tokens the answer may have. Raises PolicyViolation or ContentRefused."""
        self._check_fields(asked.fields)
        max_tokens = self._fit(asked)
        most = self.policy.max_prompt_tokens
        if most is not None and asked.num_prompt_tokens > most:
            raise PolicyViolation(
                f"The policy allows prompts of {most} tokens; this one has"
                f" {asked.num_prompt_tokens}: shorten it.",
                param=asked.prompt_field,
                policy_rule="max_prompt_tokens",
            )
        if self._deny_input:
            await self._read(asked)
        return max_tokens

    def _check_fields(self, fields: frozenset[str]) -> None:
        policy = self.policy
        denied = _named(fields, policy.denied_parameters)
        if policy.allowed_parameters is not None:
            denied |= fields - ALWAYS_ALLOWED - _named(fields, policy.allowed_parameters)
        if denied:
            name = min(denied)
            raise PolicyViolation(
                f"The policy does not allow '{name}': leave it out.",
                param=name,
                policy_rule=f"parameters/{name}",
            )
        spelling = sorted(fields & SPELLING_FIELDS)
        if spelling and (self.deny_output or self._is_answer_moderated):
            raise PolicyViolation(
                f"The policy reads answers before they are sent, so '{spelling[0]}' cannot be had:"
                " leave it out.",
                param=spelling[0],
                policy_rule=f"parameters/{spelling[0]}",
            )

    @property
    def _is_answer_moderated(self) -> bool:
        hook = self.policy.moderation
        return hook is not None and "output" in hook.check

    def _fit(self, asked: Asked) -> int:
        most = self.policy.max_output_tokens
        if most is None or asked.max_tokens <= most:
            return asked.max_tokens
        if named := MAX_TOKENS_FIELDS & asked.fields:
            raise PolicyViolation(
                f"The policy allows answers of {most} tokens, and {asked.max_tokens} are asked for:"
                " ask for less.",
                param=min(named),
                policy_rule="max_output_tokens",
            )
        return most

    async def _read(self, asked: Asked) -> None:
        texts = asked.texts()
        work = self._num_instructions * sum(map(len, texts))
        if work <= MAX_WORK_HERE:
            name = self._denies(texts)
        else:
            async with self._turn:
                name = await asyncio.to_thread(self._denies, texts)
        if name is not None:
            raise ContentRefused(
                f"The content policy refused the prompt by its rule {name!r}.",
                param=asked.prompt_field,
                policy_rule=f"deny_input/{name}",
            )

    def _denies(self, texts: Sequence[str]) -> str | None:
        return next(filter(None, (first_hit(self._deny_input, text) for text in texts)), None)


def _named(fields: frozenset[str], names: Sequence[str]) -> frozenset[str]:
    """Those of the fields that a policy names."""
    return frozenset(field for field in fields if field in names or OLDER_NAMES.get(field) in names)
