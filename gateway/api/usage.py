"""How a usage report is asked for and written: the same for operators and for tenants."""

import asyncio
import datetime
import re
import tempfile
import zoneinfo
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any

from litestar import Request
from litestar.background_tasks import BackgroundTask
from litestar.openapi.datastructures import ResponseSpec
from litestar.response import Stream
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.billing.periods import settled_now
from gateway.billing.usage import Dimension, Period, Question, UsageReport, usage_rows
from gateway.billing.writers import Format, open_writer
from gateway.database import Database
from gateway.errors import InvalidRequest

# What a report is asked with, besides what only operators may say.
PARAMETERS = ("from", "to", "group_by", "format", "time_zone", "as_of")
REPORT = {200: ResponseSpec(UsageReport, generate_examples=False)}
WRITTEN = ("text/csv", "application/vnd.apache.parquet")
# A report that is longer waits for its reader on disk.
MAX_BYTES_IN_MEMORY = 1 << 20
CHUNK_BYTES = 1 << 16

DEFAULT_GROUPS = "day,adapter,key"
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
# RFC 3339: date, time, and an offset from UTC.
_MOMENT = re.compile(r"\d{4}-\d{2}-\d{2}[Tt]\d{2}:\d{2}:\d{2}(\.\d{1,6})?([Zz]|[+-]\d{2}:\d{2})")


def parse_period(
    since: str | None,
    until: str | None,
    *,
    now: datetime.datetime | None = None,
    time_zone: str = "UTC",
) -> Period:
    """The span that `from` and `to` name; the current month where they say nothing.

    Dates are days of the time zone. `to` is not part of it. Raises InvalidRequest.
    """
    zone = parse_time_zone(time_zone)
    today = (now or datetime.datetime.now(datetime.UTC)).astimezone(zone).date()
    month = today.replace(day=1)
    next_month = (month + datetime.timedelta(days=32)).replace(day=1)
    period = Period(
        _parse_moment(since or month.isoformat(), param="from", zone=zone),
        _parse_moment(until or next_month.isoformat(), param="to", zone=zone),
    )
    if period.since >= period.until:
        raise InvalidRequest(
            f"'to' ({period.until.isoformat()}) must be later than 'from'"
            f" ({period.since.isoformat()}); it is not part of the report itself.",
            param="to",
        )
    return period


def parse_time_zone(name: str) -> zoneinfo.ZoneInfo:
    """Raises InvalidRequest."""
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise InvalidRequest(
            f"'time_zone' is a name of the IANA database, such as Europe/Berlin: {name!r}",
            param="time_zone",
        ) from None


def _parse_moment(value: str, *, param: str, zone: datetime.tzinfo) -> datetime.datetime:
    try:
        if _DATE.fullmatch(value):
            midnight = datetime.datetime.combine(
                datetime.date.fromisoformat(value), datetime.time(), zone
            )
            return midnight.astimezone(datetime.UTC)
        if _MOMENT.fullmatch(value):
            return datetime.datetime.fromisoformat(value.upper()).astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        pass
    raise InvalidRequest(
        f"{param!r} is neither a date (2026-01-31) nor an RFC 3339 time"
        f" (2026-01-31T12:00:00Z; a + is written %2B in a URL): {value!r}",
        param=param,
    )


def parse_group_by(value: str, *, allowed: Collection[Dimension]) -> tuple[Dimension, ...]:
    """What to group by, in the order asked for. Raises InvalidRequest naming what there is."""
    names = value.split(",") if value else []
    unknown = [name for name in names if name not in allowed]
    if unknown or len(set(names)) < len(names):
        reason = f"{unknown[0]!r} is not one of them" if unknown else "one of them came twice"
        raise InvalidRequest(
            f"'group_by' is a list, with commas, of {', '.join(allowed)}: {reason}.",
            param="group_by",
        )
    return tuple(Dimension(name) for name in names)


def refuse_unknown(asked: Mapping[str, Any], *, known: Collection[str]) -> None:
    """A parameter with a slip in its name would otherwise answer another question."""
    for name in asked:
        if name not in known:
            raise InvalidRequest(
                f"There is no parameter {name!r}; there are {', '.join(known)}.", param=name
            )


async def parse_as_of(value: str | None, database: Database) -> datetime.datetime | None:
    """The moment whose books are asked for; once this returns, they change no more.

    Raises InvalidRequest, for a moment that is still to come too.
    """
    if value is None:
        return None
    moment = _parse_moment(value, param="as_of", zone=datetime.UTC)
    if moment > await settled_now(database):
        raise InvalidRequest("'as_of' is still to come: name a moment of the past.", param="as_of")
    return moment


async def read_question(
    request: Request[Any, Any, Any], database: Database, *, allowed: Collection[Dimension]
) -> Question:
    """What the query string asks for, without a tenant. Raises InvalidRequest."""
    asked = request.query_params
    time_zone = asked.get("time_zone", "UTC")
    return Question(
        period=parse_period(asked.get("from"), asked.get("to"), time_zone=time_zone),
        group_by=parse_group_by(asked.get("group_by", DEFAULT_GROUPS), allowed=allowed),
        time_zone=time_zone,
        as_of=await parse_as_of(asked.get("as_of"), database),
    )


async def write_report(session: AsyncSession, question: Question, report_format: Format) -> Stream:
    """The whole report, written before it is sent: no reader holds the session up."""
    file = tempfile.SpooledTemporaryFile(max_size=MAX_BYTES_IN_MEMORY)  # noqa: SIM115 - the stream closes it
    try:
        writer = open_writer(report_format, file, question)
        async for rows in usage_rows(session, question):
            await asyncio.to_thread(writer.add, rows)
        await asyncio.to_thread(writer.finish)
    except BaseException:
        file.close()
        raise
    headers = {}
    if report_format != "json":
        headers["content-disposition"] = f'attachment; filename="usage.{report_format}"'
    return send_file(file, media_type=writer.media_type, headers=headers)


def send_file(
    file: "tempfile.SpooledTemporaryFile[bytes]", *, media_type: str, headers: dict[str, str]
) -> Stream:
    """Answer with what was written to a file; it is closed at the end, however that comes about."""
    size_bytes = file.tell()
    file.seek(0)
    return Stream(
        _chunks(file),
        media_type=media_type,
        headers={"content-length": str(size_bytes), **headers},
        background=BackgroundTask(asyncio.to_thread, file.close),
    )


async def _chunks(file: "tempfile.SpooledTemporaryFile[bytes]") -> AsyncIterator[bytes]:
    while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
        yield chunk
