"""The gateway's environment, read once and turned into values. The only reader of it here."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.client import is_address
from gateway.addresses import Network, parse_networks
from gateway.errors import InvalidRequest
from gateway.tools import syntaxes

MEBIBYTE = 1 << 20
PURGE_AFTER_DAYS = 30
# Fifty batches of the largest size.
MAX_FILE_BYTES_PER_TENANT = 10_000 * MEBIBYTE
LORA_FOLDER_VARIABLE = "MANYLORA_LORA_FOLDER"
UNKNOWN_FIELDS_VARIABLE = "MANYLORA_UNKNOWN_FIELDS"
PARSER_VARIABLE = "MANYLORA_TOOL_CALL_PARSER"
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
    # `unix:/path` or `http://host:port`, of those that are there from the start.
    engine_addresses: tuple[str, ...]
    engine_secret: str
    # Version -> pepper, shared by all gateways of one installation: API keys are fingerprinted
    # under the newest, and those of an older one stay good for as long as it is kept here.
    peppers: Mapping[int, bytes]
    # Where adapters and text bundles live, e.g. file:///var/lib/manylora/store or s3://bucket
    store_url: str
    # Journal and staging files of this host.
    data_dir: Path
    host: str
    port: int
    max_upload_bytes: int
    # How long deleted adapters can be restored.
    purge_after_days: int
    # For tenants without limits of their own; None for no limit.
    max_adapters_per_tenant: int | None = None
    max_adapter_bytes_per_tenant: int | None = None
    # Of a tenant's own files: what batches are to do, and what came of them.
    max_file_bytes_per_tenant: int = MAX_FILE_BYTES_PER_TENANT
    # What /v1/load_lora_adapter may read from; None where it may not.
    lora_folder: Path | None = None
    # Ranges of addresses whose `X-Forwarded-For` is believed.
    trusted_proxies: tuple[Network, ...] = ()
    # Ranges of private addresses that webhooks may be sent to all the same.
    webhook_networks: tuple[Network, ...] = ()
    # What retries of streams that were left may give back to a tenant in a day; 0 for nothing.
    max_retry_credit_nano: int = 0
    # Where the supervisor of this host takes orders; None where engines are no affair of its.
    supervisor_socket: Path | None = None
    # Whether fields of requests that are not known are told of instead of refused.
    reports_unknown_fields: bool = False
    # How models call functions; None leaves it to their chat templates.
    tool_call_parser: str | None = None
    # The process whose end is to be this one's too.
    parent_pid: int | None = None

    def to_environment(self) -> dict[str, str]:
        """The variables from which `from_environment` makes these settings again."""
        return {
            "MANYLORA_DATABASE_APP_URL": self.database_app_url,
            "MANYLORA_DATABASE_WORKER_URL": self.database_worker_url,
            "MANYLORA_ENGINE": ",".join(self.engine_addresses),
            "MANYLORA_ENGINE_SECRET": self.engine_secret,
            "MANYLORA_PEPPER": ",".join(
                f"{version}:{pepper.hex()}" for version, pepper in self.peppers.items()
            ),
            "MANYLORA_STORE_URL": self.store_url,
            "MANYLORA_DATA_DIR": str(self.data_dir),
            "MANYLORA_HOST": self.host,
            "MANYLORA_PORT": str(self.port),
            "MANYLORA_MAX_UPLOAD_BYTES": str(self.max_upload_bytes),
            "MANYLORA_PURGE_AFTER_DAYS": str(self.purge_after_days),
            **_given("MANYLORA_MAX_ADAPTERS_PER_TENANT", self.max_adapters_per_tenant),
            **_given("MANYLORA_MAX_ADAPTER_BYTES_PER_TENANT", self.max_adapter_bytes_per_tenant),
            "MANYLORA_MAX_FILE_BYTES_PER_TENANT": str(self.max_file_bytes_per_tenant),
            **_given(PARENT_VARIABLE, self.parent_pid),
            **_given(LORA_FOLDER_VARIABLE, self.lora_folder),
            **_given("MANYLORA_SUPERVISOR", self.supervisor_socket),
            "MANYLORA_TRUSTED_PROXIES": ",".join(map(str, self.trusted_proxies)),
            "MANYLORA_WEBHOOK_NETWORKS": ",".join(map(str, self.webhook_networks)),
            "MANYLORA_MAX_RETRY_CREDIT_NANO": str(self.max_retry_credit_nano),
            UNKNOWN_FIELDS_VARIABLE: "report" if self.reports_unknown_fields else "refuse",
            **_given(PARSER_VARIABLE, self.tool_call_parser),
        }

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read the settings. Raises SettingsFault naming the variable at fault."""
        return cls(
            database_app_url=_required(environment, "MANYLORA_DATABASE_APP_URL"),
            database_worker_url=_required(environment, "MANYLORA_DATABASE_WORKER_URL"),
            engine_addresses=_addresses(environment, "MANYLORA_ENGINE"),
            engine_secret=_required(environment, "MANYLORA_ENGINE_SECRET"),
            peppers=_peppers(environment, "MANYLORA_PEPPER"),
            store_url=_required(environment, "MANYLORA_STORE_URL"),
            data_dir=Path(_required(environment, "MANYLORA_DATA_DIR")),
            host=environment.get("MANYLORA_HOST", "127.0.0.1"),
            port=_integer(environment, "MANYLORA_PORT", 8000),
            max_upload_bytes=_integer(environment, "MANYLORA_MAX_UPLOAD_BYTES", 1024 * MEBIBYTE),
            purge_after_days=_integer(environment, "MANYLORA_PURGE_AFTER_DAYS", PURGE_AFTER_DAYS),
            max_adapters_per_tenant=_optional(environment, "MANYLORA_MAX_ADAPTERS_PER_TENANT"),
            max_adapter_bytes_per_tenant=_optional(
                environment, "MANYLORA_MAX_ADAPTER_BYTES_PER_TENANT"
            ),
            max_file_bytes_per_tenant=_integer(
                environment, "MANYLORA_MAX_FILE_BYTES_PER_TENANT", MAX_FILE_BYTES_PER_TENANT
            ),
            lora_folder=_path(environment, LORA_FOLDER_VARIABLE),
            supervisor_socket=_path(environment, "MANYLORA_SUPERVISOR"),
            parent_pid=_optional(environment, PARENT_VARIABLE),
            trusted_proxies=_networks(environment, "MANYLORA_TRUSTED_PROXIES"),
            webhook_networks=_networks(environment, "MANYLORA_WEBHOOK_NETWORKS"),
            max_retry_credit_nano=_integer(environment, "MANYLORA_MAX_RETRY_CREDIT_NANO", 0),
            reports_unknown_fields=_choice(
                environment, UNKNOWN_FIELDS_VARIABLE, ("refuse", "report")
            )
            == "report",
            tool_call_parser=_parser(environment, PARSER_VARIABLE),
        )


def _required(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "")
    if not value:
        raise SettingsFault(f"{name} is not set")
    return value


def _addresses(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    """One address or several, with commas between them."""
    addresses = tuple(part.strip() for part in _required(environment, name).split(","))
    for address in addresses:
        if not is_address(address):
            raise SettingsFault(f"{name}: {address!r} is neither unix:/path nor http://host:port")
    if len(set(addresses)) < len(addresses):
        raise SettingsFault(f"{name} names an engine twice")
    return addresses


def _path(environment: Mapping[str, str], name: str) -> Path | None:
    value = environment.get(name, "")
    return Path(value) if value else None


def _integer(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise SettingsFault(f"{name} is not a whole number: {value!r}") from None


def _optional(environment: Mapping[str, str], name: str) -> int | None:
    return _integer(environment, name, 0) if environment.get(name) else None


def _choice(environment: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    """The first where nothing is said."""
    value = environment.get(name) or choices[0]
    if value not in choices:
        raise SettingsFault(f"{name} must be one of {', '.join(choices)}: {value!r}")
    return value


def _parser(environment: Mapping[str, str], name: str) -> str | None:
    value = environment.get(name) or None
    if value is not None and value not in syntaxes.NAMES:
        raise SettingsFault(f"{name} is none of {', '.join(syntaxes.NAMES)}: {value!r}")
    return value


def _given(name: str, value: int | str | Path | None) -> dict[str, str]:
    return {} if value is None else {name: str(value)}


def _networks(environment: Mapping[str, str], name: str) -> tuple[Network, ...]:
    value = environment.get(name, "")
    try:
        return parse_networks(filter(None, value.split(",")), param=name)
    except InvalidRequest as error:
        raise SettingsFault(f"{name}: {error.message}") from None


def _peppers(environment: Mapping[str, str], name: str) -> dict[int, bytes]:
    """One pepper, or several as `1:...,2:...`; a single one without a number is the first."""
    peppers = {}
    for part in _required(environment, name).split(","):
        version, _, digits = part.rpartition(":")
        if not re.fullmatch("[1-9][0-9]{0,8}|", version):
            raise SettingsFault(f"{name}: the version {version!r} is not a number from 1 on")
        peppers[int(version or 1)] = _hexadecimal(digits, name)
    return peppers


def _hexadecimal(digits: str, name: str) -> bytes:
    try:
        value = bytes.fromhex(digits)
    except ValueError:
        raise SettingsFault(f"{name} is not hexadecimal") from None
    if len(value) < 32:
        raise SettingsFault(f"{name} has {len(value)} bytes, at least 32 are needed")
    return value
