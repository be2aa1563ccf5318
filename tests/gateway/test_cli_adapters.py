"""Facts about `manylora adapters`: each command does what it says, or says why it does not."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from engine.protocol import ProbeReport
from gateway.base_models import BaseModels
from gateway.cli import main
from gateway.database import Database
from gateway.routing import Replica, Router
from tests.engine.echo_engine import engine, link, short_folder
from tests.gateway.admin_plane import adapter_files, admin_plane, passing_probe, until
from tests.gateway.command import Command, write

NAMED = ("--tenant", "acme", "--name", "sql")


@pytest.fixture
async def command(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Command]:
    # Where the tests run, a server may have left its operator's key.
    monkeypatch.chdir(tmp_path)
    async with admin_plane(database, tmp_path) as plane:
        await plane.make_tenant("acme")
        yield Command(plane, tmp_path / "home")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "sql", adapter_files())


async def publish(command: Command, number: int, *, adapter: str = "sql") -> None:
    for seed in range(number):
        answer = await command.plane.upload(adapter_files(seed=seed), adapter=adapter)
        assert answer.status_code == 201, answer.text


async def test_push_uploads_moves_the_alias_and_names_what_it_left_out(
    command: Command, folder: Path
) -> None:
    write(folder, {"README.md": b"#", "notes.txt": b"x"})
    result = await command.adapters("push", folder, *NAMED, "--alias", "prod")
    assert result.exit_code == 0, result.output
    assert result.stdout == "acme-sql@1\n"
    assert "left out, as no part of an adapter: README.md" in result.stderr
    assert "NOT KNOWN here: notes.txt" in result.stderr
    (shown,) = await command.json("list", "--tenant", "acme")
    assert shown["aliases"] == {"latest": 1, "prod": 1}
    assert command.remembered() == []


async def test_push_lists_everything_that_is_wrong(command: Command, folder: Path) -> None:
    write(folder, adapter_files(rank=64, alora_invocation_tokens=[1]))
    result = await command.adapters("push", folder, *NAMED)
    assert result.exit_code == 1
    for words in ("alora_invocation_tokens", "rank", "fix:"):
        assert words in result.stderr
    assert "Traceback" not in result.output
    empty = await command.adapters("push", folder.parent / "nowhere", *NAMED)
    assert empty.exit_code == 2
    (folder / "adapter_model.safetensors").unlink()
    result = await command.adapters("push", folder, *NAMED)
    assert result.exit_code == 1
    assert "adapter_model.safetensors" in result.stderr


async def test_a_push_that_ctrl_c_stopped_sends_nothing_again(
    command: Command, folder: Path
) -> None:
    """The first is stopped in its probe, when all has arrived and it is not yet a version."""
    can_go_on = asyncio.Event()

    async def slow_probe(digest: str) -> ProbeReport:
        await can_go_on.wait()
        return await passing_probe(digest)

    command.plane.probe.answer = slow_probe
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway.cli", "adapters", "push", str(folder), *NAMED),
        env={**os.environ, **command.environment},
        stderr=asyncio.subprocess.PIPE,
    )
    await until(lambda: bool(command.plane.probe.asked_for))
    process.send_signal(signal.SIGINT)
    _, said = await process.communicate()
    assert process.returncode == 1
    assert "the same command goes on from here" in said.decode()
    assert len(command.remembered()) == 1
    can_go_on.set()
    assert "acme-sql@1" in await command.done("push", folder, *NAMED)
    assert command.remembered() == []


async def test_list_shows_all_tenants_and_the_deleted_apart(command: Command) -> None:
    await command.plane.make_tenant("globex")
    await publish(command, 1)
    await command.plane.upload(tenant="globex", adapter="pirate")
    out = await command.done("list")
    assert "acme-sql " in out
    assert "globex-pirate " in out
    await command.done("delete", "acme-sql")
    assert "acme-sql" not in await command.done("list")
    assert "acme-sql" in await command.done("list", "--deleted", "--tenant", "acme")
    assert "is back" in await command.done("restore", "acme-sql")
    assert "acme-sql" in await command.done("list")


async def test_show_tells_versions_aliases_canary_and_certificate(command: Command) -> None:
    await publish(command, 2)
    await command.done("promote", "acme-sql", "1", "--alias", "prod")
    await command.done("promote", "acme-sql", "2", "--alias", "prod", "--canary", "10")
    out = await command.done("show", "acme-sql")
    assert "1 (10 % get 2)" in out
    assert "stands for @latest" in out
    assert out.count("ready") == 2
    for name in ("acme-sql@2", "acme-sql@latest"):
        one = await command.done("show", name)
        assert "largest relative error 1.0e-07 (bound 1.0e-04)" in one
    shown = await command.json("show", "acme-sql")
    assert [version["number"] for version in shown["versions"]] == [2, 1]
    assert (await command.json("show", "acme-sql@prod"))["number"] == 1


async def test_promote_and_rollback_move_an_alias_there_and_back(command: Command) -> None:
    await publish(command, 2)
    assert "prod is version 1" in await command.done("promote", "acme-sql", "1", "--alias", "prod")
    out = await command.done("promote", "acme-sql", "2", "--alias", "prod", "--canary", "10")
    assert "prod is version 1, for 10 % version 2" in out
    assert "prod is version 2" in await command.done("promote", *NAMED, "2", "--alias", "prod")
    assert "prod is version 1, for" in await command.done("rollback", "acme-sql", "--alias", "prod")
    assert "prod is version 1\n" in await command.done("rollback", *NAMED, "--alias", "prod")
    result = await command.adapters("promote", "acme-sql", "9", "--alias", "prod")
    assert (result.exit_code, "has no version 9" in result.stderr) == (1, True)
    result = await command.adapters("promote", "acme-sql", "2", "--alias", "new", "--canary", "5")
    assert (result.exit_code, "no alias 'new'" in result.stderr) == (1, True), result.output


async def test_delete_and_restore_take_one_version_too(command: Command) -> None:
    await publish(command, 2)
    await command.done("delete", "acme-sql@2")
    assert [v["number"] for v in (await command.json("show", "acme-sql"))["versions"]] == [1]
    await command.done("restore", *NAMED[:3], "sql@2")
    assert len((await command.json("show", "acme-sql"))["versions"]) == 2
    result = await command.adapters("delete", "acme-sql@latest")
    assert (result.exit_code, "by its number" in result.stderr) == (2, True)


async def test_a_name_that_could_be_of_several_tenants_is_not_guessed(command: Command) -> None:
    await publish(command, 1, adapter="de-sql")
    assert "acme-de-sql" in await command.done("show", "acme-de-sql")
    await command.plane.make_tenant("acme-de")
    result = await command.adapters("show", "acme-de-sql")
    assert result.exit_code == 2
    assert "--tenant acme --name de-sql, or --tenant acme-de --name sql" in result.stderr
    assert "acme-de-sql" in await command.done("show", "--tenant", "acme", "--name", "de-sql")
    result = await command.adapters("show", "nobody-sql")
    assert (result.exit_code, "begins with no tenant's name" in result.stderr) == (2, True)


WRONG: dict[str, tuple[dict[str, str | None], int, str]] = {
    "nobody there": ({"MANYLORA_URL": "http://127.0.0.1:1"}, 1, "does not answer"),
    "no address": ({"MANYLORA_URL": "127.0.0.1"}, 2, "is no URL"),
    "a wrong key": ({"MANYLORA_KEY": "ml-wrong"}, 1, "Is this the key of that server?"),
    "no key": ({"MANYLORA_KEY": None}, 2, "There is no key: set MANYLORA_KEY"),
}


async def test_a_server_that_cannot_be_asked_is_told_in_words(
    command: Command, subtests: pytest.Subtests
) -> None:
    key = (await command.plane.make_key("acme"))["key"]
    wrong = {**WRONG, "a tenant's key": ({"MANYLORA_KEY": key}, 1, "is it an operator's")}
    for what, (environment, status, words) in wrong.items():
        with subtests.test(what):
            result = await command.adapters("list", **environment)
            assert (result.exit_code, words in result.stderr) == (status, True), result.output
            assert "Traceback" not in result.output


async def test_the_key_of_a_server_on_this_host_is_found(command: Command, tmp_path: Path) -> None:
    key = command.environment["MANYLORA_KEY"]
    write(tmp_path / "data", {"operator.key": f"{key}\n".encode()})
    result = await command.adapters("list", "--data-dir", tmp_path / "data", MANYLORA_KEY=None)
    assert result.exit_code == 0, result.output


@pytest.fixture
async def town(database: Database, tmp_path: Path) -> AsyncIterator[Command]:
    """A plane with an engine whose slots adapters can be brought into."""
    router = Router()
    async with (
        short_folder() as short,
        engine(short / "engine.sock") as echo,
        link(echo.address) as worker,
        admin_plane(database, tmp_path, router=router) as plane,
    ):
        (entry,) = await BaseModels(database).entries()
        router.attach(Replica(worker, entry.base_model.id, entry.base_model.name))
        await plane.make_tenant("acme")
        yield Command(plane, tmp_path / "home")


async def test_warm_and_pin_say_where_a_version_is_now(town: Command) -> None:
    await publish(town, 1)
    assert "in host memory" in await town.done("warm", "acme-sql", "--to", "host")
    assert "in a slot" in await town.done("warm", "acme-sql@1")
    assert "pinned" in await town.done("pin", "acme-sql@latest")
    assert "pinned" not in await town.done("unpin", *NAMED)


def test_every_command_explains_itself(subtests: pytest.Subtests) -> None:
    def visit(group: Any, words: tuple[str, ...]) -> None:
        for name, found in group.commands.items():
            with subtests.test(" ".join([*words, name])):
                result = CliRunner().invoke(main, [*words, name, "--help"])
                assert (result.exit_code, bool(found.help)) == (0, True)
            if hasattr(found, "commands"):
                visit(found, (*words, name))

    visit(main, ())
