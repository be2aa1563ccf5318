"""Policies of tenants, and how often each of their rules decided something.

A key is found with the id of its tenant's policy, so that a request of a tenant without one costs
nothing more; each change of a policy gives it another id, and is told to all gateways on the
channel of the keys. A gateway of the step before reads and writes this schema as it did.
"""

from alembic import op
from sqlalchemy import Connection

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

TABLES = (
    """
CREATE TABLE policies (
    tenant_id UUID NOT NULL,
    id UUID NOT NULL,
    document JSONB NOT NULL,
    pepper_version INTEGER NOT NULL,
    updated_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    CONSTRAINT pk_policies PRIMARY KEY (tenant_id),
    CONSTRAINT fk_policies_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id)
)
""",
    """
CREATE TABLE policy_decisions (
    tenant_id UUID NOT NULL,
    day DATE NOT NULL,
    rule TEXT NOT NULL,
    verdict TEXT NOT NULL,
    num_decisions BIGINT NOT NULL,
    CONSTRAINT pk_policy_decisions PRIMARY KEY (tenant_id, day, rule, verdict),
    CONSTRAINT ck_policy_decisions_verdict
        CHECK (verdict IN ('passed', 'refused', 'failed_open', 'failed_closed')),
    CONSTRAINT ck_policy_decisions_num_decisions CHECK (num_decisions > 0),
    CONSTRAINT fk_policy_decisions_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id)
)
""",
    """
CREATE TRIGGER policies_changed AFTER INSERT OR UPDATE OR DELETE ON policies FOR EACH ROW
EXECUTE FUNCTION notify_api_keys()
""",
    "DROP FUNCTION find_api_key(text)",
)

# Runs as the worker, before any tenant is known.
FIND_KEY = """
CREATE FUNCTION find_api_key(wanted text) RETURNS TABLE (
    id uuid, public_id text, tenant_id uuid, name text, secret_hmac bytea, pepper_version int,
    scopes text[], expires_at timestamptz, revoked_at timestamptz, last_used_at timestamptz,
    allowed_models text[], ip_ranges text[], previous_secret_hmac bytea,
    previous_pepper_version int, previous_expires_at timestamptz,
    tenant_slug text, tenant_status text, cache_salt bytea, policy_id uuid
)
LANGUAGE sql STABLE STRICT SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT
        keys.id, keys.public_id, keys.tenant_id, keys.name, keys.secret_hmac, keys.pepper_version,
        keys.scopes, keys.expires_at, keys.revoked_at, keys.last_used_at, keys.allowed_models,
        keys.ip_ranges, keys.previous_secret_hmac, keys.previous_pepper_version,
        keys.previous_expires_at, tenants.slug, tenants.status, tenants.cache_salt, policies.id
    FROM public.api_keys AS keys
    LEFT JOIN public.tenants AS tenants ON tenants.id = keys.tenant_id
    LEFT JOIN public.policies AS policies ON policies.tenant_id = keys.tenant_id
    WHERE keys.public_id = wanted
$$
"""

OWN_ROWS = "tenant_id = (SELECT nullif(current_setting('app.tenant', true), '')::uuid)"
TENANT_TABLES = ("policies", "policy_decisions")
APP_GRANTS = ("SELECT ON policies", "SELECT ON policy_decisions")
WORKER_GRANTS = (
    "SELECT, INSERT, UPDATE (id, document, pepper_version, updated_at), DELETE ON policies",
    "SELECT, INSERT, UPDATE (num_decisions) ON policy_decisions",
)


def upgrade() -> None:
    connection = op.get_bind()
    database = connection.exec_driver_sql("SELECT current_database()").scalar_one()
    quote = connection.dialect.identifier_preparer.quote
    app, worker = quote(f"{database}_app"), quote(f"{database}_worker")
    run(connection, *TABLES, FIND_KEY)
    run(connection, *(f"GRANT {each} TO {app}" for each in APP_GRANTS))
    run(connection, *(f"GRANT {each} TO {worker}" for each in WORKER_GRANTS))
    for table in TENANT_TABLES:
        run(
            connection,
            f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
            f"CREATE POLICY app ON {table} TO {app} USING ({OWN_ROWS}) WITH CHECK ({OWN_ROWS})",
            f"CREATE POLICY worker ON {table} TO {worker} USING (true) WITH CHECK (true)",
        )
    run(
        connection,
        "REVOKE ALL ON FUNCTION find_api_key(text) FROM PUBLIC",
        f"GRANT CREATE ON SCHEMA public TO {worker}",
        f"GRANT EXECUTE ON FUNCTION find_api_key(text) TO {app}",
        f"ALTER FUNCTION find_api_key(text) OWNER TO {worker}",
        f"REVOKE CREATE ON SCHEMA public FROM {worker}",
    )


def run(connection: Connection, *statements: str) -> None:
    for statement in statements:
        connection.exec_driver_sql(statement)


def downgrade() -> None:
    raise NotImplementedError("policies would be lost: restore a copy of the database")
