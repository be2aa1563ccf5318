"""`manylora serve` and `manylora demo`: from flags to a running server.

Takes the spellings of vLLM's flags; those that have no meaning here yet are refused by name.
"""

import asyncio
import itertools
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import click

from gateway.addresses import Network, parse_networks
from gateway.children import CannotServe
from gateway.cli import models
from gateway.cli.printing import say
from gateway.cli.server import DEFAULT_DATA_DIR
from gateway.demo import set_up_demo
from gateway.engine_room import ServedModel
from gateway.errors import DatabaseRefused, InvalidRequest
from gateway.lora_modules import LoraModule, parse, register
from gateway.settings import MAX_FILE_BYTES_PER_TENANT, MEBIBYTE, PURGE_AFTER_DAYS
from gateway.supervisor import ServeOptions, Supervisor, reachable
from gateway.tools import syntaxes

LORA_MODULES = "--lora-modules"

# vLLM's flags that are known and not served, with what to do instead.
REFUSED_FLAGS = {
    "--api-key": "every tenant has keys of its own: POST /admin/v1/tenants/{tenant}/keys",
    "--speculative-config": "speculative decoding is not served",
    "--pipeline-parallel-size": "one process serves the whole model",
    "--data-parallel-size": "attach further engines: POST /admin/v1/base-models",
}


def _refuse(_: click.Context, parameter: click.Parameter, value: object) -> None:
    if value:
        flag = parameter.opts[0]
        raise click.UsageError(f"{flag} is not supported: {REFUSED_FLAGS[flag]}")


def _only_one(_: click.Context, parameter: click.Parameter, value: int) -> int:
    if value != 1:
        raise click.UsageError(f"{parameter.opts[0]} {value} is not supported: only 1 is, for now")
    return value


class _Serve(click.Command):
    """Takes `--lora-modules a=x b=y` as vLLM does: one flag, and words up to the next."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(itertools.chain(*_spread(args, LORA_MODULES))))


def _spread(words: list[str], flag: str) -> Iterator[tuple[str, ...]]:
    """Repeat the flag before each of its words."""
    is_inside = False
    for place, word in enumerate(words):
        if word.startswith("-"):
            is_inside = word == flag
            is_empty = words[place + 1 : place + 2] == [] or words[place + 1].startswith("-")
            # An empty one stays as it is, to be refused.
            if not is_inside or is_empty:
                yield (word,)
        else:
            yield (flag, word) if is_inside else (word,)


def _parse_modules(
    _: click.Context, parameter: click.Parameter, words: tuple[str, ...]
) -> tuple[LoraModule, ...]:
    try:
        return tuple(parse(word) for word in words)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _networks(
    _: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[Network, ...]:
    try:
        return parse_networks(values, param=parameter.opts[0])
    except InvalidRequest as error:
        raise click.UsageError(f"{parameter.opts[0]}: {error.message}") from None


def _refused_flags(command: Callable[..., None]) -> Callable[..., None]:
    for flag in REFUSED_FLAGS:
        command = click.option(flag, callback=_refuse, expose_value=False, hidden=True)(command)
    return command


@click.command(cls=_Serve)
@click.option(
    "--model",
    "model_words",
    multiple=True,
    metavar="[NAME=]PATH",
    help="Folder or hub id of a base model; may be repeated, and each gets an engine of its own.",
)
@click.option("--served-model-name", help="Its public name. [default: the model's last part]")
@click.option(
    "--models",
    "models_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="TOML with a table for each base model: its path, and flags of its engine alone.",
)
@click.option(
    "--model-folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    help="What POST /admin/v1/base-models may start engines for. [default: nothing]",
)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@click.option("--database-url", help="PostgreSQL 14+ as the owner. [default: an embedded one]")
@click.option("--store-url", help="Where adapters are kept. [default: the data directory]")
@click.option("--data-dir", type=click.Path(path_type=Path), default=DEFAULT_DATA_DIR)
@click.option("--max-upload-mib", default=1024, show_default=True)
@click.option(
    "--purge-after-days",
    type=click.IntRange(min=0, max=36500),
    default=PURGE_AFTER_DAYS,
    show_default=True,
    help="How long deleted adapters can be restored.",
)
@click.option(
    "--max-adapters-per-tenant",
    type=click.IntRange(min=0),
    help="For tenants without a limit of their own. [default: none]",
)
@click.option(
    "--max-adapter-bytes-per-tenant",
    type=click.IntRange(min=0),
    help="The same for the bytes of their versions. [default: none]",
)
@click.option(
    "--max-file-bytes-per-tenant",
    type=click.IntRange(min=0),
    default=MAX_FILE_BYTES_PER_TENANT,
    show_default=True,
    help="The same for their own files: what batches are to do, and what came of them.",
)
@click.option(
    "--trusted-proxy",
    "trusted_proxies",
    multiple=True,
    callback=_networks,
    help="Address or range whose X-Forwarded-For is believed; may be repeated.",
)
@click.option(
    "--webhook-network",
    "webhook_networks",
    multiple=True,
    callback=_networks,
    help="Private address or range that webhooks may be sent to; may be repeated.",
)
@click.option(
    "--credit-retries",
    type=click.IntRange(min=0),
    default=0,
    metavar="NANO_USD",
    help="Most that a tenant gets back in a day for streams that it left and asked for again.",
)
@click.option(
    "--unknown-fields",
    type=click.Choice(["refuse", "report"]),
    default="refuse",
    show_default=True,
    help="What becomes of requests with fields that are not known here: a 400, or an answer that "
    "names them in the header x-ignored-fields.",
)
@click.option("--device", help="cpu, cuda or cuda:N. [default: cuda where there is one]")
@click.option("--dtype", help="auto, float32, bfloat16 or float16.")
@click.option(
    "--quantization",
    type=click.Choice(["none", "bf16", "int8", "int4", "int8-dynamic", "fp8"]),
    help="Of the base model's weights, at load; adapters stay in --dtype. bf16 and int8-dynamic "
    "are for CPUs, fp8 for GPUs. [default: none]",
)
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
@click.option(
    "--cuda-graphs/--no-cuda-graphs",
    default=None,
    help="Record decode steps at the start and replay them. Without, an engine starts some seconds "
    "earlier and decodes more slowly; CUDA only. [default: on]",
)
@click.option(
    LORA_MODULES,
    multiple=True,
    callback=_parse_modules,
    metavar="NAME=PATH...",
    help="Adapters to upload at the start; also as JSON. A name that begins with a tenant's and a "
    "dash is that tenant's adapter; any other NAME is served as default-NAME to the tenant "
    "'default', which is made with a key in default.key of the data directory.",
)
@click.option(
    "--lora-folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    help="What POST /v1/load_lora_adapter may load from. [default: nothing]",
)
@click.option(
    "--tool-call-parser",
    type=click.Choice(syntaxes.NAMES),
    help="How models call functions. [default: what their chat templates show]",
)
@click.option("--enable-auto-tool-choice", is_flag=True, help="Always on, likewise.")
@click.option("--enable-lora", is_flag=True, help="Always on; accepted for vLLM's sake.")
@click.option("--tensor-parallel-size", default=1, callback=_only_one, expose_value=False)
@_refused_flags
def serve(
    model_words: tuple[str, ...],
    served_model_name: str | None,
    models_file: Path | None,
    model_folder: Path | None,
    host: str,
    port: int,
    database_url: str | None,
    store_url: str | None,
    data_dir: Path,
    max_upload_mib: int,
    purge_after_days: int,
    max_adapters_per_tenant: int | None,
    max_adapter_bytes_per_tenant: int | None,
    max_file_bytes_per_tenant: int,
    lora_modules: tuple[LoraModule, ...],
    lora_folder: Path | None,
    trusted_proxies: tuple[Network, ...],
    webhook_networks: tuple[Network, ...],
    credit_retries: int,
    unknown_fields: str,
    tool_call_parser: str | None,
    enable_auto_tool_choice: bool,
    enable_lora: bool,
    **engine_options: object,
) -> None:
    """Serve base models and their adapters."""
    engine_flags = models.spelled(engine_options)
    asked = models.from_words(model_words, served_name=served_model_name, engine_flags=engine_flags)
    if models_file is not None:
        asked += models.from_file(
            models_file, flags=engine_options, known_flags=engine_options.keys()
        )
    options = ServeOptions(
        models=models.check(asked),
        host=host,
        port=port,
        data_dir=data_dir,
        database_url=database_url,
        store_url=store_url,
        engine_flags=engine_flags,
        model_folder=model_folder,
        max_upload_bytes=max_upload_mib * MEBIBYTE,
        purge_after_days=purge_after_days,
        max_adapters_per_tenant=max_adapters_per_tenant,
        max_adapter_bytes_per_tenant=max_adapter_bytes_per_tenant,
        max_file_bytes_per_tenant=max_file_bytes_per_tenant,
        lora_folder=lora_folder,
        trusted_proxies=trusted_proxies,
        webhook_networks=webhook_networks,
        max_retry_credit_nano=credit_retries,
        reports_unknown_fields=unknown_fields == "report",
        tool_call_parser=tool_call_parser,
    )

    async def ready(supervisor: Supervisor) -> None:
        await register(
            f"http://{reachable(host)}:{port}",
            lora_modules,
            admin_key=supervisor.operator_key,
            data_dir=data_dir,
            say=say,
        )
        say(f"ready: http://{host}:{port}/v1, operator key in {data_dir / 'operator.key'}")

    _run(options, ready)


@click.command()
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), default=DEFAULT_DATA_DIR)
def demo(model: Path, host: str, port: int, data_dir: Path) -> None:
    """Serve the small demo model with two tenants and four adapters of theirs."""
    options = ServeOptions(
        models=(ServedModel(model.name, str(model)),),
        host=host,
        port=port,
        data_dir=data_dir,
        database_url=None,
        store_url=None,
    )

    async def ready(supervisor: Supervisor) -> None:
        await set_up_demo(
            f"http://{host}:{port}",
            base_model=model.name,
            admin_key=supervisor.operator_key,
            path=data_dir / "demo.json",
            say=say,
        )

    _run(options, ready)


def _run(options: ServeOptions, ready: Callable[[Supervisor], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        supervisor = Supervisor(options, say=say)
        await supervisor.run(lambda: ready(supervisor))

    try:
        asyncio.run(run())
    except* (CannotServe, DatabaseRefused) as errors:
        for error in errors.exceptions:
            say(f"cannot serve: {error}")
        sys.exit(1)
