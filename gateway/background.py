"""What a part does by itself, beside what it is asked to do: one task while the part is entered.

Knows when the task begins and ends. Knows nothing of what it does.
"""

import abc
import asyncio
import logging
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)


class Background(abc.ABC):
    """Mutable: a part with a task of its own, which runs while the part is used as a context.

    It is meant to run for ever: what ends it sooner is logged at once, and no other is begun.
    """

    _task: asyncio.Task[None] | None = None

    @abc.abstractmethod
    async def _run_forever(self) -> None:
        """What the task does until it is cancelled."""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._watch(), name=type(self).__name__)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._task is not None, "it was entered"
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        try:
            await self._run_forever()
        except Exception:
            logger.exception("background_task_failed", extra={"part": type(self).__name__})
