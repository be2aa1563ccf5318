"""Two tenants who have everything, behind one gateway: acme, and globex, who means harm."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from engine.protocol import UNIX_PREFIX
from gateway.database import Database
from tests.conftest import Cluster, Home
from tests.engine.echo_engine import INFO, Engine
from tests.gateway.admin_plane import adapter_files
from tests.gateway.whole_gateway import SECRET, Gateway, whole_gateway
from tests.isolation.estate import (
    MODULES,
    SPARE,
    SPARE_ADDRESSES,
    Estate,
    TrustingCore,
    build,
)

# Knows both, and has nothing.
NEIGHBOUR = "initech"


@dataclass(frozen=True)
class Town:
    """Whom the tests are about."""

    gateway: Gateway
    home: Home
    victim: Estate
    attacker: Estate

    @property
    def operator_key(self) -> str:
        return self.gateway.operator.headers["authorization"].removeprefix("Bearer ")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def town(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Town]:
    """Made once: what the tests do to acme must leave it as it is."""
    home = await cluster.make_migrated()
    database = Database(app_url=home.app_url, worker_url=home.worker_url)
    # Whoever guesses keys is told to wait, by address; so each caller may say where it is.
    trusted = (ip_network("127.0.0.1/32"),)
    folder = tmp_path_factory.mktemp("town")
    loras = folder / "loras"
    write_adapter(loras / "sql")
    async with whole_gateway(
        home,
        database,
        folder,
        core=TrustingCore(),
        trusted_proxies=trusted,
        lora_folder=loras,
    ) as gateway:
        await gateway.operator.post("/admin/v1/tenants", json={"slug": NEIGHBOUR})
        victim = await build(gateway, "acme", grantee=NEIGHBOUR)
        attacker = await build(gateway, "globex", grantee=NEIGHBOUR)
        async with spare_engines():
            yield Town(gateway, home, victim, attacker)
    await database.close()
    await cluster.drop(home)


@contextlib.asynccontextmanager
async def spare_engines() -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        for number, address in enumerate(SPARE_ADDRESSES, start=1):
            info = msgspec.structs.replace(
                INFO, base_model=SPARE, engine_epoch=INFO.engine_epoch + number
            )
            path = Path(address.removeprefix(UNIX_PREFIX))
            stack.callback(path.unlink, missing_ok=True)
            await stack.enter_async_context(Engine(path, secret=SECRET, info=info).serve())
        yield


def write_adapter(folder: Path) -> None:
    """One that the operator may load by its path."""
    folder.mkdir(parents=True)
    for name, data in adapter_files(modules=MODULES, target_modules=["up_proj"]).items():
        (folder / name).write_bytes(data)
