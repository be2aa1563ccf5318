"""The `manylora` command: one module for each noun that it knows. Decides nothing itself."""

import importlib

import click

# Where each is; all of them take three times as long to import as `serve` does.
COMMANDS = {
    "serve": "gateway.cli.serve",
    "demo": "gateway.cli.serve",
    "adapters": "gateway.cli.adapters",
    "chat": "gateway.cli.chat",
    "billing": "gateway.billing.commands",
    "audit": "gateway.cli.audit",
}


class _Commands(click.Group):
    """Imports a command when it is wanted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(COMMANDS[cmd_name]), cmd_name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Commands)
@click.version_option(package_name="manylora")
def main() -> None:
    """Serve many LoRA fine-tunes of one base model to many tenants."""
