"""Import what an engine stands on without what no engine uses, and without looking for garbage.

transformers imports with its models what trains them, shards them and compiles them. Here it is
told of a machine that has none of this. Knows names of modules, and nothing of what they are for.
"""

import functools
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

Marked = TypeVar("Marked", bound=Callable[..., Any])

COMPILER = "torch._dynamo"
# The one part of the compiler that is imported by itself, and what is taken of it.
WRAPPED_PART = f"{COMPILER}._trace_wrapped_higher_order_op"
WRAPPED_NAME = "TransformGetItemToIndex"
# What finds the names of transformers' models in their files.
MODELS_READER = "create_import_structure_from_path"


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Nothing that is imported is garbage: what there is at the end is never looked at again.

    Looking took 1.1 of the 5.6 s of CPU time that an engine's imports came to.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def lean_imports() -> Iterator[None]:
    """Have transformers imported inside, which remembers what it found.

    2.5 s of CPU time instead of the 4.5 s that are left without looking for garbage. A torch that
    is built for GPUs is imported as it is.
    """
    with without_garbage_collection():
        # Not at the top: the imports are what the block is about.
        import torch

        if torch.version.cuda is not None or torch.version.hip is not None:
            yield
            return
        _stand_in_for_compiler(torch)
        with _hidden("accelerate"), _undistributed(torch.distributed):
            _import_transformers()
            yield


def _import_transformers() -> None:
    """Let it remember what it reads in the files of all models, for it reads them again: 0.2 s.

    Left to itself it forgets all but 128 folders, and each reading goes through more than 500.
    """
    bounded = functools.lru_cache

    def unbounded(maxsize: Any = 128, typed: bool = False) -> Any:
        is_reader = getattr(maxsize, "__name__", "") == MODELS_READER
        return functools.cache(maxsize) if is_reader else bounded(maxsize, typed)

    functools.lru_cache = unbounded
    try:
        importlib.import_module("transformers")
    finally:
        functools.lru_cache = bounded


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Let a package that was not imported yet be as good as absent."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # Python's word for "not there"
    try:
        yield
    finally:
        del sys.modules[package]


@contextmanager
def _undistributed(distributed: Any) -> Iterator[None]:
    """Let torch be one that was built without its distributed package, as it is for macOS."""
    is_available = distributed.is_available
    distributed.is_available = lambda: False
    try:
        yield
    finally:
        distributed.is_available = is_available


def _stand_in_for_compiler(torch: Any) -> None:
    """Take the marks that are put on functions for torch's compiler, in its place.

    They change nothing for code that is never compiled. Whoever wants anything else of it gets the
    compiler itself, then and from then on.
    """
    if COMPILER not in sys.modules:
        part = ModuleType(WRAPPED_PART)
        setattr(part, WRAPPED_NAME, _wrapped)
        torch._dynamo = _Compiler(COMPILER)
        sys.modules |= {COMPILER: torch._dynamo, WRAPPED_PART: part}


def _wrapped(*arguments: Any) -> Any:
    """The compiler's own, imported when first it is made."""
    _make_room_for_compiler()
    return getattr(importlib.import_module(WRAPPED_PART), WRAPPED_NAME)(*arguments)


def _make_room_for_compiler() -> None:
    if isinstance(sys.modules.get(COMPILER), _Compiler):
        del sys.modules[COMPILER], sys.modules[WRAPPED_PART]
        # torch itself imports what it is asked for and does not have.
        del sys.modules["torch"]._dynamo


def _unmarked(function: Marked) -> Marked:
    return function


class _Compiler(ModuleType):
    """Stands where torch's compiler is looked for."""

    allow_in_graph = assume_constant_result = staticmethod(_unmarked)

    @staticmethod
    def disable(function: Any = None, *_: Any, **__: Any) -> Any:
        """A mark, or what puts it."""
        return _unmarked if function is None else function

    def __getattr__(self, name: str) -> Any:
        # A package's path is what is asked for before its parts are.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        _make_room_for_compiler()
        return getattr(importlib.import_module(COMPILER), name)
