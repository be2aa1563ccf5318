"""Every other model: an answer is words, or one call as JSON, or a list of calls.

    {"name": "get_weather", "arguments": {"place": "Paris"}}

Where the template knows no functions, the conversation itself tells of them, in words.
"""

import json
from collections.abc import Mapping
from typing import Any

from gateway.tools.characters import BLANKS, Characters, Reading
from gateway.tools.json_calls import read_call, read_calls
from gateway.tools.notation import Notation
from gateway.tools.syntaxes.syntax import Definitions, Messages, Syntax, read_bare

FENCE = "```"
LANGUAGE = "json"
BETWEEN = "\n\n"


class Plain(Syntax):
    """JSON, and nothing else."""

    name = "json"

    def is_spoken_in(self, template: str) -> bool:
        """Whoever reads functions and has no manner of their own."""
        return True

    def read(self, source: Characters) -> Reading[None]:
        yield from read_bare(source, _read_calls(source))
        yield from source.show_until((), source.show)

    def calls(self, notation: Notation) -> str:
        return '(call | "[" call (", " call)* "]")' if notation.is_parallel else "call"

    def free(self, notation: Notation) -> str:
        return notation.instead_of_words(self.calls(notation), but_not="{[`")


class Told(Plain):
    """The same for a template that knows no functions."""

    def for_template(self, messages: Messages, definitions: Definitions) -> Messages:
        if not definitions and not any("tool_calls" in message for message in messages):
            return messages
        plain = _in_words(messages)
        if not definitions:
            return plain
        first, *rest = plain
        told = _told(definitions)
        if first["role"] == "system":
            content = first["content"] + BETWEEN + told
        elif first["role"] == "user":
            # Some templates take no system message.
            content = told + BETWEEN + first["content"]
        else:
            return [{"role": "user", "content": told}, *plain]
        return [{**first, "content": content}, *rest]


def _read_calls(source: Characters) -> Reading[None]:
    is_fenced = yield from source.find(FENCE)
    if is_fenced:
        yield from source.find(LANGUAGE)
        yield from source.skip_blanks()
    first = yield from source.take()
    source.give_back(first)
    yield from read_calls(source) if first == "[" else read_call(source)
    if is_fenced:
        yield from source.skip_blanks(BLANKS + FENCE[0])
        source.end_call()


def _told(definitions: Definitions) -> str:
    functions = "\n".join(_json(definition["function"]) for definition in definitions)
    return (
        "You may call functions. Each of these lines is one: its name, what it does, and the JSON"
        f" schema of its arguments.\n{functions}\n"
        'To call one, answer with {"name": its name, "arguments": an object} and nothing else; to'
        " call several, with a list of these. To call none, answer in words."
    )


def _in_words(messages: Messages) -> list[Mapping[str, Any]]:
    """Messages without a role or a member that only functions need.

    What functions answered is the user's turn, together with what the user says next: some
    templates want roles to alternate.
    """
    plain: list[Mapping[str, Any]] = []
    is_answer = False
    for message in messages:
        was_answer, is_answer = is_answer, message["role"] == "tool"
        written = _answered(message) if is_answer else _called(message)
        if was_answer and written["role"] == "user":
            content = plain[-1]["content"] + BETWEEN + written["content"]
            plain[-1] = {"role": "user", "content": content}
        else:
            plain.append(written)
    return plain


def _answered(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "role": "user",
        "content": f"The function {message['name']} answered:\n{message['content']}",
    }


def _called(message: Mapping[str, Any]) -> Mapping[str, Any]:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    if not calls:
        return message
    text = _json(calls[0] if len(calls) == 1 else calls)
    content = BETWEEN.join(filter(None, (message["content"], text)))
    return {"role": message["role"], "content": content}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
