"""Adapters and their versions, for operators. POST of a version is the upload."""

import datetime
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from litestar import Request, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.openapi import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, Operation, Reference, RequestBody, Schema
from litestar.openapi.spec.enums import OpenAPIFormat, OpenAPIType
from litestar.params import FromPath

from adapters.errors import Finding
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from gateway.auth import Principal
from gateway.registry import AdapterEntry, Registry
from gateway.tables import Adapter, AdapterVersion
from gateway.uploads import Uploads

TAGS = ["admin: adapters"]

State = Literal["validating", "probing", "ready", "rejected"]


class AdapterView(msgspec.Struct, frozen=True):
    """An adapter. `model` is what its tenant sends as the model's name."""

    adapter: str
    model: str
    base_model: str
    # alias -> version number
    aliases: dict[str, int]
    created_at: datetime.datetime


class AdapterList(msgspec.Struct, frozen=True):
    """The adapters of one tenant."""

    data: list[AdapterView]


class VersionView(msgspec.Struct, frozen=True):
    """One immutable version. `model` follows `latest`, `pinned_model` stays at this version."""

    model: str
    pinned_model: str
    number: int
    state: State
    weights_digest: str
    version_digest: str
    text_bundle_digest: str | None
    rank: int
    num_modules: int
    size_bytes: int
    findings: list[Finding]
    # What the engine's probe of this version showed.
    certificate: dict[str, Any] | None
    created_at: datetime.datetime


class VersionList(msgspec.Struct, frozen=True):
    """The versions of one adapter, newest first."""

    data: list[VersionView]


@dataclass
class UploadOperation(Operation):
    """Describes the multipart body, which the handler reads itself, as a stream."""

    def __post_init__(self) -> None:
        binary = Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY)
        text = Schema(type=OpenAPIType.STRING)
        parts: dict[str, Reference | Schema] = {
            CONFIG_FILE: binary,
            WEIGHTS_FILE: binary,
            "archive": binary,
            "sha256": text,
            "base_model": text,
        }
        form = OpenAPIMediaType(schema=Schema(type=OpenAPIType.OBJECT, properties=parts))
        self.request_body = RequestBody(content={"multipart/form-data": form}, required=True)


@get(
    "/tenants/{tenant:str}/adapters",
    scope="operator",
    tags=TAGS,
    summary="List a tenant's adapters",
)
async def list_adapters(tenant: FromPath[str], registry: NamedDependency[Registry]) -> AdapterList:
    return AdapterList([_adapter_view(entry) for entry in await registry.list_adapters(tenant)])


@get(
    "/tenants/{tenant:str}/adapters/{adapter:str}",
    scope="operator",
    tags=TAGS,
    summary="Show an adapter",
)
async def get_adapter(
    tenant: FromPath[str], adapter: FromPath[str], registry: NamedDependency[Registry]
) -> AdapterView:
    return _adapter_view(await registry.get_adapter(tenant, adapter))


@delete(
    "/tenants/{tenant:str}/adapters/{adapter:str}",
    scope="operator",
    tags=TAGS,
    summary="Delete an adapter",
    description="Calls of its model are refused from now on. The name is never used again.",
)
async def delete_adapter(
    tenant: FromPath[str],
    adapter: FromPath[str],
    registry: NamedDependency[Registry],
    principal: NamedDependency[Principal],
) -> None:
    await registry.delete_adapter(tenant, adapter, actor_key_id=principal.key_id)


@get(
    "/tenants/{tenant:str}/adapters/{adapter:str}/versions",
    scope="operator",
    tags=TAGS,
    summary="List an adapter's versions",
)
async def list_versions(
    tenant: FromPath[str], adapter: FromPath[str], registry: NamedDependency[Registry]
) -> VersionList:
    row, versions = await registry.list_versions(tenant, adapter)
    return VersionList([_version_view(row, version) for version in versions])


@post(
    "/tenants/{tenant:str}/adapters/{adapter:str}/versions",
    scope="operator",
    tags=TAGS,
    summary="Upload an adapter",
    description=(
        f"Send `{CONFIG_FILE}` and `{WEIGHTS_FILE}` as two file parts, or one archive of them"
        " (.tar, .tar.gz, .tgz, .zip). `sha256`, if sent, is that of the weights file or of the"
        " archive. `base_model` is needed where several are served. The answer comes when the"
        " version can be called: 201, or 200 if the adapter had these very contents already. 422"
        " lists everything that is wrong with it."
    ),
    operation_class=UploadOperation,
    responses={
        200: ResponseSpec(
            VersionView,
            generate_examples=False,
            description="The adapter had these very contents already: this is their version.",
        )
    },
    # The operator's limit is enforced while the body is read, in words that name it.
    request_max_body_size=None,
)
async def create_version(
    tenant: FromPath[str],
    adapter: FromPath[str],
    request: Request[Any, Any, Any],
    uploads: NamedDependency[Uploads],
    principal: NamedDependency[Principal],
) -> Response[VersionView]:
    published = await uploads.publish(
        tenant,
        adapter,
        content_type=request.headers.get("content-type", ""),
        announced_bytes=request.content_length,
        body=request.stream(),
        actor_key_id=principal.key_id,
    )
    return Response(
        _version_view(published.adapter, published.version),
        status_code=201 if published.is_new else 200,
    )


def _adapter_view(entry: AdapterEntry) -> AdapterView:
    return AdapterView(
        adapter=entry.adapter.slug,
        model=entry.adapter.public_name,
        base_model=entry.base_model,
        aliases=entry.aliases,
        created_at=entry.adapter.created_at,
    )


def _version_view(adapter: Adapter, version: AdapterVersion) -> VersionView:
    return VersionView(
        model=adapter.public_name,
        pinned_model=f"{adapter.public_name}@{version.number}",
        number=version.number,
        state=msgspec.convert(version.state, State),
        weights_digest=version.weights_digest,
        version_digest=version.version_digest,
        text_bundle_digest=version.text_bundle_digest,
        rank=version.rank,
        num_modules=version.num_modules,
        size_bytes=version.size_bytes,
        findings=msgspec.convert(version.findings, list[Finding]),
        certificate=version.certificate,
        created_at=version.created_at,
    )
