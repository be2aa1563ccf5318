"""The database and the store of an installation, for commands that work on them beside its server.

Knows where `serve` keeps what leads there. Knows nothing of processes.
"""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from adapters.store import ArtifactStore
from gateway.children import CannotServe
from gateway.database import Database, role_urls
from gateway.embedded import EmbeddedPostgres
from gateway.supervisor import Secrets, store_url_of


@contextlib.asynccontextmanager
async def installation(
    data_dir: Path, *, database_url: str | None, store_url: str | None
) -> AsyncIterator[tuple[Database, ArtifactStore]]:
    """Database and store of an installation that `serve` made here, whether it runs or not.

    Raises CannotServe where there is none; the embedded PostgreSQL has to run.
    """
    path = data_dir / "secrets.json"
    if not path.exists():
        raise CannotServe(f"{data_dir} holds no installation: give its --data-dir")
    keys = Secrets.of(path)
    app_url, worker_url = role_urls(
        database_url or EmbeddedPostgres(data_dir).url,
        app_password=keys.app_password,
        worker_password=keys.worker_password,
    )
    database = Database(app_url=app_url, worker_url=worker_url, pool_size=2)
    try:
        yield database, ArtifactStore(store_url or store_url_of(data_dir))
    finally:
        await database.close()
