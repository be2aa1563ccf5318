"""Facts about --lora-modules: how they are spelled, whose they become, and that twice is once."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.children import CannotServe
from gateway.cli.serve import _spread
from gateway.database import Database
from gateway.lora_modules import LoraModule, parse, register
from tests.gateway.admin_plane import INFO, Plane, adapter_files, admin_plane


@pytest.fixture
async def plane(database: Database, tmp_path: Path) -> AsyncIterator[Plane]:
    async with admin_plane(database, tmp_path) as plane:
        await plane.make_tenant("acme")
        yield plane


def save(folder: Path, *, seed: int = 0) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in adapter_files(seed=seed).items():
        (folder / name).write_bytes(data)
    return str(folder)


async def start(plane: Plane, *modules: LoraModule) -> list[str]:
    """What the operator is told."""
    said: list[str] = []
    key = plane.client.headers["authorization"].removeprefix("Bearer ")
    url = str(plane.client.base_url).rstrip("/")
    await register(url, modules, admin_key=key, data_dir=plane.folder, say=said.append)
    return said


def test_both_spellings_name_a_folder() -> None:
    assert parse("sql=/a=b") == LoraModule("sql", "/a=b")
    assert parse('{"name": "sql", "path": "/a"}') == LoraModule("sql", "/a")


@pytest.mark.parametrize("word", ["sql", "=a", "sql=", '{"name": "sql"}', '{"nam": 1}', "{"])
def test_what_is_neither_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"sql|=a|nam|\{"):
        parse(word)


def test_one_flag_takes_all_words_up_to_the_next() -> None:
    words = ["--model", "m", "--lora-modules", "a=x", "b=y", "--port", "1", "--lora-modules", "c=z"]
    spread = [word for part in _spread(words, "--lora-modules") for word in part]
    expected = ["a=x", "--lora-modules", "b=y", "--port", "1", "--lora-modules", "c=z"]
    assert spread == ["--model", "m", "--lora-modules", *expected]


async def test_a_name_goes_to_its_tenant_or_to_the_default_one(
    plane: Plane, tmp_path: Path
) -> None:
    path = save(tmp_path / "sql")
    modules = [
        LoraModule("acme-sql", path),
        LoraModule("sql-lora", path, base_model_name=INFO.base_model),
    ]
    assert await start(plane, *modules) == [
        "lora-modules: acme-sql is served as acme-sql@1",
        f"lora-modules: the key of the tenant default is in {plane.folder / 'default.key'}",
        "lora-modules: sql-lora is served as default-sql-lora@1",
    ]
    assert (plane.folder / "default.key").stat().st_mode & 0o777 == 0o600
    key = (plane.folder / "default.key").read_text()
    assert key.startswith("ml_")
    assert await start(plane, *modules) == [
        "lora-modules: acme-sql is served as acme-sql@1",
        "lora-modules: sql-lora is served as default-sql-lora@1",
    ]
    assert (plane.folder / "default.key").read_text() == key


async def test_what_an_operator_deleted_is_left_out(plane: Plane, tmp_path: Path) -> None:
    module = LoraModule("acme-sql", save(tmp_path / "sql"))
    await start(plane, module)
    await plane.client.delete("/admin/v1/tenants/acme/adapters/sql")
    (said,) = await start(plane, module)
    assert "acme-sql is left out" in said
    assert "deleted" in said


async def test_what_is_no_adapter_stops_the_start_and_says_why(
    plane: Plane, tmp_path: Path
) -> None:
    with pytest.raises(CannotServe, match=r"acme-sql: .*No such file"):
        await start(plane, LoraModule("acme-sql", str(tmp_path / "nowhere")))
    path = save(tmp_path / "sql")
    (Path(path) / "adapter_config.json").write_text("{}")
    with pytest.raises(CannotServe, match="findings"):
        await start(plane, LoraModule("acme-sql", path))
    with pytest.raises(CannotServe, match="1 to 32 of the characters"):
        await start(plane, LoraModule("SQL_lora", path))
    await plane.make_tenant("acme-eu")
    with pytest.raises(CannotServe, match=r"several tenants \(acme, acme-eu\)"):
        await start(plane, LoraModule("acme-eu-sql", path))
