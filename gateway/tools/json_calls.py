"""Calls that are written as JSON: an object with a name and arguments, as RFC 8259 has it.

Arguments are told as they come, in the model's own spelling. What is no JSON, has other members or
names a function that there is not is no call.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from gateway.tools.characters import Characters, Denied, NotACall, Reading

NAME = "name"
ARGUMENTS = ("arguments", "parameters")
# Some models write these too; they say nothing.
IGNORED = ("type", "id")
# Each level is a generator within another; nobody's arguments go so deep.
MAX_DEPTH = 64

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMBER_CHARACTERS = frozenset("0123456789+-.eE")
_WORDS = {"t": "true", "f": "false", "n": "null"}
_ESCAPES = frozenset('"\\/bfnrt')
_HEXADECIMAL = frozenset("0123456789abcdefABCDEF")

Write = Callable[[str], None]


def read_call(source: Characters) -> Reading[None]:
    """One call. Raises NotACall."""
    call = _Call(source)
    yield from source.expect("{")
    yield from source.skip_blanks()
    while True:
        yield from _read_member(source, call)
        yield from source.skip_blanks()
        character = yield from source.take()
        if character == "}":
            break
        if character != ",":
            raise NotACall
        yield from source.skip_blanks()
    call.end()


def read_calls(source: Characters) -> Reading[None]:
    """A list of calls, with at least one. Raises NotACall."""
    yield from source.expect("[")
    while True:
        yield from source.skip_blanks()
        yield from read_call(source)
        yield from source.skip_blanks()
        character = yield from source.take()
        if character == "]":
            source.end_call()
            return
        if character != ",":
            raise NotACall


def read_arguments(source: Characters, name: str) -> Reading[None]:
    """The arguments of a call whose name was read. Raises NotACall."""
    call = _Call(source)
    call.take_name(name)
    yield from _read_arguments(source, call)
    call.end()


class _Call:
    """Mutable: one call while it is read. It begins once it has its name and its arguments do."""

    def __init__(self, source: Characters) -> None:
        self._source = source
        self._name: str | None = None
        self._index: int | None = None
        # Not told yet; None before there are any.
        self._kept: str | None = None

    @property
    def has_arguments(self) -> bool:
        return self._kept is not None

    def take_name(self, name: str) -> None:
        if self._name is not None or name not in self._source.names:
            raise NotACall
        self._name = name

    def write(self, text: str) -> None:
        self._kept = (self._kept or "") + text
        if self._name is not None and self._source.allows is None:
            self._tell()

    def end(self) -> None:
        if self._name is None:
            raise NotACall
        allows = self._source.allows
        if self._kept is None:
            self._kept = "{}"
        if allows is not None and not allows("\n".join(strings_in(_decoded(self._kept)))):
            raise Denied
        self._tell()
        self._source.end_call()

    def _tell(self) -> None:
        assert self._name is not None, "told once the name is known"
        if self._index is None:
            self._index = self._source.begin_call(self._name)
        if self._kept:
            self._source.tell_arguments(self._index, self._kept)
        self._kept = ""


def _read_member(source: Characters, call: _Call) -> Reading[None]:
    key = yield from _read_text(source)
    yield from source.skip_blanks()
    yield from source.expect(":")
    yield from source.skip_blanks()
    if key == NAME:
        call.take_name((yield from _read_text(source)))
    elif key in ARGUMENTS and not call.has_arguments:
        yield from _read_arguments(source, call)
    elif key in IGNORED:
        yield from _read_value(source, lambda _: None, depth=0)
    else:
        raise NotACall


def _read_arguments(source: Characters, call: _Call) -> Reading[None]:
    """An object; also one within a string, or null for none."""
    first = yield from source.take()
    source.give_back(first)
    if first == "{":
        yield from _read_value(source, call.write, depth=0)
    elif first == '"':
        text = yield from _read_text(source)
        if not isinstance(_decoded(text), dict):
            raise NotACall
        call.write(text)
    else:
        yield from source.expect("null")
        call.write("{}")


def _read_value(source: Characters, write: Write, *, depth: int) -> Reading[None]:
    first = yield from source.take()
    if first == '"':
        write(first)
        yield from _read_rest_of_string(source, write)
    elif first in ("{", "["):
        if depth == MAX_DEPTH:
            raise NotACall
        write(first)
        yield from _read_members(source, write, depth=depth + 1, is_object=first == "{")
    elif first in _WORDS:
        source.give_back(first)
        yield from source.expect(_WORDS[first])
        write(_WORDS[first])
    else:
        source.give_back(first)
        yield from _read_number(source, write)


def _read_members(
    source: Characters, write: Write, *, depth: int, is_object: bool
) -> Reading[None]:
    closing = "}" if is_object else "]"
    write((yield from source.skip_blanks()))
    if (yield from source.find(closing)):
        write(closing)
        return
    while True:
        if is_object:
            yield from source.expect('"')
            write('"')
            yield from _read_rest_of_string(source, write)
            write((yield from source.skip_blanks()))
            yield from source.expect(":")
            write(":")
            write((yield from source.skip_blanks()))
        yield from _read_value(source, write, depth=depth)
        write((yield from source.skip_blanks()))
        character = yield from source.take()
        if character not in (",", closing):
            raise NotACall
        write(character)
        if character == closing:
            return
        write((yield from source.skip_blanks()))


def _read_rest_of_string(source: Characters, write: Write) -> Reading[None]:
    while (character := (yield from source.take())) != '"':
        if character < " ":  # the end too
            raise NotACall
        write(character)
        if character == "\\":
            escape = yield from source.take()
            if escape not in _ESCAPES and escape != "u":
                raise NotACall
            write(escape)
            for _ in range(4 if escape == "u" else 0):
                digit = yield from source.take()
                if digit not in _HEXADECIMAL:
                    raise NotACall
                write(digit)
    write('"')


def _read_number(source: Characters, write: Write) -> Reading[None]:
    text = ""
    while (character := (yield from source.take())) in _NUMBER_CHARACTERS:
        text += character
    source.give_back(character)
    if not _NUMBER.fullmatch(text):
        raise NotACall
    write(text)


def _read_text(source: Characters) -> Reading[str]:
    """What a string says."""
    pieces = ['"']
    yield from source.expect('"')
    yield from _read_rest_of_string(source, pieces.append)
    text: Any = _decoded("".join(pieces))
    assert isinstance(text, str), "a string was read"
    return text


def _decoded(text: str) -> Any:
    """Raises NotACall."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise NotACall from error


def strings_in(value: object) -> Iterator[str]:
    """All that a value of JSON says in words, keys included, in its order."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str(text):
                yield text
            case Mapping() as members:
                waiting += reversed([each for pair in members.items() for each in pair])
            case list(elements):
                waiting += reversed(elements)
