"""How families of models write calls, one file a family, and which of them a template's is.

The template tells: whoever wrote it told the model in it how to call. It is looked at whenever a
text bundle is opened, so bundles that were stored before need nothing new.
"""

import re
from collections.abc import Sequence

from gateway.tools.syntaxes.hermes import Hermes
from gateway.tools.syntaxes.llama import Llama
from gateway.tools.syntaxes.mistral import Mistral
from gateway.tools.syntaxes.plain import Plain, Told
from gateway.tools.syntaxes.syntax import Syntax

# The first whose template it is serves it.
FAMILIES: Sequence[Syntax] = (Hermes(), Mistral(), Llama(), Plain())
TOLD = Told()
_READS_TOOLS = re.compile(r"\btools\b")


NAMES = tuple(family.name for family in FAMILIES)


def named(name: str) -> Syntax:
    return next(family for family in FAMILIES if family.name == name)


def spoken_in(template: str, *, name: str | None = None) -> Syntax:
    """The syntax of a template's model; `name` is what the operator says of it.

    A template that reads no functions is told of them in words, whatever the operator says.
    """
    if not reads_tools(template):
        return TOLD
    return named(name) if name else next(f for f in FAMILIES if f.is_spoken_in(template))


def reads_tools(template: str) -> bool:
    return _READS_TOOLS.search(template) is not None
