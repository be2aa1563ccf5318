"""Hermes 2 and 3, Qwen 2.5 and 3: `<tool_call>` and `</tool_call>` around each call, among words.

<tool_call>
{"name": "get_weather", "arguments": {"place": "Paris"}}
</tool_call>
"""

from gateway.tools.characters import Characters, Reading
from gateway.tools.json_calls import read_call
from gateway.tools.notation import Notation
from gateway.tools.syntaxes.syntax import Syntax

BEGINS = "<tool_call>"
ENDS = "</tool_call>"


class Hermes(Syntax):
    """Marks around each call."""

    name = "hermes"
    marks = (BEGINS, ENDS)

    def is_spoken_in(self, template: str) -> bool:
        return BEGINS in template

    def read(self, source: Characters) -> Reading[None]:
        while (yield from source.show_until((BEGINS,), source.show)):
            yield from source.attempt(_read_block(source), mark=BEGINS)

    def calls(self, notation: Notation) -> str:
        block = notation.rule("block", f"{notation.mark(BEGINS)} {_body(notation)}")
        return f'{block} ("\\n" {block})*' if notation.is_parallel else block

    def free(self, notation: Notation) -> str:
        return notation.among_words(BEGINS, _body(notation))


def _body(notation: Notation) -> str:
    return f'"\\n" call "\\n" {notation.mark(ENDS)}'


def _read_block(source: Characters) -> Reading[None]:
    yield from source.skip_blanks()
    yield from read_call(source)
    yield from source.skip_blanks()
    yield from source.expect(ENDS)
    source.end_call()
