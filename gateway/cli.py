"""The `manylora` command.

`serve` takes the spellings of vLLM's flags; those that have no meaning here yet are refused by
name. Parses and reports; decides nothing.
"""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import click

from gateway.audit import BrokenChain, verify_export
from gateway.billing.commands import billing
from gateway.demo import set_up_demo
from gateway.errors import DatabaseRefused
from gateway.settings import MEBIBYTE
from gateway.supervisor import CannotServe, ServeOptions, Supervisor

DEFAULT_DATA_DIR = Path(".manylora")

# vLLM's flags that are known and not served, with what to do instead.
REFUSED_FLAGS = {
    "--lora-modules": "upload them: POST /admin/v1/tenants/{tenant}/adapters/{name}/versions",
    "--api-key": "every tenant has keys of its own: POST /admin/v1/tenants/{tenant}/keys",
    "--quantization": "the base model is served in --dtype",
    "--speculative-config": "speculative decoding is not served",
    "--pipeline-parallel-size": "one process serves the whole model",
    "--data-parallel-size": "one engine a host is served",
}


def _say(message: str) -> None:
    click.echo(f"manylora  {message}", err=True)


def _refuse(_: click.Context, parameter: click.Parameter, value: object) -> None:
    if value:
        flag = parameter.opts[0]
        raise click.UsageError(f"{flag} is not supported: {REFUSED_FLAGS[flag]}")


def _only_one(_: click.Context, parameter: click.Parameter, value: int) -> int:
    if value != 1:
        raise click.UsageError(f"{parameter.opts[0]} {value} is not supported: only 1 is, for now")
    return value


def _refused_flags(command: Callable[..., None]) -> Callable[..., None]:
    for flag in REFUSED_FLAGS:
        command = click.option(flag, callback=_refuse, expose_value=False, hidden=True)(command)
    return command


@click.group()
@click.version_option(package_name="manylora")
def main() -> None:
    """Serve many LoRA fine-tunes of one base model to many tenants."""


main.add_command(billing)


@main.group()
def audit() -> None:
    """Check what operators did."""


@audit.command("verify")
@click.argument("path", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def verify_audit(path: Path) -> None:
    """Check an exported audit log: no row changed, none missing. Needs no database."""
    try:
        with path.open("rb") as lines:
            ends = verify_export(lines)
    except BrokenChain as fault:
        raise click.ClickException(str(fault)) from fault
    for tenant_id, (number, last) in ends.items():
        click.echo(f"{tenant_id or 'operators'}: {number} rows, last hash {last}")
    click.echo("every row fits the one before it")


@main.command()
@click.option("--model", required=True, help="Folder or hub id of the base model.")
@click.option("--served-model-name", help="Its public name. [default: the model's last part]")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@click.option("--database-url", help="PostgreSQL 14+ as the owner. [default: an embedded one]")
@click.option("--store-url", help="Where adapters are kept. [default: the data directory]")
@click.option("--data-dir", type=click.Path(path_type=Path), default=DEFAULT_DATA_DIR)
@click.option("--max-upload-mib", default=1024, show_default=True)
@click.option(
    "--credit-retries",
    type=click.IntRange(min=0),
    default=0,
    metavar="NANO_USD",
    help="Most that a tenant gets back in a day for streams that it left and asked for again.",
)
@click.option("--device", help="cpu, cuda or cuda:N. [default: cuda where there is one]")
@click.option("--dtype", help="auto, float32, bfloat16 or float16.")
@click.option("--max-model-len", type=int, help="Most tokens of prompt and answer together.")
@click.option("--max-num-seqs", type=int, help="Most sequences in one step.")
@click.option("--max-num-batched-tokens", type=int, help="Most tokens in one step.")
@click.option("--block-size", type=int, help="Tokens in one block of the KV cache.")
@click.option("--gpu-memory-utilization", type=float)
@click.option("--memory-mib", type=int, help="What KV cache and adapters share on the device.")
@click.option("--max-loras", type=int, help="Most adapters on the device at once.")
@click.option("--max-lora-rank", type=int)
@click.option("--host-memory-mib", type=int, help="Adapters kept ready in host memory.")
@click.option("--max-load-mib-per-s", type=int, help="Most that loads of adapters may move.")
@click.option("--enable-lora", is_flag=True, help="Always on; accepted for vLLM's sake.")
@click.option("--tensor-parallel-size", default=1, callback=_only_one, expose_value=False)
@_refused_flags
def serve(
    model: str,
    served_model_name: str | None,
    host: str,
    port: int,
    database_url: str | None,
    store_url: str | None,
    data_dir: Path,
    max_upload_mib: int,
    credit_retries: int,
    enable_lora: bool,
    **engine_options: object,
) -> None:
    """Serve a base model and its adapters."""
    options = ServeOptions(
        model=model,
        served_name=served_model_name or Path(model.rstrip("/")).name,
        host=host,
        port=port,
        data_dir=data_dir,
        database_url=database_url,
        store_url=store_url,
        engine_flags=_engine_flags(engine_options),
        max_upload_bytes=max_upload_mib * MEBIBYTE,
        max_retry_credit_nano=credit_retries,
    )

    async def ready(supervisor: Supervisor) -> None:
        _say(f"ready: http://{host}:{port}/v1, operator key in {data_dir / 'operator.key'}")

    _run(options, ready)


@main.command()
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), default=DEFAULT_DATA_DIR)
def demo(model: Path, host: str, port: int, data_dir: Path) -> None:
    """Serve the small demo model with two tenants and four adapters of theirs."""
    options = ServeOptions(
        model=str(model),
        served_name=model.name,
        host=host,
        port=port,
        data_dir=data_dir,
        database_url=None,
        store_url=None,
        engine_flags=(),
    )

    async def ready(supervisor: Supervisor) -> None:
        await set_up_demo(
            f"http://{host}:{port}",
            base_model=options.served_name,
            admin_key=supervisor.operator_key,
            path=data_dir / "demo.json",
            say=_say,
        )

    _run(options, ready)


def _engine_flags(options: dict[str, object]) -> tuple[str, ...]:
    given = ((name, value) for name, value in options.items() if value is not None)
    return tuple(
        part for name, value in given for part in (f"--{name.replace('_', '-')}", str(value))
    )


def _run(options: ServeOptions, ready: Callable[[Supervisor], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        supervisor = Supervisor(options, say=_say)
        await supervisor.run(lambda: ready(supervisor))

    try:
        asyncio.run(run())
    except* (CannotServe, DatabaseRefused) as errors:
        for error in errors.exceptions:
            _say(f"cannot serve: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
