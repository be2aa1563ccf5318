"""Clients that stay to the end, leave early, hang up, ask again, and remember what they were shown.

Of the engine of words they ask prompts that nobody else has, so that every token of the answer is
known beforehand; of a real model they count the tokens that they are shown. Knows HTTP and nothing
behind it.
"""

import asyncio
import dataclasses
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.crash.journals import Counts
from tests.crash.traced_words import VOCAB_SIZE, word

# What a client may be told while things die around it: no engine or database, a name that is still
# being answered, a limit that counts requests whose gateway is gone.
TOLERATED = (200, 409, 429, 503)
# Longer than anything may take.
PATIENCE_S = 60


@dataclass(frozen=True)
class Ask:
    """What a client wants, in as many attempts as it takes."""

    # Goes into the request's `user`, and from there into its usage event.
    user: str
    tenant: str
    key: str
    model: str
    # Token ids of the prompt; None where the model is a real one.
    prompt: list[int] | None
    text: str
    max_tokens: int
    is_streamed: bool = True
    is_chat: bool = True
    shows_usage: bool = True
    # The prompt's place of the word at which the answer stops.
    stop_at: int | None = None
    # Its `Idempotency-Key`.
    name: str | None = None
    # Chunks, or seconds for an answer that is not streamed, after which the client is gone.
    leaves_after: float | None = None
    max_attempts: int = 1

    @property
    def num_tokens(self) -> int:
        """Of the whole answer, a word that stops it included."""
        if self.stop_at is None:
            return self.max_tokens
        return min(self.stop_at + 1, self.max_tokens)

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "user": self.user,
            "seed": 7,
        }
        if self.is_chat:
            body["messages"] = [{"role": "user", "content": self.text}]
        else:
            body["prompt"] = self.text
        if self.prompt is None:
            # One entry for each token that is shown.
            body["logprobs"] = True if self.is_chat else 0
        if self.is_streamed:
            body |= {"stream": True, "stream_options": {"include_usage": self.shows_usage}}
        if self.stop_at is not None:
            assert self.prompt is not None
            body["stop"] = word(self.prompt[self.stop_at])
        return body


@dataclass
class Attempt:
    """One call and what came of it."""

    ask: Ask
    request_id: str | None = None
    status: int | None = None
    # Whether another attempt's answer was given once more.
    is_replayed: bool = False
    pieces: list[str] = field(default_factory=list, repr=False)
    num_logprobs: int = 0
    finish_reason: str | None = None
    stopped_by: str | None = None
    usage: Counts | None = None
    cost_nano: int | None = None
    # Whether the answer was said to be whole.
    is_done: bool = False
    error: str | None = None
    has_left: bool = False
    is_cut: bool = False

    @property
    def words(self) -> list[str]:
        return "".join(self.pieces).split()

    @property
    def num_shown(self) -> int:
        return len(self.words) if self.ask.prompt is not None else self.num_logprobs

    def read(self, said: dict[str, Any]) -> None:
        """Take in a whole answer, or one event of a stream."""
        if "error" in said:
            self.error = str(said["error"])
            return
        for choice in said["choices"]:
            told = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            self.pieces.append(told.get("content") or "")
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            self.stopped_by = choice.get("stopped_by") or self.stopped_by
            logprobs = choice.get("logprobs") or {}
            self.num_logprobs += len(logprobs.get("content") or logprobs.get("tokens") or ())
        if usage := said.get("usage"):
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            self.usage = Counts(usage["prompt_tokens"], cached, usage["completion_tokens"])
            self.cost_nano = usage["cost_nano"]


class Crowd:
    """All clients of all tenants; `run` ends when each has finished what it began."""

    def __init__(
        self,
        urls: list[str],
        *,
        keys: dict[str, str],
        models: dict[str, list[str]],
        seed: int,
        asks_words: bool = True,
    ) -> None:
        self.attempts: list[Attempt] = []
        self.counts: Counter[str] = Counter()
        # Pieces of answers that were shown to anybody.
        self.num_shown = 0
        self.is_over = False
        self._urls = urls
        self._keys = keys
        self._models = models
        self._dice = random.Random(seed)
        self._num_asks = 0
        self._asks_words = asks_words

    async def run(self, *, clients_per_tenant: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for tenant in self._keys:
                for _ in range(clients_per_tenant):
                    tasks.create_task(self._live(tenant))

    async def _live(self, tenant: str) -> None:
        limits = httpx.Limits(max_keepalive_connections=4)
        async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False, limits=limits) as http:
            while not self.is_over:
                await self.pursue(http, self.think_of(tenant))

    async def pursue(self, http: httpx.AsyncClient, ask: Ask) -> None:
        """Ask until there is an answer, or as often as this client does."""
        for number in range(ask.max_attempts):
            attempt = await self.attempt(
                http, ask, url=self._dice.choice(self._urls), number=number
            )
            if attempt.is_done or self.is_over:
                return
            await asyncio.sleep(0.05 if attempt.has_left else 0.2)

    async def attempt(
        self, http: httpx.AsyncClient, ask: Ask, *, url: str, number: int = 0
    ) -> Attempt:
        headers = {"authorization": f"Bearer {ask.key}"}
        if ask.name is not None:
            headers["idempotency-key"] = ask.name
        if number:
            headers["x-stainless-retry-count"] = str(number)
        path = "/v1/chat/completions" if ask.is_chat else "/v1/completions"
        request = http.build_request("POST", url + path, json=ask.body(), headers=headers)
        attempt = Attempt(ask)
        try:
            async with _patience_of(ask):
                async for said in (_stream if ask.is_streamed else _whole)(http, request, attempt):
                    attempt.read(said)
                    self.num_shown += "choices" in said
        except TimeoutError:
            attempt.has_left = True
        except httpx.TimeoutException:
            raise
        except httpx.ConnectError:
            # Nobody was there to be asked.
            self.counts["not connected"] += 1
            await asyncio.sleep(0.05)
            return attempt
        except httpx.TransportError:
            attempt.is_cut = True
        self.attempts.append(attempt)
        self.counts[_name_of(attempt)] += 1
        return attempt

    def think_of(self, tenant: str) -> Ask:
        dice = self._dice
        self._num_asks += 1
        number = self._num_asks
        # No word twice, so that a stop can only come where it is looked for.
        rest = [100 * hundred + dice.randrange(1, 100) for hundred in range(1, 9)]
        prompt = [number // 99, 900 + number % 99, *rest[: dice.randrange(1, 8)]]
        assert len(set(prompt)) == len(prompt)
        assert max(prompt) < VOCAB_SIZE - 1
        kind = dice.choice(["stay", "stay", "stay", "leave", "leave", "stop", "named", "long"])
        is_streamed = dice.random() < 0.65
        leaves_after: float | None = None
        if kind == "leave":
            leaves_after = dice.randrange(1, 40) if is_streamed else dice.uniform(0, 0.8)
        ask = Ask(
            user=f"user-{number}",
            tenant=tenant,
            key=self._keys[tenant],
            model=dice.choice(self._models[tenant]),
            prompt=prompt,
            text=" ".join(map(word, prompt)),
            max_tokens=dice.randrange(260, 400) if kind == "long" else dice.randrange(1, 80),
            is_streamed=is_streamed,
            is_chat=dice.random() < 0.6,
            shows_usage=dice.random() < 0.8,
            stop_at=dice.randrange(1, len(prompt)) if kind == "stop" else None,
            name=f"name-{number}" if kind == "named" else None,
            leaves_after=leaves_after,
            max_attempts=dice.choice([1, 2, 3]),
        )
        return ask if self._asks_words else _in_english(ask, number)


def _in_english(ask: Ask, number: int) -> Ask:
    """The same for a real model, which is not as quick."""
    return dataclasses.replace(
        ask,
        prompt=None,
        text=f"Tell me what you know of the number {number}.",
        max_tokens=ask.max_tokens % 40 + 1,
        stop_at=None,
    )


def _patience_of(ask: Ask) -> asyncio.Timeout:
    return asyncio.timeout(None if ask.is_streamed else ask.leaves_after)


async def _whole(
    http: httpx.AsyncClient, request: httpx.Request, attempt: Attempt
) -> AsyncIterator[Any]:
    answer = await http.send(request)
    _begin(attempt, answer)
    attempt.is_done = answer.is_success
    yield answer.json()


async def _stream(
    http: httpx.AsyncClient, request: httpx.Request, attempt: Attempt
) -> AsyncIterator[Any]:
    answer = await http.send(request, stream=True)
    try:
        _begin(attempt, answer)
        if not answer.is_success:
            yield json.loads(await answer.aread())
            return
        num_chunks = 0
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                attempt.is_done = True
            elif line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))
                num_chunks += 1
            if num_chunks == attempt.ask.leaves_after and not attempt.is_done:
                attempt.has_left = True
                return
    finally:
        await answer.aclose()


def _begin(attempt: Attempt, answer: httpx.Response) -> None:
    attempt.status = answer.status_code
    attempt.request_id = answer.headers["x-request-id"]
    attempt.is_replayed = "idempotent-replayed" in answer.headers


def _name_of(attempt: Attempt) -> str:
    kind = "streams" if attempt.ask.is_streamed else "whole answers"
    if attempt.is_replayed:
        return f"{kind} replayed"
    if attempt.is_done:
        return f"{kind} finished"
    if attempt.has_left:
        return f"{kind} left"
    if attempt.is_cut:
        return f"{kind} cut"
    if attempt.status == httpx.codes.OK:
        return f"{kind} ended by an error"
    return f"refused with {attempt.status}"
