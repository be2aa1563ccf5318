"""Facts about the operator's plane: who may use it, what it makes, and what it says to mistakes."""

import datetime
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from gateway.api.document import document_of
from gateway.audit import verify_chain
from gateway.database import Database
from gateway.tables import AuditEntry, Tenant
from tests.gateway.admin_plane import INFO, MODULES, Plane, admin_plane

TENANTS = "/admin/v1/tenants"
PLACES = {
    "tenant": "acme",
    "adapter": "sql",
    "key_id": "0" * 32,
    "upload_id": "0" * 32,
    "budget_id": "0" * 32,
    "webhook_id": "0" * 32,
    "file": "a.tar",
    "number": "1",
    "version": "1",
    "alias": "prod",
    "grantee": "all",
    "base_model": "base",
}


@pytest.fixture
async def plane(database: Database, tmp_path: Path) -> AsyncIterator[Plane]:
    async with admin_plane(database, tmp_path) as plane:
        await plane.make_tenant("acme")
        yield plane


async def audited(database: Database) -> list[tuple[str, str]]:
    async with database.as_worker() as session:
        rows = (await session.scalars(select(AuditEntry).order_by(AuditEntry.id))).all()
        for tenant_id in {row.tenant_id for row in rows}:
            assert await verify_chain(session, tenant_id) is None
    return [(row.action, row.subject) for row in rows]


# Who may.


def routes(openapi: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (method.upper(), path.format_map(PLACES))
        for path, methods in openapi["paths"].items()
        for method in methods
        if path.startswith("/admin/")
    ]


async def test_every_route_needs_an_operators_key(plane: Plane, subtests: pytest.Subtests) -> None:
    tenant_key = (await plane.make_key("acme"))["key"]
    document = document_of(plane.app)
    assert len(routes(document)) == 63
    for method, path in routes(document):
        with subtests.test(f"{method} {path}"):
            for key, status in (
                (None, 401),
                ("nonsense", 401),
                (tenant_key[:-1] + ("y" if tenant_key.endswith("x") else "x"), 401),
                (tenant_key.lower(), 401),
                (tenant_key, 403),
            ):
                headers = {"authorization": f"Bearer {key}" if key else ""}
                answer = await plane.client.request(method, path, headers=headers)
                assert answer.status_code == status, (key, answer.text)
                assert answer.headers["content-type"] == "application/problem+json"


async def test_the_document_describes_the_upload(plane: Plane) -> None:
    document = document_of(plane.app)
    upload = document["paths"]["/admin/v1/tenants/{tenant}/adapters/{adapter}/versions"]["post"]
    form = upload["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert "adapter_model.safetensors" in form["properties"]
    assert {"200", "201"} <= set(upload["responses"])


# Tenants.


async def test_a_tenant_is_made_shown_and_listed(plane: Plane, database: Database) -> None:
    answer = await plane.client.post(TENANTS, json={"slug": "globex", "name": "Globex Inc."})
    assert answer.status_code == 201
    made = answer.json()
    assert (made["tenant"], made["name"], made["status"]) == ("globex", "Globex Inc.", "active")
    assert (await plane.client.get(f"{TENANTS}/globex")).json() == made
    listed = (await plane.client.get(TENANTS)).json()["data"]
    assert [tenant["tenant"] for tenant in listed] == ["acme", "globex"]
    assert ("tenant.create", "globex") in await audited(database)


async def test_the_name_of_a_tenant_is_its_slug_unless_told(plane: Plane) -> None:
    assert (await plane.client.post(TENANTS, json={"slug": "globex"})).json()["name"] == "globex"


NO_TENANTS: list[tuple[dict[str, Any], int, str]] = [
    ({"slug": "Bad Slug"}, 400, "slug"),
    ({"slug": "-a"}, 400, "slug"),
    ({"slug": "x" * 33}, 400, "slug"),
    ({"slug": 5}, 400, "slug"),
    ({}, 400, "slug"),
    ({"slug": "ok", "budget": 5}, 400, "budget"),
    ({"slug": "ok", "name": ""}, 400, "name"),
    ({"slug": "acme"}, 409, "acme"),
    ({"slug": "tiny-base"}, 409, "tiny-base"),
]


async def test_a_tenant_that_cannot_be_is_refused_by_name(
    plane: Plane, database: Database, subtests: pytest.Subtests
) -> None:
    for body, status, named in NO_TENANTS:
        with subtests.test(f"{body}"):
            answer = await plane.client.post(TENANTS, json=body)
            assert answer.status_code == status, answer.text
            assert named in answer.json()["detail"]
            assert await audited(database) == [("tenant.create", "acme")]


async def test_malformed_json_is_refused(plane: Plane) -> None:
    answer = await plane.client.post(
        TENANTS, content=b'{"slug": ', headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400


async def test_what_is_not_there_is_not_found(plane: Plane, subtests: pytest.Subtests) -> None:
    for path in (
        "nobody",
        "nobody/keys",
        "nobody/adapters",
        "%00",
        "%00/adapters",
        "acme/adapters/%00",
        "acme/adapters/sql/versions",
    ):
        with subtests.test(path):
            answer = await plane.client.get(f"{TENANTS}/{path}")
            assert answer.status_code == 404
            assert answer.json()["code"] == "not_found"


async def test_the_keys_of_a_suspended_tenant_are_refused_until_it_is_active(
    plane: Plane, database: Database
) -> None:
    for status in ("suspended", "active", "closed"):
        answer = await plane.client.patch(f"{TENANTS}/acme", json={"status": status})
        assert (answer.status_code, answer.json()["status"]) == (200, status)
    answer = await plane.client.patch(f"{TENANTS}/acme", json={"status": "active"})
    assert answer.status_code == 409
    assert [action for action, _ in await audited(database)] == [
        "tenant.create",
        "tenant.suspended",
        "tenant.active",
        "tenant.closed",
    ]


async def test_a_status_that_is_none_is_refused(plane: Plane) -> None:
    answer = await plane.client.patch(f"{TENANTS}/acme", json={"status": "gone"})
    assert (answer.status_code, answer.json()["param"]) == (400, "status")


# Keys.


async def test_a_key_is_told_once(plane: Plane, database: Database) -> None:
    made = await plane.make_key("acme", name="ci")
    assert made["key"].startswith(made["prefix"] + "_")
    assert made["scopes"] == ["inference", "usage"]
    answer = await plane.client.get(f"{TENANTS}/acme/keys")
    secret = made.pop("key")
    assert answer.json() == {"data": [made]}
    assert secret not in answer.text
    async with database.as_worker() as session:
        [row] = (
            await session.scalars(select(AuditEntry).where(AuditEntry.action == "key.create"))
        ).all()
    assert secret not in str(row.details)


async def test_a_key_may_expire_and_have_fewer_scopes(plane: Plane) -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    made = await plane.make_key("acme", scopes=["usage"], expires_at=soon.isoformat())
    assert made["scopes"] == ["usage"]
    assert datetime.datetime.fromisoformat(made["expires_at"]) == soon


NO_KEYS: list[tuple[dict[str, Any], str]] = [
    ({"name": ""}, "name"),
    ({"name": "k", "scopes": ["operator"]}, "scopes"),
    ({"name": "k", "scopes": []}, "scopes"),
    ({"name": "k", "expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
    ({"name": "k", "expires_at": "soon"}, "expires_at"),
    ({"name": "k", "tenant_id": "x"}, "tenant_id"),
    ({}, "name"),
]


async def test_a_key_that_cannot_be_is_refused_by_name(
    plane: Plane, subtests: pytest.Subtests
) -> None:
    for fields, named in NO_KEYS:
        with subtests.test(f"{fields}"):
            answer = await plane.client.post(f"{TENANTS}/acme/keys", json=fields)
            assert answer.status_code == 400, answer.text
            assert named in answer.json()["detail"]
            assert (await plane.client.get(f"{TENANTS}/acme/keys")).json() == {"data": []}


async def test_a_revoked_key_opens_nothing(plane: Plane, database: Database) -> None:
    made = await plane.make_key("acme")
    path = f"{TENANTS}/acme/keys/{made['id']}"
    for _ in range(2):
        assert (await plane.client.delete(path)).status_code == 204
    [shown] = (await plane.client.get(f"{TENANTS}/acme/keys")).json()["data"]
    assert shown["revoked_at"] is not None
    answer = await plane.client.get(TENANTS, headers={"authorization": f"Bearer {made['key']}"})
    assert answer.status_code == 401
    assert "revoked" in answer.json()["detail"]
    assert (await audited(database)).count(("key.revoke", made["prefix"][3:])) == 2


async def test_a_key_of_another_tenant_is_not_found(plane: Plane) -> None:
    await plane.make_tenant("globex")
    made = await plane.make_key("acme")
    answer = await plane.client.delete(f"{TENANTS}/globex/keys/{made['id']}")
    assert answer.status_code == 404


# Adapters and base models.


async def test_an_adapter_is_shown_with_its_versions_until_it_is_deleted(
    plane: Plane, database: Database
) -> None:
    uploaded = (await plane.upload()).json()
    assert uploaded.pop("ignored_files") == []
    path = f"{TENANTS}/acme/adapters/sql"
    adapter = (await plane.client.get(path)).json()
    assert adapter["model"] == "acme-sql"
    assert adapter["base_model"] == "Tiny-Base"
    assert adapter["aliases"] == {"latest": 1}
    assert (await plane.client.get(f"{TENANTS}/acme/adapters")).json() == {
        "data": [adapter],
        "next": None,
    }
    assert (await plane.client.get(f"{path}/versions")).json() == {"data": [uploaded], "next": None}
    assert (await plane.client.delete(path)).status_code == 204
    for method, gone in (("GET", path), ("GET", f"{path}/versions"), ("DELETE", path)):
        assert (await plane.client.request(method, gone)).status_code == 404
    answer = await plane.upload()
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert [action for action, _ in await audited(database)] == [
        "tenant.create",
        "adapter.version.create",
        "adapter.alias.follow",
        "adapter.version.ready",
        "adapter.delete",
    ]


async def test_two_tenants_cannot_spell_the_same_model(plane: Plane) -> None:
    await plane.make_tenant("a")
    await plane.make_tenant("a-b")
    assert (await plane.upload(tenant="a", adapter="b-c")).status_code == 201
    answer = await plane.upload(tenant="a-b", adapter="c")
    assert answer.status_code == 409
    assert "'a-b-c'" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("tenant", "adapter", "status"),
    [("nobody", "sql", 404), ("acme", "Bad_Name", 400), ("acme", "x" * 33, 400)],
)
async def test_an_upload_to_nowhere_is_refused_before_it_is_read(
    plane: Plane, tenant: str, adapter: str, status: int
) -> None:
    answer = await plane.upload({"not-even": b"known"}, tenant=tenant, adapter=adapter)
    assert answer.status_code == status
    if status == 400:
        assert answer.json()["param"] == "adapter"
    assert plane.staged_files() == []


async def test_an_adapter_cannot_have_a_base_models_name(plane: Plane) -> None:
    await plane.make_tenant("tiny")
    answer = await plane.upload(tenant="tiny", adapter="base")
    assert answer.status_code == 409


async def test_base_models_are_listed_with_their_engines(plane: Plane) -> None:
    [shown] = (await plane.client.get("/admin/v1/base-models")).json()["data"]
    assert shown["base_model"] == "Tiny-Base"
    assert shown["max_lora_rank"] == INFO.max_lora_rank
    assert len(shown["replicas"]) == 1
    assert "shape" not in shown
    assert len(MODULES) == 4


async def test_what_fails_is_not_in_the_audit_log(plane: Plane, database: Database) -> None:
    await plane.upload({"adapter_config.json": b"{}"})
    await plane.client.post(TENANTS, json={"slug": "acme"})
    async with database.as_worker() as session:
        assert len((await session.scalars(select(Tenant))).all()) == 1
    assert await audited(database) == [("tenant.create", "acme")]
