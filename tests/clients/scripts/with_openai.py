"""OpenAI's own Python SDK, of either generation."""

from typing import Any

import openai
from asking import (
    EMBEDDER,
    ENOUGH_TOKENS,
    MAX_TOKENS,
    MESSAGES,
    MODEL,
    SLOW_KEY,
    TEXTS,
    VIEWERS_KEY,
    Review,
    Weather,
    error_of,
    tell,
)

client = openai.OpenAI()
WEATHER = openai.pydantic_function_tool(Weather, name="get_weather")


def ask(by: openai.OpenAI = client, **fields: Any) -> Any:
    settings = {"messages": MESSAGES, "model": MODEL, "max_tokens": MAX_TOKENS, "temperature": 0}
    return by.chat.completions.create(**{**settings, **fields})


def chat() -> Any:
    return ask().choices[0].message.content


def stream() -> Any:
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True)]
    return [piece for piece in pieces if piece]


def usage() -> Any:
    whole = ask().usage
    *_, last = ask(stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage == whole
    return [whole.prompt_tokens, whole.completion_tokens]


def tools() -> Any:
    choices = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": ENOUGH_TOKENS}
    answer = ask(parallel_tool_calls=False, **choices).choices[0].message
    [call] = answer.tool_calls
    # And what the function said goes back.
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
    ask(messages=[*MESSAGES, answer, result], tools=[WEATHER], tool_choice="none")
    return [call.function.name, call.function.arguments]


def tools_streamed() -> Any:
    with client.chat.completions.stream(
        model=MODEL,
        messages=MESSAGES,
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=ENOUGH_TOKENS,
    ) as events:
        [call] = events.get_final_completion().choices[0].message.tool_calls
    return [call.function.name, call.function.arguments]


def schema() -> Any:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=MESSAGES,
        response_format=Review,
        temperature=0,
        max_tokens=ENOUGH_TOKENS,
    )
    return answer.choices[0].message.parsed.model_dump()


def models() -> Any:
    assert client.models.retrieve(MODEL).id == MODEL
    return [model.id for model in client.models.list()]


def embeddings() -> Any:
    answer = client.embeddings.create(model=EMBEDDER, input=TEXTS)
    return [each.embedding for each in answer.data]


def errors() -> Any:
    def by(key: str) -> openai.OpenAI:
        return client.with_options(api_key=key, max_retries=0)

    attempt = {"extra_headers": {"Idempotency-Key": f"attempt-of-{openai.__version__}"}}
    slow = by(SLOW_KEY)
    ask(**attempt)
    # Others before this client may have asked already.
    error_of(lambda: ask(slow, max_tokens=1))
    return {
        "400": error_of(lambda: ask(max_tokens=-1)),
        "401": error_of(lambda: ask(by("nobody's"))),
        "403": error_of(lambda: ask(by(VIEWERS_KEY))),
        "404": error_of(lambda: ask(model="nobody's")),
        "422": error_of(lambda: ask(seed=1, **attempt)),
        "429": error_of(lambda: ask(slow, max_tokens=1)),
    }


tell(chat, stream, usage, tools, tools_streamed, schema, models, embeddings, errors)
