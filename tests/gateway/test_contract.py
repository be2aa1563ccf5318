"""What the OpenAPI document says is what the gateway does: schemathesis asks it everything.

It reads the document, makes up requests, right ones and wrong ones, and compares each answer with
what the document has for it: no 5xx, no status, media type, header or body that it leaves out.
"""

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from gateway import addresses
from gateway.database import Database
from tests.conftest import Home
from tests.gateway.whole_gateway import MODEL, Gateway, chat, whole_gateway
from tests.isolation.estate import WITHHELD, Estate, TrustingCore, build

SEED = 7
# The others have opinions: which wrong requests must get which status, and that whatever a schema
# allows is accepted, where names of what is not there never are. That no route answers without a
# key is shown elsewhere: after so many wrong keys this address would only hear that it must wait.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
)


@pytest.fixture
async def shop(
    home: Home, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Gateway, Estate]]:
    """A gateway, and a tenant of it that has something of everything.

    It bears with wrong keys: an address that has guessed many would be told nothing else.
    """
    monkeypatch.setattr(addresses, "MAX_FAILURES", 10**9)
    async with whole_gateway(home, database, tmp_path, core=TrustingCore()) as gateway:
        yield gateway, await build(gateway, "globex", grantee="acme")


async def test_every_answer_is_in_the_document(
    shop: tuple[Gateway, Estate], tmp_path: Path
) -> None:
    await check(*shop, tmp_path, "--phases", "examples,fuzzing", "--max-examples", "3")


@pytest.mark.slow
async def test_every_answer_is_in_the_document_whatever_is_asked(
    shop: tuple[Gateway, Estate], tmp_path: Path
) -> None:
    await check(*shop, tmp_path, "--max-examples", "60")


@pytest.mark.parametrize(
    ("path", "body", "component"),
    [
        ("/v1/chat/completions", chat("w7", stream=True), "ChatCompletionChunk"),
        (
            "/v1/completions",
            {"model": MODEL, "prompt": "w7", "stream": True, "max_tokens": 3},
            "Completion",
        ),
    ],
)
async def test_the_events_of_a_stream_are_what_the_document_says(
    home: Home, database: Database, tmp_path: Path, path: str, body: Any, component: str
) -> None:
    async with whole_gateway(home, database, tmp_path) as gateway:
        document = (await gateway.client.get("/docs/openapi.json")).json()
        body["stream_options"] = {"include_usage": True}
        *events, done, end = (await gateway.client.post(path, json=body)).text.split("\n\n")
    answer = document["paths"][path]["post"]["responses"]["200"]
    data = answer["content"]["text/event-stream"]["schema"]["properties"]["data"]
    told = [f"#/components/schemas/{name}" for name in (component, "OpenAIError")]
    assert data["contentSchema"] == {"anyOf": [{"$ref": each} for each in told]}
    described = Draft202012Validator({"$ref": told[0], **document})
    for event in events:
        described.validate(json.loads(event.removeprefix("data: ")))
    assert (len(events) > 1, done, end) == (True, "data: [DONE]", "")


async def test_the_events_of_a_response_come_under_the_names_that_the_document_has(
    home: Home, database: Database, tmp_path: Path
) -> None:
    body = {"model": MODEL, "input": "w7", "stream": True, "max_output_tokens": 3}
    async with whole_gateway(home, database, tmp_path) as gateway:
        document = (await gateway.client.get("/docs/openapi.json")).json()
        *events, end = (await gateway.client.post("/v1/responses", json=body)).text.split("\n\n")
    answer = document["paths"]["/v1/responses"]["post"]["responses"]["200"]
    schema = answer["content"]["text/event-stream"]["schema"]
    assert "DONE" not in json.dumps(schema)
    envelope = Draft202012Validator({**schema, **document})
    described = Draft202012Validator({**schema["properties"]["data"]["contentSchema"], **document})
    for event in events:
        parts = dict(line.split(": ", 1) for line in event.split("\n"))
        envelope.validate(parts)
        data = json.loads(parts["data"])
        described.validate(data)
        assert data["type"] == parts["event"]
    assert (len(events) > 1, end) == (True, "")


async def test_headers_of_generations_are_in_the_document(
    home: Home, database: Database, tmp_path: Path
) -> None:
    async with whole_gateway(home, database, tmp_path) as gateway:
        document = (await gateway.client.get("/docs/openapi.json")).json()
        await gateway.limit(requests_per_minute=600, tokens_per_minute=60_000)
        named = {"Idempotency-Key": "a"}
        answers = [
            await gateway.client.post("/v1/chat/completions", json=chat("w7"), headers=named)
            for _ in range(2)
        ]
        await gateway.limit(requests_per_minute=1)
        refused = [
            await gateway.client.post("/v1/chat/completions", json=chat("w7")) for _ in range(2)
        ]
    told = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    for answer in (*answers, refused[-1]):
        ours = {each for each in answer.headers if each.startswith(("x-", "retry", "idempotent"))}
        assert ours <= told[str(answer.status_code)]["headers"].keys()
    assert "idempotent-replayed" in answers[-1].headers
    assert "retry-after" in refused[-1].headers


async def test_the_page_for_people_comes_from_this_host_alone(
    home: Home, database: Database, tmp_path: Path
) -> None:
    async with whole_gateway(home, database, tmp_path) as gateway:
        page = (await gateway.client.get("/docs")).text
        places = re.findall(r"""(?:src|href)=["']([^"']*)""", page.partition("Redoc.init(")[0])
        found = [await gateway.client.get(each) for each in places if each.startswith("/")]
    assert all(each.is_success for each in found)
    assert [each for each in places if not each.startswith("/")] == ["data:,"]
    assert "default-src 'self'" in page


async def check(gateway: Gateway, estate: Estate, folder: Path, *options: str) -> None:
    config = folder / "schemathesis.toml"
    await asyncio.to_thread(config.write_text, configuration(gateway, estate))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)),
        *("run", f"{gateway.url}/docs/openapi.json", "--checks", ",".join(CHECKS)),
        *("--seed", str(SEED), "--generation-database", "none", "--continue-on-failure"),
        *("--no-color", "--no-shrink", *options),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    # Nothing was kept from an answer of its own.
    assert b"Rate limited" not in said, said.decode()


def configuration(gateway: Gateway, estate: Estate) -> str:
    """Whose key is sent where, and names of what is there: behind others is always one 404."""
    lines = []
    places = known_names(estate)
    for number, values in enumerate(places.values()):
        lines += [f"[dictionaries.names{number}]", f"values = {json.dumps(values)}"]
    lines.append("[parameters]")
    for number, place in enumerate(places):
        lines.append(f'"{place}" = {{ dictionary = "names{number}", probability = 0.8 }}')
    for paths, client in (
        ("^/v1/(?!.*load_lora)", gateway.client),
        ("^/(admin|health|v1/.*load_lora)", gateway.operator),
    ):
        lines += ["[[operations]]", f"include-path-regex = {json.dumps(paths)}"]
        lines.append(
            f"headers = {{ Authorization = {json.dumps(client.headers['authorization'])} }}"
        )
    for path, parameter, name in (
        # Without its engine there would be nothing left to ask, nor without the tenant that asks.
        ("/admin/v1/base-models/{base_model}/retire", "base_model", WITHHELD),
        ("/admin/v1/tenants/{tenant}", "tenant", estate.names.tenant),
    ):
        lines += ["[[operations]]", f"include-path = {json.dumps(path)}"]
        lines += [f"parameters = {{ {parameter} = {json.dumps(name)} }}"]
    return "\n".join(lines)


def known_names(estate: Estate) -> dict[str, Sequence[str | int]]:
    """What stands where in requests."""
    names = estate.names
    return {
        "path.tenant": [names.tenant],
        "path.adapter": [names.adapter],
        "path.number": [1, 2],
        "path.version": ["1", "latest"],
        "path.alias": [names.alias, "latest"],
        "path.file": [names.file],
        "path.key_id": [names.key_id],
        "path.budget_id": [names.budget_id],
        "path.webhook_id": [names.webhook_id],
        "path.upload_id": [names.upload_id],
        "path.grantee": ["acme"],
        "path.base_model": [MODEL, WITHHELD],
        "path.request_id": [names.request_id],
        "path.model": [MODEL, names.model],
        "body.model": [MODEL, names.model],
        "body.tenant": [names.tenant],
        "query.tenant": [names.tenant],
    }
