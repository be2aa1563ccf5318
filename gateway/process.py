"""What `python -m gateway` does: one gateway worker, with its settings in the environment."""

import ctypes
import gc
import logging
import os
import signal
import socket

import uvicorn

from gateway.app import create_app
from gateway.errors import JournalInUse
from gateway.settings import Settings, SettingsFault
from gateway.telemetry import configure_logging

logger = logging.getLogger("gateway")

# What the kernel takes for a connection before its client's window opens. Left to itself it takes
# megabytes: tens of thousands of tokens, generated and billed for a client that reads none.
_MAX_UNSENT_BYTES = 128 << 10
# A collection of the youngest takes some two milliseconds, one of the middle ones ten.
COLLECTOR_THRESHOLDS = (5_000, 5, 10)


def main() -> int:
    """Serve until told to stop; return the exit status."""
    configure_logging()
    try:
        settings = Settings.from_environment()
        if settings.parent_pid is not None and not _is_bound_to(settings.parent_pid):
            return os.EX_UNAVAILABLE
        app = create_app(settings)
    except (SettingsFault, JournalInUse) as error:
        logger.error("cannot_start", extra={"reason": str(error)})
        return os.EX_CONFIG
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        # Whom `X-Forwarded-For` is believed from is for MANYLORA_TRUSTED_PROXIES to say.
        proxy_headers=False,
        timeout_graceful_shutdown=10,
    )
    # What is there now stays: the collector need not look at it again and again. Nor at requests
    # that run, whose objects go by themselves: by default it takes a thirteenth of all CPU time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
    gc.enable()
    server = _Server(config)
    server.run()
    return os.EX_OK if server.started else os.EX_UNAVAILABLE


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                # Every connection inherits it from its listener.
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MAX_UNSENT_BYTES)


def _is_bound_to(parent_pid: int) -> bool:
    """Have the kernel end this process with its parent; false when that is gone already."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGTERM), 0, 0, 0)
    return os.getppid() == parent_pid
