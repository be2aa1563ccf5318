"""A line of a batch's input, read and judged, and a line of its output, spelled.

The input is judged whole before anything of it runs. Knows JSON Lines and how OpenAI spells what is
in them; nothing of what a body asks for.
"""

import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from gateway.errors import GatewayError, InvalidRequest
from gateway.object_ids import LINE, spell_id
from gateway.tables import new_id

MAX_LINES = 50_000
# As much as the routes themselves take.
MAX_LINE_BYTES = 16 << 20
MAX_CUSTOM_ID_LENGTH = 512
# Whoever has more wrong lines has seen enough.
MAX_FAULTS = 100
READ_BYTES = 1 << 20

# How msgspec words it: the fault, and where it is; `$` is the line.
_PLACE = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<place>[^`]*)`)?", re.DOTALL)
_FIELD = re.compile(r"(unknown|required) field `(.+?)`")

# Reads the input's bytes from one place up to another.
Read = Callable[[int, int], Awaitable[bytes]]


class Fault(msgspec.Struct, frozen=True):
    """Why a batch failed: of one line, or of all."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    @classmethod
    def of(cls, error: GatewayError) -> "Fault":
        return cls(error.code or error.type, error.message)


class InputLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request of the input."""

    custom_id: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_CUSTOM_ID_LENGTH)]
    method: str
    url: str
    body: msgspec.Raw


class LineResponse(msgspec.Struct, frozen=True):
    """What the route would have answered."""

    status_code: int
    request_id: str
    body: msgspec.Raw
    # What the route says in `x-ignored-fields`.
    ignored_fields: list[str] | msgspec.UnsetType = msgspec.UNSET


class LineError(msgspec.Struct, frozen=True):
    """Why the line was never asked."""

    code: str
    message: str


class OutputLine(msgspec.Struct, frozen=True):
    """What came of one request."""

    id: str
    custom_id: str
    response: LineResponse | None
    error: LineError | None


@dataclass(slots=True)
class Judgement:
    """Mutable: what is known of an input so far."""

    # The route that all lines must name.
    endpoint: str
    num_lines: int = 0
    faults: list[Fault] = field(default_factory=list)
    _custom_ids: set[str] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        """Whether nothing more needs to be read."""
        return len(self.faults) >= MAX_FAULTS or self.num_lines > MAX_LINES

    def add(self, number: int, raw: bytes) -> None:
        self.num_lines += 1
        if self.num_lines > MAX_LINES:
            self.faults.append(
                Fault("too_many_lines", f"A batch has at most {MAX_LINES} requests.", number)
            )
            return
        fault = self._judge(number, raw)
        if fault is not None:
            self.faults.append(fault)

    def finish(self) -> None:
        if not self.num_lines:
            self.faults.append(Fault("empty_file", "The input file has no requests."))

    def _judge(self, number: int, raw: bytes) -> Fault | None:
        if len(raw) > MAX_LINE_BYTES:
            message = f"This line is longer than {MAX_LINE_BYTES} bytes."
            return Fault("line_too_long", message, number)
        try:
            line = read_line(raw)
        except InvalidRequest as error:
            return Fault(error.code or "", error.message, number, error.param)
        if line.custom_id in self._custom_ids:
            message = f"The custom_id {line.custom_id!r} is used by an earlier line."
            return Fault("duplicate_custom_id", message, number, "custom_id")
        self._custom_ids.add(line.custom_id)
        if line.method != "POST":
            return Fault("invalid_method", "'method' must be 'POST'.", number, "method")
        if line.url != self.endpoint:
            message = f"'url' must be the batch's endpoint, {self.endpoint!r}."
            return Fault("mismatched_url", message, number, "url")
        return None


class InvalidLine(InvalidRequest):
    """The line is not a request."""

    code = "invalid_json_line"


def read_line(raw: bytes) -> InputLine:
    """Raises InvalidLine, or InvalidRequest naming the field."""
    try:
        line = msgspec.json.decode(raw, type=InputLine)
    except msgspec.ValidationError as error:
        raise invalid_field(error) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidLine(f"This line is not JSON: {error}.") from error
    if not bytes(line.body).lstrip().startswith(b"{"):
        raise InvalidRequest("'body' must be a JSON object: what the route takes.", param="body")
    return line


def invalid_field(error: msgspec.ValidationError) -> InvalidRequest:
    """What msgspec found, as the routes would say it."""
    match = _PLACE.fullmatch(str(error))
    assert match is not None, "every text matches"
    what, place = match["what"], match["place"] or ""
    if found := _FIELD.search(what):
        param = f"{place}.{found[2]}" if place else found[2]
        if found[1] == "unknown":
            return InvalidRequest(f"Unknown field '{param}': remove it.", param=param)
        return InvalidRequest(f"Missing field '{param}': it is required.", param=param)
    if not place:
        return InvalidRequest(f"It must be a JSON object: {what}.")
    return InvalidRequest(f"{place}: {what}", param=place)


async def read_lines(read: Read, size_bytes: int) -> AsyncIterator[tuple[int, bytes]]:
    """The lines with their numbers, from 1 on; empty ones are passed over.

    One that is too long comes cut off, so that it costs no more memory than the longest that is
    not. No connection is kept between one read and the next, however long that takes.
    """
    number, pending, is_cut = 1, bytearray(), False
    for begin in range(0, size_bytes, READ_BYTES):
        chunk = await read(begin, min(begin + READ_BYTES, size_bytes))
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            if not is_cut:
                pending += piece
            if pending.strip():
                yield number, bytes(pending)
            number, is_cut = number + 1, False
            pending.clear()
        if not is_cut:
            pending += rest
        is_cut = is_cut or len(pending) > MAX_LINE_BYTES
    if pending.strip():
        yield number, bytes(pending)


def spell_answer(
    line: InputLine,
    request_id: uuid.UUID,
    *,
    status: int,
    body: bytes,
    ignored_fields: Sequence[str] = (),
) -> bytes:
    """A line of the output: what the route answered, be it an error."""
    ignored = list(ignored_fields) or msgspec.UNSET
    response = LineResponse(status, str(request_id), msgspec.Raw(body), ignored)
    return _spell(OutputLine(spell_id(LINE, request_id), line.custom_id, response, None))


def spell_unasked(line: InputLine, *, code: str, message: str) -> bytes:
    """A line of the output for one that never ran."""
    return _spell(
        OutputLine(spell_id(LINE, new_id()), line.custom_id, None, LineError(code, message))
    )


def _spell(line: OutputLine) -> bytes:
    return msgspec.json.encode(line) + b"\n"
