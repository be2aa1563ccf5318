"""What is held and what is spent are read at one glance, by one statement.

They were read by two. A request that was settled between them was, for a stream that grew, neither
held any more nor spent yet: a hard budget could be passed by what it had cost. For one that was
admitted it was both, and might be refused for nothing. A gateway of the step before is served too.
"""

from alembic import op

from migrations.functions import change, owned_by_worker

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

EXTEND = "extend_holds(uuid, uuid[], bigint[], bigint[], bigint[])"
EXTENSION = {
    "    held bigint;\n": "",
    """\
            SELECT b.api_key_id, b.cap_nano - coalesce(w.spent_nano, 0) AS unspent
            FROM public.budgets b
""": """\
            SELECT b.cap_nano - coalesce(w.spent_nano, 0) - (
                SELECT coalesce(sum(h.amount_nano), 0) FROM public.holds h
                WHERE h.tenant_id = b.tenant_id AND h.state = 'open' AND h.id <> stream.id
                  AND (b.api_key_id IS NULL OR h.api_key_id = b.api_key_id)
            ) AS free_nano
            FROM public.budgets b
""",
    """\
            SELECT coalesce(sum(h.amount_nano), 0) INTO held FROM public.holds h
            WHERE h.tenant_id = stream.tenant_id AND h.state = 'open' AND h.id <> stream.id
              AND (budget.api_key_id IS NULL OR h.api_key_id = budget.api_key_id);
""": "",
    "(budget.unspent - held)::numeric * 1000000\n": "budget.free_nano * 1000000\n",
}

ADMIT = (
    "admit_request(uuid, uuid, uuid, uuid, uuid, uuid, uuid, text, bigint, bigint, bigint, bigint,"
    " boolean)"
)
ADMISSION = {
    "    held_by_tenant bigint; held_by_key bigint;\n": "",
    "    IF has_budget OR EXISTS (\n": "    IF EXISTS (\n",
    """\
        SELECT coalesce(sum(h.amount_nano), 0),
               coalesce(sum(h.amount_nano) FILTER (WHERE h.api_key_id = p_key), 0),
               count(*) FILTER (WHERE lives.it),
""": """\
        SELECT count(*) FILTER (WHERE lives.it),
""",
    "INTO held_by_tenant, held_by_key, open_of_tenant,": "INTO open_of_tenant,",
    """\
                   coalesce(w.spent_nano, 0)
                   + CASE WHEN b.api_key_id IS NULL THEN held_by_tenant ELSE held_by_key END AS used
""": """\
                   coalesce(w.spent_nano, 0) + (
                       SELECT coalesce(sum(h.amount_nano), 0) FROM public.holds h
                       WHERE h.tenant_id = b.tenant_id AND h.state = 'open'
                         AND (b.api_key_id IS NULL OR h.api_key_id = b.api_key_id)
                   ) AS used
""",
}


def upgrade() -> None:
    connection = op.get_bind()
    change(connection, EXTEND, EXTENSION)
    with owned_by_worker(connection):
        change(connection, ADMIT, ADMISSION)


def downgrade() -> None:
    raise NotImplementedError("the program of the step before runs on this schema as it is")
