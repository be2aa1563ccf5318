"""Engines and where adapters are on them, for operators: warm, pin, unpin."""

import msgspec
from litestar import get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from engine.protocol import EngineStatus, Tier, TierReport
from gateway.auth import Principal
from gateway.residency import EngineState, Residence, Residency

VERSION = "/tenants/{tenant:str}/adapters/{adapter:str}/versions/{version:str}"
TAGS = ["admin: engines"]


class AdapterOnEngine(msgspec.Struct, frozen=True):
    """An adapter that an engine has near, wants near or keeps away. `models` have its weights."""

    weights_digest: str
    models: list[str]
    is_resident: bool
    is_hosted: bool
    is_pinned: bool
    is_quarantined: bool


class EngineLoad(msgspec.Struct, frozen=True):
    """What an engine is doing now."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_adapter_blocks: int


class EngineView(msgspec.Struct, frozen=True):
    """An engine. Of one that does not answer `problem` says why, and nothing else is known."""

    address: str
    base_model: str
    # Of the base model.
    revision: int
    is_connected: bool
    # Whether it only finishes what it has.
    is_draining: bool
    problem: str | None
    engine_epoch: int | None
    load: EngineLoad | None
    tiers: TierReport | None
    adapters: list[AdapterOnEngine]


class EngineList(msgspec.Struct, frozen=True):
    """Every engine that this gateway has heard of."""

    data: list[EngineView]


class WarmUp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How near: `host` memory, or on into a slot of the `device`."""

    to: Tier = "device"


class PlaceView(msgspec.Struct, frozen=True):
    """Where a version is on one engine; `problem` says why that is not known."""

    address: str
    is_resident: bool
    is_hosted: bool
    is_pinned: bool
    problem: str | None


class ResidenceView(msgspec.Struct, frozen=True):
    """Where a version is on the engines that were asked."""

    model: str
    weights_digest: str
    engines: list[PlaceView]


@get("/engines", scope="operator", tags=TAGS, summary="List the engines and what they hold")
async def list_engines(residency: NamedDependency[Residency]) -> EngineList:
    return EngineList([_engine_view(state) for state in await residency.engines()])


@post(
    f"{VERSION}/warm",
    scope="operator",
    tags=TAGS,
    status_code=200,
    summary="Bring a version near before its first request",
    description=(
        "The version is a number or an alias. The answer comes when the version is there on some"
        " engine: it takes what is free and what idles unwanted, and is given up after a minute."
        " Without a body it goes into a slot."
    ),
)
async def warm_version(
    tenant: FromPath[str],
    adapter: FromPath[str],
    version: FromPath[str],
    residency: NamedDependency[Residency],
    data: JSONBody[WarmUp | None] = None,
) -> ResidenceView:
    to = (data or WarmUp()).to
    return _residence_view(await residency.warm(tenant, adapter, version, to=to))


@post(
    f"{VERSION}/pin",
    scope="operator",
    tags=TAGS,
    status_code=200,
    summary="Keep a version in a slot of every engine",
    description=(
        "Also after an engine's restart. An alias pins the version for which it stands now. One"
        " slot of an engine is always left to adapters that are not pinned, and one that fits in"
        " no other way takes a pinned one's place for as long as it is used."
    ),
)
async def pin_version(
    tenant: FromPath[str],
    adapter: FromPath[str],
    version: FromPath[str],
    residency: NamedDependency[Residency],
    principal: NamedDependency[Principal],
) -> ResidenceView:
    found = await residency.pin(tenant, adapter, version, actor_key_id=principal.key_id)
    return _residence_view(found)


@post(
    f"{VERSION}/unpin",
    scope="operator",
    tags=TAGS,
    status_code=200,
    summary="Let a pinned version go when others need its place",
)
async def unpin_version(
    tenant: FromPath[str],
    adapter: FromPath[str],
    version: FromPath[str],
    residency: NamedDependency[Residency],
    principal: NamedDependency[Principal],
) -> ResidenceView:
    found = await residency.unpin(tenant, adapter, version, actor_key_id=principal.key_id)
    return _residence_view(found)


def _engine_view(state: EngineState) -> EngineView:
    status = state.status
    return EngineView(
        address=state.replica.link.address,
        base_model=state.replica.base_model,
        revision=state.replica.revision,
        is_connected=state.replica.link.is_connected,
        is_draining=state.is_draining,
        problem=state.problem,
        engine_epoch=None if status is None else status.engine_epoch,
        load=None if status is None else _load(status),
        tiers=None if status is None else status.tiers,
        adapters=[] if status is None else _adapters(status, state.models),
    )


def _load(status: EngineStatus) -> EngineLoad:
    return EngineLoad(
        num_running=status.num_running,
        num_waiting=status.num_waiting,
        num_blocks=status.num_blocks,
        num_free_blocks=status.num_free_blocks,
        num_adapter_blocks=status.num_adapter_blocks,
    )


def _adapters(status: EngineStatus, models: dict[str, list[str]]) -> list[AdapterOnEngine]:
    """The nearest first."""
    resident, hosted = set(status.resident_adapters), set(status.hosted_adapters)
    pinned, quarantined = set(status.pinned_adapters), set(status.quarantined_adapters)
    digests = dict.fromkeys(
        [
            *status.resident_adapters,
            *status.pinned_adapters,
            *status.hosted_adapters,
            *status.quarantined_adapters,
        ]
    )
    return [
        AdapterOnEngine(
            weights_digest=digest,
            models=models.get(digest, []),
            is_resident=digest in resident,
            is_hosted=digest in hosted,
            is_pinned=digest in pinned,
            is_quarantined=digest in quarantined,
        )
        for digest in digests
    ]


def _residence_view(residence: Residence) -> ResidenceView:
    return ResidenceView(
        model=residence.version.model,
        weights_digest=residence.version.weights_digest,
        engines=[
            PlaceView(
                address=answer.address,
                is_resident=answer.place is not None and answer.place.is_resident,
                is_hosted=answer.place is not None and answer.place.is_hosted,
                is_pinned=answer.place is not None and answer.place.is_pinned,
                problem=answer.problem,
            )
            for answer in residence.answers
        ],
    )
