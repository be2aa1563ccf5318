"""GET /v1/models and /v1/models/{model}."""

from typing import Literal

import msgspec
from litestar import get
from litestar.di import NamedDependency
from litestar.params import FromPath

from gateway.auth import Principal
from gateway.registry import ModelEntry, Registry, model_not_found


class Model(msgspec.Struct, frozen=True):
    """OpenAI's model object; `root` is the base model, `parent` too where an adapter is on top."""

    id: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    # What the bare name stands for, a canary aside; null for a base model.
    adapter_version: int | None
    adapter_digest: str | None
    object: Literal["model"] = "model"

    @classmethod
    def of(cls, entry: ModelEntry) -> "Model":
        return cls(
            id=entry.id,
            created=int(entry.created_at.timestamp()),
            owned_by=entry.owned_by,
            root=entry.base_model,
            parent=entry.base_model if entry.version_number is not None else None,
            adapter_version=entry.version_number,
            adapter_digest=entry.version_digest,
        )


class ModelList(msgspec.Struct, frozen=True):
    data: list[Model]
    object: Literal["list"] = "list"


@get("/v1/models", scope="inference", tags=["models"], summary="List the models you may call")
async def list_models(
    principal: NamedDependency[Principal], registry: NamedDependency[Registry]
) -> ModelList:
    entries = await registry.list_models(principal)
    return ModelList([Model.of(entry) for entry in entries if principal.may_call(entry.id.lower())])


@get(
    "/v1/models/{model:path}",
    scope="inference",
    tags=["models"],
    summary="Describe one model that you may call",
)
async def get_model(
    model: FromPath[str], principal: NamedDependency[Principal], registry: NamedDependency[Registry]
) -> Model:
    # A path parameter begins with its slash; hub ids have one inside.
    name = model.removeprefix("/").lower()
    for entry in await registry.list_models(principal):
        if entry.id.lower() == name and principal.may_call(name):
            return Model.of(entry)
    raise model_not_found(name)
