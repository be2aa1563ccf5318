"""Facts about tenants' own files: taken in, listed, given back, limited, and gone for good."""

import datetime
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import text

from adapters.store import ArtifactStore
from gateway.database import Database
from gateway.files import Files
from gateway.fsck import Fsck
from gateway.object_ids import FILE, read_id
from gateway.staging import Staging
from tests.conftest import Home
from tests.engine.echo_engine import until
from tests.gateway.batch_lab import create, line, speaker_of
from tests.gateway.whole_gateway import Gateway, whole_gateway

MAX_BYTES = 4096


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with whole_gateway(
        home, database, tmp_path, max_file_bytes_per_tenant=MAX_BYTES
    ) as running:
        yield running


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with speaker_of(gateway, gateway.client) as made:
        yield made


def documents(folder: Path) -> set[str]:
    return {path.name for path in (folder / "store" / "documents").glob("*")}


def files_of(database: Database, folder: Path) -> Files:
    """Another gateway's, as it were."""
    return Files(
        database,
        ArtifactStore((folder / "store").as_uri()),
        staging=Staging(folder / "staging", max_upload_bytes=MAX_BYTES),
        max_bytes_per_tenant=MAX_BYTES,
    )


async def expire(database: Database) -> None:
    async with database.as_worker() as session:
        await session.execute(text("UPDATE tenant_files SET expires_at = now()"))


async def test_a_file_comes_back_as_it_was_sent_until_it_is_deleted(
    client: openai.AsyncOpenAI, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 3
    made = await client.files.create(file=("my lines.jsonl", data), purpose="batch")
    assert (made.bytes, made.filename, made.purpose) == (len(data), "my lines.jsonl", "batch")
    assert made.expires_at is not None
    assert made.expires_at - made.created_at == pytest.approx(30 * 86400, abs=60)
    assert await client.files.retrieve(made.id) == made
    assert (await client.files.content(made.id)).content == data
    assert len(documents(tmp_path)) == 1
    assert (await client.files.delete(made.id)).deleted
    assert documents(tmp_path) == set()
    for asking in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            await asking(made.id)


async def test_files_are_listed_page_by_page(client: openai.AsyncOpenAI) -> None:
    made = [
        (await client.files.create(file=(f"{n}.jsonl", b"{}"), purpose="batch")).id
        for n in range(5)
    ]
    assert [each.id async for each in client.files.list(limit=2)] == made[::-1]
    assert [each.id async for each in client.files.list(limit=2, order="asc")] == made
    assert [each.id async for each in client.files.list(purpose="batch_output")] == []


async def test_a_file_is_kept_for_as_long_as_it_was_asked_for(
    client: openai.AsyncOpenAI,
) -> None:
    made = await client.files.create(
        file=("a.jsonl", b"{}"),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )
    assert made.expires_at is not None
    assert made.expires_at - made.created_at == pytest.approx(7200, abs=60)


NO_UPLOADS: list[tuple[dict[str, Any], str]] = [
    ({"purpose": "batch"}, "file"),
    ({"file": b"{}"}, "purpose"),
    ({"file": b"{}", "purpose": "fine-tune"}, "purpose"),
    ({"file": b"{}", "purpose": "batch", "colour": "red"}, "colour"),
    ({"file": b"{}", "purpose": "batch" * 300}, "purpose"),
    (
        {"file": b"{}", "purpose": "batch", "expires_after[anchor]": "now"},
        "expires_after[anchor]",
    ),
    (
        {
            "file": b"{}",
            "purpose": "batch",
            "expires_after[anchor]": "created_at",
            "expires_after[seconds]": "3599",
        },
        "expires_after[seconds]",
    ),
]


async def test_what_is_no_upload_is_refused_by_name(
    gateway: Gateway, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for parts, param in NO_UPLOADS:
        with subtests.test(f"{parts}"):
            files = [
                (name, (None if isinstance(value, str) else "a.jsonl", value))
                for name, value in parts.items()
            ]
            answer = await gateway.client.post("/v1/files", files=files)
            assert answer.status_code == httpx.codes.BAD_REQUEST, answer.text
            assert answer.json()["error"]["param"] == param
            assert documents(tmp_path) == set()


async def test_a_body_that_is_no_form_is_refused(gateway: Gateway) -> None:
    for body in ({"json": {}}, {"content": b"--x", "headers": {"content-type": "text/plain"}}):
        answer = await gateway.client.post("/v1/files", **body)
        assert (answer.status_code, "multipart/form-data" in answer.text) == (400, True)


async def test_a_tenant_keeps_no_more_bytes_than_it_may(
    gateway: Gateway, client: openai.AsyncOpenAI, tmp_path: Path
) -> None:
    first = await client.files.create(file=("a", b"x" * 3000), purpose="batch")
    with pytest.raises(openai.PermissionDeniedError, match="bytes of files"):
        await client.files.create(file=("b", b"x" * 1097), purpose="batch")
    assert len(documents(tmp_path)) == 1
    await client.files.create(file=("b", b"x" * 1096), purpose="batch")
    changed = await gateway.operator.patch(
        "/admin/v1/tenants/acme", json={"max_file_bytes": 2 * MAX_BYTES}
    )
    assert changed.json()["max_file_bytes"] == 2 * MAX_BYTES
    await client.files.create(file=("c", b"x" * MAX_BYTES), purpose="batch")
    await client.files.delete(first.id)
    await client.files.create(file=("d", b"x" * 3000), purpose="batch")


async def test_a_file_past_its_time_is_gone_with_its_bytes(
    gateway: Gateway, client: openai.AsyncOpenAI, database: Database, tmp_path: Path
) -> None:
    made = await client.files.create(file=("a", b"{}"), purpose="batch")
    await expire(database)
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(made.id)
    assert await files_of(database, tmp_path).sweep() == 1
    assert documents(tmp_path) == set()


async def test_a_file_stays_while_a_batch_reads_it(
    gateway: Gateway, client: openai.AsyncOpenAI, database: Database, tmp_path: Path
) -> None:
    gateway.core.allow_steps(0)
    batch = await create(client, [line("a")])
    await until(lambda: bool(gateway.core.running))
    with pytest.raises(openai.ConflictError, match="still reads"):
        await client.files.delete(batch.input_file_id)
    await expire(database)
    assert await files_of(database, tmp_path).sweep() == 0
    assert documents(tmp_path) == {str(read_id(FILE, batch.input_file_id))}


async def test_files_and_batches_go_with_their_tenant(
    gateway: Gateway, client: openai.AsyncOpenAI, database: Database, tmp_path: Path
) -> None:
    gateway.core.allow_steps(0)
    await create(client, [line("a")], metadata={"who": "ann"})
    await until(lambda: bool(gateway.core.running))
    await gateway.operator.patch("/admin/v1/tenants/acme", json={"status": "closed"})
    erased = await gateway.operator.post("/admin/v1/tenants/acme/erase", json={"user": None})
    assert erased.json()["num_files"] == 1, erased.text
    assert documents(tmp_path) == set()
    rows = text("""
        SELECT (SELECT count(*) FROM tenant_files) + (SELECT count(*) FROM batches)
             + (SELECT count(*) FROM batch_results)
    """)
    async with database.as_worker() as session:
        assert await session.scalar(rows) == 0
    gateway.core.allow_steps(None)
    await until(lambda: not gateway.core.running)
    assert await gateway.differences() == []


async def test_fsck_finds_bytes_without_a_file_and_files_without_bytes(
    gateway: Gateway, client: openai.AsyncOpenAI, database: Database, tmp_path: Path
) -> None:
    kept, lost = [
        await client.files.create(file=(name, b"{}"), purpose="batch") for name in ("a", "b")
    ]
    (tmp_path / "store" / "documents" / str(read_id(FILE, lost.id))).unlink()
    stray = "0190163d-8694-739b-aea5-966c26f8ad90"
    (tmp_path / "store" / "documents" / stray).write_bytes(b"x")
    store = ArtifactStore((tmp_path / "store").as_uri())
    fsck = Fsck(database, store, grace=datetime.timedelta())
    found = {
        problem.subject: problem.kind
        for problem in (await fsck.run(is_deep=False, must_repair=True)).problems
        if problem.kind.endswith("document")
    }
    assert found == {str(read_id(FILE, lost.id)): "missing_document", stray: "orphan_document"}
    assert documents(tmp_path) == {str(read_id(FILE, kept.id))}
