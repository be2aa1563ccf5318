"""OpenAI's own Python SDK, asking in its newer words."""

from typing import Any

import openai
from asking import (
    ENOUGH_TOKENS,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    SLOW_KEY,
    VIEWERS_KEY,
    Review,
    Weather,
    error_of,
    tell,
)

client = openai.OpenAI()
FUNCTION: Any = openai.pydantic_function_tool(Weather, name="get_weather")["function"]
WEATHER = {"type": "function", **FUNCTION}
CALL: Any = {
    "tools": [WEATHER],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_output_tokens": ENOUGH_TOKENS,
}


def settings(**fields: Any) -> Any:
    fixed = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": MAX_TOKENS}
    return {**fixed, **fields}


def ask(by: openai.OpenAI = client, **fields: Any) -> Any:
    return by.responses.create(**settings(**fields))


def chat() -> Any:
    return ask().output_text


def stream() -> Any:
    events = list(ask(stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[1].type) == ("response.created", "response.in_progress")
    return [event.delta for event in events if event.type == "response.output_text.delta"]


def usage() -> Any:
    whole = ask().usage
    *_, last = ask(stream=True)
    assert last.response.usage == whole
    return [whole.input_tokens, whole.output_tokens]


def tools() -> Any:
    [call] = ask(**CALL).output
    assert call.type == "function_call"
    # And what the function said goes back, behind the items of the answer.
    said = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    ask(input=[{"role": "user", "content": QUESTION}, call, said], tools=[WEATHER])
    return [call.name, call.arguments]


def tools_streamed() -> Any:
    with client.responses.stream(**settings(**CALL)) as events:
        [call] = events.get_final_response().output
    return [call.name, call.arguments]


def schema() -> Any:
    asked = settings(text_format=Review, max_output_tokens=ENOUGH_TOKENS)
    return client.responses.parse(**asked).output_parsed.model_dump()


def errors() -> Any:
    def by(key: str) -> openai.OpenAI:
        return client.with_options(api_key=key, max_retries=0)

    attempt = {"extra_headers": {"Idempotency-Key": f"response-to-{openai.__version__}"}}
    slow = by(SLOW_KEY)
    ask(**attempt)
    # Others before this client may have asked already.
    error_of(lambda: ask(slow, max_output_tokens=1))
    return {
        "400": error_of(lambda: ask(store=True)),
        "401": error_of(lambda: ask(by("nobody's"))),
        "403": error_of(lambda: ask(by(VIEWERS_KEY))),
        "404": error_of(lambda: ask(model="nobody's")),
        "422": error_of(lambda: ask(top_p=0.5, **attempt)),
        "429": error_of(lambda: ask(slow, max_output_tokens=1)),
    }


tell(chat, stream, usage, tools, tools_streamed, schema, errors)
