"""POST /v1/tokenize and POST /v1/detokenize: text as a model's tokens, and back.

Free of charge, and under no limit but the size of a body: no engine is asked, and what is counted
here may be sent as a request that is. The fields are vLLM's.
"""

from typing import Annotated

import msgspec
from litestar import post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from gateway.api.chat import ChatMessage, conversation, ending_of
from gateway.api.fields import TemplateVariables, TokenIds
from gateway.api.tools import ToolChoice, Tools, asked_toolbox
from gateway.auth import Principal
from gateway.errors import InvalidRequest
from gateway.inference import Inference
from gateway.prompts import Messages

# About a million tokens, in two seconds of a thread.
MAX_BODY_BYTES = 4 << 20


class TokenizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text, or a conversation as a chat request has it: `prompt` or `messages`, not both."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)] | None = None
    # Those that the tokenizer puts around a text by itself; true where it is left out. A chat
    # template writes its own.
    add_special_tokens: bool | None = None
    # Of `messages`, as in a chat request.
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    # Whether to spell each token too.
    return_token_strs: bool | None = None


class Tokens(msgspec.Struct, frozen=True):
    """The tokens of a text, how many they are, and how many the model can take."""

    count: int
    max_model_len: int
    tokens: list[int]
    # As the vocabulary writes them; null where nobody asked.
    token_strs: list[str] | None


class DetokenizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Token ids of one model."""

    model: str
    tokens: TokenIds


class Detokenized(msgspec.Struct, frozen=True):
    """Their text, special tokens as they are written."""

    prompt: str


@post(
    "/v1/tokenize",
    scope="inference",
    status_code=200,
    tags=["tokens"],
    summary="Turn a text into a model's tokens",
    request_max_body_size=MAX_BODY_BYTES,
)
async def tokenize(
    data: JSONBody[TokenizeRequest],
    principal: NamedDependency[Principal],
    inference: NamedDependency[Inference],
) -> Tokens:
    """Exactly the tokens that a request with this text would have. Nothing is charged."""
    token_ids, codec, target = await inference.tokenize(
        principal,
        model=data.model,
        prompt=_prompt(data),
        add_special_tokens=data.add_special_tokens is not False,
        ending=ending_of(
            data.messages or (),
            continues=data.continue_final_message,
            asks=data.add_generation_prompt,
        ),
        template_variables=data.chat_template_kwargs or {},
        tools=asked_toolbox(data.tools, data.tool_choice),
    )
    return Tokens(
        count=len(token_ids),
        max_model_len=target.context_length,
        tokens=token_ids,
        token_strs=codec.token_symbols(token_ids) if data.return_token_strs else None,
    )


@post(
    "/v1/detokenize",
    scope="inference",
    status_code=200,
    tags=["tokens"],
    summary="Turn a model's tokens into text",
    request_max_body_size=MAX_BODY_BYTES,
)
async def detokenize(
    data: JSONBody[DetokenizeRequest],
    principal: NamedDependency[Principal],
    inference: NamedDependency[Inference],
) -> Detokenized:
    """Nothing is charged."""
    _, codec = await inference.codec_of(principal, data.model)
    return Detokenized(await codec.spell(data.tokens))


# What only a conversation has.
CHAT_FIELDS = (
    "tools",
    "tool_choice",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
)


def _prompt(data: TokenizeRequest) -> Messages | str:
    if (data.messages is None) == (data.prompt is None):
        raise InvalidRequest("Give 'prompt' or 'messages': one of them.", param="prompt")
    if data.messages is None:
        for name in CHAT_FIELDS:
            if getattr(data, name) is not None:
                raise InvalidRequest(f"'{name}' belongs to 'messages': leave it out.", param=name)
        assert data.prompt is not None
        return data.prompt
    if data.add_special_tokens:
        raise InvalidRequest(
            "'add_special_tokens' is for 'prompt': a chat template writes its own. Leave it out.",
            param="add_special_tokens",
        )
    return conversation(data.messages)
