"""The engine as it is shipped, on a real model, traced: `main` serves one life of it."""

import sys
from pathlib import Path
from typing import Any

import engine.process as shipped
from adapters.cache import DiskCache
from engine.config import EngineConfig
from engine.core import EngineCore
from tests.crash.trace import traced


def main() -> int:
    trace, *flags = sys.argv[1:]
    load = shipped.load

    def load_traced(config: EngineConfig, source: DiskCache, **others: Any) -> EngineCore:
        core = load(config, source, **others)
        return traced(core, Path(trace))  # type: ignore[no-any-return]  # the same

    shipped.load = load_traced
    return shipped.main(flags)
