"""The first schema: tables, roles, row-level security, what may never overlap or be changed.

Three roles. The owner, who runs this, owns everything and serves nobody. `<database>_app` answers
tenants and sees the rows of one, named by the setting `app.tenant`; unset, it sees none.
`<database>_worker` settles, sweeps, bills and administers across tenants. Neither can bypass
row-level security, and grants name the columns that may ever change.
"""

from alembic import op
from sqlalchemy import Connection

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = (
    """
CREATE TABLE base_models (
    id UUID NOT NULL,
    name TEXT NOT NULL,
    digest TEXT NOT NULL,
    text_bundle_digest TEXT NOT NULL,
    shape JSONB NOT NULL,
    context_length BIGINT NOT NULL,
    vocab_size BIGINT NOT NULL,
    max_lora_rank BIGINT NOT NULL,
    created_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    CONSTRAINT pk_base_models PRIMARY KEY (id),
    CONSTRAINT uq_base_models_name UNIQUE (name)
)
""",
    """
CREATE TABLE gateway_instances (
    id UUID NOT NULL,
    host TEXT NOT NULL,
    epoch BIGINT NOT NULL,
    started_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    heartbeat_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    CONSTRAINT pk_gateway_instances PRIMARY KEY (id)
)
""",
    """
CREATE TABLE tenants (
    id UUID NOT NULL,
    slug TEXT NOT NULL,
    name TEXT NOT NULL,
    status TEXT DEFAULT 'active' NOT NULL,
    cache_salt BYTEA NOT NULL,
    created_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    CONSTRAINT pk_tenants PRIMARY KEY (id),
    CONSTRAINT ck_tenants_slug
        CHECK (slug ~ '^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$'),
    CONSTRAINT ck_tenants_status
        CHECK (status IN ('active', 'suspended', 'closed')),
    CONSTRAINT uq_tenants_slug UNIQUE (slug)
)
""",
    """
CREATE TABLE adapters (
    id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    base_model_id UUID NOT NULL,
    slug TEXT NOT NULL,
    public_name TEXT NOT NULL,
    created_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    deleted_at TIMESTAMPTZ,
    CONSTRAINT pk_adapters PRIMARY KEY (id),
    CONSTRAINT uq_adapters_tenant_id_slug UNIQUE (tenant_id, slug),
    CONSTRAINT uq_adapters_id_tenant_id UNIQUE (id, tenant_id),
    CONSTRAINT ck_adapters_slug
        CHECK (slug ~ '^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$'),
    CONSTRAINT fk_adapters_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    CONSTRAINT fk_adapters_base_model_id
        FOREIGN KEY(base_model_id) REFERENCES base_models (id),
    CONSTRAINT uq_adapters_public_name UNIQUE (public_name)
)
""",
    """
CREATE TABLE api_keys (
    id UUID NOT NULL,
    public_id TEXT NOT NULL,
    tenant_id UUID,
    name TEXT NOT NULL,
    secret_hmac BYTEA NOT NULL,
    pepper_version INTEGER DEFAULT '1' NOT NULL,
    scopes TEXT[] NOT NULL,
    expires_at TIMESTAMPTZ,
    revoked_at TIMESTAMPTZ,
    last_used_at TIMESTAMPTZ,
    created_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    CONSTRAINT pk_api_keys PRIMARY KEY (id),
    CONSTRAINT ck_api_keys_secret_hmac CHECK (octet_length(secret_hmac) = 32),
    CONSTRAINT uq_api_keys_public_id UNIQUE (public_id),
    CONSTRAINT fk_api_keys_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id)
)
""",
    """
CREATE TABLE engine_replicas (
    address TEXT NOT NULL,
    base_model_id UUID NOT NULL,
    engine_epoch BIGINT NOT NULL,
    device TEXT NOT NULL,
    max_loras INTEGER NOT NULL,
    seen_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    CONSTRAINT pk_engine_replicas PRIMARY KEY (address),
    CONSTRAINT fk_engine_replicas_base_model_id
        FOREIGN KEY(base_model_id) REFERENCES base_models (id)
)
""",
    """
CREATE TABLE adapter_versions (
    id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    adapter_id UUID NOT NULL,
    base_model_id UUID NOT NULL,
    number INTEGER NOT NULL,
    state TEXT NOT NULL,
    weights_digest TEXT NOT NULL,
    version_digest TEXT NOT NULL,
    text_bundle_digest TEXT,
    rank INTEGER NOT NULL,
    num_modules INTEGER NOT NULL,
    size_bytes BIGINT NOT NULL,
    findings JSONB DEFAULT '[]' NOT NULL,
    certificate JSONB,
    created_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    CONSTRAINT pk_adapter_versions PRIMARY KEY (id),
    CONSTRAINT uq_adapter_versions_adapter_id_number UNIQUE (adapter_id, number),
    CONSTRAINT uq_adapter_versions_id_tenant_id UNIQUE (id, tenant_id),
    CONSTRAINT fk_adapter_versions_adapter_id_tenant_id
        FOREIGN KEY(adapter_id, tenant_id) REFERENCES adapters (id, tenant_id),
    CONSTRAINT ck_adapter_versions_state
        CHECK (state IN ('validating', 'probing', 'ready', 'rejected')),
    CONSTRAINT fk_adapter_versions_base_model_id
        FOREIGN KEY(base_model_id) REFERENCES base_models (id)
)
""",
    """
CREATE TABLE audit_log (
    id UUID NOT NULL,
    tenant_id UUID,
    number BIGINT NOT NULL,
    actor_key_id UUID,
    action TEXT NOT NULL,
    subject TEXT NOT NULL,
    details JSONB NOT NULL,
    at TIMESTAMPTZ DEFAULT now() NOT NULL,
    hash BYTEA NOT NULL,
    CONSTRAINT pk_audit_log PRIMARY KEY (id),
    CONSTRAINT uq_audit_log_tenant_id_number UNIQUE NULLS NOT DISTINCT (tenant_id, number),
    CONSTRAINT fk_audit_log_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    CONSTRAINT fk_audit_log_actor_key_id
        FOREIGN KEY(actor_key_id) REFERENCES api_keys (id)
)
""",
    """
CREATE TABLE price_versions (
    id UUID NOT NULL,
    base_model_id UUID NOT NULL,
    tenant_id UUID,
    adapter_id UUID,
    effective TSTZRANGE NOT NULL,
    input_nano_per_million BIGINT NOT NULL,
    cached_input_nano_per_million BIGINT NOT NULL,
    output_nano_per_million BIGINT NOT NULL,
    created_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    CONSTRAINT pk_price_versions PRIMARY KEY (id),
    CONSTRAINT ck_price_versions_not_negative
        CHECK (input_nano_per_million >= 0 AND cached_input_nano_per_million >= 0
            AND output_nano_per_million >= 0),
    CONSTRAINT ck_price_versions_effective CHECK (NOT isempty(effective)),
    CONSTRAINT fk_price_versions_base_model_id
        FOREIGN KEY(base_model_id) REFERENCES base_models (id),
    CONSTRAINT fk_price_versions_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    CONSTRAINT fk_price_versions_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (id)
)
""",
    """
CREATE TABLE public_names (
    name TEXT NOT NULL,
    base_model_id UUID,
    adapter_id UUID,
    CONSTRAINT pk_public_names PRIMARY KEY (name),
    CONSTRAINT ck_public_names_lower CHECK (name = lower(name)),
    CONSTRAINT ck_public_names_one_owner
        CHECK (num_nonnulls(base_model_id, adapter_id) = 1),
    CONSTRAINT fk_public_names_base_model_id
        FOREIGN KEY(base_model_id) REFERENCES base_models (id),
    CONSTRAINT fk_public_names_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (id)
)
""",
    """
CREATE TABLE usage_rollups (
    id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    day DATE NOT NULL,
    base_model_id UUID NOT NULL,
    adapter_id UUID,
    api_key_id UUID NOT NULL,
    requests BIGINT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    cost_nano BIGINT NOT NULL,
    CONSTRAINT pk_usage_rollups PRIMARY KEY (id),
    CONSTRAINT uq_usage_rollups_tenant_id_day_base_model_id_adapter_id_40f9
        UNIQUE NULLS NOT DISTINCT (tenant_id, day, base_model_id, adapter_id, api_key_id),
    CONSTRAINT fk_usage_rollups_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    CONSTRAINT fk_usage_rollups_base_model_id
        FOREIGN KEY(base_model_id) REFERENCES base_models (id),
    CONSTRAINT fk_usage_rollups_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (id),
    CONSTRAINT fk_usage_rollups_api_key_id FOREIGN KEY(api_key_id) REFERENCES api_keys (id)
)
""",
    """
CREATE TABLE adapter_aliases (
    adapter_id UUID NOT NULL,
    alias TEXT NOT NULL,
    tenant_id UUID NOT NULL,
    version_id UUID NOT NULL,
    revision BIGINT DEFAULT '1' NOT NULL,
    moved_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    CONSTRAINT pk_adapter_aliases PRIMARY KEY (adapter_id, alias),
    CONSTRAINT fk_adapter_aliases_adapter_id_tenant_id
        FOREIGN KEY(adapter_id, tenant_id) REFERENCES adapters (id, tenant_id),
    CONSTRAINT fk_adapter_aliases_version_id_tenant_id
        FOREIGN KEY(version_id, tenant_id) REFERENCES adapter_versions (id, tenant_id)
)
""",
    """
CREATE TABLE holds (
    id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    api_key_id UUID NOT NULL,
    base_model_id UUID NOT NULL,
    adapter_id UUID,
    adapter_version_id UUID,
    price_version_id UUID NOT NULL,
    gateway_instance_id UUID NOT NULL,
    endpoint TEXT NOT NULL,
    state TEXT DEFAULT 'open' NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    funded_output_tokens BIGINT NOT NULL,
    progress_output_tokens BIGINT DEFAULT '0' NOT NULL,
    progress_cached_tokens BIGINT DEFAULT '0' NOT NULL,
    amount_nano BIGINT NOT NULL,
    created_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    closed_at TIMESTAMPTZ,
    CONSTRAINT pk_holds PRIMARY KEY (id),
    CONSTRAINT ck_holds_state CHECK (state IN ('open', 'settled', 'released')),
    CONSTRAINT ck_holds_amount_nano CHECK (amount_nano >= 0),
    CONSTRAINT fk_holds_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    CONSTRAINT fk_holds_api_key_id FOREIGN KEY(api_key_id) REFERENCES api_keys (id),
    CONSTRAINT fk_holds_base_model_id
        FOREIGN KEY(base_model_id) REFERENCES base_models (id),
    CONSTRAINT fk_holds_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (id),
    CONSTRAINT fk_holds_adapter_version_id
        FOREIGN KEY(adapter_version_id) REFERENCES adapter_versions (id),
    CONSTRAINT fk_holds_price_version_id
        FOREIGN KEY(price_version_id) REFERENCES price_versions (id),
    CONSTRAINT fk_holds_gateway_instance_id
        FOREIGN KEY(gateway_instance_id) REFERENCES gateway_instances (id)
)
""",
    """
CREATE INDEX ix_holds_open ON holds (gateway_instance_id) WHERE state = 'open'
""",
    """
CREATE TABLE usage_events (
    id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    api_key_id UUID NOT NULL,
    base_model_id UUID NOT NULL,
    adapter_id UUID,
    adapter_version_id UUID,
    version_digest TEXT,
    price_version_id UUID NOT NULL,
    endpoint TEXT NOT NULL,
    outcome TEXT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    cost_nano BIGINT NOT NULL,
    engine_ns BIGINT NOT NULL,
    started_at TIMESTAMPTZ NOT NULL,
    finished_at TIMESTAMPTZ NOT NULL,
    CONSTRAINT pk_usage_events PRIMARY KEY (id),
    CONSTRAINT ck_usage_events_counts
        CHECK (prompt_tokens >= 0 AND cached_tokens BETWEEN 0 AND prompt_tokens
            AND completion_tokens >= 0 AND cost_nano >= 0),
    CONSTRAINT fk_usage_events_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    CONSTRAINT fk_usage_events_api_key_id FOREIGN KEY(api_key_id) REFERENCES api_keys (id),
    CONSTRAINT fk_usage_events_base_model_id
        FOREIGN KEY(base_model_id) REFERENCES base_models (id),
    CONSTRAINT fk_usage_events_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (id),
    CONSTRAINT fk_usage_events_adapter_version_id
        FOREIGN KEY(adapter_version_id) REFERENCES adapter_versions (id),
    CONSTRAINT fk_usage_events_price_version_id
        FOREIGN KEY(price_version_id) REFERENCES price_versions (id)
) PARTITION BY RANGE (id)
""",
    """
CREATE INDEX ix_usage_events_tenant ON usage_events (tenant_id, finished_at)
""",
)

# The core GiST classes have no equality of plain UUIDs, but they have it for ranges; so a UUID
# goes into the constraint as the range that holds it alone.
PRICES_NEVER_OVERLAP = (
    "CREATE TYPE uuid_span AS RANGE (subtype = uuid)",
    """
ALTER TABLE price_versions ADD CONSTRAINT ex_price_versions_overlap EXCLUDE USING gist (
    uuid_span(base_model_id, base_model_id, '[]') WITH =,
    uuid_span(coalesce(tenant_id, '00000000-0000-0000-0000-000000000000'),
              coalesce(tenant_id, '00000000-0000-0000-0000-000000000000'), '[]') WITH =,
    uuid_span(coalesce(adapter_id, '00000000-0000-0000-0000-000000000000'),
              coalesce(adapter_id, '00000000-0000-0000-0000-000000000000'), '[]') WITH =,
    effective WITH &&
)
""",
)

# A UUIDv7 starts with 48 bits of milliseconds, so months are ranges of ids. Runs as the owner;
# a partition itself answers nobody, only its parent does.
USAGE_PARTITIONS = (
    """
CREATE FUNCTION first_uuid_at(moment timestamptz) RETURNS uuid
LANGUAGE sql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT rpad(
        lpad(to_hex((extract(epoch FROM moment) * 1000)::bigint), 12, '0'), 32, '0'
    )::uuid
$$
""",
    """
CREATE FUNCTION make_usage_partitions(months_ahead int) RETURNS int
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    month timestamp := date_trunc('month', now() AT TIME ZONE 'UTC');
    partition text;
    made int := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('make_usage_partitions', 0));
    FOR step IN 0..months_ahead LOOP
        partition := 'usage_events_' || to_char(month, 'YYYY_MM');
        IF to_regclass('public.' || partition) IS NULL THEN
            EXECUTE format(
                'CREATE TABLE public.%I PARTITION OF public.usage_events'
                ' FOR VALUES FROM (%L) TO (%L)',
                partition,
                public.first_uuid_at(month AT TIME ZONE 'UTC'),
                public.first_uuid_at((month + interval '1 month') AT TIME ZONE 'UTC')
            );
            EXECUTE format(
                'ALTER TABLE public.%I ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY',
                partition
            );
            made := made + 1;
        END IF;
        month := month + interval '1 month';
    END LOOP;
    RETURN made;
END
$$
""",
    "CREATE TABLE usage_events_default PARTITION OF usage_events DEFAULT",
    "ALTER TABLE usage_events_default ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
    "SELECT make_usage_partitions(12)",
    "REVOKE ALL ON FUNCTION make_usage_partitions(int) FROM PUBLIC",
    "GRANT EXECUTE ON FUNCTION make_usage_partitions(int) TO {worker}",
)

# Authentication comes before any tenant is known, so these two run as the worker.
KEY_FUNCTIONS = (
    """
CREATE FUNCTION find_api_key(wanted text) RETURNS TABLE (
    id uuid, public_id text, tenant_id uuid, name text, secret_hmac bytea, pepper_version int,
    scopes text[], expires_at timestamptz, revoked_at timestamptz, last_used_at timestamptz,
    tenant_slug text, tenant_status text, cache_salt bytea
)
LANGUAGE sql STABLE STRICT SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT
        keys.id, keys.public_id, keys.tenant_id, keys.name, keys.secret_hmac, keys.pepper_version,
        keys.scopes, keys.expires_at, keys.revoked_at, keys.last_used_at,
        tenants.slug, tenants.status, tenants.cache_salt
    FROM public.api_keys AS keys
    LEFT JOIN public.tenants AS tenants ON tenants.id = keys.tenant_id
    WHERE keys.public_id = wanted
$$
""",
    """
CREATE FUNCTION touch_api_key(used uuid) RETURNS void
LANGUAGE sql VOLATILE STRICT SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    UPDATE public.api_keys SET last_used_at = now()
    WHERE id = used AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute')
$$
""",
    "ALTER FUNCTION find_api_key(text) OWNER TO {worker}",
    "ALTER FUNCTION touch_api_key(uuid) OWNER TO {worker}",
    "REVOKE ALL ON FUNCTION find_api_key(text), touch_api_key(uuid) FROM PUBLIC",
    "GRANT EXECUTE ON FUNCTION find_api_key(text), touch_api_key(uuid) TO {app}",
)

# Every gateway drops what it remembers of keys when one is revoked or changed.
KEY_NOTICES = (
    """
CREATE FUNCTION notify_api_keys() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM pg_notify('api_keys', coalesce(NEW.id, OLD.id)::text);
    RETURN NULL;
END
$$
""",
    """
CREATE TRIGGER api_keys_changed AFTER UPDATE ON api_keys FOR EACH ROW
WHEN (
    (OLD.secret_hmac, OLD.scopes, OLD.expires_at, OLD.revoked_at, OLD.name)
    IS DISTINCT FROM (NEW.secret_hmac, NEW.scopes, NEW.expires_at, NEW.revoked_at, NEW.name)
)
EXECUTE FUNCTION notify_api_keys()
""",
    """
CREATE TRIGGER api_keys_deleted AFTER DELETE ON api_keys FOR EACH ROW
EXECUTE FUNCTION notify_api_keys()
""",
    """
CREATE TRIGGER tenants_changed AFTER UPDATE ON tenants FOR EACH ROW
WHEN ((OLD.status, OLD.cache_salt) IS DISTINCT FROM (NEW.status, NEW.cache_salt))
EXECUTE FUNCTION notify_api_keys()
""",
)

CURRENT_TENANT = "(SELECT nullif(current_setting('app.tenant', true), '')::uuid)"
OWN_ROWS = f"tenant_id = {CURRENT_TENANT}"

# Which rows the app role sees and may add. A subquery here is itself under row-level security.
APP_ROWS = {
    "tenants": f"id = {CURRENT_TENANT}",
    "api_keys": OWN_ROWS,
    "adapters": OWN_ROWS,
    "adapter_versions": OWN_ROWS,
    "adapter_aliases": OWN_ROWS,
    "public_names": (
        "adapter_id IS NULL OR EXISTS (SELECT FROM adapters WHERE adapters.id = adapter_id)"
    ),
    "price_versions": (
        f"{OWN_ROWS} OR (tenant_id IS NULL AND (adapter_id IS NULL"
        " OR EXISTS (SELECT FROM adapters WHERE adapters.id = adapter_id)))"
    ),
    "holds": OWN_ROWS,
    "usage_events": OWN_ROWS,
    "usage_rollups": OWN_ROWS,
    "audit_log": OWN_ROWS,
}

# Nobody may DELETE a fact or UPDATE what is not named here.
APP_GRANTS = """
SELECT ON alembic_version
SELECT ON tenants
SELECT (id, public_id, tenant_id, name, scopes, expires_at, revoked_at, last_used_at, created_at)
    ON api_keys
SELECT ON base_models
SELECT ON public_names
SELECT ON adapters
SELECT ON adapter_versions
SELECT ON adapter_aliases
SELECT ON price_versions
SELECT ON engine_replicas
SELECT, INSERT ON holds
SELECT ON usage_events
SELECT ON usage_rollups
SELECT ON audit_log
"""

WORKER_GRANTS = """
SELECT ON alembic_version
SELECT, INSERT, UPDATE (name, status, cache_salt) ON tenants
SELECT, INSERT, UPDATE (name, scopes, expires_at, revoked_at, last_used_at) ON api_keys
SELECT, INSERT, UPDATE (text_bundle_digest, shape, context_length, vocab_size, max_lora_rank)
    ON base_models
SELECT, INSERT ON public_names
SELECT, INSERT, UPDATE (deleted_at) ON adapters
SELECT, INSERT, UPDATE (state, findings, certificate) ON adapter_versions
SELECT, INSERT, UPDATE (version_id, revision, moved_at), DELETE ON adapter_aliases
SELECT, INSERT, UPDATE (effective) ON price_versions
SELECT, INSERT, UPDATE, DELETE ON gateway_instances
SELECT, INSERT, UPDATE, DELETE ON engine_replicas
SELECT, INSERT, UPDATE (state, funded_output_tokens, progress_output_tokens,
    progress_cached_tokens, amount_nano, closed_at) ON holds
SELECT, INSERT ON usage_events
SELECT, INSERT, UPDATE (requests, prompt_tokens, cached_tokens, completion_tokens, cost_nano)
    ON usage_rollups
SELECT, INSERT ON audit_log
"""


def upgrade() -> None:
    connection = op.get_bind()
    database = connection.exec_driver_sql("SELECT current_database()").scalar_one()
    quote = connection.dialect.identifier_preparer.quote
    app, worker = quote(f"{database}_app"), quote(f"{database}_worker")
    for role in (f"{database}_app", f"{database}_worker"):
        make_role(connection, role, quote(role))
    run(connection, *TABLES, *PRICES_NEVER_OVERLAP)
    run(connection, *(grant(line, app) for line in grants(APP_GRANTS)))
    run(connection, *(grant(line, worker) for line in grants(WORKER_GRANTS)))
    run(connection, *(statement.format(worker=worker) for statement in USAGE_PARTITIONS))
    # Who is given a function must be able to make one there, for that moment.
    run(connection, f"GRANT CREATE ON SCHEMA public TO {worker}")
    run(connection, *(statement.format(app=app, worker=worker) for statement in KEY_FUNCTIONS))
    run(connection, f"REVOKE CREATE ON SCHEMA public FROM {worker}")
    run(connection, *KEY_NOTICES)
    for table, rows in APP_ROWS.items():
        protect(connection, table, rows=rows, app=app, worker=worker)


def make_role(connection: Connection, name: str, quoted: str) -> None:
    """Make a login role that can bypass nothing; the owner may hand it functions."""
    exists = "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)"
    if not connection.exec_driver_sql(exists, (name,)).scalar_one():
        run(connection, f"CREATE ROLE {quoted} LOGIN")
    version = int(connection.exec_driver_sql("SHOW server_version_num").scalar_one())
    membership = " WITH INHERIT FALSE, SET TRUE" if version >= 160000 else ""
    run(connection, f"GRANT {quoted} TO CURRENT_USER{membership}")


def grants(block: str) -> list[str]:
    """One grant a line; an indented line goes on with the one before."""
    return block.strip().replace("\n    ", " ").splitlines()


def grant(privileges: str, role: str) -> str:
    return f"GRANT {privileges} TO {role}"


def protect(connection: Connection, table: str, *, rows: str, app: str, worker: str) -> None:
    run(
        connection,
        f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
        f"CREATE POLICY app ON {table} TO {app} USING ({rows}) WITH CHECK ({rows})",
        f"CREATE POLICY worker ON {table} TO {worker} USING (true) WITH CHECK (true)",
    )


def run(connection: Connection, *statements: str) -> None:
    for statement in statements:
        connection.exec_driver_sql(statement)


def downgrade() -> None:
    raise NotImplementedError("there is nothing before the first schema: drop the database instead")
