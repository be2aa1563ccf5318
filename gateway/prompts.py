"""What a client wants answered or continued: a conversation, a text, or token ids.

Knows how each becomes tokens, and what policies and archives see of it. Knows nothing of what is
generated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.errors import ContextLengthExceeded
from gateway.policies.rules import Asked
from gateway.text import NO_VARIABLES, Ending, TextCodec
from gateway.tools.json_calls import strings_in
from gateway.tools.toolbox import Toolbox

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt that its client has encoded."""

    token_ids: list[int]


Prompt = Messages | str | TokenPrompt


async def encode(
    codec: TextCodec,
    prompt: Prompt,
    *,
    caller: str,
    ending: Ending,
    variables: Mapping[str, Any] = NO_VARIABLES,
    tools: Toolbox | None = None,
) -> list[int]:
    """Its token ids; ending, variables and tools are for conversations alone.

    Raises TemplateFault, InvalidRequest, LimitReached.
    """
    match prompt:
        case TokenPrompt():
            return prompt.token_ids
        case str():
            return await codec.encode_text(prompt)
        case _:
            return await codec.encode_chat(
                prompt,
                caller=caller,
                ending=ending,
                variables=variables,
                tools=tools.definitions if tools is not None else (),
            )


def field_of(prompt: Prompt) -> str:
    """The field that it comes in."""
    return "prompt" if isinstance(prompt, str | TokenPrompt) else "messages"


def fit(
    max_tokens: int | None, num_prompt_tokens: int, context_length: int, *, prompt_field: str
) -> int:
    """Most tokens to generate: what is asked for, or the rest of the context.

    Raises ContextLengthExceeded.
    """
    room = context_length - num_prompt_tokens
    wanted = max_tokens or 1
    if wanted > room:
        raise ContextLengthExceeded(
            f"This model's context is {context_length} tokens; the prompt has {num_prompt_tokens}"
            f" and at least {wanted} are asked for. Shorten the prompt or ask for fewer.",
            param="max_tokens" if max_tokens and room > 0 else prompt_field,
        )
    return max_tokens or room


def spelled(prompts: Sequence[Prompt]) -> str:
    """As their client sent them: a text as it is, all else in JSON."""
    if len(prompts) == 1 and isinstance(prompts[0], str):
        return prompts[0]
    found = [each.token_ids if isinstance(each, TokenPrompt) else each for each in prompts]
    return msgspec.json.encode(found[0] if len(found) == 1 else found).decode()


def seen_by_policy(
    prompts: Sequence[Prompt],
    codec: TextCodec,
    encoded: Sequence[Sequence[int]],
    fields: frozenset[str],
    *,
    max_tokens: int,
    tools: Toolbox | None,
) -> Asked:
    """A request as its policy sees it: every message by itself, token ids as their text.

    The calls in a message are a text of their own, and so is what is said of each tool.
    """

    def texts() -> list[str]:
        found: list[str] = []
        for prompt, prompt_ids in zip(prompts, encoded, strict=True):
            match prompt:
                case TokenPrompt():
                    found.append(codec.decode(prompt_ids))
                case str():
                    found.append(prompt)
                case _:
                    found += _said_in(prompt)
        told = tools.definitions if tools is not None else ()
        return found + ["\n".join(strings_in(each)) for each in told]

    return Asked(
        fields=fields,
        prompt_field=field_of(prompts[0]),
        num_prompt_tokens=max(map(len, encoded)),
        max_tokens=max_tokens,
        texts=texts,
    )


def _said_in(messages: Messages) -> list[str]:
    said = [message["content"] for message in messages]
    thought = [each["reasoning_content"] for each in messages if "reasoning_content" in each]
    called = [each["tool_calls"] for each in messages if "tool_calls" in each]
    return [*said, *thought, *("\n".join(strings_in(each)) for each in called)]
