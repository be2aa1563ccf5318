"""vLLM's routes to load and unload adapters, for operators."""

import msgspec
from litestar import MediaType, Response, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from gateway.auth import Principal
from gateway.runtime_loras import RuntimeLoras

TAGS = ["adapters at run time"]


class LoadLora(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`lora_name` is `<tenant>-<adapter>`, `lora_path` a folder below `--lora-folder`."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadLora(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The name that is called no more from now on."""

    lora_name: str


@post(
    "/v1/load_lora_adapter",
    scope="operator",
    tags=TAGS,
    status_code=200,
    media_type=MediaType.TEXT,
    summary="Load an adapter from a folder of this host",
    description=(
        "As in vLLM, but judged and probed like every upload, and kept: it is there after a"
        " restart. `load_inplace` makes a new version of an adapter that is served already."
    ),
)
async def load_lora_adapter(
    data: JSONBody[LoadLora],
    runtime_loras: NamedDependency[RuntimeLoras],
    principal: NamedDependency[Principal],
) -> Response[str]:
    await runtime_loras.load(
        data.lora_name,
        data.lora_path,
        in_place=data.load_inplace,
        actor_key_id=principal.key_id,
    )
    return Response(
        f"Success: LoRA adapter '{data.lora_name}' added successfully.", media_type=MediaType.TEXT
    )


@post(
    "/v1/unload_lora_adapter",
    scope="operator",
    tags=TAGS,
    status_code=200,
    media_type=MediaType.TEXT,
    summary="Serve an adapter no more",
    description=(
        "The adapter is deleted as by DELETE on its own route, and engines let go of it. Its"
        " versions stay: loading the name again, or restoring it, brings it back."
    ),
)
async def unload_lora_adapter(
    data: JSONBody[UnloadLora],
    runtime_loras: NamedDependency[RuntimeLoras],
    principal: NamedDependency[Principal],
) -> Response[str]:
    await runtime_loras.unload(data.lora_name, actor_key_id=principal.key_id)
    return Response(
        f"Success: LoRA adapter '{data.lora_name}' removed successfully.",
        media_type=MediaType.TEXT,
    )
