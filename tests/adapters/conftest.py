"""What every test of adapters may ask for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from adapters.validate import BaseShape
from tests.adapters.tiny_adapters import BASE, Saved, save_random, tiny_llama

# A shared machine makes any single example slow at times.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def base_shape() -> BaseShape:
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in tiny_llama().named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    return BaseShape(base_model=BASE, modules=linears)


@pytest.fixture
def save_adapter(tmp_path: Path) -> Callable[..., Saved]:
    """Return a function that saves a new random adapter with PEFT."""
    folders = (tmp_path / f"adapter-{number}" for number in range(100))

    def save(**options: Any) -> Saved:
        return save_random(next(folders), **options)

    return save
