"""POST /v1/embeddings: texts as vectors, with a base model or an adapter."""

import asyncio
import base64
import struct
from functools import partial
from typing import Annotated, Any, Literal, cast

import msgspec
from litestar import Request, Response, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from adapters.text_bundle import PoolingKind
from gateway.api.answer import wait_unless_gone
from gateway.api.attempts import Answering, Desk, finish_whole, replay
from gateway.api.fields import (
    PromptTokensDetails,
    TokenId,
    TokenIds,
    User,
    end_user,
    given_fields,
    refuse_unserved,
)
from gateway.auth import caller_of
from gateway.embeddings import Embedding, EmbeddingInput, EmbeddingRequest
from gateway.errors import InvalidRequest
from gateway.idempotency import KeptAnswer
from gateway.prices import Bill

EncodingFormat = Literal["float", "base64"]
# As many as OpenAI's own API takes.
MAX_INPUTS = 2048
FLOAT_BYTES = 4
# Numbers are spelled in some 50 ns each: after so many, others have their turn.
NUMBERS_PER_TURN = 1 << 15

# A list is of texts, of token ids, or of lists of token ids: `_inputs` looks.
Inputs = Annotated[list[str | TokenId | TokenIds], msgspec.Meta(min_length=1, max_length=1_000_000)]


class EmbeddingsRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's embeddings request: one text or several, as text or as token ids."""

    model: str
    input: str | Inputs
    encoding_format: EncodingFormat | None = None
    # Whom the client asks for: reports can be grouped by it, and a canary keeps each on one side.
    user: User | None = None
    # Ours: what the final hidden states of an input's tokens come together to. The model's own way
    # where its checkpoint names one, and the mean where it does not.
    pooling: PoolingKind | None = None
    # Known, and refused unless the value changes nothing: see `fields.NEUTRAL_VALUES`.
    dimensions: int | None = None


class EmbeddingItem(msgspec.Struct, frozen=True):
    """One input's vector, of length one: numbers, or the base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingsUsage(msgspec.Struct, frozen=True):
    """What the vectors used and cost: the same numbers that the usage event keeps."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    # Nano-USD.
    cost_nano: int

    @classmethod
    def of(cls, bill: Bill) -> "EmbeddingsUsage":
        return cls(
            prompt_tokens=bill.prompt_tokens,
            total_tokens=bill.prompt_tokens,
            prompt_tokens_details=PromptTokensDetails(bill.cached_tokens),
            cost_nano=bill.cost_nano,
        )


class Embeddings(msgspec.Struct, frozen=True):
    """OpenAI's embeddings answer; `usage` also says what it cost."""

    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingsUsage
    object: Literal["list"] = "list"


@post(
    "/v1/embeddings",
    scope="inference",
    status_code=200,
    tags=["inference"],
    summary="Turn texts into vectors",
    request_max_body_size=16 << 20,
)
async def embeddings(
    data: JSONBody[EmbeddingsRequest],
    request: Request[Any, Any, Any],
    desk: NamedDependency[Desk],
) -> Response[Embeddings]:
    """Pool the final hidden states of each input, of a base model or one of the caller's adapters.

    Inputs share batches with everything else. Prompt tokens are billed, once all vectors are there.
    """
    principal, asked = caller_of(request), read_request(data)
    answering = await desk.attempts.begin(request, principal, is_streamed=False)
    if isinstance(answering, KeptAnswer):
        return replay(answering)
    try:
        embedding = await desk.inference.embed(principal, asked, answering.facts)
        return await _whole(embedding, data, await _collect(request, embedding), answering)
    except BaseException:
        answering.leave()
        raise


def read_request(data: EmbeddingsRequest) -> EmbeddingRequest:
    """What is asked for, freed of its spelling. Raises InvalidRequest."""
    refuse_unserved(data)
    return EmbeddingRequest(
        model=data.model,
        inputs=_inputs(data.input),
        pooling=data.pooling,
        user=end_user(data.user),
        fields=partial(given_fields, data),
    )


def _inputs(given: str | list[str | int | list[int]]) -> list[EmbeddingInput]:
    if isinstance(given, str):
        return [given]
    if all(isinstance(each, int) for each in given):
        return [cast("list[int]", given)]
    kind = type(given[0])
    if kind is int or not all(isinstance(each, kind) for each in given):
        raise InvalidRequest(
            "'input' is a list of different things: give texts, token ids, or lists of token ids.",
            param="input",
        )
    if len(given) > MAX_INPUTS:
        raise InvalidRequest(
            f"'input' has {len(given)} entries, above the {MAX_INPUTS} of a request: send several.",
            param="input",
        )
    return cast("list[EmbeddingInput]", given)


async def _collect(request: Request[Any, Any, Any], embedding: Embedding) -> list[bytes]:
    """Wait for all vectors, or leave them as soon as the client hangs up."""
    vectors = asyncio.ensure_future(embedding.vectors())
    try:
        await wait_unless_gone(request, vectors)
        return vectors.result()
    except BaseException:
        embedding.leave()
        raise


async def _whole(
    embedding: Embedding, data: EmbeddingsRequest, vectors: list[bytes], answering: Answering
) -> Response[Embeddings]:
    try:
        answer = await compose(embedding, data, vectors)
        return await finish_whole(embedding, answer, answering)
    except BaseException:
        embedding.leave()
        raise


async def compose(
    embedding: Embedding, data: EmbeddingsRequest, vectors: list[bytes]
) -> Embeddings:
    """The body of a whole answer."""
    return Embeddings(
        data=await _items(vectors, data.encoding_format or "float"),
        model=data.model,
        usage=EmbeddingsUsage.of(embedding.bill()),
    )


async def _items(vectors: list[bytes], encoding_format: EncodingFormat) -> list[EmbeddingItem]:
    items, num_numbers = [], 0
    for index, vector in enumerate(vectors):
        items.append(EmbeddingItem(index, _spelled(vector, encoding_format)))
        num_numbers += len(vector) // FLOAT_BYTES
        if num_numbers > NUMBERS_PER_TURN:
            num_numbers = 0
            await asyncio.sleep(0)
    return items


def _spelled(vector: bytes, encoding_format: EncodingFormat) -> list[float] | str:
    if encoding_format == "base64":
        return base64.b64encode(vector).decode()
    numbers = struct.unpack(f"<{len(vector) // FLOAT_BYTES}f", vector)
    # JSON already: what is left for the whole answer is to copy it.
    return cast("list[float]", msgspec.Raw(msgspec.json.encode(numbers)))
