"""Base models that are retired, and revisions of one that take each other's place.

An engine serves one revision. One that drains gets no new requests, and one that is gone is
remembered, so that no gateway takes it for a new one. A gateway of the step before knows neither:
let it end before a base model is retired or swapped. A version of an adapter was probed on one
revision: the fingerprint that was found there may hold on no other.
"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

COLUMNS = (
    "ALTER TABLE base_models ADD COLUMN revision INTEGER DEFAULT '1' NOT NULL",
    "ALTER TABLE base_models ADD COLUMN retired_at TIMESTAMPTZ",
    "ALTER TABLE adapter_versions ADD COLUMN base_revision INTEGER DEFAULT '1' NOT NULL",
    "ALTER TABLE engine_replicas ADD COLUMN revision INTEGER DEFAULT '1' NOT NULL",
    "ALTER TABLE engine_replicas ADD COLUMN state TEXT DEFAULT 'serving' NOT NULL",
    """
ALTER TABLE engine_replicas ADD CONSTRAINT ck_engine_replicas_state
    CHECK (state IN ('serving', 'draining', 'gone'))
""",
)

# Gateways look at the rows again when they hear of a change.
NOTICE = (
    """
CREATE FUNCTION notify_engines() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM pg_notify('engines', '');
    RETURN NULL;
END
$$
""",
    """
CREATE TRIGGER engines_changed AFTER INSERT OR UPDATE OR DELETE ON engine_replicas
    FOR EACH STATEMENT EXECUTE FUNCTION notify_engines()
""",
)


def upgrade() -> None:
    connection = op.get_bind()
    database = connection.exec_driver_sql("SELECT current_database()").scalar_one()
    worker = connection.dialect.identifier_preparer.quote(f"{database}_worker")
    for statement in (
        *COLUMNS,
        f"GRANT UPDATE (digest, revision, retired_at) ON base_models TO {worker}",
        f"GRANT UPDATE (base_revision) ON adapter_versions TO {worker}",
        *NOTICE,
    ):
        connection.exec_driver_sql(statement)


def downgrade() -> None:
    raise NotImplementedError("the program of the step before runs on this schema as it is")
