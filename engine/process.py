"""What `python -m engine --model <folder> --listen unix:<path> ...` does.

Reads flags, loads the model, exports its text bundle, and serves until SIGTERM. Exits with 1 when
the engine failed and ought to be started again, with 2 when it cannot start like this.
"""

import argparse
import asyncio
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch
import uvloop

from adapters.cache import DiskCache
from adapters.errors import AdapterError
from adapters.store import ArtifactStore
from adapters.text_bundle import TextBundle
from engine.config import (
    SECRET_VARIABLE,
    THREADS_VARIABLE,
    DtypeName,
    EngineConfig,
    QuantizationName,
    ServerConfig,
    parent_from_environment,
    secret_from_environment,
    threads_from_environment,
)
from engine.core import AdapterSource, EngineCore
from engine.errors import EngineError
from engine.host_memory import keep_what_is_freed
from engine.model import text_bundle
from engine.protocol import PROTOCOL_VERSION, EngineInfo
from engine.server import EngineServer, bind
from engine.sessions import LinkLimits

PR_SET_PDEATHSIG = 1
MEBIBYTE = 1024**2
# Flags that the configuration counts in bytes.
_MEBIBYTES = {
    "memory_mib": "memory_bytes",
    "host_memory_mib": "host_memory_bytes",
    "max_load_mib_per_s": "max_load_bytes_per_s",
}
# What a log record has by itself; the rest are an event's fields.
_OWN_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def main(arguments: Sequence[str] | None = None) -> int:
    end_with_parent()
    set_up_logging()
    flags = vars(_parser().parse_args(arguments))
    try:
        return run(_engine_config(flags), _server_config(flags))
    except (EngineError, AdapterError, OSError) as error:
        say(f"cannot start: {error}")
        return 2


def run(config: EngineConfig, server: ServerConfig) -> int:
    with bind(server.listen) as listener:
        store = ArtifactStore(server.store_url)
        cache = DiskCache(store, server.cache_dir, max_bytes=server.cache_max_bytes)
        say(f"exporting the text bundle of {config.model}")
        bundle_digest = asyncio.run(store.put_bundle(text_bundle.export(config.model)))
        core = load(config, cache, bundle_of=lambda digest: asyncio.run(store.get_bundle(digest)))
        engine = EngineServer(
            core,
            info=describe(core, config, text_bundle_digest=bundle_digest),
            listener=listener,
            secret=server.secret,
            limits=LinkLimits(),
        )
        try:
            has_ended_well = uvloop.run(
                serve(engine, on_listening=lambda: say(f"ready: {server.listen}"))
            )
        finally:
            core.close()
    return 0 if has_ended_well else 1


def load(
    config: EngineConfig, source: AdapterSource, *, bundle_of: Callable[[str], TextBundle]
) -> EngineCore:
    say(f"loading {config.model} on {config.device}")
    started_at_s = time.monotonic()
    core = EngineCore(config, adapter_source=source, bundle_of=bundle_of)
    if core.device == "cpu":
        keep_what_is_freed()
    kept_as = "" if config.quantization == "none" else f", linear layers as {config.quantization}"
    took_s = time.monotonic() - started_at_s
    say(f"loaded in {took_s:.1f} s, as {core.dtype} on {core.device}{kept_as}")
    return core


async def serve(engine: EngineServer, on_listening: Callable[[], None]) -> bool:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, engine.stop)
    return await engine.serve(on_listening)


def describe(core: EngineCore, config: EngineConfig, *, text_bundle_digest: str) -> EngineInfo:
    return EngineInfo(
        protocol_version=PROTOCOL_VERSION,
        engine_epoch=time.time_ns(),
        base_model=config.served_name,
        base_digest=core.base_digest,
        text_bundle_digest=text_bundle_digest,
        max_model_len=core.max_model_len,
        vocab_size=core.vocab_size,
        max_loras=config.max_loras,
        max_lora_rank=config.max_lora_rank,
        device=core.device,
        dtype=core.dtype,
        base_shape=core.base_shape,
    )


def _parser() -> argparse.ArgumentParser:
    """Flags left out are not in the result: the configs alone know the defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m engine",
        description="Generate tokens with one base model and many LoRA adapters.",
        epilog=f"The secret that workers show is read from {SECRET_VARIABLE}.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a transformers checkpoint")
    add("--served-name", help="the base model's public name (default: the model's last part)")
    add("--listen", required=True, help="unix:<path> or http://<host>:<port>")
    add("--store-url", required=True, help="where adapters and text bundles are kept")
    add("--cache-dir", required=True, type=Path, help="folder of the adapters' disk tier")
    add("--cache-max-mib", type=int, help="most that the disk tier may hold")
    add("--device", help="cpu, cuda or cuda:<index> (default: cuda where there is one)")
    add("--dtype", choices=get_args(DtypeName))
    add("--quantization", choices=get_args(QuantizationName), help="of the base model's weights")
    add("--max-model-len", type=int, help="most tokens of prompt and answer together")
    add("--max-num-seqs", type=int, help="most sequences in one step")
    add("--max-num-batched-tokens", type=int, help="most tokens in one step")
    add("--block-size", type=int, help="tokens in one block of the KV cache")
    add("--num-blocks", type=int, help="blocks of KV cache and adapters; overrides --memory-mib")
    add("--memory-mib", type=int, help="device memory that KV cache and adapters share")
    add("--gpu-memory-utilization", type=float, help="share of the device's memory to use")
    add("--max-loras", type=int, help="most adapters on the device at once")
    add("--max-lora-rank", type=int, help="largest rank of an adapter's module")
    add("--host-memory-mib", type=int, help="adapters kept ready in host memory")
    add("--max-load-mib-per-s", type=int, help="bandwidth of adapter loads (default: no limit)")
    add(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        help="record decode steps at the start and replay them; without, the engine starts some"
        " seconds earlier and decodes more slowly (CUDA only)",
    )
    add(
        "--num-threads",
        type=int,
        help=f"CPU threads of the computation (default: {THREADS_VARIABLE}, or all cores)",
    )
    return parser


def _engine_config(flags: dict[str, object]) -> EngineConfig:
    values = {name: flags[name] for name in EngineConfig.__dataclass_fields__ if name in flags}
    values.setdefault("served_name", Path(str(flags["model"])).name)
    values.setdefault("num_threads", threads_from_environment())
    values.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    for flag, name in _MEBIBYTES.items():
        if isinstance(mebibytes := flags.get(flag), int):
            values[name] = mebibytes * MEBIBYTE
    return EngineConfig(**values)  # type: ignore[arg-type]  # argparse has checked the types


def _server_config(flags: dict[str, object]) -> ServerConfig:
    values = {name: flags[name] for name in ServerConfig.__dataclass_fields__ if name in flags}
    cache_max_mib = flags.get("cache_max_mib")
    if isinstance(cache_max_mib, int):
        values["cache_max_bytes"] = cache_max_mib * MEBIBYTE
    return ServerConfig(secret=secret_from_environment(), **values)  # type: ignore[arg-type]  # ditto


def end_with_parent() -> None:
    """Get SIGTERM when the process that started this one dies, even by a kill."""
    parent = parent_from_environment()
    if parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        # It died before the call above.
        sys.exit(0)


def say(message: str) -> None:
    """Tell the person who started this what is being done."""
    print(f"engine  {message}", file=sys.stderr, flush=True)


class _EventFormatter(logging.Formatter):
    """An event's name, then its fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {k: v for k, v in record.__dict__.items() if k not in _OWN_FIELDS}
        text = super().format(record)
        return " ".join([text, *(f"{name}={value!r}" for name, value in fields.items())])


def set_up_logging() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_EventFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # Says at each start and end what `say` says already.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
