"""Base models and which engines serve them: how one is offered, swapped for another, and retired.

A base model has one revision at a time, and an engine serves one revision. Rows say who serves,
who drains and who is gone; every change is one transaction that holds its audit row. Knows nothing
of links, of processes, or of how requests are shared out.
"""

import datetime
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from sqlalchemy import ColumnElement, delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from engine.protocol import EngineInfo
from gateway import audit, prices
from gateway.database import Database
from gateway.errors import Conflict, InvalidRequest, NotFound
from gateway.public_names import claim_name
from gateway.tables import BaseModel, EngineReplica, new_id

# Two slugs and a dash take 65; base models may have longer names, with a folder in front.
MAX_MODEL_NAME = 256
# So many modules that do not fit are named.
MAX_MISFITS = 3

EngineRowState = Literal["serving", "draining", "gone"]

# What would stop working if the base model's shape or limits changed.
LIVING_VERSIONS = text("""
    SELECT count(*) AS number, max(v.rank) AS rank
    FROM adapter_versions v
    JOIN adapters a ON a.id = v.adapter_id AND a.deleted_at IS NULL
    WHERE a.base_model_id = :base_model_id AND v.deleted_at IS NULL AND v.state <> 'rejected'
""")


@dataclass(frozen=True, slots=True)
class EngineRow:
    """What the rows say of one engine."""

    address: str
    base_model_id: uuid.UUID
    base_model: str
    revision: int
    state: EngineRowState


@dataclass(frozen=True, slots=True)
class BaseModelEntry:
    """A base model and the addresses of the engines that serve it, and of those that drain."""

    base_model: BaseModel
    replicas: list[str]
    draining: list[str]


class BaseModels:
    """What operators do with base models, and what gateways have to know of their engines."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def entries(self) -> list[BaseModelEntry]:
        """Return every base model that was ever registered, by name."""
        async with self._database.as_worker() as session:
            rows = (await session.scalars(select(BaseModel).order_by(BaseModel.name))).all()
            order = select(EngineReplica).order_by(EngineReplica.address)
            replicas = (await session.scalars(order)).all()

        def addresses(base_model: BaseModel, state: EngineRowState) -> list[str]:
            mine = (r for r in replicas if r.base_model_id == base_model.id)
            return [replica.address for replica in mine if replica.state == state]

        return [
            BaseModelEntry(row, addresses(row, "serving"), addresses(row, "draining"))
            for row in rows
        ]

    async def engines(self) -> list[EngineRow]:
        """Every engine that was ever told of, those that are gone too."""
        query = select(EngineReplica, BaseModel.name).join(
            BaseModel, BaseModel.id == EngineReplica.base_model_id
        )
        async with self._database.as_worker() as session:
            return [_engine_row(row, name) for row, name in await session.execute(query)]

    async def name_of(self, name: str) -> str:
        """A base model's name as it is spelled; `name` in any case, or its id. Raises NotFound."""
        async with self._database.as_worker() as session:
            return (await find_base_model(session, name)).name

    async def attach(self, info: EngineInfo, address: str, *, actor_key_id: uuid.UUID) -> EngineRow:
        """Have the engine at `address` serve its base model, though it was retired.

        Raises InvalidRequest or Conflict.
        """
        async with self._database.as_worker() as session:
            await _check_is_another(session, info, address)
            base_model = await _open(session, info)
            await _check_like_others(session, base_model, info, address)
            base_model.retired_at = None
            await _take_over(session, base_model, info)
            replica = await _set_replica(session, base_model, info=info, address=address)
            replica.state, replica.revision = "serving", base_model.revision
            details = {"address": address, "digest": info.base_digest}
            await _record(session, base_model, "attach", details, actor_key_id=actor_key_id)
            return _engine_row(replica, base_model.name)

    async def swap(
        self, name: str, info: EngineInfo, address: str, *, actor_key_id: uuid.UUID
    ) -> EngineRow:
        """Have the engine at `address` serve the base model's next revision, in place of others.

        Those drain from now on. Raises NotFound, InvalidRequest, or Conflict where adapters of the
        base model would not fit.
        """
        async with self._database.as_worker() as session:
            base_model = await find_base_model(session, name, for_update=True)
            _check_same_name(base_model, info, address)
            await _check_is_another(session, info, address)
            await _check_not_serving(session, base_model, address)
            await _check_fit(session, base_model, info)
            details = {"address": address, "from": base_model.digest, "to": info.base_digest}
            base_model.revision += 1
            base_model.digest, base_model.retired_at = info.base_digest, None
            await _take_over(session, base_model, info)
            await _drain(session, EngineReplica.base_model_id == base_model.id)
            replica = await _set_replica(session, base_model, info=info, address=address)
            replica.state, replica.revision = "serving", base_model.revision
            details["revision"] = str(base_model.revision)
            await _record(session, base_model, "swap", details, actor_key_id=actor_key_id)
            return _engine_row(replica, base_model.name)

    async def retire(self, name: str, *, address: str | None, actor_key_id: uuid.UUID) -> BaseModel:
        """Give a base model no more requests, or one of its engines; what runs goes on to its end.

        Once more changes nothing. Raises NotFound, and Conflict for its last engine alone.
        """
        async with self._database.as_worker() as session:
            base_model = await find_base_model(session, name, for_update=True)
            if address is not None:
                await _check_not_last(session, base_model, address)
                which = EngineReplica.address == address
            else:
                if base_model.retired_at is not None:
                    return base_model
                base_model.retired_at = await _now(session)
                which = EngineReplica.base_model_id == base_model.id
            await _drain(session, which)
            details = {} if address is None else {"address": address}
            await _record(session, base_model, "retire", details, actor_key_id=actor_key_id)
        return base_model

    async def let_go(self, address: str) -> None:
        """An engine has drained: it is gone, and comes back only when an operator says so."""
        async with self._database.as_worker() as session:
            await session.execute(
                update(EngineReplica)
                .where(EngineReplica.address == address, EngineReplica.state == "draining")
                .values(state="gone")
            )

    async def expect(self, folder: str, names: Mapping[str, str]) -> None:
        """Say which engines are about to start at addresses that begin with `folder`, and no other.

        `names`: address -> base model. What an earlier life of their host left there is forgotten,
        and so is that one of them was retired. Those that are not known yet are told of later.
        """
        begins = EngineReplica.address.startswith(folder, autoescape=True)
        known = select(BaseModel).where(BaseModel.name.in_(names.values())).with_for_update()
        async with self._database.as_worker() as session:
            base_models = {row.name: row for row in await session.scalars(known)}
            await session.execute(delete(EngineReplica).where(begins))
            for address, name in names.items():
                if (base_model := base_models.get(name)) is not None:
                    base_model.retired_at = None
                    session.add(_unstarted(base_model, address))


async def enroll(
    session: AsyncSession, info: EngineInfo, address: str
) -> tuple[BaseModel, EngineReplica]:
    """Offer what an engine says that it serves, unless an operator let go of either.

    Raises InvalidRequest or Conflict.
    """
    base_model = await _open(session, info)
    if base_model.retired_at is not None:
        raise Conflict(
            f"{base_model.name!r} is retired: POST /admin/v1/base-models brings it back."
        )
    await _check_like_others(session, base_model, info, address)
    replica = await _set_replica(session, base_model, info=info, address=address)
    if replica.state != "serving":
        raise Conflict(
            f"The engine at {address} was let go: POST /admin/v1/base-models brings it back."
        )
    await _take_over(session, base_model, info)
    return base_model, replica


async def find_base_model(
    session: AsyncSession, name: str, *, for_update: bool = False
) -> BaseModel:
    """By its name in any case, or by its id. Raises NotFound."""
    query = select(BaseModel).where(_is_called(name))
    if for_update:
        query = query.with_for_update()
    found = (await session.scalars(query)).one_or_none() if name.isprintable() else None
    if found is None:
        raise NotFound(f"There is no base model {name!r}.")
    return found


def _is_called(name: str) -> ColumnElement[bool]:
    try:
        return BaseModel.id == uuid.UUID(name)
    except ValueError:
        return func.lower(BaseModel.name) == name.lower()


async def _open(session: AsyncSession, info: EngineInfo) -> BaseModel:
    """The row of a base model, made if new, locked until the transaction ends. Raises Conflict."""
    _check_name(info.base_model)
    await session.execute(
        insert(BaseModel)
        .values(
            id=new_id(),
            name=info.base_model,
            digest=info.base_digest,
            text_bundle_digest=info.text_bundle_digest,
            shape=msgspec.to_builtins(info.base_shape),
            context_length=info.max_model_len,
            vocab_size=info.vocab_size,
            max_lora_rank=info.max_lora_rank,
        )
        .on_conflict_do_nothing(index_elements=[BaseModel.name])
    )
    query = select(BaseModel).where(BaseModel.name == info.base_model).with_for_update()
    base_model = (await session.scalars(query)).one()
    if base_model.digest != info.base_digest:
        raise Conflict(
            f"{info.base_model!r} stands for the base model {base_model.digest}, but the engine "
            f"serves {info.base_digest}; give it a name of its own with --served-model-name, or "
            "have it take the other's place: POST /admin/v1/base-models/{name}/swap."
        )
    await claim_name(session, info.base_model.lower(), base_model_id=base_model.id)
    return base_model


async def _take_over(session: AsyncSession, base_model: BaseModel, info: EngineInfo) -> None:
    base_model.text_bundle_digest = info.text_bundle_digest
    base_model.shape = msgspec.to_builtins(info.base_shape)
    base_model.context_length = info.max_model_len
    base_model.vocab_size = info.vocab_size
    base_model.max_lora_rank = info.max_lora_rank
    await session.flush()
    await prices.ensure_default(session, base_model.id)


async def _set_replica(
    session: AsyncSession, base_model: BaseModel, *, info: EngineInfo, address: str
) -> EngineReplica:
    """An address serves one base model: the one that its engine named last.

    What an operator wanted of the engine stays, as long as it serves the same one.
    """
    replica = await session.get(EngineReplica, address, with_for_update=True)
    if replica is None:
        replica = _unstarted(base_model, address)
        session.add(replica)
    elif replica.base_model_id != base_model.id:
        replica.base_model_id, replica.revision = base_model.id, base_model.revision
        replica.state = "serving"
    replica.engine_epoch, replica.device = info.engine_epoch, info.device
    replica.max_loras, replica.seen_at = info.max_loras, await _now(session)
    await session.flush()
    return replica


async def _now(session: AsyncSession) -> datetime.datetime:
    now: datetime.datetime = (await session.scalars(select(func.now()))).one()
    return now


def _unstarted(base_model: BaseModel, address: str) -> EngineReplica:
    return EngineReplica(
        address=address,
        base_model_id=base_model.id,
        revision=base_model.revision,
        state="serving",
        engine_epoch=0,
        device="",
        max_loras=0,
    )


async def _drain(session: AsyncSession, which: ColumnElement[bool]) -> None:
    await session.execute(
        update(EngineReplica)
        .where(which, EngineReplica.state == "serving")
        .values(state="draining")
    )


def _check_name(name: str) -> None:
    is_sound = name and len(name) <= MAX_MODEL_NAME and name.isprintable() and "@" not in name
    if not is_sound:
        raise InvalidRequest(
            f"A base model's name is 1 to {MAX_MODEL_NAME} printable characters without '@'; "
            "choose one with --served-model-name.",
            param="served_model_name",
        )


def _check_same_name(base_model: BaseModel, info: EngineInfo, address: str) -> None:
    if info.base_model != base_model.name:
        raise InvalidRequest(
            f"The engine at {address} serves {info.base_model!r}: start it with --served-name"
            f" {base_model.name!r}.",
            param="address",
        )


async def _check_is_another(session: AsyncSession, info: EngineInfo, address: str) -> None:
    """One engine by two addresses would be two to us, and drop one link for the other."""
    query = select(EngineReplica.address).where(
        EngineReplica.engine_epoch == info.engine_epoch,
        EngineReplica.address != address,
        EngineReplica.state != "gone",
    )
    if (known := await session.scalar(query.limit(1))) is not None:
        raise Conflict(f"The engine at {address} is known already: as {known}.", param="address")


async def _check_like_others(
    session: AsyncSession, base_model: BaseModel, info: EngineInfo, address: str
) -> None:
    """Any engine of a revision may get any request for it."""
    query = select(EngineReplica.address).where(
        EngineReplica.base_model_id == base_model.id,
        EngineReplica.address != address,
        EngineReplica.state == "serving",
        # One that has not started yet says nothing of its own.
        EngineReplica.engine_epoch != 0,
    )
    if (other := await session.scalar(query.limit(1))) is None:
        return
    for what, ours, theirs in (
        ("a context of so many tokens", info.max_model_len, base_model.context_length),
        ("adapters up to rank", info.max_lora_rank, base_model.max_lora_rank),
        ("the text bundle", info.text_bundle_digest, base_model.text_bundle_digest),
    ):
        if ours != theirs:
            raise Conflict(
                f"The engine at {address} serves {what}: {ours}, and the one at {other} {theirs}:"
                " start both alike, swap one for the other, or retire that one first.",
                param="address",
            )


async def _check_not_serving(session: AsyncSession, base_model: BaseModel, address: str) -> None:
    replica = await session.get(EngineReplica, address)
    is_current = replica is not None and replica.revision == base_model.revision
    if replica is not None and is_current and replica.state == "serving":
        raise Conflict(f"The engine at {address} serves {base_model.name!r} now.", param="address")


async def _check_not_last(session: AsyncSession, base_model: BaseModel, address: str) -> None:
    query = select(EngineReplica).where(EngineReplica.base_model_id == base_model.id)
    replicas = {row.address: row for row in await session.scalars(query)}
    if address not in replicas:
        raise NotFound(f"No engine at {address} serves {base_model.name!r}.", param="address")
    if not any(r.state == "serving" for r in replicas.values() if r.address != address):
        raise Conflict(
            f"The engine at {address} is the last one of {base_model.name!r}: leave out the address"
            " to retire the base model.",
            param="address",
        )


async def _check_fit(session: AsyncSession, base_model: BaseModel, info: EngineInfo) -> None:
    """Raises Conflict where adapters that exist could not be served on top any more."""
    living = (await session.execute(LIVING_VERSIONS, {"base_model_id": base_model.id})).one()
    if not living.number:
        return
    misfits = _misfits(base_model.shape, msgspec.to_builtins(info.base_shape))
    if base_model.vocab_size != info.vocab_size:
        misfits.append(f"{info.vocab_size} tokens, not {base_model.vocab_size}")
    if living.rank > info.max_lora_rank:
        misfits.append(f"adapters up to rank {info.max_lora_rank}, and one has {living.rank}")
    if misfits:
        shown = "; ".join(misfits[:MAX_MISFITS])
        raise Conflict(
            f"{living.number} version(s) of adapters would not fit: the engine serves {shown}."
            " Serve it under a name of its own, and upload adapters for that."
        )


def _misfits(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What of a shape is not as it was; what is new besides does no harm."""
    found = []
    for kind, parts in old.items():
        # A model's own name, and what no adapter may change.
        if kind in ("base_model", "experts"):
            continue
        if not isinstance(parts, Mapping):
            if new.get(kind) != parts:
                found.append(f"{kind} {new.get(kind)}, not {parts}")
            continue
        theirs = new.get(kind) or {}
        found += [
            f"{module} as {theirs.get(module)}, not {shape}"
            for module, shape in parts.items()
            if theirs.get(module) is None or list(theirs[module]) != list(shape)
        ]
    return found


async def _record(
    session: AsyncSession,
    base_model: BaseModel,
    action: str,
    details: Mapping[str, str],
    *,
    actor_key_id: uuid.UUID,
) -> None:
    await audit.record(
        session,
        tenant_id=None,
        actor_key_id=actor_key_id,
        action=f"base_model.{action}",
        subject=base_model.name,
        details=details,
    )


def _engine_row(replica: EngineReplica, base_model: str) -> EngineRow:
    state: EngineRowState = msgspec.convert(replica.state, EngineRowState)
    return EngineRow(replica.address, replica.base_model_id, base_model, replica.revision, state)
