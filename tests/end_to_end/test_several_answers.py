"""Several answers of a real model in one request, and what it tells of its prompt."""

import asyncio
from typing import Any

import pytest

STORY = "The river rose in the night, and in the morning the bridge"


async def complete(client: Any, model: str, prompt: Any, **fields: Any) -> Any:
    extra = {"ignore_eos": True, **fields.pop("extra_body", {})}
    return await client.completions.create(
        model=model, prompt=prompt, max_tokens=12, extra_body=extra, **fields
    )


async def test_each_answer_is_the_one_that_its_seed_gives_alone(server):
    model = "acme-sql"
    async with server.client("acme") as client:
        together = await complete(client, model, STORY, n=3, seed=5, temperature=1)
        alone = await asyncio.gather(
            *(complete(client, model, STORY, seed=5 + n, temperature=1) for n in range(3))
        )
    texts = [choice.text for choice in together.choices]
    assert texts == [each.choices[0].text for each in alone]
    assert len(set(texts)) == 3
    assert together.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert together.usage.completion_tokens == 36


async def test_prompts_in_a_list_are_answered_as_each_would_be_alone(server):
    model, prompts = server.facts["base_model"], [STORY, "SELECT", "One, two, three,"]
    async with server.client("acme") as client:
        together = await complete(client, model, prompts, temperature=0)
        alone = await asyncio.gather(
            *(complete(client, model, prompt, temperature=0) for prompt in prompts)
        )
    expected = [each.choices[0].text for each in alone]
    assert [choice.text for choice in together.choices] == expected
    assert together.usage.prompt_tokens == sum(each.usage.prompt_tokens for each in alone)


async def test_a_stream_of_several_answers_says_what_the_whole_ones_say(server):
    fields = {"n": 2, "seed": 3, "temperature": 1}
    async with server.client("acme") as client:
        whole = await complete(client, "acme-sql", STORY, **fields)
        stream = await complete(client, "acme-sql", STORY, stream=True, **fields)
        texts = ["", ""]
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


async def test_an_echo_tells_how_likely_a_text_is(server):
    """The log-probability of a text's end is the same as a prompt's and as an answer's."""
    model = server.facts["base_model"]
    async with server.client("acme") as client:
        ids = {"return_token_ids": True}
        answer = await complete(client, model, STORY, temperature=0, logprobs=1, extra_body=ids)
        [said] = answer.choices
        text = [*said.prompt_token_ids, *said.token_ids]
        echoed = await complete(client, model, text, echo=True, logprobs=1)
        told = await complete(client, model, text, extra_body={"prompt_logprobs": 1})
    [echo] = echoed.choices
    assert echo.text.startswith(STORY + said.text)
    num_before = len(said.prompt_token_ids)
    assert echo.logprobs.token_logprobs[0] is None
    assert echo.logprobs.tokens[num_before : num_before + 12] == said.logprobs.tokens
    assert echo.logprobs.token_logprobs[num_before : num_before + 12] == pytest.approx(
        said.logprobs.token_logprobs, abs=1e-3
    )
    first, *rest = told.choices[0].prompt_logprobs
    assert first is None
    own = [max(each.values(), key=lambda found: found["logprob"]) for each in rest[-12:]]
    assert [each["rank"] for each in own] == [1] * 12


async def test_an_answer_goes_on_with_what_the_assistant_began(server):
    said = [
        {"role": "user", "content": "How many open orders are there?"},
        {"role": "assistant", "content": "SELECT COUNT(*) FROM"},
    ]
    async with server.client("acme") as client:
        answer = await client.chat.completions.create(
            model="acme-sql",
            messages=said,
            max_tokens=20,
            temperature=0,
            extra_body={"continue_final_message": True, "add_generation_prompt": False},
        )
    text = answer.choices[0].message.content
    assert text.startswith(" ")
    assert "select" not in text.lower()
