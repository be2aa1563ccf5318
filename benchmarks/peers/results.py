"""The file in which measurements are kept: sessions, each with where, how and of what it was made.

Knows nothing of what a row means.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Results:
    """Mutable: a session that is being added behind those that a file has."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self._path = path
        self._earlier = read(path) if path.exists() else []
        self._session: dict[str, Any] = {
            **facts,
            "peers": {},
            "starts": [],
            "checks": [],
            "runs": [],
        }

    def know(self, peer: str, facts: Mapping[str, Any]) -> None:
        self._session["peers"][peer] = dict(facts)

    def add(self, kind: str, row: Mapping[str, Any]) -> None:
        """Written at once, so that nothing is lost where a later peer fails."""
        self._session[kind].append(dict(row))
        half = self._path.with_suffix(".half")
        half.write_text(json.dumps({"sessions": [*self._earlier, self._session]}, indent=1) + "\n")
        half.rename(self._path)


def read(path: Path) -> list[dict[str, Any]]:
    sessions: list[dict[str, Any]] = json.loads(path.read_text())["sessions"]
    return sessions
