"""instructor, in the two of its modes that servers have to know of."""

import json
from typing import Any

import instructor
import openai
from asking import ENOUGH_TOKENS, MESSAGES, MODEL, Review, Weather, error_of, tell


def ask(mode: instructor.Mode, kind: Any, *, key: str | None = None, **fields: Any) -> Any:
    client = instructor.from_openai(openai.OpenAI(api_key=key, max_retries=0), mode=mode)
    settings = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_retries": 0}
    return client.chat.completions.create_with_completion(
        response_model=kind, **{**settings, "max_tokens": ENOUGH_TOKENS, **fields}
    )


def usage() -> Any:
    _, answer = ask(instructor.Mode.TOOLS, Weather)
    return [answer.usage.prompt_tokens, answer.usage.completion_tokens]


def tools() -> Any:
    weather, answer = ask(instructor.Mode.TOOLS, Weather)
    [call] = answer.choices[0].message.tool_calls
    return [call.function.name, json.dumps(weather.model_dump())]


def schema() -> Any:
    review, _ = ask(instructor.Mode.JSON_SCHEMA, Review)
    return review.model_dump()


def stream() -> Any:
    client = instructor.from_openai(openai.OpenAI(), mode=instructor.Mode.TOOLS)
    partly = client.chat.completions.create_partial(
        response_model=Review,
        model=MODEL,
        messages=MESSAGES,
        temperature=0,
        max_tokens=ENOUGH_TOKENS,
    )
    return [review.model_dump() for review in partly]


def errors() -> Any:
    mode = instructor.Mode.TOOLS
    return {
        "401": error_of(lambda: ask(mode, Weather, key="nobody's")),
        "404": error_of(lambda: ask(mode, Weather, model="nobody's")),
    }


tell(stream, usage, tools, schema, errors)
