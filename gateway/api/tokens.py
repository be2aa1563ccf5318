"""POST /v1/tokenize and POST /v1/detokenize: text as a model's tokens, and back.

Free of charge, and under no limit but the size of a body: no engine is asked, and what is counted
here may be sent as a request that is. The fields are vLLM's.
"""

from typing import Annotated

import msgspec
from litestar import post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from gateway.api.chat import ChatMessage
from gateway.api.fields import TokenIds, refuse_unserved
from gateway.auth import Principal
from gateway.errors import InvalidRequest
from gateway.inference import Inference, Prompt

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


def _prompt(data: TokenizeRequest) -> Prompt:
    if (data.messages is None) == (data.prompt is None):
        raise InvalidRequest("Give 'prompt' or 'messages': one of them.", param="prompt")
    if data.prompt is not None:
        return data.prompt
    if data.add_special_tokens:
        raise InvalidRequest(
            "'add_special_tokens' is for 'prompt': a chat template writes its own. Leave it out.",
            param="add_special_tokens",
        )
    assert data.messages is not None
    for number, message in enumerate(data.messages):
        refuse_unserved(message, place=f"messages[{number}].")
    return [message.for_template() for message in data.messages]
