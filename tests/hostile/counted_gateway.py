"""A gateway worker that says how many tasks it has: `python -m tests.hostile.counted_gateway`.

It is the gateway, with a handler for SIGUSR1 that writes the number to the file `$TASKS_FILE`.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

from gateway.process import main


def count(*_: object) -> None:
    told = Path(os.environ["TASKS_FILE"])
    # Whole at once: somebody is waiting for it.
    draft = told.with_suffix(".draft")
    draft.write_text(str(len(asyncio.all_tasks())))
    draft.replace(told)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, count)
    sys.exit(main())
