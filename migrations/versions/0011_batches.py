"""Files of tenants, batches of requests, and what batches cost less.

A request of a batch is known by its endpoint, which begins with `batch.`. Its rates are those of
its price less the price's discount, each rounded to a whole nano-USD per million tokens, half to
even; from there on it is priced like any other. It may fill half of a ceiling: the other half stays
free for whoever waits. A gateway of the step before reads and writes this schema as it did.
"""

from importlib import import_module

from alembic import op

from migrations.functions import change, owned_by_worker

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

first = import_module("migrations.versions.0001_first_schema")

COLUMNS = (
    "ALTER TABLE price_versions ADD COLUMN batch_discount_bp INTEGER DEFAULT '0' NOT NULL",
    """
ALTER TABLE price_versions ADD CONSTRAINT ck_price_versions_batch_discount
    CHECK (batch_discount_bp BETWEEN 0 AND 10000)
""",
    "ALTER TABLE tenants ADD COLUMN max_file_bytes BIGINT",
    "ALTER TABLE tenants ADD CONSTRAINT ck_tenants_file_quota CHECK (max_file_bytes >= 0)",
    "ALTER TABLE statement_lines DROP CONSTRAINT ck_statement_lines_unit",
    """
ALTER TABLE statement_lines ADD CONSTRAINT ck_statement_lines_unit CHECK (
    unit IN ('input_tokens', 'cached_input_tokens', 'output_tokens', 'batch_input_tokens',
    'batch_cached_input_tokens', 'batch_output_tokens', 'byte_hours', 'roundings', 'retries'))
""",
)

TABLES = (
    """
CREATE TABLE tenant_files (
    id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    size_bytes BIGINT NOT NULL,
    created_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    expires_at TIMESTAMPTZ NOT NULL,
    CONSTRAINT pk_tenant_files PRIMARY KEY (id),
    CONSTRAINT fk_tenant_files_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    CONSTRAINT ck_tenant_files_purpose CHECK (purpose IN ('batch', 'batch_output')),
    CONSTRAINT ck_tenant_files_size_bytes CHECK (size_bytes >= 0)
)
""",
    "CREATE INDEX ix_tenant_files_tenant ON tenant_files (tenant_id, id)",
    "CREATE INDEX ix_tenant_files_expires_at ON tenant_files (expires_at)",
    """
CREATE TABLE batches (
    id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    api_key_id UUID NOT NULL,
    endpoint TEXT NOT NULL,
    input_file_id UUID NOT NULL,
    metadata JSONB,
    output_expires_after_s BIGINT,
    status TEXT DEFAULT 'validating' NOT NULL,
    outcome TEXT,
    errors JSONB DEFAULT '[]' NOT NULL,
    num_requests BIGINT DEFAULT '0' NOT NULL,
    num_completed BIGINT DEFAULT '0' NOT NULL,
    num_failed BIGINT DEFAULT '0' NOT NULL,
    output_file_id UUID,
    error_file_id UUID,
    created_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    expires_at TIMESTAMPTZ NOT NULL,
    in_progress_at TIMESTAMPTZ,
    finalizing_at TIMESTAMPTZ,
    cancelling_at TIMESTAMPTZ,
    ended_at TIMESTAMPTZ,
    claim_id UUID,
    gateway_instance_id UUID,
    lease_until TIMESTAMPTZ,
    CONSTRAINT pk_batches PRIMARY KEY (id),
    CONSTRAINT uq_batches_id_tenant_id UNIQUE (id, tenant_id),
    CONSTRAINT fk_batches_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    CONSTRAINT fk_batches_api_key_id FOREIGN KEY(api_key_id) REFERENCES api_keys (id),
    CONSTRAINT ck_batches_status CHECK (status IN ('validating', 'in_progress', 'finalizing',
        'completed', 'failed', 'expired', 'cancelling', 'cancelled')),
    CONSTRAINT ck_batches_outcome
        CHECK (outcome IN ('completed', 'failed', 'expired', 'cancelled')),
    CONSTRAINT ck_batches_ended_at CHECK (
        (ended_at IS NOT NULL) = (status IN ('completed', 'failed', 'expired', 'cancelled'))),
    CONSTRAINT ck_batches_claim
        CHECK (num_nonnulls(claim_id, gateway_instance_id, lease_until) IN (0, 3))
)
""",
    "CREATE INDEX ix_batches_tenant ON batches (tenant_id, id)",
    "CREATE INDEX ix_batches_open ON batches (created_at) WHERE ended_at IS NULL",
    """
CREATE TABLE batch_results (
    batch_id UUID NOT NULL,
    number BIGINT NOT NULL,
    tenant_id UUID NOT NULL,
    request_id UUID NOT NULL,
    is_error BOOLEAN NOT NULL,
    line BYTEA NOT NULL,
    CONSTRAINT pk_batch_results PRIMARY KEY (batch_id, number),
    CONSTRAINT fk_batch_results_batch_id_tenant_id FOREIGN KEY(batch_id, tenant_id)
        REFERENCES batches (id, tenant_id) ON DELETE CASCADE
)
""",
)

DISCOUNTED = """
CREATE FUNCTION discounted(rate bigint, discount_bp integer) RETURNS bigint
LANGUAGE sql IMMUTABLE
AS $$
    SELECT (div(total, 10000) + CASE
        WHEN total % 10000 > 5000 OR (total % 10000 = 5000 AND div(total, 10000) % 2 = 1)
        THEN 1 ELSE 0 END)::bigint
    FROM (SELECT rate::numeric * (10000 - discount_bp)) AS exact (total)
$$
"""

IS_BATCH = "p_endpoint LIKE 'batch.%'"
# What is put in, and where: admission stays as it is but for that.
ADMISSION = {
    "    prompt_cost := p_prompt_tokens::numeric": f"""
    IF {IS_BATCH} THEN
        price.input_nano_per_million := public.discounted(
            price.input_nano_per_million, price.batch_discount_bp);
        price.cached_input_nano_per_million := public.discounted(
            price.cached_input_nano_per_million, price.batch_discount_bp);
        price.output_nano_per_million := public.discounted(
            price.output_nano_per_million, price.batch_discount_bp);
    END IF;
    prompt_cost := p_prompt_tokens::numeric""",
    "burst := coalesce(rule.request_burst, rule.requests_per_minute);": f"""
            burst := coalesce(rule.request_burst, rule.requests_per_minute);
            IF {IS_BATCH} THEN burst := greatest(burst / 2, 1); END IF;""",
    "burst := coalesce(rule.token_burst, rule.tokens_per_minute);": f"""
            burst := coalesce(rule.token_burst, rule.tokens_per_minute);
            IF {IS_BATCH} THEN burst := greatest(burst / 2, least(charge, burst)); END IF;""",
    "IF in_flight >= rule.concurrent_requests AND no_rule IS NULL THEN": f"""
            IF in_flight >= (CASE WHEN {IS_BATCH} THEN greatest(rule.concurrent_requests / 2, 1)
                    ELSE rule.concurrent_requests END)
               AND no_rule IS NULL THEN""",
}
DISCOUNT = "CASE WHEN h.endpoint LIKE 'batch.%' THEN p.batch_discount_bp ELSE 0 END"
INPUT_RATE = "greatest(p.input_nano_per_million, p.cached_input_nano_per_million)"
# Each of these is there twice.
EXTENSION = {
    INPUT_RATE: f"public.discounted({INPUT_RATE}, {DISCOUNT})",
    "p.output_nano_per_million": f"public.discounted(p.output_nano_per_million, {DISCOUNT})",
}
ADMIT = (
    "admit_request(uuid, uuid, uuid, uuid, uuid, uuid, uuid, text, bigint, bigint, bigint, bigint,"
    " boolean)"
)
EXTEND = "extend_holds(uuid, uuid[], bigint[], bigint[], bigint[])"

TENANT_TABLES = ("tenant_files", "batches", "batch_results")
WORKER_GRANTS = """
SELECT, INSERT, UPDATE (filename, expires_at), DELETE ON tenant_files
SELECT, INSERT, DELETE, UPDATE (status, outcome, errors, num_requests, num_completed, num_failed,
    output_file_id, error_file_id, in_progress_at, finalizing_at, cancelling_at, ended_at, claim_id,
    gateway_instance_id, lease_until) ON batches
SELECT, INSERT, DELETE ON batch_results
UPDATE (max_file_bytes) ON tenants
"""


def upgrade() -> None:
    connection = op.get_bind()
    database = connection.exec_driver_sql("SELECT current_database()").scalar_one()
    quote = connection.dialect.identifier_preparer.quote
    app, worker = quote(f"{database}_app"), quote(f"{database}_worker")
    first.run(connection, *COLUMNS, *TABLES, DISCOUNTED)
    first.run(connection, *(first.grant(f"SELECT ON {each}", app) for each in TENANT_TABLES))
    first.run(connection, *(first.grant(line, worker) for line in first.grants(WORKER_GRANTS)))
    for table in TENANT_TABLES:
        first.protect(connection, table, rows=first.OWN_ROWS, app=app, worker=worker)
    change(connection, EXTEND, EXTENSION, times=2)
    with owned_by_worker(connection):
        change(connection, ADMIT, ADMISSION)


def downgrade() -> None:
    raise NotImplementedError("files and batches would be lost: restore a copy of the database")
