"""`manylora adapters pull`: a version's files, as they were uploaded, in a folder of their own."""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import httpx

from adapters.errors import DigestMismatch
from adapters.push import Server
from gateway.cli.printing import say
from gateway.cli.server import AboutAnAdapter, AdapterName, about_an_adapter, as_operator, number_of


@click.command(cls=AboutAnAdapter)
@as_operator
@about_an_adapter
@click.argument("folder", type=click.Path(path_type=Path))
def pull(server: Server, adapter: AdapterName, folder: Path) -> None:
    """Download a version into FOLDER, which must be empty or not there.

    Every file is compared with its SHA-256. The folder appears whole, or not at all.
    """
    number = number_of(server, adapter)
    route = f"{adapter.route}/versions/{number}/files"
    files = server.get(route)["data"]
    with _appearing(folder) as scratch:
        for file in files:
            _pull_file(server, route, file, scratch)
    say(f"{adapter.tenant}-{adapter.adapter}@{number}: {len(files)} files in {folder}")


def _pull_file(server: Server, route: str, file: dict[str, Any], into: Path) -> None:
    name: str = file["name"]
    if Path(name).name != name:
        raise click.ClickException(f"The server names a file {name!r}, which is no file's name.")
    with server.stream("GET", f"{route}/{quote(name, safe='')}") as answer:
        digest = _write(answer, into / name)
    if digest != file["sha256"]:
        raise DigestMismatch(file["sha256"], found=digest)


def _write(answer: httpx.Response, path: Path) -> str:
    """Return the SHA-256 of what was written."""
    checksum = hashlib.sha256()
    with path.open("xb") as file:
        for chunk in answer.iter_bytes():
            checksum.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return checksum.hexdigest()


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder beside this one that takes its place at the end. Raises OSError."""
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise click.ClickException(f"{folder} is there already, and not an empty folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    scratch.mkdir()
    try:
        yield scratch
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
