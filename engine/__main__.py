"""`python -m engine`: imports the engine's process with as little as it needs, and runs it."""

import gc
import importlib
import os
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
    status = main()
    # All that was open is closed. To take the rest apart, object by object, takes 1.5 s.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
