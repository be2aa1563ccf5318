"""Ids as OpenAI's clients spell them, with a word for what it is; and pages of lists by such ids.

Ids are UUIDv7, so their order is that of time. Knows no table.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Select

FILE, BATCH, LINE = "file-", "batch_", "batch_req_"

Row = TypeVar("Row")


def spell_id(word: str, object_id: uuid.UUID) -> str:
    return f"{word}{object_id.hex}"


def read_id(word: str, spelled: str) -> uuid.UUID | None:
    """None for what no id of that kind looks like."""
    try:
        object_id = uuid.UUID(spelled.removeprefix(word))
    except ValueError:
        return None
    return object_id if spell_id(word, object_id) == spelled else None


@dataclass(frozen=True, slots=True)
class Page:
    """A stretch of a list; the newest first, unless it is `ascending`."""

    limit: int
    # The last one of the page before.
    after: uuid.UUID | None = None
    is_ascending: bool = False

    def of(self, query: Select[Any], column: Any) -> Select[Any]:
        """The query for this page, and for one row more, which tells whether there is another."""
        if self.after is not None:
            query = query.where(column > self.after if self.is_ascending else column < self.after)
        order = column.asc() if self.is_ascending else column.desc()
        return query.order_by(order).limit(self.limit + 1)

    def cut(self, rows: Sequence[Row]) -> tuple[list[Row], bool]:
        """The page's rows, and whether there are more after them."""
        return list(rows[: self.limit]), len(rows) > self.limit
