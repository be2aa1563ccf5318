"""A report as a file: JSON, CSV or Parquet, row by row, so that its length costs no memory.

Every form has the same rows in the same order. Knows nothing of where they come from or go to.
"""

import csv
import io
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

from gateway.billing.usage import COUNTS, Question, UsageRow, UsageTotals, cell
from gateway.errors import InvalidRequest

Format = Literal["json", "csv", "parquet"]


class ReportWriter(Protocol):
    """Takes rows until it is told that they were all."""

    media_type: str

    def add(self, rows: Sequence[UsageRow]) -> None: ...

    def finish(self) -> None: ...


def open_writer(report_format: Format, file: Any, question: Question) -> ReportWriter:
    """Raises InvalidRequest where this installation cannot write the format."""
    match report_format:
        case "json":
            return _JsonWriter(file, question)
        case "csv":
            return _CsvWriter(file, question)
        case "parquet":
            return _ParquetWriter(file, question)


class _JsonWriter:
    """One `UsageReport`; its totals come last, when they are known."""

    media_type = "application/json"

    def __init__(self, file: Any, question: Question) -> None:
        self._file = file
        self._totals = dict.fromkeys(COUNTS, 0)
        self._separator = b""
        head = msgspec.json.encode(
            {
                "from": question.period.since,
                "to": question.period.until,
                "time_zone": question.time_zone,
                "as_of": question.as_of,
                "group_by": [str(each) for each in question.group_by],
            }
        )
        file.write(head.removesuffix(b"}") + b',"rows":[')

    def add(self, rows: Sequence[UsageRow]) -> None:
        for row in rows:
            self._file.write(self._separator + msgspec.json.encode(row))
            self._separator = b","
            for name in COUNTS:
                self._totals[name] += getattr(row, name)

    def finish(self) -> None:
        totals = msgspec.json.encode(UsageTotals(**self._totals))
        self._file.write(b'],"totals":' + totals + b"}")


class _CsvWriter:
    """The rows under a header; no totals, so that a column may be summed."""

    media_type = "text/csv"

    def __init__(self, file: Any, question: Question) -> None:
        self._file = file
        self._fields = question.fields
        self._write([(*question.fields, *COUNTS)])

    def add(self, rows: Sequence[UsageRow]) -> None:
        self._write(
            [
                (
                    *(cell(getattr(row, field)) for field in self._fields),
                    *(getattr(row, name) for name in COUNTS),
                )
                for row in rows
            ]
        )

    def finish(self) -> None:
        """Nothing comes after the rows."""

    def _write(self, rows: Sequence[Sequence[object]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        self._file.write(text.getvalue().encode())


class _ParquetWriter:
    """A row group a batch. Ids and digests are text; counts are 64 bits wide."""

    media_type = "application/vnd.apache.parquet"

    def __init__(self, file: Any, question: Question) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise InvalidRequest(
                "This installation writes no Parquet: pip install 'manylora[parquet]'.",
                param="format",
            ) from None
        types = {"day": pyarrow.date32(), "hour": pyarrow.timestamp("us", tz="UTC")}
        self._columns = (*question.fields, *COUNTS)
        self._text = {name for name in question.fields if name not in types}
        self._schema = pyarrow.schema(
            [(name, types.get(name, pyarrow.string())) for name in question.fields]
            + [(name, pyarrow.int64()) for name in COUNTS]
        )
        self._arrow = pyarrow
        self._writer = pyarrow.parquet.ParquetWriter(file, self._schema)

    def add(self, rows: Sequence[UsageRow]) -> None:
        columns = {name: [self._value(row, name) for row in rows] for name in self._columns}
        self._writer.write_table(self._arrow.table(columns, schema=self._schema))

    def finish(self) -> None:
        self._writer.close()

    def _value(self, row: UsageRow, name: str) -> object:
        value = getattr(row, name)
        return value if value is None or name not in self._text else str(value)
