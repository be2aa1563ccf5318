"""Mistral: `[TOOL_CALLS]` before a list of calls; since 2025 before each call, name first.

[TOOL_CALLS] [{"name": "get_weather", "arguments": {"place": "Paris"}}]
[TOOL_CALLS]get_weather[ARGS]{"place": "Paris"}
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from gateway.tools.characters import BLANKS, Characters, NotACall, Reading
from gateway.tools.json_calls import read_arguments, read_calls
from gateway.tools.notation import Notation
from gateway.tools.syntaxes.syntax import Definitions, Messages, Syntax

BEGINS = "[TOOL_CALLS]"
ARGUMENTS = "[ARGS]"
# Stands between name and arguments in some; the id is the model's own.
ID = "[CALL_ID]"
MAX_NAME_CHARACTERS = 64
# Its templates take no other ids.
_SHORT_ID = re.compile("[a-zA-Z0-9]{9}")


class Mistral(Syntax):
    """One mark before calls."""

    name = "mistral"
    marks = (BEGINS, ARGUMENTS, ID)

    def is_spoken_in(self, template: str) -> bool:
        return BEGINS in template

    def read(self, source: Characters) -> Reading[None]:
        while (yield from source.show_until((BEGINS,), source.show)):
            yield from source.attempt(_read_marked(source), mark=BEGINS)

    def calls(self, notation: Notation) -> str:
        return f"{notation.mark(BEGINS)} {_body(notation)}"

    def free(self, notation: Notation) -> str:
        return notation.among_words(BEGINS, _body(notation))

    def for_template(self, messages: Messages, definitions: Definitions) -> Messages:
        return [_with_short_ids(message) for message in messages]


def _body(notation: Notation) -> str:
    more = ' (", " call)*' if notation.is_parallel else ""
    return f'" "? "[" call{more} "]"'


def _read_marked(source: Characters) -> Reading[None]:
    yield from source.skip_blanks()
    first = yield from source.take()
    source.give_back(first)
    if first == "[":
        yield from read_calls(source)
        return
    name = yield from _read_name(source)
    if (yield from source.find(ID)):
        while (character := (yield from source.take())).isalnum():
            pass
        source.give_back(character)
    yield from source.find(ARGUMENTS)
    yield from source.skip_blanks()
    yield from read_arguments(source, name)


def _read_name(source: Characters) -> Reading[str]:
    name = ""
    while (character := (yield from source.take())) and character not in BLANKS + "[{":
        name += character
        if len(name) > MAX_NAME_CHARACTERS:
            raise NotACall
    source.give_back(character)
    return name


def _with_short_ids(message: Mapping[str, Any]) -> Mapping[str, Any]:
    changed = dict(message)
    if "tool_calls" in message:
        changed["tool_calls"] = [
            {**call, "id": _short(call["id"])} for call in message["tool_calls"]
        ]
    if "tool_call_id" in message:
        changed["tool_call_id"] = _short(message["tool_call_id"])
    return changed


def _short(call_id: str) -> str:
    """An id that the templates take: always the same for the same."""
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]
