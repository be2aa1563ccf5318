"""How a grammar of calls is written: llguidance's variant of Lark's notation.

Where an answer may be words or calls, what begins as a call has to go on as one: a lazy rule ends
at the first mark that it meets. Compiles nothing.
"""

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from engine.grammar import JSON_WHITESPACE
from gateway.tools.reasoning import BEGINS, ENDS, Thinking

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


class CallableTool(msgspec.Struct, frozen=True):
    """A function that the answer may call."""

    name: str
    # None where any object will do.
    schema: dict[str, Any] | None


class CallForm(msgspec.Struct, frozen=True):
    """What an answer with calls, or with thoughts before JSON, has to look like."""

    # Of its syntax.
    family: str
    tools: list[CallableTool]
    must_call: bool
    is_parallel: bool
    thinking: Thinking
    # Marks that are single tokens, with their ids: bytes alone cannot ask for those.
    token_ids: dict[str, int] = {}
    # JSON schema of an answer without a call; None where that is words.
    otherwise: dict[str, Any] | bool | None = None


class Notation:
    """Mutable: the rules of a grammar while a family writes them."""

    def __init__(self, form: CallForm, *, arguments_key: str, has_tokens: bool) -> None:
        """`has_tokens` is false for a trial with a tokenizer of bytes."""
        self.is_parallel = form.is_parallel
        self._token_ids = form.token_ids if has_tokens else {}
        self._rules: list[str] = []
        self.rule("TEXT", r"/(.|\n)*/")
        calls = [self._call(number, tool, arguments_key) for number, tool in enumerate(form.tools)]
        if calls:
            self.rule("call", " | ".join(calls))

    def rule(self, name: str, text: str) -> str:
        """Add a rule; return its name."""
        self._rules.append(f"{name}: {text}")
        return name.removesuffix("[lazy]")

    def mark(self, mark: str) -> str:
        """A mark, by its letters or by its token."""
        token_id = self._token_ids.get(mark)
        letters = json.dumps(mark)
        return letters if token_id is None else f"({letters} | <[{token_id}]>)"

    def up_to(self, mark: str, name: str) -> str:
        """Any text that ends with this mark, and has it nowhere else."""
        lazy = self.rule(f"{name}_letters[lazy]", f"TEXT {json.dumps(mark)}")
        token_id = self._token_ids.get(mark)
        other = "" if token_id is None else f" | TEXT <[{token_id}]>"
        return self.rule(name, lazy + other)

    def among_words(self, mark: str, body: str) -> str:
        """Words, and calls behind a mark wherever there is one."""
        opening = self.up_to(mark, "opening")
        block = f"({opening} {body})"
        return f"{block}* TEXT" if self.is_parallel else f"{block} | TEXT"

    def instead_of_words(self, calls: str, *, but_not: str, mark: str = "") -> str:
        """Calls, or words that begin with none of the characters with which calls do."""
        words = self.rule("WORDS", rf"/(\s*[^\s{_escaped(but_not)}](.|\n)*)?/")
        marked = f" | {self.mark(mark)} {calls}" if mark in self._token_ids else ""
        return f"{calls}{marked} | {words}"

    def schema(self, schema: Mapping[str, Any] | bool) -> str:
        """JSON, spelled as answers in JSON are."""
        if isinstance(schema, bool):
            return f"%json {json.dumps(schema)}"
        manners = {
            "lenient": False,
            "coerce_one_of": False,
            "whitespace_flexible": True,
            "whitespace_pattern": JSON_WHITESPACE,
        }
        return f"%json {json.dumps({**schema, 'x-guidance': manners})}"

    def whole(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._rules, ""])

    def _call(self, number: int, tool: CallableTool, arguments_key: str) -> str:
        head = f'{{"name": {json.dumps(tool.name)}, "{arguments_key}": '
        schema = ANY_OBJECT if tool.schema is None else tool.schema
        arguments = self.rule(f"arguments_{number}", self.schema(schema))
        return self.rule(f"call_{number}", f'{json.dumps(head)} {arguments} "}}"')


def _escaped(characters: str) -> str:
    return "".join(f"\\{character}" for character in characters)


def thoughts(notation: Notation, thinking: Thinking) -> str:
    """The part of a grammar that is thoughts, with the blanks behind them."""
    if thinking == "never":
        return ""
    ended = notation.up_to(ENDS, "thoughts")
    blanks = notation.rule("BLANKS", r"/\s*/")
    if thinking == "begun":
        return f"{ended} {blanks} "
    return f"({notation.mark(BEGINS)} {ended} {blanks})? "
