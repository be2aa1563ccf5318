"""Facts about what models are told of functions, by templates in the families' styles."""

import json
import re
from typing import Any

import pytest

from gateway.templates import Templates
from gateway.text import TextCodec
from gateway.tools import syntaxes
from tests.tool_lab import ALTERNATING, HERMES, LLAMA, MISTRAL, bundle

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL: dict[str, Any] = {
    "id": "call_0123456789abcdef01234567",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"place": "Paris"}},
}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather in Paris?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": CALL["id"], "name": "get_weather"},
    {"role": "user", "content": "And now?"},
]


async def prompt(
    template: str, messages: list[dict[str, Any]], *, templates: Templates | None = None
) -> str:
    codec = TextCodec(bundle(template), templates=templates)
    return codec.decode(await codec.encode_chat(messages, tools=[TOOL], caller="we"))


@pytest.mark.parametrize(
    ("template", "family"),
    [(HERMES, "hermes"), (LLAMA, "llama3_json"), (MISTRAL, "mistral"), (ALTERNATING, "json")],
)
def test_a_template_tells_its_family(template, family):
    assert syntaxes.spoken_in(template).name == family


def test_the_operator_may_say_it_and_a_template_without_functions_stays_without():
    assert syntaxes.spoken_in(HERMES, name="mistral").name == "mistral"
    assert syntaxes.spoken_in(HERMES, name="json").name == "json"
    assert syntaxes.spoken_in(ALTERNATING, name="hermes") is syntaxes.TOLD


@pytest.mark.parametrize("template", [HERMES, LLAMA, MISTRAL, ALTERNATING])
async def test_every_style_takes_functions_their_calls_and_what_they_answered(template):
    text = await prompt(template, CONVERSATION)
    for word in ("The weather of a place.", '"get_weather"', '"place": "Paris"', "sunny"):
        assert word in text


async def test_ids_are_short_where_the_template_wants_them_so_and_still_belong_together():
    text = await prompt(MISTRAL, CONVERSATION)
    called = text.split('"id": "')[1][:9]
    assert called.isalnum()
    assert f"[TOOL_RESULTS]{called}: sunny" in text


async def test_a_template_without_functions_is_told_of_them_in_words_and_roles_alternate():
    text = await prompt(ALTERNATING, CONVERSATION)
    _, told, called, answered, _ = re.split(r"(?=\[(?:user|assistant)\])", text)
    assert json.dumps(TOOL["function"]) in told
    assert told.endswith("Weather in Paris?")
    assert called == '[assistant]{"name": "get_weather", "arguments": {"place": "Paris"}}'
    assert answered == "[user]The function get_weather answered:\nsunny\n\nAnd now?"


async def test_an_adapters_own_template_takes_functions_in_its_process():
    templates = Templates(num_workers=1)
    try:
        for template in (HERMES, LLAMA, MISTRAL, ALTERNATING):
            theirs = await prompt(template, CONVERSATION, templates=templates)
            assert theirs == await prompt(template, CONVERSATION)
    finally:
        await templates.close()


async def test_a_conversation_without_functions_is_left_alone():
    codec = TextCodec(bundle("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"))
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert codec.decode(await codec.encode_chat(messages)) == "[user]a[user]b"


def test_marks_that_decoding_leaves_out_are_shown_where_calls_are_read():
    codec = TextCodec(bundle(MISTRAL))
    mark, end = codec.mark_token_ids["[TOOL_CALLS]"], codec.eos_token_ids[0]
    stream = codec.stream(["!"], shows_marks=True)
    text = "".join(stream.feed(token_id) for token_id in (33, mark, 34, end))
    assert text + stream.finish() == "A[TOOL_CALLS]B"
    plain = codec.stream()
    assert "".join(plain.feed(token_id) for token_id in (33, mark, 34)) == "AB"
