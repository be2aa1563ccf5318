"""Thoughts before an answer, between `<think>` and `</think>`, as DeepSeek-R1 and Qwen3 write them.

Some templates write the first mark themselves, so that an answer begins within its thoughts.
"""

import re
from typing import Literal, Protocol

from gateway.tools.characters import BLANKS, Characters, Reading

BEGINS = "<think>"
ENDS = "</think>"
MARKS = (BEGINS, ENDS)

# Whether an answer thinks: it has begun to with its prompt, or it may begin with it.
Thinking = Literal["never", "may", "begun"]


def thinks(template: str) -> bool:
    """Whether the answers of this template's model have thoughts."""
    return ENDS in template


def at_end_of(prompt: str) -> Thinking:
    """What an answer does after the prompt of a template that `thinks`."""
    opened = prompt.rfind(BEGINS)
    is_open = opened >= 0 and re.fullmatch(rf"[{BLANKS}]*", prompt[opened + len(BEGINS) :])
    # Where the prompt closes the thoughts itself there are none.
    return "begun" if is_open else "never" if prompt.rstrip(BLANKS).endswith(ENDS) else "may"


def read_thoughts(source: Characters, thinking: Thinking) -> Reading[None]:
    """Tell thoughts, without the blanks around them; leaves the answer to be read."""
    if thinking == "may":
        blanks = yield from source.skip_blanks()
        if not (yield from source.find(BEGINS)):
            source.give_back(blanks)
            return
    yield from source.skip_blanks()
    held = _Held(source)
    if (yield from source.show_until((ENDS,), held.show)):
        yield from source.skip_blanks()


class _Held:
    """Mutable: thoughts whose last blanks are told only where thoughts follow."""

    def __init__(self, source: Characters) -> None:
        self._source = source
        self._blanks = ""

    def show(self, text: str) -> None:
        end = len(text.rstrip(BLANKS))
        if end:
            self._source.show_thought(self._blanks + text[:end])
            self._blanks = ""
        self._blanks += text[end:]


class Text(Protocol):
    """An answer's text as its tokens come; `gateway.text.TextStream` is one."""

    @property
    def is_stopped(self) -> bool: ...

    def feed(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class ThoughtCount:
    """Mutable: counts the tokens of thoughts, marks included. Stands where the text itself would.

    Closer to the tokens than whatever else reads the text, for policies hold text back.
    """

    def __init__(self, text: Text, thinking: Thinking) -> None:
        self._text = text
        self._thinking = thinking
        self._is_over = thinking == "never"
        # As much as may still be half a mark.
        self._tail = ""
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        return self._num_tokens if self._thinking == "begun" else 0

    @property
    def is_stopped(self) -> bool:
        return self._text.is_stopped

    def feed(self, token_id: int) -> str:
        shown = self._text.feed(token_id)
        if not self._is_over:
            self._num_tokens += 1
            self._look(shown)
        return shown

    def finish(self) -> str:
        return self._text.finish()

    def _look(self, shown: str) -> None:
        self._tail += shown
        if self._thinking == "may":
            begun = self._tail.lstrip(BLANKS)
            if begun.startswith(BEGINS):
                self._thinking = "begun"
            elif not BEGINS.startswith(begun):
                self._is_over = True
        if self._thinking == "begun":
            self._is_over = ENDS in self._tail
            self._tail = self._tail[-len(ENDS) :]
