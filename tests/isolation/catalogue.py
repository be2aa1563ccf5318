"""What the database holds, by its own catalogue: no table is forgotten because we forgot it.

Looks as a superuser, to whom row-level security does not apply.
"""

import json
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import asyncpg

Rows = dict[str, list[dict[str, Any]]]

# Tables and what else can be read from; partitions too, which must answer nobody by themselves.
TABLES = """
    SELECT c.relname AS name, c.relispartition AS is_partition, c.relrowsecurity AS is_protected,
           c.relforcerowsecurity AS is_forced, EXISTS (
               SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'tenant_id'
               AND NOT a.attisdropped
           ) OR c.relname = 'tenants' AS is_of_tenants
    FROM pg_class c
    WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
    ORDER BY c.relname
"""
# Changed while nobody asks for anything: the outbox tries again and again.
RESTLESS = {
    "webhook_deliveries": {"state", "num_attempts", "next_attempt_at", "last_error"},
    # Whoever may speak for a gateway says so each second.
    "gateway_instances": {"heartbeat_at"},
}
# What is shorter is found in any text by chance.
MIN_SECRET_LENGTH = 8


def plain_url(url: str) -> str:
    return url.replace("+asyncpg", "")


async def tables(superuser_url: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(plain_url(superuser_url))
    try:
        return list(await connection.fetch(TABLES))
    finally:
        await connection.close()


async def rows_by_owner(superuser_url: str) -> dict[uuid.UUID | None, Rows]:
    """Every row of every table, by the tenant that it is of; None for those of no tenant."""
    everything: Rows = defaultdict(list)
    connection = await asyncpg.connect(plain_url(superuser_url))
    try:
        for table in await connection.fetch(TABLES):
            name = table["name"]
            if table["is_partition"]:
                continue
            query = f'SELECT to_jsonb(t) FROM "{name}" t'  # noqa: S608 - a name of the catalogue
            for record in await connection.fetch(query):
                everything[name].append(json.loads(record[0]))
    finally:
        await connection.close()
    owners = {row["id"]: row["tenant_id"] for row in everything["adapters"]}
    found: dict[uuid.UUID | None, Rows] = defaultdict(lambda: defaultdict(list))
    for name, rows in everything.items():
        for row in rows:
            found[_owner(name, row, owners)][name].append(row)
    return found


def _owner(table: str, row: dict[str, Any], owners: dict[str, str]) -> uuid.UUID | None:
    """Whose row it is: by its tenant, or else by its adapter."""
    owner = row["id"] if table == "tenants" else row.get("tenant_id")
    owner = owner or owners.get(row.get("adapter_id") or "")
    return None if owner is None else uuid.UUID(owner)


def at_rest(rows: Rows) -> Rows:
    """The rows in an order of their own, without what changes by itself."""
    return {
        name: sorted(
            ({k: v for k, v in row.items() if k not in RESTLESS.get(name, ())} for row in entries),
            key=lambda row: json.dumps(row, sort_keys=True),
        )
        for name, entries in sorted(rows.items())
    }


def secrets_of(owner: uuid.UUID, everything: dict[uuid.UUID | None, Rows]) -> set[str]:
    """Whatever is said in a tenant's rows and in nobody else's."""
    others = (rows for whose, rows in everything.items() if whose != owner)
    known = {word for rows in others for word in _words_in(rows)}
    return {word for word in _words_in(everything[owner]) if word not in known}


def _words_in(rows: Rows) -> Iterator[str]:
    """Of the rows, and not of their columns' names."""
    for entries in rows.values():
        for row in entries:
            yield from _words_of(row.values())


def words(value: object) -> Iterator[str]:
    """Every text and every large number in it, as answers would spell them."""
    match value:
        case str():
            # As PostgreSQL spells bytes, and moments in UTC.
            word = value.removeprefix("\\x").removesuffix("+00:00")
            if len(word) >= MIN_SECRET_LENGTH:
                yield word
        case bool() | None:
            pass
        case int() if len(str(value)) > MIN_SECRET_LENGTH:
            yield str(value)
        case dict():
            yield from _words_of(value.values())
            yield from _words_of(value.keys())
        case list():
            yield from _words_of(value)


def _words_of(values: Iterable[object]) -> Iterator[str]:
    for value in values:
        yield from words(value)
