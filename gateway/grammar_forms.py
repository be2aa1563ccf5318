"""What clients may write as a grammar, brought into the form that the engine takes.

Of a JSON schema every keyword is known here: those that the engine enforces stay, those that only
describe are left out, and any other is refused by name, for an answer that ignores it would be
valid by chance. Runs in `gateway.template_worker`, because all of it takes as long as its text
wants. Knows nothing of requests.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from llguidance import LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from engine import grammar
from gateway.tools.grammar import grammar_of
from gateway.tools.notation import CallableTool, CallForm

if TYPE_CHECKING:
    from gateway.template_worker import GrammarForm, GrammarKind

# Statements of Lark's notation in llguidance that reach beyond it: what a JSON schema may say is
# checked elsewhere, and options could take limits back.
FORBIDDEN_STATEMENTS = ("%json", "%llguidance")
# Deeper ones are bombs, or a list that somebody spelled as nested objects.
MAX_DEPTH = 64
MAX_SCHEMAS = 10_000

ANNOTATIONS = frozenset(
    (
        *("$comment", "default", "deprecated", "description", "discriminator"),
        *("example", "examples", "readOnly", "title", "writeOnly"),
    )
)
# With values that say nothing.
NEUTRAL_VALUES: Mapping[str, Any] = {
    "uniqueItems": False,
    "nullable": False,
    "unevaluatedItems": True,
    "unevaluatedProperties": True,
}


class Refused(Exception):
    """This cannot be used; the message says why, as part of a sentence."""


@dataclass(frozen=True, slots=True)
class Readable:
    """A grammar as the engine takes it."""

    kind: "GrammarKind"
    text: str
    # The same for a tokenizer of bytes, without the tokens of the model's own.
    trial: str


def read(form: "GrammarForm", text: str) -> Readable:
    """Raises Refused."""
    match form:
        case "json_schema":
            found = _read_schema(text)
            return Readable("json_schema", found, trial=found)
        case "regex":
            return Readable("regex", text, trial=text)
        case "ebnf":
            found = _read_ebnf(text)
            return Readable("lark", found, trial=found)
        case "calls":
            return _read_calls(text)


def fault_of(kind: "GrammarKind", text: str) -> str | None:
    """What is wrong with a grammar, found by compiling it over the 256 bytes as tokens."""
    return grammar.fault_of(kind, text, _bytes())


@functools.cache
def _bytes() -> LLTokenizer:
    return LLTokenizer("byte")


def _read_ebnf(text: str) -> str:
    for statement in FORBIDDEN_STATEMENTS:
        if statement in text:
            raise Refused(f"{statement} is not supported in a grammar")
    try:
        return any_to_lark(text)
    except RecursionError:
        raise
    except Exception as error:  # the library raises no narrower one
        raise Refused(str(error)[:300]) from error


def _read_calls(text: str) -> Readable:
    asked = msgspec.json.decode(text, type=CallForm)
    form = msgspec.structs.replace(
        asked,
        tools=[_readable(tool) for tool in asked.tools],
        otherwise=_Schema().read(asked.otherwise, place="#", depth=0)
        if asked.otherwise is not None
        else None,
    )
    return Readable(
        "lark", grammar_of(form, has_tokens=True), trial=grammar_of(form, has_tokens=False)
    )


def _readable(tool: CallableTool) -> CallableTool:
    if tool.schema is None:
        return tool
    try:
        return CallableTool(tool.name, _Schema().read(tool.schema, place="#", depth=0))
    except Refused as refusal:
        raise Refused(f"in the parameters of {tool.name!r}, {refusal}") from None


def _read_schema(text: str) -> str:
    try:
        schema = msgspec.json.decode(text)
        return msgspec.json.encode(_Schema().read(schema, place="#", depth=0)).decode()
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise Refused(f"it is not JSON: {error}") from error
    except OverflowError as error:
        raise Refused("it has a number that is too large") from error


class _Schema:
    """Reads one schema with all that are in it."""

    def __init__(self) -> None:
        self._num_schemas = 0

    def read(self, schema: Any, *, place: str, depth: int) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise Refused(f"at {place}: a schema is an object, or true or false")
        self._num_schemas += 1
        if depth > MAX_DEPTH or self._num_schemas > MAX_SCHEMAS:
            raise Refused(
                f"at {place}: schemas are nested {MAX_DEPTH} deep at most, and there are"
                f" {MAX_SCHEMAS} of them at most"
            )
        kept = {}
        for keyword, value in schema.items():
            if keyword in ANNOTATIONS or _says_nothing(keyword, value):
                continue
            kept[keyword] = self._read_value(keyword, value, place=place, depth=depth)
        return kept

    def _read_value(self, keyword: str, value: Any, *, place: str, depth: int) -> Any:
        where = f"{place}/{keyword}"
        if keyword in _SCALARS:
            if not _SCALARS[keyword](value):
                raise Refused(f"at {where}: it does not have a value of the right type")
            return value
        if keyword in _MAPS and isinstance(value, dict):
            return {
                name: self.read(inner, place=f"{where}/{name}", depth=depth + 1)
                for name, inner in value.items()
            }
        if keyword in _LISTS and isinstance(value, list):
            return [
                self.read(inner, place=f"{where}/{number}", depth=depth + 1)
                for number, inner in enumerate(value)
            ]
        if keyword in _SINGLES:
            return self.read(value, place=where, depth=depth + 1)
        if keyword in _MAPS | _LISTS:
            raise Refused(f"at {where}: it does not have a value of the right type")
        raise Refused(f"at {place}: the keyword {keyword!r} is not supported")


def _says_nothing(keyword: str, value: Any) -> bool:
    return keyword in NEUTRAL_VALUES and value is NEUTRAL_VALUES[keyword]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_SCALARS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("$anchor", "$id", "$ref", "$schema", "format", "pattern"), _is_text),
    **dict.fromkeys(("minimum", "maximum", "multipleOf"), _is_number),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), _is_number),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _is_count),
    **dict.fromkeys(("minProperties", "maxProperties"), _is_count),
    "required": _is_names,
    "type": lambda value: _is_text(value) or _is_names(value),
    "enum": lambda value: isinstance(value, list),
    "const": lambda value: True,
}
_MAPS = frozenset(("$defs", "definitions", "patternProperties", "properties"))
# `items` was a list before `prefixItems` was there.
_LISTS = frozenset(("allOf", "anyOf", "items", "oneOf", "prefixItems"))
_SINGLES = frozenset(("additionalItems", "additionalProperties", "items"))
