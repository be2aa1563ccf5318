"""What each file of the package may bring into a process."""

import subprocess
import sys

import pytest

TORCH_FREE = ["archive", "cache", "errors", "manifest", "push", "store", "text_bundle", "validate"]


def modules_after_importing(*names: str) -> set[str]:
    script = f"import sys, {', '.join(names)}; print(*sys.modules)"
    command = [sys.executable, "-c", script]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_a_gateway_can_import_all_but_the_weights_without_torch() -> None:
    loaded = modules_after_importing(*(f"adapters.{name}" for name in TORCH_FREE))
    assert loaded.isdisjoint({"torch", "transformers", "peft", "safetensors"})


@pytest.mark.parametrize("name", ["validate", "weights", "text_bundle"])
def test_a_bare_machine_can_import_what_an_engine_core_needs(name: str) -> None:
    assert modules_after_importing(f"adapters.{name}").isdisjoint({"obstore", "httpx"})


def test_a_trainer_needs_no_more_of_a_server_than_its_address() -> None:
    loaded = modules_after_importing("adapters.training")
    assert loaded.isdisjoint({"obstore", "sqlalchemy", "litestar", "gateway", "engine"})
