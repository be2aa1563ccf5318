"""Facts about batches as a client meets them: their lines, their files, their bill, their ends."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response
from sqlalchemy import text, update

from gateway.batches.claims import Claims, Result
from gateway.batches.lines import (
    MAX_FAULTS,
    MAX_LINE_BYTES,
    MAX_LINES,
    READ_BYTES,
    Judgement,
    read_lines,
)
from gateway.batches.slots import Slots
from gateway.database import Database
from gateway.object_ids import BATCH, read_id
from gateway.tables import Batch, new_id
from tests.conftest import Home, execute
from tests.engine.echo_engine import EchoCore, until
from tests.gateway.batch_lab import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    RESPONSES,
    counts,
    create,
    ended,
    line,
    read,
    speaker_of,
)
from tests.gateway.whole_gateway import MODEL, TOKEN_NANO, Gateway, chat, whole_gateway

HALF_BP = 5000


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with whole_gateway(home, database, tmp_path) as running:
        yield running


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with speaker_of(gateway, gateway.client) as made:
        yield made


def row_id(batch: Any) -> uuid.UUID:
    found = read_id(BATCH, batch.id)
    assert found is not None
    return found


async def change(database: Database, batch: Any, **values: Any) -> None:
    async with database.as_worker() as session:
        await session.execute(update(Batch).where(Batch.id == row_id(batch)).values(**values))


def code_of(found: dict[str, Any], custom_id: str) -> tuple[int, str]:
    response = found[custom_id]["response"]
    return response["status_code"], response["body"]["error"]["code"]


async def test_every_line_is_answered_as_its_route_would_and_billed(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    asked = [line(f"order-{n}", chat(f"w{n} w8", max_tokens=n)) for n in range(1, 6)]
    made = await create(client, asked, metadata={"who": "me"})
    assert (made.status, made.output_file_id) == ("validating", None)
    batch = await ended(client, made)
    assert (batch.status, batch.errors, batch.error_file_id) == ("completed", None, None)
    assert (batch.metadata, counts(batch)) == ({"who": "me"}, (5, 5, 0))
    assert batch.created_at <= (batch.in_progress_at or 0) <= (batch.completed_at or 0)
    answers = await read(client, batch.output_file_id)
    assert list(answers) == [each["custom_id"] for each in asked]
    events = {str(event.id): event for event in await gateway.events(5)}
    for number, each in enumerate(asked, start=1):
        answer = answers[each["custom_id"]]
        assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
        body = answer["response"]["body"]
        assert (body["object"], body["usage"]["completion_tokens"]) == ("chat.completion", number)
        event = events[answer["response"]["request_id"]]
        assert event.endpoint == "batch.chat.completions"
        assert event.cost_nano == body["usage"]["cost_nano"] == (2 + number) * TOKEN_NANO
    assert len(events) == 5
    assert await gateway.differences() == []


async def test_completions_and_embeddings_are_endpoints_too(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    text_body = {"model": MODEL, "prompt": "w7 w8", "max_tokens": 2, "ignore_eos": True}
    vector_body = {"model": MODEL, "input": ["w5 w6 w7", "w9"]}
    made = [
        await create(client, [line("a", text_body, url=COMPLETIONS)], endpoint=COMPLETIONS),
        await create(client, [line("a", vector_body, url=EMBEDDINGS)], endpoint=EMBEDDINGS),
    ]
    bodies = [
        (await read(client, (await ended(client, each)).output_file_id))["a"]["response"]["body"]
        for each in made
    ]
    assert bodies[0]["choices"][0]["text"]
    assert [each["embedding"] for each in bodies[1]["data"]] == [[1.0, 3.0, 5.0], [1.0, 1.0, 9.0]]
    endpoints = {event.endpoint for event in await gateway.events(2)}
    assert endpoints == {"batch.completions", "batch.embeddings"}
    assert await gateway.differences() == []


async def test_lines_of_responses_are_answered_and_refused_in_the_words_of_their_route(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    plain = {"model": MODEL, "input": "w7 w8", "max_output_tokens": 3, "ignore_eos": True}
    asked = {
        "fine": plain,
        "stored": {**plain, "store": True},
        "too long": {"model": MODEL, "input": "w1 " * 5000},
        "too many": {**plain, "max_output_tokens": 10**6},
    }
    lines = [line(each, body, url=RESPONSES) for each, body in asked.items()]
    batch = await ended(client, await create(client, lines, endpoint=RESPONSES))
    assert (batch.endpoint, counts(batch)) == (RESPONSES, (4, 1, 3))
    answers = await read(client, batch.output_file_id)
    [event] = await gateway.events(1)
    assert event.endpoint == "batch.responses"
    answer = Response.model_validate(answers["fine"]["response"]["body"], strict=True)
    assert (answer.status, answer.id) == ("incomplete", f"resp_{event.id.hex}")
    assert answer.usage is not None
    assert (answer.usage.output_tokens, len(answer.output_text.split())) == (3, 3)
    errors = await read(client, batch.error_file_id)
    params = {each: errors[each]["response"]["body"]["error"]["param"] for each in errors}
    assert params == {"stored": "store", "too long": "input", "too many": "max_output_tokens"}
    assert await gateway.differences() == []


async def test_a_wrong_file_runs_nothing_and_names_every_line_at_fault(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    lines: list[Any] = [
        line("fine"),
        b"{nothing\n",
        line("fine"),
        b"\n",
        line("b", method="GET"),
        line("c", url=EMBEDDINGS),
        line("d", "no object"),
        {"method": "POST", "url": CHAT, "body": {}},
        line("e", extra=1),
        line(""),
        line("f" * 513),
    ]
    batch = await ended(client, await create(client, lines))
    assert (batch.status, counts(batch)) == ("failed", (0, 0, 0))
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert batch.errors is not None
    faults = [(each.line, each.param, each.code) for each in batch.errors.data or []]
    assert faults == [
        (2, None, "invalid_json_line"),
        (3, "custom_id", "duplicate_custom_id"),
        (5, "method", "invalid_method"),
        (6, "url", "mismatched_url"),
        (7, "body", "invalid_request"),
        (8, "custom_id", "invalid_request"),
        (9, "extra", "invalid_request"),
        (10, "custom_id", "invalid_request"),
        (11, "custom_id", "invalid_request"),
    ]
    assert gateway.core.seen == []


async def test_a_file_without_requests_fails(client: openai.AsyncOpenAI) -> None:
    batch = await ended(client, await create(client, [b"\n\n"]))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [each.code for each in batch.errors.data or []] == ["empty_file"]


async def test_a_line_that_is_wrong_becomes_an_error_and_the_others_run(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    asked = [
        line("fine"),
        line("unknown model", chat(model="nobody-nothing")),
        line("unknown field", chat(flavour="sweet")),
        line("wrong value", chat(temperature=9)),
        line("streamed", chat(stream=True)),
        line("hurried", chat(service_tier="priority")),
        line("too long", chat(max_tokens=10**6)),
    ]
    batch = await ended(client, await create(client, asked))
    assert (batch.status, counts(batch)) == ("completed", (7, 1, 6))
    assert list(await read(client, batch.output_file_id)) == ["fine"]
    errors = await read(client, batch.error_file_id)
    assert {each: code_of(errors, each) for each in errors} == {
        "unknown model": (404, "model_not_found"),
        "unknown field": (400, "invalid_request"),
        "wrong value": (400, "invalid_request"),
        "streamed": (400, "invalid_request"),
        "hurried": (400, "invalid_request"),
        "too long": (400, "context_length_exceeded"),
    }
    error = errors["unknown field"]["response"]["body"]["error"]
    assert (error["param"], errors["unknown field"]["error"]) == ("flavour", None)
    assert len(await gateway.events(1)) == 1
    assert await gateway.differences() == []


async def test_a_line_that_is_refused_for_a_while_waits_and_is_tried_again(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    await gateway.limit(requests_per_minute=600, request_burst=4)
    batch = await ended(client, await create(client, [line(f"{n}") for n in range(6)]))
    assert (batch.status, counts(batch)) == ("completed", (6, 6, 0))
    assert await gateway.differences() == []


async def test_a_batch_leaves_half_of_a_ceiling_to_whoever_waits(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    await gateway.limit(concurrent_requests=4)
    gateway.core.allow_steps(0)
    made = await create(client, [line(f"{n}") for n in range(8)])
    await until(lambda: len(gateway.core.running) == 2)
    asking = [asyncio.create_task(gateway.client.post(CHAT, json=chat("w1"))) for _ in range(2)]
    await until(lambda: len(gateway.core.running) == 4)
    priorities = sorted(each.priority for each in gateway.core.running.values())
    assert priorities == [0, 0, 20, 20]
    gateway.core.allow_steps(None)
    assert [(await each).status_code for each in asking] == [200, 200]
    assert (await ended(client, made)).status == "completed"


async def test_lines_of_a_spent_budget_are_errors_and_nothing_else_stops(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    await gateway.budget(25 * TOKEN_NANO, period="month")
    asked = [line(f"{n}", chat("w1 w2", max_tokens=8)) for n in range(5)]
    batch = await ended(client, await create(client, asked))
    assert batch.status == "completed"
    total, completed, failed = counts(batch)
    assert (total, completed + failed) == (5, 5)
    assert 1 <= completed < 5
    errors = await read(client, batch.error_file_id)
    assert {code_of(errors, each) for each in errors} == {(429, "insufficient_quota")}
    assert len(await gateway.events(completed)) == completed
    assert await gateway.differences() == []


async def test_a_batch_costs_less_where_its_price_says_so(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    rate = 3_000_001
    price = {"base_model": MODEL, "input_nano_per_million": rate, "output_nano_per_million": rate}
    made = await gateway.operator.post(
        "/admin/v1/prices", json={**price, "batch_discount_bp": HALF_BP}
    )
    assert made.json()["batch_discount_bp"] == HALF_BP, made.text
    batch = await ended(client, await create(client, [line("a", chat("w1 w2", max_tokens=100))]))
    body = (await read(client, batch.output_file_id))["a"]["response"]["body"]
    # Half of the rate is 1,500,000.5, which is rounded to the even number below.
    assert body["usage"]["cost_nano"] == 102 * 1_500_000 // 1_000_000
    answer = await gateway.client.post(CHAT, json=chat("w1 w2", max_tokens=100))
    assert answer.json()["usage"]["cost_nano"] == 306
    await gateway.events(2)
    report = await gateway.client.get("/v1/usage", params={"group_by": "endpoint"})
    assert [(row["endpoint"], row["cost_nano"]) for row in report.json()["rows"]] == [
        ("batch.chat.completions", 153),
        ("chat.completions", 306),
    ]
    assert await gateway.differences() == []


async def test_a_cancelled_batch_keeps_what_was_answered_and_bills_no_more(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    gateway.core.allow_steps(3)
    asked = [line(f"{n}", chat("w1", max_tokens=3 if n < 2 else 9)) for n in range(4)]
    made = await create(client, asked)
    async with asyncio.timeout(30):
        while counts(await client.batches.retrieve(made.id))[1] < 2:
            gateway.core.allow_steps(1)
            await asyncio.sleep(0.02)
    told = await client.batches.cancel(made.id)
    assert told.status in ("cancelling", "cancelled")
    batch = await ended(client, made)
    assert (batch.status, counts(batch)) == ("cancelled", (4, 2, 2))
    assert list(await read(client, batch.output_file_id)) == ["0", "1"]
    errors = await read(client, batch.error_file_id)
    assert {each["error"]["code"] for each in errors.values()} == {"batch_cancelled"}
    assert [each["response"] for each in errors.values()] == [None, None]
    gateway.core.allow_steps(None)
    assert len(await gateway.events(2)) == 2
    assert await gateway.differences() == []
    assert (await client.batches.cancel(made.id)).status == "cancelled"


async def test_what_is_not_done_in_time_expires(
    home: Home, gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    gateway.core.allow_steps(0)
    made = await create(client, [line("late")])
    await until(lambda: bool(gateway.core.running))
    await execute(home.superuser_url, "UPDATE batches SET expires_at = now()")
    batch = await ended(client, made)
    assert (batch.status, counts(batch)) == ("expired", (1, 0, 1))
    assert batch.expired_at is not None
    errors = await read(client, batch.error_file_id)
    assert errors["late"]["error"]["code"] == "batch_expired"
    with pytest.raises(openai.ConflictError, match="cannot be cancelled"):
        await client.batches.cancel(made.id)


@pytest.mark.parametrize("end", ["revoked", "suspended"])
async def test_a_batch_fails_with_the_key_that_created_it(gateway: Gateway, end: str) -> None:
    other = await gateway.key()
    key_id = (await gateway.client.get("/v1/keys")).json()["data"][-1]["id"]
    async with speaker_of(gateway, other) as client, speaker_of(gateway, gateway.client) as first:
        gateway.core.allow_steps(0)
        made = await create(client, [line(f"{n}") for n in range(40)])
        await until(lambda: bool(gateway.core.running))
        if end == "revoked":
            await gateway.client.delete(f"/v1/keys/{key_id}")
        else:
            await suspend(gateway, "suspended")
        gateway.core.allow_steps(None)
        async with asyncio.timeout(30):
            while True:
                async with gateway.database.as_worker() as session:
                    if (await session.get_one(Batch, row_id(made))).ended_at is not None:
                        break
                await asyncio.sleep(0.05)
        await suspend(gateway, "active")
        batch = await first.batches.retrieve(made.id)
        assert batch.status == "failed"
        assert batch.errors is not None
        [fault] = batch.errors.data or []
        expected = {"revoked": "invalid_api_key", "suspended": "permission_denied"}
        assert fault.code == expected[end]
        total, completed, failed = counts(batch)
        assert (total, completed + failed) == (40, 40)
        assert len(await read(first, batch.output_file_id)) == completed
        assert len(await gateway.events(completed)) == completed
        assert await gateway.differences() == []
    await other.aclose()


async def suspend(gateway: Gateway, status: str) -> None:
    answer = await gateway.operator.patch("/admin/v1/tenants/acme", json={"status": status})
    assert answer.is_success, answer.text


async def test_a_gateway_that_ends_leaves_the_rest_to_the_next_one(
    home: Home, database: Database, tmp_path: Path
) -> None:
    core = EchoCore()
    core.allow_steps(0)
    async with (
        whole_gateway(home, database, tmp_path, core=core) as gateway,
        speaker_of(gateway, gateway.client) as client,
    ):
        made = await create(client, [line(f"{n}") for n in range(4)])
        await until(lambda: len(core.running) == 4)
    async with database.as_worker() as session:
        row = await session.get_one(Batch, row_id(made))
    assert (row.status, row.claim_id) == ("in_progress", None)
    events = text("SELECT count(*) FROM usage_events")
    async with database.as_worker() as session:
        assert await session.scalar(events) == 0


async def test_whoever_lost_a_batch_writes_no_result_and_bills_nothing(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    gateway.core.allow_steps(0)
    made = await create(client, [line("a")])
    await until(lambda: bool(gateway.core.running))
    await change(gateway.database, made, claim_id=new_id())
    gateway.core.allow_steps(None)
    await until(lambda: not gateway.core.running)
    # Another lease that is over, so that it is done after all, once.
    await change(gateway.database, made, lease_until=text("now() - interval '1 second'"))
    batch = await ended(client, made)
    assert (batch.status, counts(batch)) == ("completed", (1, 1, 0))
    assert len(await gateway.events(1)) == 1
    assert await gateway.differences() == []


async def test_a_line_has_one_result_and_knows_its_own_again(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    gateway.core.allow_steps(0)
    made = await create(client, [line("a")])
    await until(lambda: bool(gateway.core.running))
    claims = Claims(gateway.database, instance_id=new_id())
    await change(gateway.database, made, lease_until=text("now() - interval '1 second'"))
    claim = await claims.claim(busy=())
    assert claim is not None
    result = Result(1, new_id(), is_error=False, line=b"{}\n")
    assert await claims.record(claim, result)
    assert await claims.record(claim, result)
    assert not await claims.record(claim, Result(1, new_id(), is_error=False, line=b"{}\n"))
    assert await claims.close(claim, outcome="completed", faults=())
    assert not await claims.record(claim, Result(2, new_id(), is_error=False, line=b"{}\n"))


async def test_batches_are_listed_page_by_page_the_newest_first(
    client: openai.AsyncOpenAI,
) -> None:
    file = await client.files.create(file=("a.jsonl", b"{}"), purpose="batch")
    made = [
        await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        for _ in range(5)
    ]
    listed = [each.id async for each in client.batches.list(limit=2)]
    assert listed == [each.id for each in reversed(made)]


NO_BATCHES: list[tuple[dict[str, Any], int, str]] = [
    ({"input_file_id": "file-nothing"}, 404, "input_file_id"),
    ({"endpoint": "/v1/moderations"}, 400, "endpoint"),
    ({"completion_window": "1h"}, 400, "completion_window"),
    ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "output_expires"),
    ({"metadata": {"a": 1}}, 400, "metadata"),
    ({"model": MODEL}, 400, "model"),
]


async def test_what_no_batch_can_be_is_refused_by_name(
    gateway: Gateway, subtests: pytest.Subtests
) -> None:
    for fields, status, param in NO_BATCHES:
        with subtests.test(f"{fields}"):
            answer = await gateway.client.post(
                "/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", b"{}")}
            )
            body = {
                "input_file_id": answer.json()["id"],
                "endpoint": CHAT,
                "completion_window": "24h",
            }
            refused = await gateway.client.post("/v1/batches", json={**body, **fields})
            assert refused.status_code == status, refused.text
            assert refused.json()["error"]["param"].startswith(param)
            assert (
                await gateway.client.get("/v1/batches/batch_1")
            ).status_code == httpx.codes.NOT_FOUND


async def test_a_place_is_given_to_the_tenant_that_has_fewer() -> None:
    slots, (busy, new) = Slots(2), (new_id(), new_id())
    entered: list[uuid.UUID] = []

    async def stay(tenant_id: uuid.UUID, until_s: asyncio.Event) -> None:
        async with slots.place(tenant_id):
            entered.append(tenant_id)
            await until_s.wait()

    first, rest = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for event in (first, rest, rest):
            tasks.create_task(stay(busy, event))
        await asyncio.sleep(0)
        tasks.create_task(stay(new, rest))
        await asyncio.sleep(0)
        first.set()
        await asyncio.sleep(0.01)
        assert entered == [busy, busy, new]
        rest.set()


async def test_lines_are_read_whole_wherever_the_pieces_end() -> None:
    content = b"\n".join(b"x" * size for size in (1, (1 << 20) + 7, 0, 3))

    async def read_bytes(begin: int, end: int) -> bytes:
        return content[begin:end]

    found = [(n, len(raw)) async for n, raw in read_lines(read_bytes, len(content))]
    assert found == [(1, 1), (2, (1 << 20) + 7), (4, 3)]


async def test_a_line_that_is_too_long_costs_no_more_memory_than_the_longest() -> None:
    num_bytes = 2 * MAX_LINE_BYTES

    async def read_bytes(begin: int, end: int) -> bytes:
        return b"x" * (end - begin)

    [(number, raw)] = [each async for each in read_lines(read_bytes, num_bytes)]
    assert MAX_LINE_BYTES < len(raw) <= MAX_LINE_BYTES + READ_BYTES
    judgement = Judgement(CHAT)
    judgement.add(number, raw)
    assert [fault.code for fault in judgement.faults] == ["line_too_long"]


def test_no_more_is_read_than_it_takes_to_refuse_a_file() -> None:
    full = Judgement(CHAT, num_lines=MAX_LINES)
    full.add(MAX_LINES + 1, b"{}")
    assert full.is_over
    assert [(fault.code, fault.line) for fault in full.faults] == [("too_many_lines", 50_001)]
    wrong = Judgement(CHAT)
    for number in range(1, MAX_FAULTS + 1):
        assert not wrong.is_over
        wrong.add(number, b"nothing")
    assert wrong.is_over


async def test_fields_that_are_told_of_instead_of_refused_are_told_in_the_line(
    home: Home, database: Database, tmp_path: Path
) -> None:
    async with (
        whole_gateway(home, database, tmp_path, reports_unknown_fields=True) as gateway,
        speaker_of(gateway, gateway.client) as client,
    ):
        asked = [line("a", chat(flavour="sweet")), line("b")]
        batch = await ended(client, await create(client, asked))
        answers = await read(client, batch.output_file_id)
    assert answers["a"]["response"]["ignored_fields"] == ["flavour"]
    assert "ignored_fields" not in answers["b"]["response"]
