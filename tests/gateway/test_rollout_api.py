"""Facts about rollout, sharing and deletion as operators do them, over HTTP."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from gateway.database import Database
from gateway.tables import AuditEntry
from tests.gateway.admin_plane import Plane, adapter_files, admin_plane

TENANT = "/admin/v1/tenants/acme"
ADAPTER = f"{TENANT}/adapters/sql"
PROD = f"{ADAPTER}/aliases/prod"


@pytest.fixture
async def plane(database: Database, tmp_path: Path) -> AsyncIterator[Plane]:
    """The plane with a tenant whose adapter has versions 1 and 2, and another tenant."""
    async with admin_plane(database, tmp_path) as plane:
        for slug in ("acme", "globex"):
            await plane.make_tenant(slug)
        for seed in (1, 2):
            assert (await plane.upload(adapter_files(seed=seed))).status_code == 201
        yield plane


def told(answer: httpx.Response, *fields: str) -> tuple[Any, ...]:
    return answer.status_code, *(answer.json()[field] for field in fields)


# Aliases.


async def test_an_alias_is_moved_split_looked_back_at_and_rolled_back(plane: Plane) -> None:
    client = plane.client
    made = await client.put(PROD, json={"version": 1, "reason": "first"})
    assert told(made, "alias", "version", "canary", "revision") == (200, "prod", 1, None, 1)
    canary = {"version": 2, "percent": 10}
    split = await client.put(PROD, json={"version": 1, "canary": canary, "expected_version": 1})
    assert told(split, "version", "canary", "revision") == (200, 1, canary, 2)
    assert (await client.get(PROD)).json() == split.json()
    listed = (await client.get(f"{ADAPTER}/aliases")).json()["data"]
    assert [each["alias"] for each in listed] == ["latest", "prod"]
    back = await client.post(f"{PROD}/rollback")
    assert told(back, "version", "canary", "revision") == (200, 1, None, 3)
    history = (await client.get(f"{PROD}/history")).json()
    assert [(each["revision"], each["restored_revision"]) for each in history["data"]] == [
        (3, 1),
        (2, None),
        (1, None),
    ]
    assert history["data"][2]["before"] is None
    assert history["data"][1]["after"] == {"version": 1, "canary": canary}
    assert history["data"][2]["actor_key_id"] is not None
    again = await client.post(f"{PROD}/rollback", json={"to_revision": 2, "reason": "it was fine"})
    assert told(again, "canary", "revision") == (200, canary, 4)


async def test_the_loser_of_a_move_is_told_where_the_alias_is(plane: Plane) -> None:
    await plane.client.put(PROD, json={"version": 1})
    answer = await plane.client.put(PROD, json={"version": 2, "expected_revision": 7})
    assert told(answer, "code", "param") == (409, "conflict", "expected_revision")
    assert "revision 1, version 1" in answer.json()["detail"]


NO_MOVES: list[tuple[dict[str, Any], int, str]] = [
    ({}, 400, "version"),
    ({"version": "one"}, 400, "version"),
    ({"version": 1, "expected_revision": 2**60}, 400, "expected_revision"),
    ({"version": 9}, 404, "version 9"),
    ({"version": 1, "weight": 5}, 400, "weight"),
    ({"version": 1, "canary": {"version": 2, "percent": 100}}, 400, "canary.percent"),
    ({"version": 1, "canary": {"version": 2, "percent": 1.5}}, 400, "percent"),
    ({"version": 1, "canary": {"version": 1, "percent": 5}}, 400, "canary.version"),
    ({"version": 1, "expected_revision": 3}, 409, "no alias"),
]


async def test_a_move_that_cannot_be_is_refused_by_name(
    plane: Plane, subtests: pytest.Subtests
) -> None:
    for body, status, named in NO_MOVES:
        with subtests.test(f"{body}"):
            answer = await plane.client.put(PROD, json=body)
            assert answer.status_code == status, answer.text
            assert named in answer.json()["detail"]
            assert (await plane.client.get(PROD)).status_code == 404


async def test_the_default_alias_is_changed_and_kept(plane: Plane) -> None:
    answer = await plane.client.patch(ADAPTER, json={"default_alias": "prod"})
    assert told(answer, "param") == (409, "default_alias")
    await plane.client.put(PROD, json={"version": 1})
    answer = await plane.client.patch(ADAPTER, json={"default_alias": "prod"})
    assert told(answer, "default_alias", "aliases") == (200, "prod", {"latest": 2, "prod": 1})
    assert (await plane.client.delete(PROD)).status_code == 409
    await plane.client.patch(ADAPTER, json={"default_alias": "latest"})
    assert (await plane.client.delete(PROD)).status_code == 204
    assert (await plane.client.get(PROD)).status_code == 404
    assert len((await plane.client.get(f"{PROD}/history")).json()["data"]) == 2


# Grants.


async def test_an_adapter_is_shared_and_not_any_more(plane: Plane) -> None:
    path = f"{ADAPTER}/grants"
    made = await plane.client.put(f"{path}/globex")
    assert told(made, "grantee") == (200, "globex")
    await plane.client.put(f"{path}/all")
    assert (await plane.client.put(f"{path}/globex")).json() == made.json()
    listed = (await plane.client.get(path)).json()["data"]
    assert [each["grantee"] for each in listed] == ["globex", "all"]
    assert (await plane.client.delete(f"{path}/all")).status_code == 204
    assert (await plane.client.delete(f"{path}/all")).status_code == 404
    assert (await plane.client.put(f"{path}/nobody")).status_code == 404
    assert (await plane.client.put(f"{path}/acme")).status_code == 400


# Deleting.


async def test_an_adapter_is_deleted_restored_and_purged(plane: Plane) -> None:
    client = plane.client
    assert len(plane.stored_adapters()) == 2
    await client.delete(ADAPTER)
    assert (await client.get(f"{TENANT}/adapters")).json() == {"data": [], "next": None}
    [gone] = (await client.get(f"{TENANT}/adapters?deleted=true")).json()["data"]
    assert (gone["adapter"], gone["purged_at"]) == ("sql", None)
    assert (await client.post(f"{ADAPTER}/restore")).status_code == 204
    assert (await client.post(f"{ADAPTER}/purge")).status_code == 409
    await client.delete(ADAPTER)
    assert (await client.post(f"{ADAPTER}/purge")).status_code == 204
    assert plane.stored_files() == []
    assert (await client.post(f"{ADAPTER}/restore")).status_code == 409
    assert (await plane.upload()).status_code == 409
    [gone] = (await client.get(f"{TENANT}/adapters?deleted=true")).json()["data"]
    assert gone["purged_at"] is not None
    tombstones = (await client.get(f"{ADAPTER}/versions?deleted=true")).json()["data"]
    assert [each["number"] for each in tombstones] == [2, 1]


async def test_a_version_is_deleted_restored_and_purged(plane: Plane) -> None:
    client, path = plane.client, f"{ADAPTER}/versions/1"
    assert told(await client.get(path), "number", "deleted_at") == (200, 1, None)
    assert (await client.delete(path)).status_code == 204
    assert (await client.delete(path)).status_code == 404
    assert (await client.get(path)).json()["deleted_at"] is not None
    assert len((await client.get(f"{ADAPTER}/versions")).json()["data"]) == 1
    assert (await client.post(f"{path}/restore")).status_code == 204
    await client.delete(path)
    assert (await client.post(f"{path}/purge")).status_code == 204
    assert len(plane.stored_adapters()) == 1
    assert (await client.post(f"{path}/restore")).status_code == 409
    for number in ("0", "99", "99999999999999999999"):
        assert (await client.get(f"{ADAPTER}/versions/{number}")).status_code == 404


# Lists.


async def test_lists_come_in_parts_without_gaps(plane: Plane) -> None:
    for name in ("aa", "zz", "mm"):
        await plane.upload(adapter=name)
    for path, field, everything in (
        (f"{TENANT}/adapters", "adapter", ["aa", "mm", "sql", "zz"]),
        (f"{ADAPTER}/versions", "number", [2, 1]),
        (f"{ADAPTER}/aliases/latest/history", "revision", [2, 1]),
    ):
        for limit in (1, 2, 3):
            seen: list[Any] = []
            after: Any = None
            while True:
                params = {"limit": limit, **({} if after is None else {"after": after})}
                part = (await plane.client.get(path, params=params)).json()
                assert len(part["data"]) <= limit
                seen += [each[field] for each in part["data"]]
                if (after := part["next"]) is None:
                    break
            assert seen == everything


NO_PARTS: list[str] = ["limit=0", "limit=1001", "limit=x", "deleted=perhaps"]


async def test_a_part_that_cannot_be_is_refused_by_name(
    plane: Plane, subtests: pytest.Subtests
) -> None:
    for query in NO_PARTS:
        with subtests.test(f"{query}"):
            answer = await plane.client.get(f"{TENANT}/adapters?{query}")
            assert told(answer, "param") == (400, query.partition("=")[0])


async def test_a_cursor_that_cannot_be_is_refused_by_name(plane: Plane) -> None:
    for path, after in (("adapters", "%00"), ("adapters/sql/versions", "99999999999999999999")):
        answer = await plane.client.get(f"{TENANT}/{path}?after={after}")
        assert told(answer, "param") == (400, "after")


# What a tenant may.


async def test_quotas_and_base_model_access_are_set_and_shown(
    plane: Plane, database: Database
) -> None:
    shown = (await plane.client.get(TENANT)).json()
    assert (shown["max_adapters"], shown["base_model_access"]) == (None, {})
    body: dict[str, Any] = {
        "max_adapters": 5,
        "max_adapter_bytes": 2**40,
        "base_model_access": {"Tiny-Base": "withheld"},
    }
    changed = await plane.client.patch(TENANT, json=body)
    assert {field: changed.json()[field] for field in body} == body
    assert changed.json()["status"] == "active"
    assert (await plane.client.get(TENANT)).json() == changed.json()
    listed = (await plane.client.get("/admin/v1/tenants")).json()["data"]
    assert [each["base_model_access"] for each in listed] == [{"Tiny-Base": "withheld"}, {}]
    body = {"max_adapters": None, "base_model_access": {"Tiny-Base": "allowed"}}
    changed = await plane.client.patch(TENANT, json=body)
    assert told(changed, "max_adapters", "max_adapter_bytes") == (200, None, 2**40)
    assert changed.json()["base_model_access"] == {}
    async with database.as_worker() as session:
        rows = (await session.scalars(select(AuditEntry).order_by(AuditEntry.number))).all()
    actions = [(row.action, row.details) for row in rows if row.action.startswith("tenant.")]
    assert (
        "tenant.quotas",
        {
            "before": {"max_adapters": None, "max_adapter_bytes": None},
            "after": {"max_adapters": 5, "max_adapter_bytes": 2**40},
        },
    ) in actions
    assert (
        "tenant.base_model_access",
        {"before": {"Tiny-Base": "allowed"}, "after": {"Tiny-Base": "withheld"}},
    ) in actions


NO_CHANGES: list[tuple[dict[str, Any], int, str]] = [
    ({}, 400, "max_adapters"),
    ({"max_adapters": -1}, 400, "max_adapters"),
    ({"max_adapters": 2**31}, 400, "max_adapters"),
    ({"max_adapter_bytes": "five"}, 400, "max_adapter_bytes"),
    ({"status": None}, 400, "status"),
    ({"base_model_access": {"Tiny-Base": "hidden"}}, 400, "base_model_access"),
    ({"base_model_access": {"other": "withheld"}}, 404, "other"),
    ({"max_adapters": 1, "base_model_access": {"other": "withheld"}}, 404, "other"),
]


async def test_a_change_of_a_tenant_that_cannot_be_changes_nothing(
    plane: Plane, subtests: pytest.Subtests
) -> None:
    for body, status, named in NO_CHANGES:
        with subtests.test(f"{body}"):
            before = (await plane.client.get(TENANT)).json()
            answer = await plane.client.patch(TENANT, json=body)
            assert answer.status_code == status, answer.text
            assert named in answer.text
            assert (await plane.client.get(TENANT)).json() == before
