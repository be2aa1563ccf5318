"""Llama 3.1 to 3.3: an answer is words, or calls without a mark, or behind `<|python_tag|>`.

{"name": "get_weather", "parameters": {"place": "Paris"}}; {"name": ...}
"""

from gateway.tools.characters import BLANKS, Characters, Reading
from gateway.tools.json_calls import read_call
from gateway.tools.notation import Notation
from gateway.tools.syntaxes.syntax import Syntax, read_bare

TAG = "<|python_tag|>"


class Llama(Syntax):
    """Bare calls."""

    name = "llama3_json"
    marks = (TAG,)
    arguments_key = "parameters"

    def is_spoken_in(self, template: str) -> bool:
        return TAG in template or ("ipython" in template and '"parameters"' in template)

    def read(self, source: Characters) -> Reading[None]:
        is_call = yield from read_bare(source, read_call(source))
        while True:
            while is_call:
                separator = yield from source.skip_blanks(BLANKS + ";,")
                is_call = yield from source.attempt(read_call(source), mark=separator)
            if not (yield from source.show_until((TAG,), source.show)):
                return
            is_call = yield from source.attempt(_read_tagged(source), mark=TAG)

    def calls(self, notation: Notation) -> str:
        return 'call ("; " call)*' if notation.is_parallel else "call"

    def free(self, notation: Notation) -> str:
        return notation.instead_of_words(self.calls(notation), but_not="{", mark=TAG)


def _read_tagged(source: Characters) -> Reading[None]:
    yield from source.skip_blanks()
    yield from read_call(source)
