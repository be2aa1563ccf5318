"""Facts about `manylora adapters pull`: bit for bit what was pushed, whole or not at all."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.database import Database
from tests.gateway.admin_plane import adapter_files, admin_plane
from tests.gateway.command import Command, write


@pytest.fixture
async def command(database: Database, tmp_path: Path) -> AsyncIterator[Command]:
    async with admin_plane(database, tmp_path) as plane:
        await plane.make_tenant("acme")
        for seed in range(2):
            answer = await plane.upload(adapter_files(seed=seed))
            assert answer.status_code == 201, answer.text
        yield Command(plane, tmp_path / "home")


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_with(word: str, folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if word in path.name]


async def test_what_is_pulled_is_what_was_uploaded(command: Command, tmp_path: Path) -> None:
    await command.done("pull", "acme-sql", tmp_path / "newest")
    assert read(tmp_path / "newest") == adapter_files(seed=1)
    await command.done("pull", "acme-sql@1", tmp_path / "below" / "first")
    assert read(tmp_path / "below" / "first") == adapter_files(seed=0)
    await command.done("promote", "acme-sql", "1", "--alias", "prod")
    (tmp_path / "empty").mkdir()
    await command.done("pull", "--tenant", "acme", "--name", "sql@prod", tmp_path / "empty")
    assert read(tmp_path / "empty") == adapter_files(seed=0)


async def test_a_folder_that_has_something_is_left_alone(command: Command, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", {"notes.txt": b"x"})
    result = await command.adapters("pull", "acme-sql", folder)
    assert (result.exit_code, "not an empty folder" in result.stderr) == (1, True)
    assert read(folder) == {"notes.txt": b"x"}


async def test_bytes_that_are_not_the_ones_that_were_uploaded_leave_nothing(
    command: Command, tmp_path: Path
) -> None:
    for path in (command.plane.folder / "store").rglob("adapter_model.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    result = await command.adapters("pull", "acme-sql", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert names_with("out", tmp_path) == []
