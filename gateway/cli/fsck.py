"""`manylora adapters fsck`: the one command about adapters that opens database and store itself."""

import asyncio
import datetime
import sys
from pathlib import Path

import click

from adapters.errors import StoreUnavailable
from gateway.children import CannotServe
from gateway.cli.printing import say
from gateway.cli.server import DEFAULT_DATA_DIR
from gateway.database import DATABASE_TROUBLE
from gateway.errors import GatewayError
from gateway.fsck import Fsck, Report
from gateway.installation import installation


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), default=DEFAULT_DATA_DIR)
@click.option("--database-url", help="As given to serve. [default: the embedded one]")
@click.option("--store-url", help="As given to serve. [default: the data directory]")
@click.option("--deep", is_flag=True, help="Read every byte, and compare it with its digest.")
@click.option("--repair", is_flag=True, help="Remove what nobody needs, mark what is missing.")
@click.option(
    "--grace-hours",
    type=click.FloatRange(min=0),
    default=24.0,
    show_default=True,
    help="Leave younger files alone: an upload under way may need them.",
)
def fsck(
    data_dir: Path,
    database_url: str | None,
    store_url: str | None,
    deep: bool,
    repair: bool,
    grace_hours: float,
) -> None:
    """Compare the artifact store with the database, while they are in use.

    The exit status is 1 where something is wrong and was not repaired, 2 where nothing could be
    compared.
    """

    async def run() -> Report:
        async with installation(data_dir, database_url=database_url, store_url=store_url) as (
            database,
            store,
        ):
            grace = datetime.timedelta(hours=grace_hours)
            return await Fsck(database, store, grace=grace).run(is_deep=deep, must_repair=repair)

    try:
        report = asyncio.run(run())
    except (CannotServe, GatewayError, StoreUnavailable, *DATABASE_TROUBLE) as error:
        say(f"cannot compare: {error}")
        sys.exit(2)
    for problem in report.problems:
        click.echo(problem.line())
    click.echo(report.summary())
    sys.exit(0 if report.is_sound else 1)
