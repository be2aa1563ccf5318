"""Rollout, deletion, sharing: aliases that split and remember, tombstones, grants, quotas.

Adds and never takes away: a gateway of the step before reads and writes this schema as it did. What
it does not know of is a canary, which it answers with the alias's other version.
"""

from alembic import op
from sqlalchemy import Connection

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

COLUMNS = (
    """
ALTER TABLE tenants
    ADD COLUMN max_adapters INTEGER,
    ADD COLUMN max_adapter_bytes BIGINT,
    ADD CONSTRAINT ck_tenants_quotas CHECK (max_adapters >= 0 AND max_adapter_bytes >= 0)
""",
    """
ALTER TABLE adapters
    ADD COLUMN default_alias TEXT DEFAULT 'latest' NOT NULL,
    ADD COLUMN purged_at TIMESTAMPTZ,
    ADD CONSTRAINT ck_adapters_deleted_first
        CHECK (purged_at IS NULL OR deleted_at IS NOT NULL)
""",
    "CREATE INDEX ix_adapters_deleted ON adapters (deleted_at) WHERE purged_at IS NULL",
    """
ALTER TABLE adapter_versions
    ADD COLUMN example_results JSONB,
    ADD COLUMN deleted_at TIMESTAMPTZ,
    ADD COLUMN purged_at TIMESTAMPTZ,
    ADD COLUMN erased_at TIMESTAMPTZ,
    ADD CONSTRAINT ck_adapter_versions_deleted_first
        CHECK (purged_at IS NULL OR deleted_at IS NOT NULL),
    ADD CONSTRAINT ck_adapter_versions_purged_first
        CHECK (erased_at IS NULL OR purged_at IS NOT NULL)
""",
    "CREATE INDEX ix_adapter_versions_weights ON adapter_versions (weights_digest)",
    """
CREATE INDEX ix_adapter_versions_text_bundle ON adapter_versions (text_bundle_digest)
    WHERE text_bundle_digest IS NOT NULL
""",
    """
CREATE INDEX ix_adapter_versions_deleted ON adapter_versions (deleted_at)
    WHERE purged_at IS NULL
""",
    """
CREATE INDEX ix_adapter_versions_not_erased ON adapter_versions (purged_at)
    WHERE purged_at IS NOT NULL AND erased_at IS NULL
""",
    """
ALTER TABLE adapter_aliases
    ADD COLUMN canary_version_id UUID,
    ADD COLUMN canary_percent INTEGER,
    ADD CONSTRAINT fk_adapter_aliases_canary_version_id_tenant_id
        FOREIGN KEY (canary_version_id, tenant_id) REFERENCES adapter_versions (id, tenant_id),
    ADD CONSTRAINT ck_adapter_aliases_canary
        CHECK (num_nonnulls(canary_version_id, canary_percent) IN (0, 2)
            AND canary_percent BETWEEN 1 AND 99)
""",
)

TABLES = (
    """
CREATE TABLE withheld_base_models (
    tenant_id UUID NOT NULL,
    base_model_id UUID NOT NULL,
    created_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    CONSTRAINT pk_withheld_base_models PRIMARY KEY (tenant_id, base_model_id),
    CONSTRAINT fk_withheld_base_models_tenant_id
        FOREIGN KEY (tenant_id) REFERENCES tenants (id),
    CONSTRAINT fk_withheld_base_models_base_model_id
        FOREIGN KEY (base_model_id) REFERENCES base_models (id)
)
""",
    """
CREATE TABLE adapter_grants (
    id UUID NOT NULL,
    adapter_id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    grantee_id UUID,
    created_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    CONSTRAINT pk_adapter_grants PRIMARY KEY (id),
    CONSTRAINT uq_adapter_grants_adapter_id_grantee_id
        UNIQUE NULLS NOT DISTINCT (adapter_id, grantee_id),
    CONSTRAINT fk_adapter_grants_adapter_id_tenant_id
        FOREIGN KEY (adapter_id, tenant_id) REFERENCES adapters (id, tenant_id),
    CONSTRAINT fk_adapter_grants_grantee_id FOREIGN KEY (grantee_id) REFERENCES tenants (id)
)
""",
    "CREATE INDEX ix_adapter_grants_grantee ON adapter_grants (grantee_id)",
    """
CREATE TABLE alias_moves (
    adapter_id UUID NOT NULL,
    alias TEXT NOT NULL,
    revision BIGINT NOT NULL,
    tenant_id UUID NOT NULL,
    version_id UUID,
    canary_version_id UUID,
    canary_percent INTEGER,
    restored_revision BIGINT,
    reason TEXT,
    actor_key_id UUID,
    moved_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    CONSTRAINT pk_alias_moves PRIMARY KEY (adapter_id, alias, revision),
    CONSTRAINT fk_alias_moves_adapter_id_tenant_id
        FOREIGN KEY (adapter_id, tenant_id) REFERENCES adapters (id, tenant_id),
    CONSTRAINT fk_alias_moves_version_id_tenant_id
        FOREIGN KEY (version_id, tenant_id) REFERENCES adapter_versions (id, tenant_id),
    CONSTRAINT fk_alias_moves_canary_version_id_tenant_id
        FOREIGN KEY (canary_version_id, tenant_id) REFERENCES adapter_versions (id, tenant_id),
    CONSTRAINT fk_alias_moves_actor_key_id FOREIGN KEY (actor_key_id) REFERENCES api_keys (id)
)
""",
)

# Row-level security is forced on the owner too, and shows it nothing; for this transaction it is
# not, and nobody else sees that.
HISTORY_SO_FAR = (
    "ALTER TABLE adapter_aliases NO FORCE ROW LEVEL SECURITY",
    """
INSERT INTO alias_moves (adapter_id, alias, revision, tenant_id, version_id, moved_at)
SELECT adapter_id, alias, revision, tenant_id, version_id, moved_at FROM adapter_aliases
""",
    "ALTER TABLE adapter_aliases FORCE ROW LEVEL SECURITY",
)

# Shapes used to be the bare modules, without the name of the base model beside them.
WHOLE_SHAPES = """
UPDATE base_models SET shape = jsonb_build_object('base_model', name, 'modules', shape)
WHERE jsonb_typeof(shape -> 'modules') IS DISTINCT FROM 'object'
"""

CURRENT_TENANT = "(SELECT nullif(current_setting('app.tenant', true), '')::uuid)"
OWN_ROWS = f"tenant_id = {CURRENT_TENANT}"

# Of the grants a tenant sees those that it gave, those that it has, and those for everybody; so
# what it sees below is its own and what is shared with it. Only its own could it ever add.
GRANTS_SEEN = (
    f"{OWN_ROWS} OR grantee_id = {CURRENT_TENANT}"
    f" OR (grantee_id IS NULL AND {CURRENT_TENANT} IS NOT NULL)"
)
SHARED_ROWS = f"{OWN_ROWS} OR EXISTS (SELECT FROM adapter_grants g WHERE g.adapter_id = "
SEEN_ROWS = {
    "adapters": f"{SHARED_ROWS} adapters.id)",
    "adapter_versions": f"{SHARED_ROWS} adapter_versions.adapter_id)",
    "adapter_aliases": f"{SHARED_ROWS} adapter_aliases.adapter_id)",
    "public_names": (
        "(adapter_id IS NULL AND NOT EXISTS (SELECT FROM withheld_base_models w"
        " WHERE w.base_model_id = public_names.base_model_id))"
        " OR EXISTS (SELECT FROM adapters WHERE adapters.id = adapter_id)"
    ),
}
NEW_ROWS = {
    "withheld_base_models": (OWN_ROWS, OWN_ROWS),
    "adapter_grants": (GRANTS_SEEN, OWN_ROWS),
    "alias_moves": (OWN_ROWS, OWN_ROWS),
}

APP_GRANTS = (
    "SELECT ON withheld_base_models",
    "SELECT ON adapter_grants",
    "SELECT ON alias_moves",
)
WORKER_GRANTS = (
    "UPDATE (max_adapters, max_adapter_bytes) ON tenants",
    "UPDATE (default_alias, purged_at) ON adapters",
    "UPDATE (example_results, deleted_at, purged_at, erased_at) ON adapter_versions",
    "UPDATE (canary_version_id, canary_percent) ON adapter_aliases",
    "SELECT, INSERT, DELETE ON withheld_base_models",
    "SELECT, INSERT, DELETE ON adapter_grants",
    "SELECT, INSERT ON alias_moves",
)

# A bill names what was used, also when it is not shared any more. Runs as the worker inside, and
# tells of nothing that is not on the current tenant's bills.
BILLED_ADAPTERS = (
    """
CREATE FUNCTION billed_adapters() RETURNS TABLE (id uuid, public_name text)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT adapters.id, adapters.public_name FROM public.adapters AS adapters
    WHERE adapters.id IN (
        SELECT rollups.adapter_id FROM public.usage_rollups AS rollups
        WHERE rollups.tenant_id = nullif(current_setting('app.tenant', true), '')::uuid
    )
$$
""",
    "ALTER FUNCTION billed_adapters() OWNER TO {worker}",
    "REVOKE ALL ON FUNCTION billed_adapters() FROM PUBLIC",
    "GRANT EXECUTE ON FUNCTION billed_adapters() TO {app}, {worker}",
)


def upgrade() -> None:
    connection = op.get_bind()
    database = connection.exec_driver_sql("SELECT current_database()").scalar_one()
    quote = connection.dialect.identifier_preparer.quote
    app, worker = quote(f"{database}_app"), quote(f"{database}_worker")
    run(connection, *COLUMNS, *TABLES, *HISTORY_SO_FAR, WHOLE_SHAPES)
    run(connection, *(f"GRANT {privileges} TO {app}" for privileges in APP_GRANTS))
    run(connection, *(f"GRANT {privileges} TO {worker}" for privileges in WORKER_GRANTS))
    for table, rows in SEEN_ROWS.items():
        run(connection, f"ALTER POLICY app ON {table} USING ({rows})")
    for table, (seen, added) in NEW_ROWS.items():
        run(
            connection,
            f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
            f"CREATE POLICY app ON {table} TO {app} USING ({seen}) WITH CHECK ({added})",
            f"CREATE POLICY worker ON {table} TO {worker} USING (true) WITH CHECK (true)",
        )
    # Who is given a function must be able to make one there, for that moment.
    run(connection, f"GRANT CREATE ON SCHEMA public TO {worker}")
    run(connection, *(statement.format(app=app, worker=worker) for statement in BILLED_ADAPTERS))
    run(connection, f"REVOKE CREATE ON SCHEMA public FROM {worker}")


def run(connection: Connection, *statements: str) -> None:
    for statement in statements:
        connection.exec_driver_sql(statement)


def downgrade() -> None:
    raise NotImplementedError("the program of the step before runs on this schema as it is")
