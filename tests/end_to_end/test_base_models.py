"""Several base models in one installation: real engines, which come and go while all runs."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.conftest import (
    START_PATIENCE_S,
    descendants,
    free_port,
    remove,
    wait_until_gone,
)
from tests.model_lab import save_speaking_model

PATIENCE_S = 120


@dataclass(frozen=True)
class Models:
    """Folders of small models that share a tokenizer and answer differently."""

    alpha: Path
    beta: Path
    # Below it lies another revision of beta.
    later: Path


@dataclass(frozen=True)
class House:
    """A running installation."""

    process: subprocess.Popen[bytes]
    data_dir: Path
    log: Path
    url: str

    def operator(self) -> httpx.Client:
        return self._client((self.data_dir / "operator.key").read_text().strip())

    def tenant(self) -> httpx.Client:
        """With a new key of the tenant acme."""
        with self.operator() as operator:
            operator.post("/admin/v1/tenants", json={"slug": "acme"})
            made = operator.post("/admin/v1/tenants/acme/keys", json={"name": "k"})
        return self._client(made.json()["key"])

    def engines(self) -> set[int]:
        """The engine processes, by pid."""
        return {
            pid
            for pid in descendants(self.process.pid)
            if b"-m\0engine\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
        }

    def _client(self, key: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE_S, trust_env=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    later = folder / "later"
    return Models(
        save_speaking_model(folder / "alpha", seed=0),
        save_speaking_model(folder / "beta", seed=1),
        save_speaking_model(later / "beta-2", seed=2, max_position_embeddings=512).parent,
    )


@contextlib.contextmanager
def serving(data_dir: Path, models: Models) -> Iterator[House]:
    port, log = free_port(), data_dir.with_suffix(".log")
    words = [
        *(sys.executable, "-m", "gateway.cli", "serve", "--port", str(port)),
        *("--model", f"alpha={models.alpha}", "--model", f"beta={models.beta}"),
        *("--model-folder", str(models.later), "--memory-mib", "64", "--max-num-seqs", "8"),
        *("--data-dir", str(data_dir)),
    ]
    begun = log.stat().st_size if log.exists() else 0
    with log.open("ab") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output)
    try:
        wait(lambda: b"ready: http" in log.read_bytes()[begun:], process, log)
        yield House(process, data_dir, log, f"http://127.0.0.1:{port}")
    finally:
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=60)
    assert status == 0, log.read_text()[-5000:]


def wait(is_true: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_PATIENCE_S
    while not is_true():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it did not come to that:\n{log.read_text()[-5000:]}")
        time.sleep(0.1)


def answer_of(client: httpx.Client, model: str) -> str:
    body = {"model": model, "prompt": "The sea", "max_tokens": 12, "temperature": 0}
    answer = client.post("/v1/completions", json={**body, "ignore_eos": True})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_base_models_run_side_by_side_are_swapped_and_retired_and_outlive_a_restart(
    tmp_path: Path, models: Models
) -> None:
    data_dir = tmp_path / "data"
    try:
        with serving(data_dir, models) as house, house.tenant() as client:
            before = {model: answer_of(client, model) for model in ("alpha", "beta")}
            assert before["alpha"] != before["beta"]
            after = _swap(house, client)
            assert after != before["beta"]
            _kill_one_and_ask_the_other(house, client, before["alpha"], after)
        with serving(data_dir, models) as house, house.tenant() as client:
            assert answer_of(client, "beta") == after
            assert answer_of(client, "alpha") == before["alpha"]
            _retire_alpha(house, client)
    finally:
        remove(data_dir)


def _swap(house: House, client: httpx.Client) -> str:
    old = house.engines()
    assert len(old) == 2
    with house.operator() as operator:
        answer = operator.post("/admin/v1/base-models/beta/swap", json={"model": "beta-2"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["revision"] == 2
        refused = operator.post("/admin/v1/base-models/beta/swap", json={"model": "../beta"})
        assert refused.status_code == 400
    wait(lambda: len(house.engines()) == 2, house.process, house.log)
    assert len(old & house.engines()) == 1
    return answer_of(client, "beta")


def _kill_one_and_ask_the_other(house: House, client: httpx.Client, alpha: str, beta: str) -> None:
    [victim] = (
        pid
        for pid in house.engines()
        if b"--served-name\0alpha\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(victim, signal.SIGKILL)
    assert wait_until_gone({victim}) == set()
    assert answer_of(client, "beta") == beta
    body = {"model": "alpha", "prompt": "The sea", "max_tokens": 1}
    wait(lambda: client.post("/v1/completions", json=body).is_success, house.process, house.log)
    assert answer_of(client, "alpha") == alpha


def _retire_alpha(house: House, client: httpx.Client) -> None:
    with house.operator() as operator:
        assert operator.post("/admin/v1/base-models/alpha/retire").status_code == 200
    refused = client.post("/v1/completions", json={"model": "alpha", "prompt": "The sea"})
    assert refused.status_code == 404
    assert "was retired" in refused.text
    wait(lambda: len(house.engines()) == 1, house.process, house.log)
    assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["beta"]
