"""Adapters that operators want to stay in a slot: engines forget, these rows do not."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

OWN_ROWS = "tenant_id = (SELECT nullif(current_setting('app.tenant', true), '')::uuid)"

TABLE = """
CREATE TABLE adapter_pins (
    version_id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    pinned_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    CONSTRAINT pk_adapter_pins PRIMARY KEY (version_id),
    CONSTRAINT fk_adapter_pins_version_id_tenant_id
        FOREIGN KEY(version_id, tenant_id) REFERENCES adapter_versions (id, tenant_id)
)
"""


def upgrade() -> None:
    connection = op.get_bind()
    database = connection.exec_driver_sql("SELECT current_database()").scalar_one()
    quote = connection.dialect.identifier_preparer.quote
    app, worker = quote(f"{database}_app"), quote(f"{database}_worker")
    for statement in (
        TABLE,
        f"GRANT SELECT ON adapter_pins TO {app}",
        f"GRANT SELECT, INSERT, DELETE ON adapter_pins TO {worker}",
        "ALTER TABLE adapter_pins ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
        f"CREATE POLICY app ON adapter_pins TO {app} USING ({OWN_ROWS}) WITH CHECK ({OWN_ROWS})",
        f"CREATE POLICY worker ON adapter_pins TO {worker} USING (true) WITH CHECK (true)",
    ):
        connection.exec_driver_sql(statement)


def downgrade() -> None:
    raise NotImplementedError("the program of the step before runs on this schema as it is")
