"""Manylora of this checkout, through its gateway: keys, limits, budgets, prices and ledger on.

Adapters belong to several tenants, each asked for with its own tenant's key; so is the base model.
They are uploaded, probed and published before the start that is timed.
"""

import contextlib
import itertools
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from benchmarks.peers.load import HttpRequest, completion
from benchmarks.peers.peer import HttpRunning, PeerFailed, free_port, http_server
from benchmarks.peers.scene import RANK, Ask, Scene, cache_folder
from benchmarks.provenance import commit
from gateway.embedded import EmbeddedPostgres

NUM_TENANTS = 4
BASE = "base"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TIMEOUT_S = 600
# High enough to refuse nobody; each is checked and charged all the same.
CEILINGS = {
    "requests_per_minute": 1_000_000,
    "tokens_per_minute": 1_000_000_000,
    "concurrent_requests": 10_000,
}
BUDGET = {"cap_nano": 10**17, "period": "month"}
PRICE = {
    "base_model": BASE,
    "input_nano_per_million": 100_000_000,
    "output_nano_per_million": 400_000_000,
}


@dataclass(frozen=True, slots=True)
class Town:
    """Tenants by their keys, to whom adapters belong in turns."""

    keys: Sequence[str]

    def composer(self) -> Callable[[Ask, int], HttpRequest]:
        # Every tenant may ask the base model; they do it one after another.
        askers = itertools.cycle(range(len(self.keys)))

        def compose(ask: Ask, new_tokens: int) -> HttpRequest:
            tenant = next(askers) if ask.adapter is None else self.owner(ask.adapter)
            model = BASE if ask.adapter is None else f"t{tenant}-a{ask.adapter}"
            request = completion(model, ask.prompt.token_ids, new_tokens, ignore_eos=True)
            return replace(request, headers={"authorization": f"Bearer {self.keys[tenant]}"})

        return compose

    def owner(self, adapter: int) -> int:
        return adapter % len(self.keys)


class Manylora:
    def __init__(self, precision: str) -> None:
        self.name = "manylora" if precision == "fp32" else f"manylora-{precision}"
        self.title = f"Manylora, {precision}"
        self.precision = precision

    def install(self) -> None:
        """It runs in the environment that runs this."""

    def versions(self) -> dict[str, str]:
        return {"manylora": commit()}

    def serves(self, scene: Scene) -> bool:
        return True

    @contextlib.contextmanager
    def start(self, scene: Scene) -> Iterator[HttpRunning]:
        with _data_folder() as folder:
            with self._serve(scene, folder, Town([]).composer()) as first:
                town = _settle(first.base_url, folder, scene)
            with self._serve(scene, folder, town.composer()) as running:
                yield running

    def _serve(
        self, scene: Scene, folder: Path, compose: Callable[[Ask, int], HttpRequest]
    ) -> contextlib.AbstractContextManager[HttpRunning]:
        port = free_port()
        command = [sys.executable, "-m", "gateway.cli", "serve", "--model", str(scene.model)]
        command += ["--served-model-name", BASE, "--data-dir", str(folder), "--port", str(port)]
        command += ["--max-loras", str(max(len(scene.adapters), 1)), "--max-lora-rank", str(RANK)]
        if self.precision != "fp32":
            command += ["--quantization", self.precision]
        log = cache_folder() / f"{self.name}.log"
        return http_server(command, port, compose, log=log, health="/health/ready")


@contextlib.contextmanager
def _data_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        folder = Path(scratch) / "data"
        try:
            yield folder
        finally:
            # Root's cluster is outside the folder.
            shutil.rmtree(EmbeddedPostgres(folder).home, ignore_errors=True)


def _settle(url: str, folder: Path, scene: Scene) -> Town:
    """Tenants with ceilings, a hard budget and a key each, a price, and all adapters."""
    operator_key = (folder / "operator.key").read_text().strip()
    with httpx.Client(
        base_url=f"{url}/admin/v1",
        headers={"authorization": f"Bearer {operator_key}"},
        timeout=TIMEOUT_S,
        trust_env=False,
    ) as operator:
        _read(operator.post("/prices", json=PRICE))
        town = Town([_settle_in(operator, f"t{number}") for number in range(NUM_TENANTS)])
        for number, path in enumerate(scene.adapters):
            files = [("files", (each, (path / each).read_bytes())) for each in ADAPTER_FILES]
            place = f"/tenants/t{town.owner(number)}/adapters/a{number}/versions"
            _read(operator.post(place, files=files))
    return town


def _settle_in(operator: httpx.Client, tenant: str) -> str:
    _read(operator.post("/tenants", json={"slug": tenant, "name": tenant}))
    _read(operator.put(f"/tenants/{tenant}/limits", json=CEILINGS))
    _read(operator.post(f"/tenants/{tenant}/budgets", json=BUDGET))
    return str(_read(operator.post(f"/tenants/{tenant}/keys", json={"name": "peers"}))["key"])


def _read(answer: httpx.Response) -> dict[str, Any]:
    if answer.is_error:
        raise PeerFailed(f"{answer.request.url}: {answer.status_code} {answer.text}")
    content: dict[str, Any] = answer.json()
    return content
