"""Which files each version was uploaded as, so that they can be had back.

Adds and never takes away: a gateway of the step before reads and writes this schema as it did. What
it takes in has no such files.
"""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    connection = op.get_bind()
    database = connection.exec_driver_sql("SELECT current_database()").scalar_one()
    worker = connection.dialect.identifier_preparer.quote(f"{database}_worker")
    for statement in (
        "ALTER TABLE adapter_versions ADD COLUMN source_files JSONB",
        """
CREATE INDEX ix_adapter_versions_source_files ON adapter_versions
    USING gin (jsonb_path_query_array(source_files, '$.*')) WHERE source_files IS NOT NULL
""",
        f"GRANT UPDATE (source_files) ON adapter_versions TO {worker}",
    ):
        connection.exec_driver_sql(statement)


def downgrade() -> None:
    raise NotImplementedError("the program of the step before runs on this schema as it is")
