"""One gateway of several that hammer a tenant: asks as fast as it can and counts the answers.

Started by a test as a process of its own, with a JSON object of what to do on standard input.
"""

import asyncio
import json
import sys
import time
import uuid
from collections import Counter
from typing import Any

import msgspec

from gateway.auth import Principal
from gateway.database import Database
from gateway.errors import LimitReached
from gateway.limits import admit, extend
from gateway.registry import Target
from gateway.tables import new_id

NUM_TASKS = 4


async def hammer(told: dict[str, Any]) -> Counter[str]:
    """Ask until the time is up; return how often each answer came."""
    database = Database(app_url=told["app_url"], worker_url=told["worker_url"], pool_size=NUM_TASKS)
    principal = msgspec.convert(told["principal"], Principal)
    target = msgspec.convert(told["target"], Target)
    instance_id = uuid.UUID(told["instance_id"])
    answers = Counter[str]()

    async def ask_on_and_on(until: float) -> None:
        while time.time() < until:
            try:
                await admit(
                    database,
                    principal,
                    target,
                    request_id=new_id(),
                    endpoint="completions",
                    prompt_tokens=told["prompt_tokens"],
                    max_tokens=told["max_tokens"],
                    gateway_instance_id=instance_id,
                )
                answers["admitted"] += 1
            except LimitReached as error:
                answers[str((error.rule or {}).get("rule"))] += 1
                await asyncio.sleep(told["pause_s"])

    async def beat() -> None:
        while True:
            async with database.as_worker() as session:
                await extend(session, gateway_instance_id=instance_id, streams=[])
            await asyncio.sleep(1)

    beating = asyncio.create_task(beat())
    # Every process begins and ends at the same moment.
    await asyncio.sleep(max(told["begin_at"] - time.time(), 0))
    tasks = (ask_on_and_on(told["end_at"]) for _ in range(NUM_TASKS))
    await asyncio.gather(*tasks)
    beating.cancel()
    await asyncio.wait([beating])
    await database.close()
    return answers


if __name__ == "__main__":
    print(json.dumps(asyncio.run(hammer(json.load(sys.stdin)))))
