"""Every hostile upload gets its 4xx with all that is wrong; afterwards everything is as before."""

import gc
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text

from gateway.database import Database
from tests.gateway.admin_plane import Plane, admin_plane
from tests.hostile.corpus import (
    CASES,
    MAX_UPLOAD_BYTES,
    TEMPLATE_CASES,
    TOKENIZER_CASES,
    Case,
    Sent,
)

VERSIONS = "/admin/v1/tenants/acme/adapters/sql/versions"
# What the allocator keeps of the largest body in flight, here sent and received by one process.
MAX_GROWTH_BYTES = 24 << 20

COUNT_ROWS = text("""
    SELECT (SELECT count(*) FROM adapters) + (SELECT count(*) FROM adapter_versions)
         + (SELECT count(*) FROM adapter_aliases) + (SELECT count(*) FROM public_names)
         + (SELECT count(*) FROM uploads) + (SELECT count(*) FROM audit_log)
""")


@pytest.fixture
async def plane(database: Database, tmp_path: Path) -> AsyncIterator[Plane]:
    async with admin_plane(database, tmp_path, max_upload_bytes=MAX_UPLOAD_BYTES) as plane:
        await plane.make_tenant("acme")
        yield plane


async def send(plane: Plane, sent: Sent) -> httpx.Response:
    if sent.content_type is not None:
        headers = {"content-type": sent.content_type}
        return await plane.client.post(VERSIONS, content=sent.body, headers=headers)
    return await plane.upload(sent.files, fields=sent.fields)


def codes(answer: httpx.Response) -> set[str]:
    document = answer.json()
    findings = {finding["code"] for finding in document.get("findings", [])}
    return findings or {document["code"]}


async def num_rows(plane: Plane) -> int:
    async with plane.database.as_worker() as session:
        return int((await session.execute(COUNT_ROWS)).scalar_one())


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def judge(plane: Plane, case: Case) -> None:
    answer = await send(plane, case.build())
    assert (answer.status_code, codes(answer)) == (case.status, case.codes), answer.text[:2000]
    for finding in answer.json().get("findings", []):
        assert all(finding[name] for name in ("code", "where", "message", "fix"))
    assert plane.staged_files() == []
    assert plane.stored_files() == []


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    every = [*CASES, *TEMPLATE_CASES, *TOKENIZER_CASES]
    assert len(every) >= 200
    assert len({case.name for case in every}) == len(every)


async def test_every_hostile_upload_is_refused_and_leaves_nothing(
    plane: Plane, subtests: pytest.Subtests
) -> None:
    rows_before = await num_rows(plane)
    for case in CASES:
        with subtests.test(case.name):
            await judge(plane, case)
    assert await num_rows(plane) == rows_before
    assert plane.probe.asked_for == []
    # Whoever comes next is served as ever.
    assert (await plane.upload()).status_code == 201


# Each is judged in a process of its own, and many use all the time that they are given.
SOME = pytest.param(TEMPLATE_CASES[::10], TOKENIZER_CASES[::10], id="some")
ALL = pytest.param(TEMPLATE_CASES, TOKENIZER_CASES, id="all", marks=pytest.mark.slow)


@pytest.mark.parametrize(("templates", "tokenizers"), [SOME, ALL])
async def test_every_harmful_template_or_tokenizer_is_refused_and_leaves_nothing(
    plane: Plane, subtests: pytest.Subtests, templates: list[Case], tokenizers: list[Case]
) -> None:
    rows_before = await num_rows(plane)
    # The allocator has seen the oddest once the templates are through.
    for case in templates:
        with subtests.test(case.name):
            await judge(plane, case)
    before_bytes = resident_bytes()
    for case in tokenizers:
        with subtests.test(case.name):
            await judge(plane, case)
    assert resident_bytes() - before_bytes < MAX_GROWTH_BYTES
    assert await num_rows(plane) == rows_before
    assert plane.probe.asked_for == []
    assert (await plane.upload()).status_code == 201


async def test_memory_is_as_before_after_many_of_them(plane: Plane) -> None:
    small = [case for case in CASES if case.status != 413]
    for case in small:
        await send(plane, case.build())
    before_bytes = resident_bytes()
    for case in small:
        await send(plane, case.build())
    assert resident_bytes() - before_bytes < MAX_GROWTH_BYTES
