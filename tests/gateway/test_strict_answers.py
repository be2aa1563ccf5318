"""Every answer and every chunk is one by the `openai` SDK's own models, read strictly.

Beyond them it says what README tells of, and nothing else. Where OpenAI itself answers a null that
its models do not have, so do we: the first token of an echoed prompt has no log-probability, and a
chunk of a completion that goes on has no finish reason.
"""

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.database import Database
from tests.conftest import Home
from tests.gateway.whole_gateway import MODEL, Gateway, chat, whole_gateway

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
OURS = {
    *("cost_nano", "stopped_by"),
    *("token_ids", "prompt_token_ids", "prompt_logprobs"),
}
EXTRAS: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"logprobs": True, "top_logprobs": 2, "n": 2},
    {"return_token_ids": True, "metadata": {"a": "b"}, "service_tier": "flex"},
    {"stop": "w2"},
    {"max_cost": 5000},
]
PROMPT_EXTRAS: list[dict[str, Any]] = [
    {},
    {"n": 2, "prompt": ["w1 w2", "w3"]},
    {"logprobs": 2, "echo": True, "n": 2},
    {"return_token_ids": True, "echo": True},
    {"stop": "w2"},
    {"max_cost": 5000},
]


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with whole_gateway(home, database, tmp_path) as gateway:
        yield gateway


def read(kind: type[pydantic.BaseModel], raw: str) -> Any:
    """Read strictly; what the model does not know must be ours."""
    found = kind.model_validate_json(raw, strict=True)
    assert set(unknown(found)) <= OURS, raw
    return found


def unknown(value: Any) -> Iterator[str]:
    if isinstance(value, pydantic.BaseModel):
        yield from value.model_extra or {}
        for name in type(value).model_fields:
            yield from unknown(getattr(value, name))
    elif isinstance(value, list):
        for each in value:
            yield from unknown(each)


def without_openais_nulls(raw: str) -> str:
    """A completion as OpenAI's models have it."""
    body = json.loads(raw)
    for choice in body["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        if choice["logprobs"] and None in choice["logprobs"]["token_logprobs"]:
            assert choice["logprobs"]["token_logprobs"].index(None) == 0
            choice["logprobs"]["token_logprobs"][0] = 0.0
    return json.dumps(body)


async def chunks(gateway: Gateway, path: str, body: dict[str, Any]) -> list[str]:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = await gateway.client.post(path, json=body | options)
    assert answer.status_code == 200, answer.text
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    return events


async def test_a_chat_is_one_of_the_sdks(gateway: Gateway, subtests: pytest.Subtests) -> None:
    for fields in EXTRAS:
        with subtests.test(f"{fields}"):
            body = chat("w1 w2 w3", **fields)
            answer = await gateway.client.post(CHAT, json=body)
            assert answer.status_code == 200, answer.text
            assert len(read(ChatCompletion, answer.text).choices) == fields.get("n", 1)
            for chunk in await chunks(gateway, CHAT, body):
                read(ChatCompletionChunk, chunk)


async def test_a_completion_is_one_of_the_sdks(gateway: Gateway, subtests: pytest.Subtests) -> None:
    for fields in PROMPT_EXTRAS:
        with subtests.test(f"{fields}"):
            body = {"model": MODEL, "prompt": "w1 w2 w3", "max_tokens": 8, **fields}
            answer = await gateway.client.post(COMPLETIONS, json=body)
            assert answer.status_code == 200, answer.text
            read(Completion, without_openais_nulls(answer.text))
            for chunk in await chunks(gateway, COMPLETIONS, body):
                read(Completion, without_openais_nulls(chunk))
            told = await gateway.client.post(COMPLETIONS, json=body | {"prompt_logprobs": 2})
            read(Completion, without_openais_nulls(told.text))


async def test_a_model_is_one_of_the_sdks(gateway: Gateway) -> None:
    listed = (await gateway.client.get("/v1/models")).json()
    assert listed["object"] == "list"
    alone = (await gateway.client.get(f"/v1/models/{MODEL}")).json()
    for each in (*listed["data"], alone):
        found = Model.model_validate_json(json.dumps(each), strict=True)
        assert set(unknown(found)) <= {"root", "parent", "adapter_version", "adapter_digest"}
