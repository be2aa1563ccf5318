"""An answer under deny rules, while it grows.

The guarantee: of a match of at most `window_chars` characters nothing is sent, however the text
falls into steps. The answer ends with the first match that becomes certain, and all text before it
is sent. A longer match is caught too where it begins within what is held back when it becomes
certain; otherwise it may pass, and whoever needs it caught makes the window larger.

For this the last `window_chars` characters are held back, and a match counts once another character
follows it: whether a word or the text ends there cannot be seen before. At the end all is certain,
and what is held back is sent. Text is what the client would see: stop strings are cut off before.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from gateway.policies.patterns import Pattern


class Text(Protocol):
    """An answer's text as its tokens come; `gateway.text.TextStream` is one."""

    @property
    def is_stopped(self) -> bool: ...

    def feed(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class Window:
    """Mutable: the end of a growing text, held back until no rule can find anything in it."""

    def __init__(self, patterns: Sequence[Pattern], *, window_chars: int) -> None:
        self._patterns = tuple(patterns)
        self._window_chars = window_chars
        # The character before what is held back, for `\b` and `^`, and what is held back.
        self._text = ""
        self._num_shown = 0
        # The name of the rule that ended the text.
        self.hit: str | None = None

    def feed(self, text: str) -> str:
        """Take more of the text; return what may be sent."""
        if not text or self.hit is not None:
            return ""
        self._text += text
        found = [
            (match.start(), pattern.name)
            for pattern in self._patterns
            if (match := pattern.decided.search(self._text, self._num_shown))
        ]
        if found:
            return self._end(*min(found))
        return self._show(len(self._text) - self._window_chars)

    def finish(self) -> str:
        """The text is whole: return the rest of it that may be sent."""
        if self.hit is not None:
            return ""
        found = [
            (match.start(), pattern.name)
            for pattern in self._patterns
            if (match := pattern.whole.search(self._text, self._num_shown))
        ]
        if found:
            return self._end(*min(found))
        return self._show(len(self._text))

    def _end(self, place: int, name: str) -> str:
        self.hit = name
        return self._show(place)

    def _show(self, end: int) -> str:
        if end <= self._num_shown:
            return ""
        piece = self._text[self._num_shown : end]
        self._text, self._num_shown = self._text[end - 1 :], 1
        return piece


class Screen:
    """Mutable: an answer's text through a window. Stands where the text itself would."""

    def __init__(self, text: Text, window: Window, *, on_hit: Callable[[str], None]) -> None:
        self._text = text
        self._window = window
        self._on_hit = on_hit

    @property
    def is_refused(self) -> bool:
        return self._window.hit is not None

    @property
    def is_stopped(self) -> bool:
        return self.is_refused or self._text.is_stopped

    def feed(self, token_id: int) -> str:
        shown = self._window.feed(self._text.feed(token_id))
        if self._text.is_stopped:
            shown += self._window.finish()
        return self._told(shown)

    def finish(self) -> str:
        if self.is_stopped:
            return ""
        return self._told(self._window.feed(self._text.finish()) + self._window.finish())

    def _told(self, shown: str) -> str:
        if self._window.hit is not None:
            self._on_hit(self._window.hit)
        return shown
