"""Facts about a tenant's policy as its clients meet it: refusals, answers cut short, and counts."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from gateway import auth
from gateway.addresses import parse_networks
from gateway.audit import verify_chain
from gateway.database import Database
from gateway.tables import AuditEntry, Hold, PolicyDecision
from tests.conftest import Home
from tests.gateway import moderator as moderators
from tests.gateway.moderator import Moderator, moderating
from tests.gateway.whole_gateway import MODEL, PATIENCE_S, Gateway, chat, whole_gateway

POLICY = "/admin/v1/tenants/acme/policy"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
LOOPBACK = parse_networks(["127.0.0.0/8", "::1/128"], param="networks")


@pytest.fixture
async def gateway(home: Home, database: Database, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with whole_gateway(home, database, tmp_path, webhook_networks=LOOPBACK) as gateway:
        yield gateway


@pytest.fixture
async def moderator() -> AsyncIterator[Moderator]:
    async with moderating() as moderator:
        yield moderator


async def put(gateway: Gateway, **policy: Any) -> dict[str, Any]:
    """Set a policy, and go on with a key that the gateway knows nothing older of."""
    answer = await gateway.operator.put(POLICY, json=policy)
    assert answer.status_code == httpx.codes.OK, answer.text
    async with await gateway.key(role="owner") as client:
        gateway.client.headers["authorization"] = client.headers["authorization"]
    made: dict[str, Any] = answer.json()
    return made


def hook(moderator: Moderator, *check: str, **fields: Any) -> dict[str, Any]:
    return {
        "url": moderator.url,
        "check": list(check),
        "on_failure": "closed",
        "timeout_ms": 5000,
        **fields,
    }


async def ask(gateway: Gateway, path: str = CHAT, **body: Any) -> httpx.Response:
    default = chat("w1 w2 w3") if path == CHAT else {"model": MODEL, "prompt": "w1 w2 w3"}
    return await gateway.client.post(path, json={**default, **body})


async def stream(gateway: Gateway, **body: Any) -> tuple[httpx.Response, list[Any]]:
    answer = await ask(
        gateway, COMPLETIONS, stream=True, stream_options={"include_usage": True}, **body
    )
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    return answer, [json.loads(line) for line in lines if line.startswith("{")]


def words_of(events: list[Any]) -> list[str]:
    choices = [choice for event in events for choice in event.get("choices", ())]
    return "".join(choice["text"] for choice in choices).split()


def reasons_of(events: list[Any]) -> list[str]:
    choices = [choice for event in events for choice in event.get("choices", ())]
    return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


def error_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


async def decisions(gateway: Gateway) -> dict[tuple[str, str], int]:
    listed = (await gateway.operator.get(f"{POLICY}/decisions")).json()["data"]
    return {(row["rule"], row["verdict"]): row["num_decisions"] for row in listed}


async def num_holds(gateway: Gateway) -> int:
    async with gateway.database.as_worker() as session:
        return len((await session.scalars(select(Hold))).all())


# What may be asked for.


async def test_who_asks_for_more_than_the_policy_allows_is_refused(gateway: Gateway) -> None:
    await put(gateway, max_output_tokens=5)
    assert error_of(await ask(gateway)) == (400, "policy_violation", "max_tokens")
    body = chat("w1", max_completion_tokens=6)
    del body["max_tokens"]
    answer = await gateway.client.post(CHAT, json=body)
    assert error_of(answer) == (400, "policy_violation", "max_completion_tokens")
    assert (await ask(gateway, max_tokens=5)).status_code == 200


async def test_who_asks_for_no_length_gets_what_the_policy_allows(gateway: Gateway) -> None:
    await put(gateway, max_output_tokens=5)
    for path in (CHAT, COMPLETIONS):
        answer = (await ask(gateway, path, max_tokens=None, ignore_eos=True)).json()
        assert answer["usage"]["completion_tokens"] == 5
        assert answer["choices"][0]["finish_reason"] == "length"


async def test_a_prompt_may_not_be_longer_than_the_policy_allows(gateway: Gateway) -> None:
    await put(gateway, max_prompt_tokens=3)
    assert (await ask(gateway)).status_code == 200
    answer = await ask(gateway, COMPLETIONS, prompt="w1 w2 w3 w4")
    assert error_of(answer) == (400, "policy_violation", "prompt")


async def test_fields_that_are_not_allowed_are_refused_by_name(gateway: Gateway) -> None:
    await put(gateway, allowed_parameters=["max_tokens", "ignore_eos", "seed", "temperature"])
    assert (await ask(gateway, seed=0, stream=False, top_p=None)).status_code == 200
    answer = await ask(gateway, top_p=0.5)
    assert error_of(answer) == (400, "policy_violation", "top_p")
    await put(gateway, denied_parameters=["temperature"])
    answer = await ask(gateway, temperature=0)
    assert error_of(answer) == (400, "policy_violation", "temperature")
    assert (await ask(gateway, top_p=0.5)).status_code == 200


async def test_a_change_of_the_policy_is_told_to_every_gateway_and_so_is_its_end(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "CACHE_S", 3600.0)

    async def until_answered(status: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while (await ask(gateway)).status_code != status:
                pass

    await until_answered(200)
    for most, status in ((3, 400), (9, 200), (4, 400)):
        await gateway.operator.put(POLICY, json={"max_output_tokens": most})
        await until_answered(status)
    assert (await gateway.operator.delete(POLICY)).status_code == 204
    await until_answered(200)
    for method in ("GET", "DELETE"):
        assert (await gateway.operator.request(method, POLICY)).status_code == 404


# What may be said to a model.


DENIED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": [{"role": "user", "content": "w1 w7 w8"}]}),
    (
        CHAT,
        {
            "messages": [
                {"role": "system", "content": "w7 w8"},
                {"role": "user", "content": "w1"},
            ]
        },
    ),
    (
        CHAT,
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "w"}, {"type": "text", "text": "7 w8"}],
                }
            ]
        },
    ),
    (COMPLETIONS, {"prompt": "w7 w8"}),
    (COMPLETIONS, {"prompt": [7, 8]}),
    (COMPLETIONS, {"prompt": [7, 8], "stream": True}),
]


async def test_a_denied_prompt_never_reaches_the_engine(
    gateway: Gateway, subtests: pytest.Subtests
) -> None:
    await put(gateway, deny_input=[{"name": "sevens", "pattern": r"(?i)\bW7 w8\b"}])
    for path, body in DENIED:
        with subtests.test(str(body)):
            answer = await ask(gateway, path, **body)
            param = "messages" if path == CHAT else "prompt"
            assert error_of(answer) == (400, "content_policy", param)
            assert "sevens" in answer.json()["error"]["message"]
    assert not gateway.core.seen
    assert await num_holds(gateway) == 0


async def test_words_of_the_template_are_nobodys_prompt(gateway: Gateway) -> None:
    await put(gateway, deny_input=[{"name": "spaces", "pattern": r"w1 $"}])
    # The template writes a space after each message.
    assert (await ask(gateway, messages=[{"role": "user", "content": "w1"}])).status_code == 200


async def test_an_estimate_says_that_the_policy_would_refuse(gateway: Gateway) -> None:
    await put(gateway, max_output_tokens=5, deny_input=[{"name": "sevens", "pattern": "w7"}])
    body = {"model": MODEL, "prompt": "w1"}
    allowed = (await gateway.client.post("/v1/estimate", json=body)).json()
    assert (allowed["would_be_admitted"], allowed["max_output_tokens"]) == (True, 5)
    body["prompt"] = "w7"
    refused = (await gateway.client.post("/v1/estimate", json=body)).json()
    assert refused["why_not"]["code"] == "content_policy"
    assert ("deny_input/sevens", "refused") not in await decisions(gateway)


# What a model may say.


SEVENS = {"name": "sevens", "pattern": r"w7 w8\b"}
PROMPT = "w1 w2 w3 w7 w8 w9"


async def test_a_stream_ends_before_what_is_denied(gateway: Gateway) -> None:
    await put(gateway, deny_output=[SEVENS], window_chars=16)
    answer, events = await stream(gateway, prompt=PROMPT, max_tokens=100)
    assert answer.status_code == 200
    assert words_of(events) == ["w1", "w2", "w3"]
    assert reasons_of(events) == ["content_filter"]
    assert "w7" not in answer.text
    # The match became certain with the token after it; those before were made, and are billed.
    assert events[-1]["usage"]["completion_tokens"] == 6
    [event] = await gateway.events(1)
    assert (event.outcome, event.completion_tokens) == ("content_filter", 6)
    assert event.cost_nano == events[-1]["usage"]["cost_nano"]
    assert await gateway.differences() == []


async def test_a_whole_answer_ends_there_too(gateway: Gateway) -> None:
    await put(gateway, deny_output=[SEVENS])
    answer = (await ask(gateway, COMPLETIONS, prompt=PROMPT, max_tokens=100)).json()
    [choice] = answer["choices"]
    assert (choice["text"].split(), choice["finish_reason"]) == (
        ["w1", "w2", "w3"],
        "content_filter",
    )
    assert answer["usage"]["completion_tokens"] == 6
    told = (await ask(gateway, messages=[{"role": "user", "content": PROMPT}])).json()
    [choice] = told["choices"]
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"]["content"].split() == ["w1", "w2", "w3"]


async def test_what_is_denied_at_the_very_end_is_not_sent_either(gateway: Gateway) -> None:
    await put(gateway, deny_output=[SEVENS])
    _, events = await stream(gateway, prompt=PROMPT, max_tokens=5)
    assert words_of(events) == ["w1", "w2", "w3"]
    assert reasons_of(events) == ["content_filter"]


async def test_an_answer_without_a_match_is_sent_whole(gateway: Gateway) -> None:
    await put(gateway, deny_output=[{"name": "none", "pattern": "nothing like it"}])
    _, events = await stream(gateway, prompt=PROMPT, max_tokens=300)
    assert words_of(events) == PROMPT.split() * 50
    assert reasons_of(events) == ["length"]


async def test_a_stop_string_ends_an_answer_before_a_rule_does(gateway: Gateway) -> None:
    await put(gateway, deny_output=[SEVENS])
    _, events = await stream(gateway, prompt=PROMPT, max_tokens=100, stop=["w3"])
    assert words_of(events) == ["w1", "w2"]
    assert reasons_of(events) == ["stop"]


async def test_probabilities_do_not_tell_what_is_held_back(gateway: Gateway) -> None:
    await put(gateway, deny_output=[SEVENS])
    answer = await ask(gateway, COMPLETIONS, logprobs=0)
    assert error_of(answer) == (400, "policy_violation", "logprobs")
    answer = await ask(gateway, logprobs=True)
    assert error_of(answer) == (400, "policy_violation", "logprobs")
    assert (await ask(gateway, logprobs=False)).status_code == 200


# Whom it asks.


async def test_a_moderation_is_asked_signed_and_before_anything_is_held(
    gateway: Gateway, moderator: Moderator
) -> None:
    made = await put(gateway, moderation=hook(moderator, "input"))
    assert (await ask(gateway)).status_code == 200
    [question] = moderator.questions
    request_id = question.pop("request_id")
    assert question == {
        "tenant": "acme",
        "model": MODEL,
        "direction": "input",
        "text": "w1 w2 w3",
    }
    assert [str(event.id) for event in await gateway.events(1)] == [request_id]
    assert moderator.is_signed_with(made["moderation_secret"])
    moderator.words = ["w2"]
    answer = await ask(gateway)
    assert error_of(answer) == (400, "content_policy", "messages")
    assert moderator.reason in answer.json()["error"]["message"]
    assert len(gateway.core.seen) == 1
    assert await num_holds(gateway) == 1


async def test_a_whole_answer_is_judged_before_it_is_sent(
    gateway: Gateway, moderator: Moderator
) -> None:
    await put(gateway, moderation=hook(moderator, "output"))
    allowed = (await ask(gateway)).json()
    assert allowed["choices"][0]["finish_reason"] == "length"
    [question] = moderator.questions
    assert question["direction"] == "output"
    assert question["text"] == allowed["choices"][0]["message"]["content"]
    moderator.words = ["w3"]
    refused = (await ask(gateway)).json()
    [choice] = refused["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "content_filter")
    assert refused["usage"]["completion_tokens"] == 8
    assert [event.completion_tokens for event in await gateway.events(2)] == [8, 8]


async def test_a_stream_is_sent_as_far_as_it_was_judged(
    gateway: Gateway, moderator: Moderator
) -> None:
    await put(gateway, moderation=hook(moderator, "output", window_chars=100))
    prompt = " ".join(f"w{number}" for number in range(100, 300))
    _, events = await stream(gateway, prompt=prompt, max_tokens=200)
    assert words_of(events) == prompt.split()
    assert len(moderator.questions) == 10
    moderator.words = ["w150"]
    answer, events = await stream(gateway, prompt=prompt, max_tokens=200)
    assert reasons_of(events) == ["content_filter"]
    # Two windows of a hundred characters were allowed; the third ends with the 60th word.
    assert words_of(events) == prompt.split()[:40]
    assert "w150" not in answer.text
    [_, event] = await gateway.events(2)
    assert event.completion_tokens == events[-1]["usage"]["completion_tokens"] == 60
    assert await gateway.differences() == []


MISBEHAVIOURS = {
    "500": moderators.reply(b"", status="500 Oops"),
    "redirect": moderators.reply(moderators.ALLOWED, status="302 Found"),
    "text": moderators.reply(b"yes"),
    "type": moderators.reply(b'{"allow": "yes"}'),
    "nested": moderators.reply(b'{"rest":' + b"[" * 60_000),
    "endless": moderators.answer_without_end,
    "drops": moderators.answer_drop_by_drop,
    "silent": moderators.say_nothing,
    "gone": moderators.hang_up,
}


async def test_a_moderation_that_does_not_answer_fails_as_its_policy_says(
    gateway: Gateway, moderator: Moderator, subtests: pytest.Subtests
) -> None:
    num_asked = len(MISBEHAVIOURS)
    await put(gateway, moderation=hook(moderator, "input", timeout_ms=300))
    for name, moderator.misbehaves in MISBEHAVIOURS.items():
        with subtests.test(f"{name}, closed"):
            assert error_of(await ask(gateway)) == (503, "service_unavailable", None)
    assert await num_holds(gateway) == 0
    await put(gateway, moderation=hook(moderator, "input", timeout_ms=300, on_failure="open"))
    for name, moderator.misbehaves in MISBEHAVIOURS.items():
        with subtests.test(f"{name}, open"):
            assert (await ask(gateway)).status_code == 200
    # No redirect was followed.
    assert len(moderator.questions) == 2 * num_asked
    assert await decisions(gateway) == {
        ("moderation/input", "failed_closed"): num_asked,
        ("moderation/input", "failed_open"): num_asked,
        ("request", "passed"): num_asked,
    }


async def test_an_answer_whose_moderation_fails_is_not_sent_and_not_billed(
    gateway: Gateway, moderator: Moderator
) -> None:
    moderator.misbehaves = moderators.hang_up
    await put(gateway, moderation=hook(moderator, "output"))
    assert error_of(await ask(gateway)) == (503, "service_unavailable", None)
    await put(gateway, moderation=hook(moderator, "output", on_failure="open"))
    assert (await ask(gateway)).json()["usage"]["completion_tokens"] == 8
    assert len(await gateway.events(1)) == 1
    assert await gateway.differences() == []


async def test_no_private_address_is_asked(
    home: Home, database: Database, tmp_path: Path, moderator: Moderator
) -> None:
    async with whole_gateway(home, database, tmp_path) as gateway:
        port = httpx.URL(moderator.url).port
        hosts = ("localhost", "127.0.0.1", "[::1]", "[::]", "169.254.169.254", "10.0.0.1")
        for host in hosts:
            url = f"http://{host}:{port}/"
            await put(gateway, moderation=hook(moderator, "input") | {"url": url})
            assert (await ask(gateway)).status_code == 503
    assert moderator.questions == []


async def test_a_refused_prompt_leaves_its_idempotency_key_free(gateway: Gateway) -> None:
    await put(gateway, deny_input=[{"name": "ones", "pattern": "w1"}])
    headers = {"idempotency-key": "order-7"}
    body = chat("w1")
    refused = await gateway.client.post(CHAT, json=body, headers=headers)
    assert refused.status_code == 400
    await put(gateway)
    assert (await gateway.client.post(CHAT, json=body, headers=headers)).status_code == 200


# What is known of it afterwards.


async def test_decisions_are_counted_and_audited_without_any_text(
    gateway: Gateway, moderator: Moderator
) -> None:
    await put(
        gateway,
        denied_parameters=["seed"],
        deny_input=[{"name": "sixes", "pattern": "w666"}],
        deny_output=[SEVENS],
        moderation=hook(moderator, "input"),
    )
    moderator.words = ["w4"]
    for body in (
        *({"prompt": "w1"}, {"prompt": "w666 w5"}, {"prompt": "w666"}, {"prompt": "w4 w321"}),
        *({"prompt": PROMPT}, {"prompt": "w1", "seed": 1}),
    ):
        await ask(gateway, COMPLETIONS, **body)
    assert await decisions(gateway) == {
        ("request", "passed"): 2,
        ("parameters/seed", "refused"): 1,
        ("deny_input/sixes", "refused"): 2,
        ("deny_output/sevens", "refused"): 1,
        ("moderation/input", "passed"): 2,
        ("moderation/input", "refused"): 1,
    }
    await ask(gateway, COMPLETIONS, prompt="w666")
    assert (await decisions(gateway))["deny_input/sixes", "refused"] == 3
    async with gateway.database.as_worker() as session:
        query = select(AuditEntry).where(AuditEntry.action == "policy.decisions")
        entries = (await session.scalars(query.order_by(AuditEntry.number))).all()
        counts = (await session.scalars(select(PolicyDecision))).all()
        assert await verify_chain(session, entries[0].tenant_id) is None
    assert [len(entry.details["decisions"]) for entry in entries] == [4, 1]
    everything = f"{[entry.details for entry in entries]} {[vars(row) for row in counts]}"
    assert "w666" not in everything
    assert "w321" not in everything
    assert moderator.reason not in everything


async def test_what_was_not_written_yet_is_written_when_the_gateway_ends(
    home: Home, database: Database, tmp_path: Path
) -> None:
    async with whole_gateway(home, database, tmp_path) as gateway:
        await put(gateway, max_output_tokens=1)
        await ask(gateway)
    async with database.as_worker() as session:
        [row] = (await session.scalars(select(PolicyDecision))).all()
    assert (row.rule, row.verdict, row.num_decisions) == ("max_output_tokens", "refused", 1)


async def test_who_changed_the_policy_is_audited_with_what_it_was(gateway: Gateway) -> None:
    await put(gateway, max_output_tokens=5, max_prompt_tokens=7)
    await put(gateway, max_output_tokens=6, max_prompt_tokens=7)
    await gateway.operator.delete(POLICY)
    async with gateway.database.as_worker() as session:
        query = select(AuditEntry).where(AuditEntry.action.in_(["policy.set", "policy.delete"]))
        entries = (await session.scalars(query.order_by(AuditEntry.number))).all()
    assert [entry.action for entry in entries] == ["policy.set", "policy.set", "policy.delete"]
    assert entries[1].details == {
        "before": {"max_output_tokens": 5},
        "after": {"max_output_tokens": 6},
    }
    assert entries[2].details["before"]["max_output_tokens"] == 6


async def test_owners_read_their_policy_without_its_secrets(
    gateway: Gateway, moderator: Moderator
) -> None:
    assert (await gateway.client.get("/v1/policy")).json() == {"policy": None}
    await put(gateway, max_output_tokens=5, moderation=hook(moderator, "input"))
    shown = await gateway.client.get("/v1/policy")
    assert shown.json()["policy"]["max_output_tokens"] == 5
    assert shown.json()["policy"]["moderation"]["url"] == "http://localhost/[redacted]"
    assert "hidden" not in shown.text
    assert "whsec_" not in shown.text
    async with await gateway.key(role="developer") as developer:
        assert (await developer.get("/v1/policy")).status_code == 403
    assert (await gateway.client.get(POLICY)).status_code == 403


async def test_a_policy_is_one_tenants(gateway: Gateway) -> None:
    await put(gateway, max_output_tokens=5)
    await gateway.operator.post("/admin/v1/tenants", json={"slug": "globex"})
    made = await gateway.operator.post(
        "/admin/v1/tenants/globex/keys", json={"name": "x", "role": "owner"}
    )
    headers = {"authorization": f"Bearer {made.json()['key']}"}
    assert (await gateway.client.post(CHAT, json=chat(), headers=headers)).status_code == 200
    shown = await gateway.client.get("/v1/policy", headers=headers)
    assert shown.json() == {"policy": None}


HOOK = {"url": "http://a.example", "check": ["input"], "on_failure": "open"}
REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"deny_input": [{"name": "a", "pattern": "x"}] * 10_000}, 400, "deny_input"),
    ({"deny_input": [{"name": "a", "pattern": "x" * 1001}]}, 400, "deny_input[0].pattern"),
    ({"deny_input": [{"name": "A b", "pattern": "x"}]}, 400, "deny_input[0].name"),
    ({"deny_input": [{"name": "a\n", "pattern": "x"}]}, 400, "deny_input[0].name"),
    ({"deny_output": [{"name": "a", "pattern": "("}]}, 422, "deny_output[0].pattern"),
    ({"denied_parameters": ["model"]}, 422, "denied_parameters[0]"),
    ({"allowed_parameters": ["seed", "colour"]}, 422, "allowed_parameters[1]"),
    ({"window_chars": 5000}, 400, "window_chars"),
    ({"max_output_tokens": 0}, 400, "max_output_tokens"),
    ({"colour": 1}, 400, "colour"),
    ({"moderation": HOOK | {"url": "ftp://a.example"}}, 422, "moderation.url"),
    ({"moderation": HOOK | {"url": "http://u:p@a.example"}}, 422, "moderation.url"),
    ({"moderation": HOOK | {"timeout_ms": 60_000}}, 400, "moderation.timeout_ms"),
    ({"moderation": HOOK | {"on_failure": "perhaps"}}, 400, "moderation.on_failure"),
    ({"moderation": HOOK | {"check": []}}, 400, "moderation.check"),
]


async def test_a_policy_that_cannot_be_is_refused_by_field(
    gateway: Gateway, subtests: pytest.Subtests
) -> None:
    for policy, status, param in REFUSED:
        with subtests.test(f"{str(policy)[:60]}"):
            answer = await gateway.operator.put(POLICY, json=policy)
            assert (answer.status_code, answer.json()["param"]) == (status, param), answer.text
    assert (await gateway.operator.get(POLICY)).status_code == 404
