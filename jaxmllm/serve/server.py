"""The process that listens: its socket, its ready line, and its end."""

from __future__ import annotations

import ipaddress
import signal
import socket
import time
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from jaxmllm.errors import ConfigError
from jaxmllm.serve.batches import Batcher
from jaxmllm.watched import leave

GRACE = 5.0  # seconds that replies have to be completed when the server is told to stop
ONE = 0.2  # seconds within which signals count as one: `timeout` and some schedulers send each twice
MOST_CONNECTIONS = 1000


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket with this address, which does not listen yet. port 0: any that is free.

    Raises ConfigError if it cannot have the address.
    """
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port must be from 0 to 65535, not {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except OSError as error:
        raise ConfigError(f"{host}, port {port}: {error.strerror}; choose another with --host or --port") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host of this name."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address_of(bound: socket.socket) -> str:
    """The URL of a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT. Replies in the making then have GRACE seconds; a second signal ends at once."""

    def __init__(self, app: ASGIApp, batcher: Batcher, ready: Callable[[], None], say: Callable[[str], None]):
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=int(GRACE) + 2,
        )
        super().__init__(config)
        self.batcher, self.ready, self.say, self.told = batcher, ready, say, 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    def handle_exit(self, sig: int, frame) -> None:
        """uvicorn's handler of signals. It would raise the signal again at the end, which is no clean end."""
        if self.should_exit and time.monotonic() - self.told > ONE:
            leave(128 + sig)
        if not self.should_exit:
            self.should_exit, self.told = True, time.monotonic()
            self.batcher.stop(GRACE)
            name = signal.Signals(sig).name
            self.say(f"{name}: no request is taken any more; replies in the making have {GRACE:.0f} s; again: at once")
