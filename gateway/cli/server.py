"""Which server a command speaks to, as whom, and about which adapter; and how its refusals read.

Where a name could be cut in several places, the server is asked, and nothing is guessed.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from adapters.errors import AdapterError, Finding, InvalidAdapter, ServerRefused
from adapters.push import Server, adapter_route

DEFAULT_DATA_DIR = Path(".manylora")
DEFAULT_URL = "http://127.0.0.1:8000"

Command = Callable[..., None]


@dataclass(frozen=True, slots=True)
class AdapterName:
    """An adapter, and the version or alias of it that was named."""

    tenant: str
    adapter: str
    # None where the name had no "@".
    version: str | None = None

    @property
    def route(self) -> str:
        return adapter_route(self.tenant, self.adapter)

    @property
    def model(self) -> str:
        name = f"{self.tenant}-{self.adapter}"
        return name if self.version is None else f"{name}@{self.version}"


def as_operator(command: Command) -> Command:
    """Give a command a `Server` that it asks with the operator's key."""

    @_url
    @click.option(
        "--key",
        envvar="MANYLORA_KEY",
        show_envvar=True,
        help="The operator's. [default: operator.key of --data-dir]",
    )
    @click.option(
        "--data-dir",
        type=click.Path(path_type=Path),
        default=DEFAULT_DATA_DIR,
        show_default=True,
        help="That of the server, where it runs on this host.",
    )
    @functools.wraps(command)
    def asking(*args: Any, url: str, key: str | None, data_dir: Path, **options: Any) -> None:
        with told_plainly(), opened(url, key or _operator_key(data_dir)) as server:
            command(server, *args, **options)

    return asking


def as_tenant(command: Command) -> Command:
    """Give a command a `Server` that it asks with a tenant's key."""

    @_url
    @click.option(
        "--key", envvar="MANYLORA_KEY", show_envvar=True, required=True, help="A tenant's."
    )
    @functools.wraps(command)
    def asking(*args: Any, url: str, key: str, **options: Any) -> None:
        with told_plainly(), opened(url, key) as server:
            command(server, *args, **options)

    return asking


class AboutAnAdapter(click.Command):
    """A command whose first word is an adapter, or is not there beside --name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_spelled_out = any(word.partition("=")[0] == "--name" for word in args)
        return super().parse_args(ctx, ["", *args] if is_spelled_out else args)


def about_an_adapter(command: Command) -> Command:
    """Give a command, after its server, the `AdapterName` that it is about."""

    @click.argument("model", metavar="MODEL")
    @click.option("--tenant", help="With --name, instead of TENANT-NAME.")
    @click.option("--name", help="The adapter's own name, without its tenant's.")
    @functools.wraps(command)
    def knowing(
        server: Server,
        *args: Any,
        model: str,
        tenant: str | None,
        name: str | None,
        **options: Any,
    ) -> None:
        command(server, _named(server, model, tenant, name), *args, **options)

    return knowing


@contextlib.contextmanager
def told_plainly() -> Iterator[None]:
    """Turn what an adapter, a server or a file may be wrong with into words for the user."""
    try:
        yield
    except (ServerRefused, InvalidAdapter) as error:
        lines = [str(error), *map(_finding_lines, error.findings)]
        if isinstance(error, InvalidAdapter):
            # Its own words list them too.
            lines[0] = type(error).__doc__ or ""
        raise click.ClickException("\n".join([*lines, *_advice(error)])) from error
    except (AdapterError, OSError) as error:
        raise click.ClickException(str(error)) from error


@contextlib.contextmanager
def opened(url: str, key: str) -> Iterator[Server]:
    try:
        server = Server(url, key)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with server:
        yield server


def _url(command: Command) -> Command:
    return click.option(
        "--url", envvar="MANYLORA_URL", show_envvar=True, default=DEFAULT_URL, show_default=True
    )(command)


def _operator_key(data_dir: Path) -> str:
    path = data_dir / "operator.key"
    try:
        return path.read_text().strip()
    except OSError as error:
        raise click.UsageError(
            f"There is no key: set MANYLORA_KEY, or give --key, or the server's --data-dir"
            f" ({path}: {error.strerror})."
        ) from error


def number_of(server: Server, adapter: AdapterName) -> int:
    """Of the version that was named; without one, of that for which the bare name stands."""
    named = adapter.version
    if named is None:
        found = server.get(adapter.route)
        number = found["aliases"].get(found["default_alias"])
        if number is None:
            raise click.ClickException(f"{adapter.model} has no version that can be called.")
        return int(number)
    if named.isdecimal():
        return int(named)
    return int(server.get(f"{adapter.route}/aliases/{quote(named, safe='')}")["version"])


def _named(server: Server, model: str, tenant: str | None, name: str | None) -> AdapterName:
    if tenant is not None and name is not None:
        adapter, _, version = name.partition("@")
        return AdapterName(tenant, adapter, version or None)
    if tenant is not None or name is not None:
        raise click.UsageError("Name the adapter: TENANT-NAME, or --tenant TENANT --name NAME.")
    public_name, _, version = model.partition("@")
    owners = _owners(server, public_name)
    if len(owners) == 1:
        return AdapterName(*owners[0], version or None)
    fix = "say which with --tenant and --name"
    if not owners:
        raise click.UsageError(f"{public_name!r} begins with no tenant's name: {fix}.")
    choice = ", or ".join(f"--tenant {owner} --name {rest}" for owner, rest in owners)
    raise click.UsageError(f"{public_name!r} could be an adapter of several: {choice}.")


def _owners(server: Server, public_name: str) -> list[tuple[str, str]]:
    """Every tenant that the name could begin with, and the rest of the name."""
    ends = [place for place, character in enumerate(public_name) if character == "-" and place]
    cuts = [(public_name[:end], public_name[end + 1 :]) for end in ends if public_name[end + 1 :]]
    return [
        (tenant, rest)
        for tenant, rest in cuts
        if server.find(f"/admin/v1/tenants/{quote(tenant, safe='')}") is not None
    ]


def _finding_lines(finding: Finding) -> str:
    return f"  {finding.where}: {finding.message} ({finding.code})\n      fix: {finding.fix}"


def _advice(error: Exception) -> list[str]:
    match getattr(error, "status", None):
        case 401:
            return ["Is this the key of that server? Set MANYLORA_KEY, or give --key."]
        case 403:
            return ["This key may not do that; is it an operator's, where one is needed?"]
    return []
