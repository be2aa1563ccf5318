"""A crowd that reads slowly and leaves at random, before a whole Manylora on a real model."""

import random
from pathlib import Path

import pytest

from gateway.database import Database, role_urls
from gateway.embedded import EmbeddedPostgres
from gateway.supervisor import Secrets
from tests.end_to_end.conftest import Server, descendants
from tests.gateway.whole_gateway import speaking
from tests.hostile.streams import Asker, crowd
from tests.hostile.watching import Watch, soak

pytestmark = pytest.mark.slow

NUM_STREAMS = 64


def gateway_of(server: Server) -> int:
    """The process id of the one gateway."""
    [pid] = [
        pid
        for pid in descendants(server.process.pid)
        if b"-m\x00gateway\x00" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return pid


async def test_nothing_is_left_behind_in_the_gateway_at_the_engine_or_on_the_books(
    server: Server,
) -> None:
    keys = Secrets.of(server.data_dir / "secrets.json")
    app_url, worker_url = role_urls(
        EmbeddedPostgres(server.data_dir).url,
        app_password=keys.app_password,
        worker_password=keys.worker_password,
    )
    database, dice = Database(app_url=app_url, worker_url=worker_url), random.Random(64)
    asker = Asker(server.url, server.key("acme"), "acme-sql")

    async def one_round() -> None:
        await crowd(asker, dice, number=NUM_STREAMS, max_tokens=16)

    async with speaking(server.url, str(server.facts["admin_key"])) as operator:
        await soak(Watch(gateway_of(server), operator, database), one_round, num_rounds=4)
    await database.close()
