"""An answer's characters as they come, and what was made of them.

What reads them is written as generators that take one character at a time: so it does not matter
how the text falls into steps, and a reader looks like the grammar that it reads. Whatever turns
out to be no call is given back as words.
"""

import secrets
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from gateway.tools.pieces import Arguments, CallBegins, Piece, Thought, Withdrawn, Words

T = TypeVar("T")
# Takes characters, "" at the end of the answer, until it has read a T.
Reading = Generator[None, str, T]

BLANKS = " \t\r\n"


class NotACall(Exception):
    """What was read up to here is no call."""


class Denied(Exception):
    """A call's arguments have what may not be said."""


def make_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class Characters:
    """Mutable: the place in an answer, and its pieces up to there."""

    def __init__(
        self,
        names: frozenset[str],
        *,
        allows: Callable[[str], bool] | None = None,
        make_id: Callable[[], str] = make_id,
    ) -> None:
        """`allows` says whether arguments may be told; they wait for it until they are whole."""
        self.names = names
        self.allows = allows
        self.pieces: list[Piece] = []
        # Set before the end is told: the answer ends where the model would have gone on.
        self.is_cut = False
        # Those that stand.
        self.num_calls = 0
        # No two calls have one, also where the first is taken back.
        self._next_index = 0
        self._make_id = make_id
        self._is_ended = False
        # Given back, to be taken again.
        self._back = ""
        # Blanks that are words only where words follow.
        self._blanks = ""
        # What was taken since something began that may be a call; None where nothing did.
        self._attempt: list[str] | None = None
        # The call that began and is not whole.
        self._open: int | None = None

    @property
    def has_calls(self) -> bool:
        return self.num_calls > 0

    def take(self) -> Reading[str]:
        """The next character; "" at the end, as often as asked."""
        if self._back:
            character, self._back = self._back[0], self._back[1:]
        elif self._is_ended:
            return ""
        else:
            character = yield
            self._is_ended = character == ""
        if self._attempt is not None and character:
            self._attempt.append(character)
        return character

    def give_back(self, text: str) -> None:
        """`text` are the last characters that were taken."""
        self._back = text + self._back
        if self._attempt is not None and text:
            del self._attempt[-len(text) :]

    def skip_blanks(self, blanks: str = BLANKS) -> Reading[str]:
        """Take blanks; return them."""
        skipped = ""
        while (character := (yield from self.take())) and character in blanks:
            skipped += character
        self.give_back(character)
        return skipped

    def expect(self, text: str) -> Reading[None]:
        """Raises NotACall where something else comes."""
        for wanted in text:
            if (yield from self.take()) != wanted:
                raise NotACall

    def find(self, *texts: str) -> Reading[str]:
        """Take the one of these that comes now; take nothing and return "" where none does."""
        taken = ""
        while any(text.startswith(taken) for text in texts):
            if taken in texts:
                return taken
            character = yield from self.take()
            taken += character
            if not character:
                break
        self.give_back(taken)
        return ""

    def show_until(self, marks: Sequence[str], show: Callable[[str], None]) -> Reading[str]:
        """Show text up to the first of these marks; return the mark, "" at the end."""
        held = ""
        while character := (yield from self.take()):
            held += character
            if held in marks:
                return held
            while held and not any(mark.startswith(held) for mark in marks):
                show(held[0])
                held = held[1:]
        show(held)
        return ""

    def show(self, text: str) -> None:
        """Words; blanks at their end wait for others."""
        end = len(text.rstrip(BLANKS))
        if end:
            self.pieces.append(Words(self._blanks + text[:end]))
            self._blanks = ""
        self._blanks += text[end:]

    def show_thought(self, text: str) -> None:
        self.pieces.append(Thought(text))

    def end(self) -> None:
        """Blanks at the end belong to an answer in words, and to no calls."""
        if self._blanks and not self.has_calls:
            self.pieces.append(Words(self._blanks))
        self._blanks = ""

    def attempt(self, reading: Reading[None], *, mark: str = "") -> Reading[bool]:
        """Read what may be calls, of which `mark` was taken; tells whether it was.

        What is none is shown, and the character that told so is taken again.
        """
        self._attempt = list(mark)
        try:
            yield from reading
        except NotACall:
            self._withdraw()
            return False
        finally:
            self._attempt = None
        return True

    def begin_call(self, name: str) -> int:
        """Tell that there is a call; return its number."""
        index = self._open = self._next_index
        self._next_index += 1
        self.num_calls += 1
        self.pieces.append(CallBegins(index, self._make_id(), name))
        return index

    def tell_arguments(self, index: int, text: str) -> None:
        self.pieces.append(Arguments(index, text))

    def end_call(self) -> None:
        """The call is whole: nothing takes it back any more."""
        assert self._attempt is not None, "calls are read as attempts"
        self._open = None
        self._attempt.clear()

    def _withdraw(self) -> None:
        """Where an answer was cut within a call, what was told of the call stays."""
        assert self._attempt is not None, "only attempts fail"
        if self._open is not None and self.is_cut and self._is_ended:
            return
        if self._attempt and not self._is_ended:
            self.give_back(self._attempt[-1])
        text = "".join(self._attempt)
        if self._open is None:
            self.show(text)
            return
        self.pieces.append(Withdrawn(self._open, self._blanks + text))
        self._blanks, self._open = "", None
        self.num_calls -= 1
