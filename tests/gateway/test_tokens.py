"""Facts about counting: what a text is to a model, and back, free of charge."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.database import Database
from tests.conftest import Home
from tests.engine.echo_engine import INFO
from tests.gateway.whole_gateway import MODEL, Gateway, chat, whole_gateway


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with whole_gateway(home, database, tmp_path) as running:
        yield running


async def tokenize(gateway: Gateway, **fields: Any) -> httpx.Response:
    return await gateway.client.post("/v1/tokenize", json={"model": MODEL, **fields})


async def detokenize(gateway: Gateway, **fields: Any) -> httpx.Response:
    return await gateway.client.post("/v1/detokenize", json={"model": MODEL, **fields})


async def test_a_text_is_told_as_tokens_and_comes_back(gateway: Gateway) -> None:
    answer = await tokenize(gateway, prompt="w5 w6 w7", return_token_strs=True)
    assert answer.json() == {
        "count": 3,
        "max_model_len": INFO.max_model_len,
        "tokens": [5, 6, 7],
        "token_strs": ["w5", "w6", "w7"],
    }
    back = await detokenize(gateway, tokens=[5, 6, 7])
    assert back.json() == {"prompt": "w5 w6 w7"}


async def test_an_empty_text_has_no_tokens(gateway: Gateway) -> None:
    answer = (await tokenize(gateway, prompt="", add_special_tokens=False)).json()
    assert (answer["count"], answer["tokens"], answer["token_strs"]) == (0, [], None)
    assert (await detokenize(gateway, tokens=[])).json() == {"prompt": ""}


async def test_a_conversation_counts_as_its_chat_request_does(gateway: Gateway) -> None:
    messages = chat("w1 w2 w3")["messages"]
    counted = (await tokenize(gateway, messages=messages)).json()
    answer = await gateway.client.post("/v1/chat/completions", json=chat("w1 w2 w3"))
    assert counted["count"] == answer.json()["usage"]["prompt_tokens"]


FUNCTION = {"name": "look_up", "parameters": {"type": "object", "properties": {}}}


TOLD: list[dict[str, Any]] = [
    {"add_generation_prompt": False},
    {"tools": [{"type": "function", "function": FUNCTION}]},
    {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "none"},
    {"chat_template_kwargs": {"mood": "w4"}},
    {
        "messages": [*chat("w1")["messages"], {"role": "assistant", "content": "w999"}],
        "continue_final_message": True,
    },
]


async def test_what_a_chat_request_tells_its_template_is_counted(
    gateway: Gateway, subtests: pytest.Subtests
) -> None:
    for fields in TOLD:
        with subtests.test(f"{fields}"):
            asked = {**chat("w1 w2 w3"), **fields}
            told = {name: value for name, value in asked.items() if name in {"messages", *fields}}
            counted = (await tokenize(gateway, **told)).json()
            answer = await gateway.client.post("/v1/chat/completions", json=asked)
            assert counted["count"] == answer.json()["usage"]["prompt_tokens"]


async def test_what_belongs_to_conversations_is_refused_beside_a_text(gateway: Gateway) -> None:
    answer = await tokenize(gateway, prompt="w1", add_generation_prompt=True)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "add_generation_prompt"


async def test_it_is_free_and_under_no_limit(gateway: Gateway) -> None:
    await gateway.limit(requests_per_minute=1)
    for _ in range(3):
        assert (await tokenize(gateway, prompt="w1")).status_code == 200
        assert (await detokenize(gateway, tokens=[1])).status_code == 200
    assert not gateway.core.seen
    assert await gateway.events(0) == []


NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": "w1", "messages": chat()["messages"]}, "prompt"),
    ({"messages": []}, "messages"),
    ({"messages": chat()["messages"], "add_special_tokens": True}, "add_special_tokens"),
    ({"prompt": "w1", "stream": True}, "stream"),
]


async def test_what_makes_no_sense_is_refused_by_name(
    gateway: Gateway, subtests: pytest.Subtests
) -> None:
    for body, param in NONSENSE:
        with subtests.test(f"{body}"):
            answer = await tokenize(gateway, **body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


NO_TOKENS: list[Any] = [[1, 1000], [2**40], [-1], ["w1"], None]


async def test_what_is_no_token_of_the_model_is_refused(
    gateway: Gateway, subtests: pytest.Subtests
) -> None:
    for tokens in NO_TOKENS:
        with subtests.test(f"{tokens}"):
            answer = await detokenize(gateway, tokens=tokens)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"].startswith("tokens")


async def test_a_model_that_the_caller_has_not_is_not_found(gateway: Gateway) -> None:
    for answer in (
        await tokenize(gateway, model="globex-sql", prompt="w1"),
        await detokenize(gateway, model="globex-sql", tokens=[1]),
    ):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


async def test_a_body_that_is_too_large_is_refused(gateway: Gateway) -> None:
    answer = await tokenize(gateway, prompt="w1 " * 1_500_000)
    assert answer.status_code == 413
