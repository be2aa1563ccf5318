"""What an answer is made of, in the order in which it came, and the whole that it adds up to."""

from collections.abc import Iterable

import msgspec


class Words(msgspec.Struct, frozen=True):
    """Text for whoever reads the answer."""

    text: str


class Thought(msgspec.Struct, frozen=True):
    """What the model wrote before its answer, for itself."""

    text: str


class CallBegins(msgspec.Struct, frozen=True):
    """A call of a function that there is; its arguments follow."""

    index: int
    id: str
    name: str


class Arguments(msgspec.Struct, frozen=True):
    """More of a call's arguments; all of them together are a JSON object."""

    index: int
    text: str


class Withdrawn(msgspec.Struct, frozen=True):
    """A call that began and was none after all: words, with all that was told of it before."""

    index: int
    text: str


Piece = Words | Thought | CallBegins | Arguments | Withdrawn


class Call(msgspec.Struct, frozen=True):
    id: str
    name: str
    # JSON; whole unless the answer was cut.
    arguments: str


class Sum(msgspec.Struct, frozen=True):
    """A whole answer."""

    words: str
    thoughts: str
    calls: list[Call]


def add_up(pieces: Iterable[Piece]) -> Sum:
    words, thoughts = "", ""
    calls: dict[int, Call] = {}
    for piece in pieces:
        match piece:
            case Words(text):
                words += text
            case Thought(text):
                thoughts += text
            case CallBegins(index, name_id, name):
                calls[index] = Call(name_id, name, "")
            case Arguments(index, text):
                call = calls[index]
                calls[index] = Call(call.id, call.name, call.arguments + text)
            case Withdrawn(index, text):
                del calls[index]
                words += text
    return Sum(words, thoughts, list(calls.values()))


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same with neighbours of one kind made one."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        match last, piece:
            case Words(before), Words(text):
                found[-1] = Words(before + text)
            case Thought(before), Thought(text):
                found[-1] = Thought(before + text)
            case Arguments(index, before), Arguments(other, text) if index == other:
                found[-1] = Arguments(index, before + text)
            case _:
                found.append(piece)
    return found
