"""The grammar of an answer that calls functions, or thinks before it says JSON.

A family's syntax around the tools' schemas; thoughts before the answer stay free. Compiles nothing.
"""

from gateway.tools import syntaxes
from gateway.tools.notation import CallForm, Notation, thoughts
from gateway.tools.syntaxes.syntax import Syntax


def grammar_of(form: CallForm, *, has_tokens: bool) -> str:
    """In Lark's notation. `has_tokens` is false for a trial with a tokenizer of bytes."""
    syntax = syntaxes.named(form.family)
    notation = Notation(form, arguments_key=syntax.arguments_key, has_tokens=has_tokens)
    before = thoughts(notation, form.thinking)
    return notation.whole(f"{before}({_answer(syntax, notation, form)})")


def _answer(syntax: Syntax, notation: Notation, form: CallForm) -> str:
    if form.must_call:
        return syntax.calls(notation)
    if form.otherwise is None:
        return syntax.free(notation)
    otherwise = notation.rule("otherwise", notation.schema(form.otherwise))
    if not form.tools:
        return otherwise
    return f"{syntax.calls(notation)} | {otherwise}"
