"""What can be wrong with an adapter, and the one tree of errors that says so.

AdapterError
├── InvalidAdapter        carries findings
│   ├── UnreadableArtifact
│   └── ArchiveRefused
├── TooLarge              carries the limit
├── ArtifactMissing       carries the digest
└── DigestMismatch        carries both digests
"""

from collections.abc import Sequence

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
