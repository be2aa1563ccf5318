"""Chat templates: compile, render and judge them, as transformers would render them.

A template is a program. Jinja's sandbox keeps it from the interpreter's insides, but not from
time and memory: only an operator's own is rendered in a process that others need. Knows nothing of
requests, and imports nothing but Jinja.
"""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What a template may end in: its own refusals, and what its expressions raise.
FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)


class TooMuchText(jinja2.TemplateRuntimeError):
    """The chat template writes more than a prompt can hold."""


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; rendering passes it through."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration is an instance attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        return str(caller())


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now(datetime.UTC).strftime(pattern)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def compiled(source: str) -> jinja2.Template:
    """Raises jinja2.TemplateSyntaxError."""
    return _environment().from_string(source)


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """Raises one of FAULTS."""
    return template.render(**variables)


def render_at_most(
    template: jinja2.Template, variables: Mapping[str, Any], *, max_characters: int
) -> str:
    """Render as long as what comes out stays in bounds. Raises TooMuchText, or one of FAULTS."""
    pieces, left = [], max_characters
    for piece in template.generate(**variables):
        left -= len(piece)
        if left < 0:
            raise TooMuchText(f"It writes more than {max_characters} characters.")
        pieces.append(piece)
    return "".join(pieces)


def forbidden(source: str) -> list[str]:
    """Say what a template asks for that no chat template may have, whichever way it takes.

    Raises jinja2.TemplateSyntaxError.
    """
    tree = _environment().parse(source)
    loads = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
    problems = [
        f"line {node.lineno}: reads another template"
        for kind in loads
        for node in tree.find_all(kind)
    ]
    problems += [
        f"line {node.lineno}: reaches for {name!r}"
        for node, name in _attributes(tree)
        if name.startswith("__")
    ]
    return list(dict.fromkeys(problems))[:8]


def _attributes(tree: nodes.Template) -> Iterator[tuple[nodes.Node, str]]:
    """Attributes by their dot, by their index, and by the filters that take a name."""
    for attribute in tree.find_all(nodes.Getattr):
        yield attribute, attribute.attr
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str) and constant.value.isidentifier():
            yield constant, constant.value


Conversation = Sequence[Mapping[str, Any]]

_USER = {"role": "user", "content": "What is the capital of France?"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
_CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"place": "Paris"}}}

# Every chat template answers this one; of the others it may refuse some.
PLAIN: Conversation = [_USER]
_TRIALS: Sequence[Conversation] = (
    [{"role": "system", "content": "Be brief."}, _USER],
    [_USER, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And Peru?"}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "all work and no play " * 1000}],
    [each for _ in range(32) for each in (_USER, {"role": "assistant", "content": "Paris."})],
)
_TOOL_TRIAL: Conversation = [
    _USER,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "name": "get_weather", "content": "sunny"},
]


def trials(source: str) -> list[dict[str, Any]]:
    """Return the variables of the conversations that a new template is tried on, plain first."""
    conversations: list[dict[str, Any]] = [{"messages": messages} for messages in (PLAIN, *_TRIALS)]
    if "tool" in source:
        conversations.append({"messages": _TOOL_TRIAL, "tools": [_TOOL]})
    return [{"add_generation_prompt": True, **each} for each in conversations]


def is_unsafe(error: BaseException) -> bool:
    """Whether the sandbox stopped a template at something that it may not touch."""
    return isinstance(error, SecurityError)
