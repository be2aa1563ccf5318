"""Simon Willison's llm, told of the server in the file where its users tell it."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from asking import (
    BASE_URL,
    ENOUGH_TOKENS,
    KEY,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    Review,
    error_of,
    tell,
)

folder = tempfile.TemporaryDirectory()
os.environ["LLM_USER_PATH"] = folder.name
entry = {
    "api_base": BASE_URL,
    "api_key_name": "manylora",
    "supports_schema": True,
    "supports_tools": True,
}
# JSON is YAML.
known = [{"model_id": name, "model_name": name, **entry} for name in (MODEL, "nobodys")]
Path(folder.name, "extra-openai-models.yaml").write_text(json.dumps(known))

import llm  # noqa: E402 - reads its folder's name when it is imported

model = llm.get_model(MODEL)


def ask(**fields: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": MAX_TOKENS, "key": KEY, "stream": False}
    return model.prompt(QUESTION, **{**settings, **fields})


def chat() -> Any:
    return ask().text()


def stream() -> Any:
    return [piece for piece in ask(stream=True) if piece]


def usage() -> Any:
    whole, streamed = ask().usage(), ask(stream=True).usage()
    assert (whole.input, whole.output) == (streamed.input, streamed.output)
    return [whole.input, whole.output]


def tools_offered() -> Any:
    """It has no way to insist: the model may call what is offered, or not."""

    def get_weather(unit: str, days: int) -> str:
        """Look the weather up."""
        return "Sunny."

    return [call.name for call in ask(tools=[get_weather]).tool_calls()]


def schema() -> Any:
    return json.loads(ask(schema=Review, max_tokens=ENOUGH_TOKENS).text())


def errors() -> Any:
    return {
        "401": error_of(lambda: ask(key="nobody's").text()),
        "404": error_of(lambda: llm.get_model("nobodys").prompt(QUESTION, key=KEY).text()),
    }


tell(chat, stream, usage, tools_offered, schema, errors)
