"""Adapters and their versions, for operators: shown, deleted, restored and purged.

How they come in, where aliases stand and who else may call is beside.
"""

import datetime
from typing import Annotated, Any, Literal

import msgspec
from litestar import delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from adapters.errors import Finding
from gateway.adapter_rows import DEFAULT_PAGE, MAX_NUMBER, MAX_PAGE
from gateway.aliases import Aliases
from gateway.auth import Principal
from gateway.registry import AdapterEntry, Registry
from gateway.residency import Residency
from gateway.retention import Retention
from gateway.tables import Adapter, AdapterVersion

TAGS = ["admin: adapters"]

State = Literal["validating", "probing", "ready", "rejected", "missing"]
Limit = Annotated[int, QueryParameter(ge=1, le=MAX_PAGE)]


class AdapterView(msgspec.Struct, frozen=True):
    """An adapter. `model` is what its tenant sends as the model's name."""

    adapter: str
    model: str
    base_model: str
    # The alias that `model` stands for where no version is named.
    default_alias: str
    # alias -> version number, a canary aside
    aliases: dict[str, int]
    created_at: datetime.datetime
    deleted_at: datetime.datetime | None
    purged_at: datetime.datetime | None


class AdapterList(msgspec.Struct, frozen=True):
    """A part of the adapters of one tenant, by name."""

    data: list[AdapterView]
    # Send it as `after` for the next part; null where this is the last.
    next: str | None


class AdapterChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which alias the model's bare name stands for: `latest` unless it is told otherwise."""

    default_alias: str


class VersionView(msgspec.Struct, frozen=True):
    """One immutable version. `model` is the bare name, `pinned_model` stays at this version."""

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
    # {"base" | "current" | "this": {"passed": ..., "total": ...}}; null without examples.
    example_results: dict[str, Any] | None
    created_at: datetime.datetime
    deleted_at: datetime.datetime | None
    purged_at: datetime.datetime | None


class VersionList(msgspec.Struct, frozen=True):
    """A part of the versions of one adapter, newest first."""

    data: list[VersionView]
    # Send it as `after` for the next part; null where this is the last.
    next: int | None


@get(
    "/tenants/{tenant:str}/adapters",
    scope="operator",
    tags=TAGS,
    summary="List a tenant's adapters",
    description="`deleted=true` lists the deleted ones instead, also those that were purged.",
)
async def list_adapters(
    tenant: FromPath[str],
    registry: NamedDependency[Registry],
    limit: Limit = DEFAULT_PAGE,
    after: FromQuery[str | None] = None,
    deleted: FromQuery[bool] = False,
) -> AdapterList:
    page = await registry.list_adapters(tenant, after=after, limit=limit, is_deleted=deleted)
    return AdapterList([_adapter_view(entry) for entry in page.items], page.next)


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


@patch(
    "/tenants/{tenant:str}/adapters/{adapter:str}",
    scope="operator",
    tags=TAGS,
    summary="Change what an adapter's bare name stands for",
    description=(
        "The bare name stands for the adapter's `default_alias`. That is `latest`, the newest"
        " version that is ready, until it is changed here; `prod`, say, must exist before."
    ),
)
async def change_adapter(
    tenant: FromPath[str],
    adapter: FromPath[str],
    data: JSONBody[AdapterChange],
    registry: NamedDependency[Registry],
    aliases: NamedDependency[Aliases],
    principal: NamedDependency[Principal],
) -> AdapterView:
    await aliases.set_default(tenant, adapter, data.default_alias, actor_key_id=principal.key_id)
    return _adapter_view(await registry.get_adapter(tenant, adapter))


@delete(
    "/tenants/{tenant:str}/adapters/{adapter:str}",
    scope="operator",
    tags=TAGS,
    summary="Delete an adapter",
    description=(
        "Calls of its model are refused from now on. It can be restored until it is purged, some"
        " days later. The name is never used again."
    ),
)
async def delete_adapter(
    tenant: FromPath[str],
    adapter: FromPath[str],
    retention: NamedDependency[Retention],
    residency: NamedDependency[Residency],
    principal: NamedDependency[Principal],
) -> None:
    await retention.delete_adapter(tenant, adapter, actor_key_id=principal.key_id)
    await residency.forget_adapter(tenant, adapter)


@post(
    "/tenants/{tenant:str}/adapters/{adapter:str}/restore",
    scope="operator",
    status_code=204,
    tags=TAGS,
    summary="Restore a deleted adapter",
    description="It is offered as it was: versions, aliases and grants.",
)
async def restore_adapter(
    tenant: FromPath[str],
    adapter: FromPath[str],
    retention: NamedDependency[Retention],
    principal: NamedDependency[Principal],
) -> None:
    await retention.restore_adapter(tenant, adapter, actor_key_id=principal.key_id)


@post(
    "/tenants/{tenant:str}/adapters/{adapter:str}/purge",
    scope="operator",
    status_code=204,
    tags=TAGS,
    summary="Purge a deleted adapter now",
    description="There is no way back. 409 where it is not deleted, or a request runs on it.",
)
async def purge_adapter(
    tenant: FromPath[str],
    adapter: FromPath[str],
    retention: NamedDependency[Retention],
    principal: NamedDependency[Principal],
) -> None:
    await retention.purge_adapter(tenant, adapter, actor_key_id=principal.key_id)


@get(
    "/tenants/{tenant:str}/adapters/{adapter:str}/versions",
    scope="operator",
    tags=TAGS,
    summary="List an adapter's versions",
    description="`deleted=true` lists the deleted ones instead, also of a deleted adapter.",
)
async def list_versions(
    tenant: FromPath[str],
    adapter: FromPath[str],
    registry: NamedDependency[Registry],
    limit: Limit = DEFAULT_PAGE,
    after: Annotated[int | None, QueryParameter(ge=0, le=MAX_NUMBER)] = None,
    deleted: FromQuery[bool] = False,
) -> VersionList:
    row, page = await registry.list_versions(
        tenant, adapter, after=after, limit=limit, is_deleted=deleted
    )
    return VersionList([version_view(row, version) for version in page.items], page.next)


@get(
    "/tenants/{tenant:str}/adapters/{adapter:str}/versions/{number:int}",
    scope="operator",
    tags=TAGS,
    summary="Show one version",
)
async def get_version(
    tenant: FromPath[str],
    adapter: FromPath[str],
    number: FromPath[int],
    registry: NamedDependency[Registry],
) -> VersionView:
    return version_view(*await registry.get_version(tenant, adapter, number))


@delete(
    "/tenants/{tenant:str}/adapters/{adapter:str}/versions/{number:int}",
    scope="operator",
    tags=TAGS,
    summary="Delete a version",
    description=(
        "`latest` falls back to the newest that is left. 409 where another alias stands for it. It"
        " can be restored until it is purged, some days later. The number is never used again."
    ),
)
async def delete_version(
    tenant: FromPath[str],
    adapter: FromPath[str],
    number: FromPath[int],
    retention: NamedDependency[Retention],
    residency: NamedDependency[Residency],
    principal: NamedDependency[Principal],
) -> None:
    await retention.delete_version(tenant, adapter, number, actor_key_id=principal.key_id)
    await residency.forget_adapter(tenant, adapter, number=number)


@post(
    "/tenants/{tenant:str}/adapters/{adapter:str}/versions/{number:int}/restore",
    scope="operator",
    status_code=204,
    tags=TAGS,
    summary="Restore a deleted version",
    description="It can be called by its number again; aliases stay where they are.",
)
async def restore_version(
    tenant: FromPath[str],
    adapter: FromPath[str],
    number: FromPath[int],
    retention: NamedDependency[Retention],
    principal: NamedDependency[Principal],
) -> None:
    await retention.restore_version(tenant, adapter, number, actor_key_id=principal.key_id)


@post(
    "/tenants/{tenant:str}/adapters/{adapter:str}/versions/{number:int}/purge",
    scope="operator",
    status_code=204,
    tags=TAGS,
    summary="Purge a deleted version now",
    description="There is no way back. 409 where it is not deleted, or a request runs on it.",
)
async def purge_version(
    tenant: FromPath[str],
    adapter: FromPath[str],
    number: FromPath[int],
    retention: NamedDependency[Retention],
    principal: NamedDependency[Principal],
) -> None:
    await retention.purge_version(tenant, adapter, number, actor_key_id=principal.key_id)


def _adapter_view(entry: AdapterEntry) -> AdapterView:
    return AdapterView(
        adapter=entry.adapter.slug,
        model=entry.adapter.public_name,
        base_model=entry.base_model,
        default_alias=entry.adapter.default_alias,
        aliases={alias: meaning.number for alias, meaning in entry.aliases.items()},
        created_at=entry.adapter.created_at,
        deleted_at=entry.adapter.deleted_at,
        purged_at=entry.adapter.purged_at,
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
        example_results=version.example_results,
        created_at=version.created_at,
        deleted_at=version.deleted_at,
        purged_at=version.purged_at,
    )
