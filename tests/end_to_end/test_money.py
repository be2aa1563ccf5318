"""Every token that a client received is on its tenant's bill, once."""

import asyncio
import csv
import io
import shutil
import subprocess
import sys
import uuid
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import select

from gateway.database import Database, role_urls
from gateway.embedded import EmbeddedPostgres
from gateway.journal import Opened, Progress, Record
from gateway.segments import find_segments, read_records
from gateway.supervisor import Secrets
from gateway.tables import UsageEvent

INPUT_RATE, OUTPUT_RATE = 150_000_001, 600_000_007
SUMMED = ("requests", "prompt_tokens", "completion_tokens", "cost_nano")
QUESTION = [{"role": "user", "content": "How many open orders are there?"}]


@pytest.fixture
async def database(server):
    keys = Secrets.of(server.data_dir / "secrets.json")
    app_url, worker_url = role_urls(
        EmbeddedPostgres(server.data_dir).url,
        app_password=keys.app_password,
        worker_password=keys.worker_password,
    )
    database = Database(app_url=app_url, worker_url=worker_url)
    yield database
    await database.close()


@pytest.fixture(autouse=True)
def priced(server):
    body = {
        "base_model": server.facts["base_model"],
        "input_nano_per_million": INPUT_RATE,
        "cached_input_nano_per_million": INPUT_RATE,
        "output_nano_per_million": OUTPUT_RATE,
    }
    with server.operator() as operator:
        assert operator.post("/admin/v1/prices", json=body).status_code == 201


async def test_the_usage_a_client_saw_is_its_event_and_the_sums_are_the_report(server, database):
    before = _report(server)
    calls = [
        (tenant, model, streamed)
        for tenant, facts in server.facts["tenants"].items()
        for model in (*facts["adapters"], server.facts["base_model"])
        for streamed in (False, True)
    ]
    seen = await asyncio.gather(*(_ask(server, *call) for call in calls))
    events = await _events(database, [request_id for request_id, _ in seen])
    for request_id, usage in seen:
        event = events[request_id]
        assert usage.prompt_tokens == event.prompt_tokens
        assert usage.prompt_tokens_details.cached_tokens == event.cached_tokens
        assert usage.completion_tokens == event.completion_tokens
        assert usage.cost_nano == event.cost_nano
        assert event.cost_nano == _cost(event)
    seen_by: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for (tenant, model, _), (_, usage) in zip(calls, seen, strict=True):
        adapter = "" if model == server.facts["base_model"] else model
        seen_by[tenant, adapter] += Counter(
            requests=1,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cost_nano=usage.cost_nano,
        )
    after = _report(server)
    assert {place: after[place] - before[place] for place in seen_by} == seen_by


async def test_a_stream_that_its_client_cut_is_billed_what_was_journalled_before(
    server, database, tmp_path
):
    async with server.client("acme") as client:
        stream = await client.chat.completions.create(
            model=server.facts["base_model"],
            messages=QUESTION,
            max_tokens=400,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        request_id = uuid.UUID(stream.response.headers["x-request-id"])
        num_chunks = 0
        async for chunk in stream:
            num_chunks += bool(chunk.choices and chunk.choices[0].delta.content)
            if num_chunks == 10:
                break
        await stream.close()
    event = (await _events(database, [request_id]))[request_id]
    assert event.outcome == "abort"
    assert 10 <= event.completion_tokens < 100
    assert event.completion_tokens == _journalled_tokens(server, request_id, tmp_path)


async def test_a_whole_answer_that_its_client_did_not_wait_for_is_free(server, database):
    before = _totals(server, "globex")
    async with server.client("globex") as client:
        with pytest.raises(Exception, match="timed out"):
            await client.with_options(timeout=0.5).chat.completions.create(
                model=server.facts["base_model"],
                messages=QUESTION,
                max_tokens=2000,
                extra_body={"ignore_eos": True},
            )
    await asyncio.sleep(1.5)
    assert _totals(server, "globex") == before


async def test_a_stop_string_ends_the_bill_where_it_ends_the_answer(server, database):
    async with server.client("acme") as client:
        answer = await client.chat.completions.with_raw_response.create(
            model="acme-sql", messages=QUESTION, max_tokens=60, temperature=0, stop=["FROM"]
        )
    completion = answer.parse()
    assert "FROM" not in completion.choices[0].message.content
    assert completion.choices[0].finish_reason == "stop"
    request_id = uuid.UUID(answer.headers["x-request-id"])
    event = (await _events(database, [request_id]))[request_id]
    assert event.completion_tokens == completion.usage.completion_tokens < 10
    assert answer.headers["x-cost-nano"] == str(event.cost_nano)


def test_json_csv_and_the_tenants_own_view_say_the_same(server):
    query = {"group_by": "day,adapter,key"}
    with server.operator() as operator, server.http(server.key("acme")) as acme:
        url = "/admin/v1/billing/usage"
        rows = operator.get(url, params={**query, "tenant": "acme"}).json()["rows"]
        text = operator.get(url, params={**query, "tenant": "acme", "format": "csv"}).text
        own = acme.get("/v1/usage", params=query).json()["rows"]
    assert rows == own
    spelled = [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
    read = list(csv.DictReader(io.StringIO(text)))
    assert [{k: row[k] for k in spelled[0]} for row in read] == spelled


async def _ask(server: Any, tenant: str, model: str, streamed: bool) -> tuple[uuid.UUID, Any]:
    async with server.client(tenant) as client:
        raw = client.chat.completions.with_raw_response
        body = {"model": model, "messages": QUESTION, "max_tokens": 12}
        if not streamed:
            answer = await raw.create(**body)
            return uuid.UUID(answer.headers["x-request-id"]), answer.parse().usage
        answer = await raw.create(**body, stream=True, stream_options={"include_usage": True})
        request_id = uuid.UUID(answer.headers["x-request-id"])
        chunks = [chunk async for chunk in answer.parse()]
        return request_id, chunks[-1].usage


async def _events(database: Database, ids: list[uuid.UUID]) -> dict[uuid.UUID, UsageEvent]:
    """The usage events of these requests, once they are all settled."""
    for _ in range(100):
        async with database.as_worker() as session:
            found = (await session.scalars(select(UsageEvent).where(UsageEvent.id.in_(ids)))).all()
        if len(found) == len(ids):
            return {event.id: event for event in found}
        await asyncio.sleep(0.1)
    pytest.fail(f"{len(ids) - len(found)} requests were not settled")


def _cost(event: UsageEvent) -> int:
    """By other code than the gateway's: exact fractions, rounded half to even by Python."""
    exact = Fraction(
        event.prompt_tokens * INPUT_RATE + event.completion_tokens * OUTPUT_RATE, 1_000_000
    )
    return round(exact)


def _report(server: Any) -> dict[tuple[str, str], Counter[str]]:
    """What the operator's report says by tenant and adapter; each demo tenant has one key."""
    query = {"group_by": "tenant,adapter,key"}
    with server.operator() as operator:
        report = operator.get("/admin/v1/billing/usage", params=query).raise_for_status().json()
    found: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in report["rows"]:
        if row["key_name"] == "demo":
            counts = {name: row[name] for name in SUMMED}
            found[row["tenant"], row["adapter"] or ""] += Counter(counts)
    return found


def _totals(server: Any, tenant: str) -> dict[str, int]:
    with server.http(server.key(tenant)) as http:
        return dict(http.get("/v1/usage").raise_for_status().json()["totals"])


def _journalled_tokens(server: Any, request_id: uuid.UUID, tmp_path: Path) -> int:
    """What the frames that the gateway journalled for this request add up to."""
    (folder,) = (each for each in (server.data_dir / "journal").iterdir() if each.is_dir())
    paths = [path for epoch in find_segments(folder).values() for path in epoch]
    # A copy: reading cuts what looks like a torn tail, and this file is being written.
    copy = shutil.copy(paths[-1], tmp_path)
    decoder = msgspec.msgpack.Decoder(Record)
    records = [decoder.decode(raw) for raw in read_records(Path(copy), is_last=True).records]
    (number,) = (
        record.number
        for record in records
        if isinstance(record, Opened) and record.request_id == request_id
    )
    return max(
        count.completion_tokens
        for record in records
        if isinstance(record, Progress)
        for count in record.counts
        if count.number == number
    )


def test_the_books_are_proven_beside_the_running_server(server):
    command = [sys.executable, "-m", "gateway.cli", "billing", "verify"]
    proved = subprocess.run(
        [*command, "--data-dir", str(server.data_dir)], capture_output=True, text=True, check=False
    )
    assert proved.returncode == 0, proved.stdout + proved.stderr
    assert "all books agree" in proved.stdout
