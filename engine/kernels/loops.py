"""What compiled loops are made of: how they are compiled, and run on torch's own threads.

Knows addresses, and the threads that share a loop. Knows nothing of what is computed.
"""

import ctypes
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from llvmlite import binding
from numba import types
from numba.extending import intrinsic

from engine.kernels import threads
from engine.kernels.vectors import LONG, Builder

Function = TypeVar("Function", bound=Callable[..., Any])

# Sums may be taken in any order, as in every GEMM; NaN and infinities keep their meaning.
_FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}
_FLOAT = types.CPointer(types.float32)
_INT = types.CPointer(types.int64)
# A thread's share of the columns begins with a line of the cache.
LINE = 16
# So far apart two threads' counters do not slow each other down.
COUNTER_BYTES = 64

_runtime = threads.find_runtime()
if _runtime is None:
    raise ImportError("torch's threads cannot be reached here")
for _symbol in ("GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads"):
    binding.add_symbol(_symbol, threads.address_of(_runtime, _symbol))
barrier: Any = types.ExternalFunction("GOMP_barrier", types.void())
thread_index: Any = types.ExternalFunction("omp_get_thread_num", types.int32())
thread_count: Any = types.ExternalFunction("omp_get_num_threads", types.int32())
_parallel = _runtime.GOMP_parallel
_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
_parallel.restype = None


def cache_folder(sources: Path) -> Path:
    """Where loops are kept that were compiled from the files of a folder, as these are now.

    Numba sees when a loop's own file changes, and not when one changes whose functions it inlines.
    """
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(sources.glob("*.py")):
        digest.update(file.read_bytes())
    if numba.config.CACHE_DIR:
        home = Path(numba.config.CACHE_DIR)
    elif os.access(sources, os.W_OK):
        home = sources / "__pycache__"
    else:
        home = Path.home() / ".cache" / "manylora" / "loops"
    return home / digest.hexdigest()


numba.config.CACHE_DIR = str(cache_folder(Path(__file__).parent))


def _compile(compiler: Any, function: Callable[..., Any], *, is_exact: bool = False) -> Any:
    options = {"fastmath": set() if is_exact else _FAST_MATH, "error_model": "numpy"}
    try:
        return compiler(cache=True, **options)(function)
    except RuntimeError:
        # No folder can be written to: it is compiled anew at each start, in seconds.
        return compiler(cache=False, **options)(function)


def inlined(function: Function) -> Function:
    compiled: Function = _compile(numba.njit, function)
    return compiled


def exact(function: Function) -> Function:
    """As `inlined`, but what is written is computed just so, in that order."""
    compiled: Function = _compile(numba.njit, function, is_exact=True)
    return compiled


def loop(function: Callable[[Any], None], call: np.dtype[np.void]) -> Any:
    """`function` as threads call it, all with the address of the same `call`."""
    signature = types.void(types.CPointer(numba.from_dtype(call)))
    return _compile(functools.partial(numba.cfunc, signature), function)


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def floats(_: Any, address: Any) -> Any:
    """A pointer to the float32 at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(_FLOAT))

    return _FLOAT(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def ints(_: Any, address: Any) -> Any:
    """A pointer to the int64 at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(_INT))

    return _INT(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def next_of(_: Any, counter: Any) -> Any:
    """The int64 at an address, which is one larger from now on: no two threads get the same."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], LONG.as_pointer())
        return builder.atomic_rmw("add", place, LONG(1), "monotonic")

    return types.int64(types.int64), generate


def call_at(call: np.dtype[np.void]) -> Any:
    """For loops: the `call` at an address, as `loop` hands it on."""
    pointer = types.CPointer(numba.from_dtype(call))

    @intrinsic  # type: ignore[untyped-decorator]  # numba has no types
    def at(_: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.int64), generate

    return at


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def _fetch(_: Any, address: Any) -> Any:
    """Have the line at an address brought into the cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        Builder(builder).prefetch(arguments[0], LONG(0))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@inlined
def fetch_rows(address: Any, stride: Any, num_rows: Any, width: Any) -> None:
    """Bring rows of `width` floats into the cache, each `stride` floats behind the one before."""
    for row in range(num_rows):
        for i in range(0, width, LINE):
            _fetch(address + 4 * (row * stride + i))


def run(loop: Any, address: int) -> None:
    """Once on each thread, with the call at `address`."""
    _parallel(loop.address, address, torch.get_num_threads(), 0)
