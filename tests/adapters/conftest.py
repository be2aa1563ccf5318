"""What every test of adapters may ask for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from adapters.validate import BaseShape
from tests.adapters.tiny_adapters import Saved, save_random, shape_of, tiny_llama

# A shared machine makes any single example slow at times.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def base_shape() -> BaseShape:
    return shape_of(tiny_llama())


@pytest.fixture
def save_adapter(tmp_path: Path) -> Callable[..., Saved]:
    """Return a function that saves a new random adapter with PEFT."""
    folders = (tmp_path / f"adapter-{number}" for number in range(100))

    def save(**options: Any) -> Saved:
        return save_random(next(folders), **options)

    return save
