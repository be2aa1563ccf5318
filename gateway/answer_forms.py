"""What an answer has to look like where calls, thoughts and a client's own form meet.

Knows what goes together. Knows nothing of how a grammar is written.
"""

from typing import Any

import msgspec

from gateway.errors import InvalidRequest
from gateway.grammars import AskedGrammar, InvalidSchema
from gateway.text import TextCodec
from gateway.tools.notation import CallableTool, CallForm
from gateway.tools.reasoning import Thinking
from gateway.tools.toolbox import Toolbox


def whole_form(
    asked: AskedGrammar | None,
    tools: Toolbox | None,
    *,
    codec: TextCodec,
    thinking: Thinking,
) -> tuple[AskedGrammar | None, Thinking]:
    """The form with calls and thoughts in it, and whether the answer thinks.

    `asked` is what an answer in words has to look like. None leaves all of it to the model's own
    manners. Raises InvalidRequest.
    """
    is_enforced = tools is not None and tools.is_enforced
    is_alone = tools is None and thinking == "never"
    if is_alone or (asked is None and not is_enforced):
        return asked, thinking
    if asked is not None and asked.form != "json_schema":
        # It begins at once.
        return asked, "never"
    form = CallForm(
        codec.syntax.name,
        _callable(tools),
        must_call=tools is not None and tools.must_call,
        is_parallel=tools is not None and tools.is_parallel,
        thinking=thinking,
        token_ids=codec.mark_token_ids,
        otherwise=None if asked is None else _schema(asked),
    )
    param = "tools" if asked is None else asked.param
    try:
        text = msgspec.json.encode(form).decode()
    except (msgspec.MsgspecError, OverflowError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"'{param}' cannot be read: {error}", param=param) from error
    return AskedGrammar("calls", text, param), thinking


def _callable(tools: Toolbox | None) -> list[CallableTool]:
    """The functions, with their schemas where an answer is held to them."""
    if tools is None:
        return []
    return [
        CallableTool(
            tool.name, dict(tool.parameters) if tools.must_call or tool.is_strict else None
        )
        for tool in tools.callable
    ]


def _schema(asked: AskedGrammar) -> dict[str, Any] | bool:
    try:
        schema: dict[str, Any] | bool = msgspec.json.decode(asked.text, type=dict[str, Any] | bool)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidSchema(
            f"'{asked.param}' cannot be followed: it is no JSON schema: {error}", param=asked.param
        ) from error
    return schema
