"""A text bundle says in text and tokens exactly what transformers says."""

import json
import shutil
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from adapters import text_bundle
from engine.errors import ConfigurationError
from engine.model.text_bundle import export
from tests.tokenizer_lab import KINDS, save_tokenizer

MODEL = Path("~/.cache/manylora/models/SmolLM2-135M-Instruct").expanduser()
TEXTS = [
    "",
    "The quick brown fox",
    "  leading, trailing  ",
    "naïve café — “quotes” … 价格 ¥100 🦜🦜",
    "def f(x):\n\treturn {'a': [1, 2.50]}\r\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "1234567890" * 20,
]
CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why? 🦜"}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    ],
]


@pytest.fixture(scope="module")
def bundle() -> text_bundle.TextBundle:
    return text_bundle.decode(text_bundle.encode(export(str(MODEL))))


@pytest.fixture(scope="module")
def tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The model's folder without its weights, to be changed."""
    for path in MODEL.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    return tmp_path


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("text", TEXTS)
def test_the_same_tokens_and_the_same_text_back(
    text: str, bundle: text_bundle.TextBundle, tokenizer: AutoTokenizer
) -> None:
    alone = Tokenizer.from_str(bundle.tokenizer_json.decode())
    for special in (False, True):
        ids = tokenizer.encode(text, add_special_tokens=special)
        assert alone.encode(text, add_special_tokens=special).ids == ids
        assert alone.decode(ids, skip_special_tokens=special) == tokenizer.decode(
            ids, skip_special_tokens=special, clean_up_tokenization_spaces=False
        )


@pytest.mark.parametrize("family", KINDS)
def test_every_familys_tokenizer_means_alone_what_it_means_to_transformers(
    family: str, tmp_path: Path
) -> None:
    save_tokenizer(KINDS[family], tmp_path)
    bundle = text_bundle.decode(text_bundle.encode(export(str(tmp_path))))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    alone = Tokenizer.from_str(bundle.tokenizer_json.decode())
    rendered = [
        reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in CONVERSATIONS
    ]
    for text in (*TEXTS, *rendered):
        for special in (False, True):
            ids = reference.encode(text, add_special_tokens=special)
            assert alone.encode(text, add_special_tokens=special).ids == ids
            assert alone.decode(ids, skip_special_tokens=special) == reference.decode(
                ids, skip_special_tokens=special, clean_up_tokenization_spaces=False
            )
    assert bundle.eos_token_ids == (reference.eos_token_id,)
    assert bundle.vocab_size == len(reference)
    assert bundle.special_tokens.get("bos_token") == reference.bos_token


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_template_renders_as_apply_chat_template_does(
    messages: list[dict[str, str]], bundle: text_bundle.TextBundle, tokenizer: AutoTokenizer
) -> None:
    assert bundle.chat_template is not None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    rendered = environment.from_string(bundle.chat_template).render(
        messages=messages, add_generation_prompt=True, **bundle.special_tokens
    )
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == expected


def test_the_numbers_of_the_model(bundle: text_bundle.TextBundle) -> None:
    assert bundle.eos_token_ids == (2,)
    assert (bundle.context_length, bundle.vocab_size) == (8192, 49152)
    assert bundle.generation_defaults == {}
    assert bundle.special_tokens["eos_token"] == "<|im_end|>"


def test_the_same_checkpoint_gives_the_same_digest(bundle: text_bundle.TextBundle) -> None:
    assert text_bundle.digest(export(str(MODEL))) == text_bundle.digest(bundle)


def test_all_end_tokens_and_sampling_defaults_are_taken(checkpoint: Path) -> None:
    change(checkpoint / "generation_config.json", eos_token_id=[7, 2], temperature=0.6, top_k=40)
    exported = export(str(checkpoint))
    assert exported.eos_token_ids == (7, 2)
    assert exported.generation_defaults == {"temperature": 0.6, "top_k": 40}


def test_an_end_token_beyond_the_vocabulary_is_left_out(checkpoint: Path) -> None:
    change(checkpoint / "generation_config.json", eos_token_id=[49152, 2])
    assert export(str(checkpoint)).eos_token_ids == (2,)


def test_a_model_without_template_or_generation_config_is_exported(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "generation_config.json").unlink()
    exported = export(str(checkpoint))
    assert exported.chat_template is None
    assert exported.eos_token_ids == (2,)


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=tmp_path.name):
        export(str(tmp_path))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}, None),
        ({"pooling_mode_cls_token": True}, None),
    ],
)
def test_a_checkpoint_may_say_how_its_texts_become_vectors(
    checkpoint: Path, said: dict[str, bool], expected: str | None
) -> None:
    (checkpoint / "1_Pooling").mkdir()
    (checkpoint / "1_Pooling" / "config.json").write_text(json.dumps(said))
    assert export(str(checkpoint)).pooling == expected


def test_a_checkpoint_that_does_not_say_has_the_digest_that_it_always_had(
    bundle: text_bundle.TextBundle,
) -> None:
    assert bundle.pooling is None
    assert b"\xa7pooling" not in text_bundle.encode(bundle)
