"""What an adapter says about text: taken where it differs from the base, refused where it harms."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from adapters import tokenizer_files
from adapters.text_bundle import TextBundle
from adapters.tokenizer_json import is_linear
from tests.text_bombs import TOKENIZER_BOMBS, Bomb, small_bundle

BASE = small_bundle()
FIRST_NEW_ID = BASE.vocab_size - 8
SMALL_BOMBS = [bomb for bomb in TOKENIZER_BOMBS if bomb.code != "text_file_too_large"]


def codes(files: dict[str, bytes], *, num_added_tokens: int = 0) -> set[str]:
    bundle, findings = tokenizer_files.build(files, BASE, num_added_tokens=num_added_tokens)
    assert not (bundle and findings)
    return {finding.code for finding in findings}


def built(files: dict[str, Any], *, num_added_tokens: int = 0) -> TextBundle | None:
    contents = {
        name: value if isinstance(value, bytes) else json.dumps(value).encode()
        for name, value in files.items()
    }
    bundle, findings = tokenizer_files.build(contents, BASE, num_added_tokens=num_added_tokens)
    assert findings == []
    return bundle


def with_tokens(*contents: str) -> bytes:
    tokenizer = Tokenizer.from_buffer(BASE.tokenizer_json)
    tokenizer.add_tokens([AddedToken(content, normalized=False) for content in contents])
    return tokenizer.to_str().encode()


@pytest.mark.parametrize("bomb", SMALL_BOMBS, ids=lambda bomb: bomb.name)
def test_a_harmful_file_is_refused_with_its_code(bomb: Bomb) -> None:
    assert bomb.code in codes(bomb.files(BASE))


def test_a_file_above_its_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"a" * 1_000_000)
    contents, findings = tokenizer_files.read({path.name: path})
    assert contents == {}
    assert [finding.code for finding in findings] == ["text_file_too_large"]


def test_all_that_is_wrong_is_said_at_once() -> None:
    files = {
        "tokenizer.json": b"[]",
        "chat_template.jinja": b"\xff",
        "generation_config.json": b'{"top_p": 7}',
    }
    assert codes(files) == {"text_file_unreadable", "template_invalid", "generation_invalid"}


@pytest.mark.parametrize("indent", [None, 2])
def test_the_bases_own_files_make_no_bundle_however_they_are_written(indent: int | None) -> None:
    tokenizer = json.loads(BASE.tokenizer_json)
    # Older versions wrote merges so.
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    assert BASE.chat_template is not None
    files = {
        "tokenizer.json": json.dumps(tokenizer, indent=indent).encode(),
        "tokenizer_config.json": BASE.special_tokens | {"model_max_length": 7},
        "chat_template.jinja": BASE.chat_template.replace("\n", "\r\n").encode(),
        "generation_config.json": {"eos_token_id": 1},
    }
    assert built(files) is None


def test_how_a_trainer_padded_its_batches_makes_no_bundle() -> None:
    tokenizer = Tokenizer.from_buffer(BASE.tokenizer_json)
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(64)
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": {"pad_token": "<reserved>"},
    }
    assert built(files) is None


def test_no_files_and_no_added_tokens_make_no_bundle() -> None:
    assert built({}) is None


def test_added_tokens_are_single_ids_where_there_are_rows_for_them() -> None:
    bundle = built({"tokenizer.json": with_tokens("<sql>", "</sql>")})
    assert bundle is not None
    tokenizer = Tokenizer.from_buffer(bundle.tokenizer_json)
    assert tokenizer.encode("<sql></sql>").ids == [FIRST_NEW_ID, FIRST_NEW_ID + 1]
    assert bundle.vocab_size == BASE.vocab_size


def test_a_ninth_token_needs_a_row_of_the_adapters_own() -> None:
    nine = {"tokenizer.json": with_tokens(*(f"<{number}>" for number in range(9)))}
    assert codes(nine) == {"token_without_row"}
    bundle = built(nine, num_added_tokens=1)
    assert bundle is not None
    assert bundle.vocab_size == BASE.vocab_size + 1


def test_rows_that_no_tokenizer_names_are_refused() -> None:
    assert codes({}, num_added_tokens=2) == {"tokenizer_missing"}


def test_a_reserved_token_may_be_given_a_name() -> None:
    tokenizer = json.loads(BASE.tokenizer_json)
    tokenizer["added_tokens"][2]["content"] = "<sql>"
    tokenizer["model"]["vocab"]["<sql>"] = tokenizer["model"]["vocab"].pop("<reserved>")
    assert built({"tokenizer.json": tokenizer}) is not None


def test_an_own_end_token_ends_answers_beside_the_bases() -> None:
    files = {
        "tokenizer.json": with_tokens("<done>"),
        "tokenizer_config.json": {"eos_token": {"content": "<done>", "special": True}},
    }
    bundle = built(files)
    assert bundle is not None
    assert bundle.eos_token_ids == (1, FIRST_NEW_ID)


def test_an_own_template_sees_the_names_that_it_uses() -> None:
    files = {
        "chat_template.jinja": b"{{ pad_token }}{{ messages[0].content }}",
        "special_tokens_map.json": {"pad_token": "<reserved>", "bos_token": "</s>"},
    }
    bundle = built(files)
    assert bundle is not None
    assert bundle.special_tokens == BASE.special_tokens | {"pad_token": "<reserved>"}
    assert bundle.tokenizer_json == BASE.tokenizer_json


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"chat_template": "own"}},
        {"chat_template.json": {"chat_template": "own"}},
        {"chat_template.jinja": b"own", "tokenizer_config.json": {"chat_template": "older"}},
        {
            "tokenizer_config.json": {
                "chat_template": [
                    {"name": "tool_use", "template": "other"},
                    {"name": "default", "template": "own"},
                ]
            }
        },
    ],
)
def test_a_template_is_found_wherever_trainers_put_it(files: dict[str, Any]) -> None:
    bundle = built(files)
    assert bundle is not None
    assert bundle.chat_template == "own"


def test_sampling_defaults_are_the_adapters_over_the_bases() -> None:
    bundle = built({"generation_config.json": {"temperature": 0.2, "top_k": 5, "do_sample": True}})
    assert bundle is not None
    assert bundle.generation_defaults == {"temperature": 0.2, "top_k": 5}


@pytest.mark.parametrize(
    "regex", [r"\d", r"\p{N}{1,3}", r" ?\p{L}+", r"[\r\n]+|[a-z0-9_]+", r"\s+"]
)
def test_plain_patterns_are_linear(regex: str) -> None:
    assert is_linear(regex)


@pytest.mark.parametrize(
    "regex",
    [
        r"(a+)+",
        r"a+b",
        r"\s+$",
        r"a*",
        r".*",
        r"(?i)x",
        r"a??",
        r"a+?",
        r"[[:alpha:]]+",
        r"a|",
        r"\1",
    ],
)
def test_patterns_that_may_go_back_are_not(regex: str) -> None:
    assert not is_linear(regex)
