"""What an answer may call, and whether it must. Knows nothing of how a model writes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Tool:
    """A function of the client's."""

    name: str
    # As chat templates see it, in OpenAI's form: {"type": "function", "function": {...}}.
    definition: Mapping[str, Any]
    # JSON schema of its arguments, which are always an object.
    parameters: Mapping[str, Any]
    # Whether its arguments follow the schema in any case.
    is_strict: bool


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The functions of a request, in its order."""

    tools: tuple[Tool, ...]
    # Whether the answer has to be calls.
    must_call: bool = False
    # Those that may be called; None for all that the model is told of.
    allowed: frozenset[str] | None = None
    # Whether there may be several calls.
    is_parallel: bool = True

    @property
    def callable(self) -> tuple[Tool, ...]:
        allowed = self.allowed
        return tuple(tool for tool in self.tools if allowed is None or tool.name in allowed)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.callable)

    @property
    def definitions(self) -> list[Mapping[str, Any]]:
        return [tool.definition for tool in self.tools]

    @property
    def is_enforced(self) -> bool:
        """Whether the model's own manners do not suffice."""
        has_strict = any(tool.is_strict for tool in self.callable)
        return self.must_call or has_strict or not self.is_parallel
