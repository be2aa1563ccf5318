"""The kernels for GPUs compile, for GPUs that are not there, and fit them."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

# What a program may have of shared memory: on Ampere's and Ada's small GPUs, and on Hopper.
SHARED_BYTES = {86: 99 * 1024, 90: 227 * 1024}


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """In a process of its own: here Triton interprets."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.gpu_compiler", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_weights_and_caches_of_an_8b_model_are_read_sixteen_bytes_at_once() -> None:
    kernels = compiled("8B")
    assert {kernel["kernel"] for kernel in kernels} == {
        *("_shrink", "_expand", "_write", "_attend", "_merge", "_norm", "_rotate", "_gate")
    }
    for kernel in kernels:
        widest = max(kernel["load_bytes"] + kernel["copy_bytes"])
        assert widest == 16, kernel
        assert kernel["shared_bytes"] <= SHARED_BYTES[86], kernel


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_configuration_compiles(arch: int, dtype: str) -> None:
    for kernel in compiled("--arch", str(arch), "--dtype", dtype):
        assert kernel["shared_bytes"] <= SHARED_BYTES[arch], kernel
