"""A hostile tenant at every route: it gets nothing of another's, and learns not even that it is.

Whatever is said in the other tenant's rows, and in nobody else's, must be in no answer.
"""

import itertools
import urllib.parse
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import pytest
import pytest_asyncio
from litestar.routes import HTTPRoute

from gateway.auth import new_key
from tests.gateway.admin_plane import tls
from tests.isolation.catalogue import Rows, at_rest, rows_by_owner, secrets_of
from tests.isolation.conftest import NEIGHBOUR, Town
from tests.isolation.estate import Estate, Names, build, other
from tests.isolation.routes import CASES, Ask, Case

pytestmark = pytest.mark.asyncio(loop_scope="session")

REFUSED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)
# What is no route at all, or is not asked so, says nothing either.
NO_ROUTE = (*REFUSED, httpx.codes.NOT_FOUND, httpx.codes.METHOD_NOT_ALLOWED)
CHANGING = ("POST", "PUT", "PATCH", "DELETE")
# Different for each answer, whatever was asked.
OWN_OF_ANSWER = ("date", "x-request-id")
ADDRESSES = (f"10.{a}.{b}.{c}" for a, b, c in itertools.product(range(1, 250), repeat=3))


@dataclass(frozen=True)
class Intruder:
    """Sends what it wants, from an address of its own each time, and scans what comes back."""

    client: httpx.AsyncClient
    victim: Estate
    secrets: frozenset[str]

    async def send(
        self, case: Case, ask: Ask, *, key: str | None, **changes: Any
    ) -> httpx.Response:
        return await self.request(
            case.method, case.url(self.victim.names, ask), ask, key=key, **changes
        )

    async def request(
        self,
        method: str,
        path: str,
        ask: Ask,
        *,
        key: str | None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        """Ask, naming the victim in every header that somebody could listen to."""
        sent = {**smuggled_headers(self.victim.names), **ask.headers, **(headers or {})}
        if key is not None:
            sent["authorization"] = key if " " in key else f"Bearer {key}"
        target = path + (f"?{httpx.QueryParams(ask.query)}" if ask.query else "")
        answer = await self.client.request(
            method,
            "/",
            json=ask.json,
            content=ask.content,
            headers=sent,
            # As it is: what httpx would tidy up is what is tried here.
            extensions={"target": target.encode()},
        )
        self.scan(answer, target)
        return answer

    def scan(self, answer: httpx.Response, target: str) -> None:
        """No fault of ours, and nothing of the victim but what was said in the asking."""
        assert answer.status_code < 500, answer.text
        asked = " ".join(
            (
                urllib.parse.unquote_plus(target),
                str(answer.request.headers.raw),
                answer.request.content.decode(errors="replace"),
            )
        ).lower()
        told = f"{answer.headers.raw} {answer.content.decode(errors='replace')}"
        leaked = {each for each in self.secrets if each in told and each.lower() not in asked}
        assert not leaked, f"{answer.request.method} {target} told {leaked}"


def smuggled_headers(names: Names) -> dict[str, str]:
    return {
        "x-forwarded-for": next(ADDRESSES),
        "x-tenant": names.tenant,
        "x-tenant-id": names.tenant,
        "x-manylora-tenant": names.tenant,
        "x-forwarded-user": names.tenant,
        "x-request-id": names.request_id,
        "openai-organization": names.tenant,
        "openai-project": names.adapter,
        "cookie": f"tenant={names.tenant}; key={names.key_id}",
    }


@pytest_asyncio.fixture(loop_scope="session")
async def intruder(town: Town) -> AsyncIterator[Intruder]:
    """Afterwards the victim has what it had, to the row."""
    before = await rows_by_owner(town.home.superuser_url)
    secrets = secrets_of(town.victim.tenant_id, before)
    async with httpx.AsyncClient(
        base_url=town.gateway.url, timeout=30, trust_env=False, verify=tls()
    ) as client:
        yield Intruder(client, town.victim, frozenset(secrets))
    after = await rows_by_owner(town.home.superuser_url)
    assert at_rest(after[town.victim.tenant_id]) == at_rest(before[town.victim.tenant_id])


def a_client(town: Town) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=town.gateway.url, trust_env=False, verify=tls())


def cases(*reaches: str) -> list[Case]:
    return [case for case in CASES if case.reach in reaches]


async def test_every_route_has_a_case_and_every_case_a_route(town: Town) -> None:
    async with a_client(town) as client:
        document = (await client.get("/docs/openapi.json")).json()
    routes = [
        f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item
    ]
    assert sorted(case.name for case in CASES) == sorted(routes)


async def test_what_the_document_leaves_out_is_the_document_itself_and_files(town: Town) -> None:
    routes = town.gateway.app.routes
    assert all(isinstance(route, HTTPRoute) for route in routes)
    hidden = {
        route.path
        for route in routes
        if isinstance(route, HTTPRoute)
        for handler in route.route_handlers
        # Litestar answers OPTIONS itself; the guard refuses it.
        if handler.http_methods != {"OPTIONS"} and not handler.resolve_include_in_schema()
    }
    assert {path.split("/")[1] for path in hidden} == {"docs", "static"}


async def test_without_a_good_key_nobody_gets_anywhere(
    town: Town, intruder: Intruder, subtests: pytest.Subtests
) -> None:
    keys = [None, *broken_keys(town.victim)]
    for case in cases("tenant", "operator"):
        with subtests.test(case.name):
            for key in keys:
                ask = case.asks(intruder.victim.names)[0]
                answer = await intruder.send(case, ask, key=key)
                assert answer.status_code == httpx.codes.UNAUTHORIZED, (key, answer.text)


def broken_keys(victim: Estate) -> list[str]:
    """The victim's keys as they are no good, and what only looks like one."""
    key = victim.keys["owner"]
    public_id = key.split("_")[1]
    guessed = new_key().plain
    return [
        victim.revoked_key,
        guessed,
        key[:-1] + ("0" if key[-1] != "0" else "1"),
        key.swapcase(),
        f"ml_{public_id}",
        key[:16],
        f"Basic {key}",
        f"Bearer Bearer {key}",
        "Bearer ml_",
        f"Bearer {key}\t{key}",
        "Bearer ml_' OR 1=1 --",
    ]


async def test_no_tenants_key_opens_a_route_of_operators(
    town: Town, intruder: Intruder, subtests: pytest.Subtests
) -> None:
    for case in cases("operator"):
        with subtests.test(case.name):
            for key, ask in itertools.product(
                town.attacker.keys.values(), case.asks(intruder.victim.names)
            ):
                answer = await intruder.send(case, ask, key=key)
                assert answer.status_code == httpx.codes.FORBIDDEN, answer.text


async def test_no_other_way_of_asking_opens_one_either(
    town: Town, intruder: Intruder, subtests: pytest.Subtests
) -> None:
    names = intruder.victim.names
    for case in cases("operator"):
        ask = case.asks(names)[0]
        url = case.url(names, ask)
        with subtests.test(case.name):
            for method, path, headers in (
                *((method, url, {}) for method in ("HEAD", "OPTIONS", "TRACE", "LOCK")),
                *((case.method, other, {}) for other in spellings_of(url)),
                *(
                    (method, url, {header: case.method})
                    for method in ("GET", "POST")
                    for header in ("x-http-method-override", "x-http-method", "x-method-override")
                ),
            ):
                answer = await intruder.request(
                    method, path, ask, key=town.attacker.keys["owner"], headers=headers
                )
                assert answer.status_code in NO_ROUTE, (method, path, answer.text)


def spellings_of(path: str) -> list[str]:
    """What a proxy or a careless router may take for the same path."""
    inner = path.removeprefix("/")
    return [
        f"{path}/",
        f"/{path}",
        path.replace("/", "//"),
        f"/v1/..{path}",
        f"/v1/models/..{path}",
        f"/docs/..{path}",
        f"/docs/%2e%2e{path}",
        f"/docs/%2e%2e%2f{inner}",
        f"/static/..{path}",
        f"/static/%2e%2e{path}",
        f"/health/live/..{path}",
        f"/health/live/%2e%2e/%2e%2e{path}",
        f"/.{path}",
        f"{path}/.",
        f"{path};x=/health/live",
        f"{path}%00",
        f"{path}%20",
        f"{path}.json",
        path.upper(),
        path.replace("admin", "Admin").replace("lora", "Lora"),
        path.replace("/a", "/%61").replace("/v", "/%76"),
        "/" + inner.replace("/", "\\"),
        "http://localhost" + path,
    ]


async def test_a_public_route_is_no_way_to_another_one(
    town: Town, intruder: Intruder, subtests: pytest.Subtests
) -> None:
    live = await intruder.request("GET", "/health/live", Ask(), key=None)
    for case in cases("tenant", "operator"):
        url = case.url(intruder.victim.names, case.asks(intruder.victim.names)[0])
        headers = dict.fromkeys(("x-original-url", "x-rewrite-url", "x-forwarded-uri"), url)
        with subtests.test(case.name):
            answer = await intruder.request(
                "GET", "/health/live", Ask(), key=town.attacker.keys["owner"], headers=headers
            )
            assert answer.content == live.content


async def test_another_tenants_things_are_not_told_from_what_is_not_there(
    town: Town, intruder: Intruder, subtests: pytest.Subtests
) -> None:
    names = intruder.victim.names
    strangers = [names.of_nothing(tenant=tenant) for tenant in (names.tenant, other(names.tenant))]
    for case in cases("tenant"):
        for number, ask in enumerate(case.names(names)):
            with subtests.test(f"{case.name} {ask}"):
                answer = await intruder.send(case, ask, key=town.attacker.keys["owner"])
                assert 400 <= answer.status_code < 500, answer.text
                assert answer.status_code not in REFUSED or "operator" in str(ask.json)
                for nothing in strangers:
                    ask = case.names(nothing)[number]
                    same = await intruder.request(
                        case.method,
                        case.url(nothing, ask),
                        ask,
                        key=town.attacker.keys["owner"],
                    )
                    assert told(answer, names) == told(same, nothing)


def told(answer: httpx.Response, names: Names) -> tuple[Any, ...]:
    """An answer without the names that were asked for, and without what each has of its own."""
    said = answer.text
    for name in sorted(asdict(names).values(), key=len, reverse=True):
        said = said.replace(name, "...").replace(name.upper(), "...")
    headers = [(k, v) for k, v in answer.headers.multi_items() if k not in OWN_OF_ANSWER]
    return answer.status_code, headers, said


async def test_what_is_said_of_another_tenant_beside_the_question_changes_nothing(
    town: Town, intruder: Intruder, subtests: pytest.Subtests
) -> None:
    for case in cases("tenant", "anybody"):
        for ask in case.own(intruder.victim.names):
            with subtests.test(f"{case.name} {ask}"):
                answer = await intruder.request(
                    case.method,
                    case.url(town.attacker.names, ask),
                    ask,
                    key=town.attacker.keys["owner"],
                )
                assert answer.is_success, answer.text
                # Nobody gets an answer that was kept for another.
                assert "idempotent-replayed" not in answer.headers


async def test_a_viewer_changes_nothing_of_its_own_tenant(
    town: Town, intruder: Intruder, subtests: pytest.Subtests
) -> None:
    names = town.attacker.names
    # What the policy decided before is written within a minute, or when it is asked for.
    await town.gateway.operator.get(f"/admin/v1/tenants/{names.tenant}/policy/decisions")
    before = await rows_by_owner(town.home.superuser_url)
    for case in cases("tenant"):
        if case.method not in CHANGING:
            continue
        with subtests.test(case.name):
            for ask in (*case.asks(names), case.honest_ask(names)):
                answer = await intruder.request(
                    case.method, case.url(names, ask), ask, key=town.attacker.keys["viewer"]
                )
                assert answer.status_code == httpx.codes.FORBIDDEN, answer.text
    after = await rows_by_owner(town.home.superuser_url)
    mine = town.attacker.tenant_id
    assert without_last_use(after[mine]) == without_last_use(before[mine])


def without_last_use(rows: Rows) -> Rows:
    entries = [{**row, "last_used_at": None} for row in rows["api_keys"]]
    return at_rest({**rows, "api_keys": entries})


async def test_no_file_of_the_server_is_in_its_documentation(intruder: Intruder) -> None:
    for path in (
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static//etc/passwd",
        "/docs/../../etc/passwd",
        "/docs/%2e%2e%2fadmin",
    ):
        answer = await intruder.request("GET", path, Ask(), key=None)
        assert answer.status_code == httpx.codes.NOT_FOUND, path


@pytest.mark.parametrize("path", ["keys", "models", "budgets", "statements", "usage"])
async def test_what_the_other_tenant_itself_is_told_would_be_noticed(town: Town, path: str) -> None:
    [case] = [case for case in cases("tenant") if case.name == f"GET /v1/{path}"]
    everything = await rows_by_owner(town.home.superuser_url)
    secrets = frozenset(secrets_of(town.victim.tenant_id, everything))
    async with a_client(town) as client:
        with pytest.raises(AssertionError, match="told"):
            await Intruder(client, town.victim, secrets).send(
                case, case.honest_ask(town.victim.names), key=town.victim.keys["owner"]
            )


async def test_the_same_questions_are_answered_to_whom_they_are_open(
    town: Town, subtests: pytest.Subtests
) -> None:
    """What was refused above was well asked."""
    # It is used up by this.
    owner = await build(town.gateway, "hooli", grantee=NEIGHBOUR)
    names = owner.names
    for case in CASES:
        ask = case.honest_ask(names)
        key = town.operator_key if case.reach == "operator" else owner.keys["owner"]
        with subtests.test(case.name):
            async with a_client(town) as client:
                answer = await client.request(
                    case.method,
                    case.url(names, ask),
                    params=ask.query,
                    json=ask.json,
                    content=ask.content,
                    headers={**ask.headers, "authorization": f"Bearer {key}"},
                )
            assert answer.is_success, answer.text
