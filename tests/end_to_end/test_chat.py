"""A conversation on a terminal: it streams, and Ctrl-C ends an answer alone."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

QUESTION = "How many open orders are there?"


class Terminal:
    """`manylora chat`, typed to and read from through pipes."""

    def __init__(self, server: Any, *words: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gateway.cli", "chat", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "MANYLORA_URL": server.url, "MANYLORA_KEY": server.key("acme")},
        )
        self.read_to("> ")

    def ask(self, line: str) -> str:
        """What is printed until the next prompt."""
        self.type(line)
        return self.read_to("> ").removesuffix("> ").strip()

    def type(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()

    def read_to(self, end: str) -> str:
        assert self._process.stdout is not None
        seen = b""
        while not seen.lower().endswith(end.encode()):
            byte = self._process.stdout.read(1)
            if not byte:
                pytest.fail(f"it ended: {seen.decode()}")
            seen += byte
        return seen.decode()

    def press_ctrl_c(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def quit(self) -> int:
        self.type("/quit")
        return self._process.wait(timeout=60)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def terminal(server: Any) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*words: str) -> Terminal:
        opened.append(Terminal(server, *words))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


def test_an_adapter_answers_and_begins_anew_when_told_to(
    terminal: Callable[..., Terminal],
) -> None:
    chat = terminal("acme-sql", "--temperature", "0", "--max-tokens", "12")
    first = chat.ask(QUESTION)
    assert first.lower().startswith("select")
    assert "is not known" in chat.ask("/what")
    assert "a new conversation" in chat.ask("/reset")
    assert chat.ask(QUESTION) == first
    assert chat.quit() == 0


def test_ctrl_c_ends_the_answer_and_not_the_conversation(
    server: Any, terminal: Callable[..., Terminal]
) -> None:
    chat = terminal(str(server.facts["base_model"]), "--temperature", "0")
    chat.type("Tell me a long story about a lighthouse and its keeper.")
    chat.read_to("lighthouse")
    chat.press_ctrl_c()
    assert chat.read_to("> ").removesuffix("> ").strip().endswith("…")
    assert chat.quit() == 0


def test_a_model_that_is_not_there_is_told_and_does_not_end_the_conversation(
    terminal: Callable[..., Terminal],
) -> None:
    chat = terminal("acme-nothing")
    assert "does not exist" in chat.ask("Hello")
    assert chat.quit() == 0


def test_an_answer_comes_from_all_that_was_said_before(
    server: Any, terminal: Callable[..., Terminal]
) -> None:
    model = str(server.facts["base_model"])
    chat = terminal(model, "--temperature", "0", "--max-tokens", "12")
    said: list[dict[str, str]] = []
    with server.http(server.key("acme")) as http:
        for question in ("My name is Ada.", "What is my name?"):
            said.append({"role": "user", "content": question})
            body = {"model": model, "messages": said, "temperature": 0, "max_tokens": 12}
            answer = http.post("/v1/chat/completions", json=body).json()
            text = answer["choices"][0]["message"]["content"]
            said.append({"role": "assistant", "content": text})
            assert chat.ask(question) == text.strip()
    assert chat.quit() == 0
