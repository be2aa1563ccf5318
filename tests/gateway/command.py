"""The `manylora` command, run against a plane as its operator would run it."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from click.testing import CliRunner, Result

from gateway.cli import main
from tests.gateway.admin_plane import Plane


@dataclass(frozen=True)
class Command:
    """Runs in a thread: the plane answers in the test's own event loop."""

    plane: Plane
    # Of the user: what the command remembers is below it.
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "MANYLORA_URL": str(self.plane.client.base_url),
            "MANYLORA_KEY": self.plane.client.headers["authorization"].removeprefix("Bearer "),
            "XDG_STATE_HOME": str(self.home),
        }

    async def run(self, *words: str | Path, **environment: str | None) -> Result:
        return await asyncio.to_thread(
            CliRunner().invoke,
            main,
            [str(word) for word in words],
            env={**self.environment, **environment},
        )

    async def adapters(self, *words: str | Path, **environment: str | None) -> Result:
        return await self.run("adapters", *words, **environment)

    async def done(self, *words: str | Path) -> str:
        """What it says, all of it, where it must not fail."""
        result = await self.adapters(*words)
        assert result.exit_code == 0, result.output
        return result.output

    async def json(self, *words: str) -> Any:
        result = await self.adapters(*words, "--json")
        assert result.exit_code == 0, result.output
        return msgspec.json.decode(result.stdout)

    def remembered(self) -> list[Path]:
        return [path for path in self.home.rglob("*") if path.is_file()]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder
