"""A process that is started again and again under one name, and told to end in the end.

Knows nothing of what the process does.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Mapping

# A child that died sooner than this after its start is not worth starting at once again.
SHORT_LIFE_S = 10.0
MAX_SHORT_LIVES = 3
MAX_PAUSE_S = 60.0
# Exit statuses of children whose settings are wrong: another start would end the same.
HOPELESS = (2, os.EX_CONFIG)
# Time to finish streams and to settle before a child is killed.
STOP_GRACE_S = 20.0


class CannotServe(Exception):
    """The processes cannot be started here; the message says why and what to do."""


class Child:
    """Mutable: the process, and whether it is wanted still.

    One that is not `is_vital` is started again however often it dies, after longer and longer
    pauses; of one that is, the third death in a row right after its start is the end. One that is
    on trial is not started again at all.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: Mapping[str, str],
        *,
        say: Callable[[str], None],
        is_ending: Callable[[], bool],
        is_vital: bool = True,
        is_on_trial: bool = False,
    ) -> None:
        self.name = name
        self.is_vital = is_vital
        self.is_on_trial = is_on_trial
        self._command = command
        self._environment = {**os.environ, **environment}
        self._say = say
        self._is_ending = is_ending
        self._is_unwanted = False
        self._process: asyncio.subprocess.Process | None = None

    async def keep(self) -> None:
        """Run it until it is stopped, or everything ends. Raises CannotServe where that is vain."""
        num_short_lives, has_lived = 0, False
        while not self._is_over:
            started_at = time.monotonic()
            self._say(f"{self.name}: starting")
            code = await self._run()
            if self._is_over:
                return
            is_short = time.monotonic() - started_at < SHORT_LIFE_S
            has_lived = has_lived or not is_short
            if self.is_on_trial or (code in HOPELESS and not has_lived):
                raise CannotServe(f"the {self.name} cannot start; its last lines above say why")
            num_short_lives = num_short_lives + 1 if is_short else 0
            if num_short_lives >= MAX_SHORT_LIVES and self.is_vital:
                raise CannotServe(
                    f"the {self.name} ended {num_short_lives} times right after its start"
                    f" (last exit status {code}); its last lines above say why"
                )
            self._say(f"{self.name}: died with exit status {code}; starting it again")
            await asyncio.sleep(min(num_short_lives, MAX_PAUSE_S))

    async def stop(self) -> None:
        """End the process: politely at first, and for good after a while."""
        self._is_unwanted = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_GRACE_S)
            except TimeoutError:
                process.kill()
                await process.wait()

    @property
    def _is_over(self) -> bool:
        return self._is_unwanted or self._is_ending()

    async def _run(self) -> int:
        """Start the process and return its exit status."""
        # A session of its own: Ctrl-C reaches the supervisor alone, which ends things in order.
        self._process = await asyncio.create_subprocess_exec(
            *self._command, env=self._environment, start_new_session=True
        )
        return await self._process.wait()
