"""Facts about pushing a folder: what arrived is not sent again, and every no has its reasons."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from adapters import push as pushing
from adapters.errors import InvalidAdapter, ServerRefused, ServerTrouble, ServerUnreachable
from adapters.push import Destination, LocalFolder, Server, move_alias, push
from gateway.database import Database
from tests.gateway.admin_plane import Plane, adapter_files, admin_plane
from tests.gateway.command import write

TO = Destination("acme", "sql")
RANGE_BYTES = 500


@pytest.fixture
async def plane(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Plane]:
    monkeypatch.setattr(pushing, "RANGE_BYTES", RANGE_BYTES)
    monkeypatch.setattr(pushing, "WAITS_S", (0.0, 0.0))
    async with admin_plane(database, tmp_path) as plane:
        await plane.make_tenant("acme")
        yield plane


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "sql", adapter_files())


def server_of(plane: Plane) -> Server:
    key = plane.client.headers["authorization"].removeprefix("Bearer ")
    return Server(str(plane.client.base_url), key)


async def pushed(plane: Plane, folder: Path, **options: Any) -> dict[str, Any]:
    def work() -> dict[str, Any]:
        with server_of(plane) as server:
            return push(
                LocalFolder.read(folder),
                server,
                TO,
                state_folder=plane.folder / "state",
                **options,
            )

    return await asyncio.to_thread(work)


def remembered(plane: Plane) -> int:
    state = plane.folder / "state"
    return len(list(state.iterdir())) if state.exists() else 0


def stopping_after(num_bytes: int) -> Callable[[int, int], None]:
    def on_progress(sent_bytes: int, total_bytes: int) -> None:
        if sent_bytes > num_bytes:
            raise KeyboardInterrupt

    return on_progress


async def test_a_folder_becomes_the_version_that_an_upload_in_one_request_makes(
    plane: Plane, folder: Path
) -> None:
    seen: list[tuple[int, int]] = []
    version = await pushed(plane, folder, on_progress=lambda *so_far: seen.append(so_far))
    total = sum(len(data) for data in adapter_files().values())
    assert (seen[0], seen[-1]) == ((0, total), (total, total))
    assert (version["pinned_model"], version["state"]) == ("acme-sql@1", "ready")
    again = (await plane.upload()).json()
    assert again["version_digest"] == version["version_digest"]
    assert remembered(plane) == 0


async def test_a_push_that_was_stopped_goes_on_where_it_was(plane: Plane, folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        await pushed(plane, folder, on_progress=stopping_after(1600))
    assert remembered(plane) == 1
    seen: list[int] = []
    version = await pushed(plane, folder, on_progress=lambda sent, _: seen.append(sent))
    assert version["pinned_model"] == "acme-sql@1"
    assert seen[0] >= 1600 - RANGE_BYTES
    assert seen == sorted(seen)
    assert remembered(plane) == 0


async def test_a_folder_that_changed_meanwhile_begins_anew(plane: Plane, folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        await pushed(plane, folder, on_progress=stopping_after(1600))
    write(folder, adapter_files(seed=1))
    seen: list[int] = []
    await pushed(plane, folder, on_progress=lambda sent, _: seen.append(sent))
    assert seen[0] == 0


async def test_an_upload_that_the_server_forgot_begins_anew(plane: Plane, folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        await pushed(plane, folder, on_progress=stopping_after(1600))
    state = next((plane.folder / "state").iterdir())
    answer = await plane.client.delete(f"{TO.route}/uploads/{state.read_text()}")
    assert answer.is_success
    assert (await pushed(plane, folder))["pinned_model"] == "acme-sql@1"


async def test_a_server_that_cannot_now_is_asked_again(plane: Plane, folder: Path) -> None:
    # A file where the store keeps folders: no piece can be written.
    blocker = plane.folder / "store" / "uploads"
    blocker.touch()
    pauses: list[ServerTrouble] = []

    def on_pause(trouble: ServerTrouble, wait_s: float) -> None:
        pauses.append(trouble)
        blocker.unlink(missing_ok=True)

    version = await pushed(plane, folder, on_pause=on_pause)
    assert version["pinned_model"] == "acme-sql@1"
    assert [str(pause) for pause in pauses] == [
        "The artifact store does not answer now; try again shortly."
    ]


async def test_two_pushes_of_one_folder_at_once_make_one_version(
    plane: Plane, folder: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        await pushed(plane, folder, on_progress=stopping_after(0))
    versions = await asyncio.gather(*(pushed(plane, folder) for _ in range(3)))
    assert {version["pinned_model"] for version in versions} == {"acme-sql@1"}


async def test_what_is_wrong_with_an_adapter_is_told_and_not_asked_again(
    plane: Plane, folder: Path
) -> None:
    write(folder, adapter_files(lora_dropout=0.0, alora_invocation_tokens=[1]))
    with pytest.raises(ServerRefused) as refusal:
        await pushed(plane, folder)
    assert refusal.value.status == 422
    assert [finding.where for finding in refusal.value.findings] == ["alora_invocation_tokens"]
    assert remembered(plane) == 0


async def test_nobody_there_is_told_after_the_last_wait() -> None:
    with Server("http://127.0.0.1:1", "key") as server, pytest.raises(ServerUnreachable) as error:
        server.get("/admin/v1/tenants")
    assert "http://127.0.0.1:1 does not answer" in str(error.value)


def test_a_folder_without_an_adapter_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    write(tmp_path, {"adapter_model.bin": b"x"})
    with pytest.raises(InvalidAdapter) as error:
        LocalFolder.read(tmp_path)
    assert [finding.where for finding in error.value.findings] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_what_is_sent_is_what_is_known_and_the_rest_is_named(folder: Path) -> None:
    write(folder, {"README.md": b"#", "notes.txt": b"x", "tokenizer_config.json": b"{}"})
    (folder / "checkpoint-1").mkdir()
    found = LocalFolder.read(folder)
    assert sorted(found.files) == [*sorted(adapter_files()), "tokenizer_config.json"]
    assert (found.ignored, found.unknown) == (["README.md", "checkpoint-1/"], ["notes.txt"])


@pytest.mark.parametrize("url", ["acme.example", "ftp://acme.example", "http://", "http://a:b"])
def test_what_is_no_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="is no URL"):
        Server(url, "key")


@pytest.mark.parametrize("key", ["", "k\u00e9y", "two\nlines"])
def test_what_is_no_key_is_refused_at_once(key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        Server("http://127.0.0.1:8000", key)


async def test_an_alias_that_is_there_already_does_not_move(plane: Plane, folder: Path) -> None:
    await pushed(plane, folder)

    def move() -> Any:
        with server_of(plane) as server:
            return move_alias(server, TO.route, "prod", version=1)

    first, second = await asyncio.to_thread(move), await asyncio.to_thread(move)
    assert first == second
