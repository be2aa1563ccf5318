"""Ask a server for streamed completions, so many at a time, and note when each token came.

Speaks the OpenAI API's completions. Knows nothing of who answers, and believes a server's own
count of tokens only where it is what was asked for.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.serve import Answer

TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class HttpRequest:
    model: str
    path: str
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)


def completion(
    model: str, prompt: str | Sequence[int], new_tokens: int, **more: object
) -> HttpRequest:
    """What most of them understand: greedy, streamed, with the usage at the end."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }
    return HttpRequest(model, "/v1/completions", body)


def answers(base_url: str, requests: Sequence[HttpRequest], *, concurrency: int) -> list[Answer]:
    """In the order of the requests; each client sends its next one after its last answer."""
    return asyncio.run(_answers(base_url, requests, concurrency))


async def _answers(
    base_url: str, requests: Sequence[HttpRequest], concurrency: int
) -> list[Answer]:
    waiting = iter(enumerate(requests))
    found: dict[int, Answer] = {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=base_url, limits=limits, timeout=TIMEOUT_S, trust_env=False
    ) as http:

        async def client() -> None:
            for place, request in waiting:
                found[place] = await _ask(http, request)

        async with asyncio.TaskGroup() as clients:
            for _ in range(concurrency):
                clients.create_task(client())
    return [found[place] for place in range(len(requests))]


async def _ask(http: httpx.AsyncClient, request: HttpRequest) -> Answer:
    answer = Answer(request.model, error="no usage")
    started_s = time.perf_counter()
    try:
        async with http.stream(
            "POST", request.path, json=request.body, headers=dict(request.headers)
        ) as response:
            if response.is_error:
                said = (await response.aread()).decode(errors="replace")
                answer.error = f"status {response.status_code}: {said[:200]}"
                return answer
            async for line in response.aiter_lines():
                if line.startswith("data:") and not line.endswith("[DONE]"):
                    take(answer, json.loads(line[5:]), time.perf_counter() - started_s)
    except httpx.HTTPError as error:
        answer.error = type(error).__name__
    answer.total_s = time.perf_counter() - started_s
    return answer


def take(answer: Answer, chunk: dict[str, Any], now_s: float) -> None:
    """Note a piece of a stream."""
    if "error" in chunk:
        answer.error = f"stream error {chunk['error']}"
        return
    for choice in chunk.get("choices") or []:
        if text := choice.get("text"):
            answer.arrivals_s.append(now_s)
            answer.text += text
    if usage := chunk.get("usage"):
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.completion_tokens = usage["completion_tokens"]
        if answer.error == "no usage":
            answer.error = None


def expect_lengths(answers: Sequence[Answer], *, prompt_tokens: int, new_tokens: int) -> None:
    """Answers of another length become errors, for their tokens are no comparable work."""
    for answer in answers:
        found = (answer.prompt_tokens, answer.completion_tokens)
        if answer.error is None and found != (prompt_tokens, new_tokens):
            answer.error = f"{found[0]} + {found[1]} tokens"
