"""Processes that live to be killed: `python -m tests.crash.nursery gateway|words|model`.

Imports what such a process needs, once, and forks one life of it for each line on standard input:
its environment and its arguments. A life is a process like any other; what SIGKILL leaves of it is
what it wrote. Says the pid of each life and how it ended. Dies with its parent, its lives with it.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

PR_SET_PDEATHSIG = 1
# Each has `main`, which returns an exit status.
MODULES = {
    "gateway": "gateway.process",
    "words": "tests.crash.traced_words",
    "model": "tests.crash.traced_model",
}


def main() -> None:
    die_with_parent()
    module = importlib.import_module(MODULES[sys.argv[1]])
    say("born")
    for line in sys.stdin:
        life = json.loads(line)
        pid = os.fork()
        if pid == 0:
            live(module, life)
        say(f"lives {pid}")
        _, status = os.waitpid(pid, 0)
        say(f"ended {os.waitstatus_to_exitcode(status)}")


def live(module: Any, life: dict[str, Any]) -> None:
    die_with_parent()
    os.dup2(os.open(life["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(life["environment"])
    sys.argv[1:] = life["arguments"]
    status: Any = os.EX_SOFTWARE
    try:
        status = module.main()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    main()
