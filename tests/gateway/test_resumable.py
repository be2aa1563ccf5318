"""Facts about uploads in pieces: nothing that arrived is asked for again, whoever was killed."""

import asyncio
import datetime
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load, save
from sqlalchemy import select

from gateway import resumable
from gateway.database import Database
from gateway.staging import MAX_UPLOADS_UNDER_WAY
from gateway.tables import AuditEntry
from tests.conftest import Home
from tests.gateway.admin_plane import (
    MAX_UPLOAD_BYTES,
    Plane,
    adapter_files,
    admin_plane,
    passing_probe,
    report,
)
from tests.gateway.whole_gateway import gateway_process

BASE = "/admin/v1/tenants/acme/adapters/sql"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
async def plane(database: Database, tmp_path: Path) -> AsyncIterator[Plane]:
    async with admin_plane(database, tmp_path) as plane:
        await plane.make_tenant("acme")
        yield plane


def declaration(files: dict[str, bytes], **fields: Any) -> dict[str, Any]:
    declared = [
        {"name": name, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    ]
    return {"files": declared, **fields}


async def declare(plane: Plane, files: dict[str, bytes]) -> str:
    answer = await plane.client.post(f"{BASE}/uploads", json=declaration(files))
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def put(
    plane: Plane, upload: str, name: str, data: bytes, *, begin: int = 0, end: int | None = None
) -> httpx.Response:
    end = len(data) if end is None else end
    return await plane.client.put(
        f"{BASE}/uploads/{upload}/files/{name}",
        content=data[begin:end],
        headers={"content-range": f"bytes {begin}-{end - 1}/{len(data)}"},
    )


async def complete(plane: Plane, upload: str) -> httpx.Response:
    return await plane.client.post(f"{BASE}/uploads/{upload}/complete")


async def sent(plane: Plane, files: dict[str, bytes]) -> str:
    upload = await declare(plane, files)
    for name, data in files.items():
        assert (await put(plane, upload, name, data)).status_code == 200
    return upload


def received(answer: httpx.Response) -> dict[str, int]:
    return {file["name"]: file["received_bytes"] for file in answer.json()["files"]}


def parts(plane: Plane) -> list[str]:
    return [path for path in plane.stored_files() if path.startswith("uploads/")]


async def test_pieces_become_the_version_that_one_request_would_have_made(plane: Plane) -> None:
    files = adapter_files()
    upload = await declare(plane, files)
    for name, data in files.items():
        for begin in range(0, len(data), 500):
            answer = await put(
                plane, upload, name, data, begin=begin, end=min(begin + 500, len(data))
            )
            assert answer.status_code == 200, answer.text
    assert received(answer) == {name: len(data) for name, data in files.items()}
    made = await complete(plane, upload)
    assert made.status_code == 201, made.text
    assert parts(plane) == []
    assert plane.staged_files() == []
    by_one_request = await plane.upload(files)
    assert (by_one_request.status_code, by_one_request.json()) == (200, made.json())


async def test_completing_again_gives_the_same_version(plane: Plane) -> None:
    upload = await sent(plane, adapter_files())
    first, again = await complete(plane, upload), await complete(plane, upload)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    shown = (await plane.client.get(f"{BASE}/uploads/{upload}")).json()
    assert (shown["state"], shown["version"]) == ("published", 1)
    assert (await put(plane, upload, WEIGHTS, b"x")).status_code == 409


async def test_completing_twice_at_once_makes_one_version(plane: Plane) -> None:
    upload = await sent(plane, adapter_files())
    answers = await asyncio.gather(*(complete(plane, upload) for _ in range(4)))
    assert {answer.status_code for answer in answers} <= {200, 201}, [a.text for a in answers]
    assert {answer.json()["number"] for answer in answers} == {1}
    assert parts(plane) == []


async def test_an_archive_comes_in_pieces_too(plane: Plane) -> None:
    from tests.gateway.test_uploads import tar_of

    upload = await sent(plane, {"a.tgz": tar_of({**adapter_files(), "README.md": b"#"})})
    answer = await complete(plane, upload)
    assert answer.status_code == 201, answer.text
    assert answer.json()["ignored_files"] == ["README.md"]
    assert (await complete(plane, upload)).json()["ignored_files"] == ["README.md"]


async def test_a_range_that_comes_again_is_passed_over(plane: Plane) -> None:
    files = adapter_files()
    data = files[WEIGHTS]
    upload = await declare(plane, files)
    for begin, end in ((0, 100), (0, 100), (50, 200), (0, 150), (200, len(data))):
        answer = await put(plane, upload, WEIGHTS, data, begin=begin, end=end)
        assert answer.status_code == 200
    assert received(answer)[WEIGHTS] == len(data)
    await put(plane, upload, "adapter_config.json", files["adapter_config.json"])
    assert (await complete(plane, upload)).status_code == 201


async def test_the_same_range_at_once_is_kept_once(plane: Plane) -> None:
    files = adapter_files()
    upload = await declare(plane, files)
    answers = await asyncio.gather(*(put(plane, upload, WEIGHTS, files[WEIGHTS]) for _ in range(6)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(parts(plane)) == 1
    await put(plane, upload, "adapter_config.json", files["adapter_config.json"])
    assert (await complete(plane, upload)).status_code == 201


async def test_a_gap_is_refused_with_the_offset_to_go_on_from(plane: Plane) -> None:
    files = adapter_files()
    upload = await declare(plane, files)
    await put(plane, upload, WEIGHTS, files[WEIGHTS], end=300)
    answer = await put(plane, upload, WEIGHTS, files[WEIGHTS], begin=301)
    assert (answer.status_code, answer.json()["code"]) == (409, "offset_mismatch")
    assert answer.json()["expected_offset"] == 300
    unfinished = await complete(plane, upload)
    assert (unfinished.status_code, unfinished.json()["code"]) == (409, "offset_mismatch")


async def test_a_client_that_breaks_off_goes_on_where_whole_pieces_end(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumable, "PIECE_BYTES", 256)
    files = adapter_files()
    data = files[WEIGHTS]
    upload = await declare(plane, files)

    async def broken_off() -> AsyncIterator[bytes]:
        yield data[:1000]
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await plane.client.put(
            f"{BASE}/uploads/{upload}/files/{WEIGHTS}",
            content=broken_off(),
            headers={"content-range": f"bytes 0-{len(data) - 1}/{len(data)}"},
        )
    shown = await plane.client.get(f"{BASE}/uploads/{upload}")
    assert received(shown)[WEIGHTS] in range(0, 769, 256)
    begin = received(shown)[WEIGHTS]
    assert (await put(plane, upload, WEIGHTS, data, begin=begin)).status_code == 200
    await put(plane, upload, "adapter_config.json", files["adapter_config.json"])
    assert (await complete(plane, upload)).status_code == 201


async def test_another_gateway_goes_on_with_it(plane: Plane, tmp_path: Path) -> None:
    files = adapter_files()
    upload = await declare(plane, files)
    await put(plane, upload, WEIGHTS, files[WEIGHTS], end=1000)
    store_url = (tmp_path / "store").as_uri()
    async with admin_plane(plane.database, tmp_path / "other", store_url=store_url) as other:
        await put(other, upload, WEIGHTS, files[WEIGHTS], begin=1000)
        await put(other, upload, "adapter_config.json", files["adapter_config.json"])
    assert (await complete(plane, upload)).status_code == 201


async def test_what_is_no_adapter_is_told_at_the_end_and_told_again(plane: Plane) -> None:
    files = adapter_files()
    tensors = load(files[WEIGHTS])
    tensors[min(tensors)][0, 0] = np.nan
    upload = await sent(plane, files | {WEIGHTS: save(tensors)})
    for _ in range(2):
        answer = await complete(plane, upload)
        assert answer.status_code == 422
        assert [finding["code"] for finding in answer.json()["findings"]] == ["not_finite"]
    assert plane.stored_files() == []


async def test_bytes_that_are_not_the_declared_ones_are_refused(plane: Plane) -> None:
    files = adapter_files()
    upload = await declare(plane, files)
    await put(plane, upload, WEIGHTS, bytes(len(files[WEIGHTS])))
    await put(plane, upload, "adapter_config.json", files["adapter_config.json"])
    answer = await complete(plane, upload)
    assert answer.status_code == 422
    assert [(f["code"], f["where"]) for f in answer.json()["findings"]] == [
        ("sha256_mismatch", WEIGHTS)
    ]
    assert plane.stored_files() == []


async def test_an_engine_that_is_away_costs_no_byte(plane: Plane) -> None:
    from tests.gateway.test_uploads import unreachable

    upload = await sent(plane, adapter_files())
    plane.probe.answer = unreachable
    assert (await complete(plane, upload)).status_code == 503
    plane.probe.answer = passing_probe
    answer = await complete(plane, upload)
    assert (answer.status_code, answer.json()["state"]) == (200, "ready")


async def test_a_deleted_upload_leaves_nothing(plane: Plane) -> None:
    upload = await sent(plane, adapter_files())
    assert (await plane.client.delete(f"{BASE}/uploads/{upload}")).status_code == 204
    assert plane.stored_files() == []
    assert (await plane.client.get(f"{BASE}/uploads/{upload}")).status_code == 404
    assert (await complete(plane, upload)).status_code == 404
    async with plane.database.as_worker() as session:
        [entry] = await session.scalars(
            select(AuditEntry).where(AuditEntry.action == "adapter.upload.delete")
        )
    assert (entry.subject, entry.details) == ("acme-sql", {"upload_id": upload})


async def test_an_expired_upload_is_swept(database: Database, tmp_path: Path) -> None:
    async with admin_plane(database, tmp_path, lifetime=datetime.timedelta(0)) as plane:
        await plane.make_tenant("acme")
        upload = await declare(plane, adapter_files())
        assert (await put(plane, upload, WEIGHTS, adapter_files()[WEIGHTS])).status_code == 404
        assert await plane.resumable.sweep() == 1
        assert plane.stored_files() == []
        assert (await plane.client.get(f"{BASE}/uploads/{upload}")).status_code == 404


async def test_an_upload_is_nobody_elses(plane: Plane) -> None:
    upload = await declare(plane, adapter_files())
    await plane.make_tenant("globex")
    for path in ("tenants/globex/adapters/sql", "tenants/acme/adapters/other"):
        answer = await plane.client.get(f"/admin/v1/{path}/uploads/{upload}")
        assert answer.status_code == 404


async def test_a_tenant_has_only_so_many_bytes_under_way(plane: Plane) -> None:
    digest = "0" * 64
    files = [
        {"name": "adapter_config.json", "size_bytes": 1, "sha256": digest},
        {"name": WEIGHTS, "size_bytes": MAX_UPLOAD_BYTES - 1, "sha256": digest},
    ]
    answers = await asyncio.gather(
        *(
            plane.client.post(f"{BASE}/uploads", json={"files": files})
            for _ in range(MAX_UPLOADS_UNDER_WAY + 2)
        )
    )
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [201] * MAX_UPLOADS_UNDER_WAY + [429] * 2


async def test_memory_stays_constant_however_large_the_file(
    home: Home, database: Database, tmp_path: Path
) -> None:
    size = 64 << 20
    chunk = np.full(1 << 18, 0.01, np.float32).tobytes()
    digest = hashlib.sha256(chunk * (size // len(chunk))).hexdigest()
    # In a process of its own, whose allocator holds nothing for other tests.
    async with gateway_process(
        home,
        database,
        tmp_path,
        module="gateway",
        environment={},
        max_upload_bytes=size + 1000,
    ) as gateway:
        config = adapter_files()["adapter_config.json"]
        declared = declaration({"adapter_config.json": config})
        declared["files"].append({"name": WEIGHTS, "size_bytes": size, "sha256": digest})
        answer = await gateway.operator.post(f"{BASE}/uploads", json=declared)
        files = f"{BASE}/uploads/{answer.json()['id']}/files"
        peaks: list[int] = []

        async def body() -> AsyncIterator[bytes]:
            for _ in range(size // len(chunk)):
                yield chunk
                peaks.append(resident_bytes(gateway.pid))

        for name, length, content in (
            ("adapter_config.json", len(config), config),
            (WEIGHTS, size, body()),
        ):
            headers = {"content-range": f"bytes 0-{length - 1}/{length}"}
            answer = await gateway.operator.put(f"{files}/{name}", content=content, headers=headers)
            assert answer.status_code == 200, answer.text
        # These bytes are no safetensors file, which is found out at the end.
        answer = await gateway.operator.post(f"{files.removesuffix('/files')}/complete")
        assert answer.json()["findings"][0]["code"] == "weights_unreadable"
        peaks.append(resident_bytes(gateway.pid))
    # By the middle every buffer has been there once; 32 MiB and their judgement are to come.
    assert max(peaks) - peaks[len(peaks) // 2] < 24 << 20


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


DIGEST = "0" * 64
MALFORMED: dict[str, tuple[list[dict[str, Any]], int]] = {
    "no file": ([], 400),
    "an unknown file": ([{"name": "x.bin", "size_bytes": 1, "sha256": DIGEST}], 400),
    "a path": ([{"name": "../a.tar", "size_bytes": 1, "sha256": DIGEST}], 201),
    "no weights": ([{"name": "adapter_config.json", "size_bytes": 1, "sha256": DIGEST}], 400),
    "no bytes": ([{"name": "a.tar", "size_bytes": 0, "sha256": DIGEST}], 400),
    "no digest": ([{"name": "a.tar", "size_bytes": 1, "sha256": "x"}], 400),
    "too many bytes": ([{"name": "a.tar", "size_bytes": 1 << 40, "sha256": DIGEST}], 413),
    "two archives": (
        [{"name": name, "size_bytes": 1, "sha256": DIGEST} for name in ("a.tar", "b.zip")],
        400,
    ),
    "one file twice": (
        [{"name": name, "size_bytes": 1, "sha256": DIGEST} for name in ("a.tar", "b.tar")],
        400,
    ),
}


async def test_a_declaration_that_makes_no_sense_is_refused(
    plane: Plane, subtests: pytest.Subtests
) -> None:
    for what, (files, status) in MALFORMED.items():
        with subtests.test(what):
            answer = await plane.client.post(f"{BASE}/uploads", json={"files": files})
            assert answer.status_code == status, answer.text


NO_RANGES: list[str] = ["", "bytes 0-", "bytes 5-4/{size}", "bytes 0-9/10", "bytes 0-{size}/{size}"]


async def test_a_range_that_makes_no_sense_is_refused(
    plane: Plane, subtests: pytest.Subtests
) -> None:
    for content_range in NO_RANGES:
        with subtests.test(f"{content_range}"):
            files = adapter_files()
            upload = await declare(plane, files)
            answer = await plane.client.put(
                f"{BASE}/uploads/{upload}/files/{WEIGHTS}",
                content=b"x",
                headers={"content-range": content_range.format(size=len(files[WEIGHTS]))},
            )
            assert (answer.status_code, answer.json()["param"]) == (400, "Content-Range")


@pytest.mark.parametrize("size", [99, 101])
async def test_a_body_that_is_not_as_long_as_its_range_is_refused(plane: Plane, size: int) -> None:
    files = adapter_files()
    upload = await declare(plane, files)
    answer = await plane.client.put(
        f"{BASE}/uploads/{upload}/files/{WEIGHTS}",
        content=files[WEIGHTS][:size],
        headers={"content-range": f"bytes 0-99/{len(files[WEIGHTS])}"},
    )
    assert answer.status_code == 400
    assert "Content-Range" in answer.json()["detail"]


async def test_a_file_that_was_not_declared_is_refused(plane: Plane) -> None:
    upload = await declare(plane, adapter_files())
    answer = await put(plane, upload, "tokenizer.json", b"{}")
    assert answer.status_code == 404
    assert WEIGHTS in answer.json()["detail"]


async def test_a_version_that_fails_its_probe_closes_the_upload(plane: Plane) -> None:
    async def failing(digest: str) -> Any:
        return report(digest, is_passed=False)

    plane.probe.answer = failing
    upload = await sent(plane, adapter_files())
    assert (await complete(plane, upload)).status_code == 422
    shown = (await plane.client.get(f"{BASE}/uploads/{upload}")).json()
    assert shown["state"] == "rejected"
    assert plane.stored_files() == []
