"""The gateway's environment, read once and turned into values. The only reader of it here."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MEBIBYTE = 1 << 20
# The engine reads the same one.
PARENT_VARIABLE = "MANYLORA_PARENT_PID"


class SettingsFault(Exception):
    """A setting is missing or makes no sense."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What one gateway worker needs to know before it starts."""

    # PostgreSQL as the roles `app` and `worker`.
    database_app_url: str
    database_worker_url: str
    # `unix:/path` or `http://host:port`
    engine_address: str
    engine_secret: str
    # Shared by all gateways of one installation: API keys are fingerprinted under it.
    pepper: bytes
    # Where adapters and text bundles live, e.g. file:///var/lib/manylora/store or s3://bucket
    store_url: str
    # Journal and staging files of this host.
    data_dir: Path
    host: str
    port: int
    max_upload_bytes: int
    # What retries of streams that were left may give back to a tenant in a day; 0 for nothing.
    max_retry_credit_nano: int = 0
    # The process whose end is to be this one's too.
    parent_pid: int | None = None

    def to_environment(self) -> dict[str, str]:
        """The variables from which `from_environment` makes these settings again."""
        return {
            "MANYLORA_DATABASE_APP_URL": self.database_app_url,
            "MANYLORA_DATABASE_WORKER_URL": self.database_worker_url,
            "MANYLORA_ENGINE": self.engine_address,
            "MANYLORA_ENGINE_SECRET": self.engine_secret,
            "MANYLORA_PEPPER": self.pepper.hex(),
            "MANYLORA_STORE_URL": self.store_url,
            "MANYLORA_DATA_DIR": str(self.data_dir),
            "MANYLORA_HOST": self.host,
            "MANYLORA_PORT": str(self.port),
            "MANYLORA_MAX_UPLOAD_BYTES": str(self.max_upload_bytes),
            "MANYLORA_MAX_RETRY_CREDIT_NANO": str(self.max_retry_credit_nano),
            **({} if self.parent_pid is None else {PARENT_VARIABLE: str(self.parent_pid)}),
        }

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read the settings. Raises SettingsFault naming the variable at fault."""
        return cls(
            database_app_url=_required(environment, "MANYLORA_DATABASE_APP_URL"),
            database_worker_url=_required(environment, "MANYLORA_DATABASE_WORKER_URL"),
            engine_address=_required(environment, "MANYLORA_ENGINE"),
            engine_secret=_required(environment, "MANYLORA_ENGINE_SECRET"),
            pepper=_hexadecimal(environment, "MANYLORA_PEPPER"),
            store_url=_required(environment, "MANYLORA_STORE_URL"),
            data_dir=Path(_required(environment, "MANYLORA_DATA_DIR")),
            host=environment.get("MANYLORA_HOST", "127.0.0.1"),
            port=_integer(environment, "MANYLORA_PORT", 8000),
            max_upload_bytes=_integer(environment, "MANYLORA_MAX_UPLOAD_BYTES", 1024 * MEBIBYTE),
            max_retry_credit_nano=_integer(environment, "MANYLORA_MAX_RETRY_CREDIT_NANO", 0),
            parent_pid=_integer(environment, PARENT_VARIABLE, 0) or None,
        )


def _required(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "")
    if not value:
        raise SettingsFault(f"{name} is not set")
    return value


def _integer(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise SettingsFault(f"{name} is not a whole number: {value!r}") from None


def _hexadecimal(environment: Mapping[str, str], name: str) -> bytes:
    try:
        value = bytes.fromhex(_required(environment, name))
    except ValueError:
        raise SettingsFault(f"{name} is not hexadecimal") from None
    if len(value) < 32:
        raise SettingsFault(f"{name} has {len(value)} bytes, at least 32 are needed")
    return value
