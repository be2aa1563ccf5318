"""What each family's file says of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from gateway.tools.characters import Characters, Reading
from gateway.tools.notation import Notation

Messages = Sequence[Mapping[str, Any]]
Definitions = Sequence[Mapping[str, Any]]


class Syntax(ABC):
    """How one family of models is told of functions, and how it calls them."""

    # As vLLM's `--tool-call-parser` names it.
    name: ClassVar[str]
    # What stands before or behind calls; some tokenizers have a token of its own for each.
    marks: ClassVar[tuple[str, ...]] = ()
    # Under which key the arguments of a call stand.
    arguments_key: ClassVar[str] = "arguments"

    @abstractmethod
    def is_spoken_in(self, template: str) -> bool:
        """Whether this chat template is of a model of the family."""

    @abstractmethod
    def read(self, source: Characters) -> Reading[None]:
        """An answer, to its end."""

    @abstractmethod
    def calls(self, notation: Notation) -> str:
        """The part of a grammar that is one call or, where there may be, several."""

    @abstractmethod
    def free(self, notation: Notation) -> str:
        """The part of a grammar that is words, with calls among them or instead of them."""

    def for_template(self, messages: Messages, definitions: Definitions) -> Messages:
        """The conversation as the template takes it, beside the definitions."""
        return messages


def read_bare(source: Characters, reading: Reading[None]) -> Reading[bool]:
    """Read calls that may begin an answer, without a mark; blanks before them are not words."""
    blanks = yield from source.skip_blanks()
    is_call = yield from source.attempt(reading, mark=blanks)
    return is_call
