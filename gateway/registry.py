"""Which names can be called, what each stands for now, and how new ones come in.

Owns adapters and their versions. Base models and their engines are in `base_models`; how aliases
move, who else may call an adapter, and how it goes away in `aliases`, `grants` and `retention`.
Knows nothing of files, of HTTP, or of how an adapter is judged.
"""

import datetime
import hashlib
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import ColumnElement, Select, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from engine.protocol import EngineInfo
from gateway import audit, tenants
from gateway.adapter_rows import (
    DEFAULT_PAGE,
    Page,
    any_adapter,
    any_version,
    check_slug,
    find_adapter,
    living_adapter,
)
from gateway.aliases import Canary, Meaning, bucket_of, follow_latest
from gateway.auth import Principal
from gateway.base_models import MAX_MODEL_NAME, enroll
from gateway.blobs import lock_bytes
from gateway.database import Database
from gateway.errors import Conflict, InvalidRequest, ModelNotFound, Unavailable
from gateway.public_names import check_name_is_free, claim_name, name_taken
from gateway.quotas import NO_QUOTAS, Quotas
from gateway.tables import (
    Adapter,
    AdapterAlias,
    AdapterVersion,
    BaseModel,
    EngineReplica,
    new_id,
)

# Which version of which adapter a name means; queries select `meaning` from it. Row-level security
# hides what is neither the caller's nor shared with it, and base models that are withheld from it,
# so such a name finds as little as one that does not exist. A base model that no engine serves is
# not offered, and neither are its adapters; that it was retired is told. Each lookup is an equality
# that row-level security lets an index answer. The tenant is set in the statement itself, which
# spares three round trips: what is LATERAL to it runs after it, and OFFSET 0 keeps the planner from
# taking the two apart.
MEANING = """
    (
        SELECT set_config('app.tenant', CAST(:tenant AS text), true) AS tenant OFFSET 0
    ) AS caller
    CROSS JOIN LATERAL (
    SELECT n.name AS public_name, b.id AS base_model_id, b.name AS base_model,
           b.text_bundle_digest AS base_text_bundle_digest, b.context_length,
           b.revision AS base_revision, b.retired_at IS NOT NULL AS is_retired,
           a.id AS adapter_id, v.id AS adapter_version_id, v.number AS version_number,
           v.weights_digest, v.version_digest,
           CASE WHEN v.base_revision = b.revision THEN v.certificate ->> 'fingerprint' END
               AS fingerprint,
           coalesce(v.text_bundle_digest, b.text_bundle_digest) AS text_bundle_digest,
           coalesce(v.state = 'missing', false) AS is_missing,
           coalesce(v.has_canary, false) AS has_canary
    FROM public_names n
    LEFT JOIN adapters a ON a.id = n.adapter_id AND a.deleted_at IS NULL
    JOIN base_models b ON b.id = coalesce(n.base_model_id, a.base_model_id)
    LEFT JOIN LATERAL (
        SELECT pinned.*, false AS has_canary FROM adapter_versions pinned
        WHERE pinned.adapter_id = a.id AND pinned.number = CAST(:number AS integer)
        UNION ALL
        SELECT named.*, l.canary_percent IS NOT NULL FROM adapter_aliases l
        JOIN adapter_versions named ON named.id = CASE
            WHEN CAST(:bucket AS integer) < l.canary_percent THEN l.canary_version_id
            ELSE l.version_id
        END
        WHERE CAST(:number AS integer) IS NULL AND l.adapter_id = a.id
          AND l.alias = coalesce(CAST(:alias AS text), a.default_alias)
    ) AS v ON v.state IN ('ready', 'missing') AND v.deleted_at IS NULL
    WHERE n.name = :name
      AND (v.id IS NOT NULL OR (n.base_model_id IS NOT NULL AND NOT :is_versioned))
      AND (b.retired_at IS NOT NULL OR EXISTS (
          SELECT FROM engine_replicas r WHERE r.base_model_id = b.id AND r.state = 'serving'
      ))
      AND caller.tenant IS NOT NULL
    OFFSET 0
    ) AS meaning
"""

RESOLVE = text(f"""
    SELECT meaning.*, CAST(meaning AS text) AS spelled FROM {MEANING}
""")  # noqa: S608 - a constant of ours

# Names whose meaning is remembered, of some 2 KB each.
MAX_REMEMBERED = 10_000

# Everything that the caller may name as a model: its own adapters, and those that are shared with
# it. Each half begins at an index, and row-level security judges what it finds.
LIST_MODELS = text("""
    SELECT b.name AS id, b.created_at, 'manylora' AS owned_by, b.name AS base_model,
           NULL::integer AS version_number, NULL::text AS version_digest
    FROM base_models b
    WHERE EXISTS (
          SELECT FROM engine_replicas r WHERE r.base_model_id = b.id AND r.state = 'serving'
      )
      AND NOT EXISTS (SELECT FROM withheld_base_models w WHERE w.base_model_id = b.id)
    UNION ALL
    SELECT a.public_name, a.created_at,
           -- Its owner's slug, though the owner's row is nobody else's to see.
           left(a.public_name, -1 - length(a.slug)), b.name, v.number, v.version_digest
    FROM (
        SELECT id FROM adapters WHERE tenant_id = CAST(:tenant_id AS uuid)
        UNION
        SELECT adapter_id FROM adapter_grants
        WHERE grantee_id = CAST(:tenant_id AS uuid) OR grantee_id IS NULL
    ) AS mine
    JOIN adapters a ON a.id = mine.id
    JOIN base_models b ON b.id = a.base_model_id
    JOIN adapter_aliases l ON l.adapter_id = a.id AND l.alias = a.default_alias
    JOIN adapter_versions v ON v.id = l.version_id AND v.state = 'ready' AND v.deleted_at IS NULL
    WHERE a.deleted_at IS NULL
      AND EXISTS (
          SELECT FROM engine_replicas r WHERE r.base_model_id = b.id AND r.state = 'serving'
      )
""")


@dataclass(frozen=True, slots=True)
class Target:
    """What a model name stands for at the moment of the call."""

    # As it is registered, without the suffix and in lower case.
    public_name: str
    base_model_id: uuid.UUID
    base_model: str
    base_text_bundle_digest: str
    context_length: int
    # None of the following six where the base model answers alone.
    adapter_id: uuid.UUID | None
    adapter_version_id: uuid.UUID | None
    version_number: int | None
    weights_digest: str | None
    version_digest: str | None
    # Of its probe: what an engine loads must have it. None also where the probe told none, or was
    # of another revision of the base model.
    fingerprint: str | None
    # The adapter's own bundle, or its base model's.
    text_bundle_digest: str
    # Of the base model: the context, the bundles and the engines that are meant.
    base_revision: int = 1


@dataclass(frozen=True, slots=True)
class Recollection:
    """What a name stood for when it was last resolved, and how to tell whether it still does."""

    target: Target
    # Those of MEANING, and `assumed`: all that it meant, as the database spells the row.
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One line of the list of models."""

    id: str
    created_at: datetime.datetime
    owned_by: str
    base_model: str
    # What the bare name stands for, a canary aside; None for a base model.
    version_number: int | None
    version_digest: str | None


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """An adapter as its operator sees it."""

    adapter: Adapter
    base_model: str
    # By alias.
    aliases: dict[str, Meaning]


@dataclass(frozen=True, slots=True)
class Destination:
    """Where an upload goes: checked before its first byte is read, and again when it is booked."""

    tenant_id: uuid.UUID
    slug: str
    public_name: str
    # Of the adapter that exists; None where the upload brings its first version.
    base_model_id: uuid.UUID | None


@dataclass(frozen=True, slots=True)
class Contents:
    """What the rows say about an artifact that is in the store."""

    weights_digest: str
    # None where the adapter speaks through its base model's bundle.
    text_bundle_digest: str | None
    rank: int
    num_modules: int
    size_bytes: int
    # Of each file that was uploaded: name -> SHA-256.
    source_files: dict[str, str] = field(default_factory=dict)

    @property
    def version_digest(self) -> str:
        """SHA-256 over both digests, 64 hexadecimal digits."""
        both = f"{self.weights_digest}\n{self.text_bundle_digest or ''}"
        return hashlib.sha256(both.encode()).hexdigest()

    @property
    def digests(self) -> list[str]:
        """What is in the store, always in one order."""
        bundle = self.text_bundle_digest or self.weights_digest
        return sorted({self.weights_digest, bundle, *self.source_files.values()})


@dataclass(frozen=True, slots=True)
class Verdict:
    """How probing a version ended. No findings means that it may be served."""

    certificate: dict[str, Any]
    findings: list[dict[str, Any]]
    # `aliases.ExampleResults`; None where the upload brought no examples.
    example_results: dict[str, Any] | None = None
    # Of the base model, before the probe began.
    base_revision: int = 1

    @property
    def state(self) -> str:
        return "rejected" if self.findings else "ready"


@dataclass(frozen=True, slots=True)
class Published:
    """A version, and whether this call made it or found it."""

    adapter: Adapter
    version: AdapterVersion
    is_new: bool


class Registry:
    """Names, and what they mean. Every change is one transaction that holds its audit row."""

    def __init__(self, database: Database, quotas: Quotas = NO_QUOTAS) -> None:
        self._database = database
        self._quotas = quotas
        # By tenant and the name as it was asked for; the least used leave memory first.
        self._remembered: OrderedDict[tuple[uuid.UUID, str], Recollection] = OrderedDict()

    # What tenants ask.

    async def resolve(self, principal: Principal, model: str, *, user: str | None = None) -> Target:
        """Return what `model` means for this caller.

        Where an alias has a canary, one `user` always gets the same version, and without a user one
        key does. Raises ModelNotFound, in the same words for a name that does not exist, belongs to
        somebody else, was deleted or has no version that may be served.
        """
        # asyncpg takes neither NUL nor lone surrogates, and no name has them.
        if len(model) > MAX_MODEL_NAME or not model.isprintable():
            raise model_not_found(model)
        spelling = _spelling(model, caller=user or str(principal.key_id))
        tenant_id = _tenant_of(principal, model)
        asked = {"tenant": str(tenant_id), **spelling}
        rows = await self._database.call(RESOLVE, asked)
        self._remembered.pop((tenant_id, model.lower()), None)
        if not rows:
            raise model_not_found(model)
        fields = dict(rows[0])
        if fields.pop("is_retired"):
            raise _retired(model, fields["base_model"])
        if fields.pop("is_missing"):
            raise _missing(model)
        asked["assumed"], has_canary = fields.pop("spelled"), fields.pop("has_canary")
        target = Target(**fields)
        # Where there is a canary, the next caller may get another version.
        if not has_canary:
            self._remember((tenant_id, model.lower()), Recollection(target, asked))
        return target

    def recall(self, principal: Principal, model: str) -> Recollection | None:
        """What `model` meant when it was last resolved for this tenant, where that is remembered.

        It may mean something else by now: nothing may come of it before the database has confirmed
        it, as `limits.admit` has it do.
        """
        if principal.tenant_id is None:
            return None
        key = principal.tenant_id, model.lower()
        found = self._remembered.get(key)
        if found is not None:
            self._remembered.move_to_end(key)
        return found

    def _remember(self, key: tuple[uuid.UUID, str], recollection: Recollection) -> None:
        self._remembered[key] = recollection
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    async def list_models(self, principal: Principal) -> list[ModelEntry]:
        """Return the base models that the caller may call, then its own adapters and shared ones.

        By name, each kind.
        """
        if principal.tenant_id is None:
            return []
        async with self._database.as_tenant(principal.tenant_id) as session:
            mine = {"tenant_id": principal.tenant_id}
            rows = (await session.execute(LIST_MODELS, mine)).mappings().all()
        entries = [ModelEntry(**row) for row in rows]
        return sorted(entries, key=lambda entry: (entry.version_number is not None, entry.id))

    # What engines tell.

    async def register_base_model(self, info: EngineInfo, address: str) -> BaseModel:
        """Take over what the engine at `address` serves, and offer it.

        Raises Conflict where the name stands for something else already, or an operator let the
        base model or the engine go.
        """
        async with self._database.as_worker() as session:
            base_model, _ = await enroll(session, info, address)
        return base_model

    # What operators do.

    async def destination(self, tenant: str, adapter: str) -> Destination:
        """Return where versions of `adapter` go.

        Raises NotFound, InvalidRequest or Conflict where an upload could not end well.
        """
        async with self._database.as_worker() as session:
            owner = await tenants.get_tenant(session, tenant)
            if owner.status == "closed":
                raise Conflict(f"The tenant {tenant!r} is closed; it takes no more adapters.")
            check_slug(adapter, field="adapter")
            destination = Destination(owner.id, adapter, public_name(tenant, adapter), None)
            existing = await find_adapter(session, owner.id, adapter)
            if existing is None:
                await check_name_is_free(session, destination.public_name)
                return destination
        _check_not_deleted(existing)
        return replace(destination, base_model_id=existing.base_model_id)

    async def base_model_for(
        self, destination: Destination, name: str | None, *, trained_on: str | None = None
    ) -> BaseModel:
        """Return the base model that an upload is for: the adapter's, the named, or the only one.

        Where several are served and none is named, it is the one that it was `trained_on`, as far
        as the names tell. Raises InvalidRequest, Conflict or Unavailable.
        """
        offered = await self._offered()
        if destination.base_model_id is not None:
            return _base_model_of(destination, offered, name=name)
        if not offered:
            raise Unavailable("No engine serves a base model yet; try again shortly.")
        if name is None and len(offered) == 1:
            return offered[0]
        if name is None:
            name = _name_of(trained_on, offered)
        for base_model in offered:
            if base_model.name == name:
                return base_model
        names = ", ".join(base_model.name for base_model in offered)
        raise InvalidRequest(f"base_model must be one of: {names}.", param="base_model")

    async def _offered(self) -> list[BaseModel]:
        served = select(EngineReplica.base_model_id).where(EngineReplica.state == "serving")
        query = select(BaseModel).where(BaseModel.id.in_(served)).order_by(BaseModel.name)
        async with self._database.as_worker() as session:
            return list((await session.scalars(query)).all())

    async def create_version(
        self,
        destination: Destination,
        contents: Contents,
        *,
        base_model_id: uuid.UUID,
        actor_key_id: uuid.UUID,
    ) -> Published:
        """Book an artifact that is in the store already, as the adapter's next version.

        The same contents again give the version that exists. A new version is `probing`: it can be
        called once `finish_version` says so, and so can one whose bytes had gone missing. Raises
        Conflict where the name is taken and QuotaExceeded.

        Bytes that no row named a moment ago may be removed until this returns, and not after.
        """
        async with self._database.as_worker() as session:
            for digest in contents.digests:
                await lock_bytes(session, digest)
            adapter = await _open_adapter(session, destination, base_model_id=base_model_id)
            version = await _same_contents(session, adapter.id, contents.version_digest)
            if version is not None:
                await _revive(session, adapter, version, actor_key_id=actor_key_id)
                return Published(adapter, version, is_new=False)
            version = await _insert_version(session, adapter, contents=contents)
            await self._quotas.check(session, version)
            await audit.record(
                session,
                tenant_id=adapter.tenant_id,
                actor_key_id=actor_key_id,
                action="adapter.version.create",
                subject=f"{adapter.public_name}@{version.number}",
                details={"version_digest": version.version_digest},
            )
        return Published(adapter, version, is_new=True)

    async def finish_version(
        self, version_id: uuid.UUID, verdict: Verdict, *, actor_key_id: uuid.UUID | None
    ) -> AdapterVersion:
        """Move a `probing` version to `ready` or `rejected`; one that moved before stays.

        `latest` follows to the highest number that is ready, and does not go back by itself.
        """
        async with self._database.as_worker() as session:
            version = await session.get_one(AdapterVersion, version_id)
            adapter = await session.get_one(Adapter, version.adapter_id, with_for_update=True)
            await session.refresh(version)
            if version.state != "probing" or version.purged_at is not None:
                return version
            version.state = verdict.state
            version.certificate = verdict.certificate
            version.findings = verdict.findings
            version.base_revision = verdict.base_revision
            version.example_results = verdict.example_results
            if verdict.state == "ready" and version.deleted_at is None:
                await session.flush()
                await follow_latest(session, adapter, version, actor_key_id=actor_key_id)
            await audit.record(
                session,
                tenant_id=version.tenant_id,
                actor_key_id=actor_key_id,
                action=f"adapter.version.{verdict.state}",
                subject=f"{adapter.public_name}@{version.number}",
                details={"version_digest": version.version_digest},
            )
        return version

    async def replace_source_files(
        self, version_id: uuid.UUID, files: dict[str, str], *, actor_key_id: uuid.UUID
    ) -> AdapterVersion:
        """Name the files of another upload of the same contents as those of a version.

        For versions whose own were lost, or never kept. `files`: name -> SHA-256.
        """
        async with self._database.as_worker() as session:
            for sha256 in sorted(set(files.values())):
                await lock_bytes(session, sha256)
            version = await session.get_one(AdapterVersion, version_id)
            adapter = await session.get_one(Adapter, version.adapter_id, with_for_update=True)
            version.source_files = files
            await audit.record(
                session,
                tenant_id=version.tenant_id,
                actor_key_id=actor_key_id,
                action="adapter.version.source_files",
                subject=f"{adapter.public_name}@{version.number}",
                details={"source_files": files},
            )
        return version

    async def base_model(self, base_model_id: uuid.UUID) -> BaseModel:
        """Return a base model that versions name."""
        async with self._database.as_worker() as session:
            return await session.get_one(BaseModel, base_model_id)

    async def current_version(self, version: AdapterVersion) -> AdapterVersion | None:
        """Return what calls of the adapter get now, another than `version`; None for nothing."""
        async with self._database.as_worker() as session:
            query = (
                select(AdapterVersion)
                .join(AdapterAlias, AdapterAlias.version_id == AdapterVersion.id)
                .join(Adapter, Adapter.id == AdapterAlias.adapter_id)
                .where(
                    Adapter.id == version.adapter_id,
                    AdapterAlias.alias == Adapter.default_alias,
                    AdapterVersion.state == "ready",
                    AdapterVersion.id != version.id,
                )
            )
            return (await session.scalars(query)).one_or_none()

    async def versions_in_probe(self, base_model_id: uuid.UUID) -> list[AdapterVersion]:
        """Return the versions on a base model whose probe has not ended."""
        async with self._database.as_worker() as session:
            query = select(AdapterVersion).where(
                AdapterVersion.state == "probing",
                AdapterVersion.base_model_id == base_model_id,
                AdapterVersion.deleted_at.is_(None),
            )
            return list((await session.scalars(query)).all())

    async def list_adapters(
        self,
        tenant: str,
        *,
        after: str | None = None,
        limit: int = DEFAULT_PAGE,
        is_deleted: bool = False,
    ) -> Page[AdapterEntry, str]:
        """Return a part of a tenant's adapters by name: living ones or deleted ones.

        Raises NotFound or InvalidRequest.
        """
        if after is not None:
            check_slug(after, field="after")
        async with self._database.as_worker() as session:
            owner = await tenants.get_tenant(session, tenant)
            which = _adapters_where(
                Adapter.tenant_id == owner.id, _is_gone(Adapter, is_deleted=is_deleted)
            )
            if after is not None:
                which = which.where(Adapter.slug > after)
            entries = await _adapter_entries(session, which.limit(limit + 1))
        return Page.of(entries, limit=limit, key=lambda each: each.adapter.slug)

    async def get_adapter(self, tenant: str, adapter: str) -> AdapterEntry:
        """Raises NotFound."""
        async with self._database.as_worker() as session:
            row = await living_adapter(session, tenant, adapter)
            [entry] = await _adapter_entries(session, _adapters_where(Adapter.id == row.id))
            return entry

    async def list_versions(
        self,
        tenant: str,
        adapter: str,
        *,
        after: int | None = None,
        limit: int = DEFAULT_PAGE,
        is_deleted: bool = False,
    ) -> tuple[Adapter, Page[AdapterVersion, int]]:
        """Return an adapter and a part of its versions, newest first: living or deleted ones.

        Deleted ones are told of deleted adapters too. Raises NotFound.
        """
        find = any_adapter if is_deleted else living_adapter
        async with self._database.as_worker() as session:
            row = await find(session, tenant, adapter)
            query = (
                select(AdapterVersion)
                .where(
                    AdapterVersion.adapter_id == row.id,
                    _is_gone(AdapterVersion, is_deleted=is_deleted),
                )
                .order_by(AdapterVersion.number.desc())
                .limit(limit + 1)
            )
            if after is not None:
                query = query.where(AdapterVersion.number < after)
            found = list((await session.scalars(query)).all())
        return row, Page.of(found, limit=limit, key=lambda each: each.number)

    async def get_version(
        self, tenant: str, adapter: str, number: int
    ) -> tuple[Adapter, AdapterVersion]:
        """Return an adapter and one of its versions, deleted or not. Raises NotFound."""
        async with self._database.as_worker() as session:
            row = await living_adapter(session, tenant, adapter)
            return row, await any_version(session, row, number)


def public_name(tenant: str, adapter: str) -> str:
    """The model name of an adapter. It is stored whole and never taken apart again."""
    return f"{tenant}-{adapter}"


def model_not_found(model: str) -> ModelNotFound:
    """The one answer for every model that cannot be called, whatever the reason."""
    shown = model[:MAX_MODEL_NAME].encode("ascii", "backslashreplace").decode()
    return ModelNotFound(
        f"The model `{shown}` does not exist or this key has no access to it.", param="model"
    )


def _missing(model: str) -> Unavailable:
    return Unavailable(
        f"The files of `{model}` are missing from the artifact store; the operator can upload them"
        " again.",
        retry_after_s=60,
    )


def _retired(model: str, base_model: str) -> ModelNotFound:
    return ModelNotFound(
        f"The model `{model}` is served no more: its base model {base_model!r} was retired.",
        param="model",
    )


def _tenant_of(principal: Principal, model: str) -> uuid.UUID:
    if principal.tenant_id is None:
        raise model_not_found(model)
    return principal.tenant_id


def _spelling(model: str, *, caller: str) -> dict[str, Any]:
    """Take `name`, `name@3` or `name@prod` apart, as parameters of MEANING."""
    name, at, suffix = model.lower().rpartition("@")
    if not at:
        name = suffix
    # A column of 32 bits holds the number; longer ones name nothing.
    is_number = bool(at) and suffix.isascii() and suffix.isdigit() and len(suffix) < 10
    return {
        "name": name,
        # None for the adapter's default.
        "alias": suffix if at and not is_number else None,
        "number": int(suffix) if is_number else None,
        "bucket": bucket_of(name, caller),
        "is_versioned": bool(at),
    }


def _check_not_deleted(adapter: Adapter) -> None:
    if adapter.deleted_at is not None:
        raise Conflict(
            f"The adapter {adapter.public_name!r} was deleted, and names are never used again."
        )


def _base_model_of(
    destination: Destination, offered: list[BaseModel], *, name: str | None
) -> BaseModel:
    for base_model in offered:
        if base_model.id == destination.base_model_id:
            if name not in (None, base_model.name):
                raise Conflict(
                    f"The adapter {destination.public_name!r} is for the base model "
                    f"{base_model.name!r}; upload for {name!r} under another name."
                )
            return base_model
    raise Conflict(f"No engine serves the base model of the adapter {destination.public_name!r}.")


def _name_of(trained_on: str | None, offered: list[BaseModel]) -> str | None:
    """The one that is called as what an adapter's configuration names, or as its last part."""
    told = (trained_on or "").rstrip("/").lower()
    for spelling in (told, told.rpartition("/")[2]):
        fitting = [
            base_model.name
            for base_model in offered
            if spelling in (base_model.name.lower(), base_model.name.lower().rpartition("/")[2])
        ]
        if spelling and len(fitting) == 1:
            return fitting[0]
    return None


def _is_gone(
    table: type[Adapter] | type[AdapterVersion], *, is_deleted: bool
) -> ColumnElement[bool]:
    return table.deleted_at.is_not(None) if is_deleted else table.deleted_at.is_(None)


def _adapters_where(*which: ColumnElement[bool]) -> Select[Adapter, str]:
    return (
        select(Adapter, BaseModel.name)
        .join(BaseModel, BaseModel.id == Adapter.base_model_id)
        .where(*which)
        .order_by(Adapter.slug)
    )


async def _adapter_entries(
    session: AsyncSession, which: Select[Adapter, str]
) -> list[AdapterEntry]:
    entries = {
        adapter.id: AdapterEntry(adapter, base_model, {})
        for adapter, base_model in await session.execute(which)
    }
    stable, canary = aliased(AdapterVersion), aliased(AdapterVersion)
    aliases = (
        select(AdapterAlias, stable.number, canary.number)
        .join(stable, stable.id == AdapterAlias.version_id)
        .outerjoin(canary, canary.id == AdapterAlias.canary_version_id)
        .where(AdapterAlias.adapter_id.in_(entries))
        .order_by(AdapterAlias.alias)
    )
    for alias, number, other in await session.execute(aliases):
        percent = alias.canary_percent
        split = Canary(other, percent) if percent is not None else None
        entries[alias.adapter_id].aliases[alias.alias] = Meaning(number, split)
    return list(entries.values())


async def _open_adapter(
    session: AsyncSession, destination: Destination, *, base_model_id: uuid.UUID
) -> Adapter:
    """The row of an adapter, made if new, locked until the transaction ends."""
    await session.execute(
        insert(Adapter)
        .values(
            id=new_id(),
            tenant_id=destination.tenant_id,
            base_model_id=base_model_id,
            slug=destination.slug,
            public_name=destination.public_name,
        )
        # Both unique constraints: the tenant's own name, and the public one.
        .on_conflict_do_nothing()
    )
    adapter = await find_adapter(session, destination.tenant_id, destination.slug, for_update=True)
    if adapter is None:
        raise name_taken(destination.public_name)
    _check_not_deleted(adapter)
    if adapter.base_model_id != base_model_id:
        raise Conflict(f"The adapter {adapter.public_name!r} is for another base model.")
    await claim_name(session, adapter.public_name, adapter_id=adapter.id)
    return adapter


async def _same_contents(
    session: AsyncSession, adapter_id: uuid.UUID, version_digest: str
) -> AdapterVersion | None:
    query = select(AdapterVersion).where(
        AdapterVersion.adapter_id == adapter_id,
        AdapterVersion.version_digest == version_digest,
        AdapterVersion.state != "rejected",
        AdapterVersion.deleted_at.is_(None),
    )
    # Two of them where one was deleted, uploaded again, and restored.
    newest = query.order_by(AdapterVersion.number.desc()).limit(1)
    return (await session.scalars(newest)).one_or_none()


async def _revive(
    session: AsyncSession, adapter: Adapter, version: AdapterVersion, *, actor_key_id: uuid.UUID
) -> None:
    """A version whose bytes had gone missing has them again, and is probed again."""
    if version.state != "missing":
        return
    version.state = "probing"
    await audit.record(
        session,
        tenant_id=version.tenant_id,
        actor_key_id=actor_key_id,
        action="adapter.version.revive",
        subject=f"{adapter.public_name}@{version.number}",
        details={"version_digest": version.version_digest},
    )


async def _insert_version(
    session: AsyncSession, adapter: Adapter, *, contents: Contents
) -> AdapterVersion:
    """The adapter's row is locked, so the next number is ours."""
    highest = await session.scalar(
        select(func.max(AdapterVersion.number)).where(AdapterVersion.adapter_id == adapter.id)
    )
    version = AdapterVersion(
        id=new_id(),
        tenant_id=adapter.tenant_id,
        adapter_id=adapter.id,
        base_model_id=adapter.base_model_id,
        number=(highest or 0) + 1,
        state="probing",
        weights_digest=contents.weights_digest,
        version_digest=contents.version_digest,
        text_bundle_digest=contents.text_bundle_digest,
        rank=contents.rank,
        num_modules=contents.num_modules,
        size_bytes=contents.size_bytes,
        source_files=contents.source_files,
        findings=[],
        certificate=None,
    )
    session.add(version)
    await session.flush()
    return version
