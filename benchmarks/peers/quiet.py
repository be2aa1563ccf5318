"""Keep others off a machine that is shared, a while at a time.

Knows nothing of what is measured, nor how others are kept off: a command does that, for as long as
what it was given to run runs.
"""

import os
import shlex
import signal
import subprocess
import time


class Quiet:
    """Mutable: has the machine to itself from `begin` to `end`, where there is such a command."""

    def __init__(self, command: str | None, *, most_s: float) -> None:
        self._command = None if command is None else shlex.split(command)
        self._most_s = most_s
        self._holder: subprocess.Popen[bytes] | None = None
        self._since_s = 0.0

    def begin(self) -> None:
        """Goes on where it has not been long; otherwise others may have their turn before."""
        if self._command is None:
            return
        if self._holder is not None and time.monotonic() - self._since_s < self._most_s:
            return
        self.end()
        # It says that it has begun, and ends when nobody can talk to it any more.
        holder = subprocess.Popen(
            [*self._command, "sh", "-c", "echo; read end"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert holder.stdout is not None
        try:
            holder.stdout.readline()
        except BaseException:
            # While it waits it listens to nobody.
            os.killpg(holder.pid, signal.SIGTERM)
            raise
        self._holder, self._since_s = holder, time.monotonic()

    def end(self) -> None:
        if self._holder is not None:
            # Closes the pipes, and waits.
            self._holder.communicate()
            self._holder = None
