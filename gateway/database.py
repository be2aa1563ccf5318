"""The way to PostgreSQL: two roles, one transaction at a time, and the schema's migrations.

`as_tenant` shows the rows of one tenant, `as_worker` those of all, `as_app` none. Refuses a
database on which those promises would not hold. Knows no table by name.
"""

import asyncio
import base64
import datetime
import hashlib
import hmac
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any
from uuid import UUID
from weakref import WeakValueDictionary

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, TextClause, event, make_url, text
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import DBAPIError, DisconnectionError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolExhausted
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from gateway.errors import DatabaseRefused

logger = logging.getLogger(__name__)

# What the driver says of a connection of which it expects no more. An internal error is one too: a
# server that goes tells so to connections that are idle, and whoever takes one before it is closed
# is told that "another operation is in progress".
_DRIVER_TROUBLE = (asyncpg.InterfaceError, asyncpg.InternalClientError)
# What comes up when the server is away, restarting, full or too slow.
DATABASE_TROUBLE = (SQLAlchemyError, OSError, asyncpg.PostgresError, *_DRIVER_TROUBLE)

# Classes of SQLSTATE in which a server says that it cannot serve now: its connections, transactions
# that it rolled back, its resources, whoever operates it, the system below it.
_NOT_NOW = ("08", "40", "53", "57", "58")

LISTEN_RETRY_S = 1.0
# How long anything waits for a connection to come free.
POOL_TIMEOUT_S = 10.0
# Calls of one tenant that lock its rows wait for each other: one runs, one is there when it ends.
# More would only keep connections from others.
MAX_CALLS_OF_TENANT = 2

# 15 brought NULLS NOT DISTINCT, which the rollups' key needs.
OLDEST_SERVER_VERSION = 150000
MAX_CLOCK_SKEW_S = 2.0
SCRAM_ITERATIONS = 4096
# PostgreSQL cuts longer names off silently.
MAX_ROLE_NAME_BYTES = 63

WORKER_SUFFIX = "_worker"

SET_TENANT = text("SELECT set_config('app.tenant', :tenant, true)")

# What a role could do beyond its policies.
ROLE_POWERS = text(
    """
    SELECT
        rolname AS name, rolsuper AS is_superuser, rolbypassrls AS bypasses_row_security,
        (SELECT array_agg(relname::text ORDER BY relname) FROM pg_class
         WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')
         AND pg_has_role(current_user, relowner, 'MEMBER')) AS owned_tables
    FROM pg_roles WHERE rolname = current_user
    """
)

# Tables that carry a tenant and yet show everybody's rows.
UNPROTECTED_TABLES = text(
    """
    SELECT relname FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')
    AND NOT (relrowsecurity AND relforcerowsecurity)
    AND (relname = 'tenants' OR EXISTS (
        SELECT FROM pg_attribute
        WHERE attrelid = pg_class.oid AND attname = 'tenant_id' AND NOT attisdropped
    ))
    ORDER BY relname
    """
)


class Database:
    """Two pools of connections, one for each role that serves."""

    def __init__(
        self, *, app_url: str, worker_url: str, pool_size: int = 10, role: str | None = None
    ) -> None:
        self.app_url = app_url
        self._app = _open_pool(app_url, pool_size=pool_size, role=role)
        self._worker = _open_pool(worker_url, pool_size=pool_size, role=role)
        self._app_sessions = async_sessionmaker(self._app, expire_on_commit=False)
        self._dialect = self._app.dialect
        self._app_calls = _Calls(app_url, self._dialect, pool_size=pool_size, role=role)
        self._worker_calls = _Calls(worker_url, self._dialect, pool_size=2, role=role)
        self._worker_sessions = async_sessionmaker(self._worker, expire_on_commit=False)

    @classmethod
    def of_worker(cls, url: str) -> "Database":
        """The database as its worker, whose URL this is, or the owner's, who may become that.

        For commands that reckon across tenants and serve none.
        """
        parsed = asyncpg_url(url)
        is_worker = (parsed.username or "").endswith(WORKER_SUFFIX)
        role = None if is_worker else f"{parsed.database}{WORKER_SUFFIX}"
        return cls(app_url=url, worker_url=url, pool_size=2, role=role)

    @asynccontextmanager
    async def as_tenant(self, tenant_id: UUID) -> AsyncIterator[AsyncSession]:
        """One transaction that sees and adds rows of this tenant alone."""
        async with self._app_sessions.begin() as session:
            await session.execute(SET_TENANT, {"tenant": str(tenant_id)})
            yield session

    @asynccontextmanager
    async def as_app(self) -> AsyncIterator[AsyncSession]:
        """One transaction that sees no tenant's rows."""
        async with self._app_sessions.begin() as session:
            yield session

    async def call(
        self,
        statement: TextClause,
        parameters: Mapping[str, Any],
        *,
        locks_rows_of: UUID | None = None,
    ) -> Sequence[Mapping[str, Any]]:
        """One statement as the app, which is its own transaction: a single round trip.

        What it locks is free again when the server has run it, however busy this process is. Made
        for the statements of every request, which are given their tenant. `locks_rows_of` is the
        tenant whose other calls it may have to wait for. Raises what is in DATABASE_TROUBLE.
        """
        return await self._app_calls.run(statement, parameters, locks_rows_of=locks_rows_of)

    async def call_as_worker(
        self, statement: TextClause, parameters: Mapping[str, Any]
    ) -> Sequence[Mapping[str, Any]]:
        """The same as the worker, across tenants."""
        return await self._worker_calls.run(statement, parameters)

    @asynccontextmanager
    async def as_worker(self) -> AsyncIterator[AsyncSession]:
        """One transaction across tenants: for the settler, the sweeper, billing and operators."""
        async with self._worker_sessions.begin() as session:
            yield session

    async def check(self) -> None:
        """Refuse, with `DatabaseRefused`, a database that is old, unsafe or of another time."""
        async with self.as_app() as session:
            await _check_server(session)
            await _check_schema(session)
            await _check_clock(session)
            await _check_role(session)
        async with self.as_worker() as session:
            await _check_role(session)

    async def prepare(self, *, months_ahead: int = 12) -> None:
        """Make the partitions that usage events of the coming months go into."""
        async with self.as_worker() as session:
            await session.execute(
                text("SELECT make_usage_partitions(:months)"), {"months": months_ahead}
            )

    async def listen(self, channel: str, on_notice: Callable[[], None]) -> None:
        """Call `on_notice` at each notice, and whenever some may have been missed.

        Runs until it is cancelled, on a connection of its own, and survives the server's restarts.
        """
        while True:
            try:
                await self._listen_once(channel, on_notice)
            except DATABASE_TROUBLE as error:
                logger.warning("listening_failed", extra={"channel": channel, "reason": str(error)})
            await asyncio.sleep(LISTEN_RETRY_S)

    async def _listen_once(self, channel: str, on_notice: Callable[[], None]) -> None:
        connection = await _connect(self.app_url, self._dialect, role=None)
        try:
            is_lost = asyncio.Event()
            connection.add_termination_listener(lambda _: is_lost.set())
            await connection.add_listener(channel, lambda *_: on_notice())
            on_notice()
            await is_lost.wait()
        finally:
            connection.terminate()

    async def close(self) -> None:
        self._app_calls.close()
        self._worker_calls.close()
        await self._app.dispose()
        await self._worker.dispose()


class _Calls:
    """Mutable: connections for single statements, straight to the driver.

    SQLAlchemy's way to a row takes several times as long, which every request would pay. A pool of
    the driver's would be one more round trip for each statement, to reset what none of them sets.
    """

    def __init__(self, url: str, dialect: Dialect, *, pool_size: int, role: str | None) -> None:
        self._url = url
        self._dialect = dialect
        self._role = role
        self._places = asyncio.Semaphore(pool_size)
        # Of tenants that have calls now.
        self._places_of: WeakValueDictionary[UUID, asyncio.Semaphore] = WeakValueDictionary()
        # The one that was used last is used next.
        self._idle: list[Any] = []
        # Statement -> its text as the driver wants it, and its parameters in order.
        self._spelled: dict[TextClause, tuple[str, Sequence[str]]] = {}

    async def run(
        self,
        statement: TextClause,
        parameters: Mapping[str, Any],
        *,
        locks_rows_of: UUID | None = None,
    ) -> Sequence[Mapping[str, Any]]:
        if locks_rows_of is None:
            return await self._run(statement, parameters)
        places = self._places_of.get(locks_rows_of)
        if places is None:
            places = self._places_of[locks_rows_of] = asyncio.Semaphore(MAX_CALLS_OF_TENANT)
        await _take_place(places)
        try:
            return await self._run(statement, parameters)
        finally:
            places.release()

    async def _run(
        self, statement: TextClause, parameters: Mapping[str, Any]
    ) -> Sequence[Mapping[str, Any]]:
        spelled, names = self._spelled.get(statement) or self._spell(statement)
        await _take_place(self._places)
        try:
            connection = self._find_idle() or await self._connect()
            try:
                rows: Sequence[Mapping[str, Any]] = await connection.fetch(
                    spelled, *(parameters[name] for name in names)
                )
            except asyncpg.PostgresError:
                self._idle.append(connection)
                raise
            except BaseException:
                # Whoever waited is gone, or the server is: nobody knows what it will say next.
                connection.terminate()
                raise
            self._idle.append(connection)
            return rows
        finally:
            self._places.release()

    def _find_idle(self) -> Any:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        return None

    async def _connect(self) -> Any:
        return await _connect(self._url, self._dialect, role=self._role)

    def _spell(self, statement: TextClause) -> tuple[str, Sequence[str]]:
        compiled = statement.compile(dialect=self._dialect)
        self._spelled[statement] = compiled.string, compiled.positiontup or ()
        return self._spelled[statement]

    def close(self) -> None:
        while self._idle:
            self._idle.pop().terminate()


async def _take_place(places: asyncio.Semaphore) -> None:
    """Raises TimeoutError."""
    if not places.locked():
        await places.acquire()
        return
    async with asyncio.timeout(POOL_TIMEOUT_S):
        await places.acquire()


def is_away(error: BaseException) -> bool:
    """Whether the database does not answer now, so that the same may be asked again later.

    One that starts or stops does say something: only the state of its error tells it from a no.
    """
    if isinstance(error, DBAPIError):
        # What the driver itself finds broken has no state.
        state: str | None = getattr(error.orig, "sqlstate", None)
        return error.connection_invalidated or state is None or state[:2] in _NOT_NOW
    if isinstance(error, asyncpg.PostgresError):
        return str(error.sqlstate)[:2] in _NOT_NOW
    return isinstance(error, (PoolExhausted, OSError, *_DRIVER_TROUBLE))


async def _connect(url: str, dialect: Dialect, *, role: str | None) -> Any:
    """A connection of the driver's own, set up as those of the pools are."""
    _, options = dialect.create_connect_args(asyncpg_url(url))
    return await asyncpg.connect(**options, server_settings=_server_settings(role))


async def migrate(owner_url: str, *, app_password: str, worker_password: str) -> None:
    """Bring the schema to its newest step and give both login roles these passwords.

    Safe to run from several processes at once: they wait for one another.
    """
    url = asyncpg_url(owner_url)
    roles = _role_names(url)
    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            await connection.execute(
                text("SELECT pg_advisory_xact_lock(hashtextextended('manylora migrate', 0))")
            )
            await connection.run_sync(_refuse_old_server)
            await connection.run_sync(_upgrade)
            for role, password in zip(roles, (app_password, worker_password), strict=True):
                await connection.run_sync(_set_password, role=role, password=password)
    finally:
        await engine.dispose()


def role_urls(owner_url: str, *, app_password: str, worker_password: str) -> tuple[str, str]:
    """The URLs of the two login roles, on the server and database that the owner's URL names."""
    url = asyncpg_url(owner_url)
    app, worker = (
        url.set(username=role, password=password).render_as_string(hide_password=False)
        for role, password in zip(_role_names(url), (app_password, worker_password), strict=True)
    )
    return app, worker


def asyncpg_url(url: str) -> URL:
    """The URL with our driver in it, whichever spelling of `postgresql://` came in."""
    parsed = make_url(url)
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise DatabaseRefused(
            f"the database URL starts with {parsed.drivername}://, but only PostgreSQL is spoken:"
            " write postgresql://user:password@host/database"
        )
    if not parsed.database:
        raise DatabaseRefused("the database URL names no database: end it with /name")
    parsed = parsed.set(drivername="postgresql+asyncpg")
    if "sslmode" not in parsed.query:
        return parsed
    # libpq's spelling; asyncpg's own parameter takes the same words.
    ssl_mode = parsed.query["sslmode"]
    return parsed.difference_update_query(["sslmode"]).update_query_dict({"ssl": ssl_mode})


def alembic_config() -> Config:
    """The migrations' settings, found from the installed package rather than a checkout."""
    config = Config()
    config.set_main_option("script_location", str(resources.files("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _open_pool(url: str, *, pool_size: int, role: str | None) -> AsyncEngine:
    engine = create_async_engine(
        asyncpg_url(url),
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT_S,
        connect_args={"server_settings": _server_settings(role)},
    )
    event.listen(engine.sync_engine, "checkout", _refuse_closed_connection)
    return engine


def _server_settings(role: str | None) -> dict[str, str]:
    return {
        "application_name": "manylora",
        # Our queries are short; compiling them costs more than running them.
        "jit": "off",
        # A transaction that somebody forgot must not hold its locks for ever.
        "idle_in_transaction_session_timeout": "60s",
        **({} if role is None else {"role": role}),
    }


def _refuse_closed_connection(dbapi_connection: Any, _record: Any, _proxy: Any) -> None:
    """Let the pool replace a connection that the server has closed: no round trip is needed."""
    if dbapi_connection.driver_connection.is_closed():
        raise DisconnectionError


def _role_names(url: URL) -> tuple[str, str]:
    names = f"{url.database}_app", f"{url.database}{WORKER_SUFFIX}"
    if max(len(name.encode()) for name in names) > MAX_ROLE_NAME_BYTES:
        raise DatabaseRefused(
            f"the database's name {url.database!r} is too long: the roles {names[0]!r} and"
            f" {names[1]!r} must fit in {MAX_ROLE_NAME_BYTES} bytes"
        )
    return names


def _upgrade(connection: Connection) -> None:
    config = alembic_config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _set_password(connection: Connection, *, role: str, password: str) -> None:
    # The verifier goes over, never the password: statements end up in logs.
    quoted = connection.dialect.identifier_preparer.quote(role)
    connection.exec_driver_sql(f"ALTER ROLE {quoted} PASSWORD '{scram_verifier(password)}'")


def scram_verifier(password: str) -> str:
    """What PostgreSQL stores of a password: SCRAM-SHA-256, RFC 5803."""
    salt = secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, SCRAM_ITERATIONS)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    stored_key = hashlib.sha256(client_key).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    salt64, stored64, server64 = (
        base64.b64encode(part).decode() for part in (salt, stored_key, server_key)
    )
    return f"SCRAM-SHA-256${SCRAM_ITERATIONS}:{salt64}${stored64}:{server64}"


def _refuse_old_server(connection: Connection) -> None:
    _require_version(int(connection.exec_driver_sql("SHOW server_version_num").scalar_one()))


async def _check_server(session: AsyncSession) -> None:
    _require_version(int((await session.execute(text("SHOW server_version_num"))).scalar_one()))


def _require_version(version: int) -> None:
    if version < OLDEST_SERVER_VERSION:
        raise DatabaseRefused(
            f"the server is PostgreSQL {version // 10000}, but"
            f" {OLDEST_SERVER_VERSION // 10000} or newer is needed"
        )


async def _check_schema(session: AsyncSession) -> None:
    newest = ScriptDirectory.from_config(alembic_config()).get_current_head()
    try:
        query = text("SELECT version_num FROM alembic_version")
        found = (await session.execute(query)).scalar_one_or_none()
    except SQLAlchemyError as error:
        raise DatabaseRefused("the database has no schema of ours yet: migrate it first") from error
    if found != newest:
        raise DatabaseRefused(
            f"the schema is at step {found}, this program needs step {newest}: migrate first, or"
            " run the newer program"
        )
    unprotected = (await session.execute(UNPROTECTED_TABLES)).scalars().all()
    if unprotected:
        raise DatabaseRefused(f"row-level security is not forced on: {', '.join(unprotected)}")


async def _check_clock(session: AsyncSession) -> None:
    before = datetime.datetime.now(datetime.UTC)
    there = (await session.execute(text("SELECT clock_timestamp()"))).scalar_one()
    refuse_clock_skew(before=before, there=there, after=datetime.datetime.now(datetime.UTC))


def refuse_clock_skew(
    *, before: datetime.datetime, there: datetime.datetime, after: datetime.datetime
) -> None:
    """Raise when the database's clock is surely off ours, which was read before and after it."""
    skew_s = max((before - there).total_seconds(), (there - after).total_seconds())
    if skew_s > MAX_CLOCK_SKEW_S:
        raise DatabaseRefused(
            f"this machine's clock and the database's are {skew_s:.1f} s apart, at most"
            f" {MAX_CLOCK_SKEW_S:.0f} s is safe: bills go by the clock, so set it right"
        )


async def _check_role(session: AsyncSession) -> None:
    role = (await session.execute(ROLE_POWERS)).one()
    if role.is_superuser or role.bypasses_row_security:
        power = "a superuser" if role.is_superuser else "exempt from row-level security (BYPASSRLS)"
        raise DatabaseRefused(
            f"the role {role.name!r} is {power}: it would see every tenant's rows."
            " Take that power away"
        )
    if role.owned_tables:
        raise DatabaseRefused(
            f"the role {role.name!r} is or may become the owner of {', '.join(role.owned_tables)}:"
            " give those tables to another role"
        )
