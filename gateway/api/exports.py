"""The books for other programs: FOCUS rows, Stripe's meter events, and the audit log."""

import datetime
import tempfile
from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, Router, get
from litestar.di import NamedDependency
from litestar.openapi import ResponseSpec
from litestar.params import FromQuery, QueryParameter
from litestar.response import Stream

from gateway import audit, tenants
from gateway.api.statements import parse_month
from gateway.api.usage import MAX_BYTES_IN_MEMORY, parse_period, refuse_unknown, send_file
from gateway.billing.documents import get_statement, list_statements
from gateway.billing.exports import focus_csv, meter_events
from gateway.billing.periods import settled_now
from gateway.database import Database
from gateway.errors import InvalidRequest

TAGS = ["billing"]
JSON_LINES = "application/jsonl"
LINES = {200: ResponseSpec(bytes, media_type=JSON_LINES)}


@get(
    "/billing/exports/focus",
    scope="operator",
    tags=TAGS,
    summary="Export a month's closed statements as FOCUS rows",
    media_type="text/csv",
)
async def export_focus(month: FromQuery[str], database: NamedDependency[Database]) -> Response[str]:
    """FOCUS 1.2 as CSV, one row a statement line."""
    asked = parse_month(month)
    async with database.as_worker() as session:
        entries = await list_statements(session, month=asked)
        statements = [await get_statement(session, entry.number) for entry in entries]
    name = f'attachment; filename="focus-{month}.csv"'
    return Response(
        focus_csv(statements), media_type="text/csv", headers={"content-disposition": name}
    )


@get(
    "/billing/exports/stripe",
    scope="operator",
    tags=TAGS,
    summary="Export usage as Stripe's meter events",
    responses=LINES,
)
async def export_stripe(
    request: Request[Any, Any, Any],
    database: NamedDependency[Database],
    since: Annotated[str, QueryParameter(name="from")],
    until: Annotated[str, QueryParameter(name="to")],
) -> Stream:
    """One JSON object a line, each the body of a call to Stripe; full hours that are over.

    By the hour in which usage was settled, which never changes; so are the identifiers.
    """
    refuse_unknown(request.query_params, known=("from", "to"))
    period = parse_period(since, until)
    for name, moment in (("from", period.since), ("to", period.until)):
        if moment != moment.replace(minute=0, second=0, microsecond=0):
            raise InvalidRequest(f"{name!r} must be a full hour.", param=name)
    if period.until > await settled_now(database):
        raise InvalidRequest("'to' is still to come: name an hour that is over.", param="to")
    async with database.as_worker() as session:
        events = meter_events(session, since=period.since, until=period.until)
        return await _write_lines(events, name="meter-events")


@get("/audit", scope="operator", tags=["audit"], summary="Export the audit log", responses=LINES)
async def export_audit(
    request: Request[Any, Any, Any],
    database: NamedDependency[Database],
    tenant: FromQuery[str | None] = None,
) -> Stream:
    """A chain, one JSON object a line, oldest first: a tenant's, or what concerns no tenant.

    `manylora audit verify` checks such a file without a database.
    """
    refuse_unknown(request.query_params, known=("tenant",))
    async with database.as_worker() as session:
        tenant_id = (await tenants.get_tenant(session, tenant)).id if tenant else None
        return await _write_lines(audit.export_chain(session, tenant_id), name="audit")


async def _write_lines(rows: AsyncIterator[msgspec.Struct], *, name: str) -> Stream:
    """Written before it is sent, as reports are."""
    file = tempfile.SpooledTemporaryFile(max_size=MAX_BYTES_IN_MEMORY)  # noqa: SIM115 - sending closes it
    try:
        async for row in rows:
            file.write(msgspec.json.encode(row) + b"\n")
    except BaseException:
        file.close()
        raise
    disposition = (
        f'attachment; filename="{name}-{datetime.datetime.now(datetime.UTC):%Y%m%d}.jsonl"'
    )
    return send_file(file, media_type=JSON_LINES, headers={"content-disposition": disposition})


exports_router = Router("/admin/v1", route_handlers=[export_focus, export_stripe, export_audit])
