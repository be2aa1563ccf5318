"""`manylora adapters`: push, look, roll out, roll back, delete and keep near, over the REST API."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from adapters.errors import ServerTrouble
from adapters.push import Destination, LocalFolder, Server, move_alias, move_canary
from adapters.push import push as push_folder
from gateway.cli import certificate
from gateway.cli.fsck import fsck
from gateway.cli.printing import print_json, print_table, say
from gateway.cli.pull import pull
from gateway.cli.server import AboutAnAdapter, AdapterName, about_an_adapter, as_operator, number_of

force = click.option(
    "--force", is_flag=True, help="Also to a version that does worse at its own examples."
)
alias_option = click.option("--alias", required=True, help="The name that moves, e.g. prod.")
as_json = click.option("--json", "is_json", is_flag=True, help="As the server says it.")


@click.group()
def adapters() -> None:
    """Look after the adapters of an installation.

    MODEL is what its callers send: TENANT-NAME, or TENANT-NAME@ with a version's number or an
    alias.
    """


adapters.add_command(fsck)
adapters.add_command(pull)


@adapters.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--tenant", required=True)
@click.option("--name", required=True, help="The adapter's own name, without its tenant's.")
@click.option("--alias", help="Move this to the new version, once it can be called.")
@click.option("--base-model", help="Needed where the server has several.")
@force
@as_operator
def push(
    server: Server,
    folder: Path,
    tenant: str,
    name: str,
    alias: str | None,
    base_model: str | None,
    force: bool,
) -> None:
    """Upload the FOLDER of an adapter that PEFT saved.

    Whatever breaks off, the same command goes on where it was. The exit status is 1 where the
    server finds something wrong with the adapter; it says everything that is.
    """
    if force and alias is None:
        raise click.UsageError("--force is about --alias: name the alias that is to move.")
    found = LocalFolder.read(folder)
    to = Destination(tenant, name, base_model)
    version = _push(found, server, to)
    say(f"{version['pinned_model']} can be called")
    _tell_left_out(found)
    if alias is not None:
        moved = move_alias(server, to.route, alias, version=version["number"], is_forced=force)
        say(f"{version['model']}@{_meaning(moved)}")
    click.echo(version["pinned_model"])


@adapters.command("list")
@click.option("--tenant", help="Of this one alone.")
@click.option("--deleted", is_flag=True, help="Those that were deleted, purged ones too.")
@as_json
@as_operator
def list_adapters(server: Server, tenant: str | None, deleted: bool, is_json: bool) -> None:
    """List the adapters of one tenant, or of all."""
    tenants = [tenant] if tenant is not None else _tenants(server)
    found = [adapter for owner in tenants for adapter in _adapters(server, owner, deleted)]
    if is_json:
        print_json(found)
        return
    header = ("MODEL", "STANDS FOR", "ALIASES", "BASE MODEL", "DELETED" if deleted else "CREATED")
    when = "deleted_at" if deleted else "created_at"
    rows = [
        (
            adapter["model"],
            f"@{adapter['default_alias']}",
            " ".join(f"{alias}={number}" for alias, number in adapter["aliases"].items()),
            adapter["base_model"],
            _minute(adapter[when]),
        )
        for adapter in found
    ]
    print_table(header, rows)


@adapters.command(cls=AboutAnAdapter)
@as_json
@as_operator
@about_an_adapter
def show(server: Server, adapter: AdapterName, is_json: bool) -> None:
    """Show an adapter with its aliases and versions, or one version with its certificate."""
    if adapter.version is not None:
        version = server.get(f"{adapter.route}/versions/{number_of(server, adapter)}")
        print_json(version) if is_json else certificate.print_version(version)
        return
    found = server.get(adapter.route)
    aliases = server.get(f"{adapter.route}/aliases")["data"]
    versions = list(_pages(server, f"{adapter.route}/versions"))
    if is_json:
        print_json({**found, "aliases": aliases, "versions": versions})
        return
    click.echo(f"{found['model']}  on {found['base_model']}, stands for @{found['default_alias']}")
    click.echo()
    print_table(("ALIAS", "VERSION", "MOVED"), [_alias_row(alias) for alias in aliases])
    click.echo()
    print_table(certificate.HEADER, [certificate.row(version) for version in versions])


@adapters.command(cls=AboutAnAdapter)
@alias_option
@click.option("--canary", type=click.IntRange(1, 99), help="For so many of a hundred callers.")
@force
@as_operator
@about_an_adapter
@click.argument("version", type=click.IntRange(min=1))
def promote(
    server: Server, adapter: AdapterName, version: int, alias: str, canary: int | None, force: bool
) -> None:
    """Have an alias stand for VERSION: for everybody, or at first for some as a canary."""
    _refuse_version(adapter)
    if canary is None:
        moved = move_alias(server, adapter.route, alias, version=version, is_forced=force)
    else:
        moved = move_canary(
            server, adapter.route, alias, version=version, percent=canary, is_forced=force
        )
    say(f"{adapter.model}@{_meaning(moved)}")


@adapters.command(cls=AboutAnAdapter)
@alias_option
@as_operator
@about_an_adapter
def rollback(server: Server, adapter: AdapterName, alias: str) -> None:
    """Bring back what an alias stood for before its last move; once more goes further back."""
    _refuse_version(adapter)
    moved = server.send("POST", f"{adapter.route}/aliases/{quote(alias, safe='')}/rollback")
    say(f"{adapter.model}@{_meaning(moved)}")


@adapters.command(cls=AboutAnAdapter)
@as_operator
@about_an_adapter
def delete(server: Server, adapter: AdapterName) -> None:
    """Delete an adapter, or the version after an @; it can be restored for some days."""
    server.send("DELETE", _itself(adapter))
    say(
        f"{adapter.model} is deleted; `manylora adapters restore` brings it back until it is purged"
    )


@adapters.command(cls=AboutAnAdapter)
@as_operator
@about_an_adapter
def restore(server: Server, adapter: AdapterName) -> None:
    """Bring a deleted adapter back, or the version after an @."""
    server.send("POST", f"{_itself(adapter)}/restore")
    say(f"{adapter.model} is back")


@adapters.command(cls=AboutAnAdapter)
@click.option(
    "--to",
    type=click.Choice(["host", "device"]),
    default="device",
    show_default=True,
    help="Into host memory, or on into a slot.",
)
@as_operator
@about_an_adapter
def warm(server: Server, adapter: AdapterName, to: str) -> None:
    """Bring a version near before its first request."""
    _print_places(server.send("POST", f"{_version_route(server, adapter)}/warm", {"to": to}))


@adapters.command(cls=AboutAnAdapter)
@as_operator
@about_an_adapter
def pin(server: Server, adapter: AdapterName) -> None:
    """Keep a version in a slot of every engine."""
    _print_places(server.send("POST", f"{_version_route(server, adapter)}/pin"))


@adapters.command(cls=AboutAnAdapter)
@as_operator
@about_an_adapter
def unpin(server: Server, adapter: AdapterName) -> None:
    """Let a pinned version go when others need its place."""
    _print_places(server.send("POST", f"{_version_route(server, adapter)}/unpin"))


def _push(found: LocalFolder, server: Server, to: Destination) -> dict[str, Any]:
    bar = click.progressbar(
        length=found.size_bytes, label=f"pushing {to.tenant}-{to.name}", file=sys.stderr
    )

    def on_progress(sent_bytes: int, total_bytes: int) -> None:
        if sent_bytes == total_bytes:
            bar.label = f"checking {to.tenant}-{to.name}"
        bar.update(sent_bytes - bar.pos)

    def on_pause(trouble: ServerTrouble, wait_s: float) -> None:
        say(f"{trouble} Trying again in {wait_s:.0f} s.")

    try:
        with bar:
            return push_folder(found, server, to, on_progress=on_progress, on_pause=on_pause)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        raise


def _tell_left_out(found: LocalFolder) -> None:
    if found.ignored:
        say(f"left out, as no part of an adapter: {', '.join(found.ignored)}")
    if found.unknown:
        say(f"left out, and NOT KNOWN here: {', '.join(found.unknown)}")


def _tenants(server: Server) -> list[str]:
    return [tenant["tenant"] for tenant in server.get("/admin/v1/tenants")["data"]]


def _adapters(server: Server, tenant: str, is_deleted: bool) -> Iterator[dict[str, Any]]:
    route = f"/admin/v1/tenants/{quote(tenant, safe='')}/adapters"
    return _pages(server, route, deleted="true" if is_deleted else None)


def _pages(server: Server, route: str, **params: Any) -> Iterator[dict[str, Any]]:
    after = None
    while True:
        page = server.get(route, after=after, **params)
        yield from page["data"]
        after = page["next"]
        if after is None:
            return


def _version_route(server: Server, adapter: AdapterName) -> str:
    """A version, by number or alias, the default alias where none was named."""
    named = adapter.version or server.get(adapter.route)["default_alias"]
    return f"{adapter.route}/versions/{quote(named, safe='')}"


def _itself(adapter: AdapterName) -> str:
    """The adapter, or the version that was named by its number."""
    if adapter.version is None:
        return adapter.route
    if not adapter.version.isdigit():
        raise click.UsageError("A version is deleted and restored by its number.")
    return f"{adapter.route}/versions/{adapter.version}"


def _refuse_version(adapter: AdapterName) -> None:
    if adapter.version is not None:
        raise click.UsageError("Name the adapter alone, without @.")


def _meaning(alias: dict[str, Any]) -> str:
    canary = alias["canary"]
    some = f", for {canary['percent']} % version {canary['version']}" if canary else ""
    return f"{alias['alias']} is version {alias['version']}{some}"


def _alias_row(alias: dict[str, Any]) -> tuple[str, str, str]:
    canary = alias["canary"]
    some = f" ({canary['percent']} % get {canary['version']})" if canary else ""
    return alias["alias"], f"{alias['version']}{some}", _minute(alias["moved_at"])


def _minute(moment: str) -> str:
    return moment[:16].replace("T", " ")


def _print_places(residence: dict[str, Any]) -> None:
    say(residence["model"])
    rows = [
        (engine["address"], engine["problem"] or ", ".join(_places(engine)) or "not near")
        for engine in residence["engines"]
    ]
    print_table(("ENGINE", "WHERE"), rows)


def _places(engine: dict[str, Any]) -> Iterator[str]:
    for fact, words in (
        ("is_resident", "in a slot"),
        ("is_hosted", "in host memory"),
        ("is_pinned", "pinned"),
    ):
        if engine[fact]:
            yield words
