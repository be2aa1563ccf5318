"""What tenants get is what their adapters say, to the token."""

import asyncio
import functools
import json
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.demo.base_model import default_folder
from adapters.demo.tasks import TASKS, Task, read_held_out
from tests.model_lab import following, num_ties

NUM_TOKENS = 64
CONCURRENCY = 32


@dataclass(frozen=True)
class Call:
    tenant: str
    model: str
    question: str
    task: Task | None


def calls(base_model: str) -> list[Call]:
    """Eight conversations: each adapter, and the base model four times between them."""
    found = []
    for task in TASKS.values():
        held_out = read_held_out(task)
        question = held_out[0].messages[0]["content"]
        found.append(Call(task.tenant, task.public_name, question, task))
        found.append(Call(task.tenant, base_model, held_out[1].messages[0]["content"], None))
    return found


async def test_streams_side_by_side_give_the_tokens_that_peft_gives_for_each_alone(server):
    wanted = calls(server.facts["base_model"])
    answers = await asyncio.gather(*(_stream(server, call) for call in wanted))
    reference = Reference()
    ties = sum(reference.compare(*pair) for pair in zip(wanted, answers, strict=True))
    print(f"{len(wanted)} streams of {NUM_TOKENS} tokens, {ties} ties")


async def _stream(server: Any, call: Call) -> list[int]:
    """The tokens of one answer."""
    async with server.client(call.tenant) as client:
        stream = await client.chat.completions.create(
            model=call.model,
            messages=[{"role": "user", "content": call.question}],
            max_tokens=NUM_TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        return [
            token_id
            async for chunk in stream
            for choice in chunk.choices
            for token_id in getattr(choice, "token_ids", ())
        ]


class Reference:
    """PEFT and transformers, one conversation at a time, fp32."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(default_folder())
        first, *others = TASKS.values()
        base = AutoModelForCausalLM.from_pretrained(default_folder(), dtype=torch.float32)
        model: Any = PeftModel.from_pretrained(base, first.folder, adapter_name=first.name)
        for task in others:
            model.load_adapter(task.folder, adapter_name=task.name)
        self.model = model.float().eval()

    def compare(self, call: Call, answer: list[int]) -> int:
        """Assert that the answer is the reference's; return the number of ties."""
        assert len(answer) == NUM_TOKENS
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": call.question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        if call.task is None:
            with self.model.disable_adapter():
                return num_ties(following(self.model, prompt, answer), answer)
        self.model.set_adapter(call.task.name)
        return num_ties(following(self.model, prompt, answer), answer)


@pytest.mark.parametrize("num_questions", [6, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.public_name)
async def test_a_demo_adapter_behaves_through_the_api_as_it_does_with_peft(
    server, task, num_questions
):
    scores = json.loads((task.folder.parent / "scores.json").read_text())[task.name]
    through_api, base = await asyncio.gather(
        _score(server, task, model=task.public_name, num_questions=num_questions),
        _score(server, task, model=server.facts["base_model"], num_questions=2),
    )
    print(f"{task.public_name}: {through_api} %, PEFT {scores['adapter']} %, base {base} %")
    assert abs(through_api - scores["adapter"]) <= 2
    assert base <= through_api - 50


async def _score(server: Any, task: Task, *, model: str, num_questions: int) -> float:
    """Percent of held-out questions that are answered right."""
    gate = asyncio.Semaphore(CONCURRENCY)
    async with server.client(task.tenant) as client:

        async def ask(question: Any) -> bool:
            async with gate:
                answer = await client.chat.completions.create(
                    model=model,
                    messages=question.messages,
                    max_tokens=task.max_tokens,
                    temperature=0,
                )
            return task.score(question.expected, answer.choices[0].message.content)

        asked = read_held_out(task)[:num_questions]
        return 100 * sum(await asyncio.gather(*map(ask, asked))) / len(asked)


BODY = {"temperature": 0.9, "top_p": 1, "max_tokens": 32, "seed": 7, "ignore_eos": True}
CHANGES = [
    {"seed": 8},
    {"logit_bias": {"28": -100, "30": -100, "198": -100}},
    {"presence_penalty": 2},
    {"frequency_penalty": 2},
    {"repetition_penalty": 1.8},
    {"min_p": 0.3},
    {"top_k": 2},
]


@pytest.mark.parametrize("endpoint", ["chat", pytest.param("completions", marks=pytest.mark.slow)])
async def test_each_sampling_parameter_changes_the_answer_and_a_seed_repeats_it(server, endpoint):
    model = server.facts["base_model"]
    bodies = [BODY, BODY | {"ignore_eos": False}, *(BODY | change for change in CHANGES)]
    async with server.client("acme") as client:
        answers = await asyncio.gather(
            *(_answer(client, endpoint, model, body) for body in (*bodies, *bodies))
        )
    first, again = answers[: len(bodies)], answers[len(bodies) :]
    assert first == again
    plain, stopped, *others = first
    assert plain not in others
    assert plain.startswith(stopped)


async def _answer(client: Any, endpoint: str, model: str, body: dict[str, Any]) -> str:
    question = "Tell me a long story about a river."
    if endpoint == "completions":
        made = await client.completions.create(model=model, prompt=question, extra_body=body)
        return made.choices[0].text
    messages = [{"role": "user", "content": question}]
    made = await client.chat.completions.create(model=model, messages=messages, extra_body=body)
    return made.choices[0].message.content


async def test_an_answer_has_at_least_min_tokens(server):
    async with server.client("acme") as client:
        ask = functools.partial(
            client.chat.completions.create,
            model="acme-sql",
            messages=[{"role": "user", "content": "Say hi."}],
            temperature=0,
            max_tokens=60,
        )
        free = (await ask()).usage.completion_tokens
        assert free < 50
        longer = (await ask(extra_body={"min_tokens": free + 5})).usage.completion_tokens
    assert longer >= free + 5


async def test_a_bias_decides_and_a_logprob_still_tells_what_the_model_thought(server):
    async with server.client("acme") as client:
        made = await client.chat.completions.create(
            model="acme-sql",
            messages=[{"role": "user", "content": "Say hi."}],
            max_tokens=3,
            temperature=0,
            logit_bias={"28": 100},
            logprobs=True,
            top_logprobs=1,
        )
    told = made.choices[0].logprobs.content
    assert len({found.token for found in told}) == 1
    assert all(found.top_logprobs[0].logprob >= found.logprob for found in told)
    assert told[0].top_logprobs[0].token != told[0].token


async def test_the_log_says_of_each_generation_how_long_it_waited_for_its_adapter(server):
    task = next(iter(TASKS.values()))
    async with server.client(task.tenant) as client:
        answer = await client.chat.completions.create(
            model=task.public_name, messages=[{"role": "user", "content": "Hi"}], max_tokens=3
        )
    lines = [line for line in server.log.read_text().splitlines() if "generation_ended" in line]
    assert re.search(r" adapter_wait_ms=\d+ completion_tokens=\d+ engine_ms=\d+", lines[-1])
    assert answer.usage.completion_tokens <= 3
