"""A text bundle is its bytes: equal bundles have one digest, whoever made them."""

import msgspec
import pytest

from adapters import text_bundle
from adapters.errors import UnreadableArtifact
from adapters.text_bundle import TextBundle

BUNDLE = TextBundle(
    tokenizer_json=b'{"model": {}}',
    chat_template="{{ messages }}",
    special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
    eos_token_ids=(2, 7),
    generation_defaults={"temperature": 0.6, "top_k": 20},
    context_length=2048,
    vocab_size=49152,
)


def test_a_bundle_survives_its_bytes() -> None:
    assert text_bundle.decode(text_bundle.encode(BUNDLE)) == BUNDLE


def test_the_order_of_names_does_not_change_the_digest() -> None:
    turned = msgspec.structs.replace(
        BUNDLE, special_tokens=dict(reversed(BUNDLE.special_tokens.items()))
    )
    assert text_bundle.digest(turned) == text_bundle.digest(BUNDLE)


def test_any_other_content_changes_the_digest() -> None:
    others = [
        msgspec.structs.replace(BUNDLE, tokenizer_json=b"{}"),
        msgspec.structs.replace(BUNDLE, chat_template=None),
        msgspec.structs.replace(BUNDLE, eos_token_ids=(2,)),
        msgspec.structs.replace(BUNDLE, context_length=4096),
    ]
    assert len({text_bundle.digest(bundle) for bundle in (BUNDLE, *others)}) == 5


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xc1", b"\x91" * 100_000])
def test_bytes_that_are_no_bundle_are_refused(data: bytes) -> None:
    with pytest.raises(UnreadableArtifact):
        text_bundle.decode(data)
