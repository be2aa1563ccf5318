"""How a step of the history changes a function of an earlier one without saying all of it again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sqlalchemy import Connection


def change(
    connection: Connection, function: str, changes: Mapping[str, str], *, times: int = 1
) -> None:
    """Put one text in the place of another; owner and privileges stay.

    `function` with the types of its arguments. Raises RuntimeError where an old text is not there
    so many times: somebody has changed the function by hand.
    """
    query = "SELECT pg_get_functiondef($1::regprocedure)"
    definition: str = connection.exec_driver_sql(query, (f"public.{function}",)).scalar_one()
    for old, new in changes.items():
        if definition.count(old) != times:
            raise RuntimeError(f"{function} is not as it was: change it by hand")
        definition = definition.replace(old, new)
    connection.exec_driver_sql(definition)


@contextmanager
def owned_by_worker(connection: Connection) -> Iterator[None]:
    """Change functions that are the worker's: as it, who may make one for that moment."""
    database = connection.exec_driver_sql("SELECT current_database()").scalar_one()
    worker = connection.dialect.identifier_preparer.quote(f"{database}_worker")
    connection.exec_driver_sql(f"GRANT CREATE ON SCHEMA public TO {worker}")
    connection.exec_driver_sql(f"SET LOCAL ROLE {worker}")
    yield
    connection.exec_driver_sql("RESET ROLE")
    connection.exec_driver_sql(f"REVOKE CREATE ON SCHEMA public FROM {worker}")
