"""What has to be done by the clock: meter storage, open and close months, forget what expired.

Every gateway does it; rows are locked where two would do the same, and the second finds it done.
Decides nothing: the rules are with their nouns.
"""

import asyncio
import datetime
import logging

from gateway.background import Background
from gateway.billing.periods import advance
from gateway.database import Database
from gateway.idempotency import forget_answers
from gateway.privacy import forget_contents

logger = logging.getLogger(__name__)

ROUND_S = 600.0


class Bookkeeper(Background):
    """Runs the rounds for as long as it is entered."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def _run_forever(self) -> None:
        while True:
            try:
                await keep_books(self._database, now=datetime.datetime.now(datetime.UTC))
            except Exception:
                logger.warning("bookkeeping_failed", exc_info=True)
            await asyncio.sleep(ROUND_S)


async def keep_books(database: Database, *, now: datetime.datetime) -> None:
    """One round."""
    await advance(database, now=now)
    await forget_answers(database)
    await forget_contents(database)
