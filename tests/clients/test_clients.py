"""Clients that know nothing of Manylora, with only a base URL and a key of it."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.clients.conftest import CLIENTS, Client

pytestmark = pytest.mark.clients

Facts = Callable[[Client], dict[str, Any]]

WEATHER = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["unit", "days"],
}
REVIEW = {
    "type": "object",
    "properties": {
        "mood": {"enum": ["good", "bad"]},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["mood", "stars"],
    "additionalProperties": False,
}
ERRORS = {
    "400": "BadRequestError",
    "401": "AuthenticationError",
    "403": "PermissionDeniedError",
    "404": "NotFoundError",
    "422": "UnprocessableEntityError",
    "429": "RateLimitError",
}
# Of clients that have classes of their own.
OWN_ERRORS = {
    "langchain": {"401": "OpenAIAuthenticationError", "404": "OpenAIModelNotFoundError"},
    "pydantic-ai": {"401": "ModelHTTPError", "404": "ModelHTTPError"},
    "instructor": {"401": "InstructorRetryException", "404": "InstructorRetryException"},
}


def having(notion: str) -> pytest.MarkDecorator:
    clients = [client for client in CLIENTS if notion in client.notions]
    return pytest.mark.parametrize("client", clients, ids=lambda client: client.name)


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_client_does_all_that_it_can(client: Client, facts: Facts) -> None:
    assert set(facts(client)) == client.notions


@having("chat")
def test_a_client_gets_the_answer(client: Client, facts: Facts, truth: dict[str, Any]) -> None:
    assert facts(client)["chat"] == truth["chat"]


@having("stream")
def test_a_client_gets_an_answer_in_pieces(
    client: Client, facts: Facts, truth: dict[str, Any]
) -> None:
    pieces = facts(client)["stream"]
    assert len(pieces) > 1
    if "chat" in client.notions:
        assert "".join(pieces) == truth["chat"]
    else:
        Draft202012Validator(REVIEW).validate(pieces[-1])


@having("usage")
def test_a_client_is_told_what_was_used(
    client: Client, facts: Facts, truth: dict[str, Any]
) -> None:
    used = facts(client)["usage"]
    if "chat" in client.notions:
        assert used == truth["usage"]
    else:
        assert all(number > 0 for number in used)


@pytest.mark.parametrize("notion", ["tools", "tools_streamed"])
def test_a_call_that_a_client_insists_on_is_of_its_tool(notion: str, facts: Facts) -> None:
    for client in CLIENTS:
        if notion in client.notions:
            name, arguments = facts(client)[notion]
            assert name in ("get_weather", "Weather"), client.name
            Draft202012Validator(WEATHER).validate(json.loads(arguments))


@having("schema")
def test_a_client_gets_an_object_of_its_schema(client: Client, facts: Facts) -> None:
    Draft202012Validator(REVIEW).validate(facts(client)["schema"])


@having("models")
def test_a_client_lists_the_models(client: Client, facts: Facts, truth: dict[str, Any]) -> None:
    assert facts(client)["models"] == truth["models"]


@having("embeddings")
def test_a_client_gets_vectors(client: Client, facts: Facts, truth: dict[str, Any]) -> None:
    for told, true in zip(facts(client)["embeddings"], truth["embeddings"], strict=True):
        assert told == pytest.approx(true, abs=1e-6)


@having("errors")
def test_a_client_raises_what_it_has_for_each_refusal(client: Client, facts: Facts) -> None:
    raised = facts(client)["errors"]
    expected = OWN_ERRORS.get(client.name.removesuffix(", responses"), ERRORS)
    assert raised == {status: expected[status] for status in raised}
    assert {"401", "404"} <= set(raised)
