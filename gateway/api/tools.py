"""The fields about functions: what may be called, what was called before, and calls in answers.

Knows their spelling. Knows nothing of how a model writes a call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import msgspec

from gateway.errors import InvalidRequest
from gateway.grammars import AskedGrammar
from gateway.tools.pieces import Arguments, Call, CallBegins
from gateway.tools.toolbox import Tool, Toolbox

# Of what is nested in a schema or in arguments.
MAX_DEPTH = 128
FunctionName = Annotated[str, msgspec.Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
CallId = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
# Of a function that the client says nothing about.
NO_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


class FunctionDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function of the client's. With `strict` its arguments always follow `parameters`."""

    name: FunctionName
    description: str | None = None
    # JSON schema of an object; none where it is left out.
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something that an answer may call; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: FunctionName


class NamedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The one function that has to be called."""

    type: Literal["function"]
    function: FunctionChoice


Tools = Annotated[list[ToolDefinition], msgspec.Meta(max_length=128)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function, and its arguments as JSON."""

    name: FunctionName
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call that an answer made; clients send it back with the conversation."""

    id: CallId
    function: CalledFunction
    type: Literal["function"] = "function"

    @classmethod
    def of(cls, call: Call) -> "ToolCall":
        return cls(call.id, CalledFunction(call.name, call.arguments))


class FunctionDelta(msgspec.Struct, frozen=True):
    name: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str | msgspec.UnsetType = msgspec.UNSET


class ToolCallDelta(msgspec.Struct, frozen=True):
    """A part of a call: its name first, then its arguments piece by piece."""

    index: int
    function: FunctionDelta
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: Literal["function"] | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, piece: CallBegins | Arguments) -> "ToolCallDelta":
        match piece:
            case CallBegins():
                function = FunctionDelta(piece.name, "")
                return cls(piece.index, function, id=piece.id, type="function")
            case Arguments():
                return cls(piece.index, FunctionDelta(arguments=piece.text))


class Message(Protocol):
    """A message as far as functions are concerned."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> object: ...
    @property
    def tool_calls(self) -> list[ToolCall] | None: ...
    @property
    def tool_call_id(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Function:
    """A function that the client describes, and where in its request."""

    definition: FunctionDefinition
    place: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a client wants to be called, freed of its spelling."""

    mode: Literal["none", "auto", "required"] = "auto"
    # Those that may be, each with its place in the request; None for all.
    allowed: Mapping[str, str] | None = None
    # Whether there may be a single call at most.
    is_one: bool = False

    @classmethod
    def one(cls, name: str, *, place: str) -> "Chosen":
        """Whoever names a function wants one call of it."""
        return cls("required", {name: place}, is_one=True)


def asked_toolbox(
    tools: Sequence[ToolDefinition] | None,
    choice: ToolChoice | None,
    *,
    is_parallel: bool = True,
) -> Toolbox | None:
    """What the answer may call; None where that is nothing. Raises InvalidRequest."""
    functions = [
        Function(tool.function, f"tools[{number}].function")
        for number, tool in enumerate(tools or ())
    ]
    if isinstance(choice, NamedTool):
        chosen = Chosen.one(choice.function.name, place="tool_choice.function.name")
    else:
        chosen = Chosen(choice or "auto")
    return toolbox_of(functions, chosen, is_parallel=is_parallel)


def toolbox_of(
    functions: Sequence[Function], chosen: Chosen, *, is_parallel: bool
) -> Toolbox | None:
    """What the answer may call; None where that is nothing. Raises InvalidRequest."""
    _check_names(functions)
    if not functions and (chosen.mode == "required" or chosen.allowed is not None):
        raise InvalidRequest(
            "'tool_choice' asks for a call, and there are no 'tools': give at least one.",
            param="tool_choice",
        )
    if not functions or chosen.mode == "none":
        return None
    names = {each.definition.name for each in functions}
    for name, place in (chosen.allowed or {}).items():
        if name not in names:
            raise InvalidRequest(
                f"'tool_choice' names {name!r}, which is not in 'tools'.", param=place
            )
    return Toolbox(
        tuple(map(_tool, functions)),
        must_call=chosen.mode == "required",
        allowed=None if chosen.allowed is None else frozenset(chosen.allowed),
        is_parallel=is_parallel and not chosen.is_one,
    )


def check_form(toolbox: Toolbox, grammar: AskedGrammar | None, *, ignore_eos: bool) -> None:
    """Raises InvalidRequest where an answer cannot be both what is asked for and calls."""
    if ignore_eos and toolbox.is_enforced:
        raise InvalidRequest(
            "'ignore_eos' would let the answer go on after its calls: leave it out.",
            param="ignore_eos",
        )
    if grammar is not None and toolbox.must_call:
        raise InvalidRequest(
            f"'tool_choice' asks for a call, and '{grammar.param}' for something else: send one of"
            " them.",
            param="tool_choice",
        )
    if grammar is not None and grammar.form != "json_schema":
        raise InvalidRequest(
            f"'{grammar.param}' leaves no room for a call: beside 'tools' only a JSON schema may"
            " say what an answer in words has to look like.",
            param=grammar.param,
        )


def _check_names(functions: Sequence[Function]) -> None:
    names: set[str] = set()
    for each in functions:
        name = each.definition.name
        if name in names:
            raise InvalidRequest(
                f"There are two tools {name!r}: give each a name of its own.",
                param=f"{each.place}.name",
            )
        names.add(name)


def _check_depth(value: dict[str, Any], place: str) -> None:
    """Templates and grammars go down into what is nested, and others wait for them."""
    level: list[Any] = [value]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise InvalidRequest(
                f"'{place}' is nested deeper than {MAX_DEPTH} levels.", param=place
            )
        lists = (each.values() if isinstance(each, dict) else each for each in level)
        level = [inner for each in lists for inner in each if isinstance(inner, dict | list)]


def _tool(described: Function) -> Tool:
    function, place = described.definition, f"{described.place}.parameters"
    parameters = dict(NO_PARAMETERS if function.parameters is None else function.parameters)
    _check_depth(parameters, place)
    if parameters.setdefault("type", "object") != "object":
        raise InvalidRequest(
            f"'{place}' is no schema of an object: arguments have names, so its type is"
            ' "object".',
            param=place,
        )
    definition: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        definition["description"] = function.description
    definition["parameters"] = parameters
    return Tool(
        name=function.name,
        definition={"type": "function", "function": definition},
        parameters=parameters,
        is_strict=bool(function.strict),
    )


def check_turns(messages: Sequence[Message]) -> None:
    """Raises InvalidRequest where calls and what was answered to them do not fit together."""
    called: set[str] = set()
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if message.tool_calls and message.role != "assistant":
            raise _misplaced(f"{place}.tool_calls", "only an assistant's message has calls")
        if message.content is None and not message.tool_calls:
            raise _misplaced(f"{place}.content", "only a message with 'tool_calls' may lack it")
        if (message.tool_call_id is not None) != (message.role == "tool"):
            raise _misplaced(
                f"{place}.tool_call_id", "a tool's message has one, and no other message does"
            )
        if message.tool_call_id is not None and message.tool_call_id not in called:
            raise _misplaced(
                f"{place}.tool_call_id", "no message before it has a call with this id"
            )
        called.update(call.id for call in message.tool_calls or ())


def calls_for_template(calls: Sequence[ToolCall], *, place: str) -> list[dict[str, Any]]:
    """Calls as chat templates take them: arguments as values. Raises InvalidRequest."""
    return [
        call_for_template(
            call.id,
            call.function.name,
            call.function.arguments,
            place=f"{place}[{number}].function.arguments",
        )
        for number, call in enumerate(calls)
    ]


def call_for_template(call_id: str, name: str, arguments: str, *, place: str) -> dict[str, Any]:
    """`place` is where the arguments stand. Raises InvalidRequest."""
    function = {"name": name, "arguments": _arguments(arguments, place)}
    return {"id": call_id, "type": "function", "function": function}


def _arguments(text: str, place: str) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"'{place}' is no JSON object: {error}", param=place) from error
    _check_depth(arguments, place)
    return arguments


def _misplaced(place: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"'{place}' does not fit: {rule}.", param=place)
