"""The fields that say what an answer has to look like: OpenAI's own, and vLLM's two families.

At most one of them may say it. Knows their spelling. Knows nothing of how grammars are followed.
"""

from typing import Annotated, Any, Literal, Protocol

import msgspec

from gateway.errors import InvalidRequest
from gateway.grammars import AskedGrammar

Json = dict[str, Any] | str
Choices = Annotated[
    list[Annotated[str, msgspec.Meta(min_length=1)]], msgspec.Meta(min_length=1, max_length=10_000)
]
ANY_OBJECT = '{"type":"object"}'


class JsonSchemaFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A JSON schema and its name. It is followed whether `strict` says so or not."""

    name: Annotated[str, msgspec.Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's field."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class PlainFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="text"):
    """An answer in words, of no form."""


class ObjectFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="json_object"):
    """Any JSON object."""


class SchemaFormat(JsonSchemaFormat, frozen=True, forbid_unknown_fields=True, tag="json_schema"):
    """A JSON schema, beside its type."""


# OpenAI's newer spelling of the field.
TextFormat = PlainFormat | ObjectFormat | SchemaFormat


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's field: one of these says what the answer has to look like."""

    json: Json | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Constrained(Protocol):
    """A request that has these fields."""

    @property
    def response_format(self) -> ResponseFormat | None: ...
    @property
    def structured_outputs(self) -> StructuredOutputs | None: ...
    @property
    def guided_json(self) -> Json | None: ...
    @property
    def guided_regex(self) -> str | None: ...
    @property
    def guided_choice(self) -> list[str] | None: ...
    @property
    def guided_grammar(self) -> str | None: ...
    @property
    def ignore_eos(self) -> bool | None: ...


def asked_grammar(body: Constrained) -> AskedGrammar | None:
    """Raises InvalidRequest where the fields contradict each other."""
    asked = [
        *_of_response_format(body.response_format),
        *_json("guided_json", body.guided_json),
        *_regex("guided_regex", body.guided_regex),
        *_choice("guided_choice", body.guided_choice),
        *_ebnf("guided_grammar", body.guided_grammar),
        *_of_structured_outputs(body.structured_outputs),
    ]
    return _the_one(asked, ignore_eos=bool(body.ignore_eos))


def asked_text_grammar(
    wanted: TextFormat | None, structured: StructuredOutputs | None, *, ignore_eos: bool
) -> AskedGrammar | None:
    """The same of a request whose format is `text.format`."""
    place = "text.format"
    match wanted:
        case SchemaFormat():
            asked = _json(place, wanted.schema)
        case ObjectFormat():
            asked = _json(place, ANY_OBJECT)
        case _:
            asked = []
    return _the_one([*asked, *_of_structured_outputs(structured)], ignore_eos=ignore_eos)


def _of_structured_outputs(wanted: StructuredOutputs | None) -> list[AskedGrammar]:
    if wanted is None:
        return []
    place = "structured_outputs"
    return [
        *_json(f"{place}.json", wanted.json),
        *_regex(f"{place}.regex", wanted.regex),
        *_choice(f"{place}.choice", wanted.choice),
        *_ebnf(f"{place}.grammar", wanted.grammar),
        *_json(f"{place}.json_object", ANY_OBJECT if wanted.json_object else None),
    ]


def _the_one(asked: list[AskedGrammar], *, ignore_eos: bool) -> AskedGrammar | None:
    if len(asked) > 1:
        first, second, *_ = asked
        raise InvalidRequest(
            f"'{first.param}' and '{second.param}' both say what the answer has to look like:"
            " send one of them.",
            param=second.param,
        )
    if asked and ignore_eos:
        raise InvalidRequest(
            f"'ignore_eos' would let the answer go on after what '{asked[0].param}' asks for:"
            " leave it out.",
            param="ignore_eos",
        )
    return asked[0] if asked else None


def _of_response_format(wanted: ResponseFormat | None) -> list[AskedGrammar]:
    if wanted is None:
        return []
    if (wanted.type == "json_schema") != (wanted.json_schema is not None):
        raise InvalidRequest(
            "'response_format.json_schema' belongs to the type json_schema, and to no other.",
            param="response_format",
        )
    if wanted.json_schema is not None:
        return _json("response_format", wanted.json_schema.schema)
    return _json("response_format", ANY_OBJECT if wanted.type == "json_object" else None)


def _json(param: str, schema: Json | None) -> list[AskedGrammar]:
    if schema is None:
        return []
    if isinstance(schema, str):
        return [AskedGrammar("json_schema", schema, param)]
    try:
        return [AskedGrammar("json_schema", msgspec.json.encode(schema).decode(), param)]
    except (OverflowError, msgspec.MsgspecError) as error:
        raise InvalidRequest(f"'{param}' cannot be read: {error}", param=param) from error


def _regex(param: str, pattern: str | None) -> list[AskedGrammar]:
    return [] if pattern is None else [AskedGrammar("regex", pattern, param)]


def _choice(param: str, choices: list[str] | None) -> list[AskedGrammar]:
    if choices is None:
        return []
    return [AskedGrammar("regex", "|".join(map(_quoted, choices)), param)]


def _quoted(text: str) -> str:
    """A regular expression for this text alone."""
    return "".join(c if c.isalnum() and c.isascii() else f"\\x{{{ord(c):x}}}" for c in text)


def _ebnf(param: str, grammar: str | None) -> list[AskedGrammar]:
    return [] if grammar is None else [AskedGrammar("ebnf", grammar, param)]
