"""Facts about having an upload back: bit for bit, one's own, and only while it is kept."""

import asyncio
import datetime
import hashlib
import io
import tarfile
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.numpy import load, save
from sqlalchemy import text

from adapters import manifest
from adapters.validate import BaseShape
from engine.errors import EngineUnreachable
from engine.protocol import ProbeReport
from gateway.blobs import Blobs, SourceFile, UploadBytes
from gateway.database import Database
from gateway.fsck import Fsck, Report
from tests.gateway.admin_plane import (
    INFO,
    Plane,
    adapter_files,
    admin_plane,
    passing_probe,
    report,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENANTS = "/admin/v1/tenants"
SQL = f"{TENANTS}/acme/adapters/sql"
EXAMPLES = b'{"prompt": "2 + 2 =", "expected": "4"}\n{"prompt": "1 +", "expected": "1"}\n'
MIB = 1 << 20


@pytest.fixture
async def plane(database: Database, tmp_path: Path) -> AsyncIterator[Plane]:
    async with admin_plane(database, tmp_path) as plane:
        for tenant in ("acme", "globex"):
            await plane.make_tenant(tenant)
        yield plane


def spelled(by: str, **config: Any) -> dict[str, bytes]:
    """The same weights in a file of one's own, with other names and a note inside."""
    files = adapter_files(**config)
    tensors = load(files[WEIGHTS])
    if by != "PEFT":
        tensors = {name.removeprefix("base_model.model."): each for name, each in tensors.items()}
    return files | {WEIGHTS: save(tensors, metadata={"format": "pt", "by": by})}


async def uploaded(plane: Plane, files: dict[str, bytes], **where: str) -> dict[str, Any]:
    answer = await plane.upload(files, **where)
    assert answer.status_code in (200, 201), answer.text
    made: dict[str, Any] = answer.json()
    return made


async def pulled(plane: Plane, version: str = f"{SQL}/versions/1") -> dict[str, bytes]:
    listed = (await plane.client.get(f"{version}/files")).json()["data"]
    files = {}
    for file in listed:
        answer = await plane.client.get(f"{version}/files/{file['name']}")
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-length"] == str(file["size_bytes"])
        assert answer.headers["etag"] == f'"{file["sha256"]}"'
        assert hashlib.sha256(answer.content).hexdigest() == file["sha256"]
        files[file["name"]] = answer.content
    return files


async def fsck(plane: Plane, **how: bool) -> Report:
    compare = Fsck(plane.database, plane.store, grace=datetime.timedelta(0))
    return await compare.run(**{"is_deep": True, "must_repair": True, **how})


async def assert_sound(plane: Plane) -> None:
    assert (await fsck(plane, must_repair=False)).problems == []


def kinds(found: Report) -> list[str]:
    return sorted(problem.kind for problem in found.problems)


async def purge(plane: Plane, adapter: str = SQL) -> None:
    assert (await plane.client.delete(adapter)).status_code == 204
    assert (await plane.client.post(f"{adapter}/purge")).status_code == 204


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# What comes back.


async def test_an_upload_comes_back_bit_for_bit(plane: Plane) -> None:
    files = spelled("acme", lora_dropout=0.1) | {
        "examples.jsonl": EXAMPLES,
        "tokenizer_config.json": b"{ }",
        "generation_config.json": b"{ }",
    }
    await uploaded(plane, files)
    assert await pulled(plane) == files
    await assert_sound(plane)


async def test_of_an_archive_its_members_come_back(plane: Plane) -> None:
    files = adapter_files()
    folder = {f"out/{name}": data for name, data in {**files, "README.md": b"#"}.items()}
    await uploaded(plane, {"out.tar.gz": tar_of(folder)})
    assert await pulled(plane) == files


RANGES: list[tuple[str, int, int | None]] = [
    ("bytes=0-0", 0, 1),
    ("bytes=10-99", 10, 100),
    ("bytes=100-", 100, None),
    ("bytes=-7", -7, None),
    ("bytes=50-99999999", 50, None),
]


async def test_a_range_comes_back_alone(plane: Plane, subtests: pytest.Subtests) -> None:
    for header, begin, end in RANGES:
        with subtests.test(f"{header}"):
            files = adapter_files()
            await uploaded(plane, files)
            url = f"{SQL}/versions/1/files/{WEIGHTS}"
            answer = await plane.client.get(url, headers={"range": header})
            whole = files[WEIGHTS]
            assert (answer.status_code, answer.content) == (206, whole[begin:end])
            first = begin % len(whole)
            last = first + len(answer.content) - 1
            assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(whole)}"


async def test_what_is_no_range_of_the_file_is_passed_over_or_refused(plane: Plane) -> None:
    files = adapter_files()
    await uploaded(plane, files)
    url = f"{SQL}/versions/1/files/{CONFIG}"
    size = len(files[CONFIG])
    for passed_over in (
        {"range": "bytes=0-1,3-4"},
        {"range": "bytes=-"},
        {"range": "bytes=5-2"},
        {"range": "lines=1-2"},
        {"range": "bytes=0-1", "if-range": '"another"'},
    ):
        answer = await plane.client.get(url, headers=passed_over)
        assert (answer.status_code, answer.content) == (200, files[CONFIG])
    for header in (f"bytes={size}-", "bytes=-0"):
        answer = await plane.client.get(url, headers={"range": header})
        assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{size}")
        assert answer.json()["code"] == "range_not_satisfiable"


async def test_a_file_that_was_not_uploaded_is_not_found(plane: Plane) -> None:
    await uploaded(plane, adapter_files())
    for name in ("examples.jsonl", "%2e%2e", "%2e%2e%2fadapter_config.json", "%00"):
        assert (await plane.client.get(f"{SQL}/versions/1/files/{name}")).status_code == 404
    assert (await plane.client.get(f"{SQL}/versions/2/files")).status_code == 404


async def test_a_large_file_comes_back_in_constant_memory(
    database: Database, tmp_path: Path
) -> None:
    wide = 64 * MIB // 32
    shape = BaseShape(base_model="Tiny-Base", modules={"model.wide": (wide, 4)})
    info = msgspec.structs.replace(INFO, base_shape=shape)
    files = adapter_files(rank=8, modules=shape.modules, target_modules=["wide"], lora_alpha=0.1)
    expected = hashlib.sha256(files[WEIGHTS]).hexdigest()
    async with admin_plane(database, tmp_path, info=info, max_upload_bytes=128 * MIB) as plane:
        await plane.make_tenant("acme")
        await uploaded(plane, files)
        before_bytes, peak_bytes = resident_bytes(), 0
        checksum = hashlib.sha256()
        async with plane.client.stream("GET", f"{SQL}/versions/1/files/{WEIGHTS}") as answer:
            async for chunk in answer.aiter_raw():
                checksum.update(chunk)
                peak_bytes = max(peak_bytes, resident_bytes())
        assert checksum.hexdigest() == expected
        assert peak_bytes - before_bytes < 24 * MIB


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# Whose they are.


async def test_tenants_with_the_same_weights_each_have_their_own_bytes_back(plane: Plane) -> None:
    ours, theirs = spelled("PEFT"), spelled("globex", lora_dropout=0.2)
    first = await uploaded(plane, ours)
    second = await uploaded(plane, theirs, tenant="globex")
    assert first["weights_digest"] == second["weights_digest"]
    assert await pulled(plane) == ours
    assert await pulled(plane, f"{TENANTS}/globex/adapters/sql/versions/1") == theirs
    await assert_sound(plane)


async def test_bytes_that_two_tenants_share_are_written_by_each(plane: Plane) -> None:
    files = adapter_files()
    await uploaded(plane, files)
    before = plane.stored_files()
    await uploaded(plane, files, tenant="globex")
    sha256 = hashlib.sha256(files[WEIGHTS]).hexdigest()
    assert set(plane.stored_files()) - set(before) == {f"files/{sha256[:2]}/{sha256}"}
    assert await pulled(plane, f"{TENANTS}/globex/adapters/sql/versions/1") == files


async def test_one_tenants_bytes_are_stored_once(plane: Plane) -> None:
    await uploaded(plane, adapter_files())
    before = plane.stored_files()
    await uploaded(plane, adapter_files(), adapter="copy")
    assert plane.stored_files() == before
    await purge(plane)
    assert await pulled(plane, f"{TENANTS}/acme/adapters/copy/versions/1") == adapter_files()
    await assert_sound(plane)


async def test_the_same_weights_at_once_in_many_spellings_are_each_their_own(plane: Plane) -> None:
    spellings = {"PEFT": "acme", "globex": "globex", "c": "acme", "d": "globex"}
    files = {by: spelled(by) for by in spellings}
    await asyncio.gather(
        *(
            uploaded(plane, files[by], tenant=tenant, adapter=by.lower())
            for by, tenant in spellings.items()
        )
    )
    for by, tenant in spellings.items():
        url = f"{TENANTS}/{tenant}/adapters/{by.lower()}/versions/1"
        assert await pulled(plane, url) == files[by]
    await assert_sound(plane)


async def test_a_purge_takes_the_files_and_leaves_those_of_others(plane: Plane) -> None:
    ours, theirs = spelled("PEFT", lora_dropout=0.1), spelled("globex", lora_dropout=0.2)
    await uploaded(plane, ours | {"examples.jsonl": EXAMPLES})
    await uploaded(plane, theirs, tenant="globex")
    await purge(plane)
    assert (await plane.client.get(f"{SQL}/versions/1/files")).status_code == 404
    gone = {hashlib.sha256(data).hexdigest() for data in (ours[CONFIG], EXAMPLES)}
    assert not any(sha256 in path for path in plane.stored_files() for sha256 in gone)
    assert await pulled(plane, f"{TENANTS}/globex/adapters/sql/versions/1") == theirs
    await assert_sound(plane)
    await purge(plane, f"{TENANTS}/globex/adapters/sql")
    assert plane.stored_files() == []
    await assert_sound(plane)


async def test_of_a_purged_version_nothing_is_told_beside_one_that_stays(plane: Plane) -> None:
    await uploaded(plane, adapter_files(seed=0))
    await uploaded(plane, adapter_files(seed=1))
    version = f"{SQL}/versions/1"
    assert (await plane.client.delete(version)).status_code == 204
    assert await pulled(plane) == adapter_files(seed=0)
    assert (await plane.client.post(f"{version}/purge")).status_code == 204
    for path in ("files", f"files/{WEIGHTS}", "certificate"):
        answer = await plane.client.get(f"{version}/{path}")
        assert (answer.status_code, "purged" in answer.json()["detail"]) == (404, True)
    assert await pulled(plane, f"{SQL}/versions/2") == adapter_files(seed=1)
    await assert_sound(plane)


async def test_of_a_refused_version_no_file_remains(plane: Plane) -> None:
    async def failing(digest: str) -> ProbeReport:
        return report(digest, is_passed=False)

    plane.probe.answer = failing
    assert (await plane.upload(adapter_files() | {"examples.jsonl": EXAMPLES})).status_code == 422
    assert plane.stored_files() == []
    assert (await plane.client.get(f"{SQL}/versions/1/files")).status_code == 404
    await assert_sound(plane)


# What is lost, and what is left.


async def test_the_same_contents_again_leave_the_first_files_and_nothing_else(
    plane: Plane,
) -> None:
    first = spelled("PEFT")
    await uploaded(plane, first)
    before = plane.stored_files()
    again = await plane.upload(spelled("another", lora_dropout=0.3))
    assert (again.status_code, again.json()["number"]) == (200, 1)
    assert plane.stored_files() == before
    assert await pulled(plane) == first


async def test_what_a_killed_gateway_stored_without_a_row_is_swept(
    plane: Plane, tmp_path: Path
) -> None:
    await uploaded(plane, adapter_files(seed=1))
    before = plane.stored_files()
    stale = await store_without_a_row(plane, tmp_path, adapter_files(lora_dropout=0.5))
    assert len(plane.stored_files()) == len(before) + 4
    assert kinds(await fsck(plane, must_repair=False)) == ["orphan_adapter", "orphan_file"]
    assert (await fsck(plane)).is_sound
    assert plane.stored_files() == before
    assert not await plane.store.has_adapter(stale)


async def store_without_a_row(plane: Plane, folder: Path, files: dict[str, bytes]) -> str:
    """All that an upload does before its row; return the digest."""
    made = {}
    for name, data in files.items():
        (folder / name).write_bytes(data)
        made[name] = SourceFile(folder / name, hashlib.sha256(data).hexdigest())
    found = manifest.read(
        files[CONFIG], made[WEIGHTS].path, base_model="Tiny-Base", base_shape=INFO.base_shape
    )
    upload = UploadBytes(uuid.uuid4(), found.weights_digest, found.canonical_config(), made)
    await Blobs(plane.database, plane.store).put(upload)
    return found.weights_digest


async def test_a_lost_file_is_found_and_comes_with_the_next_upload(plane: Plane) -> None:
    files = adapter_files(lora_dropout=0.1)
    await uploaded(plane, files)
    sha256 = hashlib.sha256(files[CONFIG]).hexdigest()
    await plane.store.delete_file(sha256)
    answer = await plane.client.get(f"{SQL}/versions/1/files/{CONFIG}")
    assert (answer.status_code, "upload it again" in answer.json()["detail"]) == (503, True)
    assert kinds(await fsck(plane)) == ["missing_file"]
    assert (await plane.upload(files)).status_code == 200
    assert await pulled(plane) == files
    await assert_sound(plane)


async def test_a_version_whose_files_are_lost_takes_those_of_the_next_upload(
    plane: Plane,
) -> None:
    first, again = spelled("PEFT"), spelled("another", lora_dropout=0.1)
    await uploaded(plane, first)
    await plane.store.delete_file(hashlib.sha256(first[CONFIG]).hexdigest())
    assert (await plane.upload(again)).status_code == 200
    assert await pulled(plane) == again
    await assert_sound(plane)


async def test_a_damaged_file_is_found_by_reading_it(plane: Plane) -> None:
    files = adapter_files()
    await uploaded(plane, files)
    sha256 = hashlib.sha256(files[CONFIG]).hexdigest()
    path = plane.folder / "store" / "files" / sha256[:2] / sha256
    path.write_bytes(files[CONFIG][:-1] + b" ")
    assert kinds(await fsck(plane, is_deep=False)) == []
    assert kinds(await fsck(plane, must_repair=False)) == ["damaged_file"]
    await fsck(plane)
    assert not path.exists()
    await uploaded(plane, files)
    assert await pulled(plane) == files
    await assert_sound(plane)


async def test_a_version_from_before_files_were_kept_has_them_after_the_next_upload(
    plane: Plane,
) -> None:
    await uploaded(plane, adapter_files())
    async with plane.database.as_worker() as session:
        await session.execute(text("UPDATE adapter_versions SET source_files = NULL"))
    answer = await plane.client.get(f"{SQL}/versions/1/files")
    assert (answer.status_code, "were not kept" in answer.json()["detail"]) == (404, True)
    await uploaded(plane, adapter_files())
    assert await pulled(plane) == adapter_files()


# What the files are read for again.


async def test_a_new_start_runs_the_examples_that_the_last_one_did_not_come_to(
    plane: Plane,
) -> None:
    async def unreachable(digest: str) -> ProbeReport:
        raise EngineUnreachable

    files = adapter_files() | {"examples.jsonl": EXAMPLES}
    plane.probe.answer = unreachable
    assert (await plane.upload(files)).status_code == 503
    plane.probe.answer = passing_probe
    await plane.start_anew()
    recovered = (await plane.client.get(f"{SQL}/versions/1")).json()
    at_once = await uploaded(plane, files, adapter="other")
    assert recovered["state"] == at_once["state"] == "ready"
    assert recovered["example_results"] == at_once["example_results"]
    assert recovered["example_results"]["this"]["total"] == 2
