"""Facts about keys: which open, which stay shut, and how soon a revoked one does."""

import asyncio
import datetime
import socket
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any

import httpx
import pytest
import uvicorn
from litestar import Litestar, get
from litestar.di import NamedDependency, Provide
from sqlalchemy import TextClause

from gateway import addresses, auth, tenants
from gateway.api.wire import answer_error
from gateway.auth import Authenticator, Principal, guard, provide_principal
from gateway.database import Database
from gateway.errors import (
    GatewayError,
    InvalidKey,
    InvalidRequest,
    LimitReached,
    NotAllowed,
    Unavailable,
)
from gateway.tables import ApiKey, Tenant
from tests.conftest import Home, execute
from tests.gateway.admin_plane import tls

PEPPER = b"p" * 32
PATIENCE_S = 30


def bearer(plain: str) -> str:
    return f"Bearer {plain}"


async def make_key(
    database: Database,
    *,
    slug: str | None = "acme",
    expires_at: datetime.datetime | None = None,
    scopes: list[str] | None = None,
) -> tuple[ApiKey, str]:
    async with database.as_worker() as session:
        tenant_id = None
        if slug is not None:
            tenant_id = (await tenants.create_tenant(session, slug=slug, name=slug)).id
        return await auth.create_key(
            session,
            tenant_id=tenant_id,
            name="test",
            scopes=scopes,
            expires_at=expires_at,
            pepper=PEPPER,
        )


async def refusal(authenticator: Authenticator, plain: str) -> GatewayError:
    """Ask until it is refused: a notice takes a moment."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await authenticator.authenticate(bearer(plain))
            except GatewayError as error:
                return error
            await asyncio.sleep(0.02)


@pytest.fixture
def authenticator(database: Database) -> Authenticator:
    return Authenticator(database, {1: PEPPER})


async def test_a_key_opens_as_its_tenant(database: Database, authenticator: Authenticator) -> None:
    row, plain = await make_key(database)
    principal = await authenticator.authenticate(bearer(plain))
    async with database.as_worker() as session:
        tenant = await session.get_one(Tenant, row.tenant_id)
    assert principal == Principal(
        key_id=row.id,
        key_name="test",
        tenant_id=tenant.id,
        tenant_slug="acme",
        cache_salt=tenant.cache_salt,
        scopes=frozenset({"inference", "usage"}),
    )
    assert not principal.is_operator


async def test_an_operator_has_no_tenant(database: Database, authenticator: Authenticator) -> None:
    _, plain = await make_key(database, slug=None)
    principal = await authenticator.authenticate(bearer(plain))
    assert principal.is_operator
    assert principal.tenant_id is None


async def test_the_key_itself_is_stored_nowhere(database: Database) -> None:
    row, plain = await make_key(database)
    secret = plain.rpartition("_")[2].encode()
    assert row.secret_hmac == auth.fingerprint(plain, pepper=PEPPER)
    assert secret not in repr(vars(row)).encode()


@pytest.mark.parametrize("position", [0, 3, 5, 20, 40, -1])
async def test_a_typing_error_is_refused_without_asking_the_database(position: int) -> None:
    plain = auth.new_key().plain
    wrong = "A" if plain[position] != "A" else "B"
    spoiled = plain[:position] + wrong + (plain[position + 1 :] if position != -1 else "")
    assert auth.public_id_of(plain) is not None
    assert auth.public_id_of(spoiled) is None


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer ml_x_y", "ml_x_y", "Bearer ü"]
)
async def test_what_is_no_key_is_refused(authenticator: Authenticator, header: str | None) -> None:
    with pytest.raises(InvalidKey) as refused:
        await authenticator.authenticate(header)
    assert refused.value.headers["www-authenticate"] == "Bearer"


async def test_an_unknown_key_and_a_wrong_secret_are_refused_alike(
    database: Database, authenticator: Authenticator
) -> None:
    _, plain = await make_key(database)
    forged = auth.new_key().plain
    body = plain[: 4 + auth.ID_LENGTH] + forged[4 + auth.ID_LENGTH : -auth.CHECKSUM_LENGTH]
    wrong_secret = body + auth._checksum(body)
    assert auth.public_id_of(wrong_secret) == auth.public_id_of(plain)
    messages = set()
    for key in (forged, wrong_secret):
        with pytest.raises(InvalidKey) as refused:
            await authenticator.authenticate(bearer(key))
        messages.add(refused.value.message)
    assert len(messages) == 1


async def test_a_key_under_another_pepper_is_refused(database: Database) -> None:
    _, plain = await make_key(database)
    for peppers in ({1: b"q" * 32}, {2: PEPPER}, {}):
        with pytest.raises(InvalidKey):
            await Authenticator(database, peppers).authenticate(bearer(plain))


async def test_a_revoked_key_is_refused_by_another_gateway_that_had_accepted_it(
    database: Database, authenticator: Authenticator
) -> None:
    row, plain = await make_key(database)
    async with authenticator:
        await authenticator.authenticate(bearer(plain))
        async with database.as_worker() as session:
            await auth.revoke_key(session, tenant_id=row.tenant_id, key_id=row.id)
        error = await refusal(authenticator, plain)
    assert isinstance(error, InvalidKey)
    assert "revoked" in error.message


async def test_a_revoked_key_is_refused_even_where_no_notice_arrives(
    database: Database, authenticator: Authenticator
) -> None:
    row, plain = await make_key(database)
    await authenticator.authenticate(bearer(plain))
    async with database.as_worker() as session:
        await auth.revoke_key(session, tenant_id=row.tenant_id, key_id=row.id)
    assert isinstance(await refusal(authenticator, plain), InvalidKey)


async def test_a_key_in_use_is_looked_up_behind_its_requests(
    database: Database, authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[TextClause] = []
    call = database.call

    async def note(
        statement: TextClause, parameters: Mapping[str, Any]
    ) -> Sequence[Mapping[str, Any]]:
        asked.append(statement)
        return await call(statement, parameters)

    monkeypatch.setattr(auth, "CACHE_S", 1.0)
    monkeypatch.setattr(auth, "REFRESH_INTERVAL_S", 0.05)
    _, plain = await make_key(database)
    async with authenticator:
        monkeypatch.setattr(database, "call", note)
        async with asyncio.timeout(PATIENCE_S):
            while asked.count(auth.FIND_KEYS) < 4:
                await authenticator.authenticate(bearer(plain))
                await asyncio.sleep(0.01)
    # Once, and once more where it listens only since then.
    assert asked.count(auth.FIND_KEY) <= 2


async def test_a_revoked_key_in_use_is_refused_in_time_where_no_notice_arrives(
    database: Database, authenticator: Authenticator, home: Home
) -> None:
    row, plain = await make_key(database)
    await execute(home.superuser_url, "ALTER TABLE api_keys DISABLE TRIGGER api_keys_changed")
    async with authenticator:
        until = time.monotonic() + auth.CACHE_S * 0.7
        while time.monotonic() < until:
            await authenticator.authenticate(bearer(plain))
            await asyncio.sleep(0.02)
        async with database.as_worker() as session:
            await auth.revoke_key(session, tenant_id=row.tenant_id, key_id=row.id)
        revoked_at = time.monotonic()
        assert isinstance(await refusal(authenticator, plain), InvalidKey)
    assert time.monotonic() - revoked_at < auth.CACHE_S + 0.5


async def test_notices_are_heard_again_after_the_server_cut_the_connection(
    database: Database, authenticator: Authenticator, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "CACHE_S", 3600.0)
    row, plain = await make_key(database)
    async with authenticator:
        await authenticator.authenticate(bearer(plain))
        await execute(
            home.superuser_url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND query ILIKE 'LISTEN%'",
        )
        async with database.as_worker() as session:
            await auth.revoke_key(session, tenant_id=row.tenant_id, key_id=row.id)
        assert isinstance(await refusal(authenticator, plain), InvalidKey)


async def test_a_key_that_expires_while_it_is_remembered_is_refused(
    database: Database, authenticator: Authenticator
) -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(milliseconds=500)
    _, plain = await make_key(database, expires_at=soon)
    assert isinstance(await refusal(authenticator, plain), InvalidKey)


async def test_a_suspended_tenant_is_kept_out_and_told_why(
    database: Database, authenticator: Authenticator
) -> None:
    _, plain = await make_key(database)
    async with authenticator:
        await authenticator.authenticate(bearer(plain))
        async with database.as_worker() as session:
            await tenants.set_status(session, "acme", status="suspended")
        error = await refusal(authenticator, plain)
        assert isinstance(error, NotAllowed)
        assert "suspended" in error.message
        async with database.as_worker() as session:
            await tenants.set_status(session, "acme", status="active")
        await authenticator.authenticate(bearer(plain))


async def test_revoking_is_for_the_keys_of_that_tenant(database: Database) -> None:
    row, _ = await make_key(database)
    async with database.as_worker() as session:
        for tenant_id in (None, uuid.uuid4()):
            with pytest.raises(GatewayError, match="no such key"):
                await auth.revoke_key(session, tenant_id=tenant_id, key_id=row.id)
        first = await auth.revoke_key(session, tenant_id=row.tenant_id, key_id=row.id)
        revoked_at = first.revoked_at
        again = await auth.revoke_key(session, tenant_id=row.tenant_id, key_id=row.id)
        assert again.revoked_at == revoked_at
        assert [key.id for key in await auth.list_keys(session, tenant_id=row.tenant_id)] == [
            row.id
        ]


async def test_the_last_use_is_kept_to_the_minute(
    database: Database, authenticator: Authenticator
) -> None:
    row, plain = await make_key(database)
    seen = set()
    for _ in range(3):
        authenticator.forget()
        await authenticator.authenticate(bearer(plain))
        async with database.as_worker() as session:
            seen.add((await session.get_one(ApiKey, row.id)).last_used_at)
    assert len(seen) == 1
    assert None not in seen


@pytest.mark.parametrize(
    ("slug", "facts", "param"),
    [
        ("acme", {"scopes": ["operator"]}, "scopes"),
        ("acme", {"scopes": ["everything"]}, "scopes"),
        ("acme", {"scopes": []}, "scopes"),
        (None, {"scopes": ["inference"]}, "scopes"),
        ("acme", {"expires_at": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)}, "expires_at"),
        ("acme", {"expires_at": datetime.datetime(2100, 1, 1)}, "expires_at"),
    ],
)
async def test_a_key_that_could_not_be_meant_is_refused_naming_the_field(
    database: Database, slug: str | None, facts: dict[str, object], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await make_key(database, slug=slug, **facts)  # type: ignore[arg-type]  # wrong on purpose
    assert refused.value.param == param


async def test_without_a_database_nobody_is_let_in(home: Home) -> None:
    database = Database(app_url=home.app_url + "x", worker_url=home.worker_url)
    with pytest.raises(Unavailable):
        await Authenticator(database, {1: PEPPER}).authenticate(bearer(auth.new_key().plain))
    await database.close()


@get("/open", scope="public")
async def open_route() -> str:
    return "open"


@get("/usage", scope="usage")
async def usage_route(principal: NamedDependency[Principal]) -> str:
    return str(principal.tenant_slug)


@get("/operator", scope="operator")
async def operator_route() -> str:
    return "operator"


@get("/forgotten")
async def forgotten_route() -> str:
    return "nobody was meant to see this"


@asynccontextmanager
async def served(authenticator: Authenticator) -> AsyncIterator[httpx.AsyncClient]:
    app = Litestar(
        [open_route, usage_route, operator_route, forgotten_route],
        guards=[guard],
        dependencies={"principal": Provide(provide_principal)},
        exception_handlers={GatewayError: answer_error},
        openapi_config=None,
    )
    app.state.authenticator = authenticator
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
    # It listens already, so who comes early waits.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            async with httpx.AsyncClient(base_url=url, trust_env=False, verify=tls()) as client:
                yield client
        finally:
            server.should_exit = True
            await serving


async def test_each_route_answers_those_it_is_for(
    database: Database, authenticator: Authenticator
) -> None:
    _, tenant_key = await make_key(database, scopes=["usage"])
    _, operator_key = await make_key(database, slug=None)
    statuses = {}
    async with served(authenticator) as client:
        for name, key in {"nobody": "", "tenant": tenant_key, "operator": operator_key}.items():
            for path in ("/open", "/usage", "/operator", "/forgotten"):
                headers = {"authorization": bearer(key)} if key else {}
                answer = await client.get(path, headers=headers)
                statuses[name, path] = answer.status_code
    assert statuses == {
        ("nobody", "/open"): 200,
        ("nobody", "/usage"): 401,
        ("nobody", "/operator"): 401,
        ("nobody", "/forgotten"): 403,
        ("tenant", "/open"): 200,
        ("tenant", "/usage"): 200,
        ("tenant", "/operator"): 403,
        ("tenant", "/forgotten"): 403,
        ("operator", "/open"): 200,
        ("operator", "/usage"): 403,
        ("operator", "/operator"): 200,
        ("operator", "/forgotten"): 403,
    }


def test_an_application_with_a_route_that_names_no_scope_does_not_start() -> None:
    auth.check_routes(Litestar([open_route, operator_route], openapi_config=None))
    with pytest.raises(AssertionError, match="GET /forgotten"):
        auth.check_routes(Litestar([open_route, forgotten_route], openapi_config=None))


# Rotation, peppers, roles and guesses.


async def test_a_rotated_key_is_good_beside_its_new_secret_until_the_overlap_ends(
    database: Database, authenticator: Authenticator
) -> None:
    row, old = await make_key(database)

    async def rotate(overlap: datetime.timedelta) -> str:
        async with database.as_worker() as session:
            key = await auth.get_key(session, tenant_id=row.tenant_id, key_id=row.id)
            return await auth.rotate_key(session, key, overlap=overlap, pepper=PEPPER)

    new = await rotate(datetime.timedelta(hours=1))
    assert auth.public_id_of(new) == auth.public_id_of(old)
    for plain in (old, new):
        assert (await authenticator.authenticate(bearer(plain))).key_id == row.id
    newest = await rotate(datetime.timedelta())
    authenticator.forget()
    await authenticator.authenticate(bearer(newest))
    assert "not known" in (await refusal(authenticator, old)).message
    assert "replaced" in (await refusal(authenticator, new)).message


async def test_a_remembered_old_secret_ends_with_its_overlap(
    database: Database, authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "CACHE_S", 3600.0)
    row, old = await make_key(database)
    async with database.as_worker() as session:
        key = await auth.get_key(session, tenant_id=row.tenant_id, key_id=row.id)
        overlap = datetime.timedelta(milliseconds=500)
        await auth.rotate_key(session, key, overlap=overlap, pepper=PEPPER)
    assert isinstance(await refusal(authenticator, old), InvalidKey)


async def test_a_rotation_is_heard_of_by_other_gateways(
    database: Database, authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "CACHE_S", 3600.0)
    row, old = await make_key(database)
    async with authenticator:
        await authenticator.authenticate(bearer(old))
        async with database.as_worker() as session:
            key = await auth.get_key(session, tenant_id=row.tenant_id, key_id=row.id)
            await auth.rotate_key(session, key, overlap=datetime.timedelta(), pepper=PEPPER)
        assert isinstance(await refusal(authenticator, old), InvalidKey)


async def test_keys_under_an_older_pepper_stay_good_and_new_ones_get_the_newest(
    database: Database,
) -> None:
    row, old = await make_key(database)
    authenticator = Authenticator(database, {1: PEPPER, 2: b"n" * 32})
    await authenticator.authenticate(bearer(old))
    async with database.as_worker() as session:
        key = await auth.get_key(session, tenant_id=row.tenant_id, key_id=row.id)
        new = await authenticator.renew_key(session, key, overlap=datetime.timedelta(hours=1))
        assert (key.pepper_version, key.previous_pepper_version) == (2, 1)
    for plain in (old, new):
        await authenticator.authenticate(bearer(plain))
    with pytest.raises(InvalidKey):
        await Authenticator(database, {2: b"n" * 32}).authenticate(bearer(old))


async def test_a_revoked_key_gets_no_new_secret(database: Database) -> None:
    row, _ = await make_key(database)
    async with database.as_worker() as session:
        key = await auth.revoke_key(session, tenant_id=row.tenant_id, key_id=row.id)
        with pytest.raises(GatewayError, match="revoked"):
            await auth.rotate_key(session, key, overlap=datetime.timedelta(), pepper=PEPPER)


@pytest.mark.parametrize(
    ("facts", "param"),
    [
        ({"role": "king"}, "role"),
        ({"role": "owner", "scopes": ["usage"]}, "scopes"),
        ({"allowed_models": []}, "allowed_models"),
        ({"allowed_models": ["x" * 200]}, "allowed_models"),
        ({"ip_ranges": ["everywhere"]}, "ip_ranges"),
    ],
)
async def test_a_restriction_that_cannot_be_meant_is_refused_naming_the_field(
    database: Database, facts: dict[str, Any], param: str
) -> None:
    async with database.as_worker() as session:
        tenant = await tenants.create_tenant(session, slug="acme", name="acme")
        with pytest.raises(InvalidRequest) as refused:
            await auth.create_key(
                session,
                tenant_id=tenant.id,
                name="k",
                expires_at=None,
                pepper=PEPPER,
                **{"scopes": None, **facts},
            )
    assert refused.value.param == param


async def test_an_address_that_guesses_keys_is_made_to_wait(
    database: Database, authenticator: Authenticator
) -> None:
    _, plain = await make_key(database)
    guesser, other = ip_address("192.0.2.1"), ip_address("192.0.2.2")
    await authenticator.authenticate(bearer(plain), address=guesser)
    for _ in range(addresses.MAX_FAILURES):
        with pytest.raises(InvalidKey):
            await authenticator.authenticate(bearer(auth.new_key().plain), address=guesser)
    with pytest.raises(LimitReached):
        await authenticator.authenticate(bearer(auth.new_key().plain), address=guesser)
    # Who is known goes on, and so does everybody elsewhere.
    await authenticator.authenticate(bearer(plain), address=guesser)
    authenticator.forget()
    await authenticator.authenticate(bearer(plain), address=other)


async def test_a_key_is_refused_from_an_address_that_is_not_its_own(
    database: Database, authenticator: Authenticator
) -> None:
    async with database.as_worker() as session:
        tenant = await tenants.create_tenant(session, slug="acme", name="acme")
        _, plain = await auth.create_key(
            session,
            tenant_id=tenant.id,
            name="k",
            scopes=None,
            expires_at=None,
            pepper=PEPPER,
            ip_ranges=["192.0.2.0/24", "2001:db8::/32"],
        )
    for address in ("192.0.2.9", "2001:db8::1"):
        await authenticator.authenticate(bearer(plain), address=ip_address(address))
    for stranger in (ip_address("198.51.100.1"), None):
        with pytest.raises(NotAllowed):
            await authenticator.authenticate(bearer(plain), address=stranger)
