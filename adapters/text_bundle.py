"""What turns text into tokens and back for one model: everything the gateway needs, by value.

Knows nothing of transformers: a bundle is made elsewhere, and read here and in the gateway.
"""

import hashlib
from typing import Literal

import msgspec

from adapters.errors import Finding, UnreadableArtifact

# What the final hidden states of a text's tokens come together to: the mean of all, or the last.
PoolingKind = Literal["mean", "last"]


# Without defaults, so that a bundle keeps its digest when the fields that it may have grow.
class TextBundle(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A tokenizer, a chat template and the numbers that go with them."""

    # The file of the `tokenizers` library.
    tokenizer_json: bytes
    # Jinja; None for a model that cannot chat.
    chat_template: str | None
    # Such as bos_token and eos_token, as templates see them.
    special_tokens: dict[str, str]
    eos_token_ids: tuple[int, ...]
    # Those of temperature, top_p and top_k that the model's generation configuration names.
    generation_defaults: dict[str, float | int]
    # Most tokens of prompt and answer together.
    context_length: int
    vocab_size: int
    # How its checkpoint says that texts become vectors; None where it says nothing.
    pooling: PoolingKind | None = None


# Sorted, so that equal bundles have equal bytes.
_encoder = msgspec.msgpack.Encoder(order="sorted")
_decoder = msgspec.msgpack.Decoder(TextBundle)


def encode(bundle: TextBundle) -> bytes:
    """Return the canonical bytes of a bundle."""
    return _encoder.encode(bundle)


def decode(data: bytes) -> TextBundle:
    """Return the bundle of these bytes.

    Raises UnreadableArtifact.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        finding = Finding(
            code="bundle_unreadable",
            where="text bundle",
            message=f"is not a text bundle: {error}",
            fix="export the bundle again from the base model",
        )
        raise UnreadableArtifact([finding]) from error


def digest(bundle: TextBundle) -> str:
    """Return the SHA-256 of the canonical bytes, 64 hexadecimal digits."""
    return hashlib.sha256(encode(bundle)).hexdigest()
