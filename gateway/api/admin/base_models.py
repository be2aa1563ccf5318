"""Base models, for operators: what is served and by which engines; offer, swap and retire."""

import datetime
import uuid
from typing import Annotated

import msgspec
from litestar import get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from engine.client import is_address
from gateway.auth import Principal
from gateway.base_models import BaseModelEntry, BaseModels, EngineRow, EngineRowState
from gateway.engines import Engines
from gateway.errors import InvalidRequest

TAGS = ["admin: base models"]
MAX_LENGTH = 4096
Words = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_LENGTH)]


class BaseModelView(msgspec.Struct, frozen=True):
    """A base model. One without replicas is known and not offered."""

    id: uuid.UUID
    base_model: str
    digest: str
    # Grows with each swap.
    revision: int
    text_bundle_digest: str
    context_length: int
    max_lora_rank: int
    # Addresses of the engines that serve it, and of those that only finish what they have.
    replicas: list[str]
    draining: list[str]
    created_at: datetime.datetime
    # Since when it is to be served no more; null while it may be called.
    retired_at: datetime.datetime | None

    @classmethod
    def of(cls, entry: BaseModelEntry) -> "BaseModelView":
        base_model = entry.base_model
        return cls(
            id=base_model.id,
            base_model=base_model.name,
            digest=base_model.digest,
            revision=base_model.revision,
            text_bundle_digest=base_model.text_bundle_digest,
            context_length=base_model.context_length,
            max_lora_rank=base_model.max_lora_rank,
            replicas=entry.replicas,
            draining=entry.draining,
            created_at=base_model.created_at,
            retired_at=base_model.retired_at,
        )


class BaseModelList(msgspec.Struct, frozen=True):
    """Every base model that was ever registered."""

    data: list[BaseModelView]


class ServedBy(msgspec.Struct, frozen=True):
    """The engine that serves a base model from now on."""

    address: str
    base_model: str
    revision: int
    state: EngineRowState

    @classmethod
    def of(cls, row: EngineRow) -> "ServedBy":
        return cls(row.address, row.base_model, row.revision, row.state)


class NewEngine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An engine that runs, by its `address`; or a `model` for which one is started here.

    `model` is a folder below the server's `--model-folder`, and `base_model` its public name.
    """

    address: Words | None = None
    model: Words | None = None
    base_model: Words | None = None


class NextRevision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An engine that runs, by its `address`; or a `model` for which one is started here."""

    address: Words | None = None
    model: Words | None = None


class Retirement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of several engines, by its `address`; left out, the whole base model."""

    address: Words | None = None


@get("/base-models", scope="operator", tags=TAGS, summary="List the base models")
async def list_base_models(base_models: NamedDependency[BaseModels]) -> BaseModelList:
    return BaseModelList([BaseModelView.of(entry) for entry in await base_models.entries()])


@post(
    "/base-models",
    scope="operator",
    tags=TAGS,
    summary="Have an engine serve a base model",
    description=(
        "One that is new, that was retired, or one more engine for one that is served. With an"
        " address the engine must run already: it tells what it serves, and answers at"
        " `unix:/path` or `http://host:port` to the secret of this server. With a model, the answer"
        " comes when the model is loaded, which may take minutes."
    ),
)
async def create_base_model(
    data: JSONBody[NewEngine],
    engines: NamedDependency[Engines],
    principal: NamedDependency[Principal],
) -> ServedBy:
    if data.model is None:
        if data.base_model is not None:
            raise InvalidRequest(
                "The engine at an address tells its name itself.", param="base_model"
            )
        row = await engines.attach(_address(data.address), actor_key_id=principal.key_id)
    elif data.address is None and data.base_model is not None:
        row = await engines.start(data.base_model, data.model, actor_key_id=principal.key_id)
    else:
        raise InvalidRequest("Send a model with its base_model, or an address.", param="base_model")
    return ServedBy.of(row)


@post(
    "/base-models/{base_model:str}/swap",
    scope="operator",
    tags=TAGS,
    status_code=200,
    summary="Have another engine take a base model's place",
    description=(
        "The base model keeps its name, its prices and its adapters, and gets a new revision. New"
        " requests go to the new engine once it has loaded; what runs ends on the old ones, which"
        " are let go then. Refused where adapters of the base model would not fit the new one. The"
        " base model is named, or given by its id where its name has a slash."
    ),
)
async def swap_base_model(
    base_model: FromPath[str],
    data: JSONBody[NextRevision],
    engines: NamedDependency[Engines],
    principal: NamedDependency[Principal],
) -> ServedBy:
    actor = principal.key_id
    if data.model is None:
        row = await engines.swap(base_model, _address(data.address), actor_key_id=actor)
    elif data.address is None:
        row = await engines.start_and_swap(base_model, data.model, actor_key_id=actor)
    else:
        raise InvalidRequest("Send an address or a model, not both.", param="model")
    return ServedBy.of(row)


@post(
    "/base-models/{base_model:str}/retire",
    scope="operator",
    tags=TAGS,
    status_code=200,
    summary="Serve a base model no more, or let one of its engines go",
    description=(
        "New requests for it and for its adapters get a 404 that says so; what runs goes on to its"
        " end, and then its engines are let go. Nothing is deleted: an engine that serves it can be"
        " attached again. With an address that engine alone is let go, unless it is the last."
    ),
)
async def retire_base_model(
    base_model: FromPath[str],
    engines: NamedDependency[Engines],
    base_models: NamedDependency[BaseModels],
    principal: NamedDependency[Principal],
    data: JSONBody[Retirement | None] = None,
) -> BaseModelView:
    address = (data or Retirement()).address
    found = await engines.retire(base_model, address=address, actor_key_id=principal.key_id)
    [view] = [entry for entry in await base_models.entries() if entry.base_model.id == found.id]
    return BaseModelView.of(view)


def _address(address: str | None) -> str:
    if address is None:
        raise InvalidRequest("Send the address of an engine, or a model.", param="address")
    if not is_address(address):
        raise InvalidRequest("address must be unix:/path or http://host:port.", param="address")
    return address
