"""Nothing that people say is kept unless they want it, and who is erased leaves the books whole."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from gateway.bookkeeping import keep_books
from gateway.database import Database
from gateway.tables import AuditEntry, EndUser, StoredContent, UsageEvent
from tests.conftest import Home, execute
from tests.gateway.whole_gateway import MODEL, Gateway, chat, whole_gateway

CHAT = "/v1/chat/completions"
POLICY = "/admin/v1/tenants/acme/retention"
ERASE = "/admin/v1/tenants/acme/erase"


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with whole_gateway(home, database, tmp_path) as running:
        yield running


async def ask(gateway: Gateway, text: str, **fields: Any) -> uuid.UUID:
    answer = await gateway.client.post(CHAT, json=chat(text, **fields))
    assert answer.status_code == httpx.codes.OK, answer.text
    return uuid.UUID(answer.headers["x-request-id"])


async def want_texts_kept(gateway: Gateway, days: int) -> None:
    answer = await gateway.operator.put(POLICY, json={"keep_days": days})
    assert answer.status_code == httpx.codes.OK, answer.text


async def contents(gateway: Gateway, number: int) -> list[StoredContent]:
    async with asyncio.timeout(30):
        while True:
            async with gateway.database.as_worker() as session:
                found = list((await session.scalars(select(StoredContent))).all())
            if len(found) >= number:
                return found
            await asyncio.sleep(0.02)


async def everything(home: Home, database: Database) -> str:
    """All rows of all tables that could hold a text, as text."""
    async with database.as_worker() as session:
        found = [
            str(list(await session.execute(select(table))))
            for table in (UsageEvent.__table__, EndUser.__table__, AuditEntry.__table__)
        ]
    return " ".join(found)


async def test_without_a_wish_nothing_that_was_said_is_in_any_table(
    gateway: Gateway, home: Home
) -> None:
    request_id = await ask(gateway, "a very secret word")
    await gateway.events(1)
    assert await contents(gateway, 0) == []
    assert "secret word" not in await everything(home, gateway.database)
    missing = await gateway.client.get(f"/v1/contents/{request_id}")
    assert missing.status_code == httpx.codes.NOT_FOUND


async def test_several_texts_of_a_request_are_kept_as_lists(gateway: Gateway) -> None:
    await want_texts_kept(gateway, 7)
    body = {"model": MODEL, "prompt": ["w1", "w2"], "max_tokens": 2}
    answer = await gateway.client.post("/v1/completions", json=body)
    assert answer.status_code == httpx.codes.OK, answer.text
    [kept] = await contents(gateway, 1)
    assert json.loads(kept.prompt) == ["w1", "w2"]
    assert json.loads(kept.completion) == [" w1 w1", " w2 w2"]


async def test_a_wish_keeps_prompts_and_completions_for_its_time(
    gateway: Gateway, home: Home
) -> None:
    await want_texts_kept(gateway, 7)
    whole = await ask(gateway, "Hello", user="ann")
    streamed = await ask(gateway, "Hi \x00 there", stream=True)
    await contents(gateway, 2)
    told = (await gateway.client.get(f"/v1/contents/{whole}")).json()
    assert (told["user"], told["prompt"]) == ("ann", '[{"role":"user","content":"Hello"}]')
    assert told["completion"]
    assert (await gateway.client.get(f"/v1/contents/{streamed}")).json()["completion"]

    long_ago = "UPDATE stored_contents SET expires_at = now() - interval '1 second'"
    await execute(home.superuser_url, long_ago)
    gone = await gateway.client.get(f"/v1/contents/{whole}")
    assert gone.status_code == httpx.codes.NOT_FOUND
    [event, *_] = await gateway.events(2)
    await keep_books(gateway.database, now=event.finished_at)
    assert await contents(gateway, 0) == []


async def test_who_may_read_bills_may_not_read_what_was_said(gateway: Gateway) -> None:
    await want_texts_kept(gateway, 7)
    request_id = await ask(gateway, "Hello")
    await contents(gateway, 1)
    async with await gateway.key(role="billing") as accountant:
        refused = await accountant.get(f"/v1/contents/{request_id}")
    assert refused.status_code == httpx.codes.FORBIDDEN


async def test_a_wish_that_ends_deletes_what_is_kept(gateway: Gateway) -> None:
    await want_texts_kept(gateway, 7)
    await ask(gateway, "Hello")
    await contents(gateway, 1)
    await gateway.operator.put(POLICY, json={"keep_days": None})
    assert await contents(gateway, 0) == []
    assert (await gateway.operator.get(POLICY)).json() == {"keep_days": None}


async def test_an_erased_user_leaves_no_name_and_the_same_sums(
    gateway: Gateway, home: Home
) -> None:
    await want_texts_kept(gateway, 7)
    for user in ("ann.smith", "ann.smith", "bob"):
        await ask(gateway, f"I am {user}", user=user)
    before = sorted(event.cost_nano for event in await gateway.events(3))
    await contents(gateway, 3)

    erased = await gateway.operator.post(ERASE, json={"user": "ann.smith"})

    assert erased.json() == {"num_end_users": 1, "num_contents": 2, "num_files": 0}
    assert "ann.smith" not in await everything(home, gateway.database)
    assert [row.end_user for row in await contents(gateway, 1)] == ["bob"]
    assert sorted(event.cost_nano for event in await gateway.events(3)) == before
    report = (await gateway.client.get("/v1/usage", params={"group_by": "user"})).json()
    assert [(row["user"], row["requests"]) for row in report["rows"]] == [(None, 2), ("bob", 1)]
    assert await gateway.differences() == []
    again = await gateway.operator.post(ERASE, json={"user": "ann.smith"})
    assert again.status_code == httpx.codes.NOT_FOUND


async def test_a_tenant_is_erased_once_it_is_closed(gateway: Gateway, home: Home) -> None:
    await want_texts_kept(gateway, 7)
    await ask(gateway, "Hello", user="ann.smith")
    await gateway.events(1)
    await contents(gateway, 1)
    refused = await gateway.operator.post(ERASE, json={"user": None})
    assert (refused.status_code, "close it first" in refused.text) == (409, True)
    await gateway.operator.patch("/admin/v1/tenants/acme", json={"status": "closed"})
    erased = await gateway.operator.post(ERASE, json={"user": None})
    assert erased.json() == {"num_end_users": 1, "num_contents": 1, "num_files": 0}
    assert "ann.smith" not in await everything(home, gateway.database)
    assert (await gateway.operator.get("/admin/v1/tenants/acme")).json()["name"] == "erased"
    assert await gateway.differences() == []


async def test_a_user_that_no_report_could_show_is_refused(gateway: Gateway) -> None:
    for user in ("a\x00b", "a\nb", "x" * 513):
        refused = await gateway.client.post(CHAT, json=chat(user=user))
        assert refused.status_code == httpx.codes.BAD_REQUEST
        assert "user" in refused.json()["error"]["message"]
