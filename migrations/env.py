"""Runs the steps on the connection that it is handed.

`gateway.database.migrate` hands it one. From the command line it opens its own:
`alembic -x url=postgresql+asyncpg://... upgrade head`.
"""

import asyncio

from alembic import context
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine

from gateway.tables import Table


def include_name(name: str | None, kind: str, _parents: object) -> bool:
    # The partitions of usage_events are made by a function, a month at a time.
    return not (kind == "table" and name is not None and name.startswith("usage_events_"))


def run_steps(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Table.metadata,
        include_name=include_name,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


async def run_steps_at(url: str) -> None:
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(run_steps)
    await engine.dispose()


def run() -> None:
    connection = context.config.attributes.get("connection")
    if connection is not None:
        run_steps(connection)
        return
    url = context.get_x_argument(as_dictionary=True).get("url")
    if url is None:
        raise SystemExit("name the database: alembic -x url=postgresql+asyncpg://... <command>")
    asyncio.run(run_steps_at(url))


run()
