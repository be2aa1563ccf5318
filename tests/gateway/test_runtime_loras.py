"""Facts about vLLM's routes: what they load, from where alone, and that nothing is lost by them."""

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.protocol import ProbeReport
from gateway.database import Database
from gateway.errors import NotAllowed, NotFound
from gateway.lora_folder import LoraFolder
from tests.gateway.admin_plane import (
    MAX_UPLOAD_BYTES,
    Plane,
    adapter_files,
    admin_plane,
    report,
)

ADDED = "Success: LoRA adapter 'acme-sql' added successfully."
REMOVED = "Success: LoRA adapter 'acme-sql' removed successfully."


@pytest.fixture
def opened(tmp_path: Path) -> Path:
    """The folder that the operator has opened, with one adapter below it."""
    return save(tmp_path / "opened" / "runs" / "sql").parents[1]


def save(folder: Path, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    for name, data in adapter_files(**settings).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
async def plane(database: Database, tmp_path: Path, opened: Path) -> AsyncIterator[Plane]:
    async with admin_plane(database, tmp_path, lora_folder=opened) as plane:
        await plane.make_tenant("acme")
        yield plane


async def load(
    plane: Plane, path: str | Path = "runs/sql", name: str = "acme-sql", **fields: Any
) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path), **fields}
    return await plane.client.post("/v1/load_lora_adapter", json=body)


async def unload(plane: Plane, name: str = "acme-sql") -> httpx.Response:
    return await plane.client.post("/v1/unload_lora_adapter", json={"lora_name": name})


async def numbers(plane: Plane, adapter: str = "sql") -> list[int]:
    answer = await plane.client.get(f"/admin/v1/tenants/acme/adapters/{adapter}/versions")
    return [version["number"] for version in answer.json().get("data", [])]


def problem(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message: str = error["message"]
    return message


async def test_an_adapter_is_loaded_by_a_relative_or_an_absolute_path(
    plane: Plane, opened: Path
) -> None:
    answer = await load(plane)
    assert (answer.status_code, answer.text) == (200, ADDED)
    assert answer.headers["content-type"].startswith("text/plain")
    assert (await load(plane, opened / "runs" / "sql", "acme-other")).status_code == 200
    assert await numbers(plane) == await numbers(plane, "other") == [1]
    assert len(plane.probe.asked_for) == 2
    assert plane.staged_files() == []


async def test_a_name_is_loaded_again_only_in_place(plane: Plane, opened: Path) -> None:
    await load(plane)
    assert "has already been loaded" in problem(await load(plane), 400)
    save(opened / "runs" / "better", seed=1)
    assert (await load(plane, "runs/better", load_inplace=True)).text == ADDED
    assert (await load(plane, "runs/better", load_inplace=True)).text == ADDED
    assert await numbers(plane) == [2, 1]
    told = problem(await load(plane, "runs/sql", load_inplace=True), 400)
    assert "as version 1" in told
    assert "stands for version 2" in told


async def test_an_unloaded_name_is_gone_until_it_is_loaded_again(
    plane: Plane, opened: Path
) -> None:
    await load(plane)
    assert (await unload(plane)).text == REMOVED
    assert problem(await unload(plane), 404) == "The lora adapter 'acme-sql' cannot be found."
    assert (await plane.client.get("/admin/v1/tenants/acme/adapters")).json()["data"] == []
    (opened / "runs" / "sql" / "adapter_config.json").rename(opened / "elsewhere.json")
    assert "adapter_config.json" in problem(await load(plane), 404)
    assert (await plane.client.get("/admin/v1/tenants/acme/adapters")).json()["data"] == []
    (opened / "elsewhere.json").rename(opened / "runs" / "sql" / "adapter_config.json")
    assert (await load(plane)).text == ADDED
    assert await numbers(plane) == [1]


NO_NAMES: list[str] = ["sql", "globex-sql", "acme-", "acme", "ACME-sql", "acme-\0", ""]


async def test_a_name_without_a_tenant_is_refused(plane: Plane, subtests: pytest.Subtests) -> None:
    for name in NO_NAMES:
        with subtests.test(f"{name}"):
            assert "lora_name" in problem(await load(plane, name=name), 400)
            assert "cannot be found" in problem(await unload(plane, name), 404)


async def test_a_name_that_could_be_two_tenants_is_refused_unless_it_is_ones_already(
    plane: Plane,
) -> None:
    await plane.make_tenant("acme-eu")
    assert "(acme, acme-eu)" in problem(await load(plane, name="acme-eu-sql"), 400)
    assert (await plane.upload(tenant="acme-eu", adapter="sql")).status_code == 201
    assert (await load(plane, name="acme-eu-sql", load_inplace=True)).status_code == 200


async def test_an_adapter_that_is_refused_says_everything_that_is_wrong(
    plane: Plane, opened: Path
) -> None:
    save(opened / "large", rank=9, target_modules=["q_proj", "v_proj", "nowhere"])
    told = problem(await load(plane, "large"), 400)
    assert "rank" in told

    async def failing_probe(digest: str) -> ProbeReport:
        return report(digest, is_passed=False)

    plane.probe.answer = failing_probe
    assert "probe_failed" in problem(await load(plane), 400)
    assert (await unload(plane)).status_code == 200


async def test_nothing_outside_the_opened_folder_is_read(
    plane: Plane, opened: Path, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    secret = save(tmp_path / "secret")
    (opened / "link").symlink_to(secret)
    (opened / "up").symlink_to("..")
    files = opened / "files"
    files.mkdir()
    for file in secret.iterdir():
        (files / file.name).symlink_to(file)
    for path in ("../secret", str(secret), "link", "up/secret", "runs/../../secret", "files", "/"):
        with subtests.test(path):
            assert "--lora-folder" in problem(await load(plane, path), 403)
    for path in ("nowhere", "runs", "runs/sql/adapter_config.json", "a\0b"):
        with subtests.test(path):
            problem(await load(plane, path), 404)
    assert plane.stored_files() == plane.staged_files() == []


async def test_links_that_stay_below_are_followed(plane: Plane, opened: Path) -> None:
    (opened / "latest").symlink_to("runs/sql")
    assert (await load(plane, "latest")).text == ADDED


def test_a_link_that_is_put_in_the_way_meanwhile_is_not_followed(
    opened: Path, tmp_path: Path
) -> None:
    secret = save(tmp_path / "secret")
    lora = LoraFolder(opened, "runs/sql")
    path = lora._below(opened / "runs" / "sql" / "adapter_config.json")
    (opened / "runs" / "sql").rename(opened / "runs" / "old")
    (opened / "runs" / "sql").symlink_to(secret)
    with pytest.raises(NotFound), lora._opened(path):
        pass
    with pytest.raises(NotAllowed):
        lora.copy_to(tmp_path, max_bytes=MAX_UPLOAD_BYTES)


async def test_what_is_no_file_or_too_large_is_refused(plane: Plane, opened: Path) -> None:
    weights = opened / "runs" / "sql" / "adapter_model.safetensors"
    with weights.open("ab") as file:
        file.truncate(MAX_UPLOAD_BYTES + 1)
    assert "limit" in problem(await load(plane), 413)
    weights.unlink()
    os.mkfifo(weights)
    assert "is no file" in problem(await load(plane), 400)
    assert plane.staged_files() == []


async def test_only_operators_load_and_unload(plane: Plane) -> None:
    key = (await plane.make_key("acme"))["key"]
    plane.client.headers["authorization"] = f"Bearer {key}"
    problem(await load(plane), 403)
    problem(await unload(plane), 403)


async def test_without_an_opened_folder_nothing_is_loaded_by_path(
    database: Database, tmp_path: Path, opened: Path
) -> None:
    async with admin_plane(database, tmp_path) as plane:
        await plane.make_tenant("acme")
        assert "--lora-folder" in problem(await load(plane, opened / "runs" / "sql"), 403)
