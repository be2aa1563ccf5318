"""Fields that are not known here: taken out and told of, where the operator chose so.

Otherwise whoever decodes the body refuses them by name. Reads bodies of generations alone; knows
no field by name.
"""

import re
from typing import Any
from urllib.parse import quote

import msgspec
from litestar import Request
from litestar.exceptions import SerializationException
from litestar.types import Message, Scope

HEADER = b"x-ignored-fields"
# With more of them a body is refused after all.
MAX_IGNORED = 64
MAX_HEADER_LENGTH = 4096

# How msgspec words it; `$` is the body.
_UNKNOWN = re.compile(
    r"Object contains unknown field `(?P<name>.*?)`(?: - at `\$(?P<place>[^`]*)`)?", re.DOTALL
)
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_STATE = "ignored_fields"


async def take_out_unknown(request: Request[Any, Any, Any]) -> None:
    """Take what is not known out of the body of a generation, before it is decoded."""
    handler = request.route_handler
    if request.method != "POST" or handler.opt.get("scope") != "inference":
        return
    field = handler.parsed_data_field
    if field is None or not issubclass(field.annotation, msgspec.Struct):
        return
    try:
        body = await request.json()
    except SerializationException:
        # Told by whoever needs the body.
        return
    request.scope["state"][_STATE] = take_out(body, field.annotation)


def take_out(body: Any, kind: type[msgspec.Struct]) -> list[str]:
    """Take what a kind of request does not know out of a body; return the names."""
    names: list[str] = []
    while len(names) < MAX_IGNORED:
        name = _take_one(body, kind)
        if name is None:
            break
        names.append(name)
    return names


def _take_one(body: Any, kind: type[msgspec.Struct]) -> str | None:
    """Take one unknown field out and return its name; None where there is none to be found."""
    try:
        msgspec.convert(body, kind, strict=False, str_keys=True)
    except msgspec.ValidationError as error:
        found = _UNKNOWN.fullmatch(str(error))
        if found is None or "[...]" in (found["place"] or ""):
            return None
        place, owner = found["place"] or "", body
        for key, number in _STEP.findall(place):
            owner = owner[key] if key else owner[int(number)]
        del owner[found["name"]]
        return f"{place}.{found['name']}".removeprefix(".")
    return None


async def name_ignored(message: Message, scope: Scope) -> None:
    """Say in a header what was taken out."""
    names = scope.get("state", {}).get(_STATE)
    if names and message["type"] == "http.response.start":
        value = ", ".join(quote(name, safe="[]") for name in names)[:MAX_HEADER_LENGTH]
        message["headers"] = [*message.get("headers", []), (HEADER, value.encode())]
