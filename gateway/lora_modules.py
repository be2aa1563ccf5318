"""vLLM's --lora-modules: adapters of this host that are uploaded when the server has started.

Goes through the public REST API like any operator; the same contents again change nothing. Names
here begin with a tenant, and a name that begins with none is given to the tenant `default`.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from adapters.folder import ADAPTER_FILES, OPTIONAL_FILES
from gateway.children import CannotServe
from gateway.private_files import write_private

DEFAULT_TENANT = "default"
# A probe on a CPU takes minutes for a large model.
UPLOAD_TIMEOUT_S = 900


class LoraModule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One adapter: the spelling of vLLM's JSON form."""

    name: str
    path: str
    base_model_name: str | None = None


def parse(word: str) -> LoraModule:
    """Read `name=path`, or the JSON form. Raises ValueError, which says what is wrong with it."""
    if word.lstrip().startswith("{"):
        try:
            return msgspec.json.decode(word, type=LoraModule)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{word}: {error}") from error
    name, equals, path = word.partition("=")
    if not (name and equals and path):
        raise ValueError(f"{word!r} must be name=path, or JSON with a name and a path")
    return LoraModule(name, path)


async def register(
    url: str,
    modules: Sequence[LoraModule],
    *,
    admin_key: str,
    data_dir: Path,
    say: Callable[[str], None],
) -> None:
    """Upload every module. Raises CannotServe where one of them is no adapter to be served."""
    if not modules:
        return
    async with httpx.AsyncClient(
        base_url=f"{url}/admin/v1",
        headers={"authorization": f"Bearer {admin_key}"},
        timeout=httpx.Timeout(10, read=UPLOAD_TIMEOUT_S),
        trust_env=False,
    ) as operator:
        for module in modules:
            tenant, adapter = await _owner_of(operator, module.name)
            if tenant == DEFAULT_TENANT:
                await _ensure_default_tenant(operator, data_dir / "default.key", say)
            await _upload(operator, module, tenant=tenant, adapter=adapter, say=say)


async def _owner_of(operator: httpx.AsyncClient, name: str) -> tuple[str, str]:
    """The one tenant that the name begins with; without one the whole name is an adapter's."""
    ends = [end for end, character in enumerate(name) if character == "-" and end]
    owners = [
        (name[:end], name[end + 1 :])
        for end in ends
        if (await operator.get(f"/tenants/{quote(name[:end], safe='')}")).is_success
    ]
    if len(owners) > 1:
        raise CannotServe(
            f"--lora-modules {name}: it could be an adapter of several tenants"
            f" ({', '.join(tenant for tenant, _ in owners)}); upload it with the REST API"
        )
    return owners[0] if owners else (DEFAULT_TENANT, name)


async def _ensure_default_tenant(
    operator: httpx.AsyncClient, key_path: Path, say: Callable[[str], None]
) -> None:
    answer = await operator.post("/tenants", json={"slug": DEFAULT_TENANT})
    if answer.status_code == httpx.codes.CONFLICT:
        return
    _read(answer)
    answer = await operator.post(f"/tenants/{DEFAULT_TENANT}/keys", json={"name": "default"})
    write_private(key_path, _read(answer)["key"] + "\n")
    say(f"lora-modules: the key of the tenant {DEFAULT_TENANT} is in {key_path}")


async def _upload(
    operator: httpx.AsyncClient,
    module: LoraModule,
    *,
    tenant: str,
    adapter: str,
    say: Callable[[str], None],
) -> None:
    folder = Path(module.path)
    fields = {} if module.base_model_name is None else {"base_model": module.base_model_name}
    with ExitStack() as stack:
        try:
            names = (*ADAPTER_FILES, *(n for n in OPTIONAL_FILES if (folder / n).exists()))
            files = [("files", (n, stack.enter_context((folder / n).open("rb")))) for n in names]
        except OSError as error:
            raise CannotServe(f"--lora-modules {module.name}: {error}") from error
        answer = await operator.post(
            f"/tenants/{tenant}/adapters/{quote(adapter, safe='')}/versions",
            files=files,
            data=fields,
        )
    if answer.status_code == httpx.codes.CONFLICT:
        # Deleted, or taken: what an operator did since is not undone by a flag.
        say(f"lora-modules: {module.name} is left out: {answer.json()['detail']}")
    else:
        version = _read(answer)
        say(f"lora-modules: {module.name} is served as {version['pinned_model']}")


def _read(answer: httpx.Response) -> dict[str, Any]:
    """The JSON of an answer. Raises CannotServe where the server refused."""
    if answer.is_error:
        raise CannotServe(f"--lora-modules: {answer.request.url.path}: {answer.text}")
    read: dict[str, Any] = answer.json()
    return read
