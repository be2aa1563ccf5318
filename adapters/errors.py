"""What can be wrong with an adapter, and the one tree of errors that says so.

AdapterError
├── InvalidAdapter        carries findings
│   ├── UnreadableArtifact
│   └── ArchiveRefused
├── TooLarge              carries the limit
├── ArtifactMissing       carries the digest
├── DigestMismatch        carries both digests
├── StoreUnavailable
└── ServerTrouble         `is_passing` where the same may work a moment later
    ├── ServerUnreachable
    └── ServerRefused     carries the status and the findings
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong with an artifact, told to the person who made it."""

    # Stable, for programs: e.g. "rank_mismatch".
    code: str
    # The file, configuration field, tensor or module that it is about.
    where: str
    message: str
    # What to do about it.
    fix: str


class AdapterError(Exception):
    """Something is wrong with an adapter or with where it is kept."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.__doc__)


class InvalidAdapter(AdapterError):
    """This adapter cannot be served."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = list(findings)
        details = "; ".join(f"{f.where}: {f.message}" for f in self.findings)
        super().__init__(f"{self.__doc__} {details}" if details else None)


class UnreadableArtifact(InvalidAdapter):
    """A file is not what its name says, or not whole."""


class ArchiveRefused(InvalidAdapter):
    """This archive was not unpacked."""


class TooLarge(AdapterError):
    """The artifact is larger than allowed."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        super().__init__(f"The artifact is larger than the limit of {limit_bytes} bytes.")


class ArtifactMissing(AdapterError):
    """Nothing is stored under this digest."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        super().__init__(f"Nothing is stored under the digest {digest!r}.")


class DigestMismatch(AdapterError):
    """What is stored under a digest does not have that digest."""

    def __init__(self, expected: str, *, found: str) -> None:
        self.expected = expected
        self.found = found
        super().__init__(
            f"Stored under the digest {expected} was something whose digest is {found}."
        )


class StoreUnavailable(AdapterError):
    """The artifact store cannot be used."""


class ServerTrouble(AdapterError):
    """A server did not do what it was asked for."""

    is_passing = False
    # How long the server asks to be left alone.
    retry_after_s = 0.0


class ServerUnreachable(ServerTrouble):
    """No server answers there."""

    is_passing = True


class ServerRefused(ServerTrouble):
    """The server said no; `problem` is what it said, a problem document of RFC 9457."""

    # Too slow, too early, too many; all that is the server's own fault.
    _PASSING = (408, 425, 429)

    def __init__(
        self, status: int, problem: Mapping[str, Any], *, retry_after_s: float = 0.0
    ) -> None:
        self.status = status
        self.is_passing = status >= 500 or status in self._PASSING
        self.retry_after_s = retry_after_s
        self.findings = msgspec.convert(problem.get("findings", []), list[Finding])
        super().__init__(str(problem.get("detail", f"The server answered {status}.")))
