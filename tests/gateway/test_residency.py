"""Facts about warm and pinned adapters: over a real link, on an engine that echoes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.client import EngineLink
from engine.protocol import ProbeReport
from gateway.base_models import BaseModels
from gateway.database import Database
from gateway.residency import Residency
from gateway.routing import Replica, Router
from tests.engine.echo_engine import Engine, engine, link, short_folder, until
from tests.gateway.admin_plane import INFO, Plane, adapter_files, admin_plane, report
from tests.gateway.test_admin_api import audited

TENANT = "/admin/v1/tenants/acme"
FINGERPRINT = "1-float32-0123456789abcdef"


@dataclass(frozen=True)
class Town:
    """An admin plane with one engine, which has three slots to pin adapters in."""

    plane: Plane
    echo: Engine

    async def order(self, what: str, version: str = "1", **body: Any) -> httpx.Response:
        return await self.plane.client.post(
            f"{TENANT}/adapters/sql/versions/{version}/{what}", json=body or None
        )

    async def publish(self, seed: int, *, adapter: str = "sql") -> str:
        answer = await self.plane.upload(adapter_files(seed=seed), adapter=adapter)
        assert answer.status_code == 201, answer.text
        digest: str = answer.json()["weights_digest"]
        return digest


async def certifying_probe(digest: str) -> ProbeReport:
    return report(digest, fingerprint=FINGERPRINT)


@pytest.fixture
async def folder() -> AsyncIterator[Path]:
    async with short_folder() as path:
        yield path


@pytest.fixture
async def town(database: Database, folder: Path, tmp_path: Path) -> AsyncIterator[Town]:
    router = Router()
    async with (
        engine(folder / "engine.sock") as echo,
        link(echo.address) as worker,
        admin_plane(database, tmp_path, router=router) as plane,
    ):
        (entry,) = await BaseModels(database).entries()
        router.attach(Replica(worker, entry.base_model.id, entry.base_model.name))
        plane.probe.answer = certifying_probe
        await plane.make_tenant("acme")
        yield Town(plane, echo)


async def test_a_version_is_warmed_on_every_engine_with_its_fingerprint(town: Town) -> None:
    digest = await town.publish(0)
    answer = await town.order("warm", "latest", to="host")
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "model": "acme-sql@1",
        "weights_digest": digest,
        "engines": [
            {
                "address": town.echo.address,
                "is_resident": False,
                "is_hosted": True,
                "is_pinned": False,
                "problem": None,
            }
        ],
    }
    assert town.echo.core.fingerprints == {digest: FINGERPRINT}
    (place,) = (await town.order("warm")).json()["engines"]
    assert place["is_resident"]


async def test_a_version_that_cannot_be_loaded_is_not_pinned_and_says_why(town: Town) -> None:
    digest = await town.publish(0)
    town.echo.core.missing.add(digest)
    for what in ("warm", "pin"):
        answer = await town.order(what)
        assert answer.status_code == 409
        assert f"No such adapter: {digest}" in answer.json()["detail"]
    await assert_pins(town, [])


async def test_more_pins_than_slots_are_refused_by_the_rule(town: Town) -> None:
    for seed in range(4):
        await town.publish(seed)
    for version in "123":
        assert (await town.order("pin", version)).status_code == 200
    answer = await town.order("pin", "4")
    assert answer.status_code == 409
    assert "acme-sql@4 cannot be pinned" in answer.json()["detail"]
    assert (await town.order("unpin", "1")).status_code == 200
    assert (await town.order("pin", "4")).status_code == 200


@pytest.mark.parametrize("what", ["warm", "pin", "unpin"])
async def test_what_is_not_there_or_not_ready_is_told(town: Town, what: str) -> None:
    for path in ("nobody/adapters/sql/versions/1", "acme/adapters/sql/versions/prod"):
        answer = await town.plane.client.post(f"/admin/v1/tenants/{path}/{what}")
        assert answer.status_code == 404

    async def failing_probe(digest: str) -> ProbeReport:
        return report(digest, is_passed=False)

    town.plane.probe.answer = failing_probe
    await town.plane.upload(adapter_files())
    answer = await town.order(what)
    assert answer.status_code == 409
    assert "acme-sql@1 is rejected" in answer.json()["detail"]
    assert (await town.order("warm", to="moon")).status_code == 400


async def test_a_pin_is_one_entry_in_the_log_however_often_it_is_made(
    town: Town, database: Database
) -> None:
    await town.publish(0)
    for what in ("pin", "pin", "unpin", "unpin"):
        (place,) = (await town.order(what)).json()["engines"]
        assert place["is_pinned"] == (what == "pin")
    actions = [action for action, _ in await audited(database)]
    assert actions.count("adapter.version.pin") == actions.count("adapter.version.unpin") == 1


async def test_weights_stay_pinned_while_another_version_of_them_is(town: Town) -> None:
    digest = await town.publish(0)
    await town.publish(0, adapter="twin")
    twin = f"{TENANT}/adapters/twin/versions/1"
    assert (await town.plane.client.post(f"{twin}/pin")).status_code == 200
    await town.order("pin")
    await town.order("unpin")
    await assert_pins(town, [digest])
    await town.plane.client.post(f"{twin}/unpin")
    await assert_pins(town, [])


async def test_the_engines_are_shown_with_what_they_hold_by_name(town: Town) -> None:
    digest = await town.publish(0)
    await town.order("pin")
    (shown,) = (await town.plane.client.get("/admin/v1/engines")).json()["data"]
    assert (shown["address"], shown["base_model"]) == (town.echo.address, INFO.base_model)
    assert (shown["is_connected"], shown["problem"]) == (True, None)
    assert shown["load"]["num_blocks"] == 100
    assert shown["tiers"]["num_reads"] == 2
    adapters = {adapter["weights_digest"]: adapter for adapter in shown["adapters"]}
    assert adapters[digest] == {
        "weights_digest": digest,
        "models": ["acme-sql@1"],
        "is_resident": True,
        "is_hosted": False,
        "is_pinned": True,
        "is_quarantined": False,
    }
    assert adapters["ef" * 32]["is_quarantined"]
    assert adapters["ef" * 32]["models"] == []


async def test_pins_come_back_to_an_engine_that_was_started_again(
    database: Database, folder: Path, tmp_path: Path
) -> None:
    router = Router()
    residency = Residency(database, router)
    digest = ""
    async with (
        link_that_waits(folder, residency) as worker,
        admin_plane(database, tmp_path, router=router) as plane,
        residency,
    ):
        (entry,) = await BaseModels(database).entries()
        router.attach(Replica(worker, entry.base_model.id, entry.base_model.name))
        await plane.make_tenant("acme")
        plane.probe.answer = certifying_probe
        answer = await plane.upload()
        digest = answer.json()["weights_digest"]
        assert (await plane.client.post(f"{TENANT}/adapters/sql/versions/1/pin")).status_code == 200
        for _ in range(2):
            async with engine(folder / "engine.sock") as echo:
                echo.core.pinned.append("12" * 32)
                await until(lambda core=echo.core: core.pinned == [digest])
                # It is pinned first, and then brought.
                await until(lambda core=echo.core: core.fingerprints == {digest: FINGERPRINT})


async def test_a_version_that_goes_away_is_unloaded_alone(town: Town) -> None:
    first, second = await town.publish(0), await town.publish(1)
    await town.order("pin")
    await town.order("warm", "2")
    deleted = await town.plane.client.delete(f"{TENANT}/adapters/sql/versions/1")
    assert deleted.status_code == 204, deleted.text
    assert first not in town.echo.core.resident
    assert second in town.echo.core.resident
    await assert_pins(town, [])


async def test_an_adapter_that_goes_away_is_unloaded_unless_others_have_its_weights(
    town: Town,
) -> None:
    digest = await town.publish(0)
    await town.publish(0, adapter="twin")
    await town.order("pin")
    await delete(town, "sql")
    assert digest in town.echo.core.resident
    await delete(town, "twin")
    assert digest not in town.echo.core.resident
    await assert_pins(town, [])


@asynccontextmanager
async def link_that_waits(folder: Path, residency: Residency) -> AsyncIterator[EngineLink]:
    """A link to an engine that is not there yet."""
    made = EngineLink(
        f"unix:{folder / 'engine.sock'}",
        worker_id="w1",
        worker_epoch=1,
        secret=None,
        on_frame=lambda frame: None,
        on_session=residency.look,
    )
    async with made:
        yield made


async def delete(town: Town, adapter: str) -> None:
    assert (await town.plane.client.delete(f"{TENANT}/adapters/{adapter}")).status_code == 204
    await town.plane.residency.forget_adapter("acme", adapter)


async def assert_pins(town: Town, digests: list[str]) -> None:
    assert town.echo.core.pinned == digests
