import subprocess
import sys

import pytest

START = """
import importlib, sys
from engine.lean_start import lean_imports

with lean_imports():
    from engine import process

    importlib.import_module("transformers.generation.utils")
import torch
"""
UNUSED = {"accelerate", "sympy", "torch._inductor", "torch.distributed.tensor", "triton"}


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", START + program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_engine_imports_nothing_that_trains_shards_or_compiles() -> None:
    assert UNUSED.isdisjoint(run("print(*sys.modules)").split())


def test_the_files_of_all_models_are_read_once() -> None:
    found = run(
        "from transformers.utils import import_utils as them\n"
        "print(*them.create_import_structure_from_path.cache_info()[:2])"
    )
    hits, misses = map(int, found.split())
    # The second time none but the folder that holds the models', under another name.
    assert hits > 200
    assert misses <= hits + 10


@pytest.mark.parametrize(
    "use",
    [
        "torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2))",
        "from torch._dynamo.utils import counters",
        "from transformers.masking_utils import TransformGetItemToIndex as T; T().__enter__()",
    ],
)
def test_whoever_asks_for_the_compiler_gets_it(use: str) -> None:
    assert run(f"{use}; print(torch._dynamo.convert_frame.__name__)") == (
        "torch._dynamo.convert_frame\n"
    )


def test_what_was_hidden_is_there_afterwards() -> None:
    assert run("print(torch.distributed.is_available(), 'accelerate' in sys.modules)") == (
        "True False\n"
    )
