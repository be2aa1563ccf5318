"""GET /health/live and /health/ready: for whoever restarts this process or routes to it."""

from typing import Literal

import msgspec
from litestar import Response, get
from litestar.di import NamedDependency
from litestar.openapi import ResponseSpec
from sqlalchemy import text

from gateway.database import DATABASE_TROUBLE, Database
from gateway.routing import Router


class Health(msgspec.Struct, frozen=True):
    """`reasons` says what is missing; empty when nothing is."""

    status: Literal["live", "ready", "not ready"]
    reasons: list[str] = []


@get("/health/live", scope="public", tags=["health"], summary="Is the process alive")
async def live() -> Health:
    return Health("live")


@get(
    "/health/ready",
    scope="public",
    tags=["health"],
    summary="Can requests be answered now",
    responses={503: ResponseSpec(Health, description="Not now.")},
)
async def ready(
    database: NamedDependency[Database], router: NamedDependency[Router]
) -> Response[Health]:
    reasons = [*_engine_reasons(router), *await _database_reasons(database)]
    if reasons:
        return Response(Health("not ready", reasons), status_code=503)
    return Response(Health("ready"))


def _engine_reasons(router: NamedDependency[Router]) -> list[str]:
    return [] if router.is_any_connected else ["no engine is connected"]


async def _database_reasons(database: NamedDependency[Database]) -> list[str]:
    try:
        async with database.as_app() as session:
            await session.execute(text("SELECT 1"))
    except DATABASE_TROUBLE:
        return ["the database does not answer"]
    return []
