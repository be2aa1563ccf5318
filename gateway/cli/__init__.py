"""The `manylora` command: one module for each noun that it knows. Decides nothing itself."""

import click

from gateway.billing.commands import billing
from gateway.cli.adapters import adapters
from gateway.cli.audit import audit
from gateway.cli.chat import chat
from gateway.cli.serve import demo, serve


@click.group()
@click.version_option(package_name="manylora")
def main() -> None:
    """Serve many LoRA fine-tunes of one base model to many tenants."""


main.add_command(serve)
main.add_command(demo)
main.add_command(adapters)
main.add_command(chat)
main.add_command(billing)
main.add_command(audit)
