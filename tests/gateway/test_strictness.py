"""Every field of OpenAI's requests is honoured, does nothing at its default, or is refused.

The table in README says which values do what; each of its cells is asked of a whole gateway here.
`pytest tests/gateway/test_strictness.py --write-readme` writes it.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsStreaming as ChatParams,
)
from openai.types.completion_create_params import CompletionCreateParamsStreaming as Params
from openai.types.embedding_create_params import EmbeddingCreateParams as EmbeddingParams
from openai.types.responses.response_create_params import (
    ResponseCreateParamsStreaming as ResponseParams,
)

from gateway.api.chat import ChatCompletionRequest
from gateway.api.completions import CompletionRequest
from gateway.api.embeddings import EmbeddingsRequest
from gateway.api.responses.request import ResponseRequest
from gateway.database import Database
from tests.conftest import Home
from tests.gateway.whole_gateway import MODEL, whole_gateway

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- strictness -->\n", "<!-- /strictness -->\n"


@dataclass(frozen=True)
class Row:
    """What becomes of the values of one field."""

    name: str
    honoured: tuple[Any, ...] = ()
    # Besides null, which every field may be that is not required.
    neutral: tuple[Any, ...] = ()
    refused: tuple[Any, ...] = ()
    # What the honoured values need beside them.
    beside: dict[str, Any] = field(default_factory=dict)
    # The one request that has it, where only one has.
    only: str = ""
    is_required: bool = False

    @property
    def all_neutral(self) -> tuple[Any, ...]:
        return self.neutral if self.is_required else (None, *self.neutral)


SAMPLING = (
    Row("frequency_penalty", (0.5,), (0,), (2.5,)),
    Row("logit_bias", ({"7": -100},), ({},), ({"7": 101},)),
    Row("presence_penalty", (0.5,), (0,), (-2.5,)),
    Row("seed", (7,), (), (1.5,)),
    Row("stop", ("w2", ["w2", "w9"]), ([],), ("",)),
    Row("stream", (True,), (False,), ("yes",)),
    Row("stream_options", ({"include_usage": True},), (), ({"x": 1},), beside={"stream": True}),
    Row("temperature", (0.5,), (), (2.5,)),
    Row("top_p", (0.5,), (1,), (0,)),
    Row("user", ("ada",), ("",), (7,)),
)
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CHAT = (
    Row("model", (MODEL,), (), (None,), is_required=True),
    Row("messages", ([{"role": "user", "content": "w999"}],), (), ([],), is_required=True),
    *SAMPLING,
    Row("audio", (), (), ({"format": "wav", "voice": "ash"},)),
    Row("function_call", (), ("none",), ({"name": "f"},)),
    Row("functions", (), ([],), ([FUNCTION],)),
    Row("logprobs", (True,), (False,), (2,)),
    Row("max_completion_tokens", (3,), (), (0,)),
    Row("max_tokens", (3,), (), (0,)),
    Row("metadata", ({"team": "a"},), ({},), ({"team": 1},)),
    Row("modalities", (), (["text"],), (["text", "audio"],)),
    Row("moderation", (), (), ({"model": "omni-moderation-latest"},)),
    Row("n", (2, 128), (1,), (0, 129)),
    Row("parallel_tool_calls", (False,), (True,), ("yes",), beside={"tools": [TOOL]}),
    Row("prediction", (), (), ({"type": "content", "content": "w1"},)),
    Row("prompt_cache_key", ("a",), (), (7,)),
    Row("prompt_cache_options", (), ({"mode": "implicit"},), ({"mode": "explicit"},)),
    Row("prompt_cache_retention", (), ("in_memory",), ("24h",)),
    Row("reasoning_effort", (), (), ("high",)),
    Row("response_format", ({"type": "json_object"},), ({"type": "text"},), ({"type": "xml"},)),
    Row("safety_identifier", ("ada",), ("",), (7,)),
    Row("service_tier", ("flex", "priority", "fast"), ("auto", "default"), ("scale",)),
    Row("store", (), (False,), (True,)),
    Row(
        "tool_choice",
        ("required", {"type": "function", "function": {"name": "f"}}),
        ("auto", "none"),
        ("perhaps",),
        beside={"tools": [TOOL]},
    ),
    Row("tools", ([TOOL],), ([],), ([{"type": "custom", "custom": {"name": "f"}}],)),
    Row("top_logprobs", (2,), (), (21,), beside={"logprobs": True}),
    Row("verbosity", (), ("medium",), ("low",)),
    Row("web_search_options", (), (), ({},)),
)
COMPLETIONS = (
    Row("model", (MODEL,), (), (None,), is_required=True),
    Row(
        "prompt",
        ("w1 w2", [1, 2], ["w1", "w2"], [[1], [2, 3]]),
        (),
        (None, "", [], ["w1", 2]),
        is_required=True,
    ),
    *SAMPLING,
    Row("best_of", (2,), (1,), (3,), beside={"n": 2}),
    Row("echo", (True,), (False,), ("yes",)),
    Row("logprobs", (2,), (), (21,)),
    Row("max_tokens", (3,), (16,), (0,)),
    Row("n", (2, 128), (1,), (0, 129)),
    Row("suffix", (), (), ("w9",)),
)
FLAT_TOOL = {"type": "function", **FUNCTION}
LOGPROBS = "message.output_text.logprobs"
HIDDEN = "reasoning.encrypted_content"
ALLOWED = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}
RESPONSES = (
    Row("model", (MODEL,), (), (None,), is_required=True),
    Row(
        "input",
        ("w1 w2", [{"role": "user", "content": "w999"}]),
        (),
        (None, "", [], [{"type": "item_reference", "id": "msg_1"}]),
        is_required=True,
    ),
    Row("access_programs", (), (), ({"cyber": "standard"},)),
    Row("background", (), (False,), (True,)),
    Row(
        "background_options",
        (),
        ({"completion_window": "soonest"},),
        ({"completion_window": "2h"}, {"continuation_id": "a"}),
    ),
    Row("context_management", (), ([],), ([{"type": "compaction"}],)),
    Row("conversation", (), (), ("conv_1",)),
    Row("image", (), ({"context_compression": "auto"},), ({"context_compression": "enabled"},)),
    Row("include", ([LOGPROBS],), ([], [HIDDEN]), (["file_search_call.results"],)),
    Row("instructions", ("w7",), ("",), (7,)),
    Row("max_output_tokens", (3,), (), (0,)),
    Row("max_tool_calls", (), (), (2,)),
    Row("metadata", ({"team": "a"},), ({},), ({"team": 1},)),
    Row("moderation", (), (), ({"model": "omni-moderation-latest"},)),
    Row("parallel_tool_calls", (False,), (True,), ("yes",), beside={"tools": [FLAT_TOOL]}),
    Row("previous_response_id", (), (), ("resp_1",)),
    Row("prompt", (), (), ({"id": "pmpt_1"},)),
    Row("prompt_cache_key", ("a",), (), (7,)),
    Row("prompt_cache_options", (), ({"mode": "implicit"},), ({"mode": "explicit"},)),
    Row("prompt_cache_retention", (), ("in_memory",), ("24h",)),
    Row(
        "reasoning",
        (),
        ({"effort": None, "summary": None, "mode": "standard"},),
        ({"effort": "high"}, {"summary": "auto"}),
    ),
    Row("safety_identifier", ("ada",), ("",), (7,)),
    Row("service_tier", ("flex", "priority", "fast"), ("auto", "default"), ("scale",)),
    Row("store", (), (False,), (True,)),
    Row("stream", (True,), (False,), ("yes",)),
    Row(
        "stream_options",
        ({"include_obfuscation": True},),
        (),
        ({"x": 1},),
        beside={"stream": True},
    ),
    Row("temperature", (0.5,), (), (2.5,)),
    Row(
        "text",
        ({"format": {"type": "json_object"}},),
        ({"format": {"type": "text"}, "verbosity": "medium"},),
        ({"verbosity": "low"}, {"format": {"type": "grammar"}}),
    ),
    Row(
        "tool_choice",
        ("required", {"type": "function", "name": "f"}, ALLOWED),
        ("auto", "none"),
        ("perhaps", {"type": "web_search"}),
        beside={"tools": [FLAT_TOOL]},
    ),
    Row("tools", ([FLAT_TOOL],), ([],), ([{"type": "web_search"}],)),
    Row("top_logprobs", (2,), (0,), (2, 21), beside={"include": [LOGPROBS]}),
    Row("top_p", (0.5,), (1,), (0,)),
    Row("truncation", (), ("disabled",), ("auto",)),
    Row("user", ("ada",), ("",), (7,)),
)
EMBEDDINGS = (
    Row("model", (MODEL,), (), (None,), is_required=True),
    Row(
        "input",
        ("w1 w2", ["w1", "w2"], [1, 2], [[1], [2, 3]]),
        (),
        (None, "", [], ["w1", 2]),
        is_required=True,
    ),
    Row("dimensions", (), (), (2,)),
    Row("encoding_format", ("base64",), ("float",), ("hex",)),
    Row("user", ("ada",), ("",), (7,)),
)
BEYOND_EMBEDDINGS = (Row("pooling", ("last", "mean"), (), ("max",)),)
CHAT_PATH, PROMPT_PATH = "/v1/chat/completions", "/v1/completions"
RESPONSE_PATH, EMBEDDING_PATH = "/v1/responses", "/v1/embeddings"
# Answers are echoes: w999 ends them.
PROMPT = "w1 w2 w3 w999"
BEGUN = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w999"}]
# vLLM's, and `max_cost` of our own.
BEYOND = (
    Row("add_generation_prompt", (False,), (True,), ("yes",), only=CHAT_PATH),
    Row("allowed_token_ids", (), (), ([7],)),
    Row("bad_words", (), ([],), (["w1"],)),
    Row("chat_template", (), (), ("{{ messages }}",), only=CHAT_PATH),
    Row("chat_template_kwargs", ({"a": 1},), ({},), ({"messages": []},), only=CHAT_PATH),
    Row(
        "continue_final_message",
        (True,),
        (False,),
        (True,),
        beside={"messages": BEGUN},
        only=CHAT_PATH,
    ),
    Row("documents", (), ([],), ([{"text": "w1"}],), only=CHAT_PATH),
    Row("guided_choice", (["w1"],), (), ([],)),
    Row("guided_grammar", ('start: "w1"',), (), ("start: (",)),
    Row("guided_json", ({"type": "null"},), (), ({"not": {}},)),
    Row("guided_regex", ("w[1-3]",), (), ("(w",)),
    Row("ignore_eos", (True,), (False,), ("yes",)),
    Row("include_stop_str_in_output", (), (False,), (True,)),
    Row("length_penalty", (), (1,), (2,)),
    Row("max_cost", (10**9,), (), (0,)),
    Row("min_p", (0.1,), (0,), (1.5,)),
    Row("min_tokens", (2,), (0,), (-1,)),
    Row("priority", (), (0,), (5,)),
    Row("prompt_logprobs", (2,), (), (21,)),
    Row("repetition_penalty", (1.2,), (1,), (0,)),
    Row(
        "response_format",
        ({"type": "json_object"},),
        ({"type": "text"},),
        ({"type": "xml"},),
        only=PROMPT_PATH,
    ),
    Row("return_token_ids", (True,), (False,), ("yes",)),
    Row("return_tokens_as_token_ids", (), (False,), (True,)),
    Row("skip_special_tokens", (False,), (True,), ("yes",)),
    Row("spaces_between_special_tokens", (), (True,), (False,)),
    Row("stop_token_ids", ([7],), ([],), ([-1],)),
    Row("structured_outputs", ({"choice": ["w1"]},), ({},), ({"choice": []},)),
    Row("top_k", (2,), (0, -1), (-2,)),
    Row("truncate_prompt_tokens", (), (), (10,)),
    Row("use_beam_search", (), (False,), (True,)),
)
# Those that responses have too.
BEYOND_RESPONSES = tuple(
    replace(row, only="")
    for row in (*SAMPLING, *BEYOND)
    if row.name in ResponseRequest.__struct_fields__
    and row.name not in {each.name for each in RESPONSES}
)
TABLES = {
    CHAT_PATH: (
        CHAT,
        ChatParams,
        {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]},
    ),
    PROMPT_PATH: (COMPLETIONS, Params, {"model": MODEL, "prompt": PROMPT}),
    RESPONSE_PATH: (RESPONSES, ResponseParams, {"model": MODEL, "input": PROMPT}),
    EMBEDDING_PATH: (EMBEDDINGS, EmbeddingParams, {"model": MODEL, "input": PROMPT}),
}


@pytest.fixture
async def client(
    home: Home, database: Database, tmp_path: Path
) -> AsyncIterator[httpx.AsyncClient]:
    """Speaks with a key that may ask for everything."""
    async with (
        whole_gateway(home, database, tmp_path) as gateway,
        await gateway.key(scopes=["inference", "priority"]) as client,
    ):
        yield client


@pytest.mark.parametrize("path", TABLES)
def test_the_table_has_every_field_of_the_sdks_requests_and_no_other(path: str) -> None:
    rows, params, _ = TABLES[path]
    names = [row.name for row in rows]
    assert sorted(names) == sorted(params.__required_keys__ | params.__optional_keys__)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT_PATH, ChatCompletionRequest),
        (PROMPT_PATH, CompletionRequest),
        (RESPONSE_PATH, ResponseRequest),
        (EMBEDDING_PATH, EmbeddingsRequest),
    ],
)
def test_no_field_that_is_taken_is_in_no_table(path: str, body: type[msgspec.Struct]) -> None:
    rows = _rows(path)
    assert sorted(row.name for row in rows) == sorted(body.__struct_fields__)
    for row in rows:
        assert row.honoured or (row.all_neutral and row.refused), row.name


@pytest.mark.parametrize("path", TABLES)
async def test_every_cell_of_the_table_is_true(client: httpx.AsyncClient, path: str) -> None:
    _, _, plain = TABLES[path]

    async def ask(**fields: Any) -> httpx.Response:
        return await client.post(path, json={**plain, **fields})

    untouched = _said(await ask())
    for row in _rows(path):
        for value in row.honoured:
            answer = await ask(**row.beside, **{row.name: value})
            assert answer.status_code == 200, (row.name, value, answer.text)
        for value in row.all_neutral:
            answer = await ask(**{row.name: value})
            assert answer.status_code == 200, (row.name, value, answer.text)
            assert _said(answer) == untouched, (row.name, value)
        for value in row.refused:
            answer = await ask(**{row.name: value})
            assert answer.status_code == 400, (row.name, value, answer.text)
            param = answer.json()["error"]["param"]
            assert param.split(".")[0].split("[")[0] == row.name, (row.name, value, param)


def test_the_readme_has_the_table(request: pytest.FixtureRequest) -> None:
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    written = before + BEGIN + _spelled() + END + after
    if request.config.getoption("--write-readme"):
        README.write_text(written)
    else:
        assert text == written, "run it with --write-readme"


def _said(answer: httpx.Response) -> Any:
    """What was answered, without what no answer shares with another."""
    made = answer.json()
    [things] = (made[name] for name in ("choices", "output", "data") if name in made)
    return [{**each, "id": ""} for each in things]


def _rows(path: str) -> list[Row]:
    """All that a request may have."""
    if path == RESPONSE_PATH:
        return [*RESPONSES, *BEYOND_RESPONSES]
    if path == EMBEDDING_PATH:
        return [*EMBEDDINGS, *BEYOND_EMBEDDINGS]
    return [*TABLES[path][0], *(row for row in BEYOND if row.only in ("", path))]


def _spelled() -> str:
    lines = []
    titles = {
        f"`{CHAT_PATH}`": CHAT,
        f"`{PROMPT_PATH}`": COMPLETIONS,
        "both, beyond OpenAI": BEYOND,
        f"`{RESPONSE_PATH}`": RESPONSES,
        f"`{RESPONSE_PATH}`, beyond OpenAI": BEYOND_RESPONSES,
        f"`{EMBEDDING_PATH}`": EMBEDDINGS,
        f"`{EMBEDDING_PATH}`, beyond OpenAI": BEYOND_EMBEDDINGS,
    }
    for title, rows in titles.items():
        lines += [
            f"| {title} | supported | accepted at its default | refused with 400 |",
            "|---|---|---|---|",
            *(
                f"| `{row.name}`{_only(row)} | {_cell(row.honoured)}{_beside(row)}"
                f" | {_cell(row.all_neutral)} | {_cell(row.refused)} |"
                for row in sorted(rows, key=lambda row: row.name)
            ),
            "",
        ]
    return "\n".join(lines)


def _only(row: Row) -> str:
    return f" (`{row.only}`)" if row.only else ""


def _beside(row: Row) -> str:
    return "".join(f" with `{name}: {json.dumps(row.beside[name])}`" for name in row.beside)


def _cell(values: tuple[Any, ...]) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in values)
