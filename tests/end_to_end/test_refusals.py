"""What is wrong is refused precisely, and leaves nothing behind."""

import io
import json
import re
import tarfile
import uuid

import numpy as np
import openai
import pytest
from safetensors.numpy import load_file, save

from adapters.demo.tasks import TASKS

QUESTION = [{"role": "user", "content": "hello"}]


async def _refusal(server, tenant="acme", **fields) -> openai.APIStatusError:
    async with server.client(tenant) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(**{"messages": QUESTION, **fields})
    return caught.value


async def test_a_strangers_model_and_an_unknown_one_are_told_apart_by_nobody(server):
    strangers = await _refusal(server, model="globex-json")
    unknown = await _refusal(server, model="globex-jsox")
    assert isinstance(strangers, openai.NotFoundError)
    assert strangers.code == unknown.code == "model_not_found"
    assert strangers.message.replace("globex-json", "globex-jsox") == unknown.message


@pytest.mark.parametrize("key", ["sk-nothing", "ml_AAAAAAAAAAAA_" + "A" * 49])
async def test_a_wrong_key_is_401(server, key):
    client = openai.AsyncOpenAI(base_url=server.facts["base_url"], api_key=key, max_retries=0)
    async with client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.chat.completions.create(model="acme-sql", messages=QUESTION)
    assert caught.value.code == "invalid_api_key"


def test_a_revoked_and_an_expired_key_are_401(server):
    with server.operator() as operator:
        keys = "/admin/v1/tenants/acme/keys"
        made = operator.post(keys, json={"name": "short-lived"}).json()
        with server.http(made["key"]) as http:
            assert http.get("/v1/models").status_code == 200
            assert operator.delete(f"{keys}/{made['id']}").is_success
            assert http.get("/v1/models").status_code == 401
        past = {"name": "late", "expires_at": "2020-01-01T00:00:00Z"}
        answer = operator.post(keys, json=past)
    assert answer.status_code == 400
    assert answer.json()["param"] == "expires_at"


def test_a_tenants_key_opens_no_admin_route(server):
    with server.http(server.key("acme")) as http:
        document = http.get("/docs/openapi.json").json()
        for path, methods in document["paths"].items():
            if path.startswith("/admin/"):
                for method in methods:
                    answer = http.request(method, _filled(path))
                    assert answer.status_code == 403, (method, path)
                    assert answer.headers["content-type"] == "application/problem+json"


def test_without_a_key_nothing_but_health_and_documentation_answers(server):
    with server.http() as http:
        document = http.get("/docs/openapi.json").json()
        for path, methods in document["paths"].items():
            if path.startswith(("/admin/", "/v1/")):
                for method in methods:
                    answer = http.request(method, _filled(path))
                    assert answer.status_code == 401, (method, path)
                    assert "x-request-id" in answer.headers


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model": "acme-sql", "messages": [', None),
        (b"[]", None),
        (b"[" * 100_000, None),
        (b"", None),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "model"),
        (b'{"model": "acme-sql", "messages": []}', "messages"),
        (b'{"model": "acme-sql", "messages": [{"role": "user"}]}', "messages[0].content"),
        (
            b'{"model": "acme-sql", "messages": [{"role": "x", "content": "a"}]}',
            "messages[0].role",
        ),
    ],
)
def test_a_malformed_body_is_400_and_names_the_field(server, body, param):
    with server.http(server.key("acme")) as http:
        answer = http.post(
            "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_huge_body_is_413(server):
    body = b'{"model": "' + b"a" * (20 << 20) + b'"}'
    with server.http(server.key("acme")) as http:
        answer = http.post(
            "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"extra_body": {"frobnicate": 1}}, "frobnicate"),
        ({"n": 129}, "n"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"response_format": {"type": "json"}}, "response_format.type"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"logit_bias": {"7": 101}}, "logit_bias"),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"extra_body": {"min_p": 1.5}}, "min_p"),
        ({"extra_body": {"min_tokens": 9}, "max_tokens": 8}, "min_tokens"),
        ({"extra_body": {"prompt_logprobs": 1}, "stream": True}, "prompt_logprobs"),
        ({"store": True}, "store"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
async def test_a_field_that_would_be_ignored_is_refused_by_name(server, fields, param):
    error = await _refusal(server, model="acme-sql", **fields)
    assert isinstance(error, openai.BadRequestError)
    assert error.param == param


async def test_fields_at_their_defaults_change_nothing(server):
    async with server.client("acme") as client:
        answer = await client.chat.completions.create(
            model="ACME-SQL@latest",
            messages=[{"role": "developer", "content": "x"}, *QUESTION],
            max_completion_tokens=2,
            n=1,
            tools=[],
            store=False,
            service_tier="auto",
            response_format={"type": "text"},
            presence_penalty=0,
            user="somebody",
        )
    assert answer.usage.completion_tokens <= 2


async def test_a_prompt_and_an_answer_beyond_the_context_are_400(server):
    error = await _refusal(server, model="acme-sql", max_tokens=8190)
    assert error.status_code == 400
    assert error.code == "context_length_exceeded"
    long = [{"role": "user", "content": "word " * 9000}]
    error = await _refusal(server, model="acme-sql", messages=long)
    assert error.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_token_that_the_model_does_not_have_is_400(server, stream):
    async with server.client("acme") as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model="acme-sql", prompt=[1, 10**6], stream=stream)
    assert caught.value.param == "prompt"


def test_names_that_would_spell_the_same_model_are_409(server):
    demo = TASKS["triage"].folder
    with server.operator() as operator:
        for slug in ("north", "north-east"):
            made = operator.post("/admin/v1/tenants", json={"slug": slug, "name": slug})
            assert made.status_code in (201, 409)
        first = operator.post(_versions("north", "east-pole"), files=_files(demo))
        second = operator.post(_versions("north-east", "pole"), files=_files(demo))
    assert first.status_code in (200, 201)
    assert second.status_code == 409
    assert "north-east-pole" in second.json()["detail"]


def test_an_upload_that_is_no_adapter_of_this_model_lists_every_finding(server):
    demo = TASKS["triage"].folder
    config = json.loads((demo / "adapter_config.json").read_text())
    weights = (demo / "adapter_model.safetensors").read_bytes()
    escape = io.BytesIO()
    with tarfile.open(fileobj=escape, mode="w") as archive:
        info = tarfile.TarInfo("../adapter_config.json")
        archive.addfile(info, io.BytesIO())
    cases = {
        "pickle": [_part("adapter_model.bin", b"\x80\x04."), _part("adapter_config.json", config)],
        "truncated": [
            _part("adapter_model.safetensors", weights[:-100]),
            _part("adapter_config.json", config),
        ],
        "dora": [
            _part("adapter_model.safetensors", weights),
            _part("adapter_config.json", {**config, "use_dora": True, "bias": "all"}),
        ],
        "path": [_part("adapter.tar", escape.getvalue())],
        "rank": [
            _part("adapter_model.safetensors", weights),
            _part("adapter_config.json", {**config, "r": 64}),
        ],
    }
    with server.operator() as operator:
        for name, files in cases.items():
            answer = operator.post(_versions("acme", f"bad-{name}"), files=files)
            assert answer.status_code in (400, 422), (name, answer.text)
            if answer.status_code == 422:
                assert answer.json()["findings"], name
            gone = operator.get(f"/admin/v1/tenants/acme/adapters/bad-{name}")
            assert gone.status_code == 404
    assert list((server.data_dir / "staging").rglob("*.safetensors")) == []


def test_an_adapter_that_does_nothing_is_refused(server):
    demo = TASKS["triage"].folder
    tensors = {
        name: np.zeros_like(tensor) if "lora_B" in name else tensor
        for name, tensor in load_file(demo / "adapter_model.safetensors").items()
    }
    files = [
        _part("adapter_model.safetensors", save(tensors)),
        _part("adapter_config.json", json.loads((demo / "adapter_config.json").read_text())),
    ]
    with server.operator() as operator:
        answer = operator.post(_versions("acme", "zero"), files=files)
    assert answer.status_code == 422
    assert {finding["code"] for finding in answer.json()["findings"]} == {"zero_delta"}


def test_the_same_upload_twice_is_one_version(server):
    with server.operator() as operator:
        again = operator.post(_versions("acme", "sql"), files=_files(TASKS["sql"].folder))
        versions = operator.get(_versions("acme", "sql")).json()
    assert again.status_code == 200
    assert again.json()["number"] == 1
    assert len(versions["data"]) == 1


def _filled(path):
    """A path of the OpenAPI document with something in its braces."""
    path = path.replace("{number}", "1")
    return re.sub(r"\{\w+\}", str(uuid.uuid4()), path)


def _versions(tenant, adapter):
    return f"/admin/v1/tenants/{tenant}/adapters/{adapter}/versions"


def _part(name, content):
    data = json.dumps(content).encode() if isinstance(content, dict) else content
    return ("files", (name, data))


def _files(folder):
    names = ("adapter_config.json", "adapter_model.safetensors")
    return [_part(name, (folder / name).read_bytes()) for name in names]
