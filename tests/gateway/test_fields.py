"""What requests may say beside their prompt, and what answers tell beside their text."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from adapters.text_bundle import TextBundle
from gateway.database import Database
from tests.conftest import Home
from tests.engine.echo_engine import INFO, until
from tests.gateway.whole_gateway import MODEL, Gateway, chat, whole_gateway

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEMPLATE = (
    "{{ mood | default('w900') }} "
    "{% for each in messages %}{{ each.role }} {{ each.content }} w901 {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
ROLES = {"user": 902, "assistant": 903}


def _bundle() -> TextBundle:
    """Words `w7` are tokens, `w901` is a special one that ends turns."""
    words = {f"w{number}": number for number in range(1000) if number not in ROLES.values()}
    tokenizer = Tokenizer(WordLevel(words | ROLES, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(["w901"])
    return TextBundle(
        tokenizer_json=tokenizer.to_str().encode(),
        chat_template=TEMPLATE,
        special_tokens={"eos_token": "w901"},
        eos_token_ids=(901,),
        generation_defaults={},
        context_length=INFO.max_model_len,
        vocab_size=INFO.vocab_size,
    )


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with whole_gateway(home, database, tmp_path, bundle=_bundle()) as gateway:
        yield gateway


async def complete(gateway: Gateway, **fields: Any) -> Any:
    body = {"model": MODEL, "prompt": "w1 w2", "max_tokens": 3, **fields}
    answer = await gateway.client.post(COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def converse(gateway: Gateway, **fields: Any) -> Any:
    answer = await gateway.client.post(CHAT, json=chat("w1", max_tokens=3, **fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


async def streamed(gateway: Gateway, path: str, body: dict[str, Any]) -> list[Any]:
    answer = await gateway.client.post(path, json={**body, "stream": True})
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    return [json.loads(line) for line in lines if line.startswith("{")]


def error_of(answer: httpx.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.json()["error"]["param"]


# Beside the text.


async def test_an_echo_begins_each_answer_with_its_prompt(gateway: Gateway) -> None:
    for prompt in ("w1 w2", [1, 2], ["w1 w2"], [[1, 2]]):
        [choice] = (await complete(gateway, prompt=prompt, echo=True))["choices"]
        assert choice["text"].split() == ["w1", "w2", "w1", "w2", "w1"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_has_the_log_probabilities_of_its_prompt(
    gateway: Gateway, stream: bool
) -> None:
    body = {"model": MODEL, "prompt": ["w1 w2", "w3 w4"], "max_tokens": 3, "n": 2}
    body |= {"echo": True, "logprobs": 1}
    if stream:
        answers = await streamed(gateway, COMPLETIONS, body)
    else:
        answers = [await complete(gateway, **body)]
    for index in range(4):
        pieces = [
            choice for each in answers for choice in each["choices"] if choice["index"] == index
        ]
        told = [each["logprobs"] for each in pieces]
        tokens = [token for each in told for token in each["tokens"]]
        first, second = ("w1", "w2") if index < 2 else ("w3", "w4")
        assert [token.strip() for token in tokens] == [first, second, first, second, first]
        logprobs = [logprob for each in told for logprob in each["token_logprobs"]]
        assert logprobs == [None, -0.25, -0.25, -0.25, -0.25]
        tops = [top for each in told for top in each["top_logprobs"]]
        assert [len(top) for top in tops] == [0, 1, 1, 1, 1]
        offsets = [offset for each in told for offset in each["text_offset"]]
        assert offsets == sorted(offsets)
        assert offsets[0] == 0


async def test_prompt_logprobs_are_told_in_vllms_words(gateway: Gateway) -> None:
    [choice] = (await complete(gateway, prompt=[1, 2, 3], prompt_logprobs=2))["choices"]
    first, second, third = choice["prompt_logprobs"]
    assert first is None
    assert set(second) == {"2", "3"}
    assert second["2"] | {"decoded_token": ""} == {"logprob": -0.25, "rank": 1, "decoded_token": ""}
    assert third["4"]["rank"] == 2
    answer = await converse(gateway, prompt_logprobs=0)
    assert [len(each) for each in answer["prompt_logprobs"][1:]] == [1] * 4
    assert answer["prompt_logprobs"][1]["902"]["rank"] is None


async def test_prompt_logprobs_cannot_be_streamed(gateway: Gateway) -> None:
    body = chat("w1", prompt_logprobs=1, stream=True)
    assert error_of(await gateway.client.post(CHAT, json=body)) == (400, "prompt_logprobs")


async def test_token_ids_are_told_with_the_one_that_ended_the_answer(gateway: Gateway) -> None:
    body = {"model": MODEL, "prompt": [7, 8, 901, 9], "max_tokens": 9, "return_token_ids": True}
    [choice] = (await complete(gateway, **body))["choices"]
    assert choice["prompt_token_ids"] == [7, 8, 901, 9]
    assert choice["token_ids"] == [7, 8, 901]
    assert choice["text"].split() == ["w7", "w8"]
    chunks = [chunk["choices"][0] for chunk in await streamed(gateway, COMPLETIONS, body)]
    assert chunks[0]["prompt_token_ids"] == [7, 8, 901, 9]
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    assert [token_id for chunk in chunks for token_id in chunk["token_ids"]] == [7, 8, 901]


async def test_a_chat_tells_token_ids_too(gateway: Gateway) -> None:
    answer = await converse(gateway, return_token_ids=True)
    assert answer["prompt_token_ids"] == [900, 902, 1, 901, 903]
    assert answer["choices"][0]["token_ids"] == [900, 902, 1]
    body = chat("w1", max_tokens=3, return_token_ids=True)
    first, *rest = await streamed(gateway, CHAT, body)
    assert first["prompt_token_ids"] == [900, 902, 1, 901, 903]
    told = [chunk["choices"][0].get("token_ids") for chunk in rest]
    assert [token_id for each in told if each for token_id in each] == [900, 902, 1]


async def test_special_tokens_are_shown_to_who_asks_for_them(gateway: Gateway) -> None:
    body = {"prompt": [7, 901, 8], "max_tokens": 5, "ignore_eos": True}
    [hidden] = (await complete(gateway, **body))["choices"]
    [shown] = (await complete(gateway, **body, skip_special_tokens=False))["choices"]
    assert hidden["text"].split() == ["w7", "w8", "w7"]
    assert shown["text"].split() == ["w7", "w901", "w8", "w7", "w901"]
    # The one that ends an answer is no part of it.
    ended = await complete(gateway, prompt=[7, 901, 8], skip_special_tokens=False)
    assert ended["choices"][0]["text"].split() == ["w7"]


async def test_metadata_comes_back_and_changes_nothing(gateway: Gateway) -> None:
    plain = await converse(gateway)
    told = await converse(gateway, metadata={"team": "a"}, prompt_cache_key="b")
    assert "metadata" not in plain
    assert told["metadata"] == {"team": "a"}
    assert told["choices"] == plain["choices"]


# What the template makes of a conversation.


async def prompt_of(gateway: Gateway, *messages: tuple[str, str], **fields: Any) -> list[int]:
    said = [{"role": role, "content": content} for role, content in messages]
    answer = await converse(gateway, messages=said, return_token_ids=True, **fields)
    prompt: list[int] = answer["prompt_token_ids"]
    return prompt


async def test_a_template_is_told_what_the_client_says(gateway: Gateway) -> None:
    told = await prompt_of(gateway, ("user", "w1"), chat_template_kwargs={"mood": "w5"})
    assert told == [5, 902, 1, 901, 903]
    for name in ("messages", "tools", "add_generation_prompt", "eos_token"):
        body = chat("w1", chat_template_kwargs={name: "w5"})
        answer = await gateway.client.post(CHAT, json=body)
        assert error_of(answer) == (400, "chat_template_kwargs"), name


async def test_a_conversation_may_end_without_asking(gateway: Gateway) -> None:
    told = await prompt_of(gateway, ("user", "w1"), add_generation_prompt=False)
    assert told == [900, 902, 1, 901]


async def test_an_answer_may_go_on_with_the_last_message(gateway: Gateway) -> None:
    said = (("user", "w1"), ("assistant", "w2 w3"))
    told = await prompt_of(gateway, *said, continue_final_message=True)
    assert told == [900, 902, 1, 901, 903, 2, 3]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "continue_final_message"),
        (
            {
                "messages": [{"role": "assistant", "content": "w2"}],
                "add_generation_prompt": True,
            },
            "add_generation_prompt",
        ),
    ],
)
async def test_what_cannot_be_continued_is_refused(
    gateway: Gateway, fields: dict[str, Any], param: str
) -> None:
    body = chat("w1", continue_final_message=True) | fields
    assert error_of(await gateway.client.post(CHAT, json=body)) == (400, param)


# Who may wait.


TIERS: list[tuple[str | None, str | None, int]] = [
    (None, None, 0),
    ("auto", "default", 0),
    ("default", "default", 0),
    ("flex", "flex", 10),
    ("priority", "priority", -10),
    ("fast", "priority", -10),
]


async def test_a_service_tier_is_a_class_of_the_engines(
    gateway: Gateway, subtests: pytest.Subtests
) -> None:
    for tier, served, priority in TIERS:
        with subtests.test(f"{tier}"):
            gateway.core.allow_steps(0)
            async with await gateway.key(scopes=["inference", "priority"]) as client:
                asking = asyncio.create_task(client.post(CHAT, json=chat("w1", service_tier=tier)))
                await until(lambda: bool(gateway.core.running))
                assert [each.priority for each in gateway.core.running.values()] == [priority]
                gateway.core.allow_steps(None)
                assert (await asking).json().get("service_tier") == served
                chunks = await streamed(gateway, CHAT, chat("w1", service_tier="flex"))
            assert {chunk["service_tier"] for chunk in chunks} == {"flex"}


async def test_nobody_goes_before_others_whom_no_operator_let(gateway: Gateway) -> None:
    for role in ("owner", "developer"):
        async with await gateway.key(role=role) as client:
            answer = await client.post(CHAT, json=chat("w1", service_tier="priority"))
            assert error_of(answer) == (403, "service_tier")


async def test_token_ids_are_not_told_where_a_policy_reads_answers(gateway: Gateway) -> None:
    rules = [{"name": "nine", "pattern": "w9"}]
    await gateway.operator.put("/admin/v1/tenants/acme/policy", json={"deny_output": rules})
    async with await gateway.key(role="owner") as client:
        body = chat("w1", return_token_ids=True)
        assert error_of(await client.post(CHAT, json=body)) == (400, "return_token_ids")


# What nobody knows.


async def test_an_unknown_field_is_refused_by_name(gateway: Gateway) -> None:
    answer = await gateway.client.post(CHAT, json=chat("w1", frobnicate=1))
    assert error_of(answer) == (400, "frobnicate")
    assert "x-ignored-fields" not in answer.headers


async def test_an_operator_may_have_unknown_fields_told_of_instead(
    home: Home, database: Database, tmp_path: Path
) -> None:
    async with whole_gateway(
        home, database, tmp_path, bundle=_bundle(), reports_unknown_fields=True
    ) as gateway:
        plain = await gateway.client.post(CHAT, json=chat("w1"))
        body = chat("w1", frobnicate=1, nice=[2], stream_options=None)
        body["messages"][0]["mood"] = "good"
        told = await gateway.client.post(CHAT, json=body)
        streamed = await gateway.client.post(
            COMPLETIONS, json={"model": MODEL, "prompt": "w1", "stream": True, "größe": 1}
        )
        refused = await gateway.client.post(CHAT, json=body | {"store": True})
        broken = await gateway.client.post(CHAT, content=b"{")
        other = await gateway.client.post("/v1/keys", json={"name": "x", "frobnicate": 1})
    assert plain.status_code == told.status_code == streamed.status_code == 200
    assert "x-ignored-fields" not in plain.headers
    names = told.headers["x-ignored-fields"].split(", ")
    assert sorted(names) == ["frobnicate", "messages[0].mood", "nice"]
    assert told.json()["choices"] == plain.json()["choices"]
    assert streamed.headers["x-ignored-fields"] == "gr%C3%B6%C3%9Fe"
    assert error_of(refused) == (400, "store")
    assert broken.status_code == 400
    assert error_of(other) == (400, "frobnicate")


LARGE_NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": [2**64]}, "prompt[0]"),
    ({"stop_token_ids": [2**64]}, "stop_token_ids[0]"),
    ({"logit_bias": {str(2**64): 1}}, "logit_bias"),
    ({"min_tokens": 2**64}, "min_tokens"),
    ({"max_tokens": 2**64}, "max_tokens"),
    ({"top_k": 2**64}, "top_k"),
]


async def test_a_number_that_no_engine_can_read_is_refused_before_it_reaches_one(
    gateway: Gateway, subtests: pytest.Subtests
) -> None:
    for fields, param in LARGE_NUMBERS:
        with subtests.test(f"{fields}"):
            body = {"model": MODEL, "prompt": "w1", "max_tokens": 3, **fields}
            assert error_of(await gateway.client.post(COMPLETIONS, json=body)) == (400, param)
            assert (await gateway.operator.get("/health/ready")).is_success
