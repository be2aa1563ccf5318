"""Uploads that arrive in pieces, and versions whose bytes are missing from the store.

Adds and never takes away: a gateway of the step before reads and writes this schema as it did.
"""

from alembic import op
from sqlalchemy import Connection

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

STATES = (
    "ALTER TABLE adapter_versions DROP CONSTRAINT ck_adapter_versions_state",
    """
ALTER TABLE adapter_versions ADD CONSTRAINT ck_adapter_versions_state
    CHECK (state IN ('validating', 'probing', 'ready', 'rejected', 'missing'))
""",
)

TABLES = (
    """
CREATE TABLE uploads (
    id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    adapter TEXT NOT NULL,
    base_model TEXT,
    files JSONB NOT NULL,
    state TEXT DEFAULT 'open' NOT NULL,
    version_id UUID,
    ignored_files TEXT[] DEFAULT '{}' NOT NULL,
    findings JSONB DEFAULT '[]' NOT NULL,
    created_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    expires_at TIMESTAMPTZ NOT NULL,
    CONSTRAINT pk_uploads PRIMARY KEY (id),
    CONSTRAINT uq_uploads_id_tenant_id UNIQUE (id, tenant_id),
    CONSTRAINT fk_uploads_tenant_id FOREIGN KEY (tenant_id) REFERENCES tenants (id),
    CONSTRAINT fk_uploads_version_id_tenant_id
        FOREIGN KEY (version_id, tenant_id) REFERENCES adapter_versions (id, tenant_id),
    CONSTRAINT ck_uploads_state CHECK (state IN ('open', 'published', 'rejected')),
    CONSTRAINT ck_uploads_version CHECK ((state = 'published') = (version_id IS NOT NULL))
)
""",
    "CREATE INDEX ix_uploads_expires_at ON uploads (expires_at)",
    "CREATE INDEX ix_uploads_open ON uploads (tenant_id) WHERE state = 'open'",
    """
CREATE TABLE upload_parts (
    upload_id UUID NOT NULL,
    file TEXT NOT NULL,
    begin_bytes BIGINT NOT NULL,
    tenant_id UUID NOT NULL,
    size_bytes BIGINT NOT NULL,
    part TEXT NOT NULL,
    CONSTRAINT pk_upload_parts PRIMARY KEY (upload_id, file, begin_bytes),
    CONSTRAINT fk_upload_parts_upload_id_tenant_id
        FOREIGN KEY (upload_id, tenant_id) REFERENCES uploads (id, tenant_id),
    CONSTRAINT ck_upload_parts_range CHECK (begin_bytes >= 0 AND size_bytes > 0)
)
""",
)

OWN_ROWS = "tenant_id = (SELECT nullif(current_setting('app.tenant', true), '')::uuid)"

APP_GRANTS = ("SELECT ON uploads", "SELECT ON upload_parts")
WORKER_GRANTS = (
    "SELECT, INSERT, UPDATE (state, version_id, ignored_files, findings, expires_at), DELETE"
    " ON uploads",
    "SELECT, INSERT, DELETE ON upload_parts",
)


def upgrade() -> None:
    connection = op.get_bind()
    database = connection.exec_driver_sql("SELECT current_database()").scalar_one()
    quote = connection.dialect.identifier_preparer.quote
    app, worker = quote(f"{database}_app"), quote(f"{database}_worker")
    run(connection, *STATES, *TABLES)
    run(connection, *(f"GRANT {privileges} TO {app}" for privileges in APP_GRANTS))
    run(connection, *(f"GRANT {privileges} TO {worker}" for privileges in WORKER_GRANTS))
    for table in ("uploads", "upload_parts"):
        run(
            connection,
            f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
            f"CREATE POLICY app ON {table} TO {app} USING ({OWN_ROWS}) WITH CHECK ({OWN_ROWS})",
            f"CREATE POLICY worker ON {table} TO {worker} USING (true) WITH CHECK (true)",
        )


def run(connection: Connection, *statements: str) -> None:
    for statement in statements:
        connection.exec_driver_sql(statement)


def downgrade() -> None:
    raise NotImplementedError("the program of the step before runs on this schema as it is")
