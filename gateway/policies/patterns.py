"""Deny rules, compiled by RE2 and looked for in text.

RE2 takes time in proportion to the text, whatever the pattern; at its worst, for each character, in
proportion to the program too. So the programs are bounded: in memory each, and in size together.
Patterns see text as it was written: nothing is folded or normalised for them, and only `(?i)`,
`(?m)` and `(?s)` change what they mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import re2

from gateway.errors import InvalidPolicy
from gateway.policies.document import DenyRule

MAX_MEMORY_BYTES = 1 << 20
# Instructions of all input rules together: 4 ns for each and character were measured at worst.
MAX_INPUT_INSTRUCTIONS = 20_000
# Instructions of all output rules, times the characters of the window, which is searched after each
# token: 5 ms at worst, by patterns made for it; 3 µs were measured for a word, 35 for sixteen.
MAX_OUTPUT_WORK = 500_000
# A pattern that finds nothing in one of these, of no length, would find it everywhere.
PROBES = ("", "a", " a", "a ")


@dataclass(frozen=True, slots=True)
class Pattern:
    """A deny rule, ready."""

    name: str
    # What is denied, in a text that is whole.
    whole: Any
    # The same where the text goes on: a match must be followed by a character, so that none is
    # believed that another character could still undo (`\\b`, `$`).
    decided: Any
    num_instructions: int


def compile_input(rules: Sequence[DenyRule]) -> tuple[Pattern, ...]:
    """Raises InvalidPolicy, naming the rule by its place."""
    return _compile(rules, field="deny_input", max_instructions=MAX_INPUT_INSTRUCTIONS)


def compile_output(rules: Sequence[DenyRule], *, window_chars: int) -> tuple[Pattern, ...]:
    """Raises InvalidPolicy, naming the rule by its place."""
    most = MAX_OUTPUT_WORK // window_chars
    return _compile(rules, field="deny_output", max_instructions=most)


def first_hit(patterns: Sequence[Pattern], text: str) -> str | None:
    """The name of the first rule that denies the text."""
    # Half a surrogate pair is no text that RE2 could read.
    encoded = text.encode(errors="replace")
    for pattern in patterns:
        if pattern.whole.search(encoded) is not None:
            return pattern.name
    return None


def _compile(
    rules: Sequence[DenyRule], *, field: str, max_instructions: int
) -> tuple[Pattern, ...]:
    names: set[str] = set()
    patterns: list[Pattern] = []
    for number, rule in enumerate(rules):
        place = f"{field}[{number}]"
        if rule.name in names:
            raise InvalidPolicy(f"There are two rules {rule.name!r}.", param=f"{place}.name")
        names.add(rule.name)
        try:
            patterns.append(_compile_one(rule))
        except ValueError as error:
            raise InvalidPolicy(str(error), param=f"{place}.pattern") from error
        size = sum(pattern.num_instructions for pattern in patterns)
        if size > max_instructions:
            raise InvalidPolicy(
                f"Up to here the patterns have {size} instructions of RE2's, and {max_instructions}"
                f" are the most in {field}: repeat less, or fewer classes of letters"
                f"{', or lower window_chars' if field == 'deny_output' else ''}.",
                param=f"{place}.pattern",
            )
    return tuple(patterns)


def _compile_one(rule: DenyRule) -> Pattern:
    """Raises ValueError."""
    if "\x00" in rule.pattern:
        raise ValueError("A pattern may have no NUL: write \\x00.")
    whole = _re2(rule.pattern)
    if any((found := whole.search(text)) and found.start() == found.end() for text in PROBES):
        raise ValueError("The pattern matches where there is nothing: it would refuse every text.")
    decided = _re2(f"(?:{rule.pattern})(?s:.)")
    return Pattern(rule.name, whole, decided, max(decided.programsize, decided.reverseprogramsize))


def _re2(source: str) -> Any:
    """Raises ValueError."""
    options = re2.Options()
    options.max_mem = MAX_MEMORY_BYTES
    options.never_capture = True
    # It would write the pattern to standard error.
    options.log_errors = False
    try:
        return re2.compile(source, options=options)
    except re2.error as error:
        why = error.args[0].decode(errors="replace")
        raise ValueError(f"The pattern is none that RE2 serves: {why}") from error
