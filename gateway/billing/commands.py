"""`manylora billing`: close months and prove the books, with a database's URL and nothing running.

Parses and reports; decides nothing.
"""

import asyncio
import contextlib
import datetime
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import click

from gateway.billing import periods
from gateway.billing.documents import usd
from gateway.billing.verify import Proof, prove
from gateway.database import DATABASE_TROUBLE, Database
from gateway.embedded import EmbeddedPostgres
from gateway.errors import GatewayError, PostgresFailed
from gateway.journal import survey

Result = TypeVar("Result")

MAX_SHOWN = 20


def _where(command: click.decorators.FC) -> click.decorators.FC:
    command = click.option(
        "--data-dir",
        type=click.Path(path_type=Path),
        default=Path(".manylora"),
        help="With the journals, and the embedded database where no other is named.",
    )(command)
    return click.option("--database-url", help="PostgreSQL as the owner or as the worker.")(command)


@click.group()
def billing() -> None:
    """Close months and prove that the books are right."""


@billing.command()
@click.option("--month", required=True, help="The last month to close, as in 2026-09.")
@_where
def close(month: str, database_url: str | None, data_dir: Path) -> None:
    """Close a month that is over, and those before it, without waiting for their grace."""
    try:
        first = datetime.datetime.strptime(month, "%Y-%m").date()
    except ValueError:
        raise click.BadParameter(f"{month!r} is not a month such as 2026-09") from None

    async def run(database: Database) -> list[periods.Closed]:
        return await periods.close(database, first, now=datetime.datetime.now(datetime.UTC))

    with _opened(database_url, data_dir) as url:
        closed = asyncio.run(_with(url, run))
    for each in closed:
        click.echo(f"{each.number}  {each.num_lines} lines  {usd(each.total_nano)} USD")
    click.echo(f"{len(closed)} statements made")


@billing.command()
@_where
def verify(database_url: str | None, data_dir: Path) -> None:
    """Prove that journals, events, rollups, holds, statements and audit chains agree."""
    with _opened(database_url, data_dir) as url:
        # Before the database: what they call settled must be there.
        journals = survey(data_dir / "journal")
        proof = asyncio.run(_with(url, lambda database: prove(database, journals)))
    _report(proof, num_journalled=len(journals))
    if proof.mismatches:
        sys.exit(1)


def _report(proof: Proof, *, num_journalled: int) -> None:
    for name, value in proof.sums.items():
        shown = f"{usd(value)} USD" if name.endswith("_nano") else f"{value:,}"
        click.echo(f"{name.removesuffix('_nano').replace('_', ' '):>20}  {shown}")
    click.echo(f"{'journalled':>20}  {num_journalled:,}, {proof.num_pending:,} still to be settled")
    for each in proof.mismatches[:MAX_SHOWN]:
        click.echo(f"DIFFERENCE {each.kind}: {each.subject}")
        click.echo(f"  expected {each.expected}, found {each.found}")
    if len(proof.mismatches) > MAX_SHOWN:
        click.echo(f"... and {len(proof.mismatches) - MAX_SHOWN} more")
    click.echo(
        "all books agree" if not proof.mismatches else f"{len(proof.mismatches)} differences"
    )


@contextlib.contextmanager
def _opened(database_url: str | None, data_dir: Path) -> Iterator[str]:
    """The database's URL; the embedded one is started for as long, unless it runs."""
    try:
        if database_url is not None:
            yield database_url
            return
        if not (data_dir / "postgres.made").exists():
            raise click.UsageError(
                f"there is no embedded database in {data_dir}: give --database-url or --data-dir"
            )
        postgres = EmbeddedPostgres(data_dir)
        with contextlib.ExitStack() as stack:
            # Whoever serves holds it already, and it answers us too.
            with contextlib.suppress(PostgresFailed):
                stack.enter_context(postgres)
            yield postgres.url
    except (GatewayError, *DATABASE_TROUBLE) as error:
        raise click.ClickException(str(error)) from error


async def _with(url: str, work: Callable[[Database], Awaitable[Result]]) -> Result:
    database = Database.of_worker(url)
    try:
        return await work(database)
    finally:
        await database.close()
