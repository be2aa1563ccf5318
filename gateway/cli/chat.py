"""`manylora chat`: a conversation with one model, on a terminal, through the tenants' plane."""

import contextlib
import json
from collections.abc import Generator, Iterator
from typing import Any

import click
import httpx

from adapters.errors import ServerRefused, ServerTrouble
from adapters.push import Server
from gateway.cli.printing import say
from gateway.cli.server import as_tenant

with contextlib.suppress(ImportError):
    # Gives `input` a line that can be edited, and a history; not every Python has it.
    import readline  # noqa: F401

Message = dict[str, str]


@click.command()
@click.argument("model")
@click.option("--system", help="What the model is told before the conversation.")
@click.option("--temperature", type=click.FloatRange(0, 2))
@click.option("--max-tokens", type=click.IntRange(min=1), help="Of one answer.")
@as_tenant
def chat(
    server: Server,
    model: str,
    system: str | None,
    temperature: float | None,
    max_tokens: int | None,
) -> None:
    """Talk to MODEL, e.g. acme-sql or acme-sql@prod.

    Ctrl-C stops an answer. /reset begins anew, /quit or Ctrl-D ends.
    """
    options = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
    conversation = _Conversation(server, options, system)
    say(f"{model}: /reset begins anew, /quit ends, Ctrl-C stops an answer")
    for line in _lines():
        if line == "/quit":
            break
        if line == "/reset":
            conversation.reset()
            say("a new conversation")
        elif line.startswith("/"):
            say(f"{line.split()[0]} is not known: there are /reset and /quit")
        else:
            conversation.ask(line)


class _Conversation:
    """What was said so far. Mutable: grows by a question and its answer."""

    def __init__(self, server: Server, options: dict[str, Any], system: str | None) -> None:
        self._server = server
        self._options = {name: value for name, value in options.items() if value is not None}
        self._system = system
        self._messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        told = self._system
        self._messages = [] if told is None else [{"role": "system", "content": told}]

    def ask(self, question: str) -> None:
        """Print the answer as it comes; a question that got none is forgotten."""
        messages = [*self._messages, {"role": "user", "content": question}]
        answer = ""
        try:
            with contextlib.closing(self._stream(messages)) as pieces:
                for piece in pieces:
                    answer += piece
                    click.echo(piece, nl=False)
        except KeyboardInterrupt:
            click.echo(" …", nl=False)
        except ServerTrouble as trouble:
            click.echo(err=True)
            say(str(trouble))
        click.echo()
        if answer:
            self._messages = [*messages, {"role": "assistant", "content": answer}]

    def _stream(self, messages: list[Message]) -> Generator[str]:
        body = {**self._options, "messages": messages, "stream": True}
        with self._server.stream("POST", "/v1/chat/completions", body) as answer:
            for event in _events(answer):
                if "error" in event:
                    raise ServerRefused(answer.status_code, {"detail": event["error"]["message"]})
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""


def _events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event, until the last."""
    for line in answer.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _lines() -> Iterator[str]:
    """What the user types, without what is empty or given up with Ctrl-C."""
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            click.echo()
            continue
        except EOFError:
            click.echo()
            return
        if line:
            yield line
