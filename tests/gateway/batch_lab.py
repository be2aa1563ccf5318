"""Batches as a client makes them: lines, files of them, and a batch until it has ended."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx
import openai
from openai.types import Batch

from tests.gateway.whole_gateway import PATIENCE_S, Gateway, chat

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES = "/v1/responses"
ENDED = ("completed", "failed", "expired", "cancelled")


def speaker(url: str, key: str) -> openai.AsyncOpenAI:
    """The clients' own library, which checks what it reads."""
    return openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key=key, max_retries=0, _strict_response_validation=True
    )


def speaker_of(gateway: Gateway, asking: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return speaker(gateway.url, asking.headers["authorization"].removeprefix("Bearer "))


def line(custom_id: str, body: Any = None, *, url: str = CHAT, **changes: Any) -> dict[str, Any]:
    body = chat("w7 w8") if body is None else body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **changes}


def spelled(lines: Sequence[Any]) -> bytes:
    """Bytes stay as they are."""
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


async def ended(
    client: openai.AsyncOpenAI, batch: Batch, *, patience_s: float = PATIENCE_S
) -> Batch:
    async with asyncio.timeout(patience_s):
        while True:
            found = await client.batches.retrieve(batch.id)
            if found.status in ENDED:
                return found
            await asyncio.sleep(0.05)


async def read(client: openai.AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    """The lines of a file, by their custom ids, each of which is there once."""
    if file_id is None:
        return {}
    content = await client.files.content(file_id)
    lines = [json.loads(each) for each in content.text.splitlines()]
    found = {each["custom_id"]: each for each in lines}
    assert len(found) == len(lines)
    return found


def counts(batch: Batch) -> tuple[int, int, int]:
    """In all, done, failed."""
    assert batch.request_counts is not None
    told = batch.request_counts
    return told.total, told.completed, told.failed
