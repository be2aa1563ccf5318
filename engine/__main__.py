"""`python -m engine`: imports the engine's process with as little as it needs, and runs it."""

import gc
import importlib
import sys

from engine.lean_start import lean_imports


def main() -> int:
    with lean_imports():
        # Not at the top: this is what the block is for.
        from engine import process

        # What transformers imports with the first model.
        importlib.import_module("transformers.generation.utils")
    try:
        return process.main()
    finally:
        # Libraries that count what is left at the end find nothing.
        gc.unfreeze()


if __name__ == "__main__":
    sys.exit(main())
