"""Reports: the same numbers to everybody in every form, and they add up."""

import asyncio
import csv
import dataclasses
import datetime
import io
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from litestar import Litestar
from litestar.di import Provide
from litestar.exceptions import HTTPException
from sqlalchemy import select

from gateway.api import exports, statements
from gateway.api import tenant as tenant_routes
from gateway.api.billing import billing_router
from gateway.api.document import document_of
from gateway.api.usage import parse_group_by, parse_period
from gateway.api.wire import answer_error, answer_http_exception, answer_unexpected
from gateway.auth import Authenticator, create_key, guard, provide_principal
from gateway.billing.periods import close, month_end, month_of, settled_now
from gateway.billing.usage import Dimension, Period, Question, UsageRow, usage_rows
from gateway.billing.verify import prove
from gateway.billing.writers import open_writer
from gateway.cli import main
from gateway.database import Database
from gateway.errors import GatewayError, InvalidRequest
from gateway.journal import Journal, Opened, Settlement, survey
from gateway.ledger import Ledger, settle
from gateway.prices import bill
from gateway.tables import ApiKey, AuditEntry, GatewayInstance, UsageEvent, new_id
from tests.conftest import Home, execute
from tests.gateway.admin_plane import serve, tls
from tests.gateway.money import Shop, a_base_model, a_shop, frame_of

PEPPER = b"\x05" * 32
INSTANCE = uuid.UUID(int=99)
NOW = datetime.datetime(2026, 2, 14, 12, tzinfo=datetime.UTC)
ALL_TIME = Period(
    datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC),
    datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC),
)


@dataclass(frozen=True)
class Town:
    """Two tenants with usage, and the routes that report on them."""

    client: httpx.AsyncClient
    acme: Shop
    globex: Shop
    operator_key: str
    acme_key: str

    async def get(self, path: str, key: str, **parameters: str) -> httpx.Response:
        return await self.client.get(
            path, params=parameters, headers={"authorization": f"Bearer {key}"}
        )

    async def report(self, **parameters: str) -> httpx.Response:
        return await self.get("/admin/v1/billing/usage", self.operator_key, **parameters)

    async def usage(self, **parameters: str) -> httpx.Response:
        return await self.get("/v1/usage", self.acme_key, **parameters)


def a_settlement(shop: Shop, finished_at: datetime.datetime, **changes: Any) -> Settlement:
    counts = {"prompt_tokens": 10, "cached_tokens": 4, "completion_tokens": 7}
    counts.update({name: changes.pop(name) for name in counts if name in changes})
    opened: Opened = shop.request(INSTANCE, started_at=finished_at, **changes)
    return Settlement(opened, "stop", finished_at, bill(opened.price, **counts))


async def settle_all(database: Database, *settlements: Settlement) -> None:
    async with database.as_worker() as session:
        await settle(session, settlements)


@pytest.fixture
async def shops(database: Database) -> tuple[Shop, Shop]:
    async with database.as_worker() as session:
        session.add(GatewayInstance(id=INSTANCE, host="here", epoch=1))
    base = await a_base_model(database)
    return await a_shop(database, "acme", base), await a_shop(database, "globex", base)


@pytest.fixture
async def town(database: Database, shops: tuple[Shop, Shop]) -> AsyncIterator[Town]:
    acme, globex = shops
    async with database.as_worker() as session:
        keys = [
            (
                await create_key(
                    session, tenant_id=each, name=name, scopes=None, expires_at=None, pepper=PEPPER
                )
            )[1]
            for each, name in ((None, "operator"), (acme.tenant.id, "reader"))
        ]
    async with (
        serve(an_app(database)) as url,
        httpx.AsyncClient(base_url=url, verify=tls()) as client,
    ):
        yield Town(client, acme, globex, *keys)


def an_app(database: Database) -> Litestar:
    app = Litestar(
        [
            billing_router,
            exports.exports_router,
            statements.statements_router,
            statements.list_own,
            statements.show_own,
            tenant_routes.usage,
        ],
        guards=[guard],
        dependencies={
            "principal": Provide(provide_principal),
            "database": Provide(lambda: database, sync_to_thread=False),
        },
        exception_handlers={
            GatewayError: answer_error,
            HTTPException: answer_http_exception,
            Exception: answer_unexpected,
        },
        logging_config=None,
    )
    app.state.authenticator = Authenticator(database, {1: PEPPER})
    return app


def numbers_of(row: Any) -> tuple[int, ...]:
    names = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_nano")
    return tuple(int(row[name]) for name in names)


async def test_json_csv_and_the_tenants_own_report_have_the_same_numbers(
    database: Database, town: Town
) -> None:
    await settle_all(
        database,
        *(
            a_settlement(shop, NOW + datetime.timedelta(days=n % 3), completion_tokens=n + 1)
            for n in range(9)
            for shop in (town.acme, town.globex)
        ),
        a_settlement(town.acme, NOW, adapter_id=None, adapter_version_id=None),
    )
    span = {"from": "2026-02-01", "to": "2026-03-01", "group_by": "day,adapter,key"}

    as_json = (await town.report(tenant="acme", **span)).json()
    as_csv = await town.report(tenant="acme", format="csv", **span)
    own = (await town.usage(**span)).json()
    own_csv = await town.usage(format="csv", **span)

    assert as_json == own
    assert (as_json["from"], as_json["to"]) == ("2026-02-01T00:00:00Z", "2026-03-01T00:00:00Z")
    assert as_csv.text == own_csv.text
    assert as_csv.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(as_csv.text)))
    assert [numbers_of(row) for row in rows] == [numbers_of(row) for row in as_json["rows"]]
    for written, row in zip(rows, as_json["rows"], strict=True):
        assert {
            name: value or "" for name, value in row.items() if isinstance(value, str | None)
        } == {name: written[name] for name in ("day", "adapter", "key_id", "key_name")}
    assert {row["adapter"] for row in as_json["rows"]} == {"acme-sql", None}
    assert {(row["key_id"], row["key_name"]) for row in as_json["rows"]} == {
        (str(town.acme.key.id), "first")
    }
    assert numbers_of(as_json["totals"]) == tuple(
        sum(column) for column in zip(*(numbers_of(row) for row in rows), strict=True)
    )
    assert as_json["totals"]["requests"] == 10


async def test_an_operator_sees_all_tenants_and_a_tenant_itself_alone(
    database: Database, town: Town
) -> None:
    await settle_all(database, a_settlement(town.acme, NOW), a_settlement(town.globex, NOW))
    span = {"from": "2026-02-01", "to": "2026-03-01"}
    everybody = (await town.report(group_by="tenant,model", **span)).json()
    assert [(row["tenant"], row["model"]) for row in everybody["rows"]] == [
        ("acme", "tiny"),
        ("globex", "tiny"),
    ]
    assert (await town.usage(**span)).json()["totals"]["requests"] == 1


async def test_days_are_utc_days_and_the_end_is_not_part_of_the_report(
    database: Database, town: Town
) -> None:
    midnight = datetime.datetime(2026, 2, 2, tzinfo=datetime.UTC)
    just_before = midnight - datetime.timedelta(microseconds=1)
    await settle_all(
        database, a_settlement(town.acme, just_before), a_settlement(town.acme, midnight)
    )
    both = (await town.usage(**{"from": "2026-02-01", "to": "2026-02-03"})).json()
    assert [row["day"] for row in both["rows"]] == ["2026-02-01", "2026-02-02"]
    first = (await town.usage(**{"from": "2026-02-01", "to": "2026-02-02"})).json()
    assert [row["day"] for row in first["rows"]] == ["2026-02-01"]
    shifted = {"from": "2026-02-02T01:00:00+01:00", "to": "2026-02-02T01:00:01+01:00"}
    assert [row["day"] for row in (await town.usage(**shifted)).json()["rows"]] == ["2026-02-02"]


async def test_a_report_of_nothing_is_an_empty_one(town: Town) -> None:
    for group_by in ("", "day"):
        report = (await town.usage(group_by=group_by)).json()
        assert report["rows"] == []
        assert numbers_of(report["totals"]) == (0, 0, 0, 0, 0)
    assert (await town.usage(format="csv", group_by="day")).text == (
        "day,requests,prompt_tokens,cached_tokens,completion_tokens,cost_nano,engine_ns\r\n"
    )


async def test_a_wrong_parameter_is_named_with_what_would_be_right(town: Town) -> None:
    for parameters, param, words in (
        ({"group_by": "day,week"}, "group_by", "day, hour, adapter, version, key, model, user"),
        ({"time_zone": "Mars/Olympus"}, "time_zone", "Europe/Berlin"),
        ({"time_zone": "../etc/passwd"}, "time_zone", "Europe/Berlin"),
        ({"as_of": "2100-01-01"}, "as_of", "still to come"),
        ({"group_by": "tenant"}, "group_by", "'tenant'"),
        ({"group_by": "day,day"}, "group_by", "twice"),
        ({"from": "yesterday"}, "from", "RFC 3339"),
        ({"from": "2026-02-30"}, "from", "RFC 3339"),
        ({"to": "2026-02-01T00:00:00"}, "to", "RFC 3339"),
        ({"from": "2026-02-02", "to": "2026-02-02"}, "to", "later"),
        ({"groupby": "day"}, "groupby", "group_by"),
        ({"format": "xml"}, "format", "xml"),
    ):
        answer = await town.usage(**parameters)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param
        assert words in error["message"]


def test_the_api_document_shows_reports_and_prices(database: Database) -> None:
    document = document_of(an_app(database))
    names = [each["name"] for each in document["paths"]["/v1/usage"]["get"]["parameters"]]
    assert sorted(names) == ["as_of", "format", "from", "group_by", "time_zone", "to"]
    answer = document["paths"]["/admin/v1/billing/usage"]["get"]["responses"]["200"]["content"]
    assert "UsageReport" in str(answer)
    assert set(document["components"]["schemas"]["UsageRow"]["properties"]) >= {
        "day",
        "adapter",
        "key_id",
        "key_name",
        "cost_nano",
    }


async def test_parquet_has_the_rows_of_json(database: Database, town: Town) -> None:
    await settle_all(
        database,
        *(a_settlement(town.acme, NOW, completion_tokens=n, end_user=f"u{n}") for n in (1, 2)),
        a_settlement(town.acme, NOW, adapter_id=None, adapter_version_id=None),
    )
    groups = "day,hour,tenant,adapter,version,key,model,user"
    span = {"from": "2026-02-01", "to": "2026-03-01", "group_by": groups}
    told = (await town.report(**span)).json()["rows"]
    written = await town.report(**span, format="parquet")
    assert written.headers["content-type"] == "application/vnd.apache.parquet"
    rows = pyarrow.parquet.read_table(io.BytesIO(written.content)).to_pylist()
    assert msgspec.to_builtins(rows) == [dict(row) for row in told]
    assert {row["user"] for row in told} == {None, "u1", "u2"}


async def test_days_and_hours_are_those_of_the_time_zone(database: Database, town: Town) -> None:
    # Clocks go back from 3:00 to 2:00 in Berlin on that day, which has 25 hours.
    begin = datetime.datetime(2026, 10, 24, 22, tzinfo=datetime.UTC)
    hour = datetime.timedelta(hours=1)
    await settle_all(database, *(a_settlement(town.acme, begin + n * hour) for n in range(-1, 26)))
    asked = {"from": "2026-10-25", "to": "2026-10-26", "time_zone": "Europe/Berlin"}
    [day] = (await town.usage(**asked, group_by="day")).json()["rows"]
    assert (day["day"], day["requests"]) == ("2026-10-25", 25)
    hours = (await town.usage(**asked, group_by="hour")).json()["rows"]
    assert [row["requests"] for row in hours] == [1] * 25
    assert hours[0]["hour"] == "2026-10-24T22:00:00Z"


async def test_a_report_as_of_a_moment_stays_the_same(database: Database, town: Town) -> None:
    span = {"from": "2026-02-01", "to": "2026-03-01"}
    await settle_all(database, a_settlement(town.acme, NOW))
    moment = (await settled_now(database)).isoformat().replace("+00:00", "Z")
    before = (await town.usage(**span, as_of=moment)).json()
    await settle_all(database, a_settlement(town.acme, NOW))
    assert (await town.usage(**span, as_of=moment)).json() == before
    assert before["totals"]["requests"] == 1
    assert (await town.usage(**span)).json()["totals"]["requests"] == 2


async def test_what_was_settled_by_a_moment_is_visible_once_the_moment_is_known(
    database: Database, shops: tuple[Shop, Shop]
) -> None:
    """Whoever asks for the moment waits for a settlement that is under way."""
    async with database.as_worker() as session:
        await settle(session, [a_settlement(shops[0], NOW)])
        asking = asyncio.create_task(settled_now(database))
        done, _ = await asyncio.wait({asking}, timeout=0.2)
        assert not done
    moment = await asking
    async with database.as_worker() as session:
        assert (await session.scalars(select(UsageEvent.settled_at))).one() <= moment


async def test_engine_time_is_beside_its_revenue(database: Database, town: Town) -> None:
    settlement = a_settlement(town.acme, NOW)
    assert settlement.bill is not None
    charged = msgspec.structs.replace(settlement.bill, engine_ns=1_500_000_000)
    await settle_all(database, dataclasses.replace(settlement, bill=charged))
    report = (await town.report(**{"from": "2026-02-01", "to": "2026-03-01"})).json()
    assert report["totals"]["engine_ns"] == 1_500_000_000


async def test_a_report_of_many_rows_comes_whole(database: Database, town: Town) -> None:
    many = [a_settlement(town.acme, NOW, end_user=f"user-{n}") for n in range(2500)]
    for begin in range(0, len(many), 500):
        await settle_all(database, *many[begin : begin + 500])
    span = {"from": "2026-02-01", "to": "2026-03-01", "group_by": "user,version,key"}
    report = (await town.usage(**span)).json()
    assert (len(report["rows"]), report["totals"]["requests"]) == (2500, 2500)


async def test_an_unknown_tenant_is_not_an_empty_report(town: Town) -> None:
    answer = await town.report(tenant="nobody")
    assert answer.status_code == 404
    assert "nobody" in answer.json()["detail"]


async def test_a_tenants_key_reports_for_nobody_else(town: Town) -> None:
    answer = await town.get("/admin/v1/billing/usage", town.acme_key)
    assert answer.status_code == 403
    assert (await town.get("/admin/v1/prices", town.acme_key)).status_code == 403


async def test_a_price_changes_from_now_on_and_the_old_one_stays_on_record(town: Town) -> None:
    headers = {"authorization": f"Bearer {town.operator_key}"}
    body = {"base_model": "tiny", "input_nano_per_million": 5, "output_nano_per_million": 9}
    made = await town.client.post("/admin/v1/prices", json=body, headers=headers)
    assert made.status_code == 201, made.text
    assert made.json()["cached_input_nano_per_million"] == 5
    narrow = {**body, "adapter": "acme-sql", "cached_input_nano_per_million": 1}
    answer = await town.client.post("/admin/v1/prices", json=narrow, headers=headers)
    assert (answer.json()["tenant"], answer.json()["adapter"]) == ("acme", "acme-sql")

    listed = (await town.get("/admin/v1/prices", town.operator_key)).json()["prices"]

    assert [(row["adapter"], row["output_nano_per_million"], row["to"]) for row in listed] == [
        (None, 9, None),
        (None, 10_500_001, made.json()["from"]),
        ("acme-sql", 9, None),
    ]


async def test_a_tenant_reads_its_statements_and_nobody_elses(
    database: Database, town: Town
) -> None:
    june = datetime.datetime(2026, 6, 2, tzinfo=datetime.UTC)
    await settle_all(database, a_settlement(town.acme, june), a_settlement(town.globex, june))
    headers = {"authorization": f"Bearer {town.operator_key}"}
    account = {"bill_to": "Acme\nOne Street", "stripe_customer_id": "cus_1"}
    put = await town.client.put(
        "/admin/v1/tenants/acme/billing-account", json=account, headers=headers
    )
    assert put.json() == account
    closed = await town.client.post(
        "/admin/v1/billing/close", json={"month": "2026-06"}, headers=headers
    )
    assert closed.json() == {"statements": ["acme-2026-06", "globex-2026-06"]}

    [own] = (await town.get("/v1/statements", town.acme_key)).json()["data"]
    assert own["number"] == "acme-2026-06"
    told = (await town.get("/v1/statements/acme-2026-06", town.acme_key)).json()
    assert told["bill_to"] == account["bill_to"]
    assert sum(line["amount_nano"] for line in told["lines"]) == own["total_nano"]
    written = await town.get("/v1/statements/acme-2026-06", town.acme_key, format="csv")
    rows = list(csv.DictReader(io.StringIO(written.text)))
    assert [int(row["amount_nano"]) for row in rows] == [
        line["amount_nano"] for line in told["lines"]
    ]
    page = await town.get("/v1/statements/acme-2026-06", town.acme_key, format="html")
    assert page.headers["content-type"].startswith("text/html")
    assert "One Street" in page.text
    assert (await town.get("/v1/statements/globex-2026-06", town.acme_key)).status_code == 404
    everybody = await town.get("/admin/v1/billing/statements", town.operator_key, month="2026-06")
    assert len(everybody.json()["data"]) == 2
    async with database.as_worker() as session:
        actions = (await session.scalars(select(AuditEntry).order_by(AuditEntry.id))).all()
    assert {(row.action, row.subject) for row in actions} >= {
        ("billing_account.set", "acme"),
        ("billing.close", "acme-2026-06"),
    }


async def test_finance_gets_rows_that_add_up_to_the_statements(
    database: Database, town: Town
) -> None:
    june = datetime.datetime(2026, 6, 2, tzinfo=datetime.UTC)
    july = datetime.datetime(2026, 7, 2, tzinfo=datetime.UTC)
    headers = {"authorization": f"Bearer {town.operator_key}"}
    await settle_all(database, a_settlement(town.acme, june), a_settlement(town.globex, july))
    await town.client.post("/admin/v1/billing/close", json={"month": "2026-06"}, headers=headers)
    await settle_all(database, a_settlement(town.acme, june, completion_tokens=99))
    await town.client.post("/admin/v1/billing/close", json={"month": "2026-07"}, headers=headers)

    written = await town.get("/admin/v1/billing/exports/focus", town.operator_key, month="2026-07")
    rows = list(csv.DictReader(io.StringIO(written.text)))
    for tenant in ("acme", "globex"):
        number = f"{tenant}-2026-07"
        told = await town.get(f"/admin/v1/billing/statements/{number}", town.operator_key)
        ours = [row for row in rows if row["InvoiceId"] == number]
        billed = sum(Decimal(row["BilledCost"]) for row in ours)
        assert billed * 10**9 == told.json()["total_nano"]
    assert {row["ChargeClass"] for row in rows if row["BillingAccountId"] == "acme"} == {
        "Correction"
    }
    [output] = [row for row in rows if row["ConsumedQuantity"] == "99"]
    assert (output["PricingQuantity"], output["PricingUnit"]) == ("0.000099", "1000000 Tokens")
    assert output["ChargePeriodStart"] == "2026-06-01T00:00:00Z"


async def test_stripe_gets_the_same_events_however_often_they_are_exported(
    database: Database, town: Town, home: Home
) -> None:
    headers = {"authorization": f"Bearer {town.operator_key}"}
    account = {"stripe_customer_id": "cus_1"}
    path = "/admin/v1/tenants/acme/billing-account"
    await town.client.put(path, json=account, headers=headers)
    await settle_all(database, *(a_settlement(shop, NOW) for shop in (town.acme, town.globex)))
    hour = datetime.datetime.now(datetime.UTC).replace(minute=0, second=0, microsecond=0)
    before = hour - datetime.timedelta(hours=1)
    back = f"UPDATE usage_events SET settled_at = '{before:%Y-%m-%d %H:%M}Z'"  # noqa: S608
    await execute(home.superuser_url, f"SET session_replication_role = replica; {back}")

    asked = {"from": f"{before:%Y-%m-%dT%H}:00:00Z", "to": f"{hour:%Y-%m-%dT%H}:00:00Z"}
    export = "/admin/v1/billing/exports/stripe"
    written = (await town.get(export, town.operator_key, **asked)).text
    await settle_all(database, a_settlement(town.acme, NOW))
    assert (await town.get(export, town.operator_key, **asked)).text == written
    events = [msgspec.json.decode(line) for line in written.splitlines()]
    assert {event["event_name"]: event["payload"]["value"] for event in events} == {
        "manylora_input_tokens": "6",
        "manylora_cached_input_tokens": "4",
        "manylora_output_tokens": "7",
        "manylora_cost_nano": str(a_settlement(town.acme, NOW).bill.cost_nano),  # type: ignore[union-attr]  # it has one
    }
    assert {event["payload"]["stripe_customer_id"] for event in events} == {"cus_1"}
    assert len({event["identifier"] for event in events}) == 4
    assert {event["timestamp"] for event in events} == {int(before.timestamp())}
    running = {**asked, "to": f"{hour + datetime.timedelta(hours=1):%Y-%m-%dT%H}:00:00Z"}
    refused = await town.get(export, town.operator_key, **running)
    assert (refused.status_code, "still to come" in refused.text) == (400, True)


async def test_an_exported_log_is_checked_without_a_database(town: Town, tmp_path: Path) -> None:
    headers = {"authorization": f"Bearer {town.operator_key}"}
    path = "/admin/v1/tenants/acme/billing-account"
    for name in ("One", "Two", "Three"):
        await town.client.put(path, json={"bill_to": f"{name} ü"}, headers=headers)
    exported = await town.get("/admin/v1/audit", town.operator_key, tenant="acme")
    lines = exported.content.splitlines(keepends=True)
    file = tmp_path / "audit.jsonl"
    runner = CliRunner()

    file.write_bytes(exported.content)
    checked = runner.invoke(main, ["audit", "verify", str(file)])
    assert (checked.exit_code, "3 rows" in checked.output) == (0, True), checked.output
    for changed, words in (
        ([lines[0], lines[2]], "row 2 is missing"),
        ([lines[0], lines[1].replace(b"Two", b"Six"), lines[2]], "row 2, does not have its hash"),
        ([lines[0], b"{}\n"], "line 2 is no line of an audit log"),
    ):
        file.write_bytes(b"".join(changed))
        broken = runner.invoke(main, ["audit", "verify", str(file)])
        assert (broken.exit_code, words in broken.output) == (1, True), broken.output


async def test_a_price_change_is_on_record_with_what_was_before(
    database: Database, town: Town
) -> None:
    body = {"base_model": "tiny", "input_nano_per_million": 5, "output_nano_per_million": 9}
    headers = {"authorization": f"Bearer {town.operator_key}"}
    await town.client.post("/admin/v1/prices", json=body, headers=headers)
    body["storage_nano_per_gib_hour"] = 7
    await town.client.post("/admin/v1/prices", json=body, headers=headers)
    async with database.as_worker() as session:
        [_, last] = await session.scalars(select(AuditEntry).order_by(AuditEntry.number))
    assert last.details.pop("from").startswith("20")
    assert last.details == {
        "base_model": "tiny",
        "before": {"storage_nano_per_gib_hour": 0},
        "after": {"storage_nano_per_gib_hour": 7},
    }


async def test_a_wrong_price_is_refused_by_name(town: Town) -> None:
    body = {"base_model": "tiny", "input_nano_per_million": 5, "output_nano_per_million": 9}
    headers = {"authorization": f"Bearer {town.operator_key}"}
    changes: list[tuple[dict[str, Any], int, str]] = [
        ({"base_model": "huge"}, 404, "huge"),
        ({"tenant": "nobody"}, 404, "nobody"),
        ({"adapter": "globex-nothing"}, 404, "globex-nothing"),
        ({"adapter": "acme-sql", "tenant": "acme"}, 400, "not both"),
        ({"input_nano_per_million": -1}, 400, "input_nano_per_million"),
        ({"input_nano_per_million": 0.5}, 400, "input_nano_per_million"),
        ({"outptu": 1}, 400, "outptu"),
    ]
    for change, status, words in changes:
        answer = await town.client.post(
            "/admin/v1/prices", json={**body, **change}, headers=headers
        )
        assert (answer.status_code, words in answer.text) == (status, True), answer.text
    assert len((await town.get("/admin/v1/prices", town.operator_key)).json()["prices"]) == 1


def csv_of(row: UsageRow, dimension: Dimension) -> str:
    file = io.BytesIO()
    writer = open_writer("csv", file, Question(ALL_TIME, (dimension,)))
    writer.add([row])
    writer.finish()
    return file.getvalue().decode()


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1"])
def test_no_name_becomes_a_formula(name: str) -> None:
    row = UsageRow(
        key_id=uuid.UUID(int=1),
        key_name=name,
        requests=1,
        prompt_tokens=2,
        cached_tokens=0,
        completion_tokens=3,
        cost_nano=4,
        engine_ns=5,
    )
    [written] = csv.DictReader(io.StringIO(csv_of(row, Dimension.KEY), newline=""))
    assert written["key_name"] == f"'{name}"
    assert written["cost_nano"] == "4"


@given(st.text(max_size=20))
def test_any_name_survives_csv(name: str) -> None:
    row = UsageRow(
        adapter=name,
        requests=1,
        prompt_tokens=0,
        cached_tokens=0,
        completion_tokens=0,
        cost_nano=0,
        engine_ns=0,
    )
    [_, written] = csv.reader(io.StringIO(csv_of(row, Dimension.ADAPTER), newline=""))
    assert written[0] in (name, f"'{name}")


@pytest.mark.parametrize(
    ("since", "until", "expected"),
    [
        (None, None, ("2026-02-01T00:00", "2026-03-01T00:00")),
        ("2026-02-03", None, ("2026-02-03T00:00", "2026-03-01T00:00")),
        (
            "2026-02-03T04:05:06Z",
            "2026-02-03t05:00:00.5z",
            ("2026-02-03T04:05:06", "2026-02-03T05:00:00.5"),
        ),
        ("2026-02-03T00:00:00+02:00", "2026-02-04", ("2026-02-02T22:00", "2026-02-04T00:00")),
    ],
)
def test_a_period_is_read_in_utc(
    since: str | None, until: str | None, expected: tuple[str, str]
) -> None:
    period = parse_period(since, until, now=NOW)
    assert (period.since, period.until) == tuple(
        datetime.datetime.fromisoformat(each).replace(tzinfo=datetime.UTC) for each in expected
    )


def test_december_is_followed_by_january() -> None:
    period = parse_period(None, None, now=NOW.replace(month=12, day=31))
    assert period.until == datetime.datetime(2027, 1, 1, tzinfo=datetime.UTC)


def test_groups_come_in_the_order_asked_for() -> None:
    groups = parse_group_by("key,day", allowed=tuple(Dimension))
    assert groups == (Dimension.KEY, Dimension.DAY)
    with pytest.raises(InvalidRequest):
        parse_group_by("day,", allowed=tuple(Dimension))


@pytest.mark.parametrize("seed", range(4))
async def test_events_rollups_holds_and_reports_agree_after_any_history(
    database: Database, shops: tuple[Shop, Shop], tmp_path: Path, seed: int
) -> None:
    """Requests of two tenants in random order, with deaths, repetitions, and months that close.

    The month of the test counts as over each time, so what comes after is late.
    """
    now = datetime.datetime.now(datetime.UTC)
    over = month_end(month_of(now))
    chance = random.Random(seed)
    keys = await more_keys(database, shops)
    expected: Counter[tuple[str, uuid.UUID]] = Counter()
    for _ in range(4):
        journal = Journal.open(tmp_path, max_segment_bytes=2000)
        ledger = Ledger(database, journal)
        await ledger.start()
        for number in range(chance.randrange(1, 15)):
            shop = chance.choice(shops)
            key = chance.choice(keys[shop.tenant.slug])
            request = shop.request(
                journal.instance_id,
                api_key_id=key,
                is_streamed=chance.random() < 0.7,
                sequence_ids=(number,),
                **chance.choice([{}, {"adapter_id": None, "adapter_version_id": None}]),
            )
            expected[shop.tenant.slug, key] += live(journal, ledger, request, chance)
        await (ledger.stop() if chance.random() < 0.5 else kill(ledger))
        journal._segments.close(keep=True)
        journal._lock.release()
        if chance.random() < 0.5:
            await close(database, month_of(now), now=over)
        assert (await prove(database, survey(tmp_path))).mismatches == []
    journal = Journal.open(tmp_path)
    ledger = Ledger(database, journal)
    await ledger.start()
    await ledger.stop()
    journal.close()

    await close(database, month_of(now), now=over)
    await close(database, month_of(over), now=month_end(month_of(over)))
    proof = await prove(database, survey(tmp_path))
    assert (proof.mismatches, proof.num_pending) == ([], 0)
    assert proof.sums["statement_lines_nano"] == proof.sums["events_nano"]
    async with database.as_worker() as session:
        question = Question(ALL_TIME, (Dimension.TENANT, Dimension.KEY))
        rows = [row async for batch in usage_rows(session, question) for row in batch]
    found = {(row.tenant, row.key_id): row.cost_nano for row in rows}
    assert found == {key: cost for key, cost in expected.items() if cost}


def live(journal: Journal, ledger: Ledger, request: Opened, chance: random.Random) -> int:
    """One request's life up to wherever it ends; what it will cost in the end."""
    [sequence_id] = request.sequence_ids
    meter = journal.opened(request)
    for generated in range(1, chance.randrange(1, 6)):
        journal.on_frame(frame_of((sequence_id, generated), cached=3))
    if chance.random() < 0.2:
        meter.disconnect()
    if chance.random() < 0.3:
        return meter.usage().cost_nano if request.is_streamed else 0
    sent = chance.random() < 0.8
    return ledger.close(request.request_id, "stop", sent=sent).cost_nano


async def kill(ledger: Ledger) -> None:
    for task in ledger._tasks:
        task.cancel()
    await asyncio.gather(*ledger._tasks, return_exceptions=True)


async def more_keys(database: Database, shops: tuple[Shop, Shop]) -> dict[str, list[uuid.UUID]]:
    keys = {}
    for shop in shops:
        other = ApiKey(
            id=new_id(),
            public_id=new_id().hex,
            tenant_id=shop.tenant.id,
            name="second",
            secret_hmac=bytes(32),
            scopes=["inference"],
        )
        async with database.as_worker() as session:
            session.add(other)
        keys[shop.tenant.slug] = [shop.key.id, other.id]
    return keys
