"""Adapters and their versions, for operators. How they come in is in `uploads`."""

import datetime
from typing import Any, Literal

import msgspec
from litestar import delete, get
from litestar.di import NamedDependency
from litestar.params import FromPath

from adapters.errors import Finding
from gateway.auth import Principal
from gateway.registry import AdapterEntry, Registry
from gateway.tables import Adapter, AdapterVersion

TAGS = ["admin: adapters"]

State = Literal["validating", "probing", "ready", "rejected", "missing"]


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
    return VersionList([version_view(row, version) for version in versions])


def _adapter_view(entry: AdapterEntry) -> AdapterView:
    return AdapterView(
        adapter=entry.adapter.slug,
        model=entry.adapter.public_name,
        base_model=entry.base_model,
        aliases=entry.aliases,
        created_at=entry.adapter.created_at,
    )


def version_view(adapter: Adapter, version: AdapterVersion) -> VersionView:
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
