"""Which code a result comes from."""

import subprocess


def commit() -> str:
    """As git names it; `-dirty` where files differ from it."""
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"
