"""Facts about how operators set ceilings, budgets and webhooks: what stands, and what is told."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import select

from gateway.cli import main
from gateway.database import Database
from gateway.tables import AuditEntry
from tests.gateway.admin_plane import Plane, admin_plane

ACME = "/admin/v1/tenants/acme"
NOTHING = {
    "requests_per_minute": None,
    "request_burst": None,
    "tokens_per_minute": None,
    "token_burst": None,
    "concurrent_requests": None,
    "queue_time_ms": None,
}


@pytest.fixture
async def plane(database: Database, tmp_path: Path) -> AsyncIterator[Plane]:
    async with admin_plane(database, tmp_path) as plane:
        await plane.make_tenant("acme")
        yield plane


async def audited(database: Database, action: str) -> list[dict[str, Any]]:
    async with database.as_worker() as session:
        query = select(AuditEntry).where(AuditEntry.action == action).order_by(AuditEntry.number)
        return [row.details for row in await session.scalars(query)]


async def test_ceilings_are_set_replaced_and_taken_away(plane: Plane, database: Database) -> None:
    key = await plane.make_key("acme")
    assert (await plane.upload()).status_code == 201
    for path in (ACME, f"{ACME}/keys/{key['id']}", f"{ACME}/adapters/sql"):
        assert (await plane.client.get(f"{path}/limits")).json() == NOTHING
        for ceilings in ({"requests_per_minute": 60, "queue_time_ms": 9}, {"token_burst": 1}, {}):
            answer = await plane.client.put(f"{path}/limits", json=ceilings)
            if "token_burst" in ceilings:
                assert answer.status_code == 400
                assert answer.json()["param"] == "token_burst"
                continue
            assert answer.status_code == 200, answer.text
            assert (await plane.client.get(f"{path}/limits")).json() == NOTHING | ceilings
    first, second, *_ = await audited(database, "limits.set")
    assert first == {"before": {}, "after": {"requests_per_minute": 60, "queue_time_ms": 9}}
    assert second == {"before": first["after"], "after": {}}


NO_CEILINGS: list[tuple[dict[str, int], str]] = [
    ({"requests_per_minute": 0}, "requests_per_minute"),
    ({"tokens_per_minute": -1}, "tokens_per_minute"),
    ({"tokens_per_minute": 10**11}, "tokens_per_minute"),
    ({"requests_per_second": 1}, "requests_per_second"),
]


async def test_a_ceiling_that_cannot_be_meant_is_refused_by_name(
    plane: Plane, subtests: pytest.Subtests
) -> None:
    for body, param in NO_CEILINGS:
        with subtests.test(f"{body}"):
            answer = await plane.client.put(f"{ACME}/limits", json=body)
            assert answer.status_code == 400
            assert param in answer.json()["param"]


async def test_whose_ceilings_they_are_must_exist(plane: Plane) -> None:
    await plane.make_tenant("globex")
    key = await plane.make_key("globex")
    for path in (
        "/admin/v1/tenants/nobody",
        f"{ACME}/keys/{key['id']}",
        f"{ACME}/adapters/none",
        f"{ACME}/adapters/%00",
    ):
        answer = await plane.client.put(f"{path}/limits", json={"requests_per_minute": 1})
        assert answer.status_code == 404, path


async def test_a_budget_is_made_changed_and_removed(plane: Plane, database: Database) -> None:
    body = {"cap_nano": 10**9, "period": "week", "time_zone": "Europe/Berlin"}
    made = (await plane.client.post(f"{ACME}/budgets", json=body)).json()
    assert made["alert_percents"] == [50, 80, 100]
    assert (made["spent_nano"], made["held_nano"]) == (0, 0)
    assert (await plane.client.post(f"{ACME}/budgets", json=body)).status_code == 409
    path = f"{ACME}/budgets/{made['id']}"
    changed = await plane.client.patch(path, json={"cap_nano": 5, "alert_percents": [90, 10, 90]})
    assert changed.json() == made | {"cap_nano": 5, "alert_percents": [10, 90]}
    assert (await plane.client.get(f"{ACME}/budgets")).json()["data"] == [changed.json()]
    assert (await plane.client.delete(path)).status_code == 204
    assert (await plane.client.get(f"{ACME}/budgets")).json()["data"] == []
    assert (await plane.client.delete(path)).status_code == 404
    [change] = await audited(database, "budget.change")
    assert (change["before"]["cap_nano"], change["after"]["cap_nano"]) == (10**9, 5)


NO_BUDGETS: list[tuple[dict[str, Any], str]] = [
    ({"cap_nano": -1}, "cap_nano"),
    ({"cap_nano": 1.5}, "cap_nano"),
    ({"kind": "firm"}, "kind"),
    ({"period": "year"}, "period"),
    ({"time_zone": "Nowhere"}, "time_zone"),
    ({"alert_percents": [0]}, "alert_percents"),
]


async def test_a_budget_that_cannot_be_meant_is_refused_by_name(
    plane: Plane, subtests: pytest.Subtests
) -> None:
    for fields, param in NO_BUDGETS:
        with subtests.test(f"{fields}"):
            answer = await plane.client.post(f"{ACME}/budgets", json={"cap_nano": 1, **fields})
            assert answer.status_code == 400
            assert param in answer.json()["param"]


async def test_the_budget_of_a_key_needs_a_key_of_that_tenant(plane: Plane) -> None:
    await plane.make_tenant("globex")
    key = await plane.make_key("globex")
    body = {"cap_nano": 1, "key_id": key["id"]}
    assert (await plane.client.post(f"{ACME}/budgets", json=body)).status_code == 404


async def test_the_secret_of_a_webhook_is_told_once(plane: Plane, database: Database) -> None:
    body = {"url": "https://alerts.example/hook", "tenant": "acme"}
    made = (await plane.client.post("/admin/v1/webhooks", json=body)).json()
    assert made.pop("secret").startswith("whsec_")
    assert (await plane.client.get("/admin/v1/webhooks")).json()["data"] == [made]
    path = f"/admin/v1/webhooks/{made['id']}"
    assert (await plane.client.get(f"{path}/deliveries")).json() == {"data": []}
    assert (await plane.client.delete(path)).status_code == 204
    assert (await plane.client.get(f"{path}/deliveries")).status_code == 404
    assert await audited(database, "webhook.create") == [{"url": body["url"]}]


async def test_an_operator_gives_a_key_a_new_secret(plane: Plane, database: Database) -> None:
    key = await plane.make_key("acme", role="billing", allowed_models=["acme-*"])
    assert (key["role"], key["scopes"]) == ("billing", ["billing", "usage"])
    path = f"{ACME}/keys/{key['id']}/rotate"
    renewed = (await plane.client.post(path, json={"overlap_s": 60})).json()
    assert renewed["prefix"] == key["prefix"]
    assert renewed["key"] != key["key"]
    assert renewed["old_secret_expires_at"] is not None
    refused = await plane.client.post(path, json={"overlap_s": -1})
    assert refused.status_code == 400
    assert refused.json()["param"] == "overlap_s"
    assert await audited(database, "key.rotate") == [{"name": "test", "overlap_s": 60}]


def test_a_range_of_proxies_that_cannot_be_is_refused_at_the_start() -> None:
    result = CliRunner().invoke(main, ["serve", "--model", "m", "--trusted-proxy", "10.0.0.1/8"])
    assert result.exit_code == 2
    assert "--trusted-proxy" in result.output
