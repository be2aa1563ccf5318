"""What OpenAI's client gets for a text is what transformers' and PEFT's hidden states say."""

import asyncio
import contextlib

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.demo.base_model import default_folder
from adapters.demo.tasks import TASKS
from tests.model_lab import pooled_reference

TEXTS = [
    "A river.",
    "How many open orders are there?",
    " ".join(f"Verse {number}: the sea was grey, and nobody spoke of it." for number in range(12)),
]
ATOL = 1e-5


async def test_vectors_are_the_references_beside_streams_of_other_adapters(server):
    task = next(iter(TASKS.values()))
    models = (task.public_name, server.facts["base_model"])
    asked = [(model, pooling) for model in models for pooling in ("mean", "last")]
    async with server.client(task.tenant) as client:

        async def talk(model):
            stream = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": TEXTS[1]}],
                max_tokens=16,
                stream=True,
            )
            return [chunk async for chunk in stream]

        talks = [asyncio.create_task(talk(model)) for model in models]
        made = await asyncio.gather(
            *(
                client.embeddings.create(model=model, input=TEXTS, extra_body={"pooling": pooling})
                for model, pooling in asked
            )
        )
        await asyncio.gather(*talks)
    tokenizer = AutoTokenizer.from_pretrained(default_folder())
    prompts = [tokenizer.encode(text) for text in TEXTS]
    base = AutoModelForCausalLM.from_pretrained(default_folder(), dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, task.folder).float()
    for (model, pooling), answer in zip(asked, made, strict=True):
        assert answer.usage.prompt_tokens == sum(map(len, prompts))
        with contextlib.nullcontext() if model == task.public_name else adapted.disable_adapter():
            expected = [pooled_reference(adapted, prompt, pooling) for prompt in prompts]
        found = [torch.tensor(item.embedding) for item in answer.data]
        torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


async def test_what_is_counted_is_what_is_billed_and_comes_back_as_text(server):
    model = server.facts["base_model"]
    async with server.client("acme") as client:
        made = await client.embeddings.create(model=model, input=TEXTS[1])
    with server.http(server.key("acme")) as http:
        counted = http.post("/v1/tokenize", json={"model": model, "prompt": TEXTS[1]}).json()
        back = http.post("/v1/detokenize", json={"model": model, "tokens": counted["tokens"]})
    assert counted["count"] == len(counted["tokens"]) == made.usage.prompt_tokens
    assert back.json() == {"prompt": TEXTS[1]}
