"""Base models, for operators: what is served and by which engines."""

import datetime

import msgspec
from litestar import get
from litestar.di import NamedDependency

from gateway.registry import Registry


class BaseModelView(msgspec.Struct, frozen=True):
    """A base model. One without replicas is known and not offered."""

    base_model: str
    digest: str
    text_bundle_digest: str
    context_length: int
    max_lora_rank: int
    # Addresses of the engines that serve it.
    replicas: list[str]
    created_at: datetime.datetime


class BaseModelList(msgspec.Struct, frozen=True):
    """Every base model that was ever registered."""

    data: list[BaseModelView]


@get(
    "/base-models",
    scope="operator",
    tags=["admin: base models"],
    summary="List the base models",
)
async def list_base_models(registry: NamedDependency[Registry]) -> BaseModelList:
    return BaseModelList(
        [
            BaseModelView(
                base_model=entry.base_model.name,
                digest=entry.base_model.digest,
                text_bundle_digest=entry.base_model.text_bundle_digest,
                context_length=entry.base_model.context_length,
                max_lora_rank=entry.base_model.max_lora_rank,
                replicas=entry.replicas,
                created_at=entry.base_model.created_at,
            )
            for entry in await registry.base_models()
        ]
    )
