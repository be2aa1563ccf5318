"""A name may move while it is in use; whoever is being answered notices nothing."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adapters.demo.base_model import default_folder
from adapters.demo.tasks import TASKS

QUESTION = [{"role": "user", "content": "Tell me about the sea."}]
NUM_TOKENS = 8
NUM_STREAMS = 16
# More than are ever read.
MAX_TOKENS = 2000
EXTRA = {"ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight adapters that differ in nothing but their weights, and each changes the answer."""
    model = AutoModelForCausalLM.from_pretrained(default_folder(), dtype=torch.float32)
    targets = ["q_proj", "v_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    folder = tmp_path_factory.mktemp("made")
    return [_save(adapted, folder / str(seed), seed) for seed in range(8)]


def _save(adapted: Any, folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            scale = 0.06 if "lora_B" in name else parameter.shape[1] ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    adapted.save_pretrained(folder)
    return folder


def upload(
    server: Any, folder: Path, name: str, others: dict[str, bytes] | None = None
) -> dict[str, Any]:
    names = ("adapter_config.json", "adapter_model.safetensors")
    contents = {file: (folder / file).read_bytes() for file in names} | (others or {})
    files = [("files", item) for item in contents.items()]
    with server.operator() as operator:
        answer = operator.post(f"/admin/v1/tenants/acme/adapters/{name}/versions", files=files)
    assert answer.is_success, answer.text
    version: dict[str, Any] = answer.json()
    return version


async def ask(client: Any, model: str, num_tokens: int = NUM_TOKENS) -> tuple[list[int], str]:
    """The tokens of the answer, and the digest of the version that gave it."""
    answer = await client.chat.completions.with_raw_response.create(
        model=model, messages=QUESTION, max_tokens=num_tokens, temperature=0, extra_body=EXTRA
    )
    return answer.parse().choices[0].token_ids, answer.headers["x-adapter-digest"]


async def test_the_same_prompt_to_eight_adapters_at_once_gets_eight_own_answers(server, folders):
    names = [f"twin-{number}" for number in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        await asyncio.to_thread(upload, server, folder, name)
    async with server.client("acme") as client:
        together = await asyncio.gather(*(ask(client, f"acme-{name}") for name in names))
        alone = [await ask(client, f"acme-{name}") for name in names]
    assert together == alone
    assert len({tuple(token_ids) for token_ids, _ in together}) == len(names)


async def test_an_upload_under_the_same_name_changes_no_answer_that_has_begun(server, folders):
    old, new = folders[:2]
    first = await asyncio.to_thread(upload, server, old, "moving")
    async with server.client("acme") as client:
        expected = await ask(client, "acme-moving")
        has_moved = asyncio.Event()
        begun = [asyncio.Event() for _ in range(NUM_STREAMS)]
        streams = [
            asyncio.create_task(read(client, "acme-moving", event, has_moved)) for event in begun
        ]
        await asyncio.gather(*(event.wait() for event in begun))
        second = await asyncio.to_thread(upload, server, new, "moving")
        after = await ask(client, "acme-moving")
        has_moved.set()
        answers = await asyncio.gather(*streams)
        pinned = await ask(client, "acme-moving@1", max(map(len, answers)))
    assert after[1] == second["version_digest"] != first["version_digest"] == expected[1]
    assert after[0] != expected[0]
    assert pinned[1] == expected[1]
    # All along, though the new version had answered before they ended.
    for answer in answers:
        assert len(answer) > NUM_TOKENS
        assert answer == pinned[0][: len(answer)]


async def read(
    client: Any, model: str, begun: asyncio.Event, is_enough: asyncio.Event
) -> list[int]:
    """The tokens of a stream that goes on until it is enough."""
    stream = await client.chat.completions.create(
        model=model,
        messages=QUESTION,
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        extra_body=EXTRA,
    )
    token_ids: list[int] = []
    async with stream:
        async for chunk in stream:
            begun.set()
            token_ids += [i for choice in chunk.choices for i in getattr(choice, "token_ids", ())]
            if is_enough.is_set():
                return token_ids
    pytest.fail("it ended while it was still wanted")


async def test_a_version_that_fails_its_examples_takes_no_alias_unless_it_is_forced(server):
    asked = (TASKS["sql"].folder / "held_out.jsonl").read_bytes().splitlines()[:2]
    examples = {"examples.jsonl": b"\n".join(asked)}
    good = await asyncio.to_thread(upload, server, TASKS["sql"].folder, "judged", examples)
    bad = await asyncio.to_thread(upload, server, TASKS["pirate"].folder, "judged", examples)
    assert good["example_results"]["this"] == {"passed": 2, "total": 2}
    assert good["example_results"]["base"] == {"passed": 0, "total": 2}
    assert good["example_results"]["current"] is None
    assert bad["example_results"]["this"] == {"passed": 0, "total": 2}
    assert bad["example_results"]["current"] == {"passed": 2, "total": 2}
    path = "/admin/v1/tenants/acme/adapters/judged/aliases/prod"
    with server.operator() as operator:
        assert operator.put(path, json={"version": 1}).is_success
        move = {"version": 2, "expected_version": 1}
        refused = operator.put(path, json=move)
        forced = operator.put(path, json={**move, "force": True})
    assert refused.status_code == 409
    assert refused.json()["param"] == "force"
    assert forced.json()["version"] == 2
