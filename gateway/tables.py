"""The rows: what PostgreSQL keeps, one class a table.

Money is integer nano-USD, rates are nano-USD per million tokens, time is `timestamptz` in UTC, ids
are UUIDv7 made by the gateway. Row-level security, roles, partitions and exclusion constraints are
in `migrations/`, where SQL can say them. Knows nothing of HTTP.
"""

import datetime
import secrets
import time
import uuid
from typing import Any, ClassVar

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    Date,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, TSTZRANGE, Range
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SLUG_PATTERN = "[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?"


def new_id() -> uuid.UUID:
    """A UUIDv7 (RFC 9562): 48 bits of milliseconds, 12 bits of their fraction, 62 random bits."""
    milliseconds, rest_ns = divmod(time.time_ns(), 1_000_000)
    fraction = (rest_ns << 12) // 1_000_000
    random = secrets.randbits(62)
    return uuid.UUID(int=milliseconds << 80 | 7 << 76 | fraction << 64 | 2 << 62 | random)


class Table(DeclarativeBase):
    """The metadata that all tables share."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_N_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        uuid.UUID: Uuid(as_uuid=True),
        datetime.datetime: DateTime(timezone=True),
        datetime.date: Date(),
        str: Text(),
        bytes: LargeBinary(),
        int: BigInteger(),
        list[str]: ARRAY(Text()),
        dict[str, str]: JSONB(none_as_null=True),
        dict[str, Any]: JSONB(),
        list[dict[str, Any]]: JSONB(),
        Range[datetime.datetime]: TSTZRANGE(),
    }


def _now() -> Mapped[datetime.datetime]:
    return mapped_column(server_default=func.now())


class Tenant(Table):
    """A customer. The slug never changes and is never used again."""

    __tablename__ = "tenants"
    __table_args__ = (
        CheckConstraint(f"slug ~ '^{SLUG_PATTERN}$'", name="slug"),
        CheckConstraint("status IN ('active', 'suspended', 'closed')", name="status"),
        CheckConstraint("max_adapters >= 0 AND max_adapter_bytes >= 0", name="quotas"),
        CheckConstraint("max_file_bytes >= 0", name="file_quota"),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    slug: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    status: Mapped[str] = mapped_column(server_default="active")
    # Separates this tenant's KV prefixes from all others'.
    cache_salt: Mapped[bytes]
    # Most adapters that are not deleted, and most bytes of their versions; null for no limit.
    max_adapters: Mapped[int | None] = mapped_column(Integer)
    max_adapter_bytes: Mapped[int | None]
    # Of its own files; null for what the operator gives everybody.
    max_file_bytes: Mapped[int | None]
    created_at: Mapped[datetime.datetime] = _now()


class ApiKey(Table):
    """A key's fingerprint. `tenant_id` is null for an operator's key."""

    __tablename__ = "api_keys"
    __table_args__ = (
        CheckConstraint("octet_length(secret_hmac) = 32", name="secret_hmac"),
        CheckConstraint("role IN ('owner', 'developer', 'billing', 'viewer')", name="role"),
        CheckConstraint(
            "num_nulls(previous_secret_hmac, previous_pepper_version, previous_expires_at)"
            " IN (0, 3)",
            name="previous_secret",
        ),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    # The public middle part of `ml_<id>_<secret><checksum>`.
    public_id: Mapped[str] = mapped_column(unique=True)
    tenant_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str]
    secret_hmac: Mapped[bytes]
    pepper_version: Mapped[int] = mapped_column(Integer, server_default="1")
    scopes: Mapped[list[str]]
    expires_at: Mapped[datetime.datetime | None]
    revoked_at: Mapped[datetime.datetime | None]
    last_used_at: Mapped[datetime.datetime | None]
    # What the scopes were chosen by; null where they were named one by one.
    role: Mapped[str | None]
    # Globs of public names, and ranges of addresses in CIDR notation; null for all.
    allowed_models: Mapped[list[str] | None] = mapped_column(ARRAY(Text()))
    ip_ranges: Mapped[list[str] | None] = mapped_column(ARRAY(Text()))
    # The secret before the last rotation, for as long as both are good.
    previous_secret_hmac: Mapped[bytes | None]
    previous_pepper_version: Mapped[int | None] = mapped_column(Integer)
    previous_expires_at: Mapped[datetime.datetime | None]
    created_at: Mapped[datetime.datetime] = _now()


class BaseModel(Table):
    """A base model that engines serve, by its served name."""

    __tablename__ = "base_models"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    digest: Mapped[str]
    text_bundle_digest: Mapped[str]
    # `adapters.validate.BaseShape`: what uploads are validated against
    shape: Mapped[dict[str, Any]]
    context_length: Mapped[int]
    vocab_size: Mapped[int]
    max_lora_rank: Mapped[int]
    # Grows with each swap; only engines of the same revision get requests for it.
    revision: Mapped[int] = mapped_column(Integer, server_default="1")
    # Since when an operator wants it served no more.
    retired_at: Mapped[datetime.datetime | None]
    created_at: Mapped[datetime.datetime] = _now()


class PublicName(Table):
    """The one namespace of everything that `model=` can say; a name is never freed."""

    __tablename__ = "public_names"
    __table_args__ = (
        CheckConstraint("name = lower(name)", name="lower"),
        CheckConstraint("num_nonnulls(base_model_id, adapter_id) = 1", name="one_owner"),
    )

    name: Mapped[str] = mapped_column(primary_key=True)
    base_model_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("base_models.id"))
    adapter_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("adapters.id"))


class WithheldBaseModel(Table):
    """A base model that a tenant may not call by its own name; its adapters stay callable."""

    __tablename__ = "withheld_base_models"

    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"), primary_key=True)
    created_at: Mapped[datetime.datetime] = _now()


class Adapter(Table):
    """A name under which a tenant publishes versions. Purged, its row still holds the name."""

    __tablename__ = "adapters"
    __table_args__ = (
        UniqueConstraint("tenant_id", "slug"),
        UniqueConstraint("id", "tenant_id"),
        CheckConstraint(f"slug ~ '^{SLUG_PATTERN}$'", name="slug"),
        CheckConstraint("purged_at IS NULL OR deleted_at IS NOT NULL", name="deleted_first"),
        Index("ix_adapters_deleted", "deleted_at", postgresql_where=text("purged_at IS NULL")),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"))
    slug: Mapped[str]
    # "<tenant>-<adapter>", stored whole and never split.
    public_name: Mapped[str] = mapped_column(unique=True)
    # The alias that the name stands for where the caller names no version.
    default_alias: Mapped[str] = mapped_column(server_default="latest")
    created_at: Mapped[datetime.datetime] = _now()
    deleted_at: Mapped[datetime.datetime | None]
    # From then on there is no way back.
    purged_at: Mapped[datetime.datetime | None]


class AdapterVersion(Table):
    """One immutable upload of an adapter. Purged, its row still says what old bills mean."""

    __tablename__ = "adapter_versions"
    __table_args__ = (
        UniqueConstraint("adapter_id", "number"),
        UniqueConstraint("id", "tenant_id"),
        ForeignKeyConstraint(["adapter_id", "tenant_id"], ["adapters.id", "adapters.tenant_id"]),
        CheckConstraint(
            "state IN ('validating', 'probing', 'ready', 'rejected', 'missing')", name="state"
        ),
        CheckConstraint("purged_at IS NULL OR deleted_at IS NOT NULL", name="deleted_first"),
        CheckConstraint("erased_at IS NULL OR purged_at IS NOT NULL", name="purged_first"),
        Index("ix_adapter_versions_weights", "weights_digest"),
        Index(
            "ix_adapter_versions_text_bundle",
            "text_bundle_digest",
            postgresql_where=text("text_bundle_digest IS NOT NULL"),
        ),
        Index(
            "ix_adapter_versions_source_files",
            text("jsonb_path_query_array(source_files, '$.*')"),
            postgresql_using="gin",
            postgresql_where=text("source_files IS NOT NULL"),
        ),
        Index(
            "ix_adapter_versions_deleted", "deleted_at", postgresql_where=text("purged_at IS NULL")
        ),
        Index(
            "ix_adapter_versions_not_erased",
            "purged_at",
            postgresql_where=text("purged_at IS NOT NULL AND erased_at IS NULL"),
        ),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    adapter_id: Mapped[uuid.UUID]
    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"))
    # Of the base model that it was probed on.
    base_revision: Mapped[int] = mapped_column(Integer, server_default="1")
    number: Mapped[int] = mapped_column(Integer)
    state: Mapped[str]
    # What slots and KV prefixes are keyed by.
    weights_digest: Mapped[str]
    # Weights and text bundle together: what names and usage rows point at.
    version_digest: Mapped[str]
    # Null where the adapter speaks through its base model's bundle.
    text_bundle_digest: Mapped[str | None]
    # What was uploaded: file name -> SHA-256. Null where its files were not kept, and once erased.
    source_files: Mapped[dict[str, str] | None]
    rank: Mapped[int] = mapped_column(Integer)
    num_modules: Mapped[int] = mapped_column(Integer)
    size_bytes: Mapped[int]
    findings: Mapped[list[dict[str, Any]]] = mapped_column(server_default=text("'[]'"))
    certificate: Mapped[dict[str, Any] | None]
    # How its uploader's examples went at publish, for the base model, for the version that was
    # current then, and for this one: {"base" | "current" | "this": {"passed": 3, "total": 4}}.
    example_results: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime.datetime] = _now()
    deleted_at: Mapped[datetime.datetime | None]
    # From then on there is no way back; `erased_at` is when its bytes had left the store.
    purged_at: Mapped[datetime.datetime | None]
    erased_at: Mapped[datetime.datetime | None]


class AdapterAlias(Table):
    """A name that moves between the versions of one adapter, such as `latest`."""

    __tablename__ = "adapter_aliases"
    __table_args__ = (
        ForeignKeyConstraint(["adapter_id", "tenant_id"], ["adapters.id", "adapters.tenant_id"]),
        ForeignKeyConstraint(
            ["version_id", "tenant_id"], ["adapter_versions.id", "adapter_versions.tenant_id"]
        ),
        ForeignKeyConstraint(
            ["canary_version_id", "tenant_id"],
            ["adapter_versions.id", "adapter_versions.tenant_id"],
        ),
        CheckConstraint(
            "num_nonnulls(canary_version_id, canary_percent) IN (0, 2)"
            " AND canary_percent BETWEEN 1 AND 99",
            name="canary",
        ),
    )

    adapter_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    version_id: Mapped[uuid.UUID]
    # So many of a hundred callers get this version instead; null where all get the same.
    canary_version_id: Mapped[uuid.UUID | None]
    canary_percent: Mapped[int | None] = mapped_column(Integer)
    # Grows with each move, for compare-and-swap.
    revision: Mapped[int] = mapped_column(server_default="1")
    moved_at: Mapped[datetime.datetime] = _now()


class AliasMove(Table):
    """What an alias stood for from one of its revisions to the next. Append-only."""

    __tablename__ = "alias_moves"
    __table_args__ = (
        ForeignKeyConstraint(["adapter_id", "tenant_id"], ["adapters.id", "adapters.tenant_id"]),
        ForeignKeyConstraint(
            ["version_id", "tenant_id"], ["adapter_versions.id", "adapter_versions.tenant_id"]
        ),
        ForeignKeyConstraint(
            ["canary_version_id", "tenant_id"],
            ["adapter_versions.id", "adapter_versions.tenant_id"],
        ),
    )

    adapter_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    revision: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    # Null where the alias was removed.
    version_id: Mapped[uuid.UUID | None]
    canary_version_id: Mapped[uuid.UUID | None]
    canary_percent: Mapped[int | None] = mapped_column(Integer)
    # The revision whose state a rollback brought back; null for every other move.
    restored_revision: Mapped[int | None]
    reason: Mapped[str | None]
    # Null where the alias moved by itself.
    actor_key_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("api_keys.id"))
    moved_at: Mapped[datetime.datetime] = _now()


class AdapterGrant(Table):
    """Somebody besides its owner may call an adapter: one tenant, or everybody."""

    __tablename__ = "adapter_grants"
    __table_args__ = (
        UniqueConstraint("adapter_id", "grantee_id", postgresql_nulls_not_distinct=True),
        ForeignKeyConstraint(["adapter_id", "tenant_id"], ["adapters.id", "adapters.tenant_id"]),
        Index("ix_adapter_grants_grantee", "grantee_id"),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    adapter_id: Mapped[uuid.UUID]
    # The adapter's owner.
    tenant_id: Mapped[uuid.UUID]
    # Null for everybody.
    grantee_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("tenants.id"))
    created_at: Mapped[datetime.datetime] = _now()


class Upload(Table):
    """An upload that arrives in pieces, from its declaration until it expires."""

    __tablename__ = "uploads"
    __table_args__ = (
        UniqueConstraint("id", "tenant_id"),
        ForeignKeyConstraint(
            ["version_id", "tenant_id"], ["adapter_versions.id", "adapter_versions.tenant_id"]
        ),
        CheckConstraint("state IN ('open', 'published', 'rejected')", name="state"),
        CheckConstraint("(state = 'published') = (version_id IS NOT NULL)", name="version"),
        Index("ix_uploads_expires_at", "expires_at"),
        Index("ix_uploads_open", "tenant_id", postgresql_where=text("state = 'open'")),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    # The adapter's slug: the adapter itself may not exist yet.
    adapter: Mapped[str]
    base_model: Mapped[str | None]
    # [{"name", "size_bytes", "sha256"}], as declared
    files: Mapped[list[dict[str, Any]]]
    state: Mapped[str] = mapped_column(server_default="open")
    # What came of it: a version and what was left aside, or all that is wrong.
    version_id: Mapped[uuid.UUID | None]
    ignored_files: Mapped[list[str]] = mapped_column(server_default="{}")
    findings: Mapped[list[dict[str, Any]]] = mapped_column(server_default=text("'[]'"))
    created_at: Mapped[datetime.datetime] = _now()
    # Moves on with each piece that arrives.
    expires_at: Mapped[datetime.datetime]


class UploadPart(Table):
    """A piece of a file that is in the artifact store; pieces of one file follow each other."""

    __tablename__ = "upload_parts"
    __table_args__ = (
        ForeignKeyConstraint(["upload_id", "tenant_id"], ["uploads.id", "uploads.tenant_id"]),
        CheckConstraint("begin_bytes >= 0 AND size_bytes > 0", name="range"),
    )

    upload_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    file: Mapped[str] = mapped_column(primary_key=True)
    # Where in the file it begins.
    begin_bytes: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    size_bytes: Mapped[int]
    # The object's name below the upload's folder.
    part: Mapped[str]


class AdapterPin(Table):
    """A version that an operator wants to stay in a slot of every engine."""

    __tablename__ = "adapter_pins"
    __table_args__ = (
        ForeignKeyConstraint(
            ["version_id", "tenant_id"], ["adapter_versions.id", "adapter_versions.tenant_id"]
        ),
    )

    version_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    pinned_at: Mapped[datetime.datetime] = _now()


class PriceVersion(Table):
    """What tokens of a base model cost during a span of time; spans of one kind never overlap.

    The narrowest that fits wins: adapter, then tenant, then base model.
    """

    __tablename__ = "price_versions"
    __table_args__ = (
        CheckConstraint(
            "input_nano_per_million >= 0 AND cached_input_nano_per_million >= 0"
            " AND output_nano_per_million >= 0",
            name="not_negative",
        ),
        CheckConstraint("storage_nano_per_gib_hour >= 0", name="storage_not_negative"),
        CheckConstraint("batch_discount_bp BETWEEN 0 AND 10000", name="batch_discount"),
        CheckConstraint("NOT isempty(effective)", name="effective"),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"))
    tenant_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("tenants.id"))
    adapter_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("adapters.id"))
    effective: Mapped[Range[datetime.datetime]]
    input_nano_per_million: Mapped[int]
    cached_input_nano_per_million: Mapped[int]
    output_nano_per_million: Mapped[int]
    # For each GiB of an adapter's versions and each hour that it is kept.
    storage_nano_per_gib_hour: Mapped[int] = mapped_column(server_default="0")
    # Ten-thousandths that a batch's requests cost less. See `gateway.prices.discounted`.
    batch_discount_bp: Mapped[int] = mapped_column(Integer, server_default="0")
    created_at: Mapped[datetime.datetime] = _now()


class GatewayInstance(Table):
    """A running gateway worker; its heartbeat is the lease of its holds."""

    __tablename__ = "gateway_instances"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    host: Mapped[str]
    # Grows with each start on the same journal.
    epoch: Mapped[int]
    started_at: Mapped[datetime.datetime] = _now()
    heartbeat_at: Mapped[datetime.datetime] = _now()


class EngineReplica(Table):
    """An engine that gateways may route to; one that is `gone` is not taken for a new one."""

    __tablename__ = "engine_replicas"
    __table_args__ = (CheckConstraint("state IN ('serving', 'draining', 'gone')", name="state"),)

    address: Mapped[str] = mapped_column(primary_key=True)
    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"))
    # Of its base model.
    revision: Mapped[int] = mapped_column(Integer, server_default="1")
    state: Mapped[str] = mapped_column(server_default="serving")
    engine_epoch: Mapped[int]
    device: Mapped[str]
    max_loras: Mapped[int] = mapped_column(Integer)
    seen_at: Mapped[datetime.datetime] = _now()


class Hold(Table):
    """Money reserved at admission for one request; `id` is the request's id."""

    __tablename__ = "holds"
    __table_args__ = (
        CheckConstraint("state IN ('open', 'settled', 'released')", name="state"),
        CheckConstraint("amount_nano >= 0", name="amount_nano"),
        Index("ix_holds_open", "gateway_instance_id", postgresql_where=text("state = 'open'")),
        Index("ix_holds_open_of_tenant", "tenant_id", postgresql_where=text("state = 'open'")),
        Index(
            "ix_holds_open_of_adapter",
            "adapter_id",
            postgresql_where=text("state = 'open' AND adapter_id IS NOT NULL"),
        ),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    api_key_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("api_keys.id"))
    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"))
    adapter_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("adapters.id"))
    adapter_version_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("adapter_versions.id"))
    price_version_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("price_versions.id"))
    gateway_instance_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("gateway_instances.id"))
    # e.g. "chat.completions"
    endpoint: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="open")
    prompt_tokens: Mapped[int]
    # Output tokens that the amount pays for so far; grows in tranches.
    funded_output_tokens: Mapped[int]
    # Progress at the last heartbeat, for a host that never comes back; none of it unless streamed.
    progress_output_tokens: Mapped[int] = mapped_column(server_default="0")
    progress_cached_tokens: Mapped[int] = mapped_column(server_default="0")
    amount_nano: Mapped[int]
    created_at: Mapped[datetime.datetime] = _now()
    closed_at: Mapped[datetime.datetime | None]


class UsageEvent(Table):
    """What one request used and cost. Append-only; `id` is the request's id, a UUIDv7.

    Partitioned by ranges of `id`, so the bare id stays the primary key.
    """

    __tablename__ = "usage_events"
    __table_args__ = (
        CheckConstraint(
            "prompt_tokens >= 0 AND cached_tokens BETWEEN 0 AND prompt_tokens"
            " AND completion_tokens >= 0 AND cost_nano >= 0",
            name="counts",
        ),
        Index("ix_usage_events_tenant", "tenant_id", "finished_at"),
        Index("ix_usage_events_settled", "settled_at"),
        Index(
            "ix_usage_events_attempt",
            "attempt_digest",
            postgresql_where=text("attempt_digest IS NOT NULL"),
        ),
        {"postgresql_partition_by": "RANGE (id)"},
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    api_key_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("api_keys.id"))
    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"))
    adapter_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("adapters.id"))
    adapter_version_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("adapter_versions.id"))
    version_digest: Mapped[str | None]
    price_version_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("price_versions.id"))
    # e.g. "chat.completions"
    endpoint: Mapped[str]
    # stop, length, abort (the client left), error, lost (the gateway's host never came back)
    outcome: Mapped[str]
    prompt_tokens: Mapped[int]
    cached_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    cost_nano: Mapped[int]
    engine_ns: Mapped[int]
    # The moment of admission; days of reports are days of `finished_at`.
    started_at: Mapped[datetime.datetime]
    finished_at: Mapped[datetime.datetime]
    # Whom the request's `user` field named.
    end_user_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("end_users.id"))
    # What two attempts at the same request have in common, and whether this one came after another.
    attempt_digest: Mapped[bytes | None]
    is_retry: Mapped[bool] = mapped_column(server_default=text("false"))
    # When it came here. A trigger has every writer hold a lock until it commits, so that whoever
    # holds the lock alone for a moment has seen everything that was settled before.
    settled_at: Mapped[datetime.datetime] = mapped_column(server_default=func.clock_timestamp())


class EndUser(Table):
    """Somebody whom a tenant's requests named in `user`. Erased, it is a row without a name."""

    __tablename__ = "end_users"
    __table_args__ = (UniqueConstraint("tenant_id", "name"),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str | None]
    erased_at: Mapped[datetime.datetime | None]


class UsageCredit(Table):
    """Money given back for an attempt that a retry stands for; append-only.

    `id` is the attempt's.
    """

    __tablename__ = "usage_credits"
    __table_args__ = (CheckConstraint("amount_nano > 0", name="amount_nano"),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    retry_id: Mapped[uuid.UUID]
    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"))
    adapter_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("adapters.id"))
    price_version_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("price_versions.id"))
    # When the retry ended: credits count for that month and that day.
    at: Mapped[datetime.datetime]
    amount_nano: Mapped[int]
    settled_at: Mapped[datetime.datetime] = mapped_column(server_default=func.clock_timestamp())


class StorageHour(Table):
    """What an adapter's versions weighed when an hour began, and what that hour cost. Append-only.

    There are rows only where storage has a price.
    """

    __tablename__ = "storage_hours"
    __table_args__ = (
        CheckConstraint("size_bytes >= 0 AND cost_nano >= 0", name="counts"),
        Index("ix_storage_hours_tenant", "tenant_id", "hour"),
    )

    adapter_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    hour: Mapped[datetime.datetime] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"))
    price_version_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("price_versions.id"))
    size_bytes: Mapped[int]
    cost_nano: Mapped[int]
    settled_at: Mapped[datetime.datetime] = mapped_column(server_default=func.clock_timestamp())


class Chore(Table):
    """Something done hour by hour, and up to when it is done."""

    __tablename__ = "chores"

    name: Mapped[str] = mapped_column(primary_key=True)
    done_until: Mapped[datetime.datetime]


class BillingAccount(Table):
    """Who pays for a tenant, as its invoices and exports name them."""

    __tablename__ = "billing_accounts"

    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    # Name and address, lines of text.
    bill_to: Mapped[str] = mapped_column(server_default="")
    stripe_customer_id: Mapped[str | None]


class BillingPeriod(Table):
    """A tenant's month in UTC: open while it runs, then in grace, then closed for good."""

    __tablename__ = "billing_periods"
    __table_args__ = (
        UniqueConstraint("tenant_id", "month"),
        CheckConstraint("state IN ('open', 'grace', 'closed')", name="state"),
        CheckConstraint("extract(day FROM month) = 1", name="month"),
        CheckConstraint("(state = 'closed') = (closed_at IS NOT NULL)", name="closed_at"),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    # Its first day.
    month: Mapped[datetime.date]
    state: Mapped[str] = mapped_column(server_default="open")
    closed_at: Mapped[datetime.datetime | None]


class Statement(Table):
    """What a tenant owes for a month, as it was when the month was closed. Never changed.

    `carried_in_nano + total_nano = payable_cents * 10^7 + carried_out_nano`: what is less than a
    cent goes to the next statement.
    """

    __tablename__ = "statements"
    __table_args__ = (
        UniqueConstraint("period_id"),
        CheckConstraint(
            "carried_in_nano + total_nano = payable_cents * 10000000 + carried_out_nano",
            name="balance",
        ),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    period_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("billing_periods.id"))
    # "<tenant>-<year>-<month>"
    number: Mapped[str] = mapped_column(unique=True)
    tenant_name: Mapped[str]
    bill_to: Mapped[str]
    # Everything that was settled up to this moment is in this statement or an earlier one.
    as_of: Mapped[datetime.datetime]
    total_nano: Mapped[int]
    carried_in_nano: Mapped[int]
    payable_cents: Mapped[int]
    carried_out_nano: Mapped[int]
    created_at: Mapped[datetime.datetime] = _now()


class StatementLine(Table):
    """One quantity at one rate, or the rounding of many requests. Never changed."""

    __tablename__ = "statement_lines"
    __table_args__ = (
        UniqueConstraint("statement_id", "number"),
        CheckConstraint("kind IN ('usage', 'storage', 'credit')", name="kind"),
        CheckConstraint(
            "unit IN ('input_tokens', 'cached_input_tokens', 'output_tokens',"
            " 'batch_input_tokens', 'batch_cached_input_tokens', 'batch_output_tokens',"
            " 'byte_hours', 'roundings', 'retries')",
            name="unit",
        ),
        CheckConstraint("extract(day FROM usage_month) = 1", name="usage_month"),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    statement_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("statements.id"))
    number: Mapped[int] = mapped_column(Integer)
    kind: Mapped[str]
    # The month of the usage; one before the statement's makes the line an adjustment.
    usage_month: Mapped[datetime.date]
    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"))
    adapter_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("adapters.id"))
    price_version_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("price_versions.id"))
    unit: Mapped[str]
    # Of `roundings`: how many requests, or hours, were rounded to the nano-USD, one by one.
    quantity: Mapped[int]
    # Nano-USD per million tokens or per GiB-hour; null where no rate applies.
    rate_nano: Mapped[int | None]
    amount_nano: Mapped[int]


class IdempotencyKey(Table):
    """A request that its client named, and its answer for as long as that is kept."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        CheckConstraint("(salt IS NULL) = (answer IS NULL)", name="answer"),
        Index("ix_idempotency_keys_expires_at", "expires_at"),
    )

    api_key_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("api_keys.id"), primary_key=True)
    key_digest: Mapped[bytes] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    body_digest: Mapped[bytes]
    # Names the attempt that may write the answer.
    claim_id: Mapped[uuid.UUID]
    attempt: Mapped[int] = mapped_column(Integer, server_default="1")
    # Encrypted under a key that comes from the caller's; null while the request runs.
    salt: Mapped[bytes | None]
    answer: Mapped[bytes | None]
    # Of a running request: the end of its lease. Of an answer: the end of its keeping.
    expires_at: Mapped[datetime.datetime]


class ContentPolicy(Table):
    """A tenant's wish that its prompts and completions be kept, and for how long."""

    __tablename__ = "content_policies"
    __table_args__ = (CheckConstraint("keep_days BETWEEN 1 AND 3650", name="keep_days"),)

    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    keep_days: Mapped[int] = mapped_column(Integer)


class StoredContent(Table):
    """The texts of one request of a tenant that wants them kept; `id` is the request's."""

    __tablename__ = "stored_contents"
    __table_args__ = (Index("ix_stored_contents_expires_at", "expires_at"),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    # What the request's `user` field said.
    end_user: Mapped[str | None]
    prompt: Mapped[str]
    completion: Mapped[str]
    created_at: Mapped[datetime.datetime] = _now()
    expires_at: Mapped[datetime.datetime]


class UsageRollup(Table):
    """Usage events summed by UTC day, kept in step with them in the same transaction."""

    __tablename__ = "usage_rollups"
    __table_args__ = (
        UniqueConstraint(
            "tenant_id",
            "day",
            "base_model_id",
            "adapter_id",
            "api_key_id",
            postgresql_nulls_not_distinct=True,
        ),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    day: Mapped[datetime.date]
    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"))
    adapter_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("adapters.id"))
    api_key_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("api_keys.id"))
    requests: Mapped[int]
    prompt_tokens: Mapped[int]
    cached_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    cost_nano: Mapped[int]


class AuditEntry(Table):
    """One admin action. Hash-chained per tenant: each row's hash covers the row before it."""

    __tablename__ = "audit_log"
    __table_args__ = (UniqueConstraint("tenant_id", "number", postgresql_nulls_not_distinct=True),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    # Null for what concerns no tenant.
    tenant_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("tenants.id"))
    number: Mapped[int]
    actor_key_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("api_keys.id"))
    # e.g. "adapter.version.create"
    action: Mapped[str]
    subject: Mapped[str]
    details: Mapped[dict[str, Any]]
    at: Mapped[datetime.datetime] = _now()
    hash: Mapped[bytes]


class Limit(Table):
    """Ceilings of a tenant, or of one of its keys or adapters, and how full each is now.

    Levels are counted in sixty-millionths of a request or token: see migration 0005.
    """

    __tablename__ = "limits"
    __table_args__ = (
        UniqueConstraint(
            "tenant_id", "api_key_id", "adapter_id", postgresql_nulls_not_distinct=True
        ),
        CheckConstraint("num_nonnulls(api_key_id, adapter_id) <= 1", name="one_scope"),
        CheckConstraint(
            "least(requests_per_minute, request_burst, tokens_per_minute, token_burst,"
            " concurrent_requests, queue_time_ms) > 0",
            name="positive",
        ),
        Index("ix_limits_adapter", "adapter_id", postgresql_where=text("adapter_id IS NOT NULL")),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    api_key_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("api_keys.id"))
    adapter_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("adapters.id"))
    # Null means no such ceiling; a burst that is null is a minute's worth.
    requests_per_minute: Mapped[int | None]
    request_burst: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]
    token_burst: Mapped[int | None]
    concurrent_requests: Mapped[int | None]
    queue_time_ms: Mapped[int | None]
    requests_level: Mapped[int] = mapped_column(server_default="0")
    tokens_level: Mapped[int] = mapped_column(server_default="0")
    # By the database's clock, in microseconds since 1970; since when tokens were never at zero.
    measured_at_us: Mapped[int] = mapped_column(server_default="0")
    busy_since_us: Mapped[int] = mapped_column(server_default="0")


class Budget(Table):
    """What a tenant, or one of its keys, may spend in a calendar period of its time zone.

    A hard one is never passed; a soft one only alerts.
    """

    __tablename__ = "budgets"
    __table_args__ = (
        UniqueConstraint(
            "tenant_id", "api_key_id", "kind", "period", postgresql_nulls_not_distinct=True
        ),
        CheckConstraint("kind IN ('hard', 'soft')", name="kind"),
        CheckConstraint("period IN ('day', 'week', 'month')", name="period"),
        CheckConstraint("cap_nano >= 0", name="cap_nano"),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    api_key_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("api_keys.id"))
    kind: Mapped[str]
    period: Mapped[str]
    # A name of the IANA time zone database.
    time_zone: Mapped[str]
    cap_nano: Mapped[int]
    # Percents of the cap at which webhooks are told.
    alert_percents: Mapped[list[int]] = mapped_column(ARRAY(BigInteger()))
    created_at: Mapped[datetime.datetime] = _now()


class BudgetWindow(Table):
    """What was spent of a budget in one of its periods; moved with usage events, in step."""

    __tablename__ = "budget_windows"

    budget_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("budgets.id", ondelete="CASCADE"), primary_key=True
    )
    starts_at: Mapped[datetime.datetime] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    spent_nano: Mapped[int]
    # The highest threshold that was told of.
    alerted_percent: Mapped[int] = mapped_column(server_default="0")


class Webhook(Table):
    """Where alerts go. The secret that signs them is derived from the pepper and the id."""

    __tablename__ = "webhooks"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    # Null for the alerts of all tenants.
    tenant_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("tenants.id"))
    url: Mapped[str]
    pepper_version: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime.datetime] = _now()


class WebhookDelivery(Table):
    """One event on its way to one webhook."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        CheckConstraint("state IN ('waiting', 'delivered', 'failed')", name="state"),
        Index(
            "ix_webhook_deliveries_waiting",
            "next_attempt_at",
            postgresql_where=text("state = 'waiting'"),
        ),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    webhook_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    event: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(server_default="waiting")
    num_attempts: Mapped[int] = mapped_column(server_default="0")
    next_attempt_at: Mapped[datetime.datetime] = _now()
    last_error: Mapped[str | None]
    created_at: Mapped[datetime.datetime] = _now()


class TenantPolicy(Table):
    """What a tenant's requests may ask and say: a document of `gateway.policies`."""

    __tablename__ = "policies"

    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    # Another one after each change.
    id: Mapped[uuid.UUID]
    document: Mapped[dict[str, Any]]
    # Of the pepper that the moderation's secret is derived from.
    pepper_version: Mapped[int] = mapped_column(Integer)
    updated_at: Mapped[datetime.datetime] = _now()


class PolicyDecision(Table):
    """How often a rule of a tenant's policy decided so on a day of UTC. Holds no text."""

    __tablename__ = "policy_decisions"
    __table_args__ = (
        CheckConstraint(
            "verdict IN ('passed', 'refused', 'failed_open', 'failed_closed')", name="verdict"
        ),
        CheckConstraint("num_decisions > 0", name="num_decisions"),
    )

    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    day: Mapped[datetime.date] = mapped_column(primary_key=True)
    # e.g. "deny_input/passwords"
    rule: Mapped[str] = mapped_column(primary_key=True)
    verdict: Mapped[str] = mapped_column(primary_key=True)
    num_decisions: Mapped[int]


class TenantFile(Table):
    """A file that a tenant keeps here: what a batch is to do, or what came of one.

    Its bytes are in the artifact store, under its id.
    """

    __tablename__ = "tenant_files"
    __table_args__ = (
        CheckConstraint("purpose IN ('batch', 'batch_output')", name="purpose"),
        CheckConstraint("size_bytes >= 0", name="size_bytes"),
        Index("ix_tenant_files_tenant", "tenant_id", "id"),
        Index("ix_tenant_files_expires_at", "expires_at"),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    filename: Mapped[str]
    purpose: Mapped[str]
    size_bytes: Mapped[int]
    created_at: Mapped[datetime.datetime] = _now()
    expires_at: Mapped[datetime.datetime]


class Batch(Table):
    """Many requests in one file, answered when there is time; one gateway works at it at a time."""

    __tablename__ = "batches"
    __table_args__ = (
        UniqueConstraint("id", "tenant_id"),
        CheckConstraint(
            "status IN ('validating', 'in_progress', 'finalizing', 'completed', 'failed',"
            " 'expired', 'cancelling', 'cancelled')",
            name="status",
        ),
        CheckConstraint(
            "outcome IN ('completed', 'failed', 'expired', 'cancelled')", name="outcome"
        ),
        CheckConstraint(
            "(ended_at IS NOT NULL) = (status IN ('completed', 'failed', 'expired', 'cancelled'))",
            name="ended_at",
        ),
        CheckConstraint(
            "num_nonnulls(claim_id, gateway_instance_id, lease_until) IN (0, 3)", name="claim"
        ),
        Index("ix_batches_tenant", "tenant_id", "id"),
        Index("ix_batches_open", "created_at", postgresql_where=text("ended_at IS NULL")),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    # Whose requests they are.
    api_key_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("api_keys.id"))
    # The route that answers them, e.g. "/v1/chat/completions"
    endpoint: Mapped[str]
    # Files may be gone while the batch is still told of.
    input_file_id: Mapped[uuid.UUID]
    metadata_: Mapped[dict[str, str] | None] = mapped_column("metadata")
    output_expires_after_s: Mapped[int | None]
    status: Mapped[str] = mapped_column(server_default="validating")
    # Once no more results are taken: what it is going to end as.
    outcome: Mapped[str | None]
    # [{"code", "message", "line", "param"}]: why it failed.
    errors: Mapped[list[dict[str, Any]]] = mapped_column(server_default=text("'[]'"))
    # Known once the input is read; the other two once it has ended.
    num_requests: Mapped[int] = mapped_column(server_default="0")
    num_completed: Mapped[int] = mapped_column(server_default="0")
    num_failed: Mapped[int] = mapped_column(server_default="0")
    output_file_id: Mapped[uuid.UUID | None]
    error_file_id: Mapped[uuid.UUID | None]
    created_at: Mapped[datetime.datetime] = _now()
    expires_at: Mapped[datetime.datetime]
    in_progress_at: Mapped[datetime.datetime | None]
    finalizing_at: Mapped[datetime.datetime | None]
    cancelling_at: Mapped[datetime.datetime | None]
    ended_at: Mapped[datetime.datetime | None]
    # Who works at it, and until when the others believe that.
    claim_id: Mapped[uuid.UUID | None]
    gateway_instance_id: Mapped[uuid.UUID | None]
    lease_until: Mapped[datetime.datetime | None]


class BatchResult(Table):
    """What came of one line of a batch that has not ended; then it is in the batch's files."""

    __tablename__ = "batch_results"
    __table_args__ = (
        ForeignKeyConstraint(
            ["batch_id", "tenant_id"], ["batches.id", "batches.tenant_id"], ondelete="CASCADE"
        ),
    )

    batch_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    # Of the line in the input, from 1 on.
    number: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID]
    request_id: Mapped[uuid.UUID]
    is_error: Mapped[bool]
    # As it is going to be in the file.
    line: Mapped[bytes]
