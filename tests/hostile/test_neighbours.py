"""A hostile upload leaves its neighbours alone: their streams go on, and say what they should.

How long the neighbours wait for each token is measured by `python -m benchmarks.hostile`.
"""

import asyncio
import json
from pathlib import Path

import httpx

from gateway.database import Database
from tests.conftest import Home
from tests.engine.echo_engine import INFO
from tests.gateway.admin_plane import adapter_files
from tests.gateway.whole_gateway import Gateway, chat, whole_gateway
from tests.text_bombs import BOMBS, Bomb, small_bundle

BASE = small_bundle()
# Some of each kind, and none that is refused for its size alone.
SOME_BOMBS = [bomb for bomb in BOMBS if bomb.code != "text_file_too_large"][::22]
NUM_STREAMS = 4


async def test_streams_of_others_go_on_while_bombs_are_uploaded(
    home: Home, database: Database, tmp_path: Path
) -> None:
    async with whole_gateway(
        home, database, tmp_path, bundle=BASE, max_upload_bytes=8 << 20
    ) as gateway:
        made = await gateway.operator.post("/admin/v1/tenants", json={"slug": "globex"})
        assert made.is_success
        expected = await streamed(gateway)
        assert "the quick brown fox" in expected
        async with asyncio.TaskGroup() as tasks:
            attack = tasks.create_task(upload_all(gateway, SOME_BOMBS))
            neighbours = [
                tasks.create_task(stream_until_over(gateway, attack)) for _ in range(NUM_STREAMS)
            ]
        assert attack.result() == [httpx.codes.UNPROCESSABLE_ENTITY] * len(SOME_BOMBS)
        answers = [answer for neighbour in neighbours for answer in neighbour.result()]
        assert len(answers) > NUM_STREAMS
        assert set(answers) == {expected}
        assert await gateway.differences() == []


async def upload_all(gateway: Gateway, bombs: list[Bomb]) -> list[int]:
    """Upload each as another tenant's adapter; what was answered."""
    good = adapter_files(modules=dict(INFO.base_shape.modules), target_modules=["up_proj"])
    answers = []
    for bomb in bombs:
        files = {**good, **bomb.files(BASE)}
        answer = await gateway.operator.post(
            "/admin/v1/tenants/globex/adapters/bomb/versions",
            files=[("files", (name, data)) for name, data in files.items()],
        )
        answers.append(answer.status_code)
    return answers


async def stream_until_over(gateway: Gateway, attack: asyncio.Task[list[int]]) -> list[str]:
    answers = []
    while not attack.done():
        answers.append(await streamed(gateway))
    return answers


async def streamed(gateway: Gateway) -> str:
    """One whole stream's text."""
    body = chat("the quick brown fox", max_tokens=100, stream=True)
    said = ""
    async with gateway.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == httpx.codes.OK
        async for line in answer.aiter_lines():
            data = line.removeprefix("data: ")
            if data != line and data != "[DONE]":
                chunk = json.loads(data)
                said += "".join(c["delta"].get("content") or "" for c in chunk["choices"])
    return said
