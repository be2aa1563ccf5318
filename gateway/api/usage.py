"""How a usage report is asked for and written: the same for operators and for tenants."""

import datetime
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from litestar import Response

from gateway.billing.usage import Dimension, Period, UsageReport, to_csv
from gateway.errors import InvalidRequest

Format = Literal["json", "csv"]

DEFAULT_GROUPS = "day,adapter,key"
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
# RFC 3339: date, time, and an offset from UTC.
_MOMENT = re.compile(r"\d{4}-\d{2}-\d{2}[Tt]\d{2}:\d{2}:\d{2}(\.\d{1,6})?([Zz]|[+-]\d{2}:\d{2})")


def parse_period(
    since: str | None, until: str | None, *, now: datetime.datetime | None = None
) -> Period:
    """The span that `from` and `to` name; the current month where they say nothing.

    `to` is not part of it. Raises InvalidRequest.
    """
    month = (now or datetime.datetime.now(datetime.UTC)).replace(
        day=1, hour=0, minute=0, second=0, microsecond=0
    )
    next_month = (month + datetime.timedelta(days=32)).replace(day=1)
    period = Period(
        _parse_moment(since, param="from") if since is not None else month,
        _parse_moment(until, param="to") if until is not None else next_month,
    )
    if period.since >= period.until:
        raise InvalidRequest(
            f"'to' ({period.until.isoformat()}) must be later than 'from'"
            f" ({period.since.isoformat()}); it is not part of the report itself.",
            param="to",
        )
    return period


def _parse_moment(value: str, *, param: str) -> datetime.datetime:
    try:
        if _DATE.fullmatch(value):
            return datetime.datetime.combine(
                datetime.date.fromisoformat(value), datetime.time(), datetime.UTC
            )
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


def write_report(report: UsageReport, report_format: Format) -> Response[UsageReport | str]:
    if report_format == "json":
        return Response(report)
    return Response(
        to_csv(report),
        media_type="text/csv",
        headers={"content-disposition": 'attachment; filename="usage.csv"'},
    )
