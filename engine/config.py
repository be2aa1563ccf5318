"""How an engine is set up: read once, then values.

The only file of the engine that reads the environment. Knows nothing of how a value is used.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from engine.errors import ConfigurationError
from engine.protocol import UNIX_PREFIX, bearer

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
QuantizationName = Literal["none", "bf16", "int8", "int4", "int8-dynamic", "fp8"]
PARENT_VARIABLE = "MANYLORA_PARENT_PID"
THREADS_VARIABLE = "OMP_NUM_THREADS"
SECRET_VARIABLE = "MANYLORA_ENGINE_SECRET"  # noqa: S105 the variable's name, not a secret


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the model side of an engine needs. None: computed from the model and the machine."""

    # Folder or hub id of a transformers checkpoint.
    model: str
    # The base model's public name; adapters are made for this name.
    served_name: str
    # "cpu", "cuda" or "cuda:<index>".
    device: str = "cpu"
    # "auto" is float32 on CPU, the checkpoint's own on CUDA.
    dtype: DtypeName = "auto"
    # What becomes of the base model's linear layers; adapters are always in `dtype`.
    quantization: QuantizationName = "none"
    # Most tokens of prompt and answer together; None takes the model's own limit.
    max_model_len: int | None = None
    # Most sequences in one step.
    max_num_seqs: int = 64
    # Most tokens in one step, prompts and answers together; at least max_num_seqs.
    max_num_batched_tokens: int | None = None
    # Tokens whose keys and values share one block.
    block_size: int = 16
    # Blocks of the device memory that KV cache and adapters share; overrides memory_bytes.
    num_blocks: int | None = None
    memory_bytes: int | None = None
    # Share of the device's memory that model, KV cache and adapters may fill (CUDA only).
    gpu_memory_utilization: float = 0.9
    # Most adapters on the device at once, 0 for the base model alone: as many as sequences in one
    # step, for they take only the memory that they need.
    max_loras: int = 64
    # The largest rank of any module of an adapter.
    max_lora_rank: int = 64
    # Adapters that are kept ready in host memory, beside the device.
    host_memory_bytes: int = 2 * 1024**3
    # Most that adapters' loads may move, all together; None for no limit.
    max_load_bytes_per_s: int | None = None
    # Whether decode steps are recorded at the start and replayed (CUDA only).
    cuda_graphs: bool = True
    # CPU threads of the computation; None takes all cores.
    num_threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "block_size", "max_lora_rank", "host_memory_bytes"):
            _require_positive(name, getattr(self, name))
        if self.max_loras < 0:
            raise ConfigurationError(f"max_loras must be at least 0: {self.max_loras}")
        for name in (
            "max_model_len",
            "max_num_batched_tokens",
            "num_blocks",
            "memory_bytes",
            "max_load_bytes_per_s",
            "num_threads",
        ):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        for name, known in (("dtype", DtypeName), ("quantization", QuantizationName)):
            if getattr(self, name) not in get_args(known):
                raise ConfigurationError(
                    f"{name} must be one of {get_args(known)}: {getattr(self, name)!r}"
                )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigurationError("gpu_memory_utilization must be above 0 and at most 1")
        budget = self.max_num_batched_tokens
        if budget is not None and budget < self.max_num_seqs:
            raise ConfigurationError(
                f"max_num_batched_tokens ({budget}) is below max_num_seqs ({self.max_num_seqs}): "
                "raise the one or lower the other"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What the link and the adapter tiers of an engine process need."""

    # "unix:<path>" or "http://<host>:<port>".
    listen: str
    # Workers show it as a bearer token; a socket that its owner alone can open may do without.
    secret: str | None
    # Where adapters and text bundles are kept: file://, s3://, gs:// or az://.
    store_url: str
    # The disk tier of adapters.
    cache_dir: Path
    cache_max_bytes: int = 20 * 1024**3

    def __post_init__(self) -> None:
        _require_positive("cache_max_bytes", self.cache_max_bytes)
        if self.secret is None and not self.listen.startswith(UNIX_PREFIX):
            raise ConfigurationError(
                f"To listen on {self.listen}, set {SECRET_VARIABLE}: anybody could connect"
            )
        if self.secret is not None:
            try:
                bearer(self.secret)
            except ValueError as error:
                raise ConfigurationError(f"{SECRET_VARIABLE}: {error}") from error


def secret_from_environment() -> str | None:
    """Not a flag, because everybody on a host can read those."""
    return os.environ.get(SECRET_VARIABLE) or None


def threads_from_environment() -> int | None:
    """What everything that computes with OpenMP is told by it; None where nothing is said."""
    value = os.environ.get(THREADS_VARIABLE, "").partition(",")[0].strip()
    return int(value) if value.isdigit() and int(value) else None


def parent_from_environment() -> int | None:
    """The process that this one must not outlive."""
    value = os.environ.get(PARENT_VARIABLE, "")
    return int(value) if value.isdigit() else None


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigurationError(f"{name} must be at least 1: {value}")
