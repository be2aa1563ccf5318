"""Facts about fsck: what it finds, what it repairs, and what it leaves alone."""

import asyncio
import datetime
import shutil
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text

from adapters.store import ArtifactStore
from gateway.auth import Principal
from gateway.database import Database, migrate
from gateway.errors import Unavailable
from gateway.fsck import Fsck, Report
from gateway.supervisor import Secrets
from tests.conftest import Cluster, Home
from tests.gateway.admin_plane import Plane, adapter_files, admin_plane
from tests.gateway.test_resumable import WEIGHTS, declare, put

NONE = datetime.timedelta(0)
DAY = datetime.timedelta(days=1)


@pytest.fixture
async def plane(database: Database, tmp_path: Path) -> AsyncIterator[Plane]:
    async with admin_plane(database, tmp_path) as plane:
        await plane.make_tenant("acme")
        yield plane


async def fsck(
    plane: Plane,
    *,
    grace: datetime.timedelta = NONE,
    is_deep: bool = False,
    must_repair: bool = False,
) -> Report:
    compare = Fsck(plane.database, plane.store, grace=grace)
    return await compare.run(is_deep=is_deep, must_repair=must_repair)


def found(report: Report) -> list[str]:
    # The base model's bundle is in no store here.
    return sorted(problem.kind for problem in report.problems)


def folder_of(plane: Plane, digest: str) -> Path:
    return plane.folder / "store" / "adapters" / digest[:2] / digest


async def uploaded(plane: Plane, seed: int = 0) -> str:
    answer = await plane.upload(adapter_files(seed=seed))
    assert answer.status_code == 201, answer.text
    return str(answer.json()["weights_digest"])


async def test_a_sound_installation_has_no_findings(plane: Plane) -> None:
    await uploaded(plane)
    upload = await declare(plane, adapter_files(seed=1))
    await put(plane, upload, WEIGHTS, adapter_files(seed=1)[WEIGHTS])
    report = await fsck(plane, is_deep=True, must_repair=True)
    assert (found(report), report.num_adapters, report.num_versions) == ([], 1, 1)
    assert report.is_sound
    assert any(path.startswith("uploads/") for path in plane.stored_files())


async def test_bytes_that_no_row_names_are_removed_when_they_are_old_enough(plane: Plane) -> None:
    digest = await uploaded(plane)
    orphan = folder_of(plane, "f" * 64)
    shutil.copytree(folder_of(plane, digest), orphan)
    assert found(await fsck(plane, grace=DAY)) == []
    report = await fsck(plane)
    assert (found(report), report.is_sound) == (["orphan_adapter"], False)
    assert (await fsck(plane, must_repair=True)).is_sound
    assert not (orphan / "adapter_config.json").exists()
    assert await plane.store.has_adapter(digest)
    assert found(await fsck(plane)) == []


async def test_a_version_without_bytes_is_marked_and_answers_503_until_it_is_uploaded_again(
    plane: Plane,
) -> None:
    digest = await uploaded(plane)
    shutil.rmtree(folder_of(plane, digest))
    report = await fsck(plane)
    assert (found(report), report.is_sound) == (["missing"], False)
    assert (await fsck(plane, must_repair=True)).is_sound
    with pytest.raises(Unavailable, match="missing from the artifact store"):
        await plane.registry.resolve(await principal(plane), "acme-sql")
    again = await plane.upload(adapter_files())
    assert (again.status_code, again.json()["state"], again.json()["number"]) == (200, "ready", 1)
    assert (await plane.registry.resolve(await principal(plane), "acme-sql")).version_number == 1
    assert found(await fsck(plane, is_deep=True)) == []


async def test_damaged_bytes_are_found_by_reading_them(plane: Plane) -> None:
    digest = await uploaded(plane)
    path = folder_of(plane, digest) / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert found(await fsck(plane)) == []
    assert found(await fsck(plane, is_deep=True)) == ["damaged"]
    assert (await fsck(plane, is_deep=True, must_repair=True)).is_sound
    assert (await plane.upload(adapter_files())).json()["state"] == "ready"
    assert found(await fsck(plane, is_deep=True)) == []


async def test_what_killed_writers_left_is_removed(plane: Plane) -> None:
    digest = await uploaded(plane)
    scrap = folder_of(plane, digest) / f"{WEIGHTS}#1"
    scrap.write_bytes(b"half")
    await plane.store.put_part(uuid.uuid4(), "a.tar.0", b"lost")
    upload = await declare(plane, adapter_files())
    async with plane.database.as_worker() as session:
        await session.execute(text("UPDATE uploads SET expires_at = now()"))
    report = await fsck(plane, must_repair=True)
    assert found(report) == ["stale_upload", "stale_upload", "unfinished_file"]
    assert report.is_sound
    assert upload in {problem.subject for problem in report.problems}
    assert len(plane.stored_files()) == 4


async def test_an_upload_and_the_removal_of_its_bytes_at_once_leave_a_whole_version(
    plane: Plane,
) -> None:
    for seed in range(5):
        upload = asyncio.create_task(uploaded(plane, seed))
        while not upload.done():
            await fsck(plane, must_repair=True)
        assert await plane.store.has_adapter(upload.result())
    assert found(await fsck(plane, is_deep=True)) == []


@pytest.fixture
async def own_home(cluster: Cluster) -> AsyncIterator[Home]:
    """A database with roles of its own, as an installation has."""
    await cluster.drop_if_there("fsck")
    yield await cluster.make_empty("fsck")
    await cluster.drop_if_there("fsck")


async def test_the_command_reports_and_says_by_its_status_whether_all_is_well(
    own_home: Home, tmp_path: Path
) -> None:
    keys = Secrets.of(tmp_path / "secrets.json")
    passwords = {"app_password": keys.app_password, "worker_password": keys.worker_password}
    await migrate(own_home.owner_url, **passwords)
    orphan = ArtifactStore((tmp_path / "store").as_uri())
    await orphan.put_part(uuid.uuid4(), "a.tar.0", b"lost")

    async def command(*flags: str) -> tuple[int | None, str]:
        words = ("-m", "gateway.cli", "adapters", "fsck", "--data-dir", str(tmp_path))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *(*words, "--database-url", own_home.owner_url, *flags),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        return process.returncode, output.decode()

    status, output = await command()
    assert (status, "nothing is wrong" in output) == (0, True), output
    status, output = await command("--grace-hours", "0")
    assert (status, "stale_upload" in output) == (1, True), output
    status, output = await command("--grace-hours", "0", "--repair", "--deep")
    assert (status, "repaired" in output) == (0, True), output
    status, output = await command("--data-dir", str(tmp_path / "nowhere"))
    assert (status, "holds no installation" in output) == (2, True), output


async def principal(plane: Plane) -> Principal:
    tenant_id = (await plane.registry.destination("acme", "sql")).tenant_id
    return Principal(
        key_id=uuid.uuid4(),
        key_name="k",
        tenant_id=tenant_id,
        tenant_slug="acme",
        cache_salt=bytes(32),
        scopes=frozenset({"inference"}),
    )
