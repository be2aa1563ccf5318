"""What a database needs before a gateway can start.

The newest schema, a key for the operator, and the names of the engines to come.

Apart from the supervisor because importing it takes longer than starting an engine's process.
"""

import contextlib
from pathlib import Path

from gateway.auth import Authenticator
from gateway.base_models import BaseModels
from gateway.children import CannotServe
from gateway.database import DATABASE_TROUBLE, Database, migrate
from gateway.errors import InvalidKey
from gateway.private_files import write_private
from gateway.settings import Settings


async def prepare(
    owner_url: str,
    settings: Settings,
    *,
    app_password: str,
    worker_password: str,
    addresses_begin: str,
    names: dict[str, str],
    operator_key_path: Path,
) -> None:
    """`names`: of base models, by the addresses of their engines, which all begin alike.

    Raises CannotServe or DatabaseRefused with a message for the operator.
    """
    database = Database(app_url=settings.database_app_url, worker_url=settings.database_worker_url)
    try:
        await migrate(owner_url, app_password=app_password, worker_password=worker_password)
        authenticator = Authenticator(database, settings.peppers)
        await _ensure_operator_key(database, authenticator, operator_key_path)
        await BaseModels(database).expect(addresses_begin, names)
    except DATABASE_TROUBLE as error:
        raise CannotServe(f"the database does not answer: {error}") from error
    finally:
        await database.close()


async def _ensure_operator_key(
    database: Database, authenticator: Authenticator, path: Path
) -> None:
    """Make an operator key at the first start, or where the kept one is not this database's."""
    with contextlib.suppress(FileNotFoundError, InvalidKey):
        await authenticator.authenticate(f"Bearer {_read_key(path)}")
        return
    async with database.as_worker() as session:
        _, key = await authenticator.issue_key(
            session, tenant_id=None, name="operator", scopes=None, expires_at=None
        )
    write_private(path, key + "\n")


def _read_key(path: Path) -> str:
    return path.read_text().strip()
