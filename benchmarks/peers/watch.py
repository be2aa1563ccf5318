"""What processes use, and what the rest of the machine does meanwhile. Linux's /proc alone.

Knows nothing of servers or loads.
"""

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
# Of a line of /proc/stat: idle and waiting for disks; the last two are in user and nice already.
IDLE_FIELDS, COUNTED_FIELDS = (3, 4), 8


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds since some moment: of the wall, of all cores at work, of the programs watched."""

    wall_s: float
    busy_s: float
    programs_s: Mapping[str, float]

    @property
    def own_s(self) -> float:
        return sum(self.programs_s.values())


@dataclass(frozen=True, slots=True)
class Use:
    """Shares of all cores, between two readings of the clock."""

    own: float
    # Whatever else ran, other machines' on the same host included.
    foreign: float
    # Cores at work, by what ran on them: "client", and the peer's programs by their names
    cores: Mapping[str, float]


def read_clock(*pids: int) -> Clock:
    """`pids` are roots of the processes that are to count as our own, this one aside."""
    ticks = os.sysconf("SC_CLK_TCK")
    fields = [int(field) for field in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:]]
    busy = sum(fields[:COUNTED_FIELDS]) - sum(fields[place] for place in IDLE_FIELDS)
    programs_s = {"client": time.process_time()}
    for pid in pids:
        for name, used_s in cpu_s(pid).items():
            programs_s[name] = programs_s.get(name, 0.0) + used_s
    return Clock(time.monotonic(), busy / ticks, programs_s)


def between(before: Clock, after: Clock) -> Use:
    cores_s = (after.wall_s - before.wall_s) * (os.cpu_count() or 1)
    own_s = after.own_s - before.own_s
    busy_s = after.busy_s - before.busy_s
    wall_s = after.wall_s - before.wall_s
    cores = {
        name: round((end_s - before.programs_s.get(name, 0.0)) / wall_s, 3)
        for name, end_s in after.programs_s.items()
    }
    return Use(own=own_s / cores_s, foreign=max(busy_s - own_s, 0.0) / cores_s, cores=cores)


def cpu_s(pid: int) -> Mapping[str, float]:
    """User and system time of a process, its living descendants and all their dead children, by
    the programs that they run."""
    ticks = os.sysconf("SC_CLK_TCK")
    used: dict[str, float] = defaultdict(float)
    for each in tree(pid):
        with contextlib.suppress(OSError):
            used[_program(each)] += sum(map(int, _stat(each)[11:15])) / ticks
    return used


def _program(pid: int) -> str:
    """Python's module where it runs one, or the file that is executed."""
    words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    if "-m" in words[1:-1]:
        return words[words.index("-m", 1) + 1]
    # PostgreSQL's processes say behind a colon what each is for.
    return Path(words[0].partition(":")[0]).name


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
