"""Text to token ids and back: chat templates, encoding, streaming decode, stop strings.

Works from a text bundle alone (Rust `tokenizers` and Jinja); never imports transformers. Knows
nothing of requests or money.
"""

import asyncio
import datetime
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from adapters.store import ArtifactStore
from adapters.text_bundle import TextBundle
from gateway.errors import InvalidRequest

# What a decoder answers for bytes that are no whole character yet.
REPLACEMENT = "\ufffd"
# Above this many characters encoding leaves the event loop: it takes longer than a few ms.
LONG_TEXT_CHARACTERS = 20_000


class TemplateFault(InvalidRequest):
    """The model's chat template does not take these messages."""

    code = "invalid_messages"


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; rendering passes it through."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration is an instance attribute)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        return str(caller())


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now(datetime.UTC).strftime(pattern)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class TextCodec:
    """One text bundle, ready for use."""

    def __init__(self, bundle: TextBundle) -> None:
        self.eos_token_ids = bundle.eos_token_ids
        self.generation_defaults = bundle.generation_defaults
        self.vocab_size = bundle.vocab_size
        self._tokenizer = Tokenizer.from_buffer(bundle.tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special_tokens = bundle.special_tokens
        self._template = (
            _environment().from_string(bundle.chat_template) if bundle.chat_template else None
        )

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Render the conversation, ending where the assistant is to speak, and encode it.

        Raises TemplateFault where the model has no template or the template refuses the messages.
        """
        return await self._encode(self.render(messages), add_special_tokens=False)

    async def encode_text(self, text: str) -> list[int]:
        """Encode a bare prompt the way that the model's tokenizer does by default."""
        return await self._encode(text, add_special_tokens=True)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        if self._template is None:
            raise TemplateFault("This model has no chat template: use /v1/completions.")
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise TemplateFault(
                f"The chat template refused the messages: {error}", param="messages"
            ) from error

    async def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        def encode() -> list[int]:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
            return ids

        return await asyncio.to_thread(encode) if len(text) > LONG_TEXT_CHARACTERS else encode()

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer, special tokens left out."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> str:
        """One token by itself, for log-probabilities; half a character shows as U+FFFD."""
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> list[int]:
        """The UTF-8 bytes of one token, exact for byte-level vocabularies."""
        text = self.token_text(token_id)
        if REPLACEMENT in text:
            symbols = self._tokenizer.id_to_token(token_id) or ""
            if all(symbol in _BYTE_OF_SYMBOL for symbol in symbols):
                return [_BYTE_OF_SYMBOL[symbol] for symbol in symbols]
        return list(text.encode())

    def stream(self, stops: Sequence[str] = ()) -> "TextStream":
        return TextStream(self, self._tokenizer, stops)


def _byte_of_symbol() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE writes for bytes (GPT-2's table), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + offset): byte for offset, byte in enumerate(rest)}


_BYTE_OF_SYMBOL = _byte_of_symbol()


class TextStream:
    """One answer as it grows: whole characters only, nothing of a stop string ever shown."""

    def __init__(self, codec: TextCodec, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._codec = codec
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stops = tuple(stops)
        self._token_ids: list[int] = []
        # Decoded so far, and how much of it was handed out.
        self._text = ""
        self._shown = 0
        self.is_stopped = False

    def feed(self, token_id: int) -> str:
        """Take one token; return the text that it makes certain. Sets `is_stopped` at a stop."""
        self._token_ids.append(token_id)
        piece = self._decoder.step(self._tokenizer, token_id)
        if not piece:
            return ""
        self._text += piece
        return self._advance(len(piece))

    def finish(self) -> str:
        """The rest: text held back for a stop that did not come, and broken characters."""
        if self.is_stopped:
            return ""
        whole = self._codec.decode(self._token_ids)
        self._text = whole if whole.startswith(self._text) else self._text
        rest, self._shown = self._text[self._shown :], len(self._text)
        return rest

    def _advance(self, num_new: int) -> str:
        if not self._stops:
            return self._show(len(self._text))
        longest = max(map(len, self._stops))
        search_from = max(self._shown, len(self._text) - num_new - longest + 1)
        found = [at for stop in self._stops if (at := self._text.find(stop, search_from)) >= 0]
        if found:
            self.is_stopped = True
            return self._show(min(found))
        return self._show(len(self._text) - self._num_undecided(longest))

    def _num_undecided(self, longest: int) -> int:
        """How many trailing characters may be the beginning of a stop string."""
        tail = self._text[self._shown :][-longest:]
        return max(
            (
                length
                for length in range(1, len(tail) + 1)
                if any(stop.startswith(tail[-length:]) for stop in self._stops)
            ),
            default=0,
        )

    def _show(self, end: int) -> str:
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece


class TextCodecs:
    """The codecs in use, by bundle digest; the least used leave memory first."""

    def __init__(self, store: ArtifactStore, *, max_codecs: int = 64) -> None:
        self._store = store
        self._max_codecs = max_codecs
        self._codecs: OrderedDict[str, asyncio.Task[TextCodec]] = OrderedDict()

    async def get(self, digest: str) -> TextCodec:
        """Return the codec of a bundle, reading it from the store at its first use.

        Raises ArtifactMissing where the store has no such bundle.
        """
        task = self._codecs.get(digest)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._codecs[digest] = asyncio.create_task(self._load(digest))
            self._forget(self._codecs.keys())
        self._codecs.move_to_end(digest)
        return await asyncio.shield(task)

    async def _load(self, digest: str) -> TextCodec:
        bundle = await self._store.get_bundle(digest)
        return await asyncio.to_thread(TextCodec, bundle)

    def _forget(self, digests: Iterable[str]) -> None:
        for digest in list(digests)[: -self._max_codecs]:
            del self._codecs[digest]
