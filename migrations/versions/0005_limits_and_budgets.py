"""Ceilings, budgets, alerts, and what a key may be restricted to.

Admission is a function, so that all rules of a request and its hold are one round trip and one
short transaction. It locks rows of `limits`, then of `budgets`, each in the order of their ids, and
reads what others did in the meantime by statements that begin after that.
"""

from importlib import import_module

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

first = import_module("migrations.versions.0001_first_schema")

KEY_COLUMNS = (
    """
ALTER TABLE api_keys
    ADD COLUMN role TEXT,
    ADD COLUMN allowed_models TEXT[],
    ADD COLUMN ip_ranges TEXT[],
    ADD COLUMN previous_secret_hmac BYTEA,
    ADD COLUMN previous_pepper_version INTEGER,
    ADD COLUMN previous_expires_at TIMESTAMPTZ,
    ADD CONSTRAINT ck_api_keys_role
        CHECK (role IN ('owner', 'developer', 'billing', 'viewer')),
    ADD CONSTRAINT ck_api_keys_previous_secret
        CHECK (num_nulls(previous_secret_hmac, previous_pepper_version, previous_expires_at)
            IN (0, 3))
""",
    "DROP TRIGGER api_keys_changed ON api_keys",
    """
CREATE TRIGGER api_keys_changed AFTER UPDATE ON api_keys FOR EACH ROW
WHEN (
    (OLD.secret_hmac, OLD.scopes, OLD.expires_at, OLD.revoked_at, OLD.name, OLD.allowed_models,
     OLD.ip_ranges, OLD.previous_secret_hmac, OLD.previous_expires_at)
    IS DISTINCT FROM
    (NEW.secret_hmac, NEW.scopes, NEW.expires_at, NEW.revoked_at, NEW.name, NEW.allowed_models,
     NEW.ip_ranges, NEW.previous_secret_hmac, NEW.previous_expires_at)
)
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
    tenant_slug text, tenant_status text, cache_salt bytea
)
LANGUAGE sql STABLE STRICT SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT
        keys.id, keys.public_id, keys.tenant_id, keys.name, keys.secret_hmac, keys.pepper_version,
        keys.scopes, keys.expires_at, keys.revoked_at, keys.last_used_at, keys.allowed_models,
        keys.ip_ranges, keys.previous_secret_hmac, keys.previous_pepper_version,
        keys.previous_expires_at, tenants.slug, tenants.status, tenants.cache_salt
    FROM public.api_keys AS keys
    LEFT JOIN public.tenants AS tenants ON tenants.id = keys.tenant_id
    WHERE keys.public_id = wanted
$$
"""

TABLES = (
    """
CREATE TABLE limits (
    id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    api_key_id UUID,
    adapter_id UUID,
    requests_per_minute BIGINT,
    request_burst BIGINT,
    tokens_per_minute BIGINT,
    token_burst BIGINT,
    concurrent_requests BIGINT,
    queue_time_ms BIGINT,
    requests_level BIGINT DEFAULT '0' NOT NULL,
    tokens_level BIGINT DEFAULT '0' NOT NULL,
    measured_at_us BIGINT DEFAULT '0' NOT NULL,
    busy_since_us BIGINT DEFAULT '0' NOT NULL,
    CONSTRAINT pk_limits PRIMARY KEY (id),
    CONSTRAINT uq_limits_tenant_id_api_key_id_adapter_id
        UNIQUE NULLS NOT DISTINCT (tenant_id, api_key_id, adapter_id),
    CONSTRAINT ck_limits_one_scope CHECK (num_nonnulls(api_key_id, adapter_id) <= 1),
    CONSTRAINT ck_limits_positive
        CHECK (least(requests_per_minute, request_burst, tokens_per_minute, token_burst,
            concurrent_requests, queue_time_ms) > 0),
    CONSTRAINT fk_limits_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    CONSTRAINT fk_limits_api_key_id FOREIGN KEY(api_key_id) REFERENCES api_keys (id),
    CONSTRAINT fk_limits_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (id)
)
""",
    # Room on each page for the next versions of its rows: they change with every request.
    "ALTER TABLE limits SET (fillfactor = 50)",
    "CREATE INDEX ix_limits_adapter ON limits (adapter_id) WHERE adapter_id IS NOT NULL",
    """
CREATE TABLE budgets (
    id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    api_key_id UUID,
    kind TEXT NOT NULL,
    period TEXT NOT NULL,
    time_zone TEXT NOT NULL,
    cap_nano BIGINT NOT NULL,
    alert_percents BIGINT[] NOT NULL,
    created_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    CONSTRAINT pk_budgets PRIMARY KEY (id),
    CONSTRAINT uq_budgets_tenant_id_api_key_id_kind_period
        UNIQUE NULLS NOT DISTINCT (tenant_id, api_key_id, kind, period),
    CONSTRAINT ck_budgets_kind CHECK (kind IN ('hard', 'soft')),
    CONSTRAINT ck_budgets_period CHECK (period IN ('day', 'week', 'month')),
    CONSTRAINT ck_budgets_cap_nano CHECK (cap_nano >= 0),
    CONSTRAINT fk_budgets_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    CONSTRAINT fk_budgets_api_key_id FOREIGN KEY(api_key_id) REFERENCES api_keys (id)
)
""",
    """
CREATE TABLE budget_windows (
    budget_id UUID NOT NULL,
    starts_at TIMESTAMPTZ NOT NULL,
    tenant_id UUID NOT NULL,
    spent_nano BIGINT NOT NULL,
    alerted_percent BIGINT DEFAULT '0' NOT NULL,
    CONSTRAINT pk_budget_windows PRIMARY KEY (budget_id, starts_at),
    CONSTRAINT fk_budget_windows_budget_id
        FOREIGN KEY(budget_id) REFERENCES budgets (id) ON DELETE CASCADE,
    CONSTRAINT fk_budget_windows_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id)
)
""",
    """
CREATE TABLE webhooks (
    id UUID NOT NULL,
    tenant_id UUID,
    url TEXT NOT NULL,
    pepper_version INTEGER NOT NULL,
    created_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    CONSTRAINT pk_webhooks PRIMARY KEY (id),
    CONSTRAINT fk_webhooks_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id)
)
""",
    """
CREATE TABLE webhook_deliveries (
    id UUID NOT NULL,
    webhook_id UUID NOT NULL,
    tenant_id UUID NOT NULL,
    event JSONB NOT NULL,
    state TEXT DEFAULT 'waiting' NOT NULL,
    num_attempts BIGINT DEFAULT '0' NOT NULL,
    next_attempt_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    last_error TEXT,
    created_at TIMESTAMPTZ DEFAULT now() NOT NULL,
    CONSTRAINT pk_webhook_deliveries PRIMARY KEY (id),
    CONSTRAINT ck_webhook_deliveries_state CHECK (state IN ('waiting', 'delivered', 'failed')),
    CONSTRAINT fk_webhook_deliveries_webhook_id
        FOREIGN KEY(webhook_id) REFERENCES webhooks (id) ON DELETE CASCADE,
    CONSTRAINT fk_webhook_deliveries_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id)
)
""",
    """
CREATE INDEX ix_webhook_deliveries_waiting ON webhook_deliveries (next_attempt_at)
WHERE state = 'waiting'
""",
    "CREATE INDEX ix_holds_open_of_tenant ON holds (tenant_id) WHERE state = 'open'",
    """
CREATE INDEX ix_holds_open_of_adapter ON holds (adapter_id)
WHERE state = 'open' AND adapter_id IS NOT NULL
""",
)

# The Generic Cell Rate Algorithm in its form of a continuous-state leaky bucket (ITU-T I.371). A
# level is counted in sixty-millionths: it falls by `per_minute` each microsecond, and one request
# or token lifts it by 60,000,000. So nothing is ever rounded, whatever the ceiling is.
LEAKY_BUCKET = (
    """
CREATE FUNCTION leaked(level bigint, elapsed_us bigint, per_minute bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE
AS $$
    SELECT greatest(
        level - least(greatest(elapsed_us, 0), level / per_minute + 1) * per_minute, 0
    )
$$
""",
    # Microseconds until so much more fits; not above zero where it fits now.
    """
CREATE FUNCTION wait_us(level bigint, cost bigint, per_minute bigint, burst bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE
AS $$
    SELECT ceil((level + (cost - burst) * 60000000) / per_minute::numeric)::bigint
$$
""",
)

BUDGET_FUNCTIONS = (
    """
CREATE FUNCTION budget_window_start(period text, time_zone text, moment timestamptz)
RETURNS timestamptz
LANGUAGE sql STABLE
AS $$ SELECT date_trunc(period, moment, time_zone) $$
""",
    # By the calendar there: a day may have 23 or 25 hours.
    """
CREATE FUNCTION budget_window_end(period text, time_zone text, starts_at timestamptz)
RETURNS timestamptz
LANGUAGE sql STABLE
AS $$
    SELECT ((starts_at AT TIME ZONE time_zone) + ('1 ' || period)::interval) AT TIME ZONE time_zone
$$
""",
    # Tell each webhook of the tenant, once, that so many percent of a budget are reached.
    """
CREATE FUNCTION alert_of_budget(wanted uuid, window_start timestamptz, reached bigint)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    WITH crossed AS (
        UPDATE public.budget_windows AS w SET alerted_percent = threshold.percent
        FROM public.budgets AS b, LATERAL (
            SELECT max(each) AS percent FROM unnest(b.alert_percents) AS each WHERE each <= reached
        ) AS threshold
        WHERE w.budget_id = wanted AND w.starts_at = window_start AND b.id = wanted
          AND threshold.percent > w.alerted_percent
        RETURNING b.*, w.starts_at, w.spent_nano, w.alerted_percent
    )
    INSERT INTO public.webhook_deliveries (id, webhook_id, tenant_id, event)
    SELECT
        gen_random_uuid(), hooks.id, crossed.tenant_id,
        jsonb_build_object(
            'type', 'budget.threshold', 'tenant', tenants.slug, 'key_id', crossed.api_key_id,
            'budget_id', crossed.id, 'kind', crossed.kind, 'period', crossed.period,
            'time_zone', crossed.time_zone, 'period_start', crossed.starts_at,
            'cap_nano', crossed.cap_nano, 'spent_nano', crossed.spent_nano,
            'percent', crossed.alerted_percent
        )
    FROM crossed
    JOIN public.tenants AS tenants ON tenants.id = crossed.tenant_id
    JOIN public.webhooks AS hooks
      ON hooks.tenant_id = crossed.tenant_id OR hooks.tenant_id IS NULL
$$
""",
    # What new usage events cost, added to every budget they fall into. Shares a lock with whoever
    # makes a budget, so that each event is either in the sum that a budget begins with or here.
    """
CREATE FUNCTION spend_budgets(
    tenants uuid[], keys uuid[], costs bigint[], moments timestamptz[]
) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    touched record;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('manylora budgets', 0));
    FOR touched IN
        WITH shares AS (
            SELECT b.id, b.tenant_id, b.cap_nano, sum(event.cost)::bigint AS cost_nano,
                   public.budget_window_start(b.period, b.time_zone, event.moment) AS starts_at
            FROM unnest(tenants, keys, costs, moments) AS event (tenant_id, key_id, cost, moment)
            JOIN public.budgets b ON b.tenant_id = event.tenant_id
             AND (b.api_key_id IS NULL OR b.api_key_id = event.key_id)
            GROUP BY b.id, starts_at
            ORDER BY b.id, starts_at
        )
        INSERT INTO public.budget_windows AS w (budget_id, starts_at, tenant_id, spent_nano)
        SELECT id, starts_at, tenant_id, cost_nano FROM shares
        ON CONFLICT (budget_id, starts_at)
            DO UPDATE SET spent_nano = w.spent_nano + excluded.spent_nano
        RETURNING w.budget_id, w.starts_at, w.spent_nano
    LOOP
        PERFORM public.alert_of_budget(
            b.id, touched.starts_at,
            CASE WHEN b.cap_nano = 0 THEN 100
                 ELSE floor(touched.spent_nano::numeric * 100 / b.cap_nano)::bigint END
        )
        FROM public.budgets b WHERE b.id = touched.budget_id;
    END LOOP;
END
$$
""",
)

ADMIT = """
CREATE FUNCTION admit_request(
    p_request uuid, p_tenant uuid, p_key uuid, p_base_model uuid, p_adapter uuid,
    p_adapter_version uuid, p_instance uuid, p_endpoint text, p_prompt_tokens bigint,
    p_max_output_tokens bigint, p_tranche_tokens bigint, p_max_cost_nano bigint,
    p_is_rehearsal boolean
) RETURNS TABLE (
    price_id uuid, input_nano_per_million bigint, cached_input_nano_per_million bigint,
    output_nano_per_million bigint, amount_nano bigint, funded_output_tokens bigint,
    max_output_tokens bigint, is_budgeted boolean, queue_time_ms bigint, admitted_at timestamptz,
    refused_rule text, refused_scope text, refused_ceiling bigint, refused_current bigint,
    refused_clears_us bigint,
    requests_ceiling bigint, requests_remaining bigint, requests_reset_us bigint,
    tokens_ceiling bigint, tokens_remaining bigint, tokens_reset_us bigint
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    unit constant bigint := 60000000;
    never constant bigint := 9223372036854775807;
    lease constant interval := '10 seconds';
    price public.price_versions%ROWTYPE;
    rules public.limits[];
    rule public.limits%ROWTYPE;
    budget record;
    moment timestamptz;
    now_us bigint;
    elapsed_us bigint;
    scope text;
    prompt_cost numeric;
    room numeric;
    max_output bigint := p_max_output_tokens;
    funded bigint;
    held_by_tenant bigint; held_by_key bigint;
    open_of_tenant bigint; open_of_key bigint; open_of_adapter bigint;
    charge bigint;
    level bigint; burst bigint; waits_us bigint; in_flight bigint;
    has_budget boolean;
    max_queue_ms bigint;
    -- The refusal that takes longest to clear.
    no_rule text; no_scope text; no_ceiling bigint; no_current bigint; no_clears_us bigint := 0;
    r_ceiling bigint; r_remaining bigint; r_reset_us bigint;
    t_ceiling bigint; t_remaining bigint; t_reset_us bigint;
BEGIN
    -- Should the database lose a hold, the journal still has it, and settlement puts it back.
    PERFORM set_config('synchronous_commit', 'off', true);

    SELECT * INTO price FROM public.price_versions p
    WHERE p.base_model_id = p_base_model AND p.effective @> now()
      AND (p.tenant_id IS NULL OR p.tenant_id = p_tenant)
      AND (p.adapter_id IS NULL OR p.adapter_id = p_adapter)
    ORDER BY p.adapter_id IS NULL, p.tenant_id IS NULL
    LIMIT 1;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    prompt_cost := p_prompt_tokens::numeric
        * greatest(price.input_nano_per_million, price.cached_input_nano_per_million);

    -- All that may change is locked first; whatever is read below was committed by then.
    SELECT array_agg(locked.l) INTO rules FROM (
        SELECT l FROM public.limits l
        WHERE (l.tenant_id = p_tenant AND l.adapter_id IS NULL
               AND (l.api_key_id IS NULL OR l.api_key_id = p_key))
           OR l.adapter_id = p_adapter
        ORDER BY l.id
        FOR NO KEY UPDATE
    ) AS locked;
    PERFORM FROM public.budgets b
    WHERE b.tenant_id = p_tenant AND b.kind = 'hard'
      AND (b.api_key_id IS NULL OR b.api_key_id = p_key)
    ORDER BY b.id
    FOR NO KEY UPDATE;
    has_budget := FOUND;
    moment := clock_timestamp();
    now_us := (extract(epoch FROM moment) * 1000000)::bigint;

    IF p_max_cost_nano IS NOT NULL THEN
        room := p_max_cost_nano::numeric * 1000000 - prompt_cost;
        IF room < price.output_nano_per_million THEN
            no_rule := 'max_cost'; no_scope := 'request'; no_ceiling := p_max_cost_nano;
            no_current := ceil((prompt_cost + price.output_nano_per_million) / 1000000);
        ELSIF price.output_nano_per_million > 0 THEN
            max_output := least(max_output, floor(room / price.output_nano_per_million));
        END IF;
    END IF;
    funded := least(p_tranche_tokens, max_output);

    IF has_budget OR EXISTS (
        SELECT FROM unnest(rules) AS l
        WHERE l.concurrent_requests IS NOT NULL AND l.adapter_id IS NULL
    ) THEN
        SELECT coalesce(sum(h.amount_nano), 0),
               coalesce(sum(h.amount_nano) FILTER (WHERE h.api_key_id = p_key), 0),
               count(*) FILTER (WHERE lives.it),
               count(*) FILTER (WHERE lives.it AND h.api_key_id = p_key)
        INTO held_by_tenant, held_by_key, open_of_tenant, open_of_key
        FROM public.holds h
        JOIN public.gateway_instances i ON i.id = h.gateway_instance_id
        -- Who asks lives, whatever became of its heartbeats.
        CROSS JOIN LATERAL (
            SELECT i.heartbeat_at > moment - lease OR i.id = p_instance AS it
        ) AS lives
        WHERE h.tenant_id = p_tenant AND h.state = 'open';
    END IF;

    IF has_budget AND no_rule IS NULL THEN
        FOR budget IN
            SELECT b.id, b.api_key_id, b.cap_nano, b.period, b.time_zone, starts.at AS starts_at,
                   coalesce(w.spent_nano, 0)
                   + CASE WHEN b.api_key_id IS NULL THEN held_by_tenant ELSE held_by_key END AS used
            FROM public.budgets b
            CROSS JOIN LATERAL (
                SELECT public.budget_window_start(b.period, b.time_zone, moment) AS at
            ) AS starts
            LEFT JOIN public.budget_windows w ON w.budget_id = b.id AND w.starts_at = starts.at
            WHERE b.tenant_id = p_tenant AND b.kind = 'hard'
              AND (b.api_key_id IS NULL OR b.api_key_id = p_key)
        LOOP
            room := (budget.cap_nano - budget.used)::numeric * 1000000 - prompt_cost;
            IF room < price.output_nano_per_million THEN
                no_rule := 'budget';
                no_scope := CASE WHEN budget.api_key_id IS NULL THEN 'tenant' ELSE 'key' END;
                no_ceiling := budget.cap_nano; no_current := budget.used;
                no_clears_us := extract(epoch FROM public.budget_window_end(
                    budget.period, budget.time_zone, budget.starts_at) - moment) * 1000000;
                IF NOT p_is_rehearsal THEN
                    PERFORM public.alert_of_budget(budget.id, budget.starts_at, 100);
                END IF;
                EXIT;
            ELSIF price.output_nano_per_million > 0 THEN
                funded := least(funded, floor(room / price.output_nano_per_million));
            END IF;
        END LOOP;
    END IF;
    charge := p_prompt_tokens + funded;

    FOREACH rule IN ARRAY coalesce(rules, '{}') LOOP
        scope := CASE WHEN rule.adapter_id IS NOT NULL THEN 'adapter'
                      WHEN rule.api_key_id IS NOT NULL THEN 'key' ELSE 'tenant' END;
        elapsed_us := now_us - rule.measured_at_us;
        max_queue_ms := least(max_queue_ms, rule.queue_time_ms);
        IF rule.requests_per_minute IS NOT NULL THEN
            burst := coalesce(rule.request_burst, rule.requests_per_minute);
            level := public.leaked(rule.requests_level, elapsed_us, rule.requests_per_minute);
            waits_us := public.wait_us(level, 1, rule.requests_per_minute, burst);
            IF waits_us > no_clears_us
               AND coalesce(no_rule, '') NOT IN ('budget', 'max_cost') THEN
                no_rule := 'requests_per_minute'; no_scope := scope;
                no_ceiling := rule.requests_per_minute; no_clears_us := waits_us;
                no_current := ceil(level / unit::numeric);
            END IF;
            IF r_remaining IS NULL OR greatest((burst * unit - level) / unit, 0) < r_remaining THEN
                r_ceiling := burst;
                r_remaining := greatest((burst * unit - level) / unit, 0);
                r_reset_us := level / rule.requests_per_minute;
            END IF;
        END IF;
        IF rule.tokens_per_minute IS NOT NULL THEN
            burst := coalesce(rule.token_burst, rule.tokens_per_minute);
            level := public.leaked(rule.tokens_level, elapsed_us, rule.tokens_per_minute);
            waits_us := CASE WHEN charge > burst THEN never
                ELSE public.wait_us(level, charge, rule.tokens_per_minute, burst) END;
            IF waits_us > no_clears_us
               AND coalesce(no_rule, '') NOT IN ('budget', 'max_cost') THEN
                no_rule := 'tokens_per_minute'; no_scope := scope;
                no_ceiling := rule.tokens_per_minute; no_clears_us := waits_us;
                no_current := CASE WHEN charge > burst THEN charge
                    ELSE ceil(level / unit::numeric) END;
            END IF;
            IF t_remaining IS NULL OR greatest((burst * unit - level) / unit, 0) < t_remaining THEN
                t_ceiling := burst;
                t_remaining := greatest((burst * unit - level) / unit, 0);
                t_reset_us := level / rule.tokens_per_minute;
            END IF;
        END IF;
        IF rule.concurrent_requests IS NOT NULL THEN
            IF scope = 'adapter' THEN
                SELECT count(*) INTO open_of_adapter
                FROM public.holds h
                JOIN public.gateway_instances i ON i.id = h.gateway_instance_id
                WHERE h.adapter_id = p_adapter AND h.state = 'open'
                  AND (i.heartbeat_at > moment - lease OR i.id = p_instance);
            END IF;
            in_flight := CASE scope WHEN 'adapter' THEN open_of_adapter
                                    WHEN 'key' THEN open_of_key ELSE open_of_tenant END;
            IF in_flight >= rule.concurrent_requests AND no_rule IS NULL THEN
                -- When a request ends nobody knows; the next try is worth it in a second.
                no_rule := 'concurrent_requests'; no_scope := scope;
                no_ceiling := rule.concurrent_requests; no_current := in_flight;
                no_clears_us := 1000000;
            END IF;
        END IF;
    END LOOP;

    IF no_rule IS NULL AND NOT p_is_rehearsal THEN
        IF r_ceiling IS NOT NULL OR t_ceiling IS NOT NULL THEN
            UPDATE public.limits AS l SET
                requests_level = CASE WHEN l.requests_per_minute IS NULL THEN 0 ELSE unit
                    + public.leaked(l.requests_level, now_us - l.measured_at_us,
                                    l.requests_per_minute) END,
                tokens_level = CASE WHEN l.tokens_per_minute IS NULL THEN 0 ELSE charge * unit
                    + public.leaked(l.tokens_level, now_us - l.measured_at_us,
                                    l.tokens_per_minute) END,
                busy_since_us = CASE WHEN l.tokens_per_minute IS NOT NULL AND public.leaked(
                        l.tokens_level, now_us - l.measured_at_us, l.tokens_per_minute) > 0
                    THEN l.busy_since_us ELSE now_us END,
                measured_at_us = greatest(now_us, l.measured_at_us)
            WHERE l.id IN (SELECT each.id FROM unnest(rules) AS each);
            r_remaining := r_remaining - 1;
            t_remaining := t_remaining - charge;
        END IF;
        INSERT INTO public.holds (
            id, tenant_id, api_key_id, base_model_id, adapter_id, adapter_version_id,
            price_version_id, gateway_instance_id, endpoint, prompt_tokens, funded_output_tokens,
            amount_nano, created_at
        ) VALUES (
            p_request, p_tenant, p_key, p_base_model, p_adapter, p_adapter_version, price.id,
            p_instance, p_endpoint, p_prompt_tokens, funded,
            ceil((prompt_cost + funded * price.output_nano_per_million::numeric) / 1000000), moment
        );
    END IF;

    RETURN QUERY SELECT
        price.id, price.input_nano_per_million, price.cached_input_nano_per_million,
        price.output_nano_per_million,
        ceil((prompt_cost + funded * price.output_nano_per_million::numeric) / 1000000)::bigint,
        funded, max_output, has_budget, max_queue_ms, moment,
        no_rule, no_scope, no_ceiling, no_current, nullif(no_clears_us, never),
        r_ceiling, r_remaining, r_reset_us, t_ceiling, t_remaining, t_reset_us;
END
$$
"""

# The heartbeat: this gateway lives, its streams have come so far, and want to be funded so far.
# Budgets are locked before holds, as in admission. Answers for each stream that wanted more.
EXTEND = """
CREATE FUNCTION extend_holds(
    p_instance uuid, p_ids uuid[], p_progress bigint[], p_cached bigint[], p_wanted bigint[]
) RETURNS TABLE (id uuid, funded_output_tokens bigint, is_budgeted boolean)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    needy uuid[];
    stream record;
    budget record;
    affordable numeric;
    held bigint;
    prompt_cost numeric;
    granted bigint;
BEGIN
    UPDATE public.gateway_instances AS i SET heartbeat_at = clock_timestamp()
    WHERE i.id = p_instance;

    PERFORM FROM public.budgets b
    WHERE b.kind = 'hard' AND EXISTS (
        SELECT FROM unnest(p_ids, p_wanted) AS s (id, wanted)
        JOIN public.holds h ON h.id = s.id
        WHERE h.state = 'open' AND s.wanted > h.funded_output_tokens
          AND h.tenant_id = b.tenant_id AND (b.api_key_id IS NULL OR b.api_key_id = h.api_key_id)
    )
    ORDER BY b.id
    FOR NO KEY UPDATE;
    PERFORM FROM public.holds h WHERE h.id = ANY (p_ids) AND h.state = 'open'
    ORDER BY h.id FOR NO KEY UPDATE;

    SELECT coalesce(array_agg(h.id), '{}') INTO needy
    FROM unnest(p_ids, p_wanted) AS s (id, wanted)
    JOIN public.holds h ON h.id = s.id
    WHERE h.state = 'open' AND s.wanted > h.funded_output_tokens AND EXISTS (
        SELECT FROM public.budgets b
        WHERE b.kind = 'hard' AND b.tenant_id = h.tenant_id
          AND (b.api_key_id IS NULL OR b.api_key_id = h.api_key_id)
    );

    RETURN QUERY
    WITH moved AS (
        UPDATE public.holds AS h SET
            progress_output_tokens = s.progress,
            progress_cached_tokens = s.cached,
            funded_output_tokens = CASE WHEN s.id = ANY (needy) THEN h.funded_output_tokens
                ELSE greatest(h.funded_output_tokens, s.wanted) END,
            amount_nano = CASE WHEN s.id = ANY (needy) OR s.wanted <= h.funded_output_tokens
                THEN h.amount_nano
                ELSE ceil((h.prompt_tokens::numeric
                    * greatest(p.input_nano_per_million, p.cached_input_nano_per_million)
                    + s.wanted::numeric * p.output_nano_per_million) / 1000000) END
        FROM unnest(p_ids, p_progress, p_cached, p_wanted) AS s (id, progress, cached, wanted),
             public.price_versions p
        WHERE h.id = s.id AND h.state = 'open' AND p.id = h.price_version_id
        RETURNING h.id, h.funded_output_tokens
    )
    SELECT moved.id, moved.funded_output_tokens, false FROM moved WHERE moved.id <> ALL (needy);

    FOR stream IN
        SELECT h.id, h.tenant_id, h.api_key_id, h.amount_nano, h.funded_output_tokens AS funded,
               s.wanted, p.output_nano_per_million AS rate,
               h.prompt_tokens::numeric
               * greatest(p.input_nano_per_million, p.cached_input_nano_per_million) AS prompt_cost
        FROM unnest(p_ids, p_wanted) AS s (id, wanted)
        JOIN public.holds h ON h.id = s.id
        JOIN public.price_versions p ON p.id = h.price_version_id
        WHERE h.id = ANY (needy)
        ORDER BY h.id
    LOOP
        granted := stream.wanted;
        FOR budget IN
            SELECT b.api_key_id, b.cap_nano - coalesce(w.spent_nano, 0) AS unspent
            FROM public.budgets b
            LEFT JOIN public.budget_windows w ON w.budget_id = b.id AND w.starts_at =
                public.budget_window_start(b.period, b.time_zone, clock_timestamp())
            WHERE b.kind = 'hard' AND b.tenant_id = stream.tenant_id
              AND (b.api_key_id IS NULL OR b.api_key_id = stream.api_key_id)
        LOOP
            SELECT coalesce(sum(h.amount_nano), 0) INTO held FROM public.holds h
            WHERE h.tenant_id = stream.tenant_id AND h.state = 'open' AND h.id <> stream.id
              AND (budget.api_key_id IS NULL OR h.api_key_id = budget.api_key_id);
            IF stream.rate > 0 THEN
                affordable := floor(((budget.unspent - held)::numeric * 1000000
                                     - stream.prompt_cost) / stream.rate);
                granted := least(granted, greatest(affordable, stream.funded));
            END IF;
        END LOOP;
        UPDATE public.holds AS h SET
            funded_output_tokens = granted,
            amount_nano = greatest(h.amount_nano,
                ceil((stream.prompt_cost + granted::numeric * stream.rate) / 1000000))
        WHERE h.id = stream.id AND granted > h.funded_output_tokens;
        RETURN QUERY SELECT stream.id, granted, true;
    END LOOP;
END
$$
"""

# Correct what admission charged in tokens by what requests really used. A charge that drained
# away, because the bucket was empty since, cannot be given back.
REFUND = """
CREATE FUNCTION refund_tokens(
    tenants uuid[], keys uuid[], adapters uuid[], refunds bigint[], admitted timestamptz[]
) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    rule public.limits%ROWTYPE;
    now_us bigint;
BEGIN
    -- Nobody's money: one that is lost drains away within a minute or so.
    PERFORM set_config('synchronous_commit', 'off', true);
    FOR rule IN
        SELECT * FROM public.limits l
        WHERE l.tokens_per_minute IS NOT NULL AND (
            l.adapter_id IS NULL AND l.tenant_id = ANY (tenants)
                AND (l.api_key_id IS NULL OR l.api_key_id = ANY (keys))
            OR l.adapter_id = ANY (adapters)
        )
        ORDER BY l.id
        FOR NO KEY UPDATE
    LOOP
        now_us := greatest(
            (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, rule.measured_at_us
        );
        UPDATE public.limits AS l SET
            requests_level = CASE WHEN rule.requests_per_minute IS NULL THEN 0 ELSE public.leaked(
                rule.requests_level, now_us - rule.measured_at_us, rule.requests_per_minute) END,
            tokens_level = greatest(0, due.back + public.leaked(
                rule.tokens_level, now_us - rule.measured_at_us, rule.tokens_per_minute)),
            measured_at_us = now_us
        FROM (
            SELECT coalesce(sum(-60000000 * each.refund), 0)::bigint AS back
            FROM unnest(tenants, keys, adapters, refunds, admitted)
                AS each (tenant_id, key_id, adapter_id, refund, at)
            WHERE CASE WHEN rule.adapter_id IS NOT NULL THEN each.adapter_id = rule.adapter_id
                  ELSE each.tenant_id = rule.tenant_id
                      AND (rule.api_key_id IS NULL OR rule.api_key_id = each.key_id) END
              AND (each.refund < 0
                   OR extract(epoch FROM each.at) * 1000000 >= rule.busy_since_us)
        ) AS due
        WHERE l.id = rule.id AND due.back <> 0;
    END LOOP;
END
$$
"""

APP_GRANTS = """
SELECT (role, allowed_models, ip_ranges, previous_expires_at) ON api_keys
SELECT ON limits
SELECT ON budgets
SELECT ON budget_windows
SELECT ON webhooks
SELECT ON webhook_deliveries
"""

WORKER_GRANTS = """
UPDATE (secret_hmac, pepper_version, role, allowed_models, ip_ranges, previous_secret_hmac,
    previous_pepper_version, previous_expires_at) ON api_keys
SELECT, INSERT, DELETE, UPDATE (requests_per_minute, request_burst, tokens_per_minute, token_burst,
    concurrent_requests, queue_time_ms, requests_level, tokens_level, measured_at_us,
    busy_since_us) ON limits
SELECT, INSERT, DELETE, UPDATE (cap_nano, alert_percents) ON budgets
SELECT, INSERT, UPDATE (spent_nano, alerted_percent) ON budget_windows
SELECT, INSERT, DELETE ON webhooks
SELECT, INSERT, DELETE, UPDATE (state, num_attempts, next_attempt_at, last_error)
    ON webhook_deliveries
"""

OF_WORKER = (
    "spend_budgets(uuid[], uuid[], bigint[], timestamptz[])",
    "alert_of_budget(uuid, timestamptz, bigint)",
    "extend_holds(uuid, uuid[], bigint[], bigint[], bigint[])",
    "refund_tokens(uuid[], uuid[], uuid[], bigint[], timestamptz[])",
)
OF_APP = (
    "find_api_key(text)",
    "admit_request(uuid, uuid, uuid, uuid, uuid, uuid, uuid, text, bigint, bigint, bigint, bigint,"
    " boolean)",
)


def upgrade() -> None:
    connection = op.get_bind()
    database = connection.exec_driver_sql("SELECT current_database()").scalar_one()
    quote = connection.dialect.identifier_preparer.quote
    app, worker = quote(f"{database}_app"), quote(f"{database}_worker")
    first.run(connection, *KEY_COLUMNS, *TABLES, *LEAKY_BUCKET, *BUDGET_FUNCTIONS)
    first.run(connection, FIND_KEY, ADMIT, EXTEND, REFUND)
    first.run(connection, *(first.grant(line, app) for line in first.grants(APP_GRANTS)))
    first.run(connection, *(first.grant(line, worker) for line in first.grants(WORKER_GRANTS)))
    for table in ("limits", "budgets", "budget_windows", "webhooks", "webhook_deliveries"):
        first.protect(connection, table, rows=first.OWN_ROWS, app=app, worker=worker)
    for function in (*OF_WORKER, *OF_APP):
        first.run(connection, f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC")
    for function in OF_WORKER:
        first.run(connection, f"GRANT EXECUTE ON FUNCTION {function} TO {worker}")
    # These run as the worker and are called by the app.
    first.run(connection, f"GRANT CREATE ON SCHEMA public TO {worker}")
    for function in OF_APP:
        first.run(
            connection,
            f"GRANT EXECUTE ON FUNCTION {function} TO {app}",
            f"ALTER FUNCTION {function} OWNER TO {worker}",
        )
    first.run(connection, f"REVOKE CREATE ON SCHEMA public FROM {worker}")


def downgrade() -> None:
    raise NotImplementedError("ceilings and budgets would be lost: restore a backup instead")
