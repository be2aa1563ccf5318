"""Logs for the one on call: an event name and its fields, one line each, never anybody's text."""

import logging
import re
import sys

# What every log record carries by itself; anything else came in through `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

# What needs no quotes.
_PLAIN = re.compile(r"""[^ \t\n"'=]+""")


class EventFormatter(logging.Formatter):
    """`time level logger event key=value ...`, with the traceback below where there is one."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's own name)
        fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        told = "".join(f" {name}={_spell(value)}" for name, value in sorted(fields.items()))
        return super().formatMessage(record) + told


def _spell(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else repr(text)


def configure_logging(*, level: int = logging.INFO) -> None:
    """Send everything to standard error, one line an event."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(EventFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Nothing of what a record could carry besides is shown, and each generation makes a record.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # One line per request to the engine says nothing that the engine does not say.
    logging.getLogger("httpx").setLevel(logging.WARNING)
