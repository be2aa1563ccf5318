"""Logs for the one on call: an event name and its fields, one line each, never anybody's text."""

import logging
import re
import sys
import time

# What every log record carries by itself; anything else came in through `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

# What needs no quotes.
_PLAIN = re.compile(r"""[^ \t\n"'=]+""")


class EventFormatter(logging.Formatter):
    """`time level logger event key=value ...`, with the traceback below where there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s")
        # The second that was spelled last, and how: spelling it takes as long as all the rest.
        self._second, self._spelled = 0, ""

    def formatTime(  # noqa: N802 (logging's own name)
        self, record: logging.LogRecord, datefmt: str | None = None
    ) -> str:
        second = int(record.created)
        if second != self._second:
            self._second = second
            self._spelled = time.strftime(self.default_time_format, time.localtime(second))
        return f"{self._spelled},{int(record.msecs):03d}"

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's own name)
        names = sorted(vars(record).keys() - _STANDARD)
        told = "".join([f" {name}={_spell(getattr(record, name))}" for name in names])
        return f"{record.asctime} {record.levelname} {record.name} {record.message}{told}"


def _spell(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else repr(text)


def configure_logging(*, level: int = logging.INFO) -> None:
    """Send everything to standard error, one line an event."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(EventFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Nothing of what a record could carry besides is shown, and each generation makes a record:
    # https://docs.python.org/3/howto/logging.html#optimization
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = ""
    # One line per request to the engine says nothing that the engine does not say.
    logging.getLogger("httpx").setLevel(logging.WARNING)
