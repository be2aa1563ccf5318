"""A file of requests through OpenAI's client, answered by a real model in its own time."""

import asyncio
import json

from adapters.demo.tasks import TASKS

CHAT = "/v1/chat/completions"
PATIENCE_S = 300


async def test_a_batch_answers_what_the_route_answers_and_is_billed_as_a_batch(server):
    task = next(iter(TASKS.values()))
    bodies = {
        model: {
            "model": model,
            "messages": [{"role": "user", "content": "How many open orders are there?"}],
            "max_tokens": 12,
            "temperature": 0,
        }
        for model in (task.public_name, server.facts["base_model"])
    }
    lines = [
        {"custom_id": model, "method": "POST", "url": CHAT, "body": body}
        for model, body in bodies.items()
    ]
    spelled = b"\n".join(json.dumps(line).encode() for line in lines)
    async with server.client(task.tenant) as client:
        file = await client.files.create(file=("orders.jsonl", spelled), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )
        async with asyncio.timeout(PATIENCE_S):
            while batch.completed_at is None:
                await asyncio.sleep(0.2)
                batch = await client.batches.retrieve(batch.id)
        content = await client.files.content(batch.output_file_id)
        told = {each["custom_id"]: each for each in map(json.loads, content.text.splitlines())}
        assert set(told) == set(bodies)
        for model, body in bodies.items():
            answer = await client.chat.completions.create(**body)
            found = told[model]["response"]["body"]
            assert found["choices"][0]["message"]["content"] == answer.choices[0].message.content
            assert found["usage"]["completion_tokens"] == answer.usage.completion_tokens
    with server.http(server.key(task.tenant)) as http:
        report = http.get("/v1/usage", params={"group_by": "endpoint"}).json()
    assert "batch.chat.completions" in {row["endpoint"] for row in report["rows"]}
