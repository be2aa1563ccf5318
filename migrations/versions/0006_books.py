"""The books: statements that close for good, storage, credits, kept answers and contents.

What money is made of cannot be changed by anybody who does not first take the triggers away: usage
events, credits, hours of storage, statements and their lines are only ever added, and a closed
period stays closed.
"""

from alembic import op
from sqlalchemy import Connection

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

COLUMNS = (
    """
CREATE TABLE end_users (
    id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    name TEXT,
    erased_at TIMESTAMPTZ,
    CONSTRAINT pk_end_users PRIMARY KEY (id),
    CONSTRAINT uq_end_users_tenant_id_name UNIQUE (tenant_id, name),
    CONSTRAINT fk_end_users_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id)
)
""",
    # What is there already counts as settled now.
    """
ALTER TABLE usage_events
    ADD COLUMN end_user_id UUID
        CONSTRAINT fk_usage_events_end_user_id REFERENCES end_users (id),
    ADD COLUMN attempt_digest BYTEA,
    ADD COLUMN is_retry BOOLEAN DEFAULT false NOT NULL,
    ADD COLUMN settled_at TIMESTAMPTZ DEFAULT now() NOT NULL
""",
    "ALTER TABLE usage_events ALTER COLUMN settled_at SET DEFAULT clock_timestamp()",
    "CREATE INDEX ix_usage_events_settled ON usage_events (settled_at)",
    """
CREATE INDEX ix_usage_events_attempt ON usage_events (attempt_digest)
WHERE attempt_digest IS NOT NULL
""",
    """
ALTER TABLE price_versions
    ADD COLUMN storage_nano_per_gib_hour BIGINT DEFAULT '0' NOT NULL,
    ADD CONSTRAINT ck_price_versions_storage_not_negative CHECK (storage_nano_per_gib_hour >= 0)
""",
)

TABLES = (
    """
CREATE TABLE usage_credits (
    id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    retry_id UUID NOT NULL,
    base_model_id UUID NOT NULL,
    adapter_id UUID,
    price_version_id UUID NOT NULL,
    at TIMESTAMPTZ NOT NULL,
    amount_nano BIGINT NOT NULL,
    settled_at TIMESTAMPTZ DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT pk_usage_credits PRIMARY KEY (id),
    CONSTRAINT ck_usage_credits_amount_nano CHECK (amount_nano > 0),
    CONSTRAINT fk_usage_credits_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    CONSTRAINT fk_usage_credits_base_model_id
        FOREIGN KEY(base_model_id) REFERENCES base_models (id),
    CONSTRAINT fk_usage_credits_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (id),
    CONSTRAINT fk_usage_credits_price_version_id
        FOREIGN KEY(price_version_id) REFERENCES price_versions (id)
)
""",
    """
CREATE TABLE storage_hours (
    adapter_id UUID NOT NULL,
    hour TIMESTAMPTZ NOT NULL,
    tenant_id UUID NOT NULL,
    base_model_id UUID NOT NULL,
    price_version_id UUID NOT NULL,
    size_bytes BIGINT NOT NULL,
    cost_nano BIGINT NOT NULL,
    settled_at TIMESTAMPTZ DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT pk_storage_hours PRIMARY KEY (adapter_id, hour),
    CONSTRAINT ck_storage_hours_counts CHECK (size_bytes >= 0 AND cost_nano >= 0),
    CONSTRAINT fk_storage_hours_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (id),
    CONSTRAINT fk_storage_hours_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    CONSTRAINT fk_storage_hours_base_model_id
        FOREIGN KEY(base_model_id) REFERENCES base_models (id),
    CONSTRAINT fk_storage_hours_price_version_id
        FOREIGN KEY(price_version_id) REFERENCES price_versions (id)
)
""",
    "CREATE INDEX ix_storage_hours_tenant ON storage_hours (tenant_id, hour)",
    """
CREATE TABLE chores (
    name TEXT NOT NULL,
    done_until TIMESTAMPTZ NOT NULL,
    CONSTRAINT pk_chores PRIMARY KEY (name)
)
""",
    "INSERT INTO chores VALUES ('storage', date_trunc('hour', now(), 'UTC'))",
    """
CREATE TABLE billing_accounts (
    tenant_id UUID NOT NULL,
    bill_to TEXT DEFAULT '' NOT NULL,
    stripe_customer_id TEXT,
    CONSTRAINT pk_billing_accounts PRIMARY KEY (tenant_id),
    CONSTRAINT fk_billing_accounts_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id)
)
""",
    """
CREATE TABLE billing_periods (
    id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    month DATE NOT NULL,
    state TEXT DEFAULT 'open' NOT NULL,
    closed_at TIMESTAMPTZ,
    CONSTRAINT pk_billing_periods PRIMARY KEY (id),
    CONSTRAINT uq_billing_periods_tenant_id_month UNIQUE (tenant_id, month),
    CONSTRAINT ck_billing_periods_state CHECK (state IN ('open', 'grace', 'closed')),
    CONSTRAINT ck_billing_periods_month CHECK (extract(day FROM month) = 1),
    CONSTRAINT ck_billing_periods_closed_at
        CHECK ((state = 'closed') = (closed_at IS NOT NULL)),
    CONSTRAINT fk_billing_periods_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id)
)
""",
    """
CREATE TABLE statements (
    id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    period_id UUID NOT NULL,
    number TEXT NOT NULL,
    tenant_name TEXT NOT NULL,
    bill_to TEXT NOT NULL,
    as_of TIMESTAMPTZ NOT NULL,
    total_nano BIGINT NOT NULL,
    carried_in_nano BIGINT NOT NULL,
    payable_cents BIGINT NOT NULL,
    carried_out_nano BIGINT NOT NULL,
    created_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    CONSTRAINT pk_statements PRIMARY KEY (id),
    CONSTRAINT uq_statements_period_id UNIQUE (period_id),
    CONSTRAINT uq_statements_number UNIQUE (number),
    CONSTRAINT ck_statements_balance
        CHECK (carried_in_nano + total_nano = payable_cents * 10000000 + carried_out_nano),
    CONSTRAINT fk_statements_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    CONSTRAINT fk_statements_period_id FOREIGN KEY(period_id) REFERENCES billing_periods (id)
)
""",
    """
CREATE TABLE statement_lines (
    id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    statement_id UUID NOT NULL,
    number INTEGER NOT NULL,
    kind TEXT NOT NULL,
    usage_month DATE NOT NULL,
    base_model_id UUID NOT NULL,
    adapter_id UUID,
    price_version_id UUID NOT NULL,
    unit TEXT NOT NULL,
    quantity BIGINT NOT NULL,
    rate_nano BIGINT,
    amount_nano BIGINT NOT NULL,
    CONSTRAINT pk_statement_lines PRIMARY KEY (id),
    CONSTRAINT uq_statement_lines_statement_id_number UNIQUE (statement_id, number),
    CONSTRAINT ck_statement_lines_kind CHECK (kind IN ('usage', 'storage', 'credit')),
    CONSTRAINT ck_statement_lines_unit
        CHECK (unit IN ('input_tokens', 'cached_input_tokens', 'output_tokens', 'byte_hours',
            'roundings', 'retries')),
    CONSTRAINT ck_statement_lines_usage_month CHECK (extract(day FROM usage_month) = 1),
    CONSTRAINT fk_statement_lines_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    CONSTRAINT fk_statement_lines_statement_id
        FOREIGN KEY(statement_id) REFERENCES statements (id),
    CONSTRAINT fk_statement_lines_base_model_id
        FOREIGN KEY(base_model_id) REFERENCES base_models (id),
    CONSTRAINT fk_statement_lines_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (id),
    CONSTRAINT fk_statement_lines_price_version_id
        FOREIGN KEY(price_version_id) REFERENCES price_versions (id)
)
""",
    """
CREATE TABLE idempotency_keys (
    api_key_id UUID NOT NULL,
    key_digest BYTEA NOT NULL,
    tenant_id UUID NOT NULL,
    body_digest BYTEA NOT NULL,
    claim_id UUID NOT NULL,
    attempt INTEGER DEFAULT '1' NOT NULL,
    salt BYTEA,
    answer BYTEA,
    expires_at TIMESTAMPTZ NOT NULL,
    CONSTRAINT pk_idempotency_keys PRIMARY KEY (api_key_id, key_digest),
    CONSTRAINT ck_idempotency_keys_answer CHECK ((salt IS NULL) = (answer IS NULL)),
    CONSTRAINT fk_idempotency_keys_api_key_id
        FOREIGN KEY(api_key_id) REFERENCES api_keys (id),
    CONSTRAINT fk_idempotency_keys_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id)
)
""",
    "CREATE INDEX ix_idempotency_keys_expires_at ON idempotency_keys (expires_at)",
    """
CREATE TABLE content_policies (
    tenant_id UUID NOT NULL,
    keep_days INTEGER NOT NULL,
    CONSTRAINT pk_content_policies PRIMARY KEY (tenant_id),
    CONSTRAINT ck_content_policies_keep_days CHECK (keep_days BETWEEN 1 AND 3650),
    CONSTRAINT fk_content_policies_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id)
)
""",
    """
CREATE TABLE stored_contents (
    id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    end_user TEXT,
    prompt TEXT NOT NULL,
    completion TEXT NOT NULL,
    created_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    expires_at TIMESTAMPTZ NOT NULL,
    CONSTRAINT pk_stored_contents PRIMARY KEY (id),
    CONSTRAINT fk_stored_contents_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id)
)
""",
    "CREATE INDEX ix_stored_contents_expires_at ON stored_contents (expires_at)",
)

APPEND_ONLY = ("usage_events", "usage_credits", "storage_hours", "statements", "statement_lines")
SETTLED = ("usage_events", "usage_credits", "storage_hours")

GUARDS = (
    """
CREATE FUNCTION refuse_change() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'rows of % are never changed or deleted', TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END
$$
""",
    *(
        f"""
CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE ON {table} FOR EACH ROW
EXECUTE FUNCTION refuse_change()
"""
        for table in APPEND_ONLY
    ),
    # Fires before the first default of `settled_at` is taken. See `gateway.billing.settled_now`.
    """
CREATE FUNCTION join_settlement() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('settlement', 0));
    RETURN NULL;
END
$$
""",
    *(
        f"""
CREATE TRIGGER {table}_settling BEFORE INSERT ON {table} FOR EACH STATEMENT
EXECUTE FUNCTION join_settlement()
"""
        for table in SETTLED
    ),
    """
CREATE FUNCTION guard_period() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.state = 'closed' THEN
            RAISE EXCEPTION 'a billing period begins open'
                USING ERRCODE = 'restrict_violation';
        END IF;
        RETURN NEW;
    END IF;
    IF TG_OP = 'DELETE' OR OLD.state = 'closed' THEN
        RAISE EXCEPTION 'the period % is kept, and closed for good once it is closed', OLD.id
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF (NEW.id, NEW.tenant_id, NEW.month) IS DISTINCT FROM (OLD.id, OLD.tenant_id, OLD.month)
        OR (OLD.state = 'grace' AND NEW.state = 'open')
    THEN
        RAISE EXCEPTION 'the period % only ever goes from open to grace to closed', OLD.id
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.state = 'closed' AND NOT EXISTS (
        SELECT FROM public.statements WHERE statements.period_id = NEW.id
    ) THEN
        RAISE EXCEPTION 'the period % has no statement to close with', OLD.id
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$
""",
    """
CREATE TRIGGER billing_periods_guarded BEFORE INSERT OR UPDATE OR DELETE ON billing_periods
FOR EACH ROW EXECUTE FUNCTION guard_period()
""",
    """
CREATE FUNCTION guard_statement_line() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM public.statements
        JOIN public.billing_periods ON billing_periods.id = statements.period_id
        WHERE statements.id = NEW.statement_id AND statements.tenant_id = NEW.tenant_id
            AND billing_periods.state <> 'closed'
    ) THEN
        RAISE EXCEPTION 'the statement % takes no more lines', NEW.statement_id
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$
""",
    """
CREATE TRIGGER statement_lines_guarded BEFORE INSERT ON statement_lines
FOR EACH ROW EXECUTE FUNCTION guard_statement_line()
""",
    # At commit: a statement stands only with its lines and with its period closed.
    """
CREATE FUNCTION seal_statement() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NEW.total_nano <> (
        SELECT coalesce(sum(amount_nano), 0) FROM public.statement_lines
        WHERE statement_lines.statement_id = NEW.id
    ) THEN
        RAISE EXCEPTION 'the total of statement % is not the sum of its lines', NEW.id
            USING ERRCODE = 'check_violation';
    END IF;
    IF NOT EXISTS (
        SELECT FROM public.billing_periods
        WHERE billing_periods.id = NEW.period_id AND billing_periods.tenant_id = NEW.tenant_id
            AND billing_periods.state = 'closed'
    ) THEN
        RAISE EXCEPTION 'the statement % leaves its period open', NEW.id
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END
$$
""",
    """
CREATE CONSTRAINT TRIGGER statements_sealed AFTER INSERT ON statements
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION seal_statement()
""",
)

OWN_ROWS = "tenant_id = (SELECT nullif(current_setting('app.tenant', true), '')::uuid)"
TENANT_TABLES = (
    "end_users",
    "usage_credits",
    "storage_hours",
    "billing_accounts",
    "billing_periods",
    "statements",
    "statement_lines",
    "idempotency_keys",
    "content_policies",
    "stored_contents",
)

APP_GRANTS = (
    "SELECT ON end_users",
    "SELECT ON usage_credits",
    "SELECT ON storage_hours",
    "SELECT ON billing_accounts",
    "SELECT ON billing_periods",
    "SELECT ON statements",
    "SELECT ON statement_lines",
    "SELECT, INSERT, UPDATE (body_digest, claim_id, attempt, salt, answer, expires_at), DELETE"
    " ON idempotency_keys",
    "SELECT ON content_policies",
    "SELECT, INSERT ON stored_contents",
)
WORKER_GRANTS = (
    "SELECT, INSERT, UPDATE (name, erased_at) ON end_users",
    "SELECT, INSERT ON usage_credits",
    "SELECT, INSERT ON storage_hours",
    "SELECT, UPDATE (done_until) ON chores",
    "SELECT, INSERT, UPDATE (bill_to, stripe_customer_id) ON billing_accounts",
    "SELECT, INSERT, UPDATE (state, closed_at) ON billing_periods",
    "SELECT, INSERT ON statements",
    "SELECT, INSERT ON statement_lines",
    "SELECT, INSERT, UPDATE (expires_at), DELETE ON idempotency_keys",
    "SELECT, INSERT, UPDATE (keep_days), DELETE ON content_policies",
    "SELECT, INSERT, DELETE ON stored_contents",
)


def upgrade() -> None:
    connection = op.get_bind()
    database = connection.exec_driver_sql("SELECT current_database()").scalar_one()
    quote = connection.dialect.identifier_preparer.quote
    app, worker = quote(f"{database}_app"), quote(f"{database}_worker")
    run(connection, *COLUMNS, *TABLES, *GUARDS)
    run(connection, *(f"GRANT {each} TO {app}" for each in APP_GRANTS))
    run(connection, *(f"GRANT {each} TO {worker}" for each in WORKER_GRANTS))
    for table in TENANT_TABLES:
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
    raise NotImplementedError("the books are not taken down: restore a copy of the database")
