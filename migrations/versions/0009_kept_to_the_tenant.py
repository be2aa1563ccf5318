"""Functions that see more than `app` does keep to the tenant that a transaction has named.

They are called before any tenant is named. Where one is, nobody is looked up by key any more, and
nothing is admitted for another. What `app` adds itself names keys of that tenant alone; holds it
adds by admission only. A notice of a changed key says no longer which one: every listener drops all
that it remembers. A gateway of the step before works on this schema as it did.
"""

from alembic import op

from migrations.functions import change, owned_by_worker

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

CURRENT_TENANT = "nullif(current_setting('app.tenant', true), '')"

# What is put in, and where: the functions stay as they are but for that.
CHANGES = {
    "find_api_key(text)": (
        "WHERE keys.public_id = wanted",
        f"WHERE keys.public_id = wanted AND {CURRENT_TENANT} IS NULL",
    ),
    "touch_api_key(uuid)": (
        "WHERE id = used AND",
        f"WHERE id = used AND {CURRENT_TENANT} IS NULL AND",
    ),
    "admit_request(uuid, uuid, uuid, uuid, uuid, uuid, uuid, text, bigint, bigint, bigint, bigint,"
    " boolean)": (
        "\nBEGIN\n",
        f"""
BEGIN
    IF {CURRENT_TENANT}::uuid <> p_tenant THEN
        RAISE EXCEPTION 'a request is admitted for the tenant that is named, or before any is'
            USING ERRCODE = 'insufficient_privilege';
    END IF;

""",
    ),
}

# A foreign key would be content with anybody's; the subquery sees what the tenant does.
OWN_ROWS = f"tenant_id = (SELECT {CURRENT_TENANT}::uuid)"
OWN_KEYS = f"{OWN_ROWS} AND EXISTS (SELECT FROM api_keys WHERE api_keys.id = api_key_id)"

SILENT_NOTICE = """
CREATE OR REPLACE FUNCTION notify_api_keys() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM pg_notify('api_keys', '');
    RETURN NULL;
END
$$
"""


def upgrade() -> None:
    connection = op.get_bind()
    database = connection.exec_driver_sql("SELECT current_database()").scalar_one()
    quote = connection.dialect.identifier_preparer.quote
    app = quote(f"{database}_app")
    connection.exec_driver_sql(SILENT_NOTICE)
    connection.exec_driver_sql(f"REVOKE INSERT ON holds FROM {app}")
    connection.exec_driver_sql(f"ALTER POLICY app ON idempotency_keys WITH CHECK ({OWN_KEYS})")
    with owned_by_worker(connection):
        for function, (old, new) in CHANGES.items():
            change(connection, function, {old: new})


def downgrade() -> None:
    raise NotImplementedError("the program of the step before runs on this schema as it is")
