"""A gateway that looks, each millisecond of its CPU time, what it is doing.

    python -m benchmarks.sampled_gateway FILE

`python -m gateway`, with a timer of the kernel that counts CPU time only; stacks are written to
FILE at the end, one JSON object of "innermost;...;outermost" and how often. What C code takes is
told of the Python function that called it. Costs some percent, so nothing else is measured by it.
"""

import atexit
import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import greenlet

from gateway.process import main

INTERVAL_S = 0.001
MAX_DEPTH = 60


def watch(into: Path) -> None:
    stacks: Counter[str] = Counter()

    def look(_: int, frame: FrameType | None) -> None:
        stacks[";".join(_names(frame))] += 1

    def write() -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        into.write_text(json.dumps(stacks))

    signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, INTERVAL_S, INTERVAL_S)
    atexit.register(write)


def _names(frame: FrameType | None) -> Iterator[str]:
    """Innermost first; SQLAlchemy's greenlets go on in those that wait for them."""
    level = greenlet.getcurrent()
    for _ in range(MAX_DEPTH):
        if frame is None:
            if level.parent is None:
                return
            level = level.parent
            frame = level.gr_frame
            continue
        code = frame.f_code
        yield f"{code.co_filename}:{code.co_qualname}"
        frame = frame.f_back


if __name__ == "__main__":
    # Which ends a gateway for good, in the end: what is to be written is written before.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    watch(Path(sys.argv.pop(1)))
    sys.exit(main())
