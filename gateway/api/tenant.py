"""GET /v1/usage: what the caller's own tenant used and what it costs."""

from dataclasses import replace
from typing import Annotated, Any

from litestar import Request, get
from litestar.di import NamedDependency
from litestar.params import FromQuery, QueryParameter
from litestar.response import Stream

from gateway.api.usage import (
    DEFAULT_GROUPS,
    PARAMETERS,
    REPORT,
    WRITTEN,
    read_question,
    refuse_unknown,
    write_report,
)
from gateway.auth import Principal
from gateway.billing.usage import Dimension
from gateway.billing.writers import Format
from gateway.database import Database

GROUPS = tuple(each for each in Dimension if each is not Dimension.TENANT)


@get(
    "/v1/usage",
    scope="usage",
    tags=["usage"],
    summary="Report your own usage and its cost",
    responses=REPORT,
    also_as=WRITTEN,
)
async def usage(
    request: Request[Any, Any, Any],
    principal: NamedDependency[Principal],
    database: NamedDependency[Database],
    since: Annotated[str | None, QueryParameter(name="from")] = None,
    until: Annotated[str | None, QueryParameter(name="to")] = None,
    group_by: FromQuery[str] = DEFAULT_GROUPS,
    format: FromQuery[Format] = "json",  # noqa: A002 - its name in the URL
    time_zone: FromQuery[str] = "UTC",
    as_of: FromQuery[str | None] = None,
) -> Stream:
    """Dates of the time zone, or RFC 3339 times; `to` is not included. Else: the current month.

    `group_by` takes any of day, hour, adapter, version, key, model, user and endpoint. With
    `as_of`, a moment of the past, the report is what it was then, to the nano-USD.
    """
    refuse_unknown(request.query_params, known=PARAMETERS)
    question = await read_question(request, database, allowed=GROUPS)
    assert principal.tenant_id is not None, "the guard lets tenants' keys in alone"
    async with database.as_tenant(principal.tenant_id) as session:
        question = replace(question, tenant_id=principal.tenant_id)
        return await write_report(session, question, format)
