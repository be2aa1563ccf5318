"""An answer's text as it grows, read into words, thoughts and calls.

However the text falls into steps, the pieces add up to the same.
"""

from collections.abc import Callable

from gateway.tools.characters import Characters, Denied, Reading, make_id
from gateway.tools.pieces import Piece, joined
from gateway.tools.reasoning import Thinking, read_thoughts
from gateway.tools.syntaxes.syntax import Syntax


class Reader:
    """Mutable: one answer while it is read."""

    def __init__(
        self,
        syntax: Syntax | None,
        names: frozenset[str] = frozenset(),
        *,
        thinking: Thinking = "never",
        allows: Callable[[str], bool] | None = None,
        make_id: Callable[[], str] = make_id,
    ) -> None:
        """`syntax` is None where nothing may be called; `names` are the functions that may be.

        `allows` says whether what arguments say may be told; they are told whole then.
        """
        self._source = Characters(names, allows=allows, make_id=make_id)
        self._reading = _read(self._source, syntax, thinking)
        next(self._reading)
        self.is_refused = False
        self._is_ended = False

    @property
    def has_calls(self) -> bool:
        return self._source.has_calls

    def feed(self, text: str) -> list[Piece]:
        """Take more of the text; return what it makes certain. Sets `is_refused`."""
        for character in text:
            self._send(character)
        return self._told()

    def finish(self, *, is_cut: bool) -> list[Piece]:
        """The rest. `is_cut` where the model would have gone on."""
        self._source.is_cut = is_cut
        self._send("")
        return self._told()

    def _send(self, character: str) -> None:
        if self._is_ended:
            return
        try:
            self._reading.send(character)
        except StopIteration:
            self._is_ended = True
        except Denied:
            self._is_ended = self.is_refused = True

    def _told(self) -> list[Piece]:
        pieces = joined(self._source.pieces)
        self._source.pieces.clear()
        return pieces


def _read(source: Characters, syntax: Syntax | None, thinking: Thinking) -> Reading[None]:
    if thinking != "never":
        yield from read_thoughts(source, thinking)
    if syntax is None:
        yield from source.show_until((), source.show)
    else:
        yield from syntax.read(source)
    source.end()
