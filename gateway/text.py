"""Text to token ids and back: chat templates, encoding, streaming decode, stop strings.

Works from a text bundle alone (Rust `tokenizers` and Jinja); never imports transformers. Knows
nothing of requests or money.
"""

import asyncio
import enum
import hashlib
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any
from weakref import WeakValueDictionary

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from adapters.store import ArtifactStore
from adapters.text_bundle import TextBundle
from gateway import chat_template
from gateway.errors import InvalidRequest
from gateway.templates import OwnTemplate, TemplateFault, Templates
from gateway.tools import reasoning, syntaxes

# What a decoder answers for bytes that are no whole character yet.
REPLACEMENT = "\ufffd"
# Above this many characters encoding leaves the event loop: it takes longer than a few ms.
LONG_TEXT_CHARACTERS = 20_000
# A prompt's log-probabilities name each of its tokens with as many alternatives; 2 MB of a codec.
MAX_TOKENS_REMEMBERED = 16384
# Of a prompt's end, to see whether it begins thoughts: the mark and blanks behind it.
TOKENS_OF_MARK = 16
NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})
# What a template is told by the gateway alone, besides the names of special tokens.
OWN_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt"})


class Ending(enum.Enum):
    """How the prompt of a conversation ends."""

    # Where the assistant is to speak.
    ASKING = enum.auto()
    # Behind the last message, with nothing that asks for another.
    PLAIN = enum.auto()
    # Within the last message, which the answer goes on with.
    CONTINUING = enum.auto()


class TextCodec:
    """One text bundle, ready for use.

    `templates` renders the template of an adapter's own bundle; without it the template is the
    operator's choice, as a base model's is, and is rendered here.
    """

    def __init__(
        self,
        bundle: TextBundle,
        *,
        templates: Templates | None = None,
        tokenizer: Tokenizer | None = None,
        tool_call_parser: str | None = None,
    ) -> None:
        self.eos_token_ids = bundle.eos_token_ids
        self.generation_defaults = bundle.generation_defaults
        self.vocab_size = bundle.vocab_size
        self.pooling = bundle.pooling
        self._tokenizer = tokenizer or _load_tokenizer(bundle.tokenizer_json)
        self._special_tokens = bundle.special_tokens
        self._text_of = lru_cache(MAX_TOKENS_REMEMBERED)(self._find_text)
        source = bundle.chat_template
        self._templates = templates
        self._own_template = OwnTemplate.of(source) if source and templates else None
        self._template = (
            chat_template.compiled(source) if source and self._own_template is None else None
        )
        # How its model calls functions, and whether it thinks before it answers.
        self.syntax = syntaxes.spoken_in(source or "", name=tool_call_parser)
        self._reads_tools = syntaxes.reads_tools(source or "")
        self._thinks = reasoning.thinks(source or "")
        self._marks = _tokens_of(self._tokenizer, (*self.syntax.marks, *reasoning.MARKS))

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        caller: str = "",
        ending: Ending = Ending.ASKING,
        variables: Mapping[str, Any] = NO_VARIABLES,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Render the conversation and encode it; `variables` are the template's, beside our own.

        `caller` is who takes turns with others for the rendering of adapters' own templates;
        `tools` are the functions that the model is told of, in OpenAI's form.
        Raises TemplateFault where the model has no template or the template refuses the messages,
        InvalidRequest where a variable is not for the client to say, and LimitReached where too
        many of the caller's conversations wait for it.
        """
        if variables:
            self._check_variables(variables)
        turns = self.syntax.for_template(messages, tools)
        # As transformers has it where there are none.
        told = {**variables, "tools": list(tools) if tools and self._reads_tools else None}
        if ending is Ending.CONTINUING:
            text = await self._render_continued(turns, told, caller=caller)
        else:
            text = await self._render(turns, told, caller=caller, asks=ending is Ending.ASKING)
        return await self._encode(text, add_special_tokens=False)

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        taken = variables.keys() & (OWN_VARIABLES | self._special_tokens.keys())
        if taken:
            raise InvalidRequest(
                f"'chat_template_kwargs' may not say '{min(taken)}': leave it out.",
                param="chat_template_kwargs",
            )

    async def _render_continued(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *, caller: str
    ) -> str:
        """Up to the end of what the last message says.

        The place is found by a mark that nobody can know; the space behind it shows whether the
        template takes spaces off the ends of messages, as it would of the message without a mark.
        """
        mark = secrets.token_hex(16)
        *before, last = messages
        marked = {**last, "content": f"{last['content']}{mark} "}
        text = await self._render([*before, marked], variables, caller=caller, asks=False)
        said, found, rest = text.rpartition(mark)
        if not found:
            raise TemplateFault(
                "The chat template does not end with what the last message says, so it cannot be"
                " continued.",
                param="continue_final_message",
            )
        return said if rest.startswith(" ") else said.rstrip()

    async def encode_text(self, text: str) -> list[int]:
        """Encode a bare prompt the way that the model's tokenizer does by default."""
        return await self._encode(text, add_special_tokens=True)

    async def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        extra: Mapping[str, Any],
        *,
        caller: str,
        asks: bool,
    ) -> str:
        variables = {
            **extra,
            "messages": messages,
            "add_generation_prompt": asks,
            **self._special_tokens,
        }
        if self._templates is not None and self._own_template is not None:
            return await self._templates.render(self._own_template, variables, caller=caller)
        if self._template is None:
            raise TemplateFault("This model has no chat template: use /v1/completions.")
        try:
            return chat_template.render(self._template, variables)
        except chat_template.FAULTS as error:
            raise TemplateFault(
                f"The chat template refused the messages: {error}", param="messages"
            ) from error

    async def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        def encode() -> list[int]:
            # Of a batch, because encoding a single text keeps the interpreter's lock: a long
            # prompt would stop every other request for its half second per million characters.
            [encoding] = self._tokenizer.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
            ids: list[int] = encoding.ids
            return ids

        try:
            return await asyncio.to_thread(encode) if len(text) > LONG_TEXT_CHARACTERS else encode()
        except Exception as error:  # the library raises no narrower one
            raise InvalidRequest(f"The model's tokenizer refused the prompt: {error}") from error

    async def encode_texts(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """As `encode_text`, one after another; others have their turn between them."""
        found, num_characters = [], 0
        for text in texts:
            found.append(await self._encode(text, add_special_tokens=add_special_tokens))
            num_characters += len(text)
            if num_characters > LONG_TEXT_CHARACTERS:
                num_characters = 0
                await asyncio.sleep(0)
        return found

    async def spell(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens, special ones as they are written.

        Raises InvalidRequest for an id that the model does not have.
        """
        num_ids = max(self.vocab_size, self._tokenizer.get_vocab_size())
        for place, token_id in enumerate(token_ids):
            if token_id >= num_ids:
                raise InvalidRequest(
                    f"'tokens[{place}]' is {token_id}; this model's ids go to {num_ids - 1}.",
                    param="tokens",
                )

        def decode() -> str:
            # As in `_encode`.
            [text] = self._tokenizer.decode_batch([list(token_ids)], skip_special_tokens=False)
            return str(text)

        is_long = len(token_ids) > LONG_TEXT_CHARACTERS
        return await asyncio.to_thread(decode) if is_long else decode()

    def token_symbols(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as its vocabulary writes it."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    def decode(self, token_ids: Sequence[int], *, shows_special_tokens: bool = False) -> str:
        """The text of an answer."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=not shows_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """One token within a text, for log-probabilities; half a character shows as U+FFFD."""
        return self._text_of(token_id)

    def _find_text(self, token_id: int) -> str:
        # Some decoders take a space from the first token: the second of two equal ones has its own.
        once, twice = (
            self._tokenizer.decode([token_id] * times, skip_special_tokens=False)
            for times in (1, 2)
        )
        text: str = twice[len(once) :]
        return text

    def token_bytes(self, token_id: int) -> list[int]:
        """The UTF-8 bytes of one token, exact for vocabularies of bytes."""
        text = self.token_text(token_id)
        if REPLACEMENT in text:
            symbols = self._tokenizer.id_to_token(token_id) or ""
            if byte := _BYTE_TOKEN.fullmatch(symbols):
                return [int(byte[1], 16)]
            if all(symbol in _BYTE_OF_SYMBOL for symbol in symbols):
                return [_BYTE_OF_SYMBOL[symbol] for symbol in symbols]
        return list(text.encode())

    def stream(
        self,
        stops: Sequence[str] = (),
        *,
        after: Sequence[int] = (),
        shows_special_tokens: bool = False,
        shows_marks: bool = False,
    ) -> "TextStream":
        """`after`: the last tokens of a text that the answer continues; none of an answer that
        begins one. The marks of calls and thoughts are shown with all special tokens, or alone."""
        # A client that encodes its prompt itself may name any number.
        known = [token_id for token_id in after if token_id < self.vocab_size]
        before = self._last_whole(known)
        if shows_marks and not shows_special_tokens:
            return MarkedTextStream(self, self._tokenizer, stops, after=before, marks=self._marks)
        return TextStream(
            self,
            self._tokenizer,
            stops,
            after=before,
            shows_special_tokens=shows_special_tokens,
        )

    def thinking_after(self, prompt_ids: Sequence[int]) -> reasoning.Thinking:
        """Whether an answer to this conversation begins with thoughts."""
        if not self._thinks:
            return "never"
        end: str = self._tokenizer.decode(prompt_ids[-TOKENS_OF_MARK:], skip_special_tokens=False)
        return reasoning.at_end_of(end)

    @property
    def mark_token_ids(self) -> dict[str, int]:
        """The marks of calls and thoughts that are single tokens."""
        return {mark: token_id for token_id, mark in self._marks.items()}

    def _last_whole(self, token_ids: Sequence[int]) -> Sequence[int]:
        """The shortest end that is whole characters."""
        starts = range(len(token_ids) - 1, -1, -1)
        ends = (token_ids[start:] for start in starts)
        return next((end for end in ends if REPLACEMENT not in self.decode(end)), ())


# How SentencePiece writes the token of a single byte.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_of_symbol() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE writes for bytes (GPT-2's table), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + offset): byte for offset, byte in enumerate(rest)}


_BYTE_OF_SYMBOL = _byte_of_symbol()


class TextStream:
    """One answer as it grows: whole characters only, nothing of a stop string ever shown."""

    def __init__(
        self,
        codec: TextCodec,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        *,
        after: Sequence[int],
        shows_special_tokens: bool,
    ) -> None:
        self._codec = codec
        self._tokenizer = tokenizer
        self._shows_special_tokens = shows_special_tokens
        self._decoder = DecodeStream(skip_special_tokens=not shows_special_tokens)
        # Whether the first token keeps its space depends on what was before it.
        for token_id in after:
            self._decoder.step(tokenizer, token_id)
        self._stops = tuple(stops)
        self._token_ids: list[int] = []
        # How many of these gave the text so far.
        self._num_decoded = 0
        # Decoded so far, and how much of it was handed out.
        self._text = ""
        self._shown = 0
        self.is_stopped = False

    def feed(self, token_id: int) -> str:
        """Take one token; return the text that it makes certain. Sets `is_stopped` at a stop."""
        self._token_ids.append(token_id)
        try:
            piece = self._decoder.step(self._tokenizer, token_id)
        except Exception:  # the library raises no narrower one
            piece = self._decode_broken(token_id)
        if not piece:
            return ""
        self._num_decoded = len(self._token_ids)
        self._text += piece
        if not self._stops:
            self._shown = len(self._text)
            return piece
        return self._advance(len(piece))

    def finish(self) -> str:
        """The rest: text held back for a stop that did not come, and broken characters."""
        if self.is_stopped:
            return ""
        whole = self._decode(self._token_ids)
        if not whole.startswith(self._text):
            whole = self._text + self._decode(self._token_ids[self._num_decoded :])
        self._text = whole
        rest, self._shown = self._text[self._shown :], len(self._text)
        return rest

    def _decode_broken(self, token_id: int) -> str:
        """The text of bytes that are no character, where they change what others were before.

        Vocabularies with a token for each byte decode a run of bytes as a whole: a letter that was
        shown already is none any more when a byte behind it breaks the run. It stays as shown.
        """
        self._decoder = DecodeStream(skip_special_tokens=not self._shows_special_tokens)
        # The next token's text depends on the one before it.
        self._decoder.step(self._tokenizer, token_id)
        return self._decode(self._token_ids[self._num_decoded :])

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._codec.decode(token_ids, shows_special_tokens=self._shows_special_tokens)

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


class MarkedTextStream(TextStream):
    """The same, where some special tokens are text too."""

    def __init__(
        self,
        codec: TextCodec,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        *,
        after: Sequence[int],
        marks: Mapping[int, str],
    ) -> None:
        super().__init__(codec, tokenizer, stops, after=after, shows_special_tokens=False)
        self._marks = marks

    def feed(self, token_id: int) -> str:
        mark = self._marks.get(token_id)
        if mark is None:
            return super().feed(token_id)
        if broken := self._codec.decode(self._token_ids[self._num_decoded :]):
            self._decoder = DecodeStream(skip_special_tokens=True)
        self._token_ids.append(token_id)
        self._num_decoded = len(self._token_ids)
        self._text += broken + mark
        return self._advance(len(broken) + len(mark))


def _tokens_of(tokenizer: Tokenizer, marks: Iterable[str]) -> dict[int, str]:
    """The marks for which the tokenizer has a token, by its id."""
    found = ((tokenizer.token_to_id(mark), mark) for mark in marks)
    return {token_id: mark for token_id, mark in found if token_id is not None}


def _load_tokenizer(tokenizer_json: bytes) -> Tokenizer:
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class TextCodecs:
    """The codecs in use, by bundle digest; the least used leave memory first."""

    def __init__(
        self,
        store: ArtifactStore,
        *,
        templates: Templates,
        max_codecs: int = 64,
        tool_call_parser: str | None = None,
    ) -> None:
        """`tool_call_parser` names how all models call functions; None leaves it to templates."""
        self._store = store
        self._tool_call_parser = tool_call_parser
        self._templates = templates
        self._max_codecs = max_codecs
        # By (digest, whether it is an adapter's own).
        self._codecs: OrderedDict[tuple[str, bool], asyncio.Task[TextCodec]] = OrderedDict()
        # By SHA-256: an adapter that brings only a template shares its base model's tokenizer.
        self._tokenizers: WeakValueDictionary[bytes, Tokenizer] = WeakValueDictionary()

    async def get(self, digest: str, *, base: str) -> TextCodec:
        """Return the codec of a bundle, reading it from the store at its first use.

        `base` is the digest of the base model's own. Raises ArtifactMissing where the store has no
        such bundle.
        """
        key = (digest, digest != base)
        task = self._codecs.get(key)
        if task is not None and task.done() and not task.cancelled() and not task.exception():
            self._codecs.move_to_end(key)
            return task.result()
        if task is None or task.done():
            task = asyncio.create_task(self._load(digest, is_own=digest != base))
            self._codecs[key] = task
            self._forget(self._codecs.keys())
        self._codecs.move_to_end(key)
        return await asyncio.shield(task)

    async def _load(self, digest: str, *, is_own: bool) -> TextCodec:
        bundle = await self._store.get_bundle(digest)
        return await asyncio.to_thread(self._make, bundle, is_own=is_own)

    def _make(self, bundle: TextBundle, *, is_own: bool) -> TextCodec:
        content = hashlib.sha256(bundle.tokenizer_json).digest()
        tokenizer = self._tokenizers.get(content) or _load_tokenizer(bundle.tokenizer_json)
        self._tokenizers[content] = tokenizer
        return TextCodec(
            bundle,
            templates=self._templates if is_own else None,
            tokenizer=tokenizer,
            tool_call_parser=self._tool_call_parser,
        )

    def _forget(self, keys: Iterable[tuple[str, bool]]) -> None:
        for key in list(keys)[: -self._max_codecs]:
            del self._codecs[key]
