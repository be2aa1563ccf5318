"""Facts about batches as a client meets them: their lines, their files, their bill, their ends."""

import asyncio
import datetime
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch
from sqlalchemy import text

from gateway.database import Database
from tests.conftest import Home
from tests.gateway.whole_gateway import (
    MODEL,
    PATIENCE_S,
    TOKEN_NANO,
    Gateway,
    chat,
    whole_gateway,
)

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with whole_gateway(home, database, tmp_path) as running:
        yield running


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    """The clients' own library, which checks what it reads."""
    async with speaker(gateway, gateway.client) as made:
        yield made


def speaker(gateway: Gateway, asking: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{gateway.url}/v1",
        api_key=asking.headers["authorization"].removeprefix("Bearer "),
        max_retries=0,
        _strict_response_validation=True,
    )


def line(custom_id: str, body: Any = None, *, url: str = CHAT, **changes: Any) -> dict[str, Any]:
    body = chat("w7 w8") if body is None else body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **changes}


def spelled(lines: Sequence[Any]) -> bytes:
    return b"".join(
        each if isinstance(each, bytes) else json.dumps(each).encode() + b"\n" for each in lines
    )


async def create(
    client: openai.AsyncOpenAI, lines: Sequence[Any], *, endpoint: Any = CHAT, **fields: Any
) -> Batch:
    file = await client.files.create(file=("lines.jsonl", spelled(lines)), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields
    )


async def ended(client: openai.AsyncOpenAI, batch: Batch) -> Batch:
    async with asyncio.timeout(PATIENCE_S):
        while (found := await client.batches.retrieve(batch.id)).status not in ENDED:
            await asyncio.sleep(0.05)
    return found


async def read(client: openai.AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    """The lines of a file, by their custom ids."""
    if file_id is None:
        return {}
    content = await client.files.content(file_id)
    lines = [json.loads(each) for each in content.text.splitlines()]
    return {each["custom_id"]: each for each in lines}


async def test_every_line_is_answered_as_its_route_would_and_billed(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    asked = [line(f"order-{n}", chat(f"w{n} w8", max_tokens=n)) for n in range(1, 6)]
    made = await create(client, asked, metadata={"who": "me"})
    assert made.status == "validating"
    batch = await ended(client, made)
    assert (batch.status, batch.errors, batch.error_file_id) == ("completed", None, None)
    assert batch.metadata == {"who": "me"}
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 5, "completed": 5, "failed": 0}
    answers = await read(client, batch.output_file_id)
    assert set(answers) == {each["custom_id"] for each in asked}
    events = {str(event.id): event for event in await gateway.events(5)}
    for number in range(1, 6):
        answer = answers[f"order-{number}"]
        assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
        body = answer["response"]["body"]
        assert body["object"] == "chat.completion"
        assert body["usage"]["completion_tokens"] == number
        event = events[answer["response"]["request_id"]]
        assert event.endpoint == "batch.chat.completions"
        assert event.cost_nano == body["usage"]["cost_nano"] == (2 + number) * TOKEN_NANO
    assert len(events) == 5
    assert await gateway.differences() == []
