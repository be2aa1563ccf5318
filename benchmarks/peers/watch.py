"""What processes use, and what the rest of the machine does meanwhile. Linux's /proc alone.

Knows nothing of servers or loads.
"""

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
# Of a line of /proc/stat: idle and waiting for disks; the last two are in user and nice already.
IDLE_FIELDS, COUNTED_FIELDS = (3, 4), 8


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds since some moment: of the wall, of all cores at work, of the processes watched."""

    wall_s: float
    busy_s: float
    own_s: float


@dataclass(frozen=True, slots=True)
class Use:
    """Shares of all cores, between two readings of the clock."""

    own: float
    # Whatever else ran, other machines' on the same host included.
    foreign: float


def read_clock(*pids: int) -> Clock:
    """`pids` are roots of the processes that are to count as our own, this one aside."""
    ticks = os.sysconf("SC_CLK_TCK")
    fields = [int(field) for field in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:]]
    busy = sum(fields[:COUNTED_FIELDS]) - sum(fields[place] for place in IDLE_FIELDS)
    own = sum(cpu_s(pid) for pid in pids) + time.process_time()
    return Clock(time.monotonic(), busy / ticks, own)


def between(before: Clock, after: Clock) -> Use:
    cores_s = (after.wall_s - before.wall_s) * (os.cpu_count() or 1)
    own_s = after.own_s - before.own_s
    busy_s = after.busy_s - before.busy_s
    return Use(own=own_s / cores_s, foreign=max(busy_s - own_s, 0.0) / cores_s)


def cpu_s(pid: int) -> float:
    """User and system time of a process, its living descendants and all their dead children."""
    ticks = os.sysconf("SC_CLK_TCK")
    used = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            used += sum(map(int, _stat(each)[11:15]))
    return used / ticks


def memory_bytes(pid: int) -> int:
    """What a process and its descendants hold; pages that some share count once in all."""
    found = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            for line in (PROC / str(each) / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    found += int(line.split()[1]) * 1024
    return found


def tree(pid: int) -> Iterator[int]:
    """A process and those that come from it."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                children[int(_stat(int(entry.name))[1])].append(int(entry.name))
    waiting = [pid]
    while waiting:
        each = waiting.pop()
        yield each
        waiting += children[each]


def _stat(pid: int) -> list[str]:
    """The fields after the name, which may hold blanks: the state comes first."""
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
