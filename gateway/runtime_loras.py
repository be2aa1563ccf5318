"""vLLM's way of adding and removing adapters while serving, on top of uploads and deletions.

A name is what it is everywhere here, `<tenant>-<adapter>`, and the tenant exists. Loading is an
upload from a folder of this host. Unloading deletes the adapter, so that its name is called no
more, and has engines let go of it; nothing is lost, and loading the name again brings it back.
"""

import asyncio
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sqlalchemy import text

from gateway.database import Database
from gateway.errors import Conflict, InvalidRequest, NotAllowed, NotFound, RejectedUpload
from gateway.lora_folder import LoraFolder
from gateway.residency import Residency
from gateway.uploads import Uploads

NAME_PATTERN = "[a-z0-9][a-z0-9-]{0,64}"

# Every tenant whose slug begins the name, and what its adapter of that name is now.
FIND_OWNERS = text("""
    SELECT t.slug AS tenant, substr(:name, length(t.slug) + 2) AS adapter,
           a.id IS NOT NULL AS is_known, a.deleted_at IS NOT NULL AS is_deleted,
           v.number AS latest
    FROM tenants t
    LEFT JOIN adapters a ON a.tenant_id = t.id AND a.public_name = :name
    LEFT JOIN adapter_aliases l ON l.adapter_id = a.id AND l.alias = a.default_alias
    LEFT JOIN adapter_versions v ON v.id = l.version_id AND v.deleted_at IS NULL
    WHERE starts_with(:name, t.slug || '-') AND length(:name) > length(t.slug) + 1
""")


class Shelf(Protocol):
    """Where adapters are put away and taken back from."""

    async def delete_adapter(
        self, tenant: str, adapter: str, *, actor_key_id: uuid.UUID
    ) -> None: ...

    async def restore_adapter(
        self, tenant: str, adapter: str, *, actor_key_id: uuid.UUID
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Owned:
    """Whose adapter a name is, or would be."""

    tenant: str
    adapter: str
    is_known: bool
    is_deleted: bool
    # The number of the version that is called by the bare name; None where none is ready.
    latest: int | None

    @property
    def is_served(self) -> bool:
        return self.latest is not None and not self.is_deleted


class RuntimeLoras:
    """`root`: what paths must lie below; None where the operator has opened no folder."""

    def __init__(
        self,
        database: Database,
        *,
        uploads: Uploads,
        residency: Residency,
        shelf: Shelf,
        root: Path | None,
    ) -> None:
        self._database = database
        self._uploads = uploads
        self._residency = residency
        self._shelf = shelf
        self._root = root

    async def load(self, name: str, path: str, *, in_place: bool, actor_key_id: uuid.UUID) -> None:
        """Serve what lies at `path` under `name`; with `in_place` also where it is served already.

        Raises NotAllowed, NotFound, or InvalidRequest, with all findings where the adapter has
        any.
        """
        if self._root is None:
            raise NotAllowed(
                "This server loads no adapters by path: start it with --lora-folder, or upload"
                " them to /admin/v1/tenants/{tenant}/adapters/{adapter}/versions."
            )
        owned = await self._owner_of(name)
        if owned.is_served and not in_place:
            raise InvalidRequest(
                f"The lora adapter '{name}' has already been loaded. If you want to load the"
                " adapter in place, set 'load_inplace' to True.",
                param="load_inplace",
            )
        if owned.is_deleted:
            await self._shelf.restore_adapter(
                owned.tenant, owned.adapter, actor_key_id=actor_key_id
            )
        try:
            await self._publish(owned, LoraFolder(self._root, path), actor_key_id=actor_key_id)
        except BaseException:
            if owned.is_deleted:
                await asyncio.shield(
                    self._shelf.delete_adapter(
                        owned.tenant, owned.adapter, actor_key_id=actor_key_id
                    )
                )
            raise

    async def unload(self, name: str, *, actor_key_id: uuid.UUID) -> None:
        """Serve the name no more. Raises NotFound."""
        found = [owned for owned in await self._owners(name) if owned.is_known]
        if not found or found[0].is_deleted:
            raise NotFound(f"The lora adapter '{name}' cannot be found.", param="lora_name")
        (owned,) = found
        await self._shelf.delete_adapter(owned.tenant, owned.adapter, actor_key_id=actor_key_id)
        await self._residency.forget_adapter(owned.tenant, owned.adapter)

    async def _publish(self, owned: Owned, folder: LoraFolder, *, actor_key_id: uuid.UUID) -> None:
        try:
            accepted = await self._uploads.publish_folder(
                owned.tenant, owned.adapter, folder, actor_key_id=actor_key_id
            )
        except (RejectedUpload, Conflict) as error:
            raise InvalidRequest(_told(error), param="lora_path") from error
        published = accepted.published
        number, name = published.version.number, published.adapter.public_name
        latest = (await self._owner_of(name)).latest
        if latest != number:
            raise InvalidRequest(
                f"The lora adapter '{name}' has these contents already, as version {number}, but"
                f" its name stands for version {latest}: call '{name}@{number}'.",
                param="lora_path",
            )

    async def _owner_of(self, name: str) -> Owned:
        """Raises InvalidRequest where the name is nobody's, or could be several tenants'."""
        owners = await self._owners(name)
        known = [owned for owned in owners if owned.is_known]
        if len(known or owners) == 1:
            return (known or owners)[0]
        if owners:
            tenants = ", ".join(sorted(owned.tenant for owned in owners))
            raise InvalidRequest(
                f"lora_name: {name!r} could be an adapter of several tenants ({tenants}): upload it"
                " to /admin/v1/tenants/{tenant}/adapters/{adapter}/versions.",
                param="lora_name",
            )
        raise InvalidRequest(
            f"lora_name: {name!r} must be <tenant>-<adapter>, of a tenant that exists.",
            param="lora_name",
        )

    async def _owners(self, name: str) -> list[Owned]:
        if re.fullmatch(NAME_PATTERN, name) is None:
            return []
        async with self._database.as_worker() as session:
            return [
                Owned(**row)
                for row in (await session.execute(FIND_OWNERS, {"name": name})).mappings()
            ]


def _told(error: RejectedUpload | Conflict) -> str:
    if isinstance(error, Conflict):
        return error.message
    findings = [f"{f.code} ({f.where}): {f.message}; {f.fix}" for f in error.findings]
    return "The adapter was refused. " + ". ".join(findings)
