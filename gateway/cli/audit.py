"""`manylora audit`: check what operators did, offline."""

from pathlib import Path

import click

from gateway.audit import BrokenChain, verify_export


@click.group()
def audit() -> None:
    """Check what operators did."""


@audit.command("verify")
@click.argument("path", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def verify_audit(path: Path) -> None:
    """Check an exported audit log: no row changed, none missing. Needs no database."""
    try:
        with path.open("rb") as lines:
            ends = verify_export(lines)
    except BrokenChain as fault:
        raise click.ClickException(str(fault)) from fault
    for tenant_id, (number, last) in ends.items():
        click.echo(f"{tenant_id or 'operators'}: {number} rows, last hash {last}")
    click.echo("every row fits the one before it")
