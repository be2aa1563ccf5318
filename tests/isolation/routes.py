"""Every route of the API, and how a stranger would ask it for what is another tenant's.

A list of cases and nothing else: who asks, and what may come back, is in the test.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import httpx

from tests.gateway.admin_plane import adapter_files
from tests.gateway.whole_gateway import MODEL, chat
from tests.isolation.estate import (
    DELETED_VERSION,
    LONG_AGO,
    MODULES,
    SPARE,
    SPARE_ADDRESSES,
    UPLOADED,
    Names,
    a_line,
)

# anybody: there is nothing to keep secret. tenant: with a tenant's key, for its own things.
# operator: no tenant's key at all.
Reach = Literal["anybody", "tenant", "operator"]
MONTH = f"{LONG_AGO:%Y-%m}"


@dataclass(frozen=True)
class Ask:
    """What goes into one request besides its path."""

    json: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    query: dict[str, str] = field(default_factory=dict)
    # In place of the path's own parameters.
    path: dict[str, str] = field(default_factory=dict)
    content: bytes | None = None


@dataclass(frozen=True)
class Case:
    """One route. `names` ask for things by name: another's are as good as none.

    `own` ask for the caller's own things and name the other's where that must change nothing.
    """

    method: str
    path: str
    reach: Reach
    names: Callable[[Names], Sequence[Ask]] = lambda _: ()
    own: Callable[[Names], Sequence[Ask]] = lambda _: ()
    # The one to ask by the tenant itself, or the operator for it: it is answered.
    honest: Callable[[Names], Ask] | None = None

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"

    def url(self, names: Names, ask: Ask) -> str:
        parameters = {
            **{each: getattr(names, each) for each in names.__dataclass_fields__},
            "model": names.model,
            "number": names.statement if "/statements/" in self.path else names.version,
            **ask.path,
        }
        return self.path.format(**parameters)

    def asks(self, names: Names) -> list[Ask]:
        """Everything that the case knows to ask; a bare request where it knows nothing."""
        return [*self.names(names), *self.own(names)] or [Ask()]

    def honest_ask(self, names: Names) -> Ask:
        return self.honest(names) if self.honest is not None else self.asks(names)[0]


def spellings(names: Names) -> list[str]:
    """What `model` can say of somebody's adapter."""
    bare = names.model
    versions = [names.version, "latest", names.alias, names.version_digest, "99"]
    return [bare, bare.upper(), *(f"{bare}@{version}" for version in versions)]


def generating(path: str, make: Callable[..., dict[str, Any]], *, is_streamed: bool = True) -> Case:
    """A route that a model answers at."""

    def named(names: Names) -> list[Ask]:
        asks = [Ask(make(model=each)) for each in spellings(names)]
        streams = [Ask(make(model=each, stream=True)) for each in spellings(names)]
        return asks + streams if is_streamed else asks

    def own(_: Names) -> list[Ask]:
        return [Ask(make(model=MODEL)), *([Ask(make(model=MODEL, stream=True))] * is_streamed)]

    return Case("POST", path, "tenant", named, own)


def chatting() -> Case:
    """As the other named its attempt, and with everybody's model, to the letter what it sent."""
    case = generating("/v1/chat/completions", chat)
    retried = {"x-stainless-retry-count": "1"}

    def attempt(names: Names, **fields: Any) -> Ask:
        return Ask(chat(**fields), {"idempotency-key": names.attempt, **retried})

    return replace(
        case,
        names=lambda n: [attempt(n, model=n.model), *case.names(n)],
        own=lambda n: [attempt(n, model=MODEL, user=n.end_user), *case.own(n)],
        honest=lambda n: Ask(chat(model=n.model)),
    )


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": "w7 w8", "max_tokens": 2, "ignore_eos": True, **fields}


def response(**fields: Any) -> dict[str, Any]:
    return {"input": "w7 w8", "max_output_tokens": 2, "ignore_eos": True, **fields}


def embeddings(**fields: Any) -> dict[str, Any]:
    return {"input": ["w7 w8", "w9"], **fields}


def tokenize(**fields: Any) -> dict[str, Any]:
    return {"prompt": "w7 w8", "return_token_strs": True, **fields}


def detokenize(**fields: Any) -> dict[str, Any]:
    return {"tokens": [7, 8], **fields}


def estimate(**fields: Any) -> dict[str, Any]:
    return {"prompt": "w7 w8", "max_tokens": 2, **fields}


def smuggled(names: Names) -> list[Ask]:
    """Names of the other where this route reads none."""
    return [Ask(), Ask(query={"tenant": names.tenant, "tenant_id": names.key_id})]


def overreaching_keys(names: Names) -> list[Ask]:
    key = {"name": "mine"}
    return [
        Ask({**key, "tenant": names.tenant}),
        Ask({**key, "tenant_id": names.key_id}),
        Ask({**key, "id": names.key_id}),
        Ask({**key, "scopes": ["operator"]}),
        Ask({**key, "role": "operator"}),
        Ask({**key, "scopes": ["inference", "operator"]}),
    ]


def reports(names: Names) -> list[Ask]:
    since = {"from": "2026-01-01", "to": "2027-01-01"}
    groups = "hour,adapter,version,key,model,user"
    return [
        Ask(query={**since, "group_by": groups, "format": kind})
        for kind in ("json", "csv", "parquet")
    ]


def nosy_reports(names: Names) -> list[Ask]:
    return [
        Ask(query={"tenant": names.tenant}),
        Ask(query={"tenant_id": names.key_id}),
        Ask(query={"group_by": "tenant"}),
        Ask(query={"group_by": "day,tenant_id"}),
    ]


def formats(_: Names) -> list[Ask]:
    return [Ask(query={"format": kind}) for kind in ("json", "csv", "html")]


def rest_of_upload() -> Ask:
    """What the upload on its way still waits for."""
    [file] = set(UPLOADED) - {"adapter_config.json"}
    content = UPLOADED[file]
    size = len(content)
    whole = {"content-range": f"bytes 0-{size - 1}/{size}"}
    return Ask(content=content, headers=whole, path={"file": file})


def whole_upload() -> Ask:
    made = adapter_files(seed=8, modules=MODULES, target_modules=["up_proj"])
    files = [("files", (name, data)) for name, data in made.items()]
    request = httpx.Request("POST", "http://anywhere", files=files)
    return Ask(content=request.read(), headers={"content-type": request.headers["content-type"]})


def lines_upload() -> Ask:
    files = {"file": ("lines.jsonl", a_line("mine"))}
    request = httpx.Request("POST", "http://anywhere", data={"purpose": "batch"}, files=files)
    return Ask(content=request.read(), headers={"content-type": request.headers["content-type"]})


def batch_of(file_id: str) -> Ask:
    asked = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return Ask({**asked, "input_file_id": file_id})


def pages(after: str) -> list[Ask]:
    return [Ask(), Ask(query={"after": after})]


def body(make: Callable[[Names], Any]) -> Callable[[Names], list[Ask]]:
    return lambda names: [Ask(make(names))]


def query(make: Callable[[Names], dict[str, str]]) -> Callable[[Names], list[Ask]]:
    return lambda names: [Ask(query=make(names))]


def spare(json: Any) -> Callable[[Names], list[Ask]]:
    return lambda _: [Ask(json, path={"base_model": SPARE})]


def admin(method: str, path: str, asks: Callable[[Names], Sequence[Ask]] = lambda _: ()) -> Case:
    return Case(method, f"/admin/v1{path}", "operator", asks)


TENANT = "/tenants/{tenant}"
ADAPTER = TENANT + "/adapters/{adapter}"
VERSION = ADAPTER + "/versions/{number}"
ALIAS = ADAPTER + "/aliases/{alias}"
UPLOAD = ADAPTER + "/uploads/{upload_id}"
LIMITS = body(lambda _: {"requests_per_minute": 10**6})
DECLARED = [
    {"name": name, "size_bytes": 1, "sha256": "0" * 64}
    for name in ("adapter_config.json", "adapter_model.safetensors")
]

CASES = [
    # For tenants.
    # What was used before the cases below use something in somebody else's words.
    Case("GET", "/v1/usage", "tenant", nosy_reports, reports, lambda names: reports(names)[0]),
    chatting(),
    generating("/v1/completions", completion),
    generating("/v1/responses", response),
    generating("/v1/embeddings", embeddings, is_streamed=False),
    generating("/v1/estimate", estimate, is_streamed=False),
    generating("/v1/tokenize", tokenize, is_streamed=False),
    generating("/v1/detokenize", detokenize, is_streamed=False),
    Case("GET", "/v1/keys", "tenant", own=smuggled),
    Case(
        "POST",
        "/v1/keys",
        "tenant",
        overreaching_keys,
        body(lambda names: {"name": "mine", "allowed_models": [f"{names.tenant}-*"]}),
        lambda _: Ask({"name": "mine"}),
    ),
    Case("POST", "/v1/keys/{key_id}/rotate", "tenant", body(lambda _: {"overlap_s": 0})),
    Case("GET", "/v1/limits", "tenant", own=smuggled),
    Case("GET", "/v1/budgets", "tenant", own=smuggled),
    Case("GET", "/v1/policy", "tenant", own=smuggled),
    Case("GET", "/v1/models", "tenant", own=smuggled),
    Case(
        "GET",
        "/v1/models/{model}",
        "tenant",
        lambda names: [Ask(path={"model": each}) for each in spellings(names)],
    ),
    Case("GET", "/v1/contents/{request_id}", "tenant", lambda _: [Ask()]),
    Case("GET", "/v1/files", "tenant", own=lambda names: pages(names.file_id)),
    Case("POST", "/v1/files", "tenant", own=lambda _: [lines_upload()]),
    Case("GET", "/v1/files/{file_id}", "tenant", lambda _: [Ask()]),
    Case("GET", "/v1/files/{file_id}/content", "tenant", lambda _: [Ask()]),
    Case("GET", "/v1/batches", "tenant", own=lambda names: pages(names.batch_id)),
    Case("GET", "/v1/batches/{batch_id}", "tenant", lambda _: [Ask()]),
    Case("POST", "/v1/batches/{batch_id}/cancel", "tenant", lambda _: [Ask()]),
    Case(
        "DELETE",
        "/v1/files/{file_id}",
        "tenant",
        lambda _: [Ask()],
        honest=lambda names: Ask(path={"file_id": names.old_file_id}),
    ),
    Case("POST", "/v1/batches", "tenant", lambda names: [batch_of(names.file_id)]),
    Case("GET", "/v1/statements", "tenant", own=smuggled),
    Case("GET", "/v1/statements/{number}", "tenant", formats),
    # For everybody.
    Case("GET", "/health/live", "anybody", own=smuggled),
    Case("GET", "/health/ready", "anybody", own=smuggled),
    # For operators: what only looks first, and what takes away last.
    admin("GET", "/tenants"),
    admin("GET", TENANT),
    admin("GET", TENANT + "/keys"),
    admin("GET", TENANT + "/limits"),
    admin("GET", TENANT + "/keys/{key_id}/limits"),
    admin("GET", ADAPTER + "/limits"),
    admin("GET", TENANT + "/budgets"),
    admin("GET", TENANT + "/retention"),
    admin("GET", TENANT + "/billing-account"),
    admin("GET", TENANT + "/policy"),
    admin("GET", TENANT + "/policy/decisions"),
    admin("GET", "/webhooks"),
    admin("GET", "/webhooks/{webhook_id}/deliveries"),
    admin("GET", TENANT + "/adapters", query(lambda _: {"deleted": "true"})),
    admin("GET", ADAPTER),
    admin("GET", ADAPTER + "/versions"),
    admin("GET", VERSION),
    admin("GET", VERSION + "/files"),
    admin("GET", VERSION + "/files/{file}"),
    admin("GET", VERSION + "/certificate", query(lambda _: {"format": "text"})),
    admin("GET", ADAPTER + "/aliases"),
    admin("GET", ALIAS),
    admin("GET", ALIAS + "/history"),
    admin("GET", ADAPTER + "/grants"),
    admin("GET", UPLOAD),
    admin("GET", "/base-models"),
    admin("GET", "/engines"),
    admin("GET", "/prices"),
    admin("GET", "/billing/usage", query(lambda names: {"tenant": names.tenant})),
    admin("GET", "/billing/statements", query(lambda names: {"tenant": names.tenant})),
    admin("GET", "/billing/statements/{number}", query(lambda _: {"format": "html"})),
    admin("GET", "/billing/exports/focus", query(lambda _: {"month": MONTH})),
    admin(
        "GET",
        "/billing/exports/stripe",
        query(lambda _: {"from": f"{MONTH}-01T00:00:00Z", "to": f"{MONTH}-28T00:00:00Z"}),
    ),
    admin("GET", "/audit", query(lambda names: {"tenant": names.tenant})),
    admin("POST", "/tenants", body(lambda names: {"slug": f"{names.tenant}-too"})),
    admin("PATCH", TENANT, body(lambda _: {"max_adapters": 9})),
    admin(
        "POST",
        TENANT + "/keys",
        body(lambda _: {"name": "mine", "role": "owner"}),
    ),
    admin("POST", TENANT + "/keys/{key_id}/rotate", body(lambda _: {"overlap_s": 0})),
    admin("PUT", TENANT + "/limits", LIMITS),
    admin("PUT", TENANT + "/keys/{key_id}/limits", LIMITS),
    admin("PUT", ADAPTER + "/limits", LIMITS),
    admin("POST", TENANT + "/budgets", body(lambda _: {"cap_nano": 0, "period": "day"})),
    admin("PATCH", TENANT + "/budgets/{budget_id}", body(lambda _: {"cap_nano": 0})),
    admin("PUT", TENANT + "/retention", body(lambda _: {"keep_days": 1})),
    admin("PUT", TENANT + "/policy", body(lambda _: {"max_output_tokens": 1})),
    admin("PUT", TENANT + "/billing-account", body(lambda _: {"bill_to": "Somebody"})),
    admin("POST", "/webhooks", body(lambda n: {"url": "http://127.0.0.1:9/", "tenant": n.tenant})),
    admin(
        "POST",
        "/prices",
        body(
            lambda names: {
                "base_model": MODEL,
                "tenant": names.tenant,
                "input_nano_per_million": 0,
                "output_nano_per_million": 0,
            }
        ),
    ),
    admin("POST", "/billing/close", body(lambda n: {"month": MONTH, "tenant": n.tenant})),
    admin("POST", ADAPTER + "/versions/{version}/warm", body(lambda _: {"to": "host"})),
    admin("POST", ADAPTER + "/versions/{version}/pin"),
    admin("POST", ADAPTER + "/versions/{version}/unpin"),
    admin("PATCH", ADAPTER, body(lambda _: {"default_alias": "latest"})),
    admin("PUT", ALIAS, body(lambda _: {"version": 2, "expected_version": 1})),
    admin("POST", ALIAS + "/rollback", body(lambda _: {})),
    admin("PUT", ADAPTER + "/grants/{grantee}"),
    admin("POST", ADAPTER + "/uploads", body(lambda _: {"files": DECLARED})),
    admin(
        "PUT",
        UPLOAD + "/files/{file}",
        lambda _: [rest_of_upload()],
    ),
    admin("POST", UPLOAD + "/complete"),
    admin(
        "POST",
        ADAPTER + "/versions",
        lambda _: [whole_upload()],
    ),
    Case(
        "POST",
        "/v1/load_lora_adapter",
        "operator",
        body(lambda names: {"lora_name": names.model, "lora_path": "sql", "load_inplace": True}),
    ),
    admin("POST", "/base-models", body(lambda _: {"address": SPARE_ADDRESSES[0]})),
    admin("POST", "/base-models/{base_model}/swap", spare({"address": SPARE_ADDRESSES[1]})),
    admin("POST", "/base-models/{base_model}/retire", spare({})),
    admin("POST", TENANT + "/erase", body(lambda names: {"user": names.end_user})),
    admin("DELETE", UPLOAD),
    admin("DELETE", ADAPTER + "/grants/{grantee}"),
    admin("DELETE", ALIAS),
    admin("DELETE", "/webhooks/{webhook_id}"),
    admin("DELETE", TENANT + "/policy"),
    admin("DELETE", TENANT + "/budgets/{budget_id}"),
    admin("DELETE", TENANT + "/keys/{key_id}"),
    Case("DELETE", "/v1/keys/{key_id}", "tenant", lambda _: [Ask()]),
    admin("DELETE", VERSION),
    admin("POST", VERSION + "/restore"),
    admin("POST", VERSION + "/purge", lambda _: [Ask(path={"number": DELETED_VERSION})]),
    Case(
        "POST",
        "/v1/unload_lora_adapter",
        "operator",
        body(lambda names: {"lora_name": names.model}),
    ),
    admin("POST", ADAPTER + "/restore"),
    admin("DELETE", ADAPTER),
    admin("POST", ADAPTER + "/purge"),
]
