"""Match regular expressions that strangers wrote, in bounded time, as Python would.

RE2 does the matching, because Python's own engine can be made to backtrack for years. Python's
reads each expression too: served is what both accept and read alike. Look-around, back-references
and possessive repeats are refused. Module paths are printable ASCII; no other text matches.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from adapters.errors import Finding, InvalidAdapter

MAX_LENGTH = 4096
# For a program of 4096 instructions and the states that RE2 remembers of it.
MAX_MEMORY_BYTES = 256 << 10
# A table with more is named module by module, and then its names should be escaped.
MAX_TABLE_PATTERNS = 1024
# Instructions times characters: some 10 ns each at the worst, where no state is ever met again.
MAX_WORK = 300_000_000
# What it costs to ask RE2 at all, in the same unit.
_WORK_PER_TRY = 500

# Where the engines differ or may: letters beyond ASCII have cases and kinds; other escapes are
# octal, back-references or foreign to one engine; `{,3}` and `{03}` repeat in Python alone;
# `[:alpha:]` is a class in RE2 alone; Python means to read the rest as set operators one day.
_UNCLEAR = re.compile(
    r"[^ -~]|\\(?![dDsSwWbA])[A-Za-z0-9]|\{(?!(?:0|[1-9]\d*)(?:,(?:0|[1-9]\d*)?)?\})"
    r"|\[\^?\[|\[:|--|&&|~~|\|\|"
)
# What `re.escape` makes of a module's path.
_LITERAL = re.compile(r"(?:[A-Za-z0-9_]|\\[.\-])*")

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


class _Budget:
    """The work that one field of a configuration may cause."""

    def __init__(self, field: str) -> None:
        self._field = field
        self._work_left = MAX_WORK

    def spend(self, work: int) -> None:
        self._work_left -= work
        if self._work_left < 0:
            raise PatternRefused(self._field, problem="matching it against all modules is too much")


class Pattern:
    """One regular expression of a configuration; `field` names it in refusals.

    With `is_tail` it may also match after any dot, as `(.*\\.)?(source)$` does. Raises
    PatternRefused when made, and from `matches` when its budget, perhaps shared, is spent.
    """

    def __init__(
        self, source: str, *, field: str, is_tail: bool = False, budget: _Budget | None = None
    ) -> None:
        self._budget = budget or _Budget(field)
        self._compiled = _compile(source, field=field)
        if is_tail:
            # Only now: a source that closes a group it did not open must not borrow ours.
            self._compiled = _compile(rf"(.*\.)?({source})$", field=field)

    def matches(self, text: str) -> bool:
        """Whether the whole text matches."""
        self._budget.spend(self._compiled.programsize * len(text) + _WORK_PER_TRY)
        if not (text.isascii() and text.isprintable()):
            return False
        return self._compiled.fullmatch(text.encode()) is not None


def _compile(source: str, *, field: str) -> Any:
    # Only here: an engine reads configurations that name every module, and runs without RE2.
    import re2

    if len(source) > MAX_LENGTH:
        raise PatternRefused(field, problem="the regular expression is too long")
    if unclear := _UNCLEAR.search(source):
        place = f"{unclear.group()!r} at character {unclear.start()}"
        raise PatternRefused(field, problem=f"the regular expression is unclear: {place}")
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.max_mem = MAX_MEMORY_BYTES
    options.never_capture = True
    options.log_errors = False
    try:
        compiled = re2.compile(source.encode(), options)
        re.compile(source)
    except (re2.error, re.error, RecursionError) as error:
        why = error.args[0].decode() if isinstance(error, re2.error) else error
        raise PatternRefused(
            field, problem=f"the regular expression is not served: {why}"
        ) from error
    return compiled


class PatternTable(Generic[Value]):
    """Values by pattern, where the first that matches the tail of a path decides.

    Patterns that are nothing but an escaped name are looked up, so a table that names every module
    costs no more than a small one. Raises PatternRefused, when made and from `find`.
    """

    def __init__(self, entries: Iterable[tuple[str, Value]], *, field: str) -> None:
        budget = _Budget(field)
        self._literals: dict[str, tuple[int, Value]] = {}
        self._patterns: list[tuple[int, Pattern, Value]] = []
        for place, (source, value) in enumerate(entries):
            if _LITERAL.fullmatch(source):
                self._literals.setdefault(source.replace("\\", ""), (place, value))
                continue
            if len(self._patterns) == MAX_TABLE_PATTERNS:
                raise PatternRefused(field, problem="has too many regular expressions")
            pattern = Pattern(source, field=field, is_tail=True, budget=budget)
            self._patterns.append((place, pattern, value))

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
            if pattern.matches(path):
                return value
        return first[1] if first else None


class Ends:
    """Names that a path may end with, in the middle of a word too, as `str.endswith` takes them.

    A stranger's list may be long: finding costs one look for each length of a name.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self._lengths = sorted({len(name) for name in self.names}, reverse=True)

    def find(self, path: str) -> str | None:
        """Return the longest of the names that the path ends with, None where there is none."""
        ends = (path[-length:] for length in self._lengths if 0 < length <= len(path))
        return next((end for end in ends if end in self.names), None)


def tails(path: str) -> Iterator[str]:
    """Yield the path and what follows each of its dots: what a module may be called by."""
    yield path
    for place, char in enumerate(path):
        if char == ".":
            yield path[place + 1 :]
