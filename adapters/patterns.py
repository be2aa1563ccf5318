"""Match regular expressions that strangers wrote, in bounded time.

PEFT configurations carry regular expressions; Python's own engine can be made to backtrack for
years by a short one. Here the same syntax runs as a set of states that moves over the text once
(Thompson, "Regular expression search algorithm", 1968) with the moves remembered, and each pattern
may spend a fixed number of steps. What needs backtracking (look-around, back-references,
possessive repeats, flags) is refused.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from adapters.errors import Finding, InvalidAdapter

MAX_LENGTH = 4096
MAX_INSTRUCTIONS = 8192
MAX_DEPTH = 32
# About a second of Python; the patterns of real adapters need a few thousand.
MAX_STEPS = 1_000_000

# What a table of patterns may hold and spend; one for each module of a large model is a tenth.
MAX_TABLE_LENGTH = 128 << 10
MAX_TABLE_TRIES = 2_000_000

# Without alternation and repetition nothing can backtrack, so Python's engine is safe and quicker.
_PLAIN = re.compile(r"(?:[A-Za-z0-9_.-]|\\[.\-_])*")
# What `re.escape` makes of a module's path.
_LITERAL = re.compile(r"(?:[A-Za-z0-9_]|\\[.\-])*")
_REPEAT = re.compile(r"\{(\d{0,4})(,?)(\d{0,4})\}")
_OPEN_GROUP = re.compile(r"\(\?P<[A-Za-z_]\w*>|\(\?:|\((?!\?)")
_CLASS = re.compile(r"\[\^?\]?(?:[^\]\\\[]|\\.)*\]", re.DOTALL)
_AMBIGUOUS_IN_CLASS = ("--", "&&", "~~", "||")


Value = TypeVar("Value")


class PatternRefused(InvalidAdapter):
    """A regular expression of the adapter's configuration cannot be used."""

    def __init__(self, field: str, *, problem: str) -> None:
        finding = Finding(
            code="pattern_refused",
            where=field,
            message=problem,
            fix="list the module names instead of describing them with a regular expression",
        )
        super().__init__([finding])


@dataclass(frozen=True, slots=True)
class _Consume:
    accepts: Callable[[str], object]
    then: int


@dataclass(frozen=True, slots=True)
class _Fork:
    then: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Assert:
    kind: Literal["start", "end", "boundary"]
    then: int


_Instruction = _Consume | _Fork | _Assert
# Takes where to go on and returns where to begin.
_Node = Callable[["_Program", int], int]
_ACCEPT = 0


class _Program:
    """Instructions under construction, last first: each knows the place of the next."""

    def __init__(self, field: str) -> None:
        self.field = field
        self.instructions: list[_Instruction] = [_Fork(())]
        self.num_copies = 0

    def copy(self, body: "_Node", *, then: int) -> int:
        """Build one turn of a repeat; counted, because an empty body costs no instruction."""
        self.num_copies += 1
        if self.num_copies > MAX_INSTRUCTIONS:
            raise PatternRefused(self.field, problem="the regular expression is too large")
        return body(self, then)

    def add(self, instruction: _Instruction) -> int:
        if len(self.instructions) >= MAX_INSTRUCTIONS:
            raise PatternRefused(self.field, problem="the regular expression is too large")
        self.instructions.append(instruction)
        return len(self.instructions) - 1

    def add_loop(self, body: _Node, *, then: int) -> int:
        fork = self.add(_Fork(()))
        self.instructions[fork] = _Fork((body(self, fork), then))
        return fork


class _Parser:
    """Recursive descent over the syntax of Python's `re`, less what is refused."""

    def __init__(self, source: str, *, field: str) -> None:
        self.source = source
        self.field = field
        self.place = 0
        self.depth = 0

    def refuse(self, what: str) -> PatternRefused:
        return PatternRefused(
            self.field, problem=f"the regular expression {what} at character {self.place}"
        )

    def parse(self) -> _Node:
        node = self.alternatives()
        if self.place < len(self.source):
            raise self.refuse("has an unopened ')'")
        return node

    def alternatives(self) -> _Node:
        options = [self.sequence()]
        while self.peek() == "|":
            self.place += 1
            options.append(self.sequence())
        if len(options) == 1:
            return options[0]
        return lambda program, then: program.add(
            _Fork(tuple(option(program, then) for option in options))
        )

    def sequence(self) -> _Node:
        parts: list[_Node] = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.repeated())
        return lambda program, then: _chain(parts, program, then)

    def repeated(self) -> _Node:
        is_assertion = self.peek() in ("^", "$") or self.source.startswith(
            (r"\b", r"\A", r"\Z"), self.place
        )
        atom = self.atom()
        bounds = self.bounds()
        if bounds is None:
            return atom
        if is_assertion:
            raise self.refuse("repeats an anchor")
        if self.peek() == "+":
            raise self.refuse("has a possessive repeat")
        if self.peek() == "?":
            self.place += 1
        if self.bounds() is not None:
            raise self.refuse("has a repeat of a repeat")
        return _repeat(atom, *bounds)

    def bounds(self) -> tuple[int, int | None] | None:
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if self.peek() in simple:
            self.place += 1
            return simple[self.source[self.place - 1]]
        match = _REPEAT.match(self.source, self.place)
        if match is None or match.group() in ("{}", "{,}"):
            return None
        self.place = match.end()
        least, comma, most = match.groups()
        if not comma:
            if not least or most:
                raise self.refuse("has an unclear repeat")
            return int(least), int(least)
        if most and int(most) < int(least or 0):
            raise self.refuse("has a repeat whose bounds are crossed")
        return int(least or 0), int(most) if most else None

    def atom(self) -> _Node:
        char = self.peek()
        if char == "(":
            return self.group()
        if char == "[":
            return self.char_class()
        if char == "\\":
            return self.escape()
        if char in "*+?":
            raise self.refuse("repeats nothing")
        if _REPEAT.match(self.source, self.place):
            raise self.refuse("has a brace that should be escaped")
        self.place += 1
        if char == ".":
            return _consume(lambda found: found != "\n")
        if char in "^$":
            return _anchor("start" if char == "^" else "end")
        return _literal(char)

    def group(self) -> _Node:
        opening = _OPEN_GROUP.match(self.source, self.place)
        if opening is None:
            raise self.refuse("has a group of a kind that is not supported")
        self.place = opening.end()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.refuse("is nested too deeply")
        node = self.alternatives()
        self.depth -= 1
        if self.peek() != ")":
            raise self.refuse("has an unclosed '('")
        self.place += 1
        return node

    def char_class(self) -> _Node:
        match = _CLASS.match(self.source, self.place)
        if match is None or any(sign in match.group() for sign in _AMBIGUOUS_IN_CLASS):
            raise self.refuse("has a character class that is not supported")
        try:
            accepts = re.compile(match.group()).fullmatch
        except re.error as error:
            raise self.refuse("has a malformed character class") from error
        self.place = match.end()
        return _consume(accepts)

    def escape(self) -> _Node:
        letter = self.source[self.place + 1 : self.place + 2]
        if letter in ("b", "A", "Z"):
            self.place += 2
            return _anchor({"A": "start", "Z": "end"}.get(letter, "boundary"))
        if letter and letter in "dDsSwW":
            self.place += 2
            return _consume(re.compile("\\" + letter).fullmatch)
        if not letter or letter.isalnum():
            raise self.refuse("has an escape that is not supported")
        self.place += 2
        return _literal(letter)

    def peek(self) -> str:
        return self.source[self.place : self.place + 1]


def _literal(char: str) -> _Node:
    return _consume(lambda found: found == char)


def _consume(accepts: Callable[[str], object]) -> _Node:
    return lambda program, then: program.add(_Consume(accepts, then))


def _anchor(kind: str) -> _Node:
    if kind == "start":
        return lambda program, then: program.add(_Assert("start", then))
    if kind == "end":
        return lambda program, then: program.add(_Assert("end", then))
    return lambda program, then: program.add(_Assert("boundary", then))


def _chain(parts: list[_Node], program: _Program, then: int) -> int:
    for part in reversed(parts):
        then = part(program, then)
    return then


def _repeat(body: _Node, least: int, most: int | None) -> _Node:
    def build(program: _Program, then: int) -> int:
        if most is None:
            then = program.add_loop(body, then=then)
        else:
            end = then
            for _ in range(most - least):
                then = program.add(_Fork((program.copy(body, then=then), end)))
        for _ in range(least):
            then = program.copy(body, then=then)
        return then

    return build


class Pattern:
    """One regular expression of a configuration; `field` names it in refusals.

    With `is_tail` it may also match after any dot, as `(.*\\.)?(source)` does. Raises
    PatternRefused when made, and from `matches` when its steps are spent.
    """

    def __init__(self, source: str, *, field: str, is_tail: bool = False) -> None:
        self._field = field
        self._steps_left = MAX_STEPS
        self._moves: dict[tuple[frozenset[int], str, str], frozenset[int]] = {}
        self._plain: re.Pattern[str] | None = None
        if len(source) > MAX_LENGTH:
            raise PatternRefused(field, problem="the regular expression is too long")
        whole = rf"(.*\.)?({source})" if is_tail else source
        if _PLAIN.fullmatch(source):
            self._plain = re.compile(whole)
            return
        # Alone first: a source that closes a group it did not open must not borrow ours.
        _Parser(source, field=field).parse()
        program = _Program(field)
        self._start = frozenset((_Parser(whole, field=field).parse()(program, _ACCEPT),))
        self._instructions = program.instructions

    def matches(self, text: str) -> bool:
        """Whether the whole text matches."""
        if self._plain is not None:
            return self._plain.fullmatch(text) is not None
        states, before = self._start, ""
        for char in text:
            states, before = self._move(states, before, char), char
            if not states:
                return False
        return _ACCEPT in self._move(states, before, "")

    def _move(self, states: frozenset[int], before: str, char: str) -> frozenset[int]:
        """States after `char`; at the end of the text, where `char` is empty, the states held."""
        key = (states, _kind(before), char)
        found = self._moves.get(key)
        if found is None:
            held = self._follow(states, before, char)
            found = frozenset(self._consume(held, char) if char else held)
            self._moves[key] = found
        return found

    def _follow(self, states: frozenset[int], before: str, after: str) -> set[int]:
        """All states reachable without consuming, between these two characters."""
        held, waiting = set(states), list(states)
        while waiting:
            self._spend()
            for place in _free_moves(self._instructions[waiting.pop()], before, after):
                if place not in held:
                    held.add(place)
                    waiting.append(place)
        return held

    def _consume(self, held: set[int], char: str) -> Iterator[int]:
        for place in held:
            self._spend()
            instruction = self._instructions[place]
            if isinstance(instruction, _Consume) and instruction.accepts(char):
                yield instruction.then

    def _spend(self) -> None:
        self._steps_left -= 1
        if self._steps_left < 0:
            raise PatternRefused(self._field, problem="the regular expression is too expensive")


class PatternTable(Generic[Value]):
    """Values by pattern, where the first that matches the tail of a path decides.

    Patterns that are nothing but an escaped name are looked up, so a table that names every module
    costs no more than a small one. Raises PatternRefused, when made and from `find`.
    """

    def __init__(self, entries: Iterable[tuple[str, Value]], *, field: str) -> None:
        self._field = field
        self._tries_left = MAX_TABLE_TRIES
        self._literals: dict[str, tuple[int, Value]] = {}
        self._patterns: list[tuple[int, Pattern, Value]] = []
        left = MAX_TABLE_LENGTH
        for place, (source, value) in enumerate(entries):
            if _LITERAL.fullmatch(source):
                self._literals.setdefault(source.replace("\\", ""), (place, value))
                continue
            left -= len(source)
            if left < 0:
                raise PatternRefused(field, problem="its regular expressions are too long together")
            self._patterns.append((place, Pattern(source, field=field, is_tail=True), value))

    @property
    def is_literal(self) -> bool:
        """Whether it names modules, and describes none by a regular expression."""
        return not self._patterns

    def find(self, path: str) -> Value | None:
        """Return the value for a module's path, None where nothing matches."""
        named = [self._literals[tail] for tail in tails(path) if tail in self._literals]
        first = min(named, key=lambda entry: entry[0], default=None)
        for place, pattern, value in self._patterns:
            if first and place > first[0]:
                break
            self._tries_left -= 1
            if self._tries_left < 0:
                raise PatternRefused(self._field, problem="has too many patterns")
            if pattern.matches(path):
                return value
        return first[1] if first else None


def tails(path: str) -> Iterator[str]:
    """Yield the path and what follows each of its dots: what a module may be called by."""
    yield path
    for place, char in enumerate(path):
        if char == ".":
            yield path[place + 1 :]


def _free_moves(instruction: _Instruction, before: str, after: str) -> tuple[int, ...]:
    if isinstance(instruction, _Fork):
        return instruction.then
    if isinstance(instruction, _Assert) and _holds(instruction.kind, before, after):
        return (instruction.then,)
    return ()


def _holds(kind: str, before: str, after: str) -> bool:
    if kind == "start":
        return not before
    if kind == "end":
        return not after
    return (_kind(before) == "word") != (_kind(after) == "word")


def _kind(char: str) -> str:
    if not char:
        return "none"
    return "word" if char == "_" or char.isalnum() else "other"
