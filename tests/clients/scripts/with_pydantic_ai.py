"""Agents of pydantic-ai; told `responses` they ask in OpenAI's newer words."""

import asyncio
import json
import sys
from typing import Any

from asking import (
    BASE_URL,
    ENOUGH_TOKENS,
    KEY,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    Review,
    Weather,
    error_of,
    tell,
)
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

CHOSEN: Any = OpenAIResponsesModel if "responses" in sys.argv else OpenAIChatModel


def agent(
    *, model: str = MODEL, key: str = KEY, max_tokens: int = MAX_TOKENS, **fields: Any
) -> Agent[None, Any]:
    chosen = CHOSEN(model, provider=OpenAIProvider(base_url=BASE_URL, api_key=key))
    settings: Any = {"temperature": 0, "max_tokens": max_tokens}
    return Agent(chosen, model_settings=settings, **fields)


def chat() -> Any:
    return agent().run_sync(QUESTION).output


def stream() -> Any:
    async def read() -> list[str]:
        async with agent().run_stream(QUESTION) as answer:
            return [piece async for piece in answer.stream_text(delta=True, debounce_by=None)]

    return asyncio.run(read())


def usage() -> Any:
    found = agent().run_sync(QUESTION).usage
    return [found.input_tokens, found.output_tokens]


def tools() -> Any:
    """What it wants as an answer is a function that must be called."""
    output = ToolOutput(Weather, name="get_weather")
    answer = agent(output_type=output, max_tokens=ENOUGH_TOKENS).run_sync(QUESTION)
    return ["get_weather", json.dumps(answer.output.model_dump())]


def schema() -> Any:
    asked = agent(output_type=NativeOutput(Review), max_tokens=ENOUGH_TOKENS)
    return asked.run_sync(QUESTION).output.model_dump()


def errors() -> Any:
    return {
        "401": error_of(lambda: agent(key="nobody's").run_sync(QUESTION)),
        "404": error_of(lambda: agent(model="nobody's").run_sync(QUESTION)),
    }


tell(chat, stream, usage, tools, schema, errors)
