"""What came before an answer: items as clients send them, and the turns that templates take.

Knows nothing of sampling, nor of what an answer looks like.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from gateway.api.fields import refuse_unserved
from gateway.api.tools import CallId, FunctionName, call_for_template
from gateway.errors import InvalidRequest

ItemKind = Literal["message", "function_call", "function_call_output", "reasoning"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class ItemText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of what was asked, answered or thought; text is the only kind."""

    type: Literal["input_text", "output_text", "reasoning_text", "summary_text"]
    text: str
    # Of an answer that comes back; the model is told its text.
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A message, a call of a function, what it gave, or thoughts: `type` says which.

    Those of earlier answers are taken as they came.
    """

    type: ItemKind = "message"
    # Of a message.
    role: Literal["system", "developer", "user", "assistant"] | None = None
    # Of a message and of thoughts.
    content: str | list[ItemText] | None = None
    # Of thoughts.
    summary: list[ItemText] | None = None
    # Of a call, and of what it gave.
    call_id: CallId | None = None
    name: FunctionName | None = None
    # JSON.
    arguments: str | None = None
    # What the function gave.
    output: str | list[ItemText] | None = None
    # Of an answer that comes back; they change nothing.
    id: str | None = None
    status: ItemStatus | None = None
    # Known, and refused unless the value changes nothing: see `fields.NEUTRAL_VALUES`.
    caller: Any | None = None
    encrypted_content: str | None = None
    namespace: str | None = None
    phase: str | None = None


Items = Annotated[list[InputItem], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, slots=True)
class _Fields:
    """Which of the fields of its own an item must have, and which it may."""

    required: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()


FIELDS: Mapping[ItemKind, _Fields] = {
    "message": _Fields(required=("role", "content")),
    "function_call": _Fields(required=("call_id", "name", "arguments")),
    "function_call_output": _Fields(required=("call_id", "output"), allowed=("name",)),
    "reasoning": _Fields(allowed=("content", "summary")),
}
OWN_FIELDS = ("role", "content", "summary", "call_id", "name", "arguments", "output")


def conversation(
    given: str | Sequence[InputItem], *, instructions: str | None
) -> list[dict[str, Any]]:
    """The turns, as chat templates expect them. Raises InvalidRequest naming what does not fit."""
    if not given:
        raise InvalidRequest("'input' is empty: ask something.", param="input")
    turns = _Turns()
    if isinstance(given, str):
        turns.say("user", given)
    else:
        for number, item in enumerate(given):
            turns.add(item, place=f"input[{number}]")
    if instructions:
        turns.instruct(instructions)
    return turns.made


class _Turns:
    """Mutable: what an assistant thought, said and called in a row becomes one turn."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        # The function of each call, by the call's id.
        self._names: dict[str, str] = {}

    def add(self, item: InputItem, *, place: str) -> None:
        """Raises InvalidRequest."""
        _check(item, place)
        match item.type:
            case "reasoning":
                self._think(item)
            case "function_call":
                self._call(item, place)
            case "function_call_output":
                self._answer(item, place)
            case "message" if item.role == "assistant":
                self._speak(_text(item.content))
            case "message":
                assert item.role is not None, "checked before"
                self.say(item.role, _text(item.content))

    def say(self, role: str, text: str) -> None:
        """`developer` is the newer word for `system`."""
        self.made.append({"role": "system" if role == "developer" else role, "content": text})

    def instruct(self, instructions: str) -> None:
        """Templates know of one system message, and that it is the first."""
        if self.made[0]["role"] == "system":
            first = self.made.pop(0)["content"]
            instructions = f"{instructions}\n\n{first}"
        self.made.insert(0, {"role": "system", "content": instructions})

    def _think(self, item: InputItem) -> None:
        text = _text(item.content) or _text(item.summary)
        turn = self._assistant(begins=("content", "tool_calls"))
        before = turn.get("reasoning_content")
        turn["reasoning_content"] = f"{before}\n{text}" if before else text

    def _speak(self, text: str) -> None:
        """Of two messages in a row each is a turn; words behind a call belong to its turn."""
        turn = self._assistant(begins=("content",), unless="tool_calls")
        turn["content"] += text

    def _call(self, item: InputItem, place: str) -> None:
        assert item.call_id is not None, "checked before"
        assert item.name is not None, "checked before"
        assert item.arguments is not None, "checked before"
        call = call_for_template(
            item.call_id, item.name, item.arguments, place=f"{place}.arguments"
        )
        self._assistant().setdefault("tool_calls", []).append(call)
        self._names[item.call_id] = item.name

    def _answer(self, item: InputItem, place: str) -> None:
        assert item.call_id is not None, "checked before"
        if item.call_id not in self._names:
            raise InvalidRequest(
                f"'{place}.call_id' does not fit: no item before it is a call with this id.",
                param=f"{place}.call_id",
            )
        self.made.append(
            {
                "role": "tool",
                "content": _text(item.output),
                "tool_call_id": item.call_id,
                "name": self._names[item.call_id],
            }
        )

    def _assistant(
        self, *, begins: tuple[str, ...] = (), unless: str | None = None
    ) -> dict[str, Any]:
        """The assistant's turn under way, or a new one where there is none.

        It is also new where the last has one of `begins` already, and not `unless`.
        """
        last = self.made[-1] if self.made else {"role": "user"}
        is_full = any(last.get(name) for name in begins) and unless not in last
        if last["role"] != "assistant" or is_full:
            self.made.append({"role": "assistant", "content": ""})
        return self.made[-1]


def _check(item: InputItem, place: str) -> None:
    refuse_unserved(item, place=f"{place}.")
    fields = FIELDS[item.type]
    for name in OWN_FIELDS:
        is_given = getattr(item, name) is not None
        if not is_given and name in fields.required:
            raise InvalidRequest(
                f"Missing field '{place}.{name}': an item of the type {item.type} has one.",
                param=f"{place}.{name}",
            )
        if is_given and name not in (*fields.required, *fields.allowed):
            raise InvalidRequest(
                f"'{place}.{name}' does not fit: an item of the type {item.type} has none.",
                param=f"{place}.{name}",
            )


def _text(content: str | Sequence[ItemText] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)
