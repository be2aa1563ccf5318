"""GET /v1/usage: what the caller's own tenant used and what it costs."""

from typing import Annotated, Any

from litestar import Request, Response, get
from litestar.di import NamedDependency
from litestar.params import FromQuery, QueryParameter

from gateway.api.usage import (
    DEFAULT_GROUPS,
    Format,
    parse_group_by,
    parse_period,
    refuse_unknown,
    write_report,
)
from gateway.auth import Principal
from gateway.billing.usage import Dimension, UsageReport, usage_report
from gateway.database import Database

GROUPS = (Dimension.DAY, Dimension.ADAPTER, Dimension.KEY, Dimension.MODEL)


@get("/v1/usage", scope="usage", tags=["usage"], summary="Report your own usage and its cost")
async def usage(
    request: Request[Any, Any, Any],
    principal: NamedDependency[Principal],
    database: NamedDependency[Database],
    since: Annotated[str | None, QueryParameter(name="from")] = None,
    until: Annotated[str | None, QueryParameter(name="to")] = None,
    group_by: FromQuery[str] = DEFAULT_GROUPS,
    format: FromQuery[Format] = "json",  # noqa: A002 - its name in the URL
) -> Response[UsageReport | str]:
    """Dates or RFC 3339 times, in UTC; `to` is not included. Without both: the current month.

    `group_by` takes any of day, adapter, key and model.
    """
    refuse_unknown(request.query_params, known=("from", "to", "group_by", "format"))
    period = parse_period(since, until)
    groups = parse_group_by(group_by, allowed=GROUPS)
    assert principal.tenant_id is not None, "the guard lets tenants' keys in alone"
    async with database.as_tenant(principal.tenant_id) as session:
        report = await usage_report(session, period, group_by=groups, tenant_id=principal.tenant_id)
    return write_report(report, format)
