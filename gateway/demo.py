"""Fill a running server with the demo: two tenants, their keys, four adapters.

Goes through the public REST API like any operator. Running it again changes nothing.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

import adapters.demo
from adapters.demo.tasks import TASKS
from gateway.children import CannotServe
from gateway.private_files import write_private

FOLDER = Path(adapters.demo.__file__).parent
FILES = ("adapter_config.json", "adapter_model.safetensors")


async def set_up_demo(
    url: str, *, base_model: str, admin_key: str, path: Path, say: Callable[[str], None]
) -> None:
    """Create what is missing and write everything one needs to know to `path`, last and whole."""
    known = _known_tenants(path)
    async with httpx.AsyncClient(
        base_url=url,
        headers={"authorization": f"Bearer {admin_key}"},
        timeout=httpx.Timeout(10, read=600),
        trust_env=False,
    ) as operator:
        tenants: dict[str, dict[str, Any]] = {}
        for tenant in sorted({task.tenant for task in TASKS.values()}):
            await _ensure_tenant(operator, tenant)
            key = await _ensure_key(operator, tenant, known.get(tenant, {}).get("key"))
            tenants[tenant] = {"key": key, "adapters": []}
        for task in TASKS.values():
            say(f"demo: uploading {task.tenant}-{task.name}")
            tenants[task.tenant]["adapters"].append(await _upload(operator, task.tenant, task.name))
    written = {
        "base_url": f"{url}/v1",
        "base_model": base_model,
        "admin_key": admin_key,
        "tenants": tenants,
    }
    write_private(path, json.dumps(written, indent=2) + "\n")
    _explain(url, tenants, path, say)


def _known_tenants(path: Path) -> dict[str, dict[str, Any]]:
    tenants: dict[str, dict[str, Any]] = (
        json.loads(path.read_text())["tenants"] if path.exists() else {}
    )
    return tenants


async def _ensure_tenant(operator: httpx.AsyncClient, tenant: str) -> None:
    answer = await operator.post("/admin/v1/tenants", json={"slug": tenant, "name": tenant.title()})
    if answer.status_code != httpx.codes.CONFLICT:
        _read(answer)


async def _ensure_key(operator: httpx.AsyncClient, tenant: str, known: str | None) -> str:
    if known is not None:
        headers = {"authorization": f"Bearer {known}"}
        if (await operator.get("/v1/models", headers=headers)).is_success:
            return known
    answer = await operator.post(f"/admin/v1/tenants/{tenant}/keys", json={"name": "demo"})
    return str(_read(answer)["key"])


async def _upload(operator: httpx.AsyncClient, tenant: str, name: str) -> str:
    files = [("files", (file, (FOLDER / name / file).read_bytes())) for file in FILES]
    answer = await operator.post(
        f"/admin/v1/tenants/{tenant}/adapters/{name}/versions", files=files
    )
    return str(_read(answer)["model"])


def _read(answer: httpx.Response) -> dict[str, Any]:
    """The JSON of an answer. Raises CannotServe where the server refused."""
    if answer.is_error:
        raise CannotServe(f"the demo could not be set up: {answer.request.url}: {answer.text}")
    read: dict[str, Any] = answer.json()
    return read


def _explain(
    url: str, tenants: dict[str, dict[str, Any]], path: Path, say: Callable[[str], None]
) -> None:
    for tenant, facts in tenants.items():
        say(f"{tenant}: key {facts['key']}, models {', '.join(facts['adapters'])}")
    key, model = tenants["acme"]["key"], tenants["acme"]["adapters"][0]
    body = {
        "model": model,
        "stream": True,
        "temperature": 0,
        "messages": [{"role": "user", "content": _first_question(model)}],
    }
    say("a streamed answer:")
    say(
        f"  curl -N {url}/v1/chat/completions -H 'Authorization: Bearer {key}'"
        f" -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    )
    say(f"API documentation: {url}/docs")
    say(f"everything above is in {path}")


def _first_question(model: str) -> str:
    (task,) = (task for task in TASKS.values() if f"{task.tenant}-{task.name}" == model)
    with (FOLDER / task.name / "held_out.jsonl").open() as lines:
        return str(json.loads(next(lines))["messages"][0]["content"])
