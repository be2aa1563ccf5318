"""A running Manylora, and clients in environments of their own that are pointed at it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Server
from tests.end_to_end.conftest import server as server

HERE = Path(__file__).parent
# What `make clients` makes.
OTHERS = HERE.parents[1] / ".venv-clients" / "bin"
PATIENCE_S = 600
MODEL = "acme-sql"


@dataclass(frozen=True)
class Client:
    """Whose script runs with what, and which notions it tells of."""

    name: str
    command: tuple[str, ...]
    notions: frozenset[str]


def _python(
    name: str, script: str, notions: str, *told: str, python: Path = OTHERS / "python"
) -> Client:
    command = (str(python), str(HERE / "scripts" / script), *told)
    return Client(name, command, frozenset(notions.split()))


def _node(name: str, script: str, notions: str) -> Client:
    command = (str(OTHERS / "node"), str(HERE / "node" / script))
    return Client(name, command, frozenset(notions.split()))


OURS = Path(sys.executable)
SDK = "chat stream usage tools tools_streamed schema models embeddings errors"
SDK_RESPONSES = "chat stream usage tools tools_streamed schema errors"
LANGCHAIN = "chat stream usage tools schema embeddings errors"
AGENTS = "chat stream usage tools schema errors"
CLIENTS = [
    _python("openai 3", "with_openai.py", SDK, python=OURS),
    _python("openai 2", "with_openai.py", SDK),
    _node("openai for node", "with_openai.js", SDK),
    _python("langchain", "with_langchain.py", LANGCHAIN),
    _python(
        "llama-index", "with_llama_index.py", "chat stream usage tools schema embeddings errors"
    ),
    _python("pydantic-ai", "with_pydantic_ai.py", AGENTS),
    _python("instructor", "with_instructor.py", "stream usage tools schema errors"),
    _python("llm", "with_llm.py", "chat stream usage tools_offered schema errors"),
    # In OpenAI's newer words.
    _python("openai 3, responses", "with_openai_responses.py", SDK_RESPONSES, python=OURS),
    _python("openai 2, responses", "with_openai_responses.py", SDK_RESPONSES),
    _node("openai for node, responses", "with_openai_responses.js", SDK_RESPONSES),
    _python("langchain, responses", "with_langchain.py", LANGCHAIN, "responses"),
    _python("pydantic-ai, responses", "with_pydantic_ai.py", AGENTS, "responses"),
]


@pytest.fixture(scope="session")
def address(server: Server) -> dict[str, str]:
    """What a user has to know, as the environment that most clients read."""
    key = {"name": "slow"}
    with server.operator() as operator:
        keys = "/admin/v1/tenants/acme/keys"
        slow = operator.post(keys, json=key).raise_for_status().json()
        viewer = operator.post(keys, json={"name": "viewer", "role": "viewer"}).json()
        limits = {"requests_per_minute": 1}
        operator.put(f"{keys}/{slow['id']}/limits", json=limits).raise_for_status()
    return {
        "OPENAI_BASE_URL": str(server.facts["base_url"]),
        "OPENAI_API_KEY": server.key("acme"),
        "MODEL": MODEL,
        "EMBEDDER": str(server.facts["base_model"]),
        "SLOW_KEY": slow["key"],
        "VIEWERS_KEY": viewer["key"],
    }


@pytest.fixture(scope="session")
def facts(address: dict[str, str]) -> Callable[[Client], dict[str, Any]]:
    """What a client tells. Each is asked once, when somebody wants to know."""

    @cache
    def told_by(client: Client) -> dict[str, Any]:
        environment = {**os.environ, **address, "PYTHONWARNINGS": "ignore"}
        try:
            done = subprocess.run(
                client.command, env=environment, capture_output=True, timeout=PATIENCE_S
            )
        except FileNotFoundError:
            pytest.fail(f"{client.command[0]} is not there: `make clients` makes it")
        assert done.returncode == 0, done.stderr.decode()[-5000:]
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told

    return told_by


@pytest.fixture(scope="session")
def truth(server: Server) -> dict[str, Any]:
    """What the server says without any client, to what all of them ask."""
    question = [{"role": "user", "content": "How many open orders are there?"}]
    chat = {"model": MODEL, "messages": question, "max_tokens": 24, "temperature": 0}
    texts = ["open orders", "A pirate's favourite letter"]
    with server.http(server.key("acme")) as http:
        answer = http.post("/v1/chat/completions", json=chat).raise_for_status().json()
        vectors = http.post(
            "/v1/embeddings", json={"model": server.facts["base_model"], "input": texts}
        )
        listed = http.get("/v1/models").raise_for_status().json()
    return {
        "chat": answer["choices"][0]["message"]["content"],
        "usage": [answer["usage"][f"{each}_tokens"] for each in ("prompt", "completion")],
        "embeddings": [each["embedding"] for each in vectors.raise_for_status().json()["data"]],
        "models": [each["id"] for each in listed["data"]],
    }
