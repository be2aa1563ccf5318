"""Facts about quotas: exact however many uploads come at once."""

import asyncio
from pathlib import Path

from sqlalchemy import text

from gateway.database import Database
from gateway.quotas import Quotas
from tests.gateway.admin_plane import Plane, adapter_files, admin_plane

SIZE_BYTES = len(adapter_files()["adapter_model.safetensors"])


async def limit(plane: Plane, tenant: str, **columns: int) -> None:
    changes = ", ".join(f"{column} = {value}" for column, value in columns.items())
    async with plane.database.as_worker() as session:
        await session.execute(text(f"UPDATE tenants SET {changes} WHERE slug = '{tenant}'"))  # noqa: S608 - the test's own words


async def test_as_many_adapters_as_allowed_come_in_at_once_and_no_more(
    database: Database, tmp_path: Path
) -> None:
    async with admin_plane(database, tmp_path, quotas=Quotas(max_adapters=3)) as plane:
        await plane.make_tenant("acme")
        answers = await asyncio.gather(
            *(plane.upload(adapter_files(seed=n), adapter=f"a{n}") for n in range(6))
        )
        assert sorted(answer.status_code for answer in answers) == [201] * 3 + [403] * 3
        refused = next(answer.json() for answer in answers if answer.status_code == 403)
        assert refused["code"] == "quota_exceeded"
        assert (refused["limit"], refused["used"], refused["needed"]) == (3, 3, 1)
        assert len(plane.stored_adapters()) == 3
        listed = (await plane.client.get("/admin/v1/tenants/acme/adapters")).json()["data"]
        assert len(listed) == 3
        # Another version of one that is there takes no more room among the adapters.
        again = await plane.upload(adapter_files(seed=9), adapter=listed[0]["adapter"])
        assert again.status_code == 201
        await plane.client.delete(f"/admin/v1/tenants/acme/adapters/{listed[0]['adapter']}")
        assert (await plane.upload(adapter_files(seed=7), adapter="new")).status_code == 201
        # Its place is taken: it comes back when there is one.
        restore = f"/admin/v1/tenants/acme/adapters/{listed[0]['adapter']}/restore"
        assert (await plane.client.post(restore)).json()["code"] == "quota_exceeded"
        await plane.client.delete("/admin/v1/tenants/acme/adapters/new")
        assert (await plane.client.post(restore)).status_code == 204


async def test_bytes_count_once_for_one_tenant(database: Database, tmp_path: Path) -> None:
    quotas = Quotas(max_adapter_bytes=2 * SIZE_BYTES)
    async with admin_plane(database, tmp_path, quotas=quotas) as plane:
        await plane.make_tenant("acme")
        await plane.make_tenant("globex")
        assert (await plane.upload(adapter_files(seed=0))).status_code == 201
        assert (await plane.upload(adapter_files(seed=1))).status_code == 201
        assert (await plane.upload(adapter_files(seed=0), adapter="copy")).status_code == 201
        refused = (await plane.upload(adapter_files(seed=2))).json()
        assert (refused["code"], refused["needed"]) == ("quota_exceeded", SIZE_BYTES)
        assert (refused["limit"], refused["used"]) == (2 * SIZE_BYTES, 2 * SIZE_BYTES)
        assert (await plane.upload(adapter_files(seed=2), tenant="globex")).status_code == 201


async def test_a_tenants_own_limit_goes_before_the_operators(
    database: Database, tmp_path: Path
) -> None:
    async with admin_plane(database, tmp_path, quotas=Quotas(max_adapters=0)) as plane:
        await plane.make_tenant("acme")
        assert (await plane.upload()).status_code == 403
        await limit(plane, "acme", max_adapters=1)
        assert (await plane.upload()).status_code == 201
